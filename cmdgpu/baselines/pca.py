"""PCA of the rows over time: the best approximation of W by a mean and r profiles there is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cmdgpu.baselines.contract import Baseline, require_rank, warn
from cmdgpu.baselines.filters import Filter
from cmdgpu.baselines.groups import By, Grouping
from cmdgpu.baselines.spectrum import Spectrum, leading
from cmdgpu.notation import F64
from cmdgpu.trajectory import Trajectory

if TYPE_CHECKING:
    from cmdgpu.baselines.gram import Grams


class PCA(Baseline):
    """Every row is its mean over time and a combination of the same r profiles.

        C = H G H = V Lambda V^T,   H = I - 1 1^T / T,   What = W (1 1^T / T + V_r V_r^T)

    n_components  r, at most T - 1: a centred row has no more

    No other r profiles come closer: not the modes of a CMD, nor those of a DMD with the mean among them. To
    rebuild a row takes r + 1 numbers, where CMD takes two and a label. A spectrum with fewer than r
    components above its noise is cut there, with a warning; ``rank_`` is what is left.

    After ``fit``: ``rank_``, ``profiles_`` (r, T) orthonormal, ``explained_variance_ratio_`` (r,).
    Source: DLDR, arXiv 2103.11154, uses r = 40 of 81 snapshots.
    """

    by: By | None = "network"

    def __init__(self, n_components: int) -> None:
        super().__init__()
        self.n_components = n_components
        require_rank(n_components, None, "PCA")
        self._spectrum: Spectrum | None = None
        self._grouping: Grouping | None = None

    def _check(self, traj: Trajectory) -> None:
        require_rank(self.n_components, traj, "PCA")

    def _learn(self, traj: Trajectory, grams: Grams | None) -> tuple[float, float]:
        assert grams is not None
        gram = grams[0]
        spectrum = leading(gram.centred, self.n_components)
        if spectrum.rank < self.n_components:
            warn(f"{self!r}: {spectrum.rank} components lie above the noise, the others are left out")
        self._spectrum, self._grouping = spectrum, grams.grouping
        return spectrum.rest, gram.energy

    @property
    def _fitted(self) -> Spectrum:
        _ = self.trajectory  # says that it is not fitted
        assert self._spectrum is not None
        return self._spectrum

    @property
    def rank_(self) -> int:
        """Components above the noise, at most r."""
        return self._fitted.rank

    @property
    def profiles_(self) -> F64:
        """(r, T) orthonormal profiles, by what they explain."""
        return self._fitted.vectors.T

    @property
    def explained_variance_ratio_(self) -> F64:
        """(r,) shares of all movement."""
        return self._fitted.values / (self._fitted.values.sum() + self._fitted.rest)

    def _filter(self, traj: Trajectory, step: int) -> Filter:
        k = int(np.flatnonzero(traj.steps == step)[0])
        V = self._fitted.vectors
        return Filter((1.0 / len(V) + V @ V[k])[None], self._grouping, only_finite=True)

    def _size(self) -> dict[str, Any]:
        n_rows = self.trajectory.parameters.n_rows_of("parameter")
        return {
            "rank": self.rank_,
            "result_bytes": 4 * (n_rows * (self.rank_ + 1) + len(self.steps_) * self.rank_),
        }

    def __repr__(self) -> str:
        return f"PCA({self.n_components})"
