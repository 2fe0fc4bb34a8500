"""``cmdgpu export``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from cmdgpu.cli.outcome import Context, Outcome, command
from cmdgpu.cli.places import PlaceType
from cmdgpu.memory import show_bytes
from cmdgpu.store.places import Place


@command("export")
@click.argument("source", type=PlaceType())
@click.option("-o", "--out", required=True, type=PlaceType("an export"), help="File or folder to write.")
@click.option("--step", type=int, default=-1, show_default=True, help="A step; -1 is the last one.")
@click.option(
    "--format",
    "kind",
    help="safetensors, pt, or a folder: dcp, huggingface.  [default: told by the suffix of OUT]",
)
@click.option("--max-shard-size", help="Size of a shard of format huggingface: 500MB, 5GB.  [default: 5GB]")
@click.option("--params", multiple=True, metavar="RE", help="Only tensors whose name matches; repeatable.")
@click.option(
    "--buffers",
    type=click.Choice(["recorded", "rebuilt", "skip"]),
    default="recorded",
    show_default=True,
    help="BatchNorm statistics and the like: as recorded, as a result rebuilds them, or left out.",
)
def run(
    context: Context,
    *,
    source: Place,
    out: Path,
    step: int,
    kind: str | None,
    max_shard_size: str | None,
    params: tuple[str, ...],
    buffers: Literal["recorded", "rebuilt", "skip"],
) -> Outcome:
    """Write one step of SOURCE as a checkpoint, in bounded memory.

    A trajectory gives the recorded tensors back, bit for bit; a result gives the rebuilt ones, with buffers
    as they were recorded. A file replaces the one that is there; a folder must not be there yet.

    \b
    cmdgpu export run.zarr -o epoch-40.safetensors --step 40
    cmdgpu export run.cmd.zarr -o rebuilt.pt --step -1
    cmdgpu export run.zarr -o checkpoint --format dcp
    cmdgpu export run.zarr -o model --format huggingface --max-shard-size 2GB
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
    written = origin.export(
        out, step, kind, params=list(params) or None, buffers=buffers, max_shard_size=max_shard_size
    )
    label = int(steps[step]) if step < 0 else step
    payload = {
        "out": str(out),
        "format": written.format,
        "step": label,
        "n_tensors": written.n_tensors,
        "bytes": written.n_bytes,
        "left_out": list(written.left_out),
        "buffers": {"policy": buffers, "step": written.buffers_step},
    }
    text = f"wrote {out}: step {label}, {written.n_tensors} tensors, {show_bytes(written.n_bytes)}"
    return Outcome(payload, text)
