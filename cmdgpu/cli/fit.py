"""``cmdgpu fit``."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from cmdgpu.cli.outcome import Context, Outcome, command
from cmdgpu.cli.steps import parse_steps
from cmdgpu.errors import UsageError
from cmdgpu.memory import MemoryMeter, show_bytes

if TYPE_CHECKING:
    from cmdgpu.decomposition import CMD


@command("fit")
@click.argument("store", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="Folder of the result.")
@click.option("--modes", type=int, help="M, the largest number of modes.  [default: 10]")
@click.option("--threshold", type=float, help="Cut the clustering at this distance instead of at M modes.")
@click.option("--samples", type=int, default=1000, show_default=True, help="K, rows that are clustered.")
@click.option("--sampling", default="layer-balanced", show_default=True, help="layer-balanced or uniform.")
@click.option("--affinity", default="abs-corr", show_default=True, help="abs-corr or corr-profile.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the sample.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option(
    "--memory-limit", help="Host memory of the fit: 512MiB, 4GiB.  [default: a quarter of what is free]"
)
@click.option("--start", type=int, help="First snapshot, as a position.")
@click.option("--stop", type=int, help="Snapshot to stop before, as a position.")
@click.option("--stride", type=int, default=1, show_default=True, help="Every how many snapshots.")
@click.option("--steps", help="Steps to fit instead, as labels: 0,100,200.")
@click.option(
    "--buffers",
    type=click.Choice(["fit", "skip"]),
    default="fit",
    show_default=True,
    help="Fit buffers too, apart from parameters, or leave them out of the result.",
)
@click.option("--resume/--no-resume", default=True, help="Go on with an unfinished fit, or start over.")
def run(
    context: Context,
    *,
    store: Path,
    out: Path,
    modes: int | None,
    threshold: float | None,
    samples: int,
    sampling: str,
    affinity: str,
    seed: int,
    device: str,
    memory_limit: str | None,
    start: int | None,
    stop: int | None,
    stride: int,
    steps: str | None,
    buffers: Literal["fit", "skip"],
    resume: bool,
) -> Outcome:
    """Decompose the trajectory STORE into modes and write the result to OUT.

    Every byte of the store is read once. A killed fit goes on where it stopped when the same command is
    given again, with the same result, bit for bit.

    \b
    cmdgpu fit run.zarr -o run.cmd.zarr --modes 10
    cmdgpu fit run.zarr -o strict.cmd.zarr --threshold 0.1 --start 50
    cmdgpu fit run.zarr -o small.cmd.zarr --memory-limit 512MiB --device cpu
    """
    if modes is not None and threshold is not None:
        raise UsageError("--modes and --threshold exclude each other", hint="leave one of them out")
    from cmdgpu.decomposition import CMD
    from cmdgpu.trajectory import Trajectory

    cmd = CMD(
        n_modes=10 if modes is None else modes,
        threshold=threshold,
        n_samples=samples,
        sampling=sampling,
        affinity=affinity,
        random_state=seed,
        device=device,
    )
    traj = Trajectory.open(store)
    if (start, stop, stride, steps) != (None, None, 1, None):
        traj = traj.sel(start, stop, stride, parse_steps(steps))
    importlib.import_module("cmdgpu.streaming.engine")  # torch and its libraries are not the fit's memory
    with MemoryMeter() as meter:
        cmd.fit(
            traj,
            out=out,
            buffers=buffers,
            memory_limit=memory_limit,
            resume=resume,
            progress=context.progress,
        )
    n_rows, n_snapshots = traj.shape
    chosen = traj.steps
    head = (
        f"source  {store}, {n_rows} rows x {n_snapshots} snapshots, {traj.dtype}, "
        f"{show_bytes(traj.stored_bytes)}, {traj.unit}s {chosen[0]}..{chosen[-1]}"
    )
    payload = _payload(cmd, out, meter)
    tail = f"wrote {out}, peak memory {show_bytes(meter.above_start_bytes)} above the start"
    return Outcome(payload, "\n".join([head, cmd.summary(), tail]))


def _payload(cmd: CMD, out: Path, meter: MemoryMeter) -> dict[str, Any]:
    import torch

    device_bytes = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {
        "out": str(out),
        **cmd.metrics_,
        "buffers": cmd.buffer_metrics_,
        "peak_rss_bytes": meter.above_start_bytes,
        "peak_device_bytes": device_bytes,
    }
