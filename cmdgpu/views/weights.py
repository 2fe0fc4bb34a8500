"""Single weights, as they were recorded and as they are rebuilt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cmdgpu.baselines.groups import Grouping
from cmdgpu.errors import UsageError
from cmdgpu.indexing import evenly
from cmdgpu.miniature import follow
from cmdgpu.notation import F64, I64
from cmdgpu.views.scalars import unit_of

if TYPE_CHECKING:
    from cmdgpu.baselines import Baseline
    from cmdgpu.decomposition import CMD


@dataclass(frozen=True)
class Weights:
    """n sampled rows at T snapshots, by mode; no row where nothing moves."""

    unit: str
    """What a step counts, see ``unit_of``."""
    steps: I64
    """(T,)"""
    row: I64
    """(n,)"""
    tensor: list[str]
    """(n,) names of their tensors."""
    index: list[tuple[int, ...]]
    """(n,) their places in them."""
    mode: I64
    """(n,) ascending."""
    a: F64
    b: F64
    correlation: F64
    """(n,) signed."""
    recorded: F64
    """(n, T)"""
    rebuilt: F64
    """(n, T) a r(t) + b."""


def weights(cmd: CMD, per_mode: int = 12, at_most: int = 240) -> Weights:
    """Sampled rows of a fitted CMD, of every mode as many as fit, from the best followed to the worst.

    The reference comes first, where it is a sampled row; the others lie at evenly spread ranks of |corr|
    among the sampled rows that the mode rebuilds. Of more than ``at_most`` modes the first have a row each.
    Mode, a and b are computed from the sample, in float64, as the pass defines them; they differ from the
    stored ones by the rounding of float32.
    """
    moving = np.flatnonzero(cmd.sample_labels_ >= 0)
    R_mt = cmd.references_.astype(np.float64)
    w_kt = cmd.sample_[moving].astype(np.float64)
    row_k, fits = cmd.sample_rows_[moving], follow(w_kt, R_mt)
    n = max(1, min(per_mode, at_most // max(len(R_mt), 1)))
    first_k = np.isin(row_k, cmd.reference_rows_)
    chosen: list[int] = []
    for m in range(min(len(R_mt), at_most)):
        mine = np.flatnonzero(fits.mode == m)
        ranked = mine[np.lexsort((-np.abs(fits.correlation[mine]), ~first_k[mine]))]
        chosen += ranked[evenly(len(ranked), n)].tolist()
    places = [cmd.result.frame.map.place_of(row) for row in row_k[chosen].tolist()]
    a, b, mode, recorded = fits.a[chosen], fits.b[chosen], fits.mode[chosen], w_kt[chosen]
    return Weights(
        unit=unit_of(cmd),
        steps=cmd.steps_,
        row=row_k[chosen],
        tensor=[tensor.name for tensor, _ in places],
        index=[index for _, index in places],
        mode=mode,
        a=a,
        b=b,
        correlation=fits.correlation[chosen],
        recorded=recorded,
        rebuilt=a[:, None] * R_mt[mode] + b[:, None] if len(chosen) else recorded,
    )


def rebuilt_by(baseline: Baseline, shown: Weights) -> F64:
    """(n, T) the rows as a fitted baseline gives them at every step: filtered in float64, not rounded.

    Raises UsageError for one that was fitted on other snapshots, or on other rows.
    """
    if not np.array_equal(baseline.steps_, shown.steps):
        raise UsageError(
            f"{baseline!r} was fitted on other snapshots than the CMD ({len(baseline.steps_)} of them, "
            f"{len(shown.steps)} there)",
            hint="fit both on one trajectory",
        )
    group_n = _groups(baseline, shown.row)
    rebuilt = np.empty_like(shown.recorded)
    for t, step in enumerate(shown.steps.tolist()):
        weights_gt = baseline.filter_at(step)
        # an average has one filter for all rows, whatever they are
        weights_nt = weights_gt[group_n if len(weights_gt) > 1 else 0 * group_n]
        rebuilt[:, t] = np.einsum("nt,nt->n", shown.recorded, weights_nt)
    return rebuilt


def _groups(baseline: Baseline, rows: I64) -> I64:
    """(n,) the group of each row among those that the baseline has filters for."""
    group, start, stop = Grouping.of(baseline.trajectory.parameters, baseline.by or "network").runs
    at = np.searchsorted(stop, rows, side="right")
    if len(rows) and not bool(np.all((at < len(stop)) & (start[np.minimum(at, len(stop) - 1)] <= rows))):
        raise UsageError(
            f"{baseline!r} was not fitted on all rows that are shown", hint="fit both on the same parameters"
        )
    return group[at]
