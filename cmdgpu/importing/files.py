"""Bytes of files that others wrote: regular files only, that stay what they were when they were first seen.

A file is opened anew for every read. That costs microseconds, holds no descriptor (a folder may have
thousands of shards), and a trainer that puts another file in its place, or cuts it, is noticed instead of
believed.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Generator
from pathlib import Path

from cmdgpu.errors import CheckpointError, printable
from cmdgpu.store import durable

_READ_BYTES = 1 << 30
"""Of one system call: Linux moves less than 2 GiB at once."""


class Source:
    """A regular file. Raises CheckpointError for what cannot be opened, and for FIFOs, devices, folders.

    ``path`` may be a symbolic link where a person named it; a name out of a file goes through ``inside``.
    """

    def __init__(self, path: Path, *, follow: bool = True) -> None:
        self.path = path
        self._flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
        self._seen: tuple[int, ...] = ()
        with self._open() as fd:
            status = os.fstat(fd)
        self.size = status.st_size
        self._seen = _identity(status)

    @contextlib.contextmanager
    def _open(self) -> Generator[int]:
        try:
            fd = os.open(self.path, self._flags)
        except OSError as error:
            raise CheckpointError(f"cannot be opened: {durable.reason_of(error)}", file=self.path) from error
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError("is no regular file", file=self.path)
            if self._seen and _identity(status) != self._seen:
                raise CheckpointError(
                    "changed while it was being read",
                    file=self.path,
                    hint="wait until nobody writes it, then run the same command again",
                )
            yield fd
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def reading(self) -> Generator[Callable[[int, int], bytes]]:
        """A function (start, size) -> bytes for many small reads in a row."""
        with self._open() as fd:

            def read(start: int, size: int) -> bytes:
                self._within(start, size)
                raw = bytearray(size)
                self._fill(fd, start, memoryview(raw))
                return bytes(raw)

            yield read

    def read(self, start: int, size: int) -> bytes:
        """Exactly these bytes. Nothing is allocated for bytes that the file does not have."""
        with self.reading() as read:
            return read(start, size)

    def read_into(self, start: int, out: memoryview) -> None:
        """Exactly as many bytes as ``out`` holds."""
        self._within(start, len(out))
        with self._open() as fd:
            self._fill(fd, start, out)

    @contextlib.contextmanager
    def descriptor(self) -> Generator[int]:
        """For what maps the file."""
        with self._open() as fd:
            yield fd

    def _within(self, start: int, size: int) -> None:
        if start < 0 or size < 0 or start + size > self.size:
            raise CheckpointError(
                f"bytes {start} to {start + size} are wanted and it holds {self.size}: cut short?",
                file=self.path,
            )

    def _fill(self, fd: int, start: int, out: memoryview) -> None:
        while out:
            try:
                got = os.preadv(fd, [out[:_READ_BYTES]], start)
            except OSError as error:
                found = f"cannot be read: {durable.reason_of(error)}"
                raise CheckpointError(found, file=self.path) from error
            if got == 0:
                raise CheckpointError(f"ends at byte {start}, earlier than it did", file=self.path)
            out, start = out[got:], start + got


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def inside(folder: Path, name: str) -> Source:
    """The file of that name in a folder, where the name is data from a file.

    It must be a bare name. A symbolic link is followed where it ends in the folder itself, or, in a cache of
    the Hugging Face hub (``…/snapshots/<revision>``), in the ``blobs`` that all its snapshots link to;
    anywhere else it could make us read what is not ours. Raises CheckpointError.
    """
    if not is_bare(name):
        raise CheckpointError(f"names a file {printable(name)!r}, which is no bare file name", file=folder)
    path = folder / name
    if not path.is_symlink():
        return Source(path, follow=False)
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointError("is a symbolic link that leads nowhere", file=path) from error
    if target.parent not in allowed:
        raise CheckpointError(
            "is a symbolic link out of the folder", file=path, hint="copy the file itself there"
        )
    return Source(target, follow=False)


def is_bare(name: str) -> bool:
    """One component of a path that means nothing but itself."""
    return (
        name not in ("", ".", "..")
        and not any(c in name for c in "/\\\0")
        and name.isprintable()
        and len(name.encode(errors="replace")) <= 255
    )
