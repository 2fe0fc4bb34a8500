"""Where a snapshot came from: the files that were read for it, and what their tensors were called there.

Kept beside the digests in the commit document, for snapshots that were imported and for no others. The names
are labels for a person; what recognises a file again is its size and its SHA-256.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class SourceFile:
    name: str
    """Below the folder that the checkpoint lies in: ``epoch-3.pt``, ``checkpoint-500/model.safetensors``."""
    size: int
    sha256: str


@dataclass(frozen=True)
class Origin:
    """What one imported snapshot was read from."""

    files: tuple[SourceFile, ...]
    names: str
    """SHA-256 over the recorded name of every tensor and its name in the files."""

    def to_json(self) -> dict[str, Any]:
        return {"files": [[f.name, f.size, f.sha256] for f in self.files], "names": self.names}

    @staticmethod
    def from_json(value: object) -> Origin:
        """Raises ValueError for anything that ``to_json`` does not write."""
        fields = _dict(value)
        if set(fields) != {"files", "names"}:
            raise ValueError("a source has other fields")
        return Origin(tuple(_file(entry) for entry in _list(fields["files"])), _sha256(fields["names"]))


def sources_from_json(value: object, n_snapshots: int) -> tuple[Origin | None, ...]:
    """One for every snapshot, None for those that were recorded. Raises ValueError."""
    if value is None:
        return (None,) * n_snapshots
    entries = _list(value)
    if len(entries) != n_snapshots:
        raise ValueError(f"{len(entries)} sources for {n_snapshots} snapshots")
    return tuple(None if entry is None else Origin.from_json(entry) for entry in entries)


def sources_to_json(sources: Sequence[Origin | None]) -> list[Any] | None:
    """None where no snapshot was imported: the document then has no such field."""
    if not any(sources):
        return None
    return [None if source is None else source.to_json() for source in sources]


def _file(entry: object) -> SourceFile:
    fields = _list(entry)
    if len(fields) != 3:
        raise ValueError("a file of a source is no name, size and digest")
    name, size, digest = fields
    if not isinstance(name, str) or not name.isprintable() or type(size) is not int or size < 0:
        raise ValueError("a file of a source has no name and size")
    return SourceFile(name, size, _sha256(digest))


def _sha256(value: object) -> str:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ValueError("a digest of a source is no SHA-256")
    return value


def _dict(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("a source is no object")
    return cast(dict[str, Any], value)


def _list(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("the sources are no list")
    return cast(list[Any], value)
