"""SHA-256 of the files of many checkpoints, in their order, just ahead of those who read tensors of them.

A hash reads its file from end to end, which is how a disk reads best; the tensors are then in the page cache.
It is held back so that it never runs further ahead than the cache surely keeps.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Final

from cmdgpu.errors import CheckpointError
from cmdgpu.importing.checksums import Check
from cmdgpu.importing.contract import Checkpoint
from cmdgpu.importing.files import Source
from cmdgpu.importing.headers import PlannedFile, identity
from cmdgpu.importing.planning import HASH_BLOCK, PlannedCheckpoint, hashers
from cmdgpu.store import durable
from cmdgpu.store.provenance import Origin, SourceFile

_AHEAD: Final = 512 << 20
"""Bytes hashed beyond those whose tensors have been read."""


class _Stopped(Exception):
    """Nobody wants the digest any more."""


class Hasher:
    """Digests of the checkpoints that are announced, in that order; a context manager."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(hashers(), thread_name_prefix="cmdgpu-hash")
        self._own = threading.local()
        self._moved = threading.Condition()
        self._announced = 0
        self._read = 0
        self._stopped = False

    def announce(self, planned: PlannedCheckpoint, checkpoint: Checkpoint) -> Digests:
        """Begin with the files of a checkpoint as soon as those before it are done."""
        start = self._announced
        futures: list[Future[SourceFile]] = []
        for file in planned.files:
            check = Check(file.path, checkpoint.checksums.get(file.path, ()))
            futures.append(self._pool.submit(self._hash, file, check, self._announced))
            self._announced += file.size
        return Digests(self, planned, start, futures)

    def has_read(self, position: int) -> None:
        """Tensors up to there, in bytes of all files that were announced, are behind us."""
        with self._moved:
            self._read = max(self._read, position)
            self._moved.notify_all()

    def _wait_until_near(self, position: int) -> None:
        with self._moved:
            self._moved.wait_for(lambda: self._stopped or position <= self._read + _AHEAD)
            if self._stopped:
                raise _Stopped

    def _hash(self, file: PlannedFile, check: Check, start: int) -> SourceFile:
        if not hasattr(self._own, "block"):
            self._own.block = bytearray(HASH_BLOCK)
        block = memoryview(self._own.block)
        digest, done = hashlib.sha256(), 0
        with Source(file.path).descriptor() as fd:
            while got := _read(fd, block, file):
                digest.update(block[:got])
                check.update(block[:got])
                done += got
                self._wait_until_near(start + done)
        check.finish()
        require_unchanged(file)
        return SourceFile(file.name, done, digest.hexdigest())

    def __enter__(self) -> Hasher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._moved:
            self._stopped = True
            self._moved.notify_all()
        self._pool.shutdown(cancel_futures=True)


class Digests:
    """Of one checkpoint, under way."""

    def __init__(
        self,
        hasher: Hasher,
        planned: PlannedCheckpoint,
        start: int,
        files: Sequence[Future[SourceFile]],
    ) -> None:
        self._hasher = hasher
        self._planned = planned
        self._start = start
        self._files = files

    def has_read(self, share: float) -> None:
        """This part of the checkpoint's tensors is behind us."""
        self._hasher.has_read(self._start + int(share * self._planned.n_bytes))

    def origin(self) -> Origin:
        """Waits for the digests. Raises CheckpointError for a file that is damaged or has changed."""
        self.has_read(1.0)
        return Origin(tuple(file.result() for file in self._files), self._planned.named.digest)


def _read(fd: int, block: memoryview, file: PlannedFile) -> int:
    try:
        return os.readv(fd, [block])
    except OSError as error:
        raise CheckpointError(f"cannot be read: {durable.reason_of(error)}", file=file.path) from error


def require_unchanged(file: PlannedFile) -> None:
    """Raises CheckpointError for a file that is not the one whose header was planned with."""
    if identity(file.path) != file.identity:
        raise CheckpointError(
            "changed while it was imported",
            file=file.path,
            hint="wait until nobody writes it, then run the same command again",
        )
