"""Snapshots out of the house, as files that anything opens; one file per format.

A format is a function ``write(path, parameter_map, snapshot) -> Export`` in bounded memory: it writes under a
temporary name beside ``path``, flushes, renames.
"""

from __future__ import annotations

from pathlib import Path

from cmdgpu.errors import UsageError
from cmdgpu.exporting import pt, safetensors
from cmdgpu.exporting.contract import FORMATS, Export
from cmdgpu.models import Patterns
from cmdgpu.store.parameter_map import ParameterMap
from cmdgpu.tensors import Snapshot, select

__all__ = ["FORMATS", "Export", "export_snapshot"]

FORMATS.add("safetensors", safetensors.write)
FORMATS.add("pt", pt.write)
_SUFFIXES = {".safetensors": "safetensors", ".pt": "pt", ".pth": "pt", ".bin": "pt"}


def export_snapshot(
    path: Path,
    parameter_map: ParameterMap,
    snapshot: Snapshot,
    format: str | None = None,
    params: Patterns = None,
) -> Export:
    """Write one snapshot; the suffix tells the format where none is given, safetensors where it does not.

    Raises UsageError for an unknown format, for a directory and for ``params`` that match nothing,
    WriteFailed naming the file.
    """
    name = format if format is not None else _SUFFIXES.get(path.suffix, "safetensors")
    writer = FORMATS[name]
    if path.is_dir():
        raise UsageError("is a directory", file=path, hint=f"name a file, e.g. {path / 'model'}.{name}")
    chosen = tuple(select(parameter_map, params))
    kept = {entry.name for entry in chosen}
    aliases = {alias: name for alias, name in parameter_map.aliases.items() if name in kept}
    return writer(path, ParameterMap(chosen, aliases), snapshot)
