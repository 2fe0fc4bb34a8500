"""Writers that are wrong in exactly one step: what a harness is worth shows in the mutants it catches.

A mutant replaces one named function of the product for the length of a ``with``. Each is a mistake somebody
could make tomorrow, and each must be caught by a harness that runs the same writer.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import threading
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any, Final, TypeAlias
from unittest.mock import patch

Acknowledge: TypeAlias = Callable[[int], None]
Mutant: TypeAlias = Callable[[contextlib.ExitStack, Acknowledge], None]

_DURABLE: Final = "cmdgpu.store.durable"
_JOURNAL: Final = "cmdgpu.store.journal"
_STORED: Final = "cmdgpu.results.stored"


@contextlib.contextmanager
def in_place(name: str | None, acknowledge: Acknowledge) -> Generator[None]:
    """The product with one step replaced; as it is when ``name`` is None."""
    with contextlib.ExitStack() as stack:
        if name is not None:
            MUTANTS[name](stack, acknowledge)
        yield


def _module(name: str) -> Any:
    """Steps are private names: a mutant may know them."""
    return importlib.import_module(name)


def _replace(stack: contextlib.ExitStack, target: str, replacement: Callable[..., Any]) -> None:
    stack.enter_context(patch(target, replacement))


# ---- order ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _put_off(is_put_off: Callable[[Path, str], bool]) -> Generator[None]:
    """Some files are written, and their names flushed, only when everything else has been."""
    durable = _module(_DURABLE)
    write_file = durable.write_file
    waiting: list[tuple[Path, str, list[bytes]]] = []

    def write_or_wait(directory: Path, name: str, parts: Iterable[Any], *, cached: bool = True) -> None:
        if is_put_off(directory, name):
            waiting.append((directory, name, [bytes(part) for part in parts]))
        else:
            write_file(directory, name, parts, cached=cached)

    with patch(f"{_DURABLE}.write_file", write_or_wait):
        yield
    for directory, name, parts in waiting:
        write_file(directory, name, parts)
        durable.flush_directory(directory)


def _shape_first(stack: contextlib.ExitStack, acknowledge: Acknowledge) -> None:
    """The commit before the chunks it speaks of, as zarr's own ``append`` does it."""
    append = _module(_JOURNAL).Journal.append

    def commit_and_append(self: Any, *snapshot: Any) -> None:
        with _put_off(lambda directory, name: directory.name in ("weights", "sketch") and name[0] == "c"):
            append(self, *snapshot)

    _replace(stack, f"{_JOURNAL}.Journal.append", commit_and_append)


def _ack_first(stack: contextlib.ExitStack, acknowledge: Acknowledge) -> None:
    """The promise before the commit that keeps it."""
    commit = _module(_JOURNAL).Journal._commit

    def acknowledge_and_commit(self: Any, steps: Any, *rest: Any) -> None:
        acknowledge(len(steps))
        commit(self, steps, *rest)

    _replace(stack, f"{_JOURNAL}.Journal._commit", acknowledge_and_commit)


def _done_first(stack: contextlib.ExitStack, acknowledge: Acknowledge) -> None:
    """A unit of a fit is ticked off before its chunks are written: the record vouches for nothing."""
    write = _module(_STORED).StoredWriter.write

    def tick_off_and_write(self: Any, *unit: Any) -> None:
        with _put_off(lambda directory, name: directory.name != "done"):
            write(self, *unit)

    _replace(stack, f"{_STORED}.StoredWriter.write", tick_off_and_write)


# ---- flushes --------------------------------------------------------------------------------------------


def _flushes_nothing(*_: Any) -> None:
    pass


def _no_file_fsync(stack: contextlib.ExitStack, acknowledge: Acknowledge) -> None:
    """Names last, bytes do not: what a power cut leaves is an empty file under the final name."""
    _replace(stack, f"{_DURABLE}.flush_file", _flushes_nothing)


def _no_directory_fsync(stack: contextlib.ExitStack, acknowledge: Acknowledge) -> None:
    """Bytes last, names do not: a commit could outlive its chunks."""
    _replace(stack, f"{_DURABLE}.flush_directory", _flushes_nothing)


def _no_fsync(stack: contextlib.ExitStack, acknowledge: Acknowledge) -> None:
    """Nothing lasts."""
    _no_file_fsync(stack, acknowledge)
    _no_directory_fsync(stack, acknowledge)


# ---- error paths ----------------------------------------------------------------------------------------


def _swallow_write_errors(stack: contextlib.ExitStack, acknowledge: Acknowledge) -> None:
    """A refused write goes unnoticed."""
    write_all = _module(_DURABLE)._write_all

    def write_what_fits(fd: int, view: memoryview) -> None:
        with contextlib.suppress(OSError):
            write_all(fd, view)

    _replace(stack, f"{_DURABLE}._write_all", write_what_fits)


def _fsync_twice(fd: int) -> None:
    try:
        os.fsync(fd)
    except OSError:
        os.fsync(fd)  # says yes: the kernel has marked the lost pages clean


def _retry_fsync(stack: contextlib.ExitStack, acknowledge: Acknowledge) -> None:
    """A failed flush of a file is tried again on the same descriptor."""
    _replace(stack, f"{_DURABLE}.flush_file", _fsync_twice)


def _retry_directory_fsync(stack: contextlib.ExitStack, acknowledge: Acknowledge) -> None:
    """The same for the names in a directory."""
    open_directory = _module(_DURABLE).open_directory

    def flush_directory(path: Path) -> None:
        with open_directory(path) as fd:
            _fsync_twice(fd)

    _replace(stack, f"{_DURABLE}.flush_directory", flush_directory)


def _leave_temps(stack: contextlib.ExitStack, acknowledge: Acknowledge) -> None:
    """A failed write leaves its temporary file behind."""
    write_file, unlink = _module(_DURABLE).write_file, Path.unlink
    writing = threading.local()

    def write_and_leave(directory: Path, name: str, parts: Iterable[Any], *, cached: bool = True) -> None:
        writing.now = True
        try:
            write_file(directory, name, parts, cached=cached)
        finally:
            writing.now = False

    def unlink_what_is_not_being_written(path: Path, missing_ok: bool = False) -> None:
        if not getattr(writing, "now", False):
            unlink(path, missing_ok)

    _replace(stack, f"{_DURABLE}.write_file", write_and_leave)
    stack.enter_context(patch.object(Path, "unlink", unlink_what_is_not_being_written))


def _keep_partials(stack: contextlib.ExitStack, acknowledge: Acknowledge) -> None:
    """Who opens a store does not sweep up after a killed writer."""
    _replace(stack, f"{_DURABLE}.remove_partials", _flushes_nothing)


def _copy_instead_of_rename(stack: contextlib.ExitStack, acknowledge: Acknowledge) -> None:
    """Files get their names byte by byte."""

    def copy(old: Path, new: Path) -> None:
        if old.is_dir():
            shutil.move(old, new)
            return
        raw = old.read_bytes()
        with new.open("wb", buffering=0) as file:
            file.write(raw[: len(raw) // 2])
            file.write(raw[len(raw) // 2 :])
        old.unlink()

    _replace(stack, f"{_DURABLE}.rename", copy)


MUTANTS: Final[dict[str, Mutant]] = {
    "shape_first": _shape_first,
    "ack_first": _ack_first,
    "done_first": _done_first,
    "no_file_fsync": _no_file_fsync,
    "no_directory_fsync": _no_directory_fsync,
    "no_fsync": _no_fsync,
    "swallow_write_errors": _swallow_write_errors,
    "retry_fsync": _retry_fsync,
    "retry_directory_fsync": _retry_directory_fsync,
    "leave_temps": _leave_temps,
    "keep_partials": _keep_partials,
    "copy_instead_of_rename": _copy_instead_of_rename,
}
