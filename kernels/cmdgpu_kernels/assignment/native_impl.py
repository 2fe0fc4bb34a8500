"""``assign_and_fit`` compiled for the CPU: what may run it, and its call."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmdgpu_kernels.assignment.row_fit import RowFit
from cmdgpu_kernels.dispatch import Problem
from cmdgpu_kernels.limits import CONSTANT
from cmdgpu_kernels.native import library
from cmdgpu_kernels.references import References
from cmdgpu_kernels.workers import run_in_workers

__all__ = ["Call", "TASK_ROWS", "TOLERANCE", "refusals", "run", "workspace_bytes"]

TASK_ROWS: Final = 16_384
"""Rows of one call: long enough that Python between two calls does not show, short enough to share out."""

WIDEST: Final = 6
"""References whose sums stay in registers."""

DTYPES: Final = {"float32": 0, "float16": 1, "bfloat16": 2}
TOLERANCE: Final = {"float32": 3e-6, "float16": 3e-6, "bfloat16": 3e-6}


def refusals(path: str, problem: Problem) -> tuple[str, ...]:
    """Every reason why the library for ``path`` cannot serve the problem."""
    reasons = library.refusals(path, problem)
    if problem.dtype not in DTYPES:
        return (f"dtype {problem.dtype} (supported: {', '.join(DTYPES)})", *reasons)
    return reasons


class _Arguments(ctypes.Structure):
    """``Arguments`` of native.cpp, field by field."""

    _fields_ = (
        ("W", ctypes.c_void_p),
        ("stride_t", ctypes.c_int64),
        ("stride_n", ctypes.c_int64),
        ("snapshots", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("z", ctypes.c_void_p),
        ("tail", ctypes.c_void_p),
        ("index", ctypes.c_void_p),
        ("mean", ctypes.c_void_p),
        ("rnorm_inv", ctypes.c_void_p),
        ("groups", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("mode", ctypes.c_void_p),
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("correlation", ctypes.c_void_p),
        ("ss", ctypes.c_void_p),
        ("margin", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
    )


def _library(path: str) -> Any:
    """The library, its functions declared."""
    found = library.load(path)
    found.cmdgpu_scratch_bytes.restype = ctypes.c_int64
    found.cmdgpu_scratch_bytes.argtypes = (ctypes.c_int64, ctypes.c_int64)
    found.cmdgpu_assign_and_fit.restype = None
    found.cmdgpu_assign_and_fit.argtypes = (ctypes.POINTER(_Arguments), ctypes.c_int64, ctypes.c_int64)
    return found


def workspace_bytes(path: str, problem: Problem, threads: int) -> int:
    """Memory of a pass beside W and the outputs: a buffer for each thread, and the packed references."""
    groups, width = _groups(problem.modes)
    scratch = int(_library(path).cmdgpu_scratch_bytes(problem.snapshots, groups * width))
    return threads * (scratch + library.LINE + 64 * 1024) + 8 * (problem.snapshots + 8) * (groups * width + 1)


def run(
    path: str, W_tb: Tensor, references: References, *, margin: bool = False, threads: int | None = None
) -> RowFit:
    """Fit the rows of W_tb, (T, B) with any strides. ``threads`` counts calls in flight."""
    rows = W_tb.shape[1]
    fit = RowFit.empty(rows, W_tb.device, margin=margin)
    compiled = _library(path)

    def work(starts: Iterable[int]) -> None:
        call = Call(path, references, fit, str(W_tb.dtype).removeprefix("torch."))
        call.arguments.W = W_tb.data_ptr()
        call.arguments.stride_t, call.arguments.stride_n = W_tb.stride()
        for start in starts:
            compiled.cmdgpu_assign_and_fit(call.arguments, start, min(start + TASK_ROWS, rows))

    run_in_workers(work, range(0, rows, TASK_ROWS), threads or torch.get_num_threads())
    return fit


class Call:
    """The arguments of one thread's calls, and what must stay alive while they run. W is still to be set."""

    def __init__(self, path: str, references: References, fit: RowFit, dtype: str) -> None:
        self._packed = packed = _packed(references)
        self._fit = fit
        n_bytes = int(_library(path).cmdgpu_scratch_bytes(references.snapshots, packed.groups * packed.width))
        self._scratch = np.empty(n_bytes + library.LINE, dtype=np.uint8)
        self.arguments = _Arguments(
            snapshots=references.snapshots,
            rows=len(fit.mode),
            z=packed.z.ctypes.data,
            tail=packed.tail.ctypes.data,
            index=packed.index_m.ctypes.data,
            mean=packed.mean_m.ctypes.data,
            rnorm_inv=packed.rnorm_inv_m.ctypes.data,
            groups=packed.groups,
            width=packed.width,
            mode=fit.mode.data_ptr(),
            a=fit.a.data_ptr(),
            b=fit.b.data_ptr(),
            correlation=fit.correlation.data_ptr(),
            ss=fit.ss.data_ptr(),
            margin=None if fit.margin is None else fit.margin.data_ptr(),
            scratch=library.aligned(self._scratch.ctypes.data),
            dtype=DTYPES[dtype],
        )


@dataclass(frozen=True)
class _Packed:
    """The distinct references in groups of equal width, and what their winner is looked up in."""

    z: NDArray[np.float32]
    """(groups, T, width), padded with references of 0."""
    tail: NDArray[np.float32]
    """(groups, partials, width)."""
    index_m: NDArray[np.int32]
    mean_m: NDArray[np.float32]
    rnorm_inv_m: NDArray[np.float32]
    groups: int
    width: int


def _groups(modes: int) -> tuple[int, int]:
    """How many groups, and references of each: 7 are two groups of 4, not one of 6 and one of 1."""
    groups = -(-modes // WIDEST)
    return groups, -(-modes // max(groups, 1))


def _packed(references: References) -> _Packed:
    which = references.distinct
    groups, width = _groups(len(which))

    def grouped(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        padded = np.pad(rows[which], ((0, groups * width - len(which)), (0, 0)))
        return np.ascontiguousarray(padded.reshape(groups, width, rows.shape[1]).swapaxes(1, 2))

    def build() -> _Packed:
        if len(which) == 0:
            # No reference acts like one that nothing correlates with, and that is nobody's mode.
            nothing, zero = np.zeros((0, 0, 0), np.float32), np.zeros(1, np.float32)
            return _Packed(nothing, nothing, np.array([CONSTANT], np.int32), zero, zero, 0, 0)
        return _Packed(
            grouped(references.z_mt),
            grouped(references.tail_mc),
            which.astype(np.int32),
            references.mean_m[which].astype(np.float32),
            references.rnorm_inv_m[which].astype(np.float32),
            groups,
            width,
        )

    return references.cached("native", build)
