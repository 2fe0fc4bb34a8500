"""Objects by fsspec: every scheme that it has a package for, ``memory://`` among them.

A body comes whole, as the package hands it over: asking for one byte more than there may be tells what is too
long. How often it tries again is the package's own matter.
"""

from __future__ import annotations

import importlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

from cmdgpu.errors import RemoteFailed
from cmdgpu.store.remote import Absent, Taken, failure


def file_system(root: str) -> Any:
    """The file system of a URL, that remembers no listings. Raises ImportError, ValueError."""
    fsspec: Any = importlib.import_module("fsspec")  # it has no types
    kind = fsspec.get_filesystem_class(root.partition("://")[0])
    options = kind._get_kwargs_from_urls(root)
    return kind(**options, use_listings_cache=False, skip_instance_cache=True)


class FileSystemClient:
    """One bucket, or whatever the scheme has in its place."""

    can_list = True

    def __init__(self, root: str, system: Any) -> None:
        self._root = root
        self._system = system

    def _url(self, key: str) -> str:
        return f"{self._root}/{key}"

    def held_bytes(self, n_bytes: int) -> int:
        return 2 * n_bytes  # as it came, and as it was put together

    def get(self, key: str, most: int) -> tuple[int, Iterator[bytes]]:
        data = self._range(key, 0, most + 1)
        size = len(data) if len(data) <= most else max(len(data), self.size(key) or 0)
        return size, iter([data])

    def tail(self, key: str, n_bytes: int, size: int | None) -> tuple[int, bytes]:
        if size is None and (size := self.size(key)) is None:
            raise Absent
        if size < n_bytes:
            return size, b""
        data = self._range(key, size - n_bytes, size + 1)
        return (size, data) if len(data) == n_bytes else (self.size(key) or 0, b"")

    def _range(self, key: str, start: int, stop: int) -> bytes:
        try:
            with self._telling("read", key):
                return bytes(self._system.cat_file(self._url(key), start=start, end=stop))
        except RemoteFailed:
            there = self.size(key)
            if there is None or there > start:
                raise
            return b""  # a range beyond its end is refused

    def size(self, key: str) -> int | None:
        try:
            with self._telling("look it up", key):
                found = self._system.info(self._url(key))
                return int(found["size"]) if found["type"] == "file" else None
        except Absent:
            return None

    def put(self, key: str, data: bytes, *, create: bool = False) -> None:
        with self._telling("write", key):
            self._system.pipe_file(self._url(key), data, mode="create" if create else "overwrite")

    def names(self, key: str) -> tuple[list[str], list[str]]:
        try:
            with self._telling("list", key):
                found = self._system.ls(self._url(key), detail=True)
        except Absent:
            return [], []
        own = key.rpartition("/")[2]
        files, folders = list[str](), list[str]()
        for entry in found:
            name = str(entry["name"]).rstrip("/").rpartition("/")[2]
            if entry["type"] == "directory":
                folders.append(name)
            elif name and not (len(found) == 1 and name == own):  # an object lists itself
                files.append(name)
        return files, folders

    def delete(self, key: str) -> None:
        try:
            with self._telling("delete", key):
                self._system.rm_file(self._url(key))
        except Absent:
            return

    @contextmanager
    def _telling(self, what: str, key: str) -> Generator[None]:
        """What a package raises, as ours: each has exceptions of its own kind, OSError or not."""
        try:
            yield
        except FileNotFoundError as error:
            if "bucket does not exist" in str(error):
                raise failure(what, self._url(key), error) from error
            raise Absent from error
        except FileExistsError as error:
            raise Taken from error
        except Exception as error:
            raise failure(what, self._url(key), error) from error
