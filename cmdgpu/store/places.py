"""Where a store lies: a folder on this machine, or a name on an object store.

``Place`` is what the reading side is written for. A ``RemotePath`` does of a ``pathlib.Path`` what is asked
of one here, and is no ``os.PathLike`` on purpose: what only works on a disk (locks, flushes, renames,
recording) refuses it instead of making a folder named ``s3:``. It is a name and nothing else, so that it can
be sent to the workers of a cluster; the connection behind it belongs to the process (``remote.client_of``).
"""

from __future__ import annotations

import os
import posixpath
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias
from urllib.parse import urlsplit
from urllib.request import url2pathname

from cmdgpu.errors import UsageError, printable
from cmdgpu.store.remote import Client, client_of

_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
"""Two letters at least: ``C://`` is a drive."""


@dataclass(frozen=True, order=True, slots=True)
class RemotePath:
    """``root``/``key``: an object, or all the objects below that name."""

    root: str
    """Scheme and bucket (or host): ``s3://bucket``."""
    key: str
    """Parts joined by ``/``; empty for the whole bucket."""

    def __str__(self) -> str:
        return f"{self.root}/{self.key}" if self.key else self.root

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self.root, f"{self.key}/{name}" if self.key else name)

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self.root, self.key.rpartition("/")[0])

    @property
    def client(self) -> Client:
        """The way to the server. Raises UsageError where a package is missing."""
        return client_of(self.root)

    def exists(self) -> bool:
        """Whether an object has this name, or begins with it."""
        return self.client.size(self.key) is not None or self.is_dir()

    def is_dir(self) -> bool:
        client = self.client
        return client.can_list and any(client.names(self.key))

    def is_symlink(self) -> bool:
        """There are no links."""
        return False

    def absolute(self) -> RemotePath:
        return self


Place: TypeAlias = Path | RemotePath
Named: TypeAlias = str | os.PathLike[str] | RemotePath
"""What a person gives for a place: a path, or a URL."""


def place_of(path: Named) -> Place:
    """A URL as a RemotePath, ``file://`` and everything else as a Path. Raises UsageError for a bad URL."""
    if isinstance(path, RemotePath):
        return path
    text = os.fspath(path)
    if not _URL.match(text):
        return Path(path)
    parts = urlsplit(text)
    if parts.scheme == "file":
        return Path(url2pathname(parts.path))
    shown = f"{parts.scheme}://{printable(parts.hostname or '')}"
    if parts.password is not None:
        raise UsageError("a password in a URL", file=shown, hint="credentials come from the environment")
    if parts.query or parts.fragment:
        raise UsageError(
            "a URL with a query or a fragment", file=shown, hint="give scheme://bucket/name alone"
        )
    names = [name for name in parts.path.split("/") if name]
    if not parts.netloc or {".", ".."} & set(names):
        raise UsageError("no place in a bucket", file=printable(text), hint="give scheme://bucket/name")
    return RemotePath(f"{parts.scheme}://{parts.netloc}", "/".join(names))


def seen_from(result: Place, store: Place) -> str | None:
    """Where ``store`` lies, seen from the folder of ``result``; None where they are on different machines.

    So a result and its trajectory can be moved together, and opening a result never leads to a server, or to
    a file of this machine, that its reader did not name.
    """
    if isinstance(store, Path) and isinstance(result, Path):
        return os.path.relpath(store.absolute(), result.absolute().parent)
    if isinstance(store, RemotePath) and isinstance(result, RemotePath) and store.root == result.root:
        return posixpath.relpath(f"/{store.key}", f"/{result.parent.key}")
    return None


def followed(result: Place, origin: str) -> Place | None:
    """What ``seen_from`` told of; None for what it does not tell."""
    if isinstance(result, Path):
        return result.absolute().parent / origin
    path = posixpath.normpath(posixpath.join("/", result.parent.key, origin))
    return None if origin.startswith("/") else RemotePath(result.root, path.strip("/"))


def local_path(path: Named, what: str) -> Path:
    """A path on this machine. Raises UsageError for a URL; ``what`` says who needs a disk."""
    place = place_of(path)
    if isinstance(place, RemotePath):
        raise UsageError(
            f"{what} needs a folder on this machine: locks, flushes and renames are not to be had there",
            file=place,
            hint="write to a disk, then copy it there",
        )
    return place
