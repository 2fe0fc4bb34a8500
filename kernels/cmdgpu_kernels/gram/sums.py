"""What ``gram_matrix`` answers, and how answers are added."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cmdgpu_kernels.limits import LARGEST_SS

__all__ = ["GRANULE", "LARGEST_SIZE", "Gram", "add_two", "symmetric"]

F64 = NDArray[np.float64]

GRANULE = 16_384
"""Rows, counted from the first one of a call, that one worker adds up in float32 before float64 takes over.

The longest sum in float32 then has the same terms whatever the number of workers.
"""

LARGEST_SIZE = LARGEST_SS / (2 * GRANULE)
"""Beyond it a row's |x|^2 + p^2 counts as not finite: a granule of such rows may leave float32."""


@dataclass(frozen=True, eq=False)
class Gram:
    """Inner products of snapshots over the rows of a block, displaced by the first one: x = w - p, p = w_0.

    The raw products are ``G + q[:, None] + q[None, :] + sum_pp``; PCA, which centres rows, needs G only.
    """

    G: F64
    """(T, T): sum_n x_n x_n^T. Its row and column 0 are 0."""
    q: F64
    """(T,): sum_n p_n x_n."""
    sum_pp: float
    """sum_n p_n^2."""
    left_out: int
    """Rows that count as not finite: nothing of theirs is in the sums."""
    rest: F64
    """(T, T): what rounding to float64 took from G, with q's in row and column 0 and sum_pp's in the corner.

    It makes a sum of blocks, cut at whole granules, the same to the last bit wherever the cuts are: 106 bits
    round to the same 53, but in one case in 10^14 where an entry lies that close to halfway.
    """

    def __add__(self, other: Gram) -> Gram:
        """The answer for both blocks: ``sum(blocks[1:], blocks[0])`` in the order of the rows.

        Blocks of a multiple of 16,384 rows, but for the last one, give the bits of one call over all rows.
        """
        high, rest = add_two(self._packed(), self.rest, other._packed(), other.rest)
        return Gram.unpacked(high, rest, self.left_out + other.left_out)

    @classmethod
    def unpacked(cls, high: F64, rest: F64, left_out: int) -> Gram:
        """From the products of [p, x_1, x_2, ...]: x_0 is 0 by definition, and its place carries p."""
        q = high[0].copy()
        q[0] = 0.0
        G = high.copy()
        G[0], G[:, 0] = 0.0, 0.0
        return cls(G=G, q=q, sum_pp=float(high[0, 0]), left_out=left_out, rest=rest)

    def _packed(self) -> F64:
        high = self.G.copy()
        high[0], high[:, 0], high[0, 0] = self.q, self.q, self.sum_pp
        return high


def add_two(high: F64, rest: F64, other: F64, other_rest: F64) -> tuple[F64, F64]:
    """Sum of two numbers of 106 bits, each held as what float64 takes of it and what that leaves."""
    total, error = _two_sum(high, other)
    rests, smaller = _two_sum(rest, other_rest)
    total, error = _renormalised(total, error + rests)
    return _renormalised(total, error + smaller)


def symmetric(high: F64, rest: F64) -> tuple[F64, F64]:
    """The mean of a matrix and its transpose, each number held so."""
    total, error = add_two(high, rest, high.T, rest.T)
    return total / 2, error / 2


def _two_sum(a: F64, b: F64) -> tuple[F64, F64]:
    """a + b and its rounding error, exactly (Knuth)."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


def _renormalised(large: F64, small: F64) -> tuple[F64, F64]:
    """The same, where |large| >= |small| (Dekker)."""
    total = large + small
    return total, small - (total - large)
