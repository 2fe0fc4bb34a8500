"""What a decomposition is held against: smoothers, subspaces and dynamics of one trajectory, out of core.

EMA, SWA, LAWA, PCA and exact DMD are linear filters in time: the model of a step is ``W f``, with one
T-vector f for all rows, or one for every group of them. So a baseline holds nothing that grows with N. Its
``fit`` reads the trajectory once for a Gram matrix, or not at all, and ``state_dict(step)`` is one streaming
product over the snapshots that f does not weigh with zero.

    pca = PCA(10).fit(Trajectory.open("run.zarr"))
    pca.load_into(model, step=-1)
    Baseline.fit_together([PCA(2), PCA(10), DMD(10)], traj)     # one pass for all of them

Every baseline has ``fit``, ``state_dict``, ``load_into``, ``export``, ``metrics_`` and ``summary``, as
``CMD`` has them. It is not stored: what it knows beside the trajectory is a few T x T numbers, and the
trajectory must be at hand to rebuild anything.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from cmdgpu.baselines.averaging import EMA as EMA
    from cmdgpu.baselines.averaging import LAWA as LAWA
    from cmdgpu.baselines.averaging import SWA as SWA
    from cmdgpu.baselines.contract import Baseline as Baseline
    from cmdgpu.baselines.dmd import DMD as DMD
    from cmdgpu.baselines.pca import PCA as PCA
    from cmdgpu.baselines.rank_one import RankOne as RankOne
    from cmdgpu.baselines.reference_dmd import ReferenceDMD as ReferenceDMD

_HOMES: Final = {
    "EMA": "averaging",
    "SWA": "averaging",
    "LAWA": "averaging",
    "PCA": "pca",
    "RankOne": "rank_one",
    "DMD": "dmd",
    "ReferenceDMD": "reference_dmd",
    "Baseline": "contract",
}

__all__ = ["EMA", "SWA", "LAWA", "PCA", "RankOne", "DMD", "ReferenceDMD", "Baseline"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"cmdgpu.baselines.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'cmdgpu.baselines' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
