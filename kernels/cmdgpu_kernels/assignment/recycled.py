"""Outputs in memory that is used again: unit after unit they are made, written and dropped.

The allocator of the system would keep several of them in every thread, and new pages cost more than the sums.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmdgpu_kernels.assignment.row_fit import RowFit

__all__ = ["outputs"]

_own = threading.local()
"""A thread's blocks that nobody looks at any more; they go with the thread."""


def outputs(rows: int, sets: int) -> list[RowFit]:
    """Unwritten outputs of a fit against each set of references; they share the tensor ``ss``.

    Their memory comes back to this thread when the last of the tensors is gone, in whatever thread that is.
    """
    n_bytes = rows * (4 + sets * 14)  # whole pages where the rows are: they can be written past any cache
    if getattr(_own, "n_bytes", 0) != n_bytes:
        _own.free, _own.n_bytes = list[NDArray[np.uint8]](), n_bytes
    free: list[NDArray[np.uint8]] = _own.free
    block = free.pop() if free else np.empty(n_bytes + mmap.PAGESIZE, dtype=np.uint8)
    # all tensors look at ``owner``, and nothing else does
    owner = (ctypes.c_uint8 * n_bytes).from_buffer(block.data, -block.ctypes.data % mmap.PAGESIZE)
    weakref.finalize(owner, free.append, block)
    at = 0

    def vector(dtype: torch.dtype = torch.float32) -> Tensor:
        nonlocal at
        tensor = torch.frombuffer(owner, dtype=dtype, count=rows, offset=at)
        at += rows * dtype.itemsize
        return tensor

    ss = vector()
    floats = [(vector(), vector(), vector()) for _ in range(sets)]  # behind them what needs less alignment
    return [RowFit(vector(torch.int16), a, b, correlation, ss) for a, b, correlation in floats]
