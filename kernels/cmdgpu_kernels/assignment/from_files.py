"""``assign_and_fit`` straight from files: the memory sees every byte once.

A block that is read into memory first and fitted afterwards passes through the memory four times: written by
the kernel of the system, which reads the line before, checked, and read again. Here a thread takes a few rows
of every snapshot at a time and fits them while the cache still has them.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence

import numpy as np

from cmdgpu_kernels.assignment import native_impl
from cmdgpu_kernels.assignment.recycled import outputs
from cmdgpu_kernels.assignment.row_fit import RowFit
from cmdgpu_kernels.dispatch import Problem
from cmdgpu_kernels.native import files, library
from cmdgpu_kernels.references import References

__all__ = ["can_fit_files", "fit_files", "files_workspace_bytes"]

PIECE_BYTES = 4 << 20
"""Of all snapshots together: 5.4 GB/s with 1 MiB, 6.2 with 4, 6.3 with 8 (two threads of a Xeon, T = 100)."""
PADDING = 64
"""Bytes between the snapshots of a piece: a power-of-two stride puts all of them in the same cache sets."""
BLOCK = 4096
"""Of a disk. What is read past the page cache begins and ends at a multiple of it in the file, and at one of
512 in memory; a snapshot's CRC may come in a block of its own."""
BLOCK_PADDING = BLOCK + 512
MOST_BYTES, SNAPSHOT_BYTES = 16 << 20, 512 << 10
"""Of a piece past the page cache, where the next one is under way while it is fitted: much at a time, because
a disk gives its rate to who asks for much."""
_REQUEST_BYTES = 128
"""What the compiled code keeps of a request."""


class _Pieces(ctypes.Structure):
    """``Pieces`` of native.cpp, field by field."""

    _fields_ = (
        ("files", files.Files),
        ("coming", ctypes.c_char_p),
        ("past_cache", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("buffer", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("open", ctypes.c_void_p),
        ("crcs", ctypes.c_void_p),
    )


def _path(implementation: str) -> str | None:
    """The library behind ``native-<path>``, if it reads files."""
    prefix, _, path = implementation.partition("-")
    return path if prefix == "native" and library.reads_files(path) else None


def can_fit_files(implementation: str) -> bool:
    """Whether the implementation that was chosen takes files."""
    return _path(implementation) is not None


def _piece(snapshots: int, itemsize: int, *, past_cache: bool) -> tuple[int, int]:
    """Rows of a piece and bytes between its snapshots. Whole blocks of the disk, so multiples of the tile."""
    size = PIECE_BYTES
    if past_cache:
        size = max(size, min(MOST_BYTES, snapshots * SNAPSHOT_BYTES))
    blocks = max(size // (snapshots * BLOCK), 1)
    return blocks * BLOCK // itemsize, blocks * BLOCK + (BLOCK_PADDING if past_cache else PADDING)


def files_workspace_bytes(problem: Problem, threads: int, *, past_cache: bool = False) -> int:
    """Memory of ``threads`` calls beside the outputs and the kernel's own workspace."""
    _, stride = _piece(problem.snapshots, 4 if problem.dtype == "float32" else 2, past_cache=past_cache)
    pieces = 2 if past_cache else 1
    return threads * (pieces * (problem.snapshots * stride + BLOCK) + problem.snapshots * _REQUEST_BYTES)


_own = threading.local()
"""A thread's buffer, kept from unit to unit."""


def fit_files(
    implementation: str,
    dtype: str,
    sets: Sequence[References],
    directory: str,
    names: Sequence[str],
    n_bytes: int,
    kept: Sequence[bytes],
    rows: int,
    coming: Sequence[str] | None = None,
    *,
    past_cache: bool = False,
) -> list[RowFit] | None:
    """Fit the first ``rows`` rows of files that hold one snapshot each, in this thread.

    One fit for every set of references, of which there is at least one, each with the bits that it has alone;
    they share the tensor ``ss``. Every file holds ``n_bytes`` of elements and their CRC-32C, which must be
    the ``kept`` one. None when a file is not what it must be. ``coming`` are files that will be asked for
    next: a cold disk is told ahead. ``past_cache``: files that the page cache does not hold are read without
    it, which costs half the time of the processor and leaves nothing for who reads them next; the disk is
    then told nothing, and wants to be asked by several threads.
    """
    path = _path(implementation)
    assert path is not None and {len(kept), *(references.snapshots for references in sets)} == {len(names)}
    itemsize = 4 if dtype == "float32" else 2
    step, stride = _piece(len(names), itemsize, past_cache=past_cache)
    size = (2 if past_cache else 1) * (len(names) * stride + BLOCK)
    if getattr(_own, "size", 0) != size:
        _own.buffer, _own.size = np.empty(size, dtype=np.uint8), size
    place = -(-_own.buffer.ctypes.data // BLOCK) * BLOCK
    fits = outputs(rows, len(sets))
    call = native_impl.Call(path, sets, fits, dtype)
    crcs = np.frombuffer(b"".join(kept), dtype="<u4")
    small = np.zeros((3, len(names)), dtype=np.int32)
    pieces = _Pieces(
        files=files.Files(
            directory=os.fsencode(directory),
            names=files.joined(names),
            files=len(names),
            bytes=n_bytes,
            kept=crcs.ctypes.data,
        ),
        coming=None if coming is None else files.joined(coming),
        past_cache=past_cache,
        rows=step,
        buffer=place,
        stride=stride,
        open=small[0].ctypes.data,
        crcs=small[2].ctypes.data,
    )
    compiled = library.load(path)
    compiled.cmdgpu_fit_files.restype = ctypes.c_int64
    right = compiled.cmdgpu_fit_files(ctypes.byref(call.arguments), ctypes.byref(pieces))
    return fits if right else None
