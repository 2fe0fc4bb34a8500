"""What |correlation| would be if no two weights had anything to do with each other.

Independent random walks already correlate with their best reference at about 0.77 (10 modes, 1,000
sampled rows, any T from 20 to 150), so a mean |corr| of 0.8 says little until this number stands
beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from cmdgpu.clustering import cluster_sample, moving_rows
from cmdgpu.errors import UsageError
from cmdgpu.notation import F32, F64
from cmdgpu.ops import assign_and_fit

BLOCK_BYTES: Final = 1 << 26
"""Walks are drawn and assigned in blocks of about this size, so that a long T needs no long memory."""


@dataclass(frozen=True)
class NullCorrelation:
    """Mean best |corr| of independent random walks, over repeats of the whole pipeline."""

    mean: float
    low: float
    """5 % quantile over the repeats."""
    high: float
    """95 % quantile over the repeats."""


def random_walk_correlation(
    sample_kt: F64 | F32,
    n_modes: int | None,
    threshold: float | None,
    affinity: str,
    *,
    n_rows: int = 8192,
    seed: int = 0,
    repeats: int = 20,
) -> NullCorrelation:
    """Mean best |corr| of independent random walks that move as the sample moves.

    sample_kt is (K, T). With s(t) = RMS over its moving finite rows of w(t + 1) - w(t), a walk is

        v(0) = 0,    v(t + 1) = v(t) + s(t) * g(t),    g independent standard normal

    and one repeat is the pipeline of the fit: cluster as many walks as the sample has moving rows by
    the same rule (``n_modes``, or ``threshold`` when it is given) and affinity, then assign ``n_rows``
    other walks to the references found, in float32 as stored weights are. The seed fixes the walks.

    T = 2 gives 1: two points always lie on a line. A sample in which no row moves (or T < 2) has no
    increments to imitate: UsageError.
    """
    if n_rows < 1 or repeats < 1:
        raise UsageError(f"the null model needs n_rows >= 1 and repeats >= 1, got {n_rows} and {repeats}")
    scale_t, n_walks = _increment_scale(np.asarray(sample_kt, dtype=np.float64))
    if n_modes is not None:
        n_modes = min(n_modes, n_walks)
    means = [
        _one_repeat(
            np.random.default_rng(child),
            scale_t,
            n_walks,
            n_rows,
            n_modes=n_modes,
            threshold=threshold,
            affinity=affinity,
        )
        for child in np.random.SeedSequence(seed).spawn(repeats)
    ]
    low, high = np.quantile(means, (0.05, 0.95))
    return NullCorrelation(mean=float(np.mean(means)), low=float(low), high=float(high))


def _increment_scale(sample_kt: F64) -> tuple[F64, int]:
    """RMS increment at each of the T - 1 steps, and how many rows of the sample move."""
    _, why = moving_rows(sample_kt)
    moving_kt = sample_kt[why == 0]
    if len(moving_kt) == 0:
        raise UsageError(f"no row of the sample moves: {len(sample_kt)} rows, T = {sample_kt.shape[1]}")
    increments = np.diff(moving_kt, axis=1)
    # Only the shape of s(t) over time matters to a correlation; scaled, its squares stay in range.
    increments /= np.abs(increments).max()
    return np.sqrt(np.mean(increments**2, axis=0)), len(moving_kt)


def _one_repeat(
    rng: np.random.Generator,
    scale_t: F64,
    n_walks: int,
    n_rows: int,
    *,
    n_modes: int | None,
    threshold: float | None,
    affinity: str,
) -> float:
    sample_kt = np.ascontiguousarray(_walks(rng, scale_t, n_walks).T)
    clustering = cluster_sample(
        sample_kt.astype(np.float64), n_modes=n_modes, threshold=threshold, affinity=affinity
    )
    R_mt = sample_kt[clustering.references]
    block = max(1, BLOCK_BYTES // (8 * (len(scale_t) + 1)))
    total = 0.0
    for start in range(0, n_rows, block):
        W_tb = _walks(rng, scale_t, min(block, n_rows - start))
        fit = assign_and_fit(W_tb, R_mt, time_major=True, device="cpu")
        total += float(fit.correlation.abs().double().sum())
    return total / n_rows


def _walks(rng: np.random.Generator, scale_t: F64, n: int) -> F32:
    """n independent walks, time-major (T, n)."""
    W_tn = np.zeros((len(scale_t) + 1, n), dtype=np.float32)
    steps = rng.standard_normal((len(scale_t), n))
    steps *= scale_t[:, None]
    W_tn[1:] = np.cumsum(steps, axis=0, out=steps)
    return W_tn
