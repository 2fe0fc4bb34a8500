"""NumPy's one-axis indexing as row numbers, without ever making an array as long as the axis; thinning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import numpy as np

from cmdgpu.errors import UsageError
from cmdgpu.notation import I64, AnyArray

Index: TypeAlias = int | slice | Sequence[int] | AnyArray


def positions(index: Index, size: int) -> tuple[I64, bool]:
    """Positions below ``size``, and whether the index was a single integer.

    Integers and arrays of them may be negative; a mask has the length of the axis. Raises UsageError for
    anything that lies outside.
    """
    if isinstance(index, slice):
        return np.arange(*index.indices(size), dtype=np.int64), False
    found = np.asarray(cast(Any, index))
    if found.dtype == bool:
        if found.shape != (size,):
            raise UsageError(f"a mask of shape {list(found.shape)} does not fit {size}")
        return np.flatnonzero(found), False
    if found.ndim > 1 or (found.size and found.dtype.kind not in "iu"):
        raise UsageError(f"cannot index with an array of {found.dtype}, {found.ndim} axes")
    single = found.ndim == 0
    found = np.atleast_1d(found).astype(np.int64)
    found = np.where(found < 0, found + size, found)
    if len(found) and (int(found.min()) < 0 or int(found.max()) >= size):
        raise UsageError(f"a position lies outside of {size}", hint=f"have: 0 to {size - 1}")
    return found, single


def evenly(n: int, most: int) -> I64:
    """At most so many positions below n, evenly spread, the first and the last among them."""
    if n <= most:
        return np.arange(n, dtype=np.int64)
    return np.round(np.linspace(0, n - 1, most)).astype(np.int64)
