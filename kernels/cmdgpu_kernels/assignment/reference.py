"""The definition of ``assign_and_fit``, in float64: short enough to believe."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cmdgpu_kernels.limits import CONSTANT, NOT_FINITE, SMALLEST_SS, too_large
from cmdgpu_kernels.references import prepare_references

__all__ = ["ReferenceFit", "assign_and_fit_reference"]

F64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class ReferenceFit:
    """The fields of RowFit, in float64."""

    mode: NDArray[np.int16]
    a: F64
    b: F64
    correlation: F64
    ss: F64
    margin: F64


def assign_and_fit_reference(W: ArrayLike, R_mt: ArrayLike, *, time_major: bool = True) -> ReferenceFit:
    """Best mode of every row and its least-squares line on that mode's reference.

    W is (T, B), or (B, T) when not ``time_major``; R_mt is (M, T). With z_m = centred, unit-norm R_mt[m]:

        mode        = argmax_m |<w, z_m>|                 lowest m wins ties
        a           = <w, z_mode> / |r_mode - mean(r_mode)|
        b           = mean(w) - a * mean(r_mode)
        correlation = <w, z_mode> / sqrt(ss),  ss = |w - mean(w)|^2
        margin      = (|<w, z_mode>| - second best) / sqrt(ss)

    A row that never moves has mode -1, a = 0, b = its value, correlation 0, ss 0; a row with NaN or inf has
    mode -2, a = 0, b = NaN, correlation 0, ss NaN. The limits of float32 count: ss below 2**-126 is a row
    that never moves, ss beyond float32 one that is not finite. Without references (M = 0) every finite row
    has mode -1 and keeps its ss. Raises ValueError when W and R_mt disagree on T.

    Source: arXiv 2212.09040, Eq. 7 and 10, solved centred; its Eq. 8 has the sign of b reversed.
    """
    W_tb = np.asarray(W, dtype=np.float64)
    W_tb = W_tb if time_major else W_tb.T
    references = prepare_references(R_mt)
    if W_tb.shape[0] != references.snapshots:
        raise ValueError(f"W has {W_tb.shape[0]} snapshots, the references have {references.snapshots}")
    R = np.asarray(R_mt, dtype=np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        moved_tb = W_tb - W_tb[0]
        mean = W_tb[0] + moved_tb.mean(axis=0)
        centred_tb = moved_tb - moved_tb.mean(axis=0)
        ss = np.square(centred_tb).sum(axis=0)
        # One product per reference, each summed alike: equal references give equal digits, so the first wins.
        z_mt = (R - references.mean_m[:, None]) / references.rnorm_m[:, None]
        z_mt -= z_mt.mean(axis=1, keepdims=True) if R.size else 0.0
        d_mb = np.array([z @ centred_tb for z in z_mt]).reshape(len(z_mt), len(mean))

    outside = too_large(ss)
    still = (ss < SMALLEST_SS) & ~outside
    moving = ~outside & ~still & (len(R) > 0)
    mode = np.where(outside, NOT_FINITE, CONSTANT).astype(np.int16)
    a, correlation, margin = np.zeros((3, len(mean)))
    b = np.where(outside, np.nan, mean)
    ss = np.where(outside, np.nan, np.where(still, 0.0, ss))
    if moving.any():
        d = d_mb[:, moving]
        best = np.zeros(d.shape[1], dtype=np.intp) if len(W_tb) == 2 else np.argmax(np.abs(d), axis=0)
        d_best = d[best, np.arange(d.shape[1])]
        norm = np.sqrt(ss[moving])
        second = np.sort(np.abs(d[references.distinct]), axis=0)[-2:-1].sum(axis=0)
        mode[moving] = best
        a[moving] = d_best / references.rnorm_m[best]
        b[moving] = mean[moving] - a[moving] * references.mean_m[best]
        correlation[moving] = np.clip(d_best / norm, -1.0, 1.0)
        margin[moving] = (np.abs(d_best) - second) / norm
    return ReferenceFit(mode, a, b, correlation, ss, margin)
