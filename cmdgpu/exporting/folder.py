"""A folder put down whole or not at all: built under a temporary name, flushed, renamed."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path

from cmdgpu.errors import StoreExists, WriteFailed
from cmdgpu.store import durable


@contextlib.contextmanager
def new_folder(path: Path) -> Generator[Path]:
    """The folder to write into; after the ``with`` it is ``path``. Who writes a file in it flushes the file.

    A folder cannot be replaced in one step, so none ever is. Raises StoreExists for a path that is taken,
    before the work and after it; WriteFailed naming the path.
    """
    if path.exists() or path.is_symlink():
        raise StoreExists("something is already there", file=path, hint="choose another path")
    durable.make_directory(path.parent)
    building = path.parent / durable.partial_name(path.name)
    try:
        durable.make_directory(building)
        yield building
        durable.flush_directory(building)
        durable.publish_directory(building, path)
    except BaseException:
        with contextlib.suppress(WriteFailed):  # what went wrong first is what is told
            durable.remove(building)
        raise
    durable.make_name_last(path)
