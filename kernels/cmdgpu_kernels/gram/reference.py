"""The definition of ``gram_matrix``, in float64: short enough to believe."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from cmdgpu_kernels.gram.sums import LARGEST_SIZE, Gram

__all__ = ["gram_matrix_reference"]


def gram_matrix_reference(W: ArrayLike, *, time_major: bool = True) -> Gram:
    """Inner products of the snapshots over all rows, each displaced by its first value p.

    W is (T, B), or (B, T) when not ``time_major``. With x = w - p, p = w_0 of the row:

        G      = sum over rows of x x^T
        q      = sum over rows of p x
        sum_pp = sum over rows of p^2

    A row with |x|^2 + p^2 beyond float32 (2^113), NaN or inf is left out of every sum and counted.
    """
    W_tb = np.asarray(W, dtype=np.float64)
    W_tb = W_tb if time_major else W_tb.T
    with np.errstate(invalid="ignore", over="ignore"):
        p = W_tb[0]
        x = W_tb - p
        counted = np.square(x).sum(axis=0) + np.square(p) <= LARGEST_SIZE
    x, p = x[:, counted], p[counted]
    return Gram(
        G=x @ x.T,
        q=x @ p,
        sum_pp=float(p @ p),
        left_out=int((~counted).sum()),
        rest=np.zeros((len(W_tb), len(W_tb))),
    )
