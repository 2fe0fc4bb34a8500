"""The ``cmdgpu`` command: parse, call, print as text or as one JSON object. No logic lives here.

One file per command, imported when it is called: ``--help`` and usage errors import neither torch nor zarr.
"""

from __future__ import annotations

import importlib
import keyword
import sys
from typing import Final

import click

from cmdgpu.cli.outcome import fail_usage
from cmdgpu.version import __version__

_COMMANDS: Final = {
    "demo": "train on real digits, record, decompose, rebuild, draw: the whole way in a minute",
    "import": "take in the checkpoints of any trainer",
    "inspect": "say what a trajectory, a result or a checkpoint holds",
    "verify": "check every byte of a trajectory or a result",
    "repair": "bring a damaged trajectory back to its last whole snapshot",
    "fit": "decompose a trajectory into modes, out of core",
    "compare": "hold methods against the recorded snapshots: weights, scores, bytes, seconds",
    "report": "show a fit in one page: figures, tables, and whether its modes mean anything",
    "landscape": "evaluate the model while the references of two modes take other values",
    "export": "write one step of a trajectory or a result as a file",
    "doctor": "say what this machine can do, and why not more",
}


class _Commands(click.Group):
    """Loads a command's module when the command is named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        del ctx
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx
        if cmd_name not in _COMMANDS:
            return None
        module = f"{cmd_name}_" if keyword.iskeyword(cmd_name) else cmd_name
        return importlib.import_module(f"cmdgpu.cli.{module}").run

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.command(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="cmdgpu")
def cli() -> None:
    """Record, decompose and rebuild the training trajectory of any PyTorch model, bigger than memory.

    \b
    Record a run from Python:
      with cmdgpu.Recorder("run.zarr") as recorder:
          recorder.record(model, step, loss=loss)
    \b
    Or take in the checkpoints that there are:
      cmdgpu import checkpoints/ run.zarr
    \b
    Then:
      cmdgpu inspect run.zarr
      cmdgpu fit run.zarr -o run.cmd.zarr --modes 10
      cmdgpu export run.cmd.zarr -o model.safetensors --step -1

    Every command takes --json (one object on stdout), --quiet and --debug. Exit codes: 0 done, 1 ran and
    failed or found damage, 2 the command line is wrong.
    """


def main() -> None:
    """Entry point of the console script."""
    try:
        cli.main(prog_name="cmdgpu", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "", err=True)
        sys.exit(2)
    except click.UsageError as error:
        fail_usage(error, as_json="--json" in sys.argv)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.Abort:
        sys.exit(1)
