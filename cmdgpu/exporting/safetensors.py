"""safetensors: a JSON header, then the raw bytes. Written by hand because the library wants every tensor in
memory; read back by the library in the tests.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from cmdgpu.errors import UsageError
from cmdgpu.exporting.contract import Export, sources
from cmdgpu.store import durable
from cmdgpu.store.parameter_map import ParameterMap, TensorEntry
from cmdgpu.tensors import RowSource, Snapshot, flat_blocks, raw_bytes, torch_dtype

_METADATA: Final = "__metadata__"
_TYPES: Final = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def write(path: Path, parameter_map: ParameterMap, snapshot: Snapshot) -> Export:
    """Tied weights are written once; their other names stand in the metadata under ``aliases``."""
    available, left_out = sources(parameter_map, snapshot)
    require_names([entry for entry, _ in available])
    durable.make_directory(path.parent)
    n_bytes = write_file(path.parent, path.name, available, parameter_map.aliases)
    durable.make_name_last(path)
    return Export(path, "safetensors", len(available), n_bytes, left_out)


def require_names(entries: Sequence[TensorEntry]) -> None:
    """Raises UsageError for a tensor that no safetensors file can hold."""
    if any(entry.name == _METADATA for entry in entries):
        raise UsageError(
            "safetensors has no room for a tensor of this name", tensor=_METADATA, hint="export to .pt"
        )


def tensor_bytes(entry: TensorEntry) -> int:
    return entry.n_rows * torch_dtype(entry).itemsize


def write_file(
    directory: Path,
    name: str,
    available: Sequence[tuple[TensorEntry, RowSource]],
    aliases: Mapping[str, str],
) -> int:
    """One file, flushed and renamed; how many bytes it has. The directory is not flushed."""
    header: dict[str, Any] = {_METADATA: {"format": "pt", "aliases": json.dumps(dict(aliases))}}
    end = 0
    for entry, _ in available:
        start, end = end, end + tensor_bytes(entry)
        header[entry.name] = {
            "dtype": _TYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def parts() -> Iterator[durable.Buffer]:
        yield len(text).to_bytes(8, "little")
        yield text
        for entry, source in available:
            for block in flat_blocks(entry, source):
                yield raw_bytes(block)

    durable.write_file(directory, name, parts())
    return 8 + len(text) + end
