"""The loss over a plane of the mode space: what a model is worth while two references take other values.

    found = landscape(CMD.load("run.cmd.zarr"), evaluate, model, modes=(0, 1), select="min:val_loss")
    found.figure().savefig("landscape.png")

Of the follow-up paper (arXiv 2312.13247), which searched it for the best model on the test set; here what is
selected is selected by validation scores.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from operator import index
from typing import Any

from torch import nn

from cmdgpu.comparison.judging import BatchNorm, Evaluation, Judge, built, name_of
from cmdgpu.decomposition import CMD
from cmdgpu.errors import CmdgpuError, CmdgpuWarning, UsageError
from cmdgpu.mode_space.ledger import Ledger
from cmdgpu.mode_space.outcome import TRAINED, At, Best, Landscape, numbers
from cmdgpu.mode_space.rows import ModeRows, rows_of
from cmdgpu.notation import F64
from cmdgpu.progress import Progress, Silent
from cmdgpu.store.places import local_path

__all__ = ["Best", "Landscape", "landscape"]


def landscape(
    cmd: CMD,
    evaluate: Evaluation,
    model: nn.Module | Callable[[], nn.Module],
    *,
    modes: Sequence[int] = (0, 1),
    span: float = 0.5,
    points: int = 21,
    step: int = -1,
    batch_norm: BatchNorm | None = None,
    loader: Iterable[Any] | None = None,
    select: str | Sequence[str] = (),
    out: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Landscape:
    """Evaluate w_i = a_i f_m(i) r_m(i) + b_i while the factors f of two modes go from 1 - span to 1 + span.

    r is the reference's value at the step as it is stored: as in the paper's code the value of a weight, not
    how far it came. All other modes have factor 1; where both have it is the trained point.

    cmd         fitted; its trajectory need not be in reach, but for recorded buffers
    evaluate    takes the model in evaluation mode, gradients off, and answers named scores; it must not
                change the model. A score that is no finite number counts as NaN
    model       the network that was recorded, or a function that builds it
    modes       two of them, or one for a line
    span        half the width, 0.5 for +-50 %
    points      along each of the two axes; with an odd number the trained point is one of them, else it is
                evaluated beside them
    step        a fitted or a recorded one; negative ones from the end
    batch_norm  running statistics "kept" as they were recorded at the step, or "reestimated" on the batches
                of ``loader`` at every point; the latter by default where there is a loader
    select      score on validation data that chooses the best point: "val_accuracy", "min:val_loss"; of
                several the next one decides among equals, then the distance to the trained point
    out         file of the landscape, JSON. Points are kept in ``<out>.partial`` as they come, and a call of
                the same settings goes on there, or reads the finished file. That evaluate and loader are the
                same ones, but for the name of the function, is up to you
    progress    told of points, one by one

    The result is read once or twice; then a point costs a sum over the rows of a mode whose factor changed,
    in float64, rounded once: at the trained point the bits are those of ``load_into``. Beside the model
    12 bytes are held for each row of the two modes. The model is left with the trained point's weights.

    Raises UsageError for a mode that is not there, or given twice, or that moves nothing because its
    reference is 0 or no row follows it; StoreExists where another landscape lies at ``out``; CmdgpuError
    naming the point for what goes wrong in ``evaluate``.
    """
    chosen = _modes(modes, cmd)
    _check_grid(span, points)
    references = cmd.references_at(step)
    label = int(cmd.steps_[step]) if step < 0 else int(step)
    _require_movement(cmd, chosen, references, label)
    network = built(model)
    keys = (select,) if isinstance(select, str) else tuple(select)
    judge = _judge(network, evaluate, batch_norm, loader, keys)
    unfilled = Landscape(
        modes=chosen,
        span=float(span),
        points=int(points),
        step=label,
        reference=tuple(references[list(chosen)].tolist()),
        batch_norm=judge.treatments[0],
        evaluate=f"{evaluate.__module__}:{name_of(evaluate)}",
        result=cmd.result.fingerprint,
        select=keys,
    )
    ledger = Ledger(None if out is None else local_path(out, "a landscape"), unfilled.settings)
    todo = [at for at in unfilled.grid if at not in ledger.done]
    if todo:
        judge.load(lambda into: cmd.load_into(into, label))
        moved = _Moved(rows_of(cmd, network, chosen), unfilled.reference)
        _fill(ledger, todo, judge, moved, chosen, progress or Silent())
    found = replace(unfilled, evaluated=ledger.done)
    ledger.finish(found)
    return found


def _fill(
    ledger: Ledger, todo: Sequence[At], judge: Judge, moved: _Moved, modes: Sequence[int], tell: Progress
) -> None:
    """Evaluate these points, each kept before the next one is begun."""
    spoken = " and ".join(map(str, modes))
    names = next(iter(ledger.done.values()), None)
    tell.begin("landscape", len(todo))
    try:
        for at in todo:
            moved.to(at)
            factors = " and ".join(f"{factor:g}" for factor in at[: len(modes)])
            scores = numbers(judge.judge_loaded(f"at {factors} times the references of {spoken}")[0].scores)
            if names is not None and set(names) != set(scores):
                raise CmdgpuError(
                    f"the scores are {', '.join(scores)}, and {', '.join(names)} at the points before",
                    hint="go on with the same function, or to another file",
                )
            ledger.keep(at, scores)
            tell.advance(1)
    finally:
        moved.to(TRAINED)
        ledger.close()
        tell.end()


class _Moved:
    """Where the model is, and the way to another point: only modes whose factor changes are touched."""

    def __init__(self, rows: Sequence[ModeRows], references: Sequence[float]) -> None:
        self._rows, self._references = rows, references
        self._at = TRAINED

    def to(self, at: At) -> None:
        # of a line the second factor is nobody's
        for rows, reference, old, new in zip(self._rows, self._references, self._at, at, strict=False):
            if old != new:
                rows.set(new * reference)
        self._at = at


# ---- what is asked ---------------------------------------------------------------------------------------


def _modes(modes: Sequence[int], cmd: CMD) -> tuple[int, ...]:
    """One or two that are there. Raises UsageError."""
    chosen = tuple(map(index, modes))
    if len(chosen) not in (1, 2):
        raise UsageError(f"{len(chosen)} modes are no plane", hint="give two modes, or one for a line")
    if unknown := [mode for mode in chosen if not 0 <= mode < cmd.n_modes_]:
        have = f"0 to {cmd.n_modes_ - 1}" if cmd.n_modes_ > 1 else "0 alone: give modes=(0,) for a line"
        raise UsageError(
            f"there is no mode {unknown[0]}", hint=f"have: {have}" if cmd.n_modes_ else "nothing moves"
        )
    if len(set(chosen)) < len(chosen):
        raise UsageError(f"mode {chosen[0]} is there twice", hint="give two modes, or one for a line")
    return chosen


def _check_grid(span: float, points: int) -> None:
    if not (math.isfinite(span) and span > 0):
        raise UsageError(f"the span cannot be {span}", hint="give 0.5 for factors from 0.5 to 1.5")
    if index(points) < 2:
        raise UsageError(
            f"{points} points are no line", hint="give two at least, 21 for steps of a tenth of the span"
        )


def _require_movement(cmd: CMD, modes: Sequence[int], references: F64, step: int) -> None:
    """Raises UsageError for a mode that no factor moves."""
    for mode in modes:
        if references[mode] == 0.0:
            raise UsageError(
                f"the reference of mode {mode} is 0 at step {step}, and no factor moves it",
                hint="choose another mode or step",
            )
        if not cmd.metrics_["mode_sizes"][mode]:
            raise UsageError(f"no parameter belongs to mode {mode}", hint="choose another mode")


def _judge(
    network: nn.Module,
    evaluate: Evaluation,
    batch_norm: BatchNorm | None,
    loader: Iterable[Any] | None,
    select: Sequence[str],
) -> Judge:
    """Of one treatment. Warns where statistics are kept and nobody asked for that."""
    if batch_norm == "both":
        raise UsageError("a landscape is of one treatment of BatchNorm", hint="have: kept, reestimated")
    treatment = batch_norm or ("kept" if loader is None else "reestimated")
    judge = Judge(network, evaluate, treatment, loader, [key.removeprefix("min:") for key in select])
    if batch_norm is None and judge.treatments == ("kept",):
        warnings.warn(
            "BatchNorm keeps the statistics of the step at every point; give a loader to measure them anew",
            CmdgpuWarning,
            stacklevel=3,
        )
    return judge
