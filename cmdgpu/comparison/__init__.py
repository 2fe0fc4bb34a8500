"""Methods side by side: how far their weights are from the recorded ones, how well their models do, the cost.

    comparison = compare(traj, ["recorded", "cmd:modes=10", "ema:decay=0.9"], evaluate, model=model)
    print(comparison.table())

What is selected is selected by validation scores, and everything gets the same treatment, the recorded
snapshots included.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from cmdgpu.comparison.fits import fit_methods
from cmdgpu.comparison.judging import BatchNorm, Evaluation, Judge, Judged, built
from cmdgpu.comparison.methods import METHODS, Asked, Method, method_of, parse_method, split_methods
from cmdgpu.comparison.outcome import Comparison, Row
from cmdgpu.comparison.weights import weight_errors
from cmdgpu.decomposition import CMD
from cmdgpu.errors import CmdgpuError, StepNotFound, UsageError, printable
from cmdgpu.memory import parse_bytes
from cmdgpu.notation import I64
from cmdgpu.progress import Progress, Silent
from cmdgpu.store import format as fmt
from cmdgpu.store.journal import nearest_steps
from cmdgpu.store.places import Named
from cmdgpu.trajectory import Trajectory

__all__ = ["METHODS", "Comparison", "Evaluation", "Row", "compare", "split_methods"]


def compare(
    place: Trajectory | CMD | Any,
    methods: Sequence[Asked] | Mapping[str, Asked] = ("recorded", "cmd"),
    evaluate: Evaluation | None = None,
    *,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    steps: int | str | Sequence[int | str] | I64 = "all",
    batch_norm: BatchNorm | None = None,
    loader: Iterable[Any] | None = None,
    select: str | Sequence[str] = (),
    out: Named | None = None,
    memory_limit: int | str | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Fit every method on one trajectory; judge the weights and the model that each makes of every step.

    place         a Trajectory, or what ``Trajectory.from_array`` takes; or a fitted CMD: its trajectory is
                  compared then, and "cmd" without settings is that CMD
    methods       names with settings (see ``METHODS``): "recorded", "cmd:modes=10", "ema:decay=0.9", "swa",
                  "lawa:k=5", "pca:components=10", "rank-one", "dmd:rank=10,groups=layer", "reference-dmd";
                  or CMD, baselines and ReferenceDMD, fitted or not. A mapping gives them names of your own
    evaluate      takes the model in evaluation mode, gradients off, and answers named scores; it must not
                  change the model. Without one, weights alone are judged
    model         the network that was recorded, or a function that builds it
    steps         "all", "last", "every=10" (counted back from the last), steps; negative ones from the end
    batch_norm    running statistics of BatchNorm "kept" as they were recorded at the step, "reestimated" by
                  ``update_bn`` on the batches of ``loader``, or "both"; for all methods alike. By default
                  "both" with a loader, "kept" without
    loader        batches of training data that can be gone through again for every step
    select        score on validation data that chooses a step of every method: "val_accuracy", or
                  "min:val_loss"; of several the next one decides among equals
    out           folder in which decompositions are kept, and found again; in memory when None
    memory_limit  bytes, or "4GiB", of host memory for every pass; a quarter of what is free by default

    Weights are judged in one pass over the trajectory for all methods and steps, in float64, over the
    parameters that are finite at every selected snapshot. The model, if one is given, is left with the last
    weights it was judged with. Raises UsageError for what contradicts itself, before anything is fitted where
    that can be told, and CmdgpuError naming method and step for what goes wrong in ``evaluate``.
    """
    tell = progress or Silent()
    fitted = place if isinstance(place, CMD) else None
    traj = _trajectory_of(place)
    chosen = _steps(steps, traj)
    asked = _methods(methods, fitted)
    keys = (select,) if isinstance(select, str) else tuple(select)
    judge = _judge(evaluate, model, batch_norm, loader, keys)
    limit = None if memory_limit is None else parse_bytes(memory_limit)
    fit_methods(asked, traj, chosen, out=out, memory_limit=memory_limit, progress=tell)
    errors = weight_errors(asked, traj, chosen, limit, tell)
    rows: list[Row] = []
    load_bytes = traj.parameters.n_live * fmt.storage(traj.dtype).numpy.itemsize
    if judge is not None:
        tell.begin("comparing", len(asked) * len(chosen) * load_bytes)
    try:
        for method, mse_s, relative_s in zip(asked, errors.mse, errors.relative, strict=True):
            for step, mse, relative in zip(chosen.tolist(), mse_s.tolist(), relative_s.tolist(), strict=True):
                judged, error = _judged(judge, method, step, beyond=math.isinf(mse))
                rows += [
                    Row(
                        method=method.name,
                        label=method.label,
                        config=method.config,
                        step=step,
                        batch_norm=each.treatment,
                        weight_mse=mse,
                        relative_error=relative,
                        stored_bytes=method.stored_bytes,
                        fit_s=method.fit_s,
                        rebuild_s=each.rebuild_s,
                        scores=each.scores,
                        error=error,
                    )
                    for each in judged
                ]
                if judge is not None:
                    tell.advance(load_bytes)
    finally:
        if judge is not None:
            tell.end()
    return Comparison(
        rows=tuple(rows),
        source=str(traj.path or "an array"),
        trajectory=traj.fingerprint(),
        unit=traj.unit,
        n_rows=errors.n_rows,
        n_snapshots=len(traj.columns),
        select=keys,
    )


def _judged(
    judge: Judge | None, method: Method, step: int, *, beyond: bool
) -> tuple[list[Judged], str | None]:
    """Scores under every treatment; none, and why, where the weights are ``beyond`` float64."""
    if judge is None:
        return [Judged("none", {}, math.nan)], None
    try:
        load = partial(method.fittable.load_into, step=step)
        return judge.judge(load, f"for {method.label} at step {step}"), None
    except CmdgpuError as error:
        if not beyond:
            raise
        return [Judged(treatment, {}, math.nan) for treatment in judge.treatments], str(error)


def _trajectory_of(place: Trajectory | CMD | Any) -> Trajectory:
    if isinstance(place, CMD):
        traj = place.trajectory
        if traj is None:
            raise UsageError(
                "the trajectory is out of reach, and its snapshots are what everything is held against",
                file=place.result.path,
                hint="say where it is: CMD.load(path, trajectory=...)",
            )
    else:
        traj = place if isinstance(place, Trajectory) else Trajectory.from_array(place)
    if not traj.parameters.n_rows_of("parameter") or not len(traj.columns):
        raise UsageError("there is no snapshot of a parameter to compare", file=traj.path)
    return traj


def _methods(methods: Sequence[Asked] | Mapping[str, Asked], fitted: CMD | None) -> list[Method]:
    """Raises UsageError for none, for an unknown one, and for two of one name."""

    def of(asked: Asked) -> Method:
        return parse_method(asked, fitted) if isinstance(asked, str) else method_of(asked)

    found: list[Method] = []
    if isinstance(methods, Mapping):
        for label, asked in methods.items():
            found.append(of(asked))
            found[-1].label = label
    else:
        found.extend(map(of, methods))
    labels = [method.label for method in found]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise UsageError(
            f"{printable(twice[0])} is there twice", hint="leave one out, or give names: {'mine': ...}"
        )
    if not found:
        raise UsageError("no method to compare", hint=f"have: {', '.join(METHODS)}")
    return found


def _steps(asked: int | str | Sequence[int | str] | I64, traj: Trajectory) -> I64:
    """(S,) ascending. Raises UsageError for what is no step, StepNotFound for one that is not there."""
    each: list[int | str] = [asked] if isinstance(asked, int | str) else list(asked)
    parts = [part for one in each for part in (one.split(",") if isinstance(one, str) else [one])]
    if not parts:
        raise UsageError("no step to compare", hint='give "all", "last", "every=10" or steps')
    return np.unique(np.concatenate([_those(part, traj) for part in parts]))


def _those(part: int | str, traj: Trajectory) -> I64:
    steps = traj.steps
    text = str(part).strip()
    every = re.fullmatch(r"every=([1-9]\d{0,8})", text)
    if text == "all":
        return steps
    if every is not None:
        return steps[::-1][:: int(every[1])]
    if text != "last" and re.fullmatch(r"-?\d{1,18}", text) is None:
        raise UsageError(
            f"{printable(text)!r} is no step", hint='write "all", "last", "every=10", 100, or -1 for the last'
        )
    step = -1 if text == "last" else int(text)
    if -len(steps) <= step < 0:
        return steps[step][None]
    if step not in steps:
        raise StepNotFound(
            "is not among the snapshots",
            file=traj.path,
            step=step,
            hint=f"nearest: {nearest_steps(steps, step)}",
        )
    return np.array([step], dtype=np.int64)


def _judge(
    evaluate: Evaluation | None,
    model: nn.Module | Callable[[], nn.Module] | None,
    batch_norm: BatchNorm | None,
    loader: Iterable[Any] | None,
    keys: Sequence[str],
) -> Judge | None:
    """None without an evaluation. Raises UsageError where something is missing for one, or for none."""
    if evaluate is None:
        given = {"model": model, "batch_norm": batch_norm, "loader": loader, "select": keys or None}
        if idle := [name for name, value in given.items() if value is not None]:
            raise UsageError(f"{idle[0]} is given, and nothing that evaluates", hint="give evaluate, too")
        return None
    if model is None:
        raise UsageError("there is no model to evaluate", hint="give model: the network, or what builds it")
    return Judge(built(model), evaluate, batch_norm, loader, [key.removeprefix("min:") for key in keys])
