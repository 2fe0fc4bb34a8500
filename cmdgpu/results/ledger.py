"""The units of a result on disk: their chunk files, their CRCs, and the records that bind them to a run."""

from __future__ import annotations

import bisect
import math
import os
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from typing import Any, Final, TypeAlias

import numpy as np

from cmdgpu.errors import StoreCorrupt
from cmdgpu.notation import F64, I64, NON_FINITE, U8, AnyArray
from cmdgpu.results.contract import Frame
from cmdgpu.statistics import FIELDS, N_BINS, Totals, UnitStatistics
from cmdgpu.store import durable, remote
from cmdgpu.store import format as fmt
from cmdgpu.store.ahead import in_order
from cmdgpu.store.chunks import ChunkDamage, read_chunk, stored_crc
from cmdgpu.store.commit import own_directory
from cmdgpu.store.places import Place, RemotePath
from cmdgpu.store.scan import ChunkFile

SEGMENTS: Final = "segment_stats"
UNIT_ARRAYS: Final = (*fmt.RESULT_ROWS, SEGMENTS, "unit_hist")
"""A unit leaves one chunk in each of these, and as many as its segments fill in ``segment_stats``."""
DONE: Final = "done"
Chunk: TypeAlias = tuple[str, int]
"""An array and which of its chunks of a unit: 0, but for ``segment_stats``."""
_FEW_SEGMENTS: Final = 64
"""Segments that are kept in one chunk whatever the others have: 37 KB of 10 modes."""
_CHUNK_BYTES: Final = 16 << 20
"""Of more segments than that."""


def segments_of_a_chunk(frame: Frame, n_modes: int) -> int:
    """How many segments one chunk of ``segment_stats`` holds.

    All of the unit with the most, where these are few. Otherwise about as many as a unit has on average: one
    unit of 10,000 small tensors would else have its size written for every unit of a large one.
    """
    counts = frame.segment_counts
    most, mean = int(counts.max(initial=1)), -(-int(counts.sum()) // max(len(counts), 1))
    in_bounds = _CHUNK_BYTES // (8 * math.prod(_sums_shape(n_modes)))
    return min(most, max(_FEW_SEGMENTS, min(1 << (mean - 1).bit_length(), in_bounds)))


def _sums_shape(n_modes: int) -> tuple[int, int]:
    """Of one segment."""
    return len(FIELDS), 2 + n_modes


def _histogram_shape(n_modes: int) -> tuple[int, int]:
    """Histograms of no mode keep one row."""
    return max(n_modes, 1), N_BINS


def unit_documents(frame: Frame, n_modes: int) -> dict[str, fmt.Json]:
    """Metadata of the arrays that have a chunk per unit, and of the records."""
    units, hist = frame.n_units, _histogram_shape(n_modes)
    most, sums = int(frame.segment_counts.max(initial=1)), _sums_shape(n_modes)
    arrays: dict[str, tuple[tuple[int, ...], tuple[int, ...], str, tuple[str, ...], float | int]] = {
        name: ((frame.n_rows,), (frame.rows,), kind, ("parameter",), fill)
        for name, (kind, fill) in fmt.RESULT_ROWS.items()
    }
    arrays[SEGMENTS] = (
        (units, most, *sums), (1, segments_of_a_chunk(frame, n_modes), *sums), "float64",
        ("unit", "segment", "field", "class"), float("nan"),
    )  # fmt: skip
    arrays["unit_hist"] = ((units, *hist), (1, *hist), "int64", ("unit", "mode", "bin"), -1)
    arrays[DONE] = ((units, 32), (1, 32), "uint8", ("unit", "byte"), 0)
    return {
        name: fmt.array_document(*array, {"cmdgpu": fmt.own("result-array")})
        for name, array in arrays.items()
    }


def statistics_bytes(frame: Frame, n_modes: int) -> I64:
    """(live units,) bytes of every live unit's statistics, as they are written."""
    per_chunk = segments_of_a_chunk(frame, n_modes)
    n_segments = -(-frame.segment_counts // per_chunk) * per_chunk
    return 8 * (n_segments * math.prod(_sums_shape(n_modes)) + math.prod(_histogram_shape(n_modes)))


def plan_digest(head: Mapping[str, Any]) -> str:
    """What every unit depends on besides the run's settings: the references."""
    return fmt.sha256(fmt.canonical([head["digests"]["references"], head["digests"]["reference_row"]]))


def n_begun(path: Place) -> int:
    """Units whose record is there, sound or not."""
    return sum(fnmatch(file.name, "c.*.0") for file in durable.entries(path / DONE))


class Ledger:
    """Reads and vouches for units; writing them is ``stored``.

    ``keeps``: a record that was checked once is believed from then on, as is done for objects, which are a
    request each. For who reads what nobody writes any more.
    """

    def __init__(
        self, path: Place, frame: Frame, n_modes: int, fingerprint: str, plan: str, *, keeps: bool = False
    ) -> None:
        self.path = path
        self.frame = frame
        self._n_modes = n_modes
        self._vouched: dict[int, bytes] = {}
        self._keeps = keeps or isinstance(path, RemotePath)
        for name in (*UNIT_ARRAYS, DONE):
            own_directory(path, name)
        self._binding = f"{fingerprint}\n{plan}\n".encode()
        self._per_chunk = segments_of_a_chunk(frame, n_modes)
        sums = (self._per_chunk, *_sums_shape(n_modes))
        self._chunks: dict[str, tuple[tuple[int, ...], np.dtype[Any], float | int]] = {
            name: ((frame.rows,), np.dtype(kind), fill) for name, (kind, fill) in fmt.RESULT_ROWS.items()
        }
        self._chunks[SEGMENTS] = ((1, *sums), np.dtype(np.float64), 0.0)
        self._chunks["unit_hist"] = ((1, *_histogram_shape(n_modes)), np.dtype(np.int64), 0)

    def n_segments(self, unit: int) -> int:
        live = bisect.bisect_left(self.frame.live_units, unit)
        return int(self.frame.segment_counts[live])

    def chunks(self, unit: int) -> list[Chunk]:
        """The chunks of a live unit, in the order in which its record digests their CRCs."""
        n_parts = -(-self.n_segments(unit) // self._per_chunk)
        return [(name, part) for name in UNIT_ARRAYS for part in range(n_parts if name == SEGMENTS else 1)]

    def part_of(self, segments: F64, part: int) -> F64:
        """(1, segments of a chunk, fields, classes): what of a unit's sums goes to that chunk of it."""
        here = segments[part * self._per_chunk : (part + 1) * self._per_chunk]
        if len(here) == self._per_chunk:
            return here[None]
        chunk = self.empty(SEGMENTS)
        chunk[0, : len(here)] = here
        return chunk

    def file(self, name: str, unit: int, part: int = 0) -> Place:
        zeros = [0] * (len(self._chunks[name][0]) - 2)
        place = [unit] if name in fmt.RESULT_ROWS else [unit, part, *zeros]
        return self.path / name / fmt.chunk_name(*place)

    def files(self, unit: int) -> Iterator[ChunkFile]:
        """The chunk files of a live unit, its record last."""
        for name, part in self.chunks(unit):
            yield ChunkFile(self.file(name, unit, part), self.chunk_bytes(name))
        yield ChunkFile(self.record_file(unit), 32)

    def chunk_bytes(self, name: str) -> int:
        shape, kind, _ = self._chunks[name]
        return math.prod(shape) * kind.itemsize

    def unit_bytes(self, unit: int) -> int:
        """Of the files of a live unit, with their CRCs."""
        return sum(file.n_bytes + fmt.CRC_BYTES for file in self.files(unit))

    def record_file(self, unit: int) -> Place:
        return self.path / DONE / fmt.chunk_name(unit, 0)

    def is_begun(self, unit: int) -> bool:
        """Whether a record is there, sound or not."""
        file = self.record_file(unit)
        return file.exists() if isinstance(file, RemotePath) else os.path.lexists(file)

    def empty(self, name: str) -> AnyArray:
        """A chunk of fill values."""
        shape, kind, fill = self._chunks[name]
        return np.full(shape, fill, dtype=kind)

    def read(self, name: str, unit: int, kept: bytes | None = None, part: int = 0) -> AnyArray:
        """A whole chunk, checked. Raises StoreCorrupt naming the file and its rows."""
        shape, kind, _ = self._chunks[name]
        out = np.empty(shape, dtype=kind)
        try:
            read_chunk(self.file(name, unit, part), out, kept)
        except ChunkDamage as damage:
            raise self.corrupt(name, unit, str(damage), part) from damage
        if name == "mode" and not self._are_modes(unit, out):
            raise self.corrupt(name, unit, f"names a mode beyond the {self._n_modes} there are")
        if name == SEGMENTS and not np.isfinite(out).all():
            raise self.corrupt(name, unit, "holds sums that are no numbers", part)
        return out

    def _are_modes(self, unit: int, mode: AnyArray) -> bool:
        """Every row of a tensor has a mode or a sentinel; only holes and padding have none."""
        start, stop = self.frame.unit(unit)
        return all(
            np.all((mode[low:high] >= NON_FINITE) & (mode[low:high] < self._n_modes))
            for low, high in ((s.start - start, s.stop - start) for s in self.frame.map.segments(start, stop))
        )

    def corrupt(self, name: str, unit: int, problem: str, part: int = 0) -> StoreCorrupt:
        start, stop = self.frame.unit(unit)
        return StoreCorrupt(
            f"rows {start}..{stop - 1} of {name}: {problem}",
            file=self.file(name, unit, part) if name in self._chunks else self.record_file(unit),
            tensor=self.frame.map.name_rows(start, stop),
            hint="fit again into a new output; `cmdgpu verify` lists all damage",
        )

    def record(self, unit: int, crcs: list[bytes]) -> U8:
        """SHA-256 over run, plan, unit and the CRCs of its chunks: what makes them this unit's."""
        digest = fmt.sha256(self._binding, unit.to_bytes(8, "little"), *crcs)
        return np.frombuffer(bytes.fromhex(digest), dtype=np.uint8).reshape(1, 32)

    def crcs(self, unit: int) -> list[bytes]:
        """The CRCs of a unit's chunks, vouched for by its done record. Raises StoreCorrupt."""
        if (known := self._vouched.get(unit)) is not None:
            return [known[i : i + fmt.CRC_BYTES] for i in range(0, len(known), fmt.CRC_BYTES)]
        found: list[bytes] = []
        for name, part in self.chunks(unit):
            try:
                found.append(stored_crc(self.file(name, unit, part), self.chunk_bytes(name)))
            except ChunkDamage as damage:
                raise self.corrupt(name, unit, str(damage), part) from damage
        said = np.empty((1, 32), dtype=np.uint8)
        try:
            read_chunk(self.record_file(unit), said)
        except ChunkDamage as damage:
            raise self.corrupt(DONE, unit, str(damage)) from damage
        if not np.array_equal(said, self.record(unit, found)):
            raise self.corrupt(DONE, unit, "its chunks are not the ones that were fitted")
        if self._keeps:
            self._vouched[unit] = b"".join(found)
        return found

    def totals(self, n_modes: int) -> Totals:
        """Statistics of all units, each vouched for by its record, merged in unit order."""
        totals, units = Totals.zero(self.frame.map, n_modes), self.frame.live_units

        def read(unit: int) -> UnitStatistics:
            kept = dict(zip(self.chunks(unit), self.crcs(unit), strict=True))
            parts = [
                self.read(SEGMENTS, unit, crc, part)[0]
                for (name, part), crc in kept.items()
                if name == SEGMENTS
            ]
            segments = parts[0] if len(parts) == 1 else np.concatenate(parts)
            histogram = self.read("unit_hist", unit, kept["unit_hist", 0])[0, :n_modes]
            return UnitStatistics(segments[: self.n_segments(unit)], histogram)

        is_remote = isinstance(self.path, RemotePath)
        found = in_order(read, units, remote.READS_IN_FLIGHT) if is_remote else map(read, units)
        for unit, statistics in zip(units, found, strict=True):
            start, stop = self.frame.unit(unit)
            totals.add(self.frame.map, start, stop - start, statistics)
        return totals
