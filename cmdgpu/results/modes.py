"""The small arrays of a result: references, sample, linkage; one chunk each, digested in the group."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from cmdgpu.errors import StoreCorrupt
from cmdgpu.notation import AnyArray
from cmdgpu.results.contract import ModeSet
from cmdgpu.store import format as fmt
from cmdgpu.store.chunks import ChunkDamage, read_chunk

MODE_ARRAYS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "references": ("float32", ("mode", "snapshot")),
    "reference_row": ("int64", ("mode",)),
    "sample_row": ("int64", ("sample",)),
    "sample_mode": ("int16", ("sample",)),
    "sample": ("float32", ("sample", "snapshot")),
    "linkage": ("float64", ("merge", "field")),
}


def read_modes(path: Path, head: Mapping[str, Any]) -> ModeSet:
    arrays: dict[str, AnyArray] = {}
    for name, (kind, dims) in MODE_ARRAYS.items():
        document, _ = fmt.read_document(path / name / fmt.DOCUMENT, "array", "result-array")
        array = fmt.check_array(document, path / name / fmt.DOCUMENT, dims, 0)
        if array.zarr_type != kind or array.chunks != tuple(max(size, 1) for size in array.shape):
            raise StoreCorrupt(f"holds {array.zarr_type} in chunks {array.chunks}", file=path / name)
        values = np.empty(array.shape, dtype=np.dtype(kind))
        file = path / name / fmt.chunk_name(*[0] * len(dims))
        if values.size:
            try:
                read_chunk(file, values)
            except ChunkDamage as damage:
                raise StoreCorrupt(str(damage), file=file) from damage
        if fmt.sha256(values.tobytes()) != head["digests"].get(name):
            raise StoreCorrupt("does not hold the values of this fit", file=path / name)
        arrays[name] = values
    return ModeSet(**arrays)
