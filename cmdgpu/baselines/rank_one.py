"""Rank one per tensor: a mean, one direction, one coefficient in time that a line carries on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cmdgpu.baselines.contract import Baseline, require_snapshots
from cmdgpu.baselines.filters import Filter
from cmdgpu.baselines.groups import By, Grouping
from cmdgpu.baselines.spectrum import leading
from cmdgpu.notation import F64, I64
from cmdgpu.trajectory import Trajectory

if TYPE_CHECKING:
    from cmdgpu.baselines.gram import Grams


class RankOne(Baseline):
    """PCA of every tensor by itself, one component; its coefficient goes on straight beyond the last step.

        w_i(t) ~ mean_i + u_i c(t),   c orthonormal over the snapshots; c(s) = least-squares line in the steps

    The line is that of all selected snapshots: select the last ones (``traj.sel(start=-10)``) where only they
    run straight. A tensor that never moves is its mean. After ``fit``: ``coefficients_`` (L, T).
    Source: RELEX, arXiv 2605.21468, written as a filter; its choice of snapshots is yours.
    """

    by: By | None = "tensor"

    def __init__(self) -> None:
        super().__init__()
        self._c_gt: F64 = np.empty((0, 0))
        self._grouping: Grouping | None = None

    def _check(self, traj: Trajectory) -> None:
        require_snapshots(traj, 2, "RankOne")

    def _learn(self, traj: Trajectory, grams: Grams | None) -> tuple[float, float]:
        assert grams is not None
        self._c_gt = np.zeros((len(grams), len(traj.columns)))
        self._grouping = grams.grouping
        residual = energy = 0.0
        for group, gram in enumerate(grams):
            spectrum = leading(gram.centred, 1)
            self._c_gt[group] = spectrum.vectors.sum(axis=1)  # the only one, or 0 where nothing moves
            residual += spectrum.rest
            energy += gram.energy
        return residual, energy

    @property
    def coefficients_(self) -> F64:
        """(L, T) of every tensor that has rows, in their order; of either sign, 0 where nothing moves."""
        _ = self.trajectory
        return self._c_gt

    def _filter(self, traj: Trajectory, step: int) -> Filter:
        found = np.flatnonzero(traj.steps == step)
        at = self._c_gt[:, found[0]] if len(found) else self._on_the_line(traj.steps, step)
        return Filter(1.0 / len(traj.columns) + self._c_gt * at[:, None], self._grouping, only_finite=True)

    def _on_the_line(self, steps: I64, step: int) -> F64:
        """(L,) where the lines through the coefficients are at a step: they have mean 0."""
        s = steps - steps.mean()
        slope = self._c_gt @ s / (s @ s)
        return slope * (step - steps.mean())

    def _beyond(self, traj: Trajectory, step: int) -> str | None:
        return None

    def _size(self) -> dict[str, Any]:
        n_rows = self.trajectory.parameters.n_rows_of("parameter")
        return {"rank": 1, "result_bytes": 4 * (2 * n_rows + self._c_gt.size)}

    def __repr__(self) -> str:
        return "RankOne()"
