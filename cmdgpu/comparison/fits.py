"""Every method of a comparison fitted on one trajectory, in as few passes as it takes."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence

import numpy as np

from cmdgpu.baselines import Baseline, ReferenceDMD
from cmdgpu.comparison.methods import Method, Recorded, method_of
from cmdgpu.decomposition import CMD
from cmdgpu.errors import StepNotFound, UsageError
from cmdgpu.notation import I64
from cmdgpu.progress import Progress
from cmdgpu.store.journal import nearest_steps
from cmdgpu.store.places import Named, place_of
from cmdgpu.trajectory import Trajectory


def fit_methods(
    methods: Sequence[Method],
    traj: Trajectory,
    steps: I64,
    *,
    out: Named | None,
    memory_limit: int | str | None,
    progress: Progress,
) -> None:
    """Fit those that are not fitted.

    Baselines that need a Gram matrix share a pass, and so do decompositions that are kept in ``out``; in
    memory every decomposition takes one. Of CMDs of the same settings, that of a ``reference-dmd`` among
    them, the first is fitted and serves all. Raises UsageError for one that was fitted on another run, and
    StepNotFound for one of ``steps`` that it does not know.
    """
    for method in methods:
        _require_same(method, traj, steps)
    cmds: dict[str, CMD] = {}
    for method in methods:
        if isinstance(method.fittable, CMD) and not method.fittable.is_fitted:
            method.fittable = cmds.setdefault(_settings_of(method.fittable), method.fittable)
        if method.base is not None and not method.base.is_fitted:
            method.base = cmds.setdefault(_settings_of(method.base), method.base)
    baselines = [m.fittable for m in methods if isinstance(m.fittable, Baseline) and not m.fittable.is_fitted]
    reading = [baseline for baseline in baselines if baseline.by is not None]
    cmd_s = _fit_cmds(cmds, traj, out, memory_limit, progress)
    started = time.perf_counter()
    Baseline.fit_together(reading, traj, memory_limit=memory_limit, progress=progress)
    reading_s = time.perf_counter() - started
    for method in methods:
        fittable = method.fittable
        started = time.perf_counter()
        if isinstance(fittable, CMD):
            if fittable in cmds.values():
                method.fit_s = cmd_s[_settings_of(fittable)]
        elif isinstance(fittable, ReferenceDMD):
            if method.base is not None:
                fittable.fit(method.base)
                method.fit_s = time.perf_counter() - started + cmd_s.get(_settings_of(method.base), 0.0)
        elif fittable in reading:
            method.fit_s = reading_s
        elif isinstance(fittable, Recorded) or fittable in baselines:
            fittable.fit(traj)
            method.fit_s = time.perf_counter() - started


def _fit_cmds(
    cmds: Mapping[str, CMD],
    traj: Trajectory,
    out: Named | None,
    memory_limit: int | str | None,
    progress: Progress,
) -> dict[str, float]:
    """Seconds of every one."""
    took: dict[str, float] = {}
    if out is None:
        for settings, cmd in cmds.items():
            started = time.perf_counter()
            cmd.fit(traj, memory_limit=memory_limit, progress=progress)
            took[settings] = time.perf_counter() - started
    elif cmds:
        started = time.perf_counter()
        outs = [place_of(out) / _file_name(settings) for settings in cmds]
        CMD.fit_together(
            list(cmds.values()), [traj] * len(cmds), outs, memory_limit=memory_limit, progress=progress
        )
        took = dict.fromkeys(cmds, time.perf_counter() - started)
    return took


def _settings_of(cmd: CMD) -> str:
    return method_of(cmd).label


def _file_name(label: str) -> str:
    """``cmd:modes=10,seed=1`` -> ``modes-10.seed-1.cmd.zarr``."""
    settings = label.removeprefix("cmd:").replace("=", "-").replace(",", ".")
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', settings)}.cmd.zarr"


def _require_same(method: Method, traj: Trajectory, steps: I64) -> None:
    """Raises UsageError for one fitted on another run or on other tensors, StepNotFound for a step."""
    fittable = method.fittable
    if isinstance(fittable, ReferenceDMD):
        fittable = method.base or fittable.forecast
    if isinstance(fittable, Recorded) or not fittable.is_fitted:
        return
    if isinstance(fittable, CMD):
        mapped, identity = fittable.result.frame.map, fittable.result.provenance["source"]
        whole = traj if traj.path is None else Trajectory.open(traj.path)  # it may know more snapshots
    else:
        mapped, identity = fittable.trajectory.parameters, fittable.trajectory.identity()
        whole = traj
    mine = [tensor for tensor in traj.parameters if tensor.kind == "parameter"]
    same = [tensor for tensor in mapped if tensor.kind == "parameter"] == mine
    if same := same and bool(np.isin(fittable.steps_, whole.steps).all()):
        found = whole.sel(steps=fittable.steps_).identity()
        same = all(found.get(key) == identity.get(key) for key in ("layout", "digest"))
    if not same:
        raise UsageError(
            f"{method.label} was fitted on other snapshots or tensors than are compared",
            file=traj.path,
            hint="fit it on this trajectory, or on some of its snapshots",
        )
    if len(unknown := np.setdiff1d(steps, fittable.steps_)):
        step = int(unknown[0])
        raise StepNotFound(
            f"{method.label} was not fitted on it",
            file=traj.path,
            step=step,
            hint=f"nearest: {nearest_steps(fittable.steps_, step)}",
        )
