"""What the machine can do at best, measured beside what is judged by it: memory, copies, files, checksums.

A ceiling is the fastest of several ways to do the same, so that none is low by accident.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from crc32c import crc32c

from benchmarks.cases import F32

Work: TypeAlias = Callable[[], int]
"""Does its work and says how many bytes it moved."""

CRC_BYTES = 4
"""What ends a chunk file: the crc32c of its elements."""
_PIECE = 1 << 20
_COPY_BYTES = 1 << 29


@dataclass(frozen=True)
class Ceiling:
    """Ways to reach one limit."""

    name: str
    ways: Mapping[str, Work]


def in_threads(works: Sequence[Callable[[], object]]) -> None:
    """All at once, a thread each; the first error is raised."""
    with ThreadPoolExecutor(len(works)) as pool:
        for done in [pool.submit(work) for work in works]:
            done.result()


# ---- memory ---------------------------------------------------------------------------------------------


def read_memory(values: F32, threads: int) -> Ceiling:
    """Every element read once by something that writes nothing: sums and a product, whole and in pieces."""
    tensor = torch.as_tensor(values)

    def whole(reduce: Callable[[], object]) -> Work:
        def run() -> int:
            reduce()
            return values.nbytes

        return run

    def pieces(n_bytes: int, reduce: Callable[[F32], object]) -> Work:
        def run() -> int:
            def part(own: F32) -> None:
                for start in range(0, len(own), n_bytes // 4):
                    reduce(own[start : start + n_bytes // 4])

            in_threads([lambda own=own: part(own) for own in np.array_split(values, threads)])
            return values.nbytes

        return run

    ways: dict[str, Work] = {
        "torch sum": whole(tensor.sum),
        "numpy sum": whole(values.sum),
        "threads, sums of 1 MiB": pieces(1 << 20, lambda own: own.sum()),
        "threads, sums of 16 MiB": pieces(1 << 24, lambda own: own.sum()),
        # below the size at which BLAS takes threads of its own
        "threads, products of 32 KiB": pieces(1 << 15, lambda own: np.dot(own, own)),
        "threads, maxima of 1 MiB": pieces(1 << 20, lambda own: own.max()),
    }
    return Ceiling("read memory", ways)


def copy_memory(values: F32, threads: int) -> Ceiling:
    """Bytes read and bytes written both count."""
    source = values[: _COPY_BYTES // 4]
    target = np.empty_like(source)

    def by_threads() -> int:
        parts = zip(np.array_split(target, threads), np.array_split(source, threads), strict=True)
        in_threads([lambda to=to, own=own: np.copyto(to, own) for to, own in parts])
        return 2 * source.nbytes

    def by_torch() -> int:
        torch.as_tensor(target).copy_(torch.as_tensor(source))
        return 2 * source.nbytes

    return Ceiling("copy memory", {"threads": by_threads, "torch": by_torch})


# ---- chunk files ----------------------------------------------------------------------------------------


def read_files(files: Sequence[Path], threads: int, *, crc: bool, piece: int = _PIECE) -> int:
    """``readinto`` of every file by several threads, each into one buffer that stays in its cache."""
    rest, lock, total = iter(files), threading.Lock(), [0] * threads

    def draw() -> Iterator[Path]:
        while True:
            with lock:
                file = next(rest, None)
            if file is None:
                return
            yield file

    def work(me: int) -> None:
        buffer = bytearray(piece)
        view = memoryview(buffer)
        for path in draw():
            total[me] += _read(path, view, crc)

    in_threads([lambda me=me: work(me) for me in range(threads)])
    return sum(total)


def _read(path: Path, view: memoryview, crc: bool) -> int:
    found, size = 0, path.stat().st_size
    left = size - CRC_BYTES
    with path.open("rb", buffering=0) as file:
        while left:
            got = file.readinto(view[: min(left, len(view))])
            if not got:
                raise OSError(f"{path.name} ends early")
            if crc:
                found = crc32c(view[:got], found)
            left -= got
        if crc and file.read(CRC_BYTES) != found.to_bytes(CRC_BYTES, "little"):
            raise OSError(f"{path.name} is damaged")
    return size


def drop_from_cache(files: Sequence[Path]) -> None:
    """The next read comes from the disk: pages are written first, because dirty ones stay."""
    os.sync()
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def decode(payloads: Sequence[bytes], threads: int) -> int:
    """zstd payloads from memory; the bytes that come out count."""
    zstd: Any = importlib.import_module("numcodecs.zstd")
    total = [0] * threads

    def work(me: int) -> None:
        codec = zstd.Zstd()
        for payload in payloads[me::threads]:
            total[me] += len(codec.decode(payload))

    in_threads([lambda me=me: work(me) for me in range(threads)])
    return sum(total)
