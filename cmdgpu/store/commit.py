"""The metadata of one commit: the immutable group document and ``weights/zarr.json``, checked against each
other. Whoever holds a ``Commit`` knows N, T, the digests and the map; nothing else has been read yet.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from cmdgpu.errors import NotAStore, StoreCorrupt, UsageError, printable
from cmdgpu.notation import I64
from cmdgpu.store import format as fmt
from cmdgpu.store.parameter_map import ParameterMap
from cmdgpu.store.places import Place, RemotePath, local_path
from cmdgpu.store.provenance import Origin, sources_from_json

_MAX_CHUNKS = 1 << 22
"""More chunks than a column has at its default size: 10^12 rows."""
PARAMETER_BY_SNAPSHOT = ("parameter", "snapshot")


@dataclass(frozen=True)
class Commit:
    path: Place
    map: ParameterMap
    dtype: str
    """Element type on disk: float32, float16 or bfloat16."""
    rows: int
    """Rows per chunk."""
    zstd_level: int | None
    """Of the chunks of weights and sketch; None where they are not compressed."""
    unit: str
    """What a step counts: step, epoch, ..."""
    layout: str
    """Digest of the group document: ties the map to the data."""
    steps: I64
    digests: tuple[str, ...]
    small: dict[str, Any]
    """Digests of the small arrays by name."""
    sources: tuple[Origin | None, ...]
    """(T,) what each snapshot was imported from; None where it was recorded."""
    raw: bytes
    """``weights/zarr.json`` as it was read."""

    @property
    def is_local(self) -> bool:
        """Whether its chunks are files of this machine."""
        return isinstance(self.path, Path)

    @property
    def folder(self) -> Path:
        """``path``, for whoever writes here. Raises UsageError for a store elsewhere."""
        return self.path if isinstance(self.path, Path) else local_path(str(self.path), "writing")

    @property
    def n_chunks(self) -> int:
        """Chunks in a column."""
        return -(-self.map.n_rows // self.rows)

    @property
    def is_compressed(self) -> bool:
        return self.zstd_level is not None

    @property
    def storage(self) -> fmt.Storage:
        return fmt.storage(self.dtype)

    @property
    def scalar_names(self) -> list[str]:
        return sorted(name for name in self.small if name not in fmt.RESERVED)

    @property
    def has_sketch(self) -> bool:
        return fmt.SKETCH_ROW in self.small

    def chunk_path(self, i: int, t: int) -> Place:
        return self.path / fmt.WEIGHTS / fmt.chunk_name(i, t)

    def sketch_path(self, t: int) -> Place:
        return self.path / fmt.SKETCH / fmt.chunk_name(0, t)


def require_store(path: Place) -> None:
    """Refuse a path that is not there or holds no Zarr group, in words."""
    if isinstance(path, RemotePath) and (path / fmt.DOCUMENT).exists():
        return  # one question to the server, which need not list
    if not path.exists():
        raise UsageError("there is nothing here", file=path, hint="check the path")
    if not path.is_dir() or not (path / fmt.DOCUMENT).exists():
        raise NotAStore("is no store of cmdgpu", file=path, hint="expected a folder made by Recorder or fit")


@overload
def own_directory(path: Path, name: str) -> Path: ...
@overload
def own_directory(path: RemotePath, name: str) -> RemotePath: ...
def own_directory(path: Place, name: str) -> Place:
    """The directory of an array, which lies in the store and not behind a symbolic link."""
    directory = path / name
    if directory.is_symlink():
        raise StoreCorrupt("is a symbolic link", file=directory)
    return directory


def read_commit(path: Place) -> Commit:
    """Raises NotAStore for a path that is no trajectory of this format, StoreCorrupt for a damaged one."""
    require_store(path)
    group, _ = fmt.read_document(path / fmt.DOCUMENT, "group", "trajectory")
    mine = group["attributes"]["cmdgpu"]
    file = own_directory(path, fmt.WEIGHTS) / fmt.DOCUMENT
    document, raw = fmt.read_document(file, "array", "weights")
    array = fmt.check_array(document, file, PARAMETER_BY_SNAPSHOT, may_be_compressed=True)
    head = document["attributes"]["cmdgpu"]
    parameter_map = ParameterMap.from_json(mine.get("layout"), path / fmt.DOCUMENT)
    dtype = head.get("torch_dtype", array.zarr_type)
    steps = fmt.as_list(head.get("steps"))
    digests, small = fmt.as_list(head.get("digests")), fmt.as_dict(head.get("small"))

    def refuse(what: str) -> StoreCorrupt:
        return StoreCorrupt(printable(what, 240), file=file)

    if not isinstance(dtype, str) or getattr(fmt.STORAGES.get(dtype), "zarr", None) != array.zarr_type:
        raise refuse(f"holds {array.zarr_type} read as {dtype}")
    fill = fmt.storage(dtype).fill
    fmt.check_array(document, file, PARAMETER_BY_SNAPSHOT, fill, may_be_compressed=True)
    if head.get("layout") != mine["self"]:
        raise refuse("belongs to another layout")
    if array.shape[0] != parameter_map.n_rows or array.chunks[1] != 1 or array.chunks[0] % fmt.ROW_QUANTUM:
        raise refuse(
            f"has shape {array.shape} in chunks {array.chunks}, {parameter_map.n_rows} rows expected"
        )
    if array.shape[0] > array.chunks[0] * _MAX_CHUNKS:
        raise refuse(f"claims {array.shape[0]} rows in chunks of {array.chunks[0]}")
    unit = mine.get("unit", "step")
    if not (isinstance(unit, str) and unit.isprintable() and len(unit) <= 64):
        raise refuse("has a unit that is no word")
    if (
        steps is None
        or not all(type(step) is int and 0 <= step < 1 << 63 for step in steps)
        or any(b <= a for a, b in itertools.pairwise(steps))
    ):
        raise refuse("its steps do not increase")
    if digests is None or small is None:
        raise refuse("has no digests")
    names = (name for name in small if name not in fmt.RESERVED)
    if strange := [name for name in names if not fmt.SCALAR_NAME.fullmatch(name)]:
        raise refuse(f"has a scalar named {printable(strange[0])!r}")
    if not len(steps) == len(digests) == array.shape[1]:
        raise refuse(f"has {array.shape[1]} snapshots, {len(steps)} steps and {len(digests)} digests")
    try:
        sources = sources_from_json(head.get("sources"), len(steps))
    except ValueError as error:
        raise refuse(f"its sources cannot be read: {error}") from error
    return Commit(
        path=path,
        map=parameter_map,
        dtype=dtype,
        rows=array.chunks[0],
        zstd_level=array.zstd_level,
        unit=unit,
        layout=str(mine["self"]),
        steps=np.array(steps, dtype=np.int64),
        digests=tuple(str(digest) for digest in digests),
        small=small,
        sources=sources,
        raw=raw,
    )
