"""How closely the rows follow their modes: |corr| and R^2 of all of them, beside what chance would give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cmdgpu.notation import F64, I64
from cmdgpu.null_model import SHARE_EDGES
from cmdgpu.statistics import BIN_EDGES, share_below

if TYPE_CHECKING:
    from cmdgpu.decomposition import CMD


@dataclass(frozen=True)
class Band:
    """Shares of unrelated rows: mean, 5 and 95 % quantile over the repeats of a null model, (50,) each."""

    abs_correlation_low: F64
    abs_correlation_mean: F64
    abs_correlation_high: F64
    r2_low: F64
    r2_mean: F64
    r2_high: F64


@dataclass(frozen=True)
class Histograms:
    """Shares of the moving rows of parameters in 50 equal bins of [0, 1]; they add up to 1."""

    edges: F64
    """(51,)"""
    abs_correlation: F64
    """(50,) NaN where no row moves."""
    r2: F64
    """(50,) of corr^2."""
    per_mode: F64
    """(M, 50) of |corr|, shares of the rows of the mode; NaN for a mode without."""
    chance: Mapping[str, Band]
    """By null model, rows and references as in ``CMD.quality()``; empty where that has nothing to judge."""


def histograms(cmd: CMD) -> Histograms:
    """Histograms of a fitted CMD, from those of the pass; chance from ``quality()``, a second or two.

    The pass counts in bins that are narrow near 1: a share is exact up to where those bins are cut, and
    there linear.
    """
    counts_mb = cmd.result.totals.histogram
    counts_b: I64 = counts_mb.sum(axis=0)
    return Histograms(
        edges=SHARE_EDGES,
        abs_correlation=_shares(counts_b, SHARE_EDGES),
        r2=_shares(counts_b, np.sqrt(SHARE_EDGES)),
        per_mode=np.array([_shares(row, SHARE_EDGES) for row in counts_mb]).reshape(-1, len(SHARE_EDGES) - 1),
        chance={
            name: Band(*_band(null.abs_correlation), *_band(null.r2))
            for name, null in cmd.quality().chance_shares.items()
        },
    )


def _shares(counts_b: I64, edges: F64) -> F64:
    """Of rows counted between BIN_EDGES, the shares between other edges."""
    if not counts_b.any():
        return np.full(len(edges) - 1, np.nan)
    return np.diff(np.interp(edges, BIN_EDGES, share_below(counts_b)))


def _band(repeats: F64) -> tuple[F64, F64, F64]:
    """Low, mean and high of (repeats, 50)."""
    low, high = np.quantile(repeats, (0.05, 0.95), axis=0)
    return low, repeats.mean(axis=0), high
