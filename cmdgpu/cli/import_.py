"""``cmdgpu import``."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cmdgpu.cli.outcome import Context, Outcome, command
from cmdgpu.cli.places import PlaceType
from cmdgpu.cli.steps import parse_steps
from cmdgpu.errors import UsageError, printable
from cmdgpu.memory import MemoryMeter, show_bytes

if TYPE_CHECKING:
    from cmdgpu.importing import ImportPlan, ImportReport

_MOST_SHOWN = 20
"""Lines of one kind; --json has them all."""


@command("import")
@click.argument("paths", nargs=-1, metavar="PATHS...")
@click.argument("out", type=PlaceType("an import"))
@click.option(
    "--steps",
    help="Step of every checkpoint, in the order given (a folder or glob: natural order): 0,100,200.",
)
@click.option("--prefix", default="", help="Take names that begin so, and take it off.")
@click.option("--include", multiple=True, metavar="RE", help="Only tensors whose name matches; repeatable.")
@click.option("--exclude", multiple=True, metavar="RE", help="No tensor whose name matches; repeatable.")
@click.option(
    "--key-map", type=click.Path(path_type=Path), metavar="FILE", help='JSON of names: {"old": "new"}.'
)
@click.option(
    "--dtype", help="float32, float16 or bfloat16.  [default: the widest of the tensors, float32 at most]"
)
@click.option(
    "--memory-limit", help="Memory of the import: 512MiB, 4GiB.  [default: a quarter of what is free]"
)
@click.option("--resume/--no-resume", default=True, help="Continue OUT, or refuse it when it is there.")
@click.option("--dry-run", is_flag=True, help="Headers only: say what would be done, and write nothing.")
@click.option("--zstd", is_flag=True, help="Compress the chunks.")
@click.option("--unit", default="step", show_default=True, help="What a step counts: step, epoch, ...")
def run(
    context: Context,
    *,
    paths: tuple[str, ...],
    out: Path,
    steps: str | None,
    prefix: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    key_map: Path | None,
    dtype: str | None,
    memory_limit: str | None,
    resume: bool,
    dry_run: bool,
    zstd: bool,
    unit: str,
) -> Outcome:
    """Take the checkpoints at PATHS (files, folders, globs) into the trajectory OUT, in bounded memory.

    They are ordered by the step in their names, or in the files. Nothing of them is executed. All headers are
    compared before anything is written; a killed import goes on when the same command is given again, and
    more checkpoints continue it.

    \b
    cmdgpu import out/ run.zarr --dry-run
    cmdgpu import 'out/checkpoint-*' run.zarr --memory-limit 512MiB
    cmdgpu import epoch_1.pt epoch_2.pt run.zarr --unit epoch --exclude '^head'
    """
    if not paths:
        raise UsageError(f"OUT is missing beside {out}", hint="cmdgpu import CHECKPOINTS... TRAJECTORY")
    from cmdgpu.importing import carry_out, plan_checkpoints

    with MemoryMeter() as meter:
        plan = plan_checkpoints(
            list(paths),
            out,
            parse_steps(steps),
            prefix,
            list(include) or None,
            list(exclude) or None,
            key_map,
            resume,
            dtype=dtype,
            memory_limit=memory_limit,
            zstd=zstd,
            unit=unit,
        )
        if dry_run:
            return Outcome(_planned(plan), "\n".join(_describe(plan)))
        report = carry_out(plan, context.progress)
    return Outcome(
        {**_done(report), "peak_rss_bytes": meter.above_start_bytes}, _said(report, meter.above_start_bytes)
    )


# ---- what would be done ---------------------------------------------------------------------------------


def _payload(plan: ImportPlan) -> dict[str, Any]:
    mapped = plan.map
    formats = sorted({planned.format for planned in plan.checkpoints})
    return {
        "out": str(plan.out),
        "format": formats[0] if len(formats) == 1 else formats,
        "dtype": plan.dtype,
        "unit": plan.unit,
        "n_rows": mapped.n_rows,
        "n_parameters": mapped.n_rows_of("parameter"),
        "n_buffers": mapped.n_rows_of("buffer"),
        "n_holes": sum(stop - start for start, stop in mapped.holes),
        "n_tensors": len(mapped),
        "n_snapshots": plan.n_snapshots,
        "first_step": plan.steps[0],
        "last_step": plan.steps[-1],
        "aliases": dict(mapped.aliases),
        "stripped": plan.stripped,
        "mixtures": [{"name": name, "dtypes": list(types)} for name, types in plan.mixtures],
        "rounded": plan.rounded,
        "skipped": [{"name": name, "reason": reason} for name, reason in mapped.skipped],
        "skipped_paths": [{"path": path, "reason": reason} for path, reason in plan.skipped_paths],
        "planned_bytes": plan.needed_bytes,
    }


def _planned(plan: ImportPlan) -> dict[str, Any]:
    return {
        **_payload(plan),
        "dry_run": True,
        "n_added": 0,
        "n_missing": len(plan.missing),
        "checkpoints": [
            {
                "path": str(planned.path),
                "step": planned.step,
                "format": planned.format,
                "bytes": planned.n_bytes,
                "imported": planned.step <= plan.last_committed,
            }
            for planned in plan.checkpoints
        ],
        "names": dict(plan.checkpoints[0].named.sources),
        "source_bytes": plan.source_bytes,
        "stored_bytes": plan.stored_bytes,
        "free_bytes": _free(plan.out),
    }


def _free(out: Path) -> int:
    there = next(folder for folder in out.absolute().parents if folder.is_dir())
    return shutil.disk_usage(there).free


def _describe(plan: ImportPlan) -> list[str]:
    mapped = plan.map
    lines = [_head(plan)]
    rows = [
        f"  {plan.unit} {planned.step:>8}  {printable(str(planned.path))}  {show_bytes(planned.n_bytes)}"
        f"{'  (imported before)' if planned.step <= plan.last_committed else ''}"
        for planned in plan.checkpoints
    ]
    lines += _cut(rows)
    lines.append(
        f"{len(mapped)} tensors, {mapped.n_rows} rows: {mapped.n_rows_of('parameter')} parameters, "
        f"{mapped.n_rows_of('buffer')} buffer elements (running_mean, running_var), "
        f"{len(mapped.aliases)} tied names"
    )
    lines += _about_names(plan)
    sources = plan.checkpoints[0].named.sources
    lines += _cut(
        [
            f"  {printable(name)}{'' if name == source else f' (there {printable(source)})'}  "
            f"{mapped[name].dtype}  {list(mapped[name].shape)}"
            for name, source in sources.items()
            if name in mapped
        ]
    )
    lines += _about_types(plan)
    lines += _skipped(plan)
    lines.append(
        f"reads {show_bytes(plan.source_bytes)}, writes {show_bytes(plan.stored_bytes)} in {plan.dtype}, "
        f"{show_bytes(_free(plan.out))} are free; memory {show_bytes(plan.needed_bytes)} of "
        f"{show_bytes(plan.limit_bytes)}"
    )
    lines.append("nothing was written")
    return lines


def _head(plan: ImportPlan) -> str:
    formats = ", ".join(sorted({planned.format for planned in plan.checkpoints}))
    before = f", {plan.n_committed} of them imported before" if plan.n_committed else ""
    span = f"{plan.unit}s {plan.steps[0]}..{plan.steps[-1]}"
    return f"{len(plan.checkpoints)} checkpoints ({formats}), {span}{before}"


def _about_names(plan: ImportPlan) -> list[str]:
    return [f"  every name begins with {plan.stripped!r}: stripped"] if plan.stripped else []


def _about_types(plan: ImportPlan) -> list[str]:
    lines = [
        f"  {printable(name)} is {' and '.join(types)} over time: kept as {plan.map[name].dtype}"
        for name, types in plan.mixtures
    ]
    return _cut(lines) + _cut([f"  {printable(name)} is rounded to {plan.dtype}" for name in plan.rounded])


def _skipped(plan: ImportPlan) -> list[str]:
    tensors = [f"skipped  {printable(name)}: {reason}" for name, reason in plan.map.skipped]
    return _cut(tensors) + _cut([f"skipped  {printable(p)}: {reason}" for p, reason in plan.skipped_paths])


def _cut(lines: list[str]) -> list[str]:
    if len(lines) <= _MOST_SHOWN:
        return lines
    half = _MOST_SHOWN // 2
    return [*lines[:half], f"  ... {len(lines) - _MOST_SHOWN} more", *lines[-half:]]


# ---- what was done --------------------------------------------------------------------------------------


def _done(report: ImportReport) -> dict[str, Any]:
    return {
        **_payload(report.plan),
        "n_snapshots": report.n_snapshots,
        "n_added": report.n_added,
        "bytes_read": report.bytes_read,
        "bytes_written": report.bytes_written,
        "bytes_per_s": report.bytes_read / max(report.seconds, 1e-9),
    }


def _said(report: ImportReport, peak_bytes: int) -> str:
    plan = report.plan
    return "\n".join(
        [
            _head(plan),
            *_about_names(plan),
            *_about_types(plan),
            *_skipped(plan),
            f"wrote {plan.out}: {report.n_added} snapshots added, {report.n_snapshots} in all, "
            f"{len(plan.map)} tensors, {plan.map.n_rows} rows, {plan.dtype}",
            f"read {show_bytes(report.bytes_read)} in {report.seconds:.1f} s, "
            f"{report.bytes_read / max(report.seconds, 1e-9) / 1e9:.2f} GB/s, peak memory "
            f"{show_bytes(peak_bytes)} above the start",
        ]
    )
