"""Look at many chunk files as fast as the disk gives them, in order, in the memory of a few small buffers."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from cmdgpu.store import remote
from cmdgpu.store.ahead import in_order
from cmdgpu.store.chunks import PIECE, ChunkDamage, check_chunk, read_chunk, stored_crc
from cmdgpu.store.places import Place, RemotePath

_READERS: Final = 8
"""Chunks in flight: a cold disk answers many questions at once faster than one after the other."""


@dataclass(frozen=True)
class ChunkFile:
    path: Place
    n_bytes: int
    """Bytes of its elements; where it is not compressed, its CRC follows them."""
    compressed: bool = False


def scan(files: Iterable[ChunkFile], *, quick: bool) -> Iterator[bytes | ChunkDamage]:
    """For every file the CRC it carries, or what is wrong with it.

    quick looks at presence, type and size only; otherwise every byte is read and must have that CRC, and a
    compressed chunk must decompress, in memory for the whole of it.
    """
    own = threading.local()

    def look(file: ChunkFile) -> bytes | ChunkDamage:
        try:
            if quick:
                return stored_crc(file.path, file.n_bytes, compressed=file.compressed)
            if file.compressed:
                return read_chunk(file.path, np.empty(file.n_bytes, dtype=np.uint8), compressed=True)
            if not hasattr(own, "buffer"):
                own.buffer = np.empty(PIECE, dtype=np.uint8)
            return check_chunk(file.path, file.n_bytes, own.buffer)
        except ChunkDamage as damage:
            return damage

    left = iter(files)
    first = next(left, None)
    if first is None:
        return
    readers = remote.READS_IN_FLIGHT if isinstance(first.path, RemotePath) else _READERS
    yield from in_order(look, itertools.chain([first], left), readers)
