"""How a command ends: text or one JSON object on stdout, one line on stderr, an exit code."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, NoReturn, ParamSpec, cast

import click

from cmdgpu.cli.bar import LineProgress, terminal_progress
from cmdgpu.errors import CmdgpuError, CmdgpuWarning, UsageError
from cmdgpu.progress import Progress, Silent
from cmdgpu.version import __version__

_SCHEMA = 1
P = ParamSpec("P")


@dataclass
class Outcome:
    """What a command found."""

    payload: dict[str, Any]
    """Keys of the JSON object beyond the envelope."""
    text: str
    """What a person reads."""
    spoken: bool = True
    """False: another rank of the same command says it."""
    ok: bool = True
    """False: the command did its work and found something wrong (exit code 1)."""


@dataclass
class Context:
    """What every command is given besides its own options."""

    progress: Progress
    warned: list[str] = field(default_factory=list[str])


def command(name: str, **settings: Any) -> Callable[[Callable[..., Outcome]], click.Command]:
    """A click command whose function answers an Outcome; adds --json, --quiet and --debug."""

    def decorate(function: Callable[..., Outcome]) -> click.Command:
        @functools.wraps(function)
        def run(**options: Any) -> None:
            as_json, quiet, debug = options.pop("json"), options.pop("quiet"), options.pop("debug")
            _run(name, function, options, as_json=as_json, quiet=quiet, debug=debug)

        options = (
            click.option("--json", is_flag=True, help="Print one JSON object and nothing else on stdout."),
            click.option("-q", "--quiet", is_flag=True, help="No progress, no warnings."),
            click.option("--debug", is_flag=True, help="Show the traceback of an error."),
        )
        wrapped = cast(Any, run)
        for option in reversed(options):
            wrapped = option(wrapped)
        return click.command(name, **settings)(wrapped)

    return decorate


def _run(
    name: str,
    function: Callable[..., Outcome],
    options: dict[str, Any],
    *,
    as_json: bool,
    quiet: bool,
    debug: bool,
) -> NoReturn:
    started = time.perf_counter()
    progress: Progress = Silent() if quiet else terminal_progress() if sys.stderr.isatty() else LineProgress()
    context = Context(progress)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended from outside: the same way as Ctrl-C
    outcome: Outcome | None = None
    error: CmdgpuError | None = None
    code = 0
    try:
        with _warnings_to(context, quiet):
            outcome = function(context, **options)
        code = 0 if outcome.ok else 1
    except KeyboardInterrupt:
        error, code = CmdgpuError("interrupted", hint="the same command goes on where it stopped"), 1
    except CmdgpuError as raised:
        error, code = raised, 2 if isinstance(raised, UsageError) else 1
        if debug:
            traceback.print_exc()
    except OSError as raised:
        error = CmdgpuError(raised.strerror or str(raised), file=raised.filename)
        code = 1
        if debug:
            traceback.print_exc()
    except MemoryError:
        error, code = CmdgpuError("out of memory", hint="give a smaller --memory-limit"), 1
    if outcome is not None and not outcome.spoken:
        sys.exit(code)
    if as_json:
        envelope: dict[str, Any] = {
            "schema": _SCHEMA,
            "command": name,
            "ok": code == 0,
            "version": __version__,
            "elapsed_s": time.perf_counter() - started,
            "warnings": context.warned,
        }
        if error is not None:
            envelope["error"] = _error_fields(error)
        elif outcome is not None:
            envelope.update(outcome.payload)
        click.echo(json.dumps(strict(envelope), allow_nan=False))
    elif outcome is not None:
        click.echo(outcome.text)
    if error is not None:
        click.echo(f"error: {error}", err=True)
    sys.exit(code)


@contextlib.contextmanager
def _warnings_to(context: Context, quiet: bool) -> Generator[None]:
    """Our warnings become lines on stderr and entries of the JSON object; others stay what they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", CmdgpuWarning)
        others = warnings.showwarning

        def show(
            message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any
        ) -> None:
            if not issubclass(category, CmdgpuWarning):
                others(message, category, filename, lineno, *rest)
                return
            context.warned.append(str(message))
            if not quiet:
                click.echo(f"warning: {message}", err=True)

        warnings.showwarning = show
        yield


def _error_fields(error: CmdgpuError) -> dict[str, Any]:
    return {
        "kind": type(error).__name__,
        "message": error.message,
        "file": error.file,
        "tensor": error.tensor,
        "step": error.step,
        "hint": error.hint,
    }


def fail_usage(error: click.UsageError, *, as_json: bool) -> NoReturn:
    """The command line is wrong: nothing was opened."""
    name = error.ctx.command.name if error.ctx is not None else None
    if as_json:
        found = CmdgpuError(error.format_message(), hint="see --help")
        fields = {**_error_fields(found), "kind": type(error).__name__}
        envelope = {"schema": _SCHEMA, "command": name, "ok": False, "version": __version__}
        click.echo(json.dumps({**envelope, "elapsed_s": 0.0, "warnings": [], "error": fields}))
    path = error.ctx.command_path if error.ctx is not None else "cmdgpu"
    click.echo(f"error: {error.format_message()}; see {path} --help", err=True)
    sys.exit(2)


def strict(value: Any) -> Any:
    """The value as strict JSON can hold it: NaN and infinities become null."""
    if isinstance(value, dict):
        return {str(key): strict(inner) for key, inner in cast(dict[Any, Any], value).items()}
    if isinstance(value, (list, tuple)):
        return [strict(inner) for inner in cast(list[Any], value)]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
