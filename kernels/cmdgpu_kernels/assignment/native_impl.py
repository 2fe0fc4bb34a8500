"""``assign_and_fit`` compiled for the CPU: what may run it, and its call."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterable, Sequence
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


class _Set(ctypes.Structure):
    """``Set`` of native.cpp, field by field."""

    _fields_ = (
        ("product", ctypes.c_void_p),
        ("index", ctypes.c_void_p),
        ("mean", ctypes.c_void_p),
        ("rnorm_inv", ctypes.c_void_p),
        ("references", ctypes.c_int64),
        ("mode", ctypes.c_void_p),
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("correlation", ctypes.c_void_p),
        ("margin", ctypes.c_void_p),
    )


class _Arguments(ctypes.Structure):
    """``Arguments`` of native.cpp, field by field."""

    _fields_ = (
        ("W", ctypes.c_void_p),
        ("stride_t", ctypes.c_int64),
        ("stride_n", ctypes.c_int64),
        ("snapshots", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("z", ctypes.c_void_p),
        ("tail", ctypes.c_void_p),
        ("groups", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("sets", ctypes.POINTER(_Set)),
        ("fits", ctypes.c_int64),
        ("ss", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("dtype", ctypes.c_int64),
    )


def _library(path: str) -> Any:
    """The library, its functions declared."""
    found = library.load(path)
    found.cmdgpu_scratch_bytes.restype = ctypes.c_int64
    found.cmdgpu_scratch_bytes.argtypes = (ctypes.c_int64,)
    found.cmdgpu_assign_and_fit.restype = None
    found.cmdgpu_assign_and_fit.argtypes = (ctypes.POINTER(_Arguments), ctypes.c_int64, ctypes.c_int64)
    return found


def workspace_bytes(path: str, problem: Problem, threads: int) -> int:
    """Memory of a pass beside W and the outputs: a buffer for each thread, and the packed references."""
    groups, width = _groups(problem.modes)
    scratch = int(_library(path).cmdgpu_scratch_bytes(groups * width))
    return threads * (scratch + library.LINE + 64 * 1024) + 8 * (problem.snapshots + 8) * (groups * width + 1)


def run(
    path: str, W_tb: Tensor, references: References, *, margin: bool = False, threads: int | None = None
) -> RowFit:
    """Fit the rows of W_tb, (T, B) with any strides. ``threads`` counts calls in flight."""
    rows = W_tb.shape[1]
    fit = RowFit.empty(rows, W_tb.device, margin=margin)
    compiled = _library(path)

    def work(starts: Iterable[int]) -> None:
        call = Call(path, [references], [fit], str(W_tb.dtype).removeprefix("torch."))
        call.arguments.W = W_tb.data_ptr()
        call.arguments.stride_t, call.arguments.stride_n = W_tb.stride()
        for start in starts:
            compiled.cmdgpu_assign_and_fit(call.arguments, start, min(start + TASK_ROWS, rows))

    run_in_workers(work, range(0, rows, TASK_ROWS), threads or torch.get_num_threads())
    return fit


class Call:
    """The arguments of one thread's calls, and what must stay alive while they run. W is still to be set.

    A fit of the same rows for every set of references; ``ss`` is the same for all, in one tensor.
    """

    def __init__(self, path: str, sets: Sequence[References], fits: Sequence[RowFit], dtype: str) -> None:
        assert all(fit.ss is fits[0].ss for fit in fits)
        self._packed = packed = _packed(tuple(sets))
        self._fits = fits
        n_bytes = int(_library(path).cmdgpu_scratch_bytes(packed.groups * packed.width))
        self._scratch = np.empty(n_bytes + library.LINE, dtype=np.uint8)
        self._sets = (_Set * len(fits))(*map(_set, packed.sets, fits))
        self.arguments = _Arguments(
            snapshots=sets[0].snapshots,
            rows=len(fits[0].mode),
            z=packed.z.ctypes.data,
            tail=packed.tail.ctypes.data,
            groups=packed.groups,
            width=packed.width,
            sets=self._sets,
            fits=len(fits),
            ss=fits[0].ss.data_ptr(),
            scratch=library.aligned(self._scratch.ctypes.data),
            dtype=DTYPES[dtype],
        )


def _set(found: _Lookup, fit: RowFit) -> _Set:
    return _Set(
        product=found.product_m.ctypes.data,
        index=found.index_m.ctypes.data,
        mean=found.mean_m.ctypes.data,
        rnorm_inv=found.rnorm_inv_m.ctypes.data,
        references=len(found.product_m),
        mode=fit.mode.data_ptr(),
        a=fit.a.data_ptr(),
        b=fit.b.data_ptr(),
        correlation=fit.correlation.data_ptr(),
        margin=None if fit.margin is None else fit.margin.data_ptr(),
    )


@dataclass(frozen=True)
class _Lookup:
    """Where a set's distinct references are multiplied, and what its winners are looked up in."""

    product_m: NDArray[np.int32]
    index_m: NDArray[np.int32]
    mean_m: NDArray[np.float32]
    rnorm_inv_m: NDArray[np.float32]


@dataclass(frozen=True)
class _Packed:
    """The distinct references of all sets in groups of equal width.

    What several sets have in common is there once: sets of one sample share every cluster that the smaller
    number of modes does not merge.
    """

    z: NDArray[np.float32]
    """(groups, T, width), padded with references of 0."""
    tail: NDArray[np.float32]
    """(groups, partials, width)."""
    sets: list[_Lookup]
    groups: int
    width: int


def _groups(modes: int) -> tuple[int, int]:
    """How many groups, and references of each: 7 are two groups of 4, not one of 6 and one of 1."""
    groups = -(-modes // WIDEST)
    return groups, -(-modes // max(groups, 1))


_packing = threading.Lock()
"""Held while references are packed: the threads of a pass ask all at once, and memory is planned for one."""


def _packed(sets: tuple[References, ...]) -> _Packed:
    """Packed once and kept with the first set, until that is asked for in other company."""
    kept = sets[0].cached("native", dict[tuple[References, ...], _Packed])
    others = sets[1:]
    with _packing:
        if others not in kept:
            kept.clear()
            kept[others] = _pack(sets)
        return kept[others]


def _pack(sets: tuple[References, ...]) -> _Packed:
    places: dict[tuple[bytes, bytes], int] = {}
    z_mt: list[NDArray[np.float32]] = []
    tail_mc: list[NDArray[np.float32]] = []
    lookups: list[_Lookup] = []
    for one in sets:
        product: list[int] = []
        for m in one.distinct.tolist():
            place = places.setdefault((one.z_mt[m].tobytes(), one.tail_mc[m].tobytes()), len(places))
            if place == len(z_mt):
                z_mt.append(one.z_mt[m])
                tail_mc.append(one.tail_mc[m])
            product.append(place)
        lookups.append(_lookup(one, product))
    groups, width = _groups(len(z_mt))

    def grouped(rows: list[NDArray[np.float32]], columns: int) -> NDArray[np.float32]:
        packed = np.zeros((groups, columns, width), np.float32)
        for m, row in enumerate(rows):
            packed[m // width, :, m % width] = row
        return packed

    z, tail = grouped(z_mt, sets[0].snapshots), grouped(tail_mc, sets[0].tail_mc.shape[1])
    return _Packed(z, tail, lookups, groups, width)


def _lookup(references: References, product: list[int]) -> _Lookup:
    which = references.distinct
    if len(which) == 0:
        # No reference acts like one that nothing correlates with, and that is nobody's mode.
        nothing, zero = np.zeros(0, np.int32), np.zeros(1, np.float32)
        return _Lookup(nothing, np.array([CONSTANT], np.int32), zero, zero)
    return _Lookup(
        np.array(product, np.int32),
        which.astype(np.int32),
        references.mean_m[which].astype(np.float32),
        references.rnorm_inv_m[which].astype(np.float32),
    )
