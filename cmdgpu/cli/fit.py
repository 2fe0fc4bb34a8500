"""``cmdgpu fit``: one trajectory, or many with many settings."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from cmdgpu.cli.outcome import Context, Outcome, command
from cmdgpu.cli.steps import parse_numbers, parse_steps
from cmdgpu.errors import UsageError
from cmdgpu.memory import MemoryMeter, show_bytes
from cmdgpu.progress import Silent

if TYPE_CHECKING:
    from cmdgpu.batch import GridFit
    from cmdgpu.decomposition import CMD
    from cmdgpu.trajectory import Trajectory


@command("fit")
@click.argument("stores", nargs=-1, required=True, metavar="STORE...")
@click.option("-o", "--out", required=True, help="The result; of several fits, the folder of their results.")
@click.option("--modes", help="M, the largest number of modes; several: 2,5,10.  [default: 10]")
@click.option("--threshold", type=float, help="Cut the clustering at this distance instead of at M modes.")
@click.option("--samples", type=int, default=1000, show_default=True, help="K, rows that are clustered.")
@click.option("--sampling", default="layer-balanced", show_default=True, help="layer-balanced or uniform.")
@click.option("--affinity", default="abs-corr", show_default=True, help="abs-corr or corr-profile.")
@click.option(
    "--references",
    type=click.Choice(["row", "component"]),
    default="row",
    show_default=True,
    help="A mode's central row, as in the paper, or the first principal component of its sampled rows.",
)
@click.option(
    "--refine",
    type=int,
    default=0,
    show_default=True,
    metavar="ROUNDS",
    help="Passes that fit the references to all rows of their modes; ends when nothing is gained.",
)
@click.option(
    "--objective",
    type=click.Choice(["energy", "correlation"]),
    default="energy",
    show_default=True,
    help="What components and refined references explain best: all movement, or every row alike.",
)
@click.option(
    "--seed", "--seeds", "seeds", default="0", show_default=True, help="Of the sample; several: 0:5."
)
@click.option("--params", multiple=True, metavar="REGEX", help="Fit the tensors whose name matches alone.")
@click.option("--per-module", is_flag=True, help="One fit for each network: each first part of the names.")
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="auto, cpu, cuda (all of them), cuda:1, cuda:0,cuda:1.",
)
@click.option(
    "--executor",
    default="local",
    show_default=True,
    help="Who computes: local, ranks (torchrun, srun), dask, dask:ADDRESS.",
)
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
    stores: tuple[str, ...],
    out: str,
    modes: str | None,
    threshold: float | None,
    samples: int,
    sampling: str,
    affinity: str,
    references: str,
    refine: int,
    objective: str,
    seeds: str,
    params: tuple[str, ...],
    per_module: bool,
    device: str,
    executor: str,
    memory_limit: str | None,
    start: int | None,
    stop: int | None,
    stride: int,
    steps: str | None,
    buffers: Literal["fit", "skip"],
    resume: bool,
) -> Outcome:
    """Decompose the trajectory STORE into modes and write the result to OUT.

    Every byte of the store is read once, for all fits of it; once more for every round of --refine. With
    several stores, modes, seeds or modules, OUT is a folder, and every combination has a result there. A
    killed fit goes on where it stopped when the same command is given again, with the same result, bit for
    bit.

    \b
    cmdgpu fit run.zarr -o run.cmd.zarr --modes 10
    cmdgpu fit run.zarr -o strict.cmd.zarr --threshold 0.1 --start 50
    cmdgpu fit run.zarr -o small.cmd.zarr --memory-limit 512MiB --device cpu
    cmdgpu fit run*.zarr -o fits/ --modes 2,5,10 --seeds 0:5
    cmdgpu fit gan.zarr -o fits/ --per-module
    cmdgpu fit run.zarr -o better.cmd.zarr --references component --refine 5
    torchrun --nproc-per-node 4 -m cmdgpu fit run.zarr -o run.cmd.zarr --executor ranks
    """
    if modes is not None and threshold is not None:
        raise UsageError("--modes and --threshold exclude each other", hint="leave one of them out")
    from cmdgpu.batch import Selection, fit_grid
    from cmdgpu.decomposition import CMD
    from cmdgpu.trajectory import Trajectory

    asked_modes = parse_numbers("--modes", modes or "10")
    asked_seeds = parse_numbers("--seeds", seeds)
    selection = Selection(start, stop, stride, parse_steps(steps), list(params) or None)
    rank = _rank(executor)
    progress = context.progress if not rank else Silent()
    several = len(stores) > 1 or len(asked_modes) > 1 or len(asked_seeds) > 1
    importlib.import_module("cmdgpu.streaming.engine")  # torch and its libraries are not the fit's memory
    options: dict[str, Any] = {
        "executor": executor, "buffers": buffers, "memory_limit": memory_limit,
        "resume": resume, "progress": progress,
    }  # fmt: skip
    settings: dict[str, Any] = {
        "threshold": threshold, "n_samples": samples, "sampling": sampling, "affinity": affinity,
        "references": references, "refine": refine, "objective": objective, "device": device,
    }  # fmt: skip
    if several or per_module or (out.endswith("/") and not Path(out, "zarr.json").exists()):
        with MemoryMeter() as meter:
            fits = fit_grid(
                stores, out, n_modes=asked_modes, seeds=asked_seeds, per_module=per_module,
                selection=selection, **settings, **options,
            )  # fmt: skip
        return _told_by(rank, _grid_outcome(fits, meter))
    store = next(iter(stores))
    cmd = CMD(n_modes=asked_modes[0], random_state=asked_seeds[0], **settings)
    traj = selection.of(Trajectory.open(store))
    with MemoryMeter() as meter:
        cmd.fit(traj, out=out, **options)
    return _told_by(rank, _one_outcome(store, traj, cmd, out, meter) if not rank else Outcome({}, ""))


def _rank(executor: str) -> int:
    """Of a process that a launcher started: the first one alone speaks."""
    if executor != "ranks":
        return 0
    from cmdgpu.streaming.executors import RankStride

    return RankStride.here().rank


def _told_by(rank: int, outcome: Outcome) -> Outcome:
    outcome.spoken = rank == 0
    return outcome


def _one_outcome(store: str, traj: Trajectory, cmd: CMD, out: str, meter: MemoryMeter) -> Outcome:
    n_rows, n_snapshots = traj.shape
    live, chosen = traj.parameters.n_live, traj.steps
    rows = f"{n_rows} rows" if live == n_rows else f"{live} of {n_rows} rows"
    head = (
        f"source  {store}, {rows} x {n_snapshots} snapshots, {traj.dtype}, "
        f"{show_bytes(traj.stored_bytes)}, {traj.unit}s {chosen[0]}..{chosen[-1]}"
    )
    tail = f"wrote {out}, peak memory {show_bytes(meter.above_start_bytes)} above the start"
    payload = {
        "out": out, **cmd.metrics_, "buffers": cmd.buffer_metrics_, "quality": cmd.quality().to_dict(),
        **_peaks(meter),
    }  # fmt: skip
    return Outcome(payload, "\n".join([head, cmd.summary(), tail]))


def _peaks(meter: MemoryMeter) -> dict[str, int]:
    import torch

    device_bytes = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"peak_rss_bytes": meter.above_start_bytes, "peak_device_bytes": device_bytes}


def _grid_outcome(fits: list[GridFit], meter: MemoryMeter) -> Outcome:
    """One table of all fits, a line each; what failed says why below it."""
    width = max(len(fit.out.name) for fit in fits)
    lines = [f"{'result':{width}s}    M  modes  seed  mean |corr|     R^2   by energy    constant    bytes"]
    lines += [_grid_line(fit, width) for fit in fits]
    failed = [fit for fit in fits if fit.error is not None]
    lines += [f"failed  {fit.out.name}: {fit.error}" for fit in failed]
    # a pass is shared by the fits of a store: its bytes and seconds are counted once
    done = [(str(fit.store), fit.cmd.metrics_) for fit in fits if fit.error is None]
    passes = {(store, metrics["stage_s"].get("pass")): metrics for store, metrics in done}
    n_bytes = sum(metrics["bytes_read"] for metrics in passes.values())
    seconds = sum(metrics["stage_s"].get("pass", 0.0) for metrics in passes.values())
    rate = f", {show_bytes(n_bytes)} read in {seconds:.1f} s" if seconds else ""
    lines.append(
        f"{len(fits) - len(failed)} of {len(fits)} fits of {len({fit.store for fit in fits})} stores in "
        f"{fits[0].out.parent}{rate}, peak memory {show_bytes(meter.above_start_bytes)} above the start"
    )
    payload = {
        "fits": [_grid_entry(fit) for fit in fits],
        "n_failed": len(failed),
        "bytes_read": n_bytes,
        **_peaks(meter),
    }
    return Outcome(payload, "\n".join(lines), ok=not failed)


def _grid_line(fit: GridFit, width: int) -> str:
    asked = "-" if fit.cmd.threshold is not None else str(fit.cmd.n_modes)
    if fit.error is not None:
        return f"{fit.out.name:{width}s}  {asked:>3s}      -  {fit.seed:4d}  failed"
    found = fit.cmd.metrics_
    return (
        f"{fit.out.name:{width}s}  {asked:>3s}  {found['n_modes']:5d}  {fit.seed:4d}  "
        f"{found['mean_abs_correlation']:11.4f}  {found['r2']:6.4f}  {found['r2_energy']:10.4f}  "
        f"{found['n_constant']:10d}  {show_bytes(found['result_bytes']):>7s}"
    )


def _grid_entry(fit: GridFit) -> dict[str, Any]:
    asked = {
        "store": str(fit.store), "out": str(fit.out), "module": fit.module, "seed": fit.seed,
        "modes": None if fit.cmd.threshold is not None else fit.cmd.n_modes, "threshold": fit.cmd.threshold,
    }  # fmt: skip
    if fit.error is not None:
        return {**asked, "error": str(fit.error)}
    return {**asked, **fit.cmd.metrics_, "buffers": fit.cmd.buffer_metrics_}
