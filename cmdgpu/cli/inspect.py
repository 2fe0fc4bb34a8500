"""``cmdgpu inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cmdgpu.cli.outcome import Context, Outcome, command
from cmdgpu.errors import printable
from cmdgpu.memory import show_bytes

if TYPE_CHECKING:
    from cmdgpu.store.parameter_map import ParameterMap


@command("inspect")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--tensors", is_flag=True, help="List every tensor.")
def run(context: Context, *, path: Path, tensors: bool) -> Outcome:
    """Say what the trajectory or result at PATH holds; an unfinished fit says how far it is.

    \b
    cmdgpu inspect run.zarr --tensors
    cmdgpu inspect run.cmd.zarr --json
    """
    del context
    from cmdgpu.results import kind_of

    kind = kind_of(path)
    payload, lines, parameter_map = _trajectory(path) if kind == "trajectory" else _result(path)
    if tensors:
        payload["tensors"] = [
            {"name": t.name, "kind": t.kind, "dtype": t.dtype, "shape": list(t.shape)} for t in parameter_map
        ]
        payload["aliases"] = dict(parameter_map.aliases)
        width = max((min(len(printable(t.name)), 60) for t in parameter_map), default=0)
        lines += [
            f"  {printable(t.name):{width}}  {t.kind:9}  {t.dtype:9}  {list(t.shape)}" for t in parameter_map
        ]
        lines += [
            f"  {printable(alias)} is {printable(name)}" for alias, name in parameter_map.aliases.items()
        ]
    return Outcome({"kind": kind, **payload}, "\n".join(lines))


def _trajectory(path: Path) -> tuple[dict[str, Any], list[str], ParameterMap]:
    from cmdgpu.sources import StoreSource
    from cmdgpu.trajectory import Trajectory

    traj = Trajectory.open(path)
    assert isinstance(traj.source, StoreSource)
    view, mapped = traj.source.view, traj.parameters
    steps = traj.steps
    span = {
        "count": len(steps),
        "first": int(steps[0]) if len(steps) else None,
        "last": int(steps[-1]) if len(steps) else None,
    }
    payload: dict[str, Any] = {
        "shape": list(traj.shape),
        "dtype": traj.dtype,
        "chunks": [view.rows, 1],
        "codecs": ["bytes", "zstd", "crc32c"] if view.is_compressed else ["bytes", "crc32c"],
        "unit": traj.unit,
        "steps": span,
        "scalars": sorted(traj.scalars),
        "n_tensors": len(mapped),
        "n_parameters": mapped.n_rows_of("parameter"),
        "n_buffers": mapped.n_rows_of("buffer"),
        "n_holes": sum(stop - start for start, stop in mapped.holes),
        "stored_bytes": traj.stored_bytes,
        "sketch_rows": 0 if view.sketch_rows is None else len(view.sketch_rows),
        "skipped": [{"name": name, "reason": reason} for name, reason in mapped.skipped],
    }
    when = f"{traj.unit}s {span['first']}..{span['last']}" if len(steps) else "nothing recorded yet"
    lines = [
        f"trajectory  {path}",
        f"  {traj.shape[0]} rows x {traj.shape[1]} snapshots, {traj.dtype}, "
        f"{show_bytes(traj.stored_bytes)}, {when}",
        f"  {len(mapped)} tensors: {payload['n_parameters']} parameters, "
        f"{payload['n_buffers']} buffer elements, {len(mapped.aliases)} tied names",
        f"  chunks of {view.rows} rows{', zstd' if view.is_compressed else ''}, "
        f"{payload['sketch_rows']} candidates in the sketch",
        f"  scalars: {', '.join(payload['scalars']) or 'none'}",
    ]
    lines += [f"  skipped {printable(name)}: {reason}" for name, reason in mapped.skipped]
    return payload, lines, mapped


def _result(path: Path) -> tuple[dict[str, Any], list[str], ParameterMap]:
    from cmdgpu.results import describe_result

    found = describe_result(path)
    metrics = found.metrics or {}
    payload = {
        "status": found.status,
        "n_modes": found.n_modes,
        "mode_sizes": metrics.get("mode_sizes"),
        "r2": metrics.get("r2"),
        "mean_abs_correlation": metrics.get("mean_abs_correlation"),
        "units_done": found.units_done,
        "units_total": found.frame.n_units,
        "config": dict(found.config),
        "source": dict(found.source),
        "fingerprint": found.fingerprint,
    }
    lines = [
        f"result  {path}",
        f"  {found.status}: {found.units_done} of {found.frame.n_units} units, {found.frame.n_rows} rows x "
        f"{len(found.frame.steps)} snapshots, {found.n_modes} modes",
        "  " + ", ".join(f"{key} {value}" for key, value in found.config.items() if value is not None),
    ]
    if found.metrics:
        lines.append(f"  mode sizes {metrics['mode_sizes']}")
        lines.append(f"  mean |corr| {metrics['mean_abs_correlation']}, R^2 {metrics['r2']}")
    return payload, lines, found.frame.map
