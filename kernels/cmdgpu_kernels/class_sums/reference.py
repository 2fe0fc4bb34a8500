"""The definition of ``class_sums``, in float64 NumPy; it also serves where nothing is compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["FIELDS", "FIRST_MODE", "GRANULE", "N_BINS", "FittedRows", "class_sums_reference"]

FIELDS = ("count", "ss", "rss", "abs_corr", "corr2", "below_quantisation")
FIRST_MODE = 2
"""Classes: 0 non-finite, 1 constant, then the modes."""
N_BINS = 256
GRANULE = 1 << 14
"""Rows summed before they are added to the total, counted from the first: their copies stay in the cache."""

F32 = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class FittedRows:
    """Rows of a fit, (n,) each, and what is known of all of them."""

    mode: NDArray[np.int16]
    a: F32
    b: F32
    correlation: F32
    ss: F32
    reference_means: NDArray[np.float64]
    """(M,)"""
    n_snapshots: int
    epsilon: float
    """Of the stored type."""


def class_sums_reference(
    fitted: FittedRows, sums: NDArray[np.float64], histogram: NDArray[np.int64] | None
) -> None:
    """Add the rows to ``sums`` (FIELDS, 2 + M) by class and to ``histogram`` (M, N_BINS) of |corr|.

        rss   = ss (1 - corr^2), the squared error of the row's fit
        below = ss <= T (4 eps mean)^2: the correlation is rounding noise; eps is the stored type's
        bin   = N_BINS (1 - sqrt(1 - |corr|)), even where |corr| crowds below 1

    Rows are added one after the other, granule by granule. None for ``histogram`` counts nothing.
    """
    mode, reference_means = fitted.mode, fitted.reference_means
    n_modes = len(reference_means)
    # Without modes, the one entry that the sentinels' clipped index finds.
    means = reference_means if n_modes else np.zeros(1)
    for start in range(0, len(mode), GRANULE):
        rows = slice(start, start + GRANULE)
        classes: NDArray[np.int64] = mode[rows].astype(np.int64) + FIRST_MODE
        abs_corr: NDArray[np.float64] = np.abs(fitted.correlation[rows].astype(np.float64))
        corr2 = abs_corr**2
        energy = np.where(classes == 0, 0.0, fitted.ss[rows].astype(np.float64))
        slope = fitted.a[rows].astype(np.float64)
        mean = fitted.b[rows].astype(np.float64) + slope * means[np.maximum(mode[rows], 0)]
        below = (classes >= FIRST_MODE) & (energy <= fitted.n_snapshots * (4.0 * fitted.epsilon * mean) ** 2)
        weights: tuple[Any, ...] = (
            None,
            energy,
            energy * (1.0 - corr2),
            abs_corr,
            corr2,
            below.astype(np.float64),
        )
        for field, weight in enumerate(weights):
            sums[field] += np.bincount(classes, weights=weight, minlength=sums.shape[1])
        if histogram is not None and n_modes:
            labelled = classes >= FIRST_MODE
            bins = (N_BINS * (1.0 - np.sqrt(1.0 - abs_corr[labelled]))).astype(np.int64)
            place = (classes[labelled] - FIRST_MODE) * N_BINS + np.minimum(bins, N_BINS - 1)
            histogram += np.bincount(place, minlength=histogram.size).reshape(histogram.shape)
