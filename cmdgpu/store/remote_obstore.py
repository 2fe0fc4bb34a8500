"""Objects by obstore: s3, gs, az, http(s). It retries what a server may well do the next time."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, NotSupportedError
from obstore.store import HTTPStore, from_url

from cmdgpu.errors import RemoteFailed
from cmdgpu.store.remote import Absent, Taken, failure

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

_OBSTORE: Final[Any] = obstore
"""For the one call whose types name a package that need not be here."""
_RETRIES: Final[RetryConfig] = {
    # 0.2, 0.4, ... 6.4 s: a server that is started again is waited for, one that is gone is told of
    "max_retries": 6,
    "backoff": {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=10), "base": 2},
    "retry_timeout": timedelta(minutes=3),
}
_HELD: Final = 1 << 20
"""Of a body on its way: pieces, and what the connection has read ahead."""
_PIECE: Final = 1 << 18
"""Bytes of a body handed over at once: still in the cache when they are put in their place."""


class ObjectClient:
    """One bucket, or one host."""

    def __init__(self, root: str) -> None:
        scheme = root.partition("://")[0]
        options: ClientConfig = {
            # of silence; a chunk of 1 GiB may take its time as long as it comes
            "read_timeout": timedelta(seconds=30),
            "timeout": timedelta(minutes=30),
            "allow_http": scheme == "http" or _endpoint().startswith("http://"),
        }
        make: Any = HTTPStore.from_url if scheme.startswith("http") else from_url
        try:
            self._store = make(root, client_options=options, retry_config=_RETRIES)
        except BaseError as error:
            raise failure("open", root, error) from error
        self._root = root
        self.can_list = not scheme.startswith("http")

    def held_bytes(self, n_bytes: int) -> int:
        return min(n_bytes, _HELD)

    def get(self, key: str, most: int) -> tuple[int, Iterator[bytes]]:
        del most  # the size comes before the body, and nobody goes on with one that is too large
        with self._telling("read", key):
            found = obstore.get(self._store, key)
            return found.meta["size"], self._pieces(found, key)

    def _pieces(self, found: obstore.GetResult, key: str) -> Iterator[bytes]:
        with self._telling("read", key):
            yield from found.stream(_PIECE)

    def tail(self, key: str, n_bytes: int, size: int | None) -> tuple[int, bytes]:
        if size is None and (size := self.size(key)) is None:
            raise Absent
        if size < n_bytes:
            return size, b""
        try:
            with self._telling("read", key):
                found = obstore.get(self._store, key, options={"range": (size - n_bytes, size)})
                if found.meta["size"] != size or found.range != (size - n_bytes, size):
                    return found.meta["size"], b""
                tail = bytes(found.bytes())
        except RemoteFailed:
            there = self._size_or_none(key)
            if there is None or there == size:
                raise
            return there, b""  # shorter: a range beyond its end is refused
        if len(tail) != n_bytes:
            raise RemoteFailed(f"{len(tail)} bytes arrived, {n_bytes} asked for", file=f"{self._root}/{key}")
        return size, tail

    def size(self, key: str) -> int | None:
        try:
            with self._telling("look it up", key):
                return obstore.head(self._store, key)["size"]
        except Absent:
            return None

    def _size_or_none(self, key: str) -> int | None:
        try:
            return self.size(key)
        except RemoteFailed:
            return None

    def put(self, key: str, data: bytes, *, create: bool = False) -> None:
        with self._telling("write", key):
            if create:
                try:
                    obstore.put(self._store, key, data, mode="create")
                    return
                except AlreadyExistsError as error:
                    raise Taken from error
                except NotSupportedError:
                    pass  # this server has no such put: the last of two writers stays
            obstore.put(self._store, key, data)

    def names(self, key: str) -> tuple[list[str], list[str]]:
        with self._telling("list", key):
            found = _OBSTORE.list_with_delimiter(self._store, key or None)
            return [_last(at["path"]) for at in found["objects"]], list(map(_last, found["common_prefixes"]))

    def delete(self, key: str) -> None:
        try:
            with self._telling("delete", key):
                obstore.delete(self._store, key)
        except Absent:
            return

    @contextmanager
    def _telling(self, what: str, key: str) -> Generator[None]:
        """What obstore raises, as ours."""
        try:
            yield
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise failure(what, f"{self._root}/{key}", error) from error
            raise Absent from error
        except (BaseError, OSError) as error:
            raise failure(what, f"{self._root}/{key}", error) from error


def _endpoint() -> str:
    """A server that was named by an ``http://`` URL is meant to be spoken to without TLS."""
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    return next((value for name in names if (value := os.environ.get(name))), "")


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]
