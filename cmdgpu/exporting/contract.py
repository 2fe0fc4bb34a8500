"""What a format promises, and the list of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from cmdgpu.registry import Registry
from cmdgpu.store.parameter_map import ParameterMap, TensorEntry
from cmdgpu.tensors import RowSource, Snapshot


@dataclass(frozen=True)
class Export:
    """What was written."""

    path: Path
    format: str
    n_tensors: int
    n_bytes: int
    left_out: tuple[str, ...]
    """Tensors whose numbers could not be had."""
    buffers_step: int | None = None
    """The recorded step that buffers come from; None where none come from a recording."""


Writer: TypeAlias = Callable[[Path, ParameterMap, Snapshot], Export]


@dataclass(frozen=True)
class Format:
    write: Writer
    is_folder: bool = False
    """Whether a folder comes of it: a new one, where a file replaces the one that is there."""
    in_shards: Callable[[int], Writer] | None = None
    """The writer for another largest size of a shard in bytes, where the format has shards."""


FORMATS: Final[Registry[Format]] = Registry("format")


def sources(
    parameter_map: ParameterMap, snapshot: Snapshot
) -> tuple[list[tuple[TensorEntry, RowSource]], tuple[str, ...]]:
    """The tensors that can be had, with their numbers, and the names of the others."""
    pairs = [(entry, snapshot(entry)) for entry in parameter_map]
    return (
        [(entry, source) for entry, source in pairs if source is not None],
        tuple(entry.name for entry, source in pairs if source is None),
    )
