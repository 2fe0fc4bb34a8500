"""``cmdgpu export``."""

from __future__ import annotations

from pathlib import Path

import click

from cmdgpu.cli.outcome import Context, Outcome, command
from cmdgpu.memory import show_bytes


@command("export")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="File to write.")
@click.option("--step", type=int, default=-1, show_default=True, help="A step; -1 is the last one.")
@click.option("--format", "kind", help="safetensors or pt.  [default: told by the suffix of OUT]")
@click.option("--params", multiple=True, metavar="RE", help="Only tensors whose name matches; repeatable.")
def run(
    context: Context, *, source: Path, out: Path, step: int, kind: str | None, params: tuple[str, ...]
) -> Outcome:
    """Write one step of SOURCE as a checkpoint file, in bounded memory.

    A trajectory gives the recorded tensors back, bit for bit; a result gives the rebuilt ones, with buffers
    as they were recorded.

    \b
    cmdgpu export run.zarr -o epoch-40.safetensors --step 40
    cmdgpu export run.cmd.zarr -o rebuilt.pt --step -1
    """
    del context
    from cmdgpu.results import kind_of

    if kind_of(source) == "trajectory":
        from cmdgpu.trajectory import Trajectory

        origin = Trajectory.open(source)
        steps = origin.steps
    else:
        from cmdgpu.decomposition import CMD

        origin = CMD.load(source)
        steps = origin.steps_
    written = origin.export(out, step, kind, params=list(params) or None)
    label = int(steps[step]) if step < 0 else step
    payload = {
        "out": str(out),
        "format": written.format,
        "step": label,
        "n_tensors": written.n_tensors,
        "bytes": written.n_bytes,
        "left_out": list(written.left_out),
    }
    text = f"wrote {out}: step {label}, {written.n_tensors} tensors, {show_bytes(written.n_bytes)}"
    return Outcome(payload, text)
