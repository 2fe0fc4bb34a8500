"""A decomposition, in memory or on disk: references, four numbers per row, statistics; units, their ledger.

On disk a running fit lives under ``<out>.<fingerprint>.partial`` and gets its name when it is complete. A
unit's chunks are made durable first, then its done record, which binds them to the run: a killed fit goes on
where it stopped, and a unit done twice, or late by a zombie, writes the same bytes.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, cast

import numpy as np

from cmdgpu.errors import CmdgpuError, NotAStore, StoreCorrupt, StoreExists
from cmdgpu.indexing import Index, positions
from cmdgpu.notation import F32, F64, I16, I64, U8, AnyArray
from cmdgpu.progress import Progress, Silent
from cmdgpu.statistics import FIELDS, N_BINS, Totals, UnitStatistics, summarise
from cmdgpu.store import durable
from cmdgpu.store import format as fmt
from cmdgpu.store.chunks import ChunkDamage, crc32c, read_chunk, stored_crc
from cmdgpu.store.parameter_map import ParameterMap
from cmdgpu.store.verification import Damage, Verification
from cmdgpu.store.view import require_store

_WRITERS: Final = 3
_UNIT_ARRAYS: Final = (*fmt.RESULT_ROWS, "segment_stats", "unit_hist")
_DONE: Final = "done"


@dataclass(frozen=True)
class ModeSet:
    """What a fit decides before the pass: the sample, its clustering, the references."""

    references: F32
    """R_mt (M, T)"""
    reference_rows: I64
    """(M,)"""
    sample_rows: I64
    """(K,) ascending"""
    sample_labels: I16
    """(K,) mode of each, -1 constant, -2 non-finite"""
    sample: F32
    """(K, T)"""
    linkage: F64
    """(K' - 1, 4)"""

    @property
    def n_modes(self) -> int:
        return len(self.references)

    def digests(self) -> dict[str, str]:
        return {
            field.name: fmt.sha256(np.ascontiguousarray(getattr(self, field.name)).tobytes())
            for field in dataclasses.fields(self)
        }


_MODE_ARRAYS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "references": ("float32", ("mode", "snapshot")),
    "reference_rows": ("int64", ("mode",)),
    "sample_rows": ("int64", ("sample",)),
    "sample_labels": ("int16", ("sample",)),
    "sample": ("float32", ("sample", "snapshot")),
    "linkage": ("float64", ("merge", "field")),
}


@dataclass(frozen=True)
class Provenance:
    """Everything the numbers depend on; two fits of one fingerprint write the same bytes."""

    source: Mapping[str, Any]
    config: Mapping[str, Any]
    code: Mapping[str, Any]
    origin: str | None = None
    """Where the trajectory lies, seen from the result's parent: a hint, and no part of the fingerprint."""

    @property
    def fingerprint(self) -> str:
        return fmt.sha256(fmt.canonical({"format": fmt.FORMAT, **self._settings()}))

    def _settings(self) -> dict[str, Any]:
        return {"source": dict(self.source), "config": dict(self.config), "code": dict(self.code)}

    def to_json(self) -> dict[str, Any]:
        return {**self._settings(), "origin": self.origin}

    def difference(self, other: Mapping[str, Any]) -> str:
        """The first setting that differs, as text: ``config n_modes: 10 there, 5 asked``."""
        for part, mine in self._settings().items():
            theirs = cast(Mapping[str, Any], other.get(part, {}))
            for key in sorted({*mine, *theirs}):
                if mine.get(key) != theirs.get(key):
                    shown = f"{_short(theirs.get(key))} there, {_short(mine.get(key))} asked"
                    return f"{part} {key}: {shown}"
        return "the format"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 48 else f"{text[:45]}..."


@dataclass(frozen=True)
class UnitRows:
    """The fits of one unit's rows, (n,) each."""

    mode: I16
    a: F32
    b: F32
    correlation: F32


@dataclass(frozen=True)
class Frame:
    """The shape of a result: whose rows, at which steps, in which units."""

    map: ParameterMap
    steps: I64
    rows: int
    """Rows per unit."""

    @property
    def n_rows(self) -> int:
        return self.map.n_rows

    @property
    def n_units(self) -> int:
        return -(-self.n_rows // self.rows)

    def unit(self, i: int) -> tuple[int, int]:
        """[start, stop) of the rows of unit i."""
        return i * self.rows, min((i + 1) * self.rows, self.n_rows)


@dataclass(frozen=True)
class Result:
    """A complete decomposition."""

    frame: Frame
    modes: ModeSet
    mode: RowArray
    a: RowArray
    b: RowArray
    correlation: RowArray
    totals: Totals
    provenance: Mapping[str, Any]
    """source, config, code, origin"""
    n_bytes: int
    """Bytes of everything needed to rebuild: references and four numbers per row."""
    path: Path | None = None

    @property
    def metrics(self) -> dict[str, Any]:
        return summarise(self.totals, self.frame.map, len(self.frame.steps))


class RowArray(Protocol):
    """(N,) array-like: a NumPy array, or chunks on disk."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...

    def __array__(self, *args: Any, **kwargs: Any) -> AnyArray: ...


class ResultWriter(Protocol):
    """Where the pass leaves its units."""

    @property
    def modes(self) -> ModeSet: ...

    def is_done(self, unit: int) -> bool: ...

    def write(self, unit: int, rows: UnitRows, statistics: UnitStatistics) -> None:
        """Keep one unit; whole and durable when this returns. Units may come in any order."""
        ...

    def finish(self) -> Result: ...


def result_bytes(n_rows: int, n_modes: int, n_snapshots: int) -> int:
    """mode 2 + a 4 + b 4 + correlation 4 bytes a row, and the references."""
    return 14 * n_rows + 4 * n_modes * n_snapshots


# ---- in memory ------------------------------------------------------------------------------------------


class MemoryWriter:
    """14 bytes per row in plain arrays."""

    def __init__(self, frame: Frame, modes: ModeSet, provenance: Provenance) -> None:
        self.modes = modes
        self._frame = frame
        self._provenance = provenance
        self._arrays = {
            name: np.full(frame.n_rows, fill, dtype=kind) for name, (kind, fill) in fmt.RESULT_ROWS.items()
        }
        self._statistics: dict[int, UnitStatistics] = {}

    def is_done(self, unit: int) -> bool:
        return unit in self._statistics

    def write(self, unit: int, rows: UnitRows, statistics: UnitStatistics) -> None:
        start, stop = self._frame.unit(unit)
        for name, values in self._arrays.items():
            values[start:stop] = getattr(rows, name)
        self._statistics[unit] = statistics

    def finish(self) -> Result:
        totals = Totals.zero(self._frame.map, self.modes.n_modes)
        for unit in range(self._frame.n_units):
            start, stop = self._frame.unit(unit)
            totals.add(self._frame.map, start, stop - start, self._statistics[unit])
        n_rows, n_snapshots = self._frame.n_rows, len(self._frame.steps)
        return Result(
            frame=self._frame,
            modes=self.modes,
            mode=self._arrays["mode"],
            a=self._arrays["a"],
            b=self._arrays["b"],
            correlation=self._arrays["correlation"],
            totals=totals,
            provenance=self._provenance.to_json(),
            n_bytes=result_bytes(n_rows, self.modes.n_modes, n_snapshots),
        )


# ---- on disk --------------------------------------------------------------------------------------------


def partial_path(out: Path, fingerprint: str) -> Path:
    return out.parent / f"{out.name}.{fingerprint[:16]}{durable.PARTIAL}"


def partials_of(out: Path) -> list[Path]:
    """Unfinished fits that would become ``out``."""
    pattern = re.compile(re.escape(out.name) + r"\.[0-9a-f]{16}\.partial")
    if not out.parent.is_dir():
        return []
    return sorted(path for path in out.parent.iterdir() if pattern.fullmatch(path.name) and path.is_dir())


def require_result(out: Path) -> None:
    """Refuse a path where no result is; a fit that has not finished is named with how far it is."""
    if not out.exists():
        for partial in partials_of(out):
            done, total = progress_of(partial)
            raise CmdgpuError(
                f"this fit is not finished: {done} of {total} units done",
                file=out,
                hint="run the same `cmdgpu fit` again, it goes on where it stopped",
            )
    require_store(out)


def progress_of(partial: Path) -> tuple[int, int]:
    """(units done, units in all) of an unfinished fit."""
    document, _ = fmt.read_document(partial / fmt.DOCUMENT, "group", "result")
    done = len(list((partial / _DONE).glob("c.*.0")))
    return done, int(document["attributes"]["cmdgpu"]["units"]["count"])


def begin_result(
    out: Path, frame: Frame, provenance: Provenance, make_modes: Callable[[], ModeSet], *, resume: bool
) -> StoredWriter | Result:
    """The writer of a fit that is to end up at ``out``; the result itself when it is there already.

    ``make_modes`` (sample and cluster) is called only when no unfinished fit of this fingerprint is found:
    its references are then taken from disk, since a second clustering could split a near-tie differently.
    Raises StoreExists, naming the setting that differs, for another fit at ``out`` or unfinished beside it;
    ``resume=False`` throws unfinished ones away, never a finished one.
    """
    if out.exists() or out.is_symlink():
        return _same_or_refuse(out, provenance)
    mine = partial_path(out, provenance.fingerprint)
    for partial in partials_of(out):
        if not resume:
            shutil.rmtree(partial)
        elif partial != mine:
            document, _ = fmt.read_document(partial / fmt.DOCUMENT, "group", "result")
            difference = provenance.difference(document["attributes"]["cmdgpu"])
            raise StoreExists(
                f"an unfinished fit with other settings is here ({difference})",
                file=partial,
                hint="finish that one, choose another output, or start over with --no-resume",
            )
    if not mine.exists():
        _create(mine, frame, provenance, make_modes())
    return StoredWriter(out, mine, frame, provenance)


def _same_or_refuse(out: Path, provenance: Provenance) -> Result:
    try:
        document, _ = fmt.read_document(out / fmt.DOCUMENT, "group", "result")
    except CmdgpuError as error:
        raise StoreExists("something else is here", file=out, hint="choose another output") from error
    if document["attributes"]["cmdgpu"]["fingerprint"] == provenance.fingerprint:
        return open_result(out)
    difference = provenance.difference(document["attributes"]["cmdgpu"])
    raise StoreExists(
        f"a fit with other settings is here ({difference})", file=out, hint="choose another output"
    )


def _create(path: Path, frame: Frame, provenance: Provenance, modes: ModeSet) -> None:
    durable.make_directory(path.parent)
    building = path.parent / durable.partial_name(path.name)
    durable.make_directory(building)
    try:
        for name, (kind, dims) in _MODE_ARRAYS.items():
            values = np.ascontiguousarray(getattr(modes, name))
            chunks = tuple(max(size, 1) for size in values.shape)
            _create_array(building, name, values.shape, chunks, kind, dims, 0)
            if values.size:
                file = fmt.chunk_name(*[0] * values.ndim)
                durable.write_file(building / name, file, [durable.bytes_of(values), crc32c(values)])
        n, units = frame.n_rows, frame.n_units
        for name, (kind, fill) in fmt.RESULT_ROWS.items():
            _create_array(building, name, (n,), (frame.rows,), kind, ("parameter",), fill)
        stats = _statistics_shapes(frame, modes.n_modes)
        _create_array(building, "segment_stats", (units, *stats[0]), (1, *stats[0]), "float64",
                      ("unit", "segment", "field", "class"), float("nan"))  # fmt: skip
        _create_array(building, "unit_hist", (units, *stats[1]), (1, *stats[1]), "int64",
                      ("unit", "mode", "bin"), -1)  # fmt: skip
        _create_array(building, _DONE, (units, 32), (1, 32), "uint8", ("unit", "byte"), 0)
        head = fmt.own(
            "result",
            status="incomplete",
            fingerprint=provenance.fingerprint,
            digests=modes.digests(),
            units={"rows": frame.rows, "count": units},
            steps=frame.steps.tolist(),
            layout=frame.map.to_json(),
            **provenance.to_json(),
        )
        durable.write_file(building, fmt.DOCUMENT, [fmt.encode(fmt.group_document({"cmdgpu": head}))])
        for directory in (*(p for p in building.iterdir() if p.is_dir()), building):
            durable.flush_directory(directory)
        try:
            durable.publish_directory(building, path)
        except StoreExists:
            if not path.exists():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _statistics_shapes(frame: Frame, n_modes: int) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """A chunk per unit must hold the unit with the most segments; histograms of no mode keep one row."""
    most = max((len(frame.map.segments(*frame.unit(i))) for i in range(frame.n_units)), default=0)
    return (max(most, 1), len(FIELDS), 2 + n_modes), (max(n_modes, 1), N_BINS)


def _create_array(
    parent: Path, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], kind: str,
    dims: tuple[str, ...], fill: float | int,
) -> None:  # fmt: skip
    durable.make_directory(parent / name)
    document = fmt.array_document(shape, chunks, kind, dims, fill, {"cmdgpu": fmt.own("result-array")})
    durable.write_file(parent / name, fmt.DOCUMENT, [fmt.encode(document)])


class _Ledger:
    """The units of a result on disk: their chunk files, their CRCs, their done records."""

    def __init__(self, path: Path, frame: Frame, n_modes: int, fingerprint: str, plan: str) -> None:
        self.path = path
        self.frame = frame
        self._binding = f"{fingerprint}\n{plan}\n".encode()
        stats, hist = _statistics_shapes(frame, n_modes)
        self._chunks: dict[str, tuple[tuple[int, ...], np.dtype[Any], float | int]] = {
            name: ((frame.rows,), np.dtype(kind), fill) for name, (kind, fill) in fmt.RESULT_ROWS.items()
        }
        self._chunks["segment_stats"] = ((1, *stats), np.dtype(np.float64), 0.0)
        self._chunks["unit_hist"] = ((1, *hist), np.dtype(np.int64), 0)

    def file(self, name: str, unit: int) -> Path:
        zeros = [0] * (len(self._chunks[name][0]) - 1)
        return self.path / name / fmt.chunk_name(unit, *zeros)

    def empty(self, name: str) -> AnyArray:
        """A chunk of fill values."""
        shape, kind, fill = self._chunks[name]
        return np.full(shape, fill, dtype=kind)

    def read(self, name: str, unit: int, kept: bytes | None = None) -> AnyArray:
        """A whole chunk, checked. Raises StoreCorrupt naming the file and its rows."""
        shape, kind, _ = self._chunks[name]
        out = np.empty(shape, dtype=kind)
        try:
            read_chunk(self.file(name, unit), out, kept)
        except ChunkDamage as damage:
            raise self.corrupt(name, unit, str(damage)) from damage
        return out

    def corrupt(self, name: str, unit: int, problem: str) -> StoreCorrupt:
        start, stop = self.frame.unit(unit)
        return StoreCorrupt(
            f"rows {start}..{stop - 1} of {name}: {problem}",
            file=self.file(name, unit)
            if name in self._chunks
            else self.path / name / fmt.chunk_name(unit, 0),
            tensor=self.frame.map.name_rows(start, stop),
            hint="fit again into a new output; `cmdgpu verify` lists all damage",
        )

    def record(self, unit: int, crcs: list[bytes]) -> U8:
        """SHA-256 over run, plan, unit and the CRCs of its chunks: what makes them this unit's."""
        digest = fmt.sha256(self._binding, unit.to_bytes(8, "little"), *crcs)
        return np.frombuffer(bytes.fromhex(digest), dtype=np.uint8).reshape(1, 32)

    def crcs(self, unit: int) -> list[bytes]:
        """The CRCs of a unit's chunks, vouched for by its done record. Raises StoreCorrupt."""
        found: list[bytes] = []
        for name, (shape, kind, _) in self._chunks.items():
            try:
                found.append(stored_crc(self.file(name, unit), int(np.prod(shape)) * kind.itemsize))
            except ChunkDamage as damage:
                raise self.corrupt(name, unit, str(damage)) from damage
        said = np.empty((1, 32), dtype=np.uint8)
        try:
            read_chunk(self.path / _DONE / fmt.chunk_name(unit, 0), said)
        except ChunkDamage as damage:
            raise self.corrupt(_DONE, unit, str(damage)) from damage
        if not np.array_equal(said, self.record(unit, found)):
            raise self.corrupt(_DONE, unit, "its chunks are not the ones that were fitted")
        return found

    def totals(self, n_modes: int) -> Totals:
        """Statistics of all units, merged in unit order."""
        totals = Totals.zero(self.frame.map, n_modes)
        for unit in range(self.frame.n_units):
            start, stop = self.frame.unit(unit)
            n_segments = len(self.frame.map.segments(start, stop))
            segments = self.read("segment_stats", unit)[0, :n_segments]
            histogram = self.read("unit_hist", unit)[0, :n_modes]
            totals.add(self.frame.map, start, stop - start, UnitStatistics(segments, histogram))
        return totals


class StoredWriter:
    """Units into ``<out>.<fingerprint>.partial``; ``finish`` gives it its name."""

    def __init__(self, out: Path, partial: Path, frame: Frame, provenance: Provenance) -> None:
        document, _ = fmt.read_document(partial / fmt.DOCUMENT, "group", "result")
        head = document["attributes"]["cmdgpu"]
        self.modes = _read_modes(partial, head)
        self._out = out
        self._partial = partial
        self._frame = frame
        self._ledger = _Ledger(partial, frame, self.modes.n_modes, head["fingerprint"], _plan(head))
        self._document = document

    def is_done(self, unit: int) -> bool:
        """A unit counts when its record is whole and every chunk is, byte for byte, what it vouches for."""
        if not (self._partial / _DONE / fmt.chunk_name(unit, 0)).exists():
            return False
        try:
            for name, kept in zip(_UNIT_ARRAYS, self._ledger.crcs(unit), strict=True):
                self._ledger.read(name, unit, kept)
        except StoreCorrupt:
            return False  # torn by a crash: the unit is computed again, to the same bytes
        return True

    def write(self, unit: int, rows: UnitRows, statistics: UnitStatistics) -> None:
        n = len(rows.mode)
        chunks = {name: self._ledger.empty(name) for name in _UNIT_ARRAYS}
        for name in fmt.RESULT_ROWS:
            chunks[name][:n] = getattr(rows, name)
        chunks["segment_stats"][0, : len(statistics.segments)] = statistics.segments
        chunks["unit_hist"][0, : len(statistics.histogram)] = statistics.histogram

        def put(name: str) -> bytes:
            file, crc = self._ledger.file(name, unit), crc32c(chunks[name])
            durable.write_file(file.parent, file.name, [durable.bytes_of(chunks[name]), crc])
            durable.flush_directory(file.parent)
            return crc

        with ThreadPoolExecutor(_WRITERS, thread_name_prefix="cmdgpu-result") as pool:
            crcs = list(pool.map(put, _UNIT_ARRAYS))
        self._tick_off(unit, crcs)

    def _tick_off(self, unit: int, crcs: list[bytes]) -> None:
        """Only after the data are durable: done before data would acknowledge nothing."""
        record = self._ledger.record(unit, crcs)
        directory = self._partial / _DONE
        durable.write_file(directory, fmt.chunk_name(unit, 0), [record.tobytes(), crc32c(record)])
        durable.flush_directory(directory)

    def finish(self) -> Result:
        """Check every record, merge the statistics in unit order, mark complete, rename.

        ``out`` never exists incomplete. Raises StoreCorrupt naming the unit whose chunks are not the ones
        that were fitted.
        """
        for unit in range(self._frame.n_units):
            self._ledger.crcs(unit)
        totals = self._ledger.totals(self.modes.n_modes)
        head = self._document["attributes"]["cmdgpu"]
        head["status"] = "complete"
        head["metrics"] = _finite(summarise(totals, self._frame.map, len(self._frame.steps)))
        for directory in (p for p in self._partial.iterdir() if p.is_dir()):
            durable.remove_partials(directory)
        durable.write_file(self._partial, fmt.DOCUMENT, [fmt.encode(fmt.seal(self._document))])
        durable.flush_directory(self._partial)
        durable.publish_directory(self._partial, self._out)
        return open_result(self._out)


def _finite(value: Any) -> Any:
    """NaN has no place in strict JSON."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in cast(dict[str, Any], value).items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in cast(list[Any], value)]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _plan(head: Mapping[str, Any]) -> str:
    """What every unit depends on besides the run's settings: the references."""
    return fmt.sha256(fmt.canonical([head["digests"]["references"], head["digests"]["reference_rows"]]))


def _read_modes(path: Path, head: Mapping[str, Any]) -> ModeSet:
    arrays: dict[str, AnyArray] = {}
    for name, (kind, dims) in _MODE_ARRAYS.items():
        document, _ = fmt.read_document(path / name / fmt.DOCUMENT, "array", "result-array")
        array = fmt.check_array(document, path / name / fmt.DOCUMENT, dims)
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


class StoredRows:
    """One of mode, a, b, correlation on disk: (N,), read unit by unit, checked, the last unit kept."""

    def __init__(self, ledger: _Ledger, name: str) -> None:
        self._ledger = ledger
        self._name = name
        self._kept: tuple[int, AnyArray] | None = None

    @property
    def shape(self) -> tuple[int]:
        return (self._ledger.frame.n_rows,)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(fmt.RESULT_ROWS[self._name][0])

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"StoredRows({self._name}, {self.shape[0]} rows, {self.dtype})"

    def _unit(self, unit: int) -> AnyArray:
        if self._kept is None or self._kept[0] != unit:
            kept = self._ledger.crcs(unit)[_UNIT_ARRAYS.index(self._name)]
            self._kept = (unit, self._ledger.read(self._name, unit, kept))
        return self._kept[1]

    def _range(self, start: int, stop: int) -> AnyArray:
        out = np.empty(stop - start, dtype=self.dtype)
        rows = self._ledger.frame.rows
        for unit in range(start // rows, -(-stop // rows)):
            low, high = max(start, unit * rows), min(stop, (unit + 1) * rows)
            out[low - start : high - start] = self._unit(unit)[low - unit * rows : high - unit * rows]
        return out

    def __getitem__(self, index: Any, /) -> Any:
        """NumPy's semantics; only the units that are touched are read."""
        if isinstance(index, slice):
            start, stop, stride = cast(slice, index).indices(len(self))
            if stride == 1:
                return self._range(start, max(stop, start))
        wanted, single = positions(cast(Index, index), len(self))
        rows = self._ledger.frame.rows
        out = np.empty(wanted.shape, dtype=self.dtype)
        for unit in np.unique(wanted // rows).tolist():
            here = wanted // rows == unit
            out[here] = self._unit(unit)[wanted[here] - unit * rows]
        return out[0] if single else out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> AnyArray:
        if copy is False:
            raise ValueError("rows on disk cannot be had without a copy")
        whole = self._range(0, len(self))
        return whole if dtype is None else whole.astype(dtype)


def _open(path: Path) -> tuple[_Ledger, ModeSet, dict[str, Any]]:
    require_result(path)
    document, _ = fmt.read_document(path / fmt.DOCUMENT, "group", "result")
    head = document["attributes"]["cmdgpu"]
    frame = Frame(
        ParameterMap.from_json(head["layout"], path / fmt.DOCUMENT),
        np.array(head["steps"], dtype=np.int64),
        int(head["units"]["rows"]),
    )
    modes = _read_modes(path, head)
    ledger = _Ledger(path, frame, modes.n_modes, head["fingerprint"], _plan(head))
    return ledger, modes, head


def open_result(path: Path) -> Result:
    """A complete result on disk. Raises NotAStore, StoreCorrupt, and CmdgpuError for an unfinished one."""
    ledger, modes, head = _open(path)
    if head["status"] != "complete":
        done, total = progress_of(path)
        raise CmdgpuError(
            f"this fit is not finished: {done} of {total} units done",
            file=path,
            hint="run the same `cmdgpu fit` again, it goes on where it stopped",
        )
    return Result(
        frame=ledger.frame,
        modes=modes,
        mode=StoredRows(ledger, "mode"),
        a=StoredRows(ledger, "a"),
        b=StoredRows(ledger, "b"),
        correlation=StoredRows(ledger, "correlation"),
        totals=ledger.totals(modes.n_modes),
        provenance={part: head[part] for part in ("source", "config", "code", "origin")},
        n_bytes=sum(f.stat().st_size for f in path.rglob("*") if f.is_file()),
        path=path,
    )


def verify_result(path: Path, *, quick: bool = False, progress: Progress | None = None) -> Verification:
    """Check a result on disk like a trajectory: every record, and in full every byte it vouches for."""
    progress = progress or Silent()
    try:
        ledger, _, _ = _open(path)
    except StoreCorrupt as error:
        return Verification(0, 0, [Damage(error.file or str(path), "metadata", error.message)])
    found = Verification(0, 0, [])
    unit_bytes = ledger.frame.rows * 14
    progress.begin("verify", unit_bytes * ledger.frame.n_units)
    try:
        for unit in range(ledger.frame.n_units):
            found.damaged += _unit_damage(ledger, unit, quick)
            found.chunks_checked += len(_UNIT_ARRAYS)
            found.bytes_checked += 0 if quick else unit_bytes
            progress.advance(unit_bytes)
    finally:
        progress.end()
    return found


def _unit_damage(ledger: _Ledger, unit: int, quick: bool) -> list[Damage]:
    start, stop = ledger.frame.unit(unit)
    damaged: list[Damage] = []

    def note(error: StoreCorrupt) -> None:
        file = Path(error.file or os.fspath(ledger.path))
        tensors = ledger.frame.map.name_rows(start, stop)
        damaged.append(
            Damage(
                str(file),
                file.parent.name,
                error.message.rpartition(": ")[2],
                None,
                (start, stop - 1),
                tensors,
            )
        )

    if not quick:
        for name in _UNIT_ARRAYS:
            try:
                ledger.read(name, unit)
            except StoreCorrupt as error:
                note(error)
    if not damaged:
        try:
            ledger.crcs(unit)
        except StoreCorrupt as error:
            note(error)
    return damaged


# ---- looking at either store ----------------------------------------------------------------------------


def kind_of(path: Path) -> str:
    """ "trajectory" or "result", told by the group document. Raises UsageError, NotAStore, StoreCorrupt."""
    require_result(path)
    document = fmt.parse(fmt.read_bytes(path / fmt.DOCUMENT), path / fmt.DOCUMENT)
    attributes = document.get("attributes")
    mine = cast(Any, attributes).get("cmdgpu") if isinstance(attributes, dict) else None
    kind = cast(Any, mine).get("kind") if isinstance(mine, dict) else None
    if kind not in ("trajectory", "result"):
        raise NotAStore("is no store of cmdgpu", file=path, hint="expected a folder made by Recorder or fit")
    return str(kind)


@dataclass(frozen=True)
class Description:
    """What a result says of itself, finished or not, without reading its rows."""

    status: str
    frame: Frame
    n_modes: int
    units_done: int
    fingerprint: str
    config: Mapping[str, Any]
    source: Mapping[str, Any]
    metrics: Mapping[str, Any] | None


def describe_result(path: Path) -> Description:
    ledger, modes, head = _open(path)
    return Description(
        status=head["status"],
        frame=ledger.frame,
        n_modes=modes.n_modes,
        units_done=progress_of(path)[0],
        fingerprint=head["fingerprint"],
        config=head["config"],
        source={key: value for key, value in head["source"].items() if key != "steps"},
        metrics=head.get("metrics"),
    )
