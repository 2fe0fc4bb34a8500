"""The reference profile of every mode, how its sampled rows spread about it, and how large it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from cmdgpu.clustering import moving_rows
from cmdgpu.notation import F64, I64, NO_ROW
from cmdgpu.views.scalars import unit_of

if TYPE_CHECKING:
    from cmdgpu.decomposition import CMD

_BAND: Final = (0.025, 0.975)
"""Quantiles between which 95 % of the sampled rows lie, as in the paper's Fig. 3."""


@dataclass(frozen=True)
class Profiles:
    """M modes at T snapshots; no mode, M = 0, where no sampled row moves."""

    unit: str
    """What a step counts, see ``unit_of``."""
    steps: I64
    """(T,)"""
    raw_mt: F64
    """(M, T) references as they were stored."""
    z_mt: F64
    """(M, T) the same, centred and of unit norm."""
    low_mt: F64
    """(M, T) 2.5 % quantile over the sampled rows of the mode, centred, of unit norm, turned to the sign of
    the reference; NaN where the mode has fewer than two."""
    high_mt: F64
    """(M, T) the same at 97.5 %."""
    sampled_m: I64
    """(M,) sampled rows of the mode."""
    size_m: I64
    """(M,) rows of parameters of the whole model."""
    share_m: F64
    """(M,) of all moving rows of parameters."""
    quantiles_m5: F64
    """(M, 5) |corr| below which 5, 25, 50, 75, 95 % of the rows of the mode lie; NaN for a mode without."""
    where_m: list[str | None]
    """(M,) ``layer1.weight[3, 0, 1]`` of the reference; None for one that is no row."""


def profiles(cmd: CMD) -> Profiles:
    """The profiles of a fitted CMD; sampled rows are those that were clustered into a mode."""
    raw_mt = cmd.references_.astype(np.float64)
    z_mt, _ = moving_rows(raw_mt)
    z_kt, _ = moving_rows(cmd.sample_.astype(np.float64))
    low_mt, high_mt = np.full((2, *z_mt.shape), np.nan)
    for m, z_t in enumerate(z_mt):
        mine = z_kt[cmd.sample_labels_ == m]
        if len(mine) > 1:
            turned = mine * np.where(mine @ z_t < 0, -1.0, 1.0)[:, None]
            low_mt[m], high_mt[m] = np.quantile(turned, _BAND, axis=0)
    metrics = cmd.result.metrics
    size_m = np.array(metrics["mode_sizes"], dtype=np.int64)
    labels_k = cmd.sample_labels_
    locate = cmd.result.frame.map.locate
    return Profiles(
        unit=unit_of(cmd),
        steps=cmd.steps_,
        raw_mt=raw_mt,
        z_mt=z_mt,
        low_mt=low_mt,
        high_mt=high_mt,
        sampled_m=np.bincount(labels_k[labels_k >= 0], minlength=len(z_mt)),
        size_m=size_m,
        share_m=size_m / max(int(size_m.sum()), 1),
        quantiles_m5=np.array(metrics["mode_quantiles"], dtype=np.float64).reshape(-1, 5),
        where_m=[locate(row) if row != NO_ROW else None for row in cmd.reference_rows_.tolist()],
    )
