"""Limits of float32 and int16 that every implementation shares, the float64 definition included."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "CONSTANT",
    "LARGEST_SS",
    "MAX_MODES",
    "NOT_FINITE",
    "PARTIAL",
    "SEGMENT",
    "SMALLEST_SS",
    "too_large",
]

CONSTANT = -1
"""Mode of a row that never moves."""

NOT_FINITE = -2
"""Mode of a row that holds NaN or inf, or moves further than float32 can square."""

MAX_MODES = 32_767
"""An int16 names the modes 0 .. 32766; one value is left unused."""

SMALLEST_SS = 2.0**-126
"""Below the smallest normal float32 a sum of squares is 0: flushing subnormals then changes nothing."""

LARGEST_SS = float(np.finfo(np.float32).max)

PARTIAL = 64
"""Snapshots summed before a partial is added to its total and the pivot moves on to the partial's mean.

At T = 10 000, rows that start far from where they settle: one long float32 sum behind one pivot errs by
3e-3 in the correlation, partials behind one pivot by 1e-4, partials behind a pivot that follows by 1e-6.
"""

SEGMENT = 4 * PARTIAL
"""Snapshots of one sum on a GPU, where a total beside every partial would cost the registers of a program.

Up to here the pivot, which moves all the same, keeps the digits.
"""


def too_large(ss: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Where a sum of squares is beyond float32, or is NaN."""
    return ~(ss <= LARGEST_SS)
