"""Code of the user, named on the command line: the only one that any command runs."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cmdgpu.errors import CmdgpuError, UsageError, printable
from cmdgpu.store.places import Place, local_path


def task(
    source: Place, evaluate: str | None, model: str | None, loader: str | None, select: str | None
) -> tuple[Place, dict[str, Any], tuple[str, ...]]:
    """Where to look, what to evaluate with, what to select by; ``--evaluate demo`` brings all of it."""
    keys = tuple(select.split(",")) if select else ()
    if evaluate != "demo":
        return source, given(evaluate, model, loader), keys
    from cmdgpu.demo import SELECT, task_of

    if model or loader:
        raise UsageError("the demo brings its own network", hint="leave --model and --loader out")
    found = task_of(local_path(source, "the demo"))
    return found.place, {"evaluate": found.evaluate, "model": found.model}, keys or SELECT


def given(evaluate: str | None, model: str | None, loader: str | None) -> dict[str, Any]:
    """Arguments of these names, imported before anything is opened; of the loader what its function makes."""
    named = {"evaluate": evaluate, "model": model, "loader": loader}
    found = {word: _imported(f"--{word}", name) for word, name in named.items() if name is not None}
    if "model" in found:
        build = found["model"]
        found["model"] = lambda: _called("--model", build)
    if "loader" in found:
        found["loader"] = _called("--loader", found["loader"])
    return found


def _imported(option: str, name: str) -> Callable[..., Any]:
    """The function behind ``module:function``, with the current directory on the path."""
    match = re.fullmatch(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d]\w*)", name)
    if match is None:
        raise UsageError(f"{option} {printable(name)!r} is no MODULE:FUNCTION", hint="write task:evaluate")
    module, function = match.groups()
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise _failed(f"{option}: importing {module}", error) from error
        raise UsageError(
            f"{option}: there is no module {module!r}",
            hint=f"it is looked for in {here} and among what is installed",
        ) from error
    except Exception as error:
        raise _failed(f"{option}: importing {module}", error) from error
    if not callable(made := getattr(found, function, None)):
        what = "has no function" if made is None else "has something else than a function as"
        raise UsageError(f"{option}: {module} {what} {function!r}", file=getattr(found, "__file__", None))
    return made


def _called(option: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        raise _failed(f"{option}: {printable(getattr(function, '__qualname__', 'it'))}", error) from error


def _failed(what: str, error: Exception) -> CmdgpuError:
    said = printable(" ".join(str(error).split()), 240)
    return CmdgpuError(f"{what} raised {type(error).__name__}{f' ({said})' if said else ''}")
