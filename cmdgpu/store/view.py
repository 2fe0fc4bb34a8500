"""What a reader sees: one trajectory, frozen at one commit.

``weights/zarr.json`` is read once; its T and its digests hold for the life of the view. Committed chunks
never change, so this is snapshot isolation for free: a recorder may append meanwhile.
"""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cmdgpu.errors import NotAStore, StoreCorrupt, UsageError, printable
from cmdgpu.notation import F64, I64, AnyArray
from cmdgpu.store import format as fmt
from cmdgpu.store.chunks import ChunkDamage, read_chunk, stored_crc
from cmdgpu.store.parameter_map import ParameterMap

PARAMETER_BY_SNAPSHOT = ("parameter", "snapshot")
SAMPLE_BY_SNAPSHOT = ("sample", "snapshot")


@dataclass(frozen=True)
class StoreView:
    path: Path
    map: ParameterMap
    dtype: str
    """Element type on disk: float32, float16 or bfloat16."""
    rows: int
    """Rows per chunk."""
    unit: str
    """What a step counts: step, epoch, ..."""
    layout: str
    """Digest of the group document: ties the map to the data."""
    steps: I64
    digests: tuple[str, ...]
    scalars: dict[str, F64]
    sketch_rows: I64 | None
    commit: bytes
    """The commit document as it was read."""
    _crcs: dict[int, list[bytes]] = field(default_factory=dict[int, list[bytes]], repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    # ---- opening ------------------------------------------------------------------------------------

    @staticmethod
    def open(path: Path) -> StoreView:
        """Read and check the metadata and the small arrays.

        Raises NotAStore for a path that is no trajectory of this format, StoreCorrupt for a damaged one.
        """
        require_store(path)
        group, _ = fmt.read_document(path / fmt.DOCUMENT, "group", "trajectory")
        mine = group["attributes"]["cmdgpu"]
        weights = _own_directory(path, fmt.WEIGHTS)
        document, commit = fmt.read_document(weights / fmt.DOCUMENT, "array", "weights")
        array = fmt.check_array(document, weights / fmt.DOCUMENT, PARAMETER_BY_SNAPSHOT)
        head = document["attributes"]["cmdgpu"]
        parameter_map = ParameterMap.from_json(mine.get("layout"), path / fmt.DOCUMENT)
        dtype = head.get("torch_dtype", array.zarr_type)
        steps = fmt.as_list(head.get("steps"))
        digests, small = fmt.as_list(head.get("digests")), fmt.as_dict(head.get("small"))

        def refuse(what: str) -> StoreCorrupt:
            return StoreCorrupt(what, file=weights / fmt.DOCUMENT)

        if not isinstance(dtype, str) or getattr(fmt.STORAGES.get(dtype), "zarr", None) != array.zarr_type:
            raise refuse(f"holds {array.zarr_type} read as {dtype}")
        storage = fmt.storage(dtype)
        fmt.check_array(document, weights / fmt.DOCUMENT, PARAMETER_BY_SNAPSHOT, storage.fill)
        if head.get("layout") != mine["self"]:
            raise refuse("belongs to another layout")
        if (
            array.shape[0] != parameter_map.n_rows
            or array.chunks[1] != 1
            or array.chunks[0] % fmt.ROW_QUANTUM
        ):
            raise refuse(
                f"has shape {array.shape} in chunks {array.chunks}, {parameter_map.n_rows} rows expected"
            )
        if (
            steps is None
            or not all(type(step) is int and 0 <= step < 1 << 63 for step in steps)
            or any(b <= a for a, b in itertools.pairwise(steps))
        ):
            raise refuse("its steps do not increase")
        if digests is None or small is None:
            raise refuse("has no digests")
        names = sorted(name for name in small if name not in fmt.RESERVED)
        if strange := [name for name in names if not fmt.SCALAR_NAME.fullmatch(name)]:
            raise refuse(f"has a scalar named {printable(strange[0])!r}")
        if not len(steps) == len(digests) == array.shape[1]:
            raise refuse(f"has {array.shape[1]} snapshots, {len(steps)} steps and {len(digests)} digests")
        step_n = read_small(path, fmt.STEP, len(steps), small.get(fmt.STEP))
        if step_n.tolist() != steps:
            raise StoreCorrupt("does not hold the committed steps", file=path / fmt.STEP)
        sketch_rows = None
        if fmt.SKETCH_ROW in small:
            sketch_rows = read_small(path, fmt.SKETCH_ROW, None, small[fmt.SKETCH_ROW])
            _check_sketch(path, parameter_map, sketch_rows, storage, len(steps))
        scalars = {name: read_small(path, name, len(steps), small[name]) for name in names}
        return StoreView(
            path=path,
            map=parameter_map,
            dtype=dtype,
            rows=array.chunks[0],
            unit=str(mine.get("unit", "step")),
            layout=str(mine["self"]),
            steps=np.array(steps, dtype=np.int64),
            digests=tuple(str(digest) for digest in digests),
            scalars=scalars,
            sketch_rows=sketch_rows,
            commit=commit,
        )

    # ---- geometry -----------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        return self.map.n_rows, len(self.steps)

    @property
    def n_chunks(self) -> int:
        """Chunks in a column."""
        return -(-self.map.n_rows // self.rows)

    @property
    def storage(self) -> fmt.Storage:
        return fmt.storage(self.dtype)

    def chunk_path(self, i: int, t: int) -> Path:
        return self.path / fmt.WEIGHTS / fmt.chunk_name(i, t)

    @property
    def stored_bytes(self) -> int:
        """Bytes of weights and sketch on disk."""
        per_chunk = self.rows * self.storage.numpy.itemsize + fmt.CRC_BYTES
        sketch = 0
        if self.sketch_rows is not None:
            sketch = len(self.sketch_rows) * self.storage.numpy.itemsize + fmt.CRC_BYTES
        return len(self.steps) * (self.n_chunks * per_chunk + sketch)

    # ---- reading ------------------------------------------------------------------------------------

    def crcs(self, t: int) -> list[bytes]:
        """The committed CRC of every chunk of column t, the sketch chunk last.

        First contact with a column: presence, type, size and the CRC each file carries; together they
        must reproduce the committed digest. So even a read of one chunk learns of a missing, swapped or
        stale one anywhere in its column.
        """
        with self._lock:
            if t not in self._crcs:
                self._crcs[t] = self._first_contact(t)
            return self._crcs[t]

    def _first_contact(self, t: int) -> list[bytes]:
        itemsize = self.storage.numpy.itemsize
        found: list[bytes] = []
        for i in range(self.n_chunks):
            try:
                found.append(stored_crc(self.chunk_path(i, t), self.rows * itemsize))
            except ChunkDamage as damage:
                raise self._corrupt(str(damage), i, t) from damage
        if self.sketch_rows is not None:
            path = self.path / fmt.SKETCH / fmt.chunk_name(0, t)
            try:
                found.append(stored_crc(path, len(self.sketch_rows) * itemsize))
            except ChunkDamage as damage:
                raise self._corrupt_sketch(str(damage), t) from damage
        if fmt.sha256(*found) != self.digests[t]:
            raise StoreCorrupt(
                "its chunks are not the ones that were committed (swapped, stale or foreign)",
                file=self.path / fmt.WEIGHTS / f"c.*.{t}",
                tensor=self.map.name_rows(0, self.map.n_rows),
                step=int(self.steps[t]),
                hint=_REMEDY,
            )
        return found

    def read_chunk(self, i: int, t: int, out: AnyArray) -> None:
        """Chunk i of column t, checked, into ``out`` (rows,) of the stored type."""
        kept = self.crcs(t)[i]
        try:
            read_chunk(self.chunk_path(i, t), out, kept)
        except ChunkDamage as damage:
            raise self._corrupt(str(damage), i, t) from damage

    def read_sketch(self, t: int) -> AnyArray:
        """(S,) stored values of the candidate rows at column t."""
        assert self.sketch_rows is not None
        out = np.empty(len(self.sketch_rows), dtype=self.storage.numpy)
        try:
            read_chunk(self.path / fmt.SKETCH / fmt.chunk_name(0, t), out, self.crcs(t)[-1])
        except ChunkDamage as damage:
            raise self._corrupt_sketch(str(damage), t) from damage
        return out

    def _corrupt(self, problem: str, i: int, t: int) -> StoreCorrupt:
        start, stop = i * self.rows, min((i + 1) * self.rows, self.map.n_rows)
        return StoreCorrupt(
            f"rows {start}..{stop - 1} of {fmt.WEIGHTS}: {problem}",
            file=self.chunk_path(i, t),
            tensor=self.map.name_rows(start, stop),
            step=int(self.steps[t]),
            hint=_REMEDY,
        )

    def _corrupt_sketch(self, problem: str, t: int) -> StoreCorrupt:
        path = self.path / fmt.SKETCH / fmt.chunk_name(0, t)
        return StoreCorrupt(problem, file=path, step=int(self.steps[t]), hint=_REMEDY)


_REMEDY = "`cmdgpu verify` lists all damage; the other snapshots stay usable with sel(steps=...)"


def require_store(path: Path) -> None:
    """Refuse a path that is not there or holds no Zarr group, in words."""
    if not path.exists():
        raise UsageError("there is nothing here", file=path, hint="check the path")
    if not path.is_dir() or not (path / fmt.DOCUMENT).exists():
        raise NotAStore("is no store of cmdgpu", file=path, hint="expected a folder made by Recorder or fit")


def _own_directory(path: Path, name: str) -> Path:
    """The directory of an array, which lies in the store and not behind a symbolic link."""
    directory = path / name
    if directory.is_symlink():
        raise StoreCorrupt("is a symbolic link", file=directory)
    return directory


def read_small(path: Path, name: str, length: int | None, digest: object) -> Any:
    """The first ``length`` values (all when None) of a small array, checked against its digest."""
    directory = _own_directory(path, name)
    document, _ = fmt.read_document(directory / fmt.DOCUMENT, "array", "small")
    dims = ("sample",) if name == fmt.SKETCH_ROW else ("snapshot",)
    kind, fill = small_type(name)
    array = fmt.check_array(document, directory / fmt.DOCUMENT, dims, fill)
    if array.zarr_type != kind:
        raise StoreCorrupt(f"holds {array.zarr_type}", file=directory / fmt.DOCUMENT)
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
    if fmt.sha256(values.tobytes()) != digest:
        raise StoreCorrupt("does not hold the committed values", file=directory)
    return values


def small_type(name: str) -> tuple[str, float | int]:
    """Element type of a small array, and what stands where nothing was written."""
    if name in (fmt.STEP, fmt.SKETCH_ROW):
        return "int64", int(np.iinfo(np.int64).min)
    return "float64", float("nan")


def _check_sketch(
    path: Path, parameter_map: ParameterMap, sketch_rows: I64, storage: fmt.Storage, n_snapshots: int
) -> None:
    directory = _own_directory(path, fmt.SKETCH)
    document, _ = fmt.read_document(directory / fmt.DOCUMENT, "array", "small")
    array = fmt.check_array(document, directory / fmt.DOCUMENT, SAMPLE_BY_SNAPSHOT, storage.fill)
    if array.zarr_type != storage.zarr or array.shape[1] < n_snapshots:
        raise StoreCorrupt(
            f"holds {array.shape[1]} snapshots of {array.zarr_type}, "
            f"{n_snapshots} of {storage.zarr} committed",
            file=directory,
        )
    inside = len(sketch_rows) == 0 or (
        int(sketch_rows.min()) >= 0 and int(sketch_rows.max()) < parameter_map.n_rows
    )
    if array.shape[0] != len(sketch_rows) or not inside:
        raise StoreCorrupt("its rows are not those of the trajectory", file=path / fmt.SKETCH_ROW)
