"""Snapshots out of the house, as files that anything opens; one file per format.

A format is a function ``write(path, parameter_map, snapshot) -> Export`` in bounded memory: it writes under a
temporary name beside ``path``, flushes, renames.
"""

from __future__ import annotations

from pathlib import Path

from cmdgpu.errors import UsageError
from cmdgpu.exporting import pt as _pt  # noqa: F401  registered by import
from cmdgpu.exporting import safetensors as _safetensors
from cmdgpu.exporting.contract import FORMATS, Export
from cmdgpu.store.parameter_map import ParameterMap
from cmdgpu.tensors import Snapshot

__all__ = ["FORMATS", "Export", "export_snapshot", "guess_format"]

_SUFFIXES = {".safetensors": "safetensors", ".pt": "pt", ".pth": "pt", ".bin": "pt"}


def guess_format(path: Path, name: str | None) -> str:
    """The format asked for, else the one the suffix tells, else safetensors."""
    return name if name is not None else _SUFFIXES.get(path.suffix, "safetensors")


def export_snapshot(path: Path, parameter_map: ParameterMap, snapshot: Snapshot, format: str) -> Export:
    """Write one snapshot. Raises UsageError for an unknown format or a directory, WriteFailed naming the file."""
    writer = FORMATS[format]
    if path.is_dir():
        raise UsageError("is a directory", file=path, hint=f"name a file, e.g. {path / 'model'}.{format}")
    return writer(path, parameter_map, snapshot)
