"""Files of elements and a CRC-32C, read straight into their place: many in one call, outside of Python.

What is wrong with a file is not said here, only that something is: whoever asked looks at it again, slowly
and in words.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cmdgpu_kernels.dispatch import Problem
from cmdgpu_kernels.native.library import PATHS, load, reads_files, refusals

__all__ = ["Files", "can_read", "joined", "read_checked", "read_tails"]


class Files(ctypes.Structure):
    """``Files`` of native.cpp, field by field."""

    _fields_ = (
        ("directory", ctypes.c_char_p),
        ("names", ctypes.c_char_p),
        ("files", ctypes.c_int64),
        ("bytes", ctypes.c_int64),
        ("places", ctypes.c_void_p),
        ("kept", ctypes.c_void_p),
        ("tails", ctypes.c_void_p),
        ("answers", ctypes.c_void_p),
    )


@functools.cache
def _library() -> Any:
    """The best library that reads, or None."""
    problem = Problem("float32", 1, 1, "cpu")
    for path in PATHS:
        if not refusals(path, problem) and reads_files(path):
            library = load(path)
            library.cmdgpu_read_checked.restype = library.cmdgpu_read_tails.restype = None
            return library
    return None


def can_read() -> bool:
    """Whether this machine has a library for it, and its CPU the instruction of this CRC."""
    return _library() is not None


def read_checked(
    directory: str, names: Sequence[str], n_bytes: int, places: Sequence[NDArray[Any]], kept: Sequence[bytes]
) -> list[int]:
    """Positions of the files that are not right; all others lie in their place.

    Every file holds ``n_bytes`` of elements and their CRC, which must be the ``kept`` one; every place is
    contiguous and as long.
    """
    assert all(place.nbytes == n_bytes and place.flags.c_contiguous for place in places)
    addresses = np.array([place.ctypes.data for place in places], dtype=np.uintp)
    crcs = np.frombuffer(b"".join(kept), dtype="<u4")
    assert len(names) == len(addresses) == len(crcs)
    answers = _call("cmdgpu_read_checked", directory, names, n_bytes, places=addresses, kept=crcs)
    return np.flatnonzero(answers).tolist()


def read_tails(directory: str, names: Sequence[str], n_bytes: int) -> list[bytes] | None:
    """The CRC every file carries, or None when one of them is not a file of that size."""
    tails = np.zeros(len(names), dtype="<u4")
    if _call("cmdgpu_read_tails", directory, names, n_bytes, tails=tails).any():
        return None
    return [tail.tobytes() for tail in tails]


def joined(names: Sequence[str]) -> bytes:
    """One name after the other, each with its NUL."""
    return b"".join(name.encode() + b"\0" for name in names)


def _call(
    function: str, directory: str, names: Sequence[str], n_bytes: int, **arrays: NDArray[Any]
) -> NDArray[np.int64]:
    answers = np.ones(len(names), dtype=np.int64)
    addresses = {name: array.ctypes.data for name, array in arrays.items()}
    arguments = Files(
        directory=os.fsencode(directory),
        names=joined(names),
        files=len(names),
        bytes=n_bytes,
        answers=answers.ctypes.data,
        **addresses,
    )
    getattr(_library(), function)(ctypes.byref(arguments))
    return answers
