"""The small arrays beside ``weights``: ``step``, recorded scalars, ``sketch_row``, the shape of the sketch.

They are at least as long as the commit says; what lies beyond is ignored. Their values are vouched for by a
digest in the commit, so they may be rewritten before it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cmdgpu.errors import StoreCorrupt
from cmdgpu.notation import F64, I64, AnyArray
from cmdgpu.store import durable
from cmdgpu.store import format as fmt
from cmdgpu.store.chunks import ChunkDamage, read_chunk, stored_crc, write_chunk
from cmdgpu.store.commit import Commit, own_directory
from cmdgpu.store.places import Place

SAMPLE_BY_SNAPSHOT = ("sample", "snapshot")


def small_type(name: str) -> tuple[str, float | int]:
    """Element type of a small array, and what stands where nothing was written."""
    if name in (fmt.STEP, fmt.SKETCH_ROW):
        return "int64", int(np.iinfo(np.int64).min)
    return "float64", float("nan")


def digest(values: AnyArray) -> str:
    return fmt.sha256(values.astype(values.dtype.newbyteorder("<")).tobytes())


# ---- reading --------------------------------------------------------------------------------------------


def read_small(path: Place, name: str, length: int | None, wanted_digest: object) -> Any:
    """The first ``length`` values (all when None) of a small array, checked against its digest."""
    directory = own_directory(path, name)
    document, _ = fmt.read_document(directory / fmt.DOCUMENT, "array", "small")
    dims = ("sample",) if name == fmt.SKETCH_ROW else ("snapshot",)
    kind, fill = small_type(name)
    array = fmt.check_array(document, directory / fmt.DOCUMENT, dims, fill)
    expected = max(array.shape[0], 1) if name == fmt.SKETCH_ROW else fmt.SMALL_CHUNK
    if array.zarr_type != kind or array.chunks != (expected,):
        raise StoreCorrupt(f"holds {array.zarr_type} in chunks {array.chunks}", file=directory / fmt.DOCUMENT)
    wanted = array.shape[0] if length is None else length
    if array.shape[0] < wanted:
        raise StoreCorrupt(f"holds {array.shape[0]} values, {wanted} committed", file=directory)
    (chunk,) = array.chunks
    dtype = np.dtype(kind).newbyteorder("<")
    files = (directory / fmt.chunk_name(i) for i in range(-(-wanted // chunk)))
    parts = [np.empty(0, dtype=dtype)]
    for file in files:
        try:
            stored_crc(file, chunk * dtype.itemsize)  # memory only for what is there
            part = np.empty(chunk, dtype=dtype)
            read_chunk(file, part)
        except ChunkDamage as damage:
            raise StoreCorrupt(str(damage), file=file) from damage
        parts.append(part)
    values = np.concatenate(parts)[:wanted]
    if fmt.sha256(values.tobytes()) != wanted_digest:
        raise StoreCorrupt("does not hold the committed values", file=directory)
    return values


def read_steps(commit: Commit) -> None:
    """The coordinate other readers go by must be the committed steps. Raises StoreCorrupt."""
    steps = read_small(commit.path, fmt.STEP, len(commit.steps), commit.small.get(fmt.STEP))
    if not np.array_equal(steps, commit.steps):
        raise StoreCorrupt("does not hold the committed steps", file=commit.path / fmt.STEP)


def read_scalar(commit: Commit, name: str) -> F64:
    return read_small(commit.path, name, len(commit.steps), commit.small[name])


def read_sketch_rows(commit: Commit) -> I64:
    """(S,) rows of the sketch, inside the trajectory. Raises StoreCorrupt."""
    rows: I64 = read_small(commit.path, fmt.SKETCH_ROW, None, commit.small[fmt.SKETCH_ROW])
    if len(rows) and not (int(rows.min()) >= 0 and int(rows.max()) < commit.map.n_rows):
        raise StoreCorrupt("its rows are not those of the trajectory", file=commit.path / fmt.SKETCH_ROW)
    return rows


def check_sketch(commit: Commit, n_candidates: int) -> None:
    """The sketch's metadata must fit the commit. Raises StoreCorrupt."""
    directory = own_directory(commit.path, fmt.SKETCH)
    document, _ = fmt.read_document(directory / fmt.DOCUMENT, "array", "small")
    array = fmt.check_array(
        document, directory / fmt.DOCUMENT, SAMPLE_BY_SNAPSHOT, commit.storage.fill, may_be_compressed=True
    )
    if array.zarr_type != commit.storage.zarr or array.shape[1] < len(commit.steps):
        raise StoreCorrupt(
            f"holds {array.shape[1]} snapshots of {array.zarr_type}, "
            f"{len(commit.steps)} of {commit.storage.zarr} committed",
            file=directory,
        )
    if array.zstd_level != commit.zstd_level:
        raise StoreCorrupt(
            f"has zstd level {array.zstd_level}, {fmt.WEIGHTS} has {commit.zstd_level}",
            file=directory / fmt.DOCUMENT,
        )
    if array.chunks != (max(n_candidates, 1), 1):
        raise StoreCorrupt(f"is cut into chunks {array.chunks}", file=directory / fmt.DOCUMENT)
    if array.shape[0] != n_candidates:
        raise StoreCorrupt(
            f"holds {array.shape[0]} samples, {n_candidates} are in {fmt.SKETCH_ROW}", file=directory
        )


# ---- writing --------------------------------------------------------------------------------------------


def small_document(name: str, length: int) -> fmt.Json:
    attributes: dict[str, Any] = {"cmdgpu": fmt.own("small")}
    kind, fill = small_type(name)
    if name != fmt.STEP:
        attributes["coordinates"] = fmt.STEP
    return fmt.array_document((length,), (fmt.SMALL_CHUNK,), kind, ("snapshot",), fill, attributes)


def sketch_row_document(n_candidates: int) -> fmt.Json:
    kind, fill = small_type(fmt.SKETCH_ROW)
    attributes = {"cmdgpu": fmt.own("small")}
    return fmt.array_document(
        (n_candidates,), (max(n_candidates, 1),), kind, ("sample",), fill, attributes
    )  # fmt: skip


def sketch_document(n_candidates: int, length: int, storage: fmt.Storage, zstd_level: int | None) -> fmt.Json:
    return fmt.array_document(
        (n_candidates, length), (max(n_candidates, 1), 1), storage.zarr, SAMPLE_BY_SNAPSHOT, storage.fill,
        {"coordinates": fmt.STEP, "cmdgpu": fmt.own("small")}, zstd_level,
    )  # fmt: skip


def write_series(directory: Path, name: str, values: AnyArray, first: int) -> None:
    """Chunks ``first`` and on of ``step`` or a scalar, then its shape; its names last."""
    _, fill = small_type(name)
    for i in range(first, (len(values) - 1) // fmt.SMALL_CHUNK + 1):
        chunk = np.full(fmt.SMALL_CHUNK, fill, dtype=values.dtype.newbyteorder("<"))
        part = values[i * fmt.SMALL_CHUNK : (i + 1) * fmt.SMALL_CHUNK]
        chunk[: len(part)] = part
        write_chunk(directory, fmt.chunk_name(i), chunk)
    write_document(directory, small_document(name, len(values)))


def write_sketch_rows(directory: Path, rows: I64) -> None:
    if len(rows):
        write_chunk(directory, fmt.chunk_name(0), rows.astype("<i8"))
    write_document(directory, sketch_row_document(len(rows)))


def write_document(directory: Path, document: fmt.Json) -> None:
    durable.write_file(directory, fmt.DOCUMENT, [fmt.encode(document)])
    durable.flush_directory(directory)
