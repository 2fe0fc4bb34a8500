"""A file streamed through once, its own checksums compared on the way."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

from cmdgpu.errors import CheckpointError, printable
from cmdgpu.importing.contract import Checksum


class Check:
    """Takes the bytes of a file in order, in blocks of any size."""

    def __init__(self, path: Path, checksums: Sequence[Checksum]) -> None:
        self._path = path
        self._left = list(reversed(checksums))
        self._position = 0
        self._crc = 0

    def update(self, block: bytes | bytearray | memoryview) -> None:
        """Raises CheckpointError naming the first record whose bytes are not what was written."""
        view = memoryview(block).cast("B")
        end = self._position + len(view)
        while self._left and (self._left[-1].start < end or self._left[-1].stop <= end):
            record = self._left[-1]
            begin = max(record.start, self._position)
            stop = min(record.stop, end)
            self._crc = zlib.crc32(
                view[begin - self._position : max(stop, begin) - self._position], self._crc
            )
            if record.stop > end:
                break
            self._left.pop()
            if self._crc != record.crc32:
                raise _damaged(self._path, f"{printable(record.name)!r} does not match its checksum")
            self._crc = 0
        self._position = end

    def finish(self) -> None:
        """The file has ended. Raises CheckpointError where it ended too early."""
        if self._left:
            raise _damaged(self._path, f"ends before {printable(self._left[-1].name)!r} does")


def _damaged(path: Path, found: str) -> CheckpointError:
    return CheckpointError(f"is damaged: {found}", file=path, hint="copy it again from where it was written")
