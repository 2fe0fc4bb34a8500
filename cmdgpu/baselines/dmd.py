"""Exact DMD of the raw weights: for the network, for every layer, or for every node."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import numpy as np

from cmdgpu.baselines.contract import Baseline, require_rank, warn
from cmdgpu.baselines.dynamics import C128, Amplitudes, Dynamics, decompose
from cmdgpu.baselines.evenness import gap, require_even
from cmdgpu.baselines.filters import Filter
from cmdgpu.baselines.groups import By, Grouping
from cmdgpu.errors import UsageError, printable
from cmdgpu.notation import I64
from cmdgpu.trajectory import Trajectory

if TYPE_CHECKING:
    from cmdgpu.baselines.gram import Gram, Grams

Groups: TypeAlias = Literal["network", "layer", "node"]
_GROUPS: Final[tuple[Groups, ...]] = ("network", "layer", "node")
_AMPLITUDES: Final[tuple[Amplitudes, ...]] = ("first", "all")


class DMD(Baseline):
    """Every group of rows moves by one linear map from snapshot to snapshot, of rank r: Koopman's view.

        w(k) ~ Re(sum_j phi_j beta_j lambda_j^k)

    rank        r, at most T - 1; a group with fewer rows, or fewer singular values above the noise of
                float64, has fewer: ``ranks_`` says how many, and a network that has fewer warns
    amplitudes  beta from the "first" snapshot, or from "all" of them by least squares
    groups      "network"; "layer", the tensors of a module; "node", what a unit of a module receives, as
                node-wise Koopman operators do: they cost a T x T matrix each

    Weights are taken as they are, not centred. A mode with |lambda| > 1 grows: ``growth_`` is the largest
    |lambda|^(T - 1). Steps must be even; those beyond the last one, on the same grid, are forecasts. What
    grows beyond float32 comes back infinite with a warning, beyond float64 is an error.

    After ``fit``: ``eigenvalues_``, ``amplitudes_``, ``ranks_``, ``growth_``.
    Sources: Tu et al., arXiv 1312.0041; nodes: Dogra and Redman, arXiv 2006.02361.
    """

    def __init__(self, rank: int, amplitudes: Amplitudes = "first", groups: Groups = "network") -> None:
        super().__init__()
        if amplitudes not in _AMPLITUDES:
            raise UsageError(f"amplitudes cannot be {amplitudes!r}", hint=f"have: {', '.join(_AMPLITUDES)}")
        if groups not in _GROUPS:
            raise UsageError(f"groups cannot be {groups!r}", hint=f"have: {', '.join(_GROUPS)}")
        require_rank(rank, None, "DMD")
        self.rank = rank
        self.amplitudes: Amplitudes = amplitudes
        self.groups: Groups = groups
        self.by: By | None = groups
        self._dynamics: list[Dynamics] = []
        self._grouping: Grouping | None = None

    def _check(self, traj: Trajectory) -> None:
        require_rank(self.rank, traj, "DMD")
        require_even(traj.steps, traj.path)

    def _learn(self, traj: Trajectory, grams: Grams | None) -> tuple[float, float]:
        assert grams is not None
        self._grouping = grams.grouping
        self._dynamics = [decompose(gram.raw, self.rank, self.amplitudes) for gram in grams]
        if self.groups == "network" and (found := self._dynamics[0].rank) < self.rank:
            warn(f"{self!r}: {found} singular values lie above the noise, the others are left out")
        errors = [_residual(g, d) for g, d in zip(grams, self._dynamics, strict=True)]
        if lost := [printable(grams.grouping.name(g)) for g in np.flatnonzero(np.isinf(errors)).tolist()]:
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            warn(f"{self!r}: a mode of {lost[0]}{more} grows beyond float64 within the snapshots")
        return sum(errors), sum(gram.energy for gram in grams)

    # ---- what was found -----------------------------------------------------------------------------

    @property
    def dynamics_(self) -> list[Dynamics]:
        """Of every group."""
        _ = self.trajectory
        return self._dynamics

    @property
    def eigenvalues_(self) -> list[C128]:
        """Of every group, (r,): what a mode is multiplied with from snapshot to snapshot."""
        return [each.eigenvalues for each in self.dynamics_]

    @property
    def amplitudes_(self) -> list[C128]:
        """Of every group, (r,)."""
        return [each.amplitudes for each in self.dynamics_]

    @property
    def ranks_(self) -> I64:
        """(G,) modes of every group."""
        return np.array([each.rank for each in self.dynamics_], dtype=np.int64)

    @property
    def growth_(self) -> float:
        """The largest |lambda|^(T - 1) of all groups."""
        with np.errstate(over="ignore"):
            largest = np.float64(max(each.largest for each in self.dynamics_))
            return float(largest ** (len(self.steps_) - 1))

    def _remarks(self) -> list[str]:
        ranks = self.ranks_
        of_all = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks.min()}-{ranks.max()}, median "
        if len(ranks) > 1:
            of_all += f"{np.median(ranks):g}, of {len(ranks)} groups by {self.groups}"
        worst = int(np.argmax([each.largest for each in self.dynamics_]))
        assert self._grouping is not None
        where = printable(self._grouping.name(worst))
        return [
            of_all,
            f"largest |lambda| {self._dynamics[worst].largest:.4f} in {where}, "
            f"{self.growth_:.3g} times from the first snapshot to the last",
        ]

    def _size(self) -> dict[str, Any]:
        """Modes are complex64; eigenvalues and amplitudes beside them."""
        assert self._grouping is not None
        ranks = self.ranks_
        numbers = int((self._grouping.n_rows() * ranks).sum()) + 2 * int(ranks.sum())
        return {"rank": int(ranks.max()), "growth": self.growth_, "result_bytes": 8 * numbers}

    # ---- rebuilding -----------------------------------------------------------------------------------

    def _filter(self, traj: Trajectory, step: int) -> Filter:
        k = np.array([(step - traj.steps[0]) // gap(traj.steps)])
        weights = np.concatenate([each.filters(k).T for each in self.dynamics_])
        return Filter(weights, self._grouping, only_finite=True)

    def _beyond(self, traj: Trajectory, step: int) -> str | None:
        off = (step - int(traj.steps[-1])) % gap(traj.steps)
        return f"is not on the grid of every {gap(traj.steps)} steps" if off else None

    def __repr__(self) -> str:
        return f"DMD({self.rank}, amplitudes={self.amplitudes!r}, groups={self.groups!r})"


def _residual(gram: Gram, dynamics: Dynamics) -> float:
    """Squared error over all rows and snapshots; infinity where a mode grows beyond float64."""
    n_snapshots = len(gram.G)
    if not dynamics.reaches(n_snapshots - 1):
        return float("inf")
    return gram.residual(dynamics.filters(np.arange(n_snapshots)))
