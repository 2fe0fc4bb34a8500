"""Chunk files: the one writer and the one checked reader.

A chunk is ``bytes + crc32c``: its elements, then four bytes of CRC. It is read whole, into the place where
it will be used, and its CRC is computed over what arrived; a missing, short, long or foreign file is damage
and never a fill value. A compressed chunk is ``bytes + zstd + crc32c``: a frame, then the CRC of the frame,
so that damage is found before anything is decompressed, straight into that place. What is damage to *whom*
(which tensor, which step) the caller knows.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
from crc32c import crc32c as checksum

from cmdgpu.notation import U8, AnyArray
from cmdgpu.store import durable, zstd
from cmdgpu.store.durable import bytes_of
from cmdgpu.store.format import CRC_BYTES


class ChunkDamage(Exception):
    """What is wrong with one chunk file, in words that follow its name."""


def crc32c(values: AnyArray, zstd_level: int | None = None) -> bytes:
    """The four bytes at the end of the chunk file that holds ``values`` (contiguous)."""
    return _crc(_payload(values, zstd_level))


def write_chunk(directory: Path, name: str, values: AnyArray, zstd_level: int | None = None) -> bytes:
    """Put a chunk down and return its CRC; the directory is not flushed (see ``durable.write_file``)."""
    payload = _payload(np.ascontiguousarray(values), zstd_level)
    crc = _crc(payload)
    durable.write_file(directory, name, [payload, crc])
    return crc


def _payload(values: AnyArray, zstd_level: int | None) -> bytes | memoryview:
    """What stands before the CRC."""
    return bytes_of(values) if zstd_level is None else zstd.compress(values, zstd_level)


def _crc(payload: bytes | memoryview) -> bytes:
    return checksum(payload).to_bytes(CRC_BYTES, "little")


def _open(path: Path, n_bytes: int, compressed: bool) -> tuple[int, int]:
    """A descriptor of the file and how many bytes stand before its CRC."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(path, flags)
    except FileNotFoundError as error:
        raise ChunkDamage("is missing") from error
    except OSError as error:
        raise ChunkDamage(f"cannot be opened: {error.strerror}") from error
    status = os.fstat(fd)
    size, most = status.st_size, CRC_BYTES + (zstd.bound(n_bytes) if compressed else n_bytes)
    problem = None
    if not stat.S_ISREG(status.st_mode):
        problem = "is no regular file"
    elif compressed and not CRC_BYTES < size <= most:
        problem = f"holds {size} bytes, and {n_bytes} compressed are {most} at most"
    elif not compressed and size != most:
        problem = f"holds {size} bytes instead of {most}"
    if problem is not None:
        os.close(fd)
        raise ChunkDamage(problem)
    return fd, size - CRC_BYTES


def stored_size(path: Path) -> int:
    """Bytes of a chunk file; 0 where there is none."""
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def stored_crc(path: Path, n_bytes: int, *, compressed: bool = False) -> bytes:
    """The CRC a chunk file carries, after a look at its type and size; the elements are not read."""
    fd, length = _open(path, n_bytes, compressed)
    try:
        return os.pread(fd, CRC_BYTES, length)
    except OSError as error:
        raise ChunkDamage(f"cannot be read: {error.strerror}") from error
    finally:
        os.close(fd)


def read_chunk(path: Path, out: AnyArray, kept: bytes | None = None, *, compressed: bool = False) -> bytes:
    """Read a whole chunk into ``out`` (contiguous, exactly one chunk long) and return its CRC.

    ``kept`` is the CRC a digest vouches for; the chunk must carry that one, and what is stored must have it.
    Raises ChunkDamage; ``out`` then holds nothing to rely on.
    """
    fd, n_bytes = _open(path, out.nbytes, compressed)
    try:
        tail = bytearray(CRC_BYTES)
        view = bytes_of(np.empty(n_bytes, dtype=np.uint8) if compressed else out)
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
    if _crc(view) != carried:
        raise ChunkDamage("crc32c mismatch")
    if compressed:
        try:
            zstd.decompress(view, out)
        except zstd.BadFrame as error:
            raise ChunkDamage(str(error)) from error
    return carried


PIECE = 1 << 20
"""Bytes a check reads at a time: still in the cache when their CRC is taken."""


def check_chunk(path: Path, n_bytes: int, buffer: U8) -> bytes:
    """The CRC a chunk of ``n_bytes`` carries, after every byte of it was read and found to have it.

    Not for compressed ones. Reads through ``buffer`` in pieces, so that memory does not grow with the chunk.
    Raises ChunkDamage.
    """
    fd, _ = _open(path, n_bytes, False)
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
