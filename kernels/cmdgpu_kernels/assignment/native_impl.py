"""``assign_and_fit`` compiled for the CPU: what may run it, its libraries, its call.

One library per instruction set, each an implementation of its own, so that any of them can be asked for by
name on a machine that has a better one. They are loaded by ctypes, which lets go of the interpreter's lock.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmdgpu_kernels.assignment.row_fit import RowFit
from cmdgpu_kernels.dispatch import Problem
from cmdgpu_kernels.limits import CONSTANT
from cmdgpu_kernels.references import References
from cmdgpu_kernels.workers import run_in_workers

__all__ = ["PATHS", "TASK_ROWS", "TOLERANCE", "refusals", "run", "workspace_bytes"]

LIBRARIES: Final = Path(__file__).resolve().parent.parent / "_native"
SOURCE: Final = Path(__file__).with_name("native.cpp")

PATHS: Final = {
    # What the psABI level of the library may use and the kernel profits from; all of a level come together.
    "avx512": frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx2", "fma", "bmi2"}),
    "avx2": frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "movbe"}),
    "baseline": frozenset[str](),
}
"""Libraries, best first, and the features of a CPU each needs."""

TASK_ROWS: Final = 16_384
"""Rows of one call: long enough that Python between two calls does not show, short enough to share out."""

WIDEST: Final = 6
"""References whose sums stay in registers."""

LINE: Final = 64
"""Bytes of a cache line."""

DTYPES: Final = {"float32": 0, "float16": 1, "bfloat16": 2}
TOLERANCE: Final = {"float32": 3e-6, "float16": 3e-6, "bfloat16": 3e-6}


def refusals(path: str, problem: Problem) -> tuple[str, ...]:
    """Every reason why the library for ``path`` cannot serve the problem."""
    reasons: list[str] = []
    if problem.device != "cpu":
        reasons.append(f"needs the CPU, got {problem.device!r}")
    if problem.dtype not in DTYPES:
        reasons.append(f"dtype {problem.dtype} (supported: {', '.join(DTYPES)})")
    if absent := _absent(path):
        reasons.append(absent)
    return tuple(reasons)


@functools.cache
def _absent(path: str) -> str | None:
    """Why the library cannot be used on this machine, or None."""
    report = LIBRARIES / "report.txt"
    library = LIBRARIES / f"{path}.so"
    if not library.exists():
        if not report.exists():
            return "this installation was built without a compiled kernel"
        lines = report.read_text().splitlines()
        return next((line for line in lines if line.startswith(f"{path}: ")), lines[0])
    if missing := sorted(PATHS[path] - _features()):
        return f"this CPU lacks {', '.join(missing)}"
    try:
        found = _library(path)
    except OSError as error:
        return f"{library.name} cannot be loaded: {error}"
    if found.cmdgpu_source().decode() != hashlib.sha256(SOURCE.read_bytes()).hexdigest():
        return f"{library.name} was built from another native.cpp: install cmdgpu again"
    return None


@functools.cache
def _features() -> frozenset[str]:
    """Flags of the CPU; none where they cannot be learnt."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            name, _, flags = line.partition(":")
            if name.strip() == "flags":
                return frozenset(flags.split())
    if platform.machine().lower() in ("x86_64", "amd64"):
        # Torch names what it found in the same steps; asked for by name only where the kernel is not Linux.
        capability = torch.backends.cpu.get_cpu_capability()
        return frozenset[str]().union(*(PATHS[path] for path in PATHS if path.upper() == capability))
    return frozenset()


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


@functools.cache
def _library(path: str) -> Any:
    """The library, its functions declared. Raises OSError."""
    library = ctypes.CDLL(str(LIBRARIES / f"{path}.so"))
    library.cmdgpu_source.restype = ctypes.c_char_p
    library.cmdgpu_scratch_bytes.restype = ctypes.c_int64
    library.cmdgpu_scratch_bytes.argtypes = (ctypes.c_int64, ctypes.c_int64)
    library.cmdgpu_assign_and_fit.restype = None
    library.cmdgpu_assign_and_fit.argtypes = (ctypes.POINTER(_Arguments), ctypes.c_int64, ctypes.c_int64)
    return library


def workspace_bytes(path: str, problem: Problem, threads: int) -> int:
    """Memory of a pass beside W and the outputs: a buffer for each thread, and the packed references."""
    groups, width = _groups(problem.modes)
    scratch = int(_library(path).cmdgpu_scratch_bytes(problem.snapshots, groups * width))
    return threads * (scratch + LINE + 64 * 1024) + 8 * (problem.snapshots + 8) * (groups * width + 1)


def run(
    path: str, W_tb: Tensor, references: References, *, margin: bool = False, threads: int | None = None
) -> RowFit:
    """Fit the rows of W_tb, (T, B) with any strides. ``threads`` counts calls in flight."""
    snapshots, rows = W_tb.shape
    library = _library(path)
    packed = _packed(references)
    fit = RowFit.empty(rows, W_tb.device, margin=margin)
    scratch_bytes = int(library.cmdgpu_scratch_bytes(snapshots, packed.groups * packed.width))

    def work(starts: Iterable[int]) -> None:
        scratch = np.empty(scratch_bytes + LINE, dtype=np.uint8)
        arguments = _Arguments(
            W=W_tb.data_ptr(),
            stride_t=W_tb.stride(0),
            stride_n=W_tb.stride(1),
            snapshots=snapshots,
            rows=rows,
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
            scratch=-(-scratch.ctypes.data // LINE) * LINE,
            dtype=DTYPES[str(W_tb.dtype).removeprefix("torch.")],
        )
        for start in starts:
            library.cmdgpu_assign_and_fit(arguments, start, min(start + TASK_ROWS, rows))

    run_in_workers(work, range(0, rows, TASK_ROWS), threads or torch.get_num_threads())
    return fit


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
