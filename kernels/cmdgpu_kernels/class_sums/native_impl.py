"""``class_sums`` compiled for the CPU: the same additions in the same order, and so the same bits."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from cmdgpu_kernels.class_sums.reference import FIELDS, FIRST_MODE, FittedRows
from cmdgpu_kernels.native.library import LINE, aligned, load

__all__ = ["run"]


class _Arguments(ctypes.Structure):
    """``SumArguments`` of native.cpp, field by field."""

    _fields_ = (
        ("mode", ctypes.c_void_p),
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("correlation", ctypes.c_void_p),
        ("ss", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("means", ctypes.c_void_p),
        ("classes", ctypes.c_int64),
        ("snapshots", ctypes.c_double),
        ("epsilon4", ctypes.c_double),
        ("sums", ctypes.c_void_p),
        ("histogram", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
    )


def run(
    path: str, fitted: FittedRows, sums: NDArray[np.float64], histogram: NDArray[np.int64] | None
) -> None:
    """See ``class_sums_reference``."""
    n_modes = len(fitted.reference_means)
    means = np.ascontiguousarray(fitted.reference_means if n_modes else np.zeros(1), dtype=np.float64)
    given = (fitted.mode, fitted.a, fitted.b, fitted.correlation, fitted.ss)
    rows = [np.ascontiguousarray(values) for values in given]
    counted = histogram if n_modes else None
    kinds = [np.dtype(np.int16), *[np.dtype(np.float32)] * 4]
    assert [values.dtype for values in rows] == kinds and len({len(values) for values in rows}) == 1
    assert sums.shape == (len(FIELDS), FIRST_MODE + n_modes) and sums.flags.c_contiguous
    assert counted is None or counted.flags.c_contiguous
    scratch = np.empty((FIRST_MODE + n_modes + 1) * LINE, dtype=np.uint8)
    arguments = _Arguments(
        *(values.ctypes.data for values in rows),
        rows=len(fitted.mode),
        means=means.ctypes.data,
        classes=FIRST_MODE + n_modes,
        snapshots=fitted.n_snapshots,
        epsilon4=4.0 * fitted.epsilon,
        sums=sums.ctypes.data,
        histogram=None if counted is None else counted.ctypes.data,
        scratch=aligned(scratch.ctypes.data),
    )
    library = load(path)
    library.cmdgpu_class_sums.restype = None
    library.cmdgpu_class_sums(ctypes.byref(arguments))
