"""JSON that others wrote: bounded before it is parsed, every key once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

from cmdgpu.errors import CheckpointError
from cmdgpu.importing.files import Source
from cmdgpu.store import format as fmt

Json: TypeAlias = dict[str, Any]

_MAX_DEPTH: Final = 32
_MAX_VALUES: Final = 1 << 22
"""Brackets, commas and colons: what a document costs in memory goes by their number."""


def parse(raw: bytes, path: Path) -> Json:
    """A JSON object in UTF-8. Raises CheckpointError for anything else, and for a key that is there twice."""
    for depth, opened, separators in fmt.shapes(raw):
        if depth > _MAX_DEPTH or opened + separators > _MAX_VALUES:
            raise CheckpointError("holds JSON that is nested or long beyond all reason", file=path)
    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=fmt.no_duplicates)
    except ValueError as error:
        raise CheckpointError(f"holds no JSON where it should: {error}", file=path) from error
    if not isinstance(found, dict):
        raise CheckpointError("holds JSON that is no object", file=path)
    return cast(Json, found)


def read(source: Source, limit: int) -> Json:
    """A whole file. Raises CheckpointError for one of more than ``limit`` bytes, too."""
    if source.size > limit:
        raise CheckpointError(f"holds {source.size} bytes of JSON, more than {limit}", file=source.path)
    return parse(source.read(0, source.size), source.path)


def as_whole_number(value: object) -> int | None:
    """A number from 0 to 2^63, and no bool."""
    return value if type(value) is int and 0 <= value < 1 << 63 else None


def as_sizes(value: object) -> tuple[int, ...] | None:
    """A list of such numbers, as the shape of a tensor is."""
    if not isinstance(value, list):
        return None
    sizes = [as_whole_number(n) for n in cast(list[object], value)]
    return None if None in sizes else tuple(n for n in sizes if n is not None)
