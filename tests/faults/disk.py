"""The system calls of ``cmdgpu.store.durable``, watched and made to fail.

A ``Disk`` stands in for the ``os`` module of ``durable`` (and for the few ``Path`` methods the store calls).
It notes every call with the path it is about, and can fail the k-th one, or let the process *die* there: from
then on no call does anything any more, clean-up code included.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import pytest

Fault: TypeAlias = Literal["disk", "killed"]
"""The disk refuses (ENOSPC where space is asked for, EIO elsewhere), or the process ends."""
FAULTS: tuple[Fault, ...] = get_args(Fault)


class Died(BaseException):
    """The process ended here."""


@dataclass(frozen=True)
class Call:
    name: str
    path: Path
    to: Path | None = None
    """Where a rename leads."""

    @property
    def is_partial(self) -> bool:
        return any(part.endswith(".partial") for part in self.path.parts)


@dataclass
class Disk:
    """``fail_at`` counts watched calls from 1; 0 only watches."""

    fail_at: int = 0
    fault: Fault = "killed"
    calls: list[Call] = field(default_factory=list[Call])
    fired: bool = False
    _dead: bool = False
    _paths: dict[int, Path] = field(default_factory=dict[int, Path])
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    @contextlib.contextmanager
    def in_place(self) -> Generator[Disk]:
        """Between store and system for the length of a ``with``."""
        unlink, mkdir, move, rmtree = Path.unlink, Path.mkdir, Path.rename, shutil.rmtree

        def watched_unlink(path: Path, missing_ok: bool = False) -> None:
            self._note(Call("unlink", path))
            unlink(path, missing_ok)

        def watched_mkdir(
            path: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False
        ) -> None:
            self._note(Call("mkdir", path))
            mkdir(path, mode, parents, exist_ok)

        def watched_rename(path: Path, target: Path) -> Path:
            self._note(Call("rename", path, Path(target)))
            return move(path, target)

        def watched_rmtree(path: Any, *args: Any, **options: Any) -> None:
            if not self._dead:
                rmtree(path, *args, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("cmdgpu.store.durable.os", self)
            patch.setattr(Path, "unlink", watched_unlink)
            patch.setattr(Path, "mkdir", watched_mkdir)
            patch.setattr(Path, "rename", watched_rename)
            patch.setattr(shutil, "rmtree", watched_rmtree)
            yield self

    def _note(self, call: Call) -> None:
        with self._lock:
            if self._dead:
                raise Died
            self.calls.append(call)
            if len(self.calls) != self.fail_at:
                return
            self.fired = True
            if self.fault == "killed":
                self._dead = True
                raise Died
        number = errno.ENOSPC if call.name in ("open", "write", "mkdir") else errno.EIO
        raise OSError(number, os.strerror(number), str(call.path))

    # ---- what durable calls -------------------------------------------------------------------------

    def open(self, path: Any, flags: int, mode: int = 0o777) -> int:
        self._note(Call("open", Path(path)))
        fd = os.open(path, flags, mode)
        self._paths[fd] = Path(path)
        return fd

    def write(self, fd: int, data: memoryview) -> int:
        """Writes short, as a disk may."""
        self._note(Call("write", self._paths[fd]))
        return os.write(fd, data[:512] if len(data) > 512 else data)

    def fsync(self, fd: int) -> None:
        """Only noted: what a flush does to the platter no test in a process can see."""
        self._note(Call("fsync", self._paths.get(fd, Path("?"))))

    def close(self, fd: int) -> None:
        path = self._paths.pop(fd, Path("?"))
        os.close(fd)
        self._note(Call("close", path))

    def rename(self, old: Any, new: Any) -> None:
        self._note(Call("rename", Path(old), Path(new)))
        os.rename(old, new)  # noqa: PTH104  Path.rename is watched too


def every_fault(fault: Fault, least: int = 20) -> Iterator[Disk]:
    """One disk after the other, failing at call 1, 2, ... until the work gets through without meeting it."""
    for k in range(1, 10_000):
        disk = Disk(k, fault)
        yield disk
        if not disk.fired:
            assert k > least, "hardly any call was watched: the harness no longer sees the disk"
            return
    raise AssertionError("the work never got through")
