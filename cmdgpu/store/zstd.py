"""A chunk as one zstd frame, and what such a frame may be before a byte of it is decompressed.

A frame says in its header how long its content is. Only one that says exactly what the chunk's place holds is
decompressed, into that place and not beyond it: a file of a few kilobytes can then never ask for a gigabyte.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any, Final

from cmdgpu.notation import AnyArray
from cmdgpu.store.durable import bytes_of

LEVEL: Final = 1
"""Of new stores: noisy weights give every level up to 12 the same size, and this one is the fastest."""
LEVELS: Final = range(1, 20)
"""A store keeps the level it was made with; from 20 on compressing takes hundreds of megabytes."""
MAX_CHUNK_BYTES: Final = 16 << 20
"""Of elements: the size of a compressed file vouches for nothing, and several are read at a time."""
DECODER_BYTES: Final = 256 << 10
"""Memory of a call beside the frame and its content."""

_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_MOST_HEADER: Final = 14
_SINGLE_SEGMENT: Final = 0x20
_FOREIGN: Final = 0x0F
"""Bits of a descriptor that our chain leaves at zero: a checksum, a dictionary, what is reserved."""
_BLOCK_HEADER: Final = 3
_RLE, _RESERVED = 1, 3
_BYTES_PER_BLOCK: Final = 256
"""Blocks of a frame are looked at one by one; libzstd makes none as small as this, but for the last."""


class BadFrame(Exception):
    """What is wrong with a frame, in words that follow the name of its file."""


def bound(n_bytes: int) -> int:
    """The longest frame that libzstd makes of so many bytes (ZSTD_compressBound)."""
    small = ((128 << 10) - n_bytes) >> 11 if n_bytes < 128 << 10 else 0
    return n_bytes + (n_bytes >> 8) + small


def compress(values: AnyArray, level: int) -> bytes:
    """The elements of a contiguous array as one frame. Other threads run meanwhile."""
    return _codec().compress(bytes_of(values), level)


def decompress(frame: memoryview, out: AnyArray) -> None:
    """Fill ``out`` (contiguous) with the content of a frame that holds exactly that. Raises BadFrame.

    Takes ``DECODER_BYTES`` of memory, whatever the frame says. Other threads run meanwhile.
    """
    _check(frame, out.nbytes)
    if not out.nbytes:  # what numcodecs takes for an error
        return
    try:
        _codec().decompress(frame, bytes_of(out))
    except (RuntimeError, ValueError) as error:
        raise BadFrame(f"cannot be decompressed: {error}") from error


def _check(frame: memoryview, n_bytes: int) -> None:
    """One frame, of that content, and nothing behind it: libzstd passes over empty and skippable frames."""
    at = _content(frame, n_bytes)
    for _ in range(n_bytes // _BYTES_PER_BLOCK + 2):
        header = int.from_bytes(frame[at : at + _BLOCK_HEADER], "little")
        is_last, kind, size = header & 1, header >> 1 & 3, header >> 3
        at += _BLOCK_HEADER + (1 if kind == _RLE else size)
        if kind == _RESERVED or at > len(frame):
            raise BadFrame("holds a zstd frame that is cut or damaged")
        if is_last:
            break
    else:
        raise BadFrame(f"holds a zstd frame of too many blocks for {n_bytes} bytes")
    if at != len(frame):
        raise BadFrame(f"holds {len(frame) - at} bytes behind its zstd frame")


def _content(frame: memoryview, n_bytes: int) -> int:
    """Where the blocks begin, once the header was found to declare ``n_bytes`` of content."""
    if len(frame) < _MOST_HEADER:
        frame = memoryview(bytes(frame).ljust(_MOST_HEADER, b"\0"))
    if bytes(frame[:4]) != _MAGIC:
        raise BadFrame("is no zstd frame")
    descriptor = frame[4]
    if descriptor & _FOREIGN:
        raise BadFrame("holds a zstd frame with a checksum or a dictionary, which no chunk has")
    is_single, width = bool(descriptor & _SINGLE_SEGMENT), (0, 2, 4, 8)[descriptor >> 6]
    width = width or int(is_single)
    if not width:
        raise BadFrame("holds a zstd frame that declares no size")
    at = 5 if is_single else 6  # otherwise the size of the window comes first
    declared = int.from_bytes(frame[at : at + width], "little") + (256 if width == 2 else 0)
    if declared != n_bytes:
        raise BadFrame(f"holds a zstd frame of {declared} bytes instead of {n_bytes}")
    return at + width


@functools.cache
def _codec() -> Any:
    """numcodecs' binding, which has no types; stores that are not compressed never load it."""
    return importlib.import_module("numcodecs.zstd")
