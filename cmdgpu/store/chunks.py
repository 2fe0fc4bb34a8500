"""Chunk files: the one writer and the one checked reader.

A chunk is ``bytes + crc32c``: its elements, then four bytes of CRC. It is read whole, into the place where
it will be used, and its CRC is computed over what arrived; a missing, short, long or foreign file is damage
and never a fill value. A compressed chunk is ``bytes + zstd + crc32c``: a frame, then the CRC of the frame,
so that damage is found before anything is decompressed, straight into that place. What is damage to *whom*
(which tensor, which step) the caller knows.

An object of a server is a chunk like a file: the size that comes with an answer is compared before memory is
taken, and what arrives is counted besides. That the server does not answer is no damage, but RemoteFailed.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from crc32c import crc32c as checksum

from cmdgpu.notation import U8, AnyArray
from cmdgpu.store import durable, zstd
from cmdgpu.store.durable import bytes_of
from cmdgpu.store.format import CRC_BYTES
from cmdgpu.store.places import Place, RemotePath
from cmdgpu.store.remote import Absent


class ChunkDamage(Exception):
    """What is wrong with one chunk file, in words that follow its name."""


def crc32c(values: AnyArray, zstd_level: int | None = None) -> bytes:
    """The four bytes at the end of the chunk file that holds ``values`` (contiguous)."""
    return _crc(_payload(values, zstd_level))


def write_chunk(directory: Place, name: str, values: AnyArray, zstd_level: int | None = None) -> bytes:
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
    problem = _size_problem(status.st_size, n_bytes, compressed)
    if not stat.S_ISREG(status.st_mode):
        problem = "is no regular file"
    if problem is not None:
        os.close(fd)
        raise ChunkDamage(problem)
    return fd, status.st_size - CRC_BYTES


def _most_bytes(n_bytes: int, compressed: bool) -> int:
    """Of a chunk with its CRC."""
    return CRC_BYTES + (zstd.bound(n_bytes) if compressed else n_bytes)


def _size_problem(size: int, n_bytes: int, compressed: bool) -> str | None:
    most = _most_bytes(n_bytes, compressed)
    if compressed and not CRC_BYTES < size <= most:
        return f"holds {size} bytes, and {n_bytes} compressed are {most} at most"
    if not compressed and size != most:
        return f"holds {size} bytes instead of {most}"
    return None


def announce(path: Place) -> None:
    """Let the kernel fetch a file that is about to be read whole. What is wrong with it, its reader tells."""
    if isinstance(path, RemotePath) or sys.platform != "linux":
        return
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(fd)


def stored_size(path: Place) -> int:
    """Bytes of a chunk file; 0 where there is none."""
    if isinstance(path, RemotePath):
        return path.client.size(path.key) or 0
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def stored_crc(path: Place, n_bytes: int, *, compressed: bool = False) -> bytes:
    """The CRC a chunk file carries, after a look at its type and size; the elements are not read."""
    if isinstance(path, RemotePath):
        return _tail_of_object(path, n_bytes, compressed)
    fd, length = _open(path, n_bytes, compressed)
    try:
        return os.pread(fd, CRC_BYTES, length)
    except OSError as error:
        raise ChunkDamage(f"cannot be read: {error.strerror}") from error
    finally:
        os.close(fd)


def read_chunk(path: Place, out: AnyArray, kept: bytes | None = None, *, compressed: bool = False) -> bytes:
    """Read a whole chunk into ``out`` (contiguous, exactly one chunk long) and return its CRC.

    ``kept`` is the CRC a digest vouches for; the chunk must carry that one, and what is stored must have it.
    Raises ChunkDamage; ``out`` then holds nothing to rely on.
    """
    if isinstance(path, RemotePath):
        view, carried = _read_object(path, out, compressed)
    else:
        view, carried = _read_file(path, out, compressed)
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


def _read_file(path: Path, out: AnyArray, compressed: bool) -> tuple[memoryview, bytes]:
    """What stands before the CRC, in ``out`` itself where it is not compressed, and the CRC it carries."""
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
    return view, bytes(tail)


PIECE = 1 << 20
"""Bytes a check reads at a time: still in the cache when their CRC is taken."""


def check_chunk(path: Place, n_bytes: int, buffer: U8) -> bytes:
    """The CRC a chunk of ``n_bytes`` carries, after every byte of it was read and found to have it.

    Not for compressed ones. Reads through ``buffer`` in pieces, so that memory does not grow with the chunk.
    Raises ChunkDamage.
    """
    if isinstance(path, RemotePath):
        return _check_object(path, n_bytes)
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


# ---- objects --------------------------------------------------------------------------------------------


def _get(path: RemotePath, n_bytes: int, compressed: bool) -> tuple[int, Iterator[bytes]]:
    """How many bytes stand before the CRC, and all of them with it, in pieces."""
    try:
        size, pieces = path.client.get(path.key, _most_bytes(n_bytes, compressed))
    except Absent as error:
        raise ChunkDamage("is missing") from error
    if problem := _size_problem(size, n_bytes, compressed):
        raise ChunkDamage(problem)
    return size - CRC_BYTES, pieces


def _read_object(path: RemotePath, out: AnyArray, compressed: bool) -> tuple[memoryview, bytes]:
    """``_read_file`` of an object: every piece goes to its place as it comes."""
    n_bytes, pieces = _get(path, out.nbytes, compressed)
    values = np.empty(n_bytes, dtype=np.uint8) if compressed else np.frombuffer(bytes_of(out), np.uint8)
    tail = bytearray()
    done = 0
    for piece in pieces:
        arrived = np.frombuffer(piece, np.uint8)
        here = arrived[: n_bytes - done]
        values[done : done + len(here)] = here
        tail += arrived[len(here) :][: CRC_BYTES + 1].tobytes()
        done += len(piece)
        if done > n_bytes + CRC_BYTES:
            break
    if done != n_bytes + CRC_BYTES:
        raise ChunkDamage(f"arrived as {done} bytes, the server told of {n_bytes + CRC_BYTES}")
    return bytes_of(values), bytes(tail)


def _check_object(path: RemotePath, n_bytes: int) -> bytes:
    """``check_chunk`` of an object, in the memory of a piece."""
    _, pieces = _get(path, n_bytes, False)
    crc = done = 0
    tail = b""
    for piece in pieces:
        here = memoryview(piece)[: max(n_bytes - done, 0)]
        crc = checksum(here, crc)
        tail += piece[len(here) :][: CRC_BYTES + 1]
        done += len(piece)
        if done > n_bytes + CRC_BYTES:
            break
    if done != n_bytes + CRC_BYTES:
        raise ChunkDamage(f"arrived as {done} bytes, the server told of {n_bytes + CRC_BYTES}")
    if tail != crc.to_bytes(CRC_BYTES, "little"):
        raise ChunkDamage("crc32c mismatch")
    return tail


def _tail_of_object(path: RemotePath, n_bytes: int, compressed: bool) -> bytes:
    """``stored_crc`` of an object: one request for four bytes, whose answer tells the size."""
    expected = None if compressed else _most_bytes(n_bytes, compressed)
    try:
        size, tail = path.client.tail(path.key, CRC_BYTES, expected)
    except Absent as error:
        raise ChunkDamage("is missing") from error
    if problem := _size_problem(size, n_bytes, compressed):
        raise ChunkDamage(problem)
    return tail
