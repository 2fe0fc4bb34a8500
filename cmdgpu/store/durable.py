"""The few system calls everything on disk rests on.

A file is put down whole or not at all: written under a random temporary name that planted files cannot
guess, flushed to the device, then renamed. The rename itself lasts once its directory is flushed; callers
order those flushes, because that order *is* the commit protocol (see ``journal``).

On an object store a put is all of that at once, and there is no directory to make or to flush.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import secrets
import shutil
import sys
import weakref
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any, Final, TypeAlias, cast, overload

import numpy as np

from cmdgpu.errors import CmdgpuError, DurabilityUnknown, StoreExists, StoreLocked, WriteFailed
from cmdgpu.notation import AnyArray
from cmdgpu.store.places import Place, RemotePath

if sys.platform != "win32":
    import fcntl

Buffer: TypeAlias = bytes | bytearray | memoryview

PARTIAL = ".partial"
"""Suffix of everything that is not finished; readers never look at such names."""

TRY_AGAIN = "free some space or fix the disk, then run the same command again"


def partial_name(name: str) -> str:
    """A temporary name beside ``name``: random, not a process id, because hosts share stores."""
    return f"{name}.{secrets.token_hex(8)}{PARTIAL}"


def bytes_of(values: AnyArray) -> memoryview:
    """The memory of a contiguous array, without a copy."""
    return memoryview(cast(Any, values)).cast("B")


@contextlib.contextmanager
def open_directory(path: Path) -> Generator[int]:
    """Descriptor of a directory; people keep theirs behind symbolic links."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def write_file(directory: Place, name: str, parts: Iterable[Buffer], *, cached: bool = True) -> None:
    """Put ``parts``, one after the other, into ``directory/name``: all bytes or the old file.

    Not ``cached``: whole pages go past the page cache where system and memory allow it, for files that
    nobody reads soon and that would push everything else out.

    The data are flushed before the rename, or a power cut could leave an empty file under the final
    name. The directory is *not* flushed here. Raises WriteFailed naming the file, or what ``parts`` raises;
    the temporary file is gone by then. RemoteFailed where it is no file.
    """
    if isinstance(directory, RemotePath):
        file = directory / name
        file.client.put(file.key, b"".join(parts))
        return
    temporary = directory / partial_name(name)
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            for part in parts:
                _write_all(fd, part if cached else _past_the_cache(fd, part))
            flush_file(fd)
        finally:
            os.close(fd)
        rename(temporary, directory / name)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        raise WriteFailed(
            f"cannot write: {reason_of(error)}", file=directory / name, hint=TRY_AGAIN
        ) from error


_DIRECT: Final = getattr(os, "O_DIRECT", 0)
_PAST_FROM: Final = 256 << 10
"""Bytes from which a write past the page cache pays."""


def _past_the_cache(fd: int, part: Buffer) -> memoryview:
    """Write the whole pages of ``part`` straight to the device; what is left to be written otherwise.

    Everything where it cannot be done: memory that begins inside a page, a filesystem that does not know it.
    """
    view = memoryview(part).cast("B")
    whole = len(view) // mmap.PAGESIZE * mmap.PAGESIZE
    if not _DIRECT or whole < _PAST_FROM or np.frombuffer(view, np.uint8).ctypes.data % mmap.PAGESIZE:
        return view
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, _DIRECT)
        whole = os.write(fd, view[:whole]) // mmap.PAGESIZE * mmap.PAGESIZE
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        whole = 0
    finally:
        fcntl.fcntl(fd, fcntl.F_SETFL, 0)
    os.lseek(fd, whole, os.SEEK_SET)
    return view[whole:]


def _write_all(fd: int, part: Buffer) -> None:
    """No view outlives the call: whoever makes the parts may use their memory for the next one."""
    view = memoryview(part).cast("B")
    while view:
        view = view[os.write(fd, view) :]


def reason_of(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return "the disk is full"
    if error.errno == errno.EDQUOT:
        return "the disk quota is used up"
    return error.strerror or str(error)


def flush_file(fd: int) -> None:
    """Hand the file's bytes to the device. On macOS only F_FULLFSYNC asks that of the drive."""
    if sys.platform == "darwin":
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fsync(fd)


def flush_directory(path: Place) -> None:
    """Make the names inside ``path`` last. Raises WriteFailed naming the directory."""
    if isinstance(path, RemotePath):
        return
    try:
        with open_directory(path) as fd:
            os.fsync(fd)
    except OSError as error:
        raise WriteFailed(
            f"cannot flush the directory: {reason_of(error)}", file=path, hint=TRY_AGAIN
        ) from error


def rename(old: Path, new: Path) -> None:
    old.rename(new)


def make_name_last(path: Path) -> None:
    """Flush the directory of what was just renamed to ``path``. Raises DurabilityUnknown: it *is* there."""
    try:
        flush_directory(path.parent)
    except WriteFailed as error:
        raise DurabilityUnknown(
            "is in its place, but the disk failed before its name was safe",
            file=path,
            hint="look at the disk, then whether the file is there and whole",
        ) from error


def set_aside(path: Path) -> Path:
    """Give something finished an unfinished name again, in one step. Raises WriteFailed naming it."""
    aside = path.with_name(partial_name(path.name))
    try:
        rename(path, aside)
    except OSError as error:
        raise WriteFailed(f"cannot rename: {reason_of(error)}", file=path, hint=TRY_AGAIN) from error
    return aside


def publish_directory(temporary: Path, final: Path) -> None:
    """Give a finished directory its name, once everything inside has been flushed. The name is *not* flushed.

    Raises StoreExists when something is there already: nothing is ever clobbered (a rename onto a directory
    that holds anything fails, and an empty one is refused by the check before it).
    """
    try:
        if final.exists() or final.is_symlink():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        rename(temporary, final)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise StoreExists("something is already there", file=final, hint="choose another path") from error
        raise WriteFailed(f"cannot create: {reason_of(error)}", file=final, hint=TRY_AGAIN) from error


@overload
def entries(directory: Path) -> list[Path]: ...
@overload
def entries(directory: RemotePath) -> list[RemotePath]: ...
def entries(directory: Place) -> list[Path] | list[RemotePath]:
    """What lies in a directory, by name. Raises CmdgpuError: what cannot be listed is not empty."""
    if isinstance(directory, RemotePath):
        files, folders = directory.client.names(directory.key)
        return sorted(directory / name for name in (*files, *folders))
    try:
        return sorted(directory.iterdir())
    except OSError as error:
        raise CmdgpuError(f"cannot be listed: {reason_of(error)}", file=directory) from error


def make_directory(path: Place) -> None:
    """Create ``path`` and what is missing above it, names that last. Raises WriteFailed naming the path."""
    if isinstance(path, RemotePath):
        return
    missing = [directory for directory in (path, *path.parents) if not directory.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WriteFailed(
            f"cannot create the directory: {reason_of(error)}", file=path, hint=TRY_AGAIN
        ) from error
    for made in missing:
        flush_directory(made.parent)


def remove(path: Path) -> None:
    """Delete a file, or a directory with all that is in it. Raises WriteFailed naming it."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise WriteFailed(f"cannot delete: {reason_of(error)}", file=path, hint=TRY_AGAIN) from error


def remove_partials(directory: Path) -> None:
    """Delete what a killed writer left unfinished. Only for who holds the lock: others may be writing."""
    for path in entries(directory):
        if path.name.endswith(PARTIAL) and not path.is_symlink():
            remove(path)


class Lock:
    """``flock`` on a file until ``release`` or the end of the process, exclusive or ``shared`` with its kind.

    The descriptor is closed in forked children: a data-loader worker that outlives its parent would
    otherwise keep the store locked.
    """

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        self._path = path
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._fd: int | None = os.open(path, flags, 0o644)
        except OSError as error:
            raise WriteFailed(f"cannot lock: {reason_of(error)}", file=path) from error
        try:
            fcntl.flock(self._fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._fd, 64, 0).decode("ascii", "replace").strip()
            os.close(self._fd)
            self._fd = None
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise CmdgpuError(f"cannot lock: {reason_of(error)}", file=path) from error
            raise StoreLocked(
                f"another process is writing here (process {holder or 'unknown'})",
                file=path.parent.parent,
                hint="close that recorder, or wait until it ends",
            ) from error
        _HELD.add(self)
        with contextlib.suppress(OSError):  # who holds it is a courtesy, and a full disk has no room for it
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        if self._fd is None:
            return
        fd, self._fd = self._fd, None
        with contextlib.suppress(OSError):  # the descriptor is gone all the same, and the lock with it
            os.close(fd)


_HELD: weakref.WeakSet[Lock] = weakref.WeakSet()


def _release_in_child() -> None:
    for lock in list(_HELD):
        lock.release()


os.register_at_fork(after_in_child=_release_in_child)
