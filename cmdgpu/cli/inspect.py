"""``cmdgpu inspect``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import click

from cmdgpu.cli.outcome import Context, Outcome, command
from cmdgpu.cli.places import PlaceType
from cmdgpu.errors import NotAStore, UsageError, printable
from cmdgpu.memory import show_bytes

if TYPE_CHECKING:
    from cmdgpu.importing import Look
    from cmdgpu.store.parameter_map import ParameterMap
    from cmdgpu.store.places import Place

_SHOWN: Final = 8
"""Modules named in one line."""


@command("inspect")
@click.argument("path", type=PlaceType())
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--params", multiple=True, metavar="RE", help="Only tensors whose name matches; repeatable.")
def run(context: Context, *, path: Place, tensors: bool, params: tuple[str, ...]) -> Outcome:
    """Say what PATH holds: a trajectory, a result, or checkpoints that could be imported.

    An unfinished fit says how far it is. Of checkpoints (a file, a folder, a glob) only headers are read: the
    steps found, what an import would take and skip, and what would keep it from its work. With --params a
    trajectory is described as a fit of these tensors would see it.

    \b
    cmdgpu inspect run.zarr --tensors
    cmdgpu inspect gan.zarr --params ^generator --tensors
    cmdgpu inspect run.cmd.zarr --json
    cmdgpu inspect 'out/checkpoint-*'
    """
    del context
    from cmdgpu.results import kind_of

    try:
        kind = kind_of(path)
    except (NotAStore, UsageError) as no_store:
        if params:
            raise
        return _checkpoints(path, tensors, no_store)
    describe = _trajectory if kind == "trajectory" else _result
    payload, lines, parameter_map = describe(path, list(params))
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


def _trajectory(path: Place, params: list[str]) -> tuple[dict[str, Any], list[str], ParameterMap]:
    from cmdgpu.sources import StoreSource
    from cmdgpu.trajectory import Trajectory

    traj = Trajectory.open(path)
    if params:
        traj = traj.sel(params=params)
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
        "modules": mapped.modules(),
        "n_tensors": len(mapped),
        "n_parameters": mapped.n_rows_of("parameter"),
        "n_buffers": mapped.n_rows_of("buffer"),
        "n_holes": sum(stop - start for start, stop in mapped.holes),
        "stored_bytes": traj.stored_bytes,
        "sketch_rows": 0 if view.sketch_rows is None else len(view.sketch_rows),
        "skipped": [{"name": name, "reason": reason} for name, reason in mapped.skipped],
    }
    if any(view.sources):
        payload["sources"] = [
            None if origin is None else {"step": step, **origin.to_json()}
            for step, origin in zip(steps.tolist(), view.sources, strict=True)
        ]
    when = f"{traj.unit}s {span['first']}..{span['last']}" if len(steps) else "nothing recorded yet"
    lines = [
        f"trajectory  {path}",
        f"  {traj.shape[0]} rows x {traj.shape[1]} snapshots, {traj.dtype}, "
        f"{show_bytes(traj.stored_bytes)}, {when}",
        f"  {len(mapped)} tensors: {payload['n_parameters']} parameters, "
        f"{payload['n_buffers']} buffer elements, {len(mapped.aliases)} tied names",
        f"  modules: {_listed(payload['modules'])}",
        f"  chunks of {view.rows} rows{', zstd' if view.is_compressed else ''}, "
        f"{payload['sketch_rows']} candidates in the sketch",
        f"  scalars: {', '.join(payload['scalars']) or 'none'}",
    ]
    if files := [file.name for origin in view.sources if origin is not None for file in origin.files]:
        lines.append(f"  imported from {len(files)} files, {files[0]} to {files[-1]}")
    recorded = traj.source.map
    lines += [f"  skipped {printable(name)}: {reason}" for name, reason in recorded.skipped]
    if left := len(recorded) - len(mapped):
        lines.append(f"  {left} tensors are not selected")
    return payload, lines, mapped


def _listed(names: list[str]) -> str:
    more = f", {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(printable(name, 60) for name in names[:_SHOWN]) or "none") + more


def _result(path: Place, params: list[str]) -> tuple[dict[str, Any], list[str], ParameterMap]:
    from cmdgpu.decomposition import CMD
    from cmdgpu.results import describe_result, spoken

    found = describe_result(path)
    mapped = found.frame.map
    if params:
        from cmdgpu.tensors import matching

        mapped = mapped.only([tensor.name for tensor in matching(mapped, params)])
    metrics = found.metrics or {}
    payload = {
        "status": found.status,
        "n_modes": found.n_modes,
        "mode_sizes": metrics.get("mode_sizes"),
        "r2": metrics.get("r2"),
        "mean_abs_correlation": metrics.get("mean_abs_correlation"),
        "units_done": found.units_done,
        "units_total": len(found.frame.live_units),
        "config": dict(found.config),
        "source": dict(found.source),
        "params": list(found.params),
        "fingerprint": found.fingerprint,
    }
    if found.rounds:
        payload |= {"rounds": found.rounds, "refinement": list(found.refinement)}
    lines = [
        f"result  {path}",
        f"  {found.status}: {found.units_done} of {len(found.frame.live_units)} units, "
        f"{found.frame.map.n_live} rows x {len(found.frame.steps)} snapshots, {found.n_modes} modes",
        "  " + ", ".join(f"{key} {value}" for key, value in found.config.items() if value is not None),
    ]
    if found.rounds:
        told = ", ".join(f"{value:.4f}" for value in found.refinement) or "not begun"
        lines.append(f"  references refined in up to {found.rounds} rounds: {told}")
    if found.params:
        lines.append(f"  only tensors that match {spoken(found.params)}: {len(found.frame.map)} of them")
    if found.metrics:
        lines.append(f"  mode sizes {metrics['mode_sizes']}")
        lines.append(f"  mean |corr| {metrics['mean_abs_correlation']}, R^2 {metrics['r2']}")
        quality = CMD.load(path).quality()
        payload["quality"] = quality.to_dict()
        lines.append(f"  {quality.words.splitlines()[0]}")
    return payload, lines, mapped


# ---- checkpoints ----------------------------------------------------------------------------------------


def _checkpoints(path: Place, tensors: bool, no_store: NotAStore | UsageError) -> Outcome:
    """Raises ``no_store`` again where there is no checkpoint either."""
    from cmdgpu.importing import look

    try:
        found = look(str(path))
    except UsageError:
        raise no_store from None
    formats = sorted({seen.format for seen in found.checkpoints})
    skipped = () if found.named is None else found.named.skipped
    steps = [seen.step for seen in found.checkpoints if seen.step is not None]
    payload: dict[str, Any] = {
        "kind": "checkpoint",
        "format": formats[0] if len(formats) == 1 else formats,
        "n_tensors": len(found.tensors),
        "total_bytes": found.total_bytes,
        "stored_bytes": found.stored_bytes,
        "steps": {
            "count": len(steps),
            "first": steps[0] if steps else None,
            "last": steps[-1] if steps else None,
        },
        "checkpoints": [
            {"path": str(seen.path), "step": seen.step, "format": seen.format, "bytes": seen.n_bytes}
            for seen in found.checkpoints
        ],
        "n_taken": 0 if found.named is None else len(found.named.sources),
        "stripped": "" if found.named is None else found.named.stripped,
        "skipped": [{"name": name, "reason": reason} for name, reason in skipped],
        "skipped_paths": [{"path": name, "reason": reason} for name, reason in found.skipped_paths],
        "problems": list(found.problems),
    }
    if tensors:
        payload["tensors"] = [
            {"name": name, "dtype": info.dtype, "shape": list(info.shape)}
            for name, info in found.tensors.items()
        ]
    return Outcome(payload, "\n".join(_look_lines(path, found, payload, tensors)))


def _look_lines(path: Place, found: Look, payload: dict[str, Any], tensors: bool) -> list[str]:
    lines = [
        f"{len(found.checkpoints)} checkpoints  {path}",
        *(
            f"  step {'?' if seen.step is None else seen.step:>8}  {printable(str(seen.path))}  "
            f"{seen.format}, {seen.n_tensors} tensors, {show_bytes(seen.n_bytes)}"
            for seen in found.checkpoints
        ),
        f"  {payload['n_taken']} of {payload['n_tensors']} tensors would be taken, "
        f"{show_bytes(found.total_bytes)} read, {show_bytes(found.stored_bytes)} written",
    ]
    if payload["stripped"]:
        lines.append(f"  every name begins with {payload['stripped']!r}: stripped")
    if tensors:
        width = max((min(len(printable(name)), 60) for name in found.tensors), default=0)
        lines += [
            f"  {printable(name):{width}}  {info.dtype:9}  {list(info.shape)}"
            for name, info in found.tensors.items()
        ]
    lines += [f"  skipped {printable(s['name'])}: {s['reason']}" for s in payload["skipped"]]
    lines += [f"  skipped {printable(s['path'])}: {s['reason']}" for s in payload["skipped_paths"]]
    return lines + [f"  problem {problem}" for problem in found.problems]
