"""The small arrays of a result: references, sample, linkage; one chunk each, digested in the group."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from cmdgpu.errors import StoreCorrupt
from cmdgpu.notation import MAX_MODES, NO_ROW, NON_FINITE, AnyArray
from cmdgpu.results.contract import ModeSet
from cmdgpu.store import durable
from cmdgpu.store import format as fmt
from cmdgpu.store.chunks import ChunkDamage, read_chunk, stored_crc
from cmdgpu.store.commit import own_directory
from cmdgpu.store.places import Place

MODE_ARRAYS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "references": ("float32", ("mode", "snapshot")),
    "reference_row": ("int64", ("mode",)),
    "sample_row": ("int64", ("sample",)),
    "sample_mode": ("int16", ("sample",)),
    "sample": ("float32", ("sample", "snapshot")),
    "linkage": ("float64", ("merge", "field")),
}


REFINING: Final = "refining"
"""In a head: digest of the references that the last round of refinement left, until all rounds are done."""


def round_name(k: int) -> str:
    """The file of the references that round k left, beside the chunk of those the fit began with."""
    return f"round.{k}{durable.PARTIAL}"


def mode_documents(modes: ModeSet) -> dict[str, fmt.Json]:
    """Metadata of the small arrays."""
    found: dict[str, fmt.Json] = {}
    for name, (kind, dims) in MODE_ARRAYS.items():
        shape = getattr(modes, name).shape
        chunks = tuple(max(size, 1) for size in shape)
        found[name] = fmt.array_document(shape, chunks, kind, dims, 0, {"cmdgpu": fmt.own("result-array")})
    return found


class StoredSample:
    """(K, T) values of the sampled rows on disk: read, and checked, whenever they are asked for.

    Nothing is rebuilt from them, and of many fits at once they would be most of the memory.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, directory: Place, shape: tuple[int, ...], digest: str) -> None:
        self._directory = directory
        self._digest = digest
        self.shape = shape

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"StoredSample({list(self.shape)})"

    def __getitem__(self, index: Any, /) -> Any:
        return self.__array__()[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> AnyArray:
        """Raises StoreCorrupt."""
        if copy is False:
            raise ValueError("rows on disk cannot be had without a copy")
        values = _read_array(self._directory, self.shape, self.dtype, self._digest)
        return values if dtype is None else values.astype(dtype, copy=False)


def read_modes(path: Place, head: Mapping[str, Any], n_rows: int, *, keeps_sample: bool = False) -> ModeSet:
    """The small arrays, each against its digest, all against each other. Raises StoreCorrupt.

    While references are refined they are those of the last round.
    The sample is looked at like the others and let go of, unless it is to be kept.
    """
    arrays: dict[str, Any] = {}
    for name, (kind, dims) in MODE_ARRAYS.items():
        own_directory(path, name)
        document, _ = fmt.read_document(path / name / fmt.DOCUMENT, "array", "result-array")
        array = fmt.check_array(document, path / name / fmt.DOCUMENT, dims, 0)
        if array.zarr_type != kind or array.chunks != tuple(max(size, 1) for size in array.shape):
            raise StoreCorrupt(f"holds {array.zarr_type} in chunks {array.chunks}", file=path / name)
        digest, file = head["digests"].get(name), None
        if name == "references" and REFINING in head and head["refinement"]:
            digest, file = head[REFINING], round_name(len(head["refinement"]) - 1)
        values = _read_array(path / name, array.shape, np.dtype(kind), digest, file)
        is_kept = name != "sample" or keeps_sample
        arrays[name] = values if is_kept else StoredSample(path / name, array.shape, digest)
    if problem := _disagreement(arrays, len(head["steps"]), n_rows, are_rows=are_rows(head["config"])):
        raise StoreCorrupt(problem, file=path)
    return ModeSet(**arrays)


def _read_array(
    directory: Place, shape: tuple[int, ...], kind: np.dtype[Any], digest: str, name: str | None = None
) -> AnyArray:
    """A small array, which must be what its digest says; in its one chunk, where no other file is named."""
    n_bytes = math.prod(shape) * kind.itemsize
    file = directory / (name or fmt.chunk_name(*[0] * len(shape)))
    try:
        if n_bytes:
            stored_crc(file, n_bytes)  # memory only for what is there
        values = np.empty(shape if n_bytes else _no_more(shape), dtype=kind)
        if n_bytes:
            read_chunk(file, values)
    except ChunkDamage as damage:
        raise StoreCorrupt(str(damage), file=file) from damage
    if fmt.sha256(values.tobytes()) != digest:
        raise StoreCorrupt("does not hold the values of this fit", file=directory)
    return values


def _no_more(shape: tuple[int, ...]) -> tuple[int, ...]:
    """2^60 references of no snapshot take no bytes, and are still 2^60 to whoever counts."""
    if max(shape) > 1 << 32:
        raise ChunkDamage(f"claims the shape {shape}")
    return shape


def are_rows(config: Mapping[str, Any]) -> bool:
    """Whether the references of a fit are rows of its trajectory."""
    return config.get("references", "row") == "row" and not config.get("refine")


def _disagreement(arrays: Mapping[str, Any], n_snapshots: int, n_rows: int, *, are_rows: bool) -> str | None:
    n_modes, n_samples = len(arrays["reference_row"]), len(arrays["sample_row"])
    shapes = {
        "references": (n_modes, n_snapshots),
        "reference_row": (n_modes,),
        "sample_row": (n_samples,),
        "sample_mode": (n_samples,),
        "sample": (n_samples, n_snapshots),
    }
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            return f"{name} has the shape {arrays[name].shape}, the other arrays say {shape}"
    n_clustered = int((arrays["sample_mode"] >= 0).sum())
    if arrays["linkage"].shape != (max(n_clustered - 1, 0), 4):
        return f"linkage has the shape {arrays['linkage'].shape} for {n_clustered} clustered rows"
    limits = {
        "reference_row": (0, n_rows) if are_rows else (NO_ROW, NO_ROW + 1),
        "sample_row": (0, n_rows),
        "sample_mode": (NON_FINITE, n_modes),
    }
    for name, (least, stop) in limits.items():
        if arrays[name].size and not (arrays[name].min() >= least and arrays[name].max() < stop):
            return f"{name} points outside of {least}..{stop - 1}"
    if n_modes > MAX_MODES:
        return f"{n_modes} modes, {MAX_MODES} at most"
    return None
