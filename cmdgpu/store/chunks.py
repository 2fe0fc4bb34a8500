"""Chunk files: the one writer and the one checked reader.

A chunk is ``bytes + crc32c``: its elements, then four bytes of CRC. It is read whole, into the place where
it will be used, and its CRC is computed over what arrived; a missing, short, long or foreign file is damage
and never a fill value. What is damage to *whom* (which tensor, which step) the caller knows.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
from crc32c import crc32c as checksum

from cmdgpu.notation import U8, AnyArray
from cmdgpu.store import durable
from cmdgpu.store.durable import bytes_of
from cmdgpu.store.format import CRC_BYTES


class ChunkDamage(Exception):
    """What is wrong with one chunk file, in words that follow its name."""


def crc32c(values: AnyArray) -> bytes:
    """The four bytes that follow ``values`` in a chunk file. ``values`` is contiguous."""
    return checksum(bytes_of(values)).to_bytes(CRC_BYTES, "little")


def write_chunk(directory: Path, name: str, values: AnyArray) -> bytes:
    """Put a chunk down and return its CRC; the directory is not flushed (see ``durable.write_file``)."""
    values = np.ascontiguousarray(values)
    crc = crc32c(values)
    durable.write_file(directory, name, [bytes_of(values), crc])
    return crc


def _open(path: Path, n_bytes: int) -> int:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(path, flags)
    except FileNotFoundError as error:
        raise ChunkDamage("is missing") from error
    except OSError as error:
        raise ChunkDamage(f"cannot be opened: {error.strerror}") from error
    status = os.fstat(fd)
    problem = None
    if not stat.S_ISREG(status.st_mode):
        problem = "is no regular file"
    elif status.st_size != n_bytes + CRC_BYTES:
        problem = f"holds {status.st_size} bytes instead of {n_bytes + CRC_BYTES}"
    if problem is not None:
        os.close(fd)
        raise ChunkDamage(problem)
    return fd


def stored_crc(path: Path, n_bytes: int) -> bytes:
    """The CRC a chunk file carries, after a look at its type and size; the elements are not read."""
    fd = _open(path, n_bytes)
    try:
        return os.pread(fd, CRC_BYTES, n_bytes)
    except OSError as error:
        raise ChunkDamage(f"cannot be read: {error.strerror}") from error
    finally:
        os.close(fd)


def read_chunk(path: Path, out: AnyArray, kept: bytes | None = None) -> bytes:
    """Read a whole chunk into ``out`` (contiguous, exactly one chunk long) and return its CRC.

    ``kept`` is the CRC a digest vouches for; the chunk must carry that one, and its elements must have it.
    Raises ChunkDamage; ``out`` then holds nothing to rely on.
    """
    n_bytes = out.nbytes
    fd = _open(path, n_bytes)
    try:
        tail = bytearray(CRC_BYTES)
        view = bytes_of(out)
        done = os.preadv(fd, [view, tail], 0)
        while done < n_bytes + CRC_BYTES:
            rest = [view[done:], tail] if done < n_bytes else [memoryview(tail)[done - n_bytes :]]
            more = os.preadv(fd, rest, done)
            if more == 0:
                raise ChunkDamage("shrank while it was read")
            done += more
    except OSError as error:
        raise ChunkDamage(f"cannot be read: {error.strerror}") from error
    finally:
        os.close(fd)
    carried = bytes(tail)
    if kept is not None and carried != kept:
        raise ChunkDamage("is not the chunk that was committed (its CRC is another)")
    if crc32c(out) != carried:
        raise ChunkDamage("crc32c mismatch")
    return carried


PIECE = 1 << 20
"""Bytes a check reads at a time: still in the cache when their CRC is taken."""


def check_chunk(path: Path, n_bytes: int, buffer: U8) -> bytes:
    """The CRC a chunk of ``n_bytes`` carries, after every byte of it was read and found to have it.

    Reads through ``buffer`` in pieces, so that memory does not grow with the chunk. Raises ChunkDamage.
    """
    fd = _open(path, n_bytes)
    try:
        crc = done = 0
        while done < n_bytes:
            got = os.preadv(fd, [bytes_of(buffer[: n_bytes - done])], done)
            if got == 0:
                raise ChunkDamage("shrank while it was read")
            crc = checksum(bytes_of(buffer[:got]), crc)
            done += got
        carried = os.pread(fd, CRC_BYTES, n_bytes)
    except OSError as error:
        raise ChunkDamage(f"cannot be read: {error.strerror}") from error
    finally:
        os.close(fd)
    if carried != crc.to_bytes(CRC_BYTES, "little"):
        raise ChunkDamage("crc32c mismatch")
    return carried
