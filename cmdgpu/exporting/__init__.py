"""Snapshots out of the house, as files and folders that anything opens; one module per format.

A format is a function ``write(path, parameter_map, snapshot) -> Export`` in bounded memory: it writes under a
temporary name beside ``path``, flushes, renames.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cmdgpu.errors import UsageError
from cmdgpu.exporting import dcp, huggingface, pt, safetensors
from cmdgpu.exporting.contract import FORMATS, Export, Format
from cmdgpu.memory import parse_bytes
from cmdgpu.models import Patterns
from cmdgpu.store.parameter_map import ParameterMap
from cmdgpu.tensors import Buffers, Snapshot, reading_ahead, select

__all__ = ["FORMATS", "Export", "export_snapshot"]

FORMATS.add("safetensors", Format(safetensors.write))
FORMATS.add("pt", Format(pt.write))
FORMATS.add("dcp", Format(dcp.write, is_folder=True))
FORMATS.add(
    "huggingface",
    Format(
        huggingface.in_shards(huggingface.MAX_SHARD_BYTES), is_folder=True, in_shards=huggingface.in_shards
    ),
)
_SUFFIXES = {".safetensors": "safetensors", ".pt": "pt", ".pth": "pt", ".bin": "pt"}


def export_snapshot(
    path: Path,
    parameter_map: ParameterMap,
    snapshot: Snapshot,
    format: str | None = None,
    params: Patterns = None,
    *,
    buffers: Buffers = "recorded",
    buffers_step: int | None = None,
    max_shard_size: int | str | None = None,
) -> Export:
    """Write one snapshot; the suffix tells the format where none is given, safetensors where it does not.

    ``buffers_step`` is the recorded step of the buffers, to be told; ``max_shard_size`` is bytes or
    ``"5GB"``, for a format in shards. Raises UsageError for an unknown format, for a directory where a file
    is to be, for a size that the format has no use for and for ``params`` that match nothing; StoreExists
    where a folder is to be and something is; WriteFailed naming the file.
    """
    name = format if format is not None else _SUFFIXES.get(path.suffix, "safetensors")
    wanted = FORMATS[name]
    write = wanted.write
    if max_shard_size is not None:
        if wanted.in_shards is None:
            raise UsageError(f"{name} has no shards", hint="max_shard_size goes with format huggingface")
        write = wanted.in_shards(parse_bytes(max_shard_size))
    if not wanted.is_folder and path.is_dir():
        raise UsageError("is a directory", file=path, hint=f"name a file, e.g. {path / 'model'}.{name}")
    chosen = tuple(select(parameter_map, params, buffers))
    kept = {entry.name for entry in chosen}
    aliases = {alias: name for alias, name in parameter_map.aliases.items() if name in kept}
    with reading_ahead(snapshot, chosen) as ahead:
        export = write(path, ParameterMap(chosen, aliases), ahead)
    has_buffers = any(entry.kind == "buffer" and entry.name not in export.left_out for entry in chosen)
    return replace(export, buffers_step=buffers_step if has_buffers else None)
