"""Objects on a server: what is asked of one, and which library answers for which URL.

obstore serves s3, gs, az and http(s) where it is installed, fsspec every other scheme, and these where
obstore is missing. Credentials, endpoints and regions are theirs to find in the environment.

What the promises of a disk become here: an object appears whole or not at all, so a put takes the place of
temporary name, flush and rename, and *acknowledged* means that the server has acknowledged the put; what it
does to keep it is its own. There are no locks, no links and no directories. A listing may lag behind on some
servers; nothing here takes one for more than a hint. A server is believed in nothing: the size it tells is
compared before memory is taken, and no more is taken from it than was asked for.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Iterator
from typing import Final, Protocol

from cmdgpu.errors import RemoteFailed, UsageError, printable

READS_IN_FLIGHT: Final = 32
"""Requests at once. Chunks of 1 MiB from a server 20 ms away, over two busy cores: 0.3 GB/s with eight, 0.6
with 32, 0.7 with 64; more costs memory for what is on its way, and servers begin to say *slow down*."""
OBJECT_SCHEMES: Final = frozenset({"s3", "s3a", "gs", "az", "azure", "adl", "abfs", "abfss", "http", "https"})
"""What obstore speaks."""


class Absent(Exception):
    """No object has that name."""


class Taken(Exception):
    """An object has that name already."""


class Client(Protocol):
    """Objects of one bucket. Every failure that is not about one name is RemoteFailed naming the URL."""

    @property
    def can_list(self) -> bool: ...

    def held_bytes(self, n_bytes: int) -> int:
        """Memory that getting so many bytes takes beside their place."""
        ...

    def get(self, key: str, most: int) -> tuple[int, Iterator[bytes]]:
        """(its size, its bytes in pieces); nobody asks for the pieces of one larger than ``most``.

        Raises Absent.
        """
        ...

    def tail(self, key: str, n_bytes: int, size: int | None) -> tuple[int, bytes]:
        """(its size, its last bytes), in one request where ``size`` is known; no bytes of another size.

        Raises Absent.
        """
        ...

    def size(self, key: str) -> int | None:
        """None where there is none."""
        ...

    def put(self, key: str, data: bytes, *, create: bool = False) -> None:
        """All bytes or the old object. ``create``: Taken where there is one, if the server can tell."""
        ...

    def names(self, key: str) -> tuple[list[str], list[str]]:
        """(objects, folders) right below ``key``, by name."""
        ...

    def delete(self, key: str) -> None:
        """Gone, whether it was there or not."""
        ...


@functools.lru_cache(maxsize=64)
def client_of(root: str) -> Client:
    """The client of a bucket, one per process. Raises UsageError naming the package that is missing."""
    scheme = root.partition("://")[0]
    if scheme in OBJECT_SCHEMES and _is_installed("obstore"):
        from cmdgpu.store.remote_obstore import ObjectClient

        return ObjectClient(root)
    if not _is_installed("fsspec"):
        raise UsageError("no package here reads URLs", file=root, hint=_INSTALL)
    from cmdgpu.store.remote_fsspec import FileSystemClient, file_system

    try:
        return FileSystemClient(root, file_system(root))
    except ImportError as error:
        hint = _INSTALL if scheme in OBJECT_SCHEMES else str(error)
        raise UsageError(f"{scheme}:// needs a package", file=root, hint=hint) from error
    except ValueError as error:
        raise UsageError(f"no package knows {scheme}://", file=root, hint="s3, gs, az, https, ...") from error


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


_INSTALL: Final = "pip install 'cmdgpu[remote]'"
_NOISE: Final = re.compile(r"Generic \S+ error: |Error performing |Object at location \S+ | in [\d.]+m?s\b")


def failure(what: str, url: str, error: BaseException) -> RemoteFailed:
    """The first line of what a library says, without the server's XML and the library's own debug lines."""
    lines = [*str(error).splitlines(), ""]
    text = lines[0].partition(": <?xml")[0].partition(" ErrorResponse")[0]
    text = _NOISE.sub("", text).strip() or type(error).__name__
    code = re.search(r"<Code>(\w{1,64})</Code>", str(error))
    told = f"{text} ({code[1]})" if code and code[1] not in text else text
    return RemoteFailed(f"cannot {what}: {printable(told, 240)}", file=url)
