"""The units of a result on disk: their chunk files, their CRCs, and the records that bind them to a run."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from cmdgpu.errors import StoreCorrupt
from cmdgpu.notation import NON_FINITE, U8, AnyArray
from cmdgpu.results.contract import Frame
from cmdgpu.statistics import FIELDS, N_BINS, Totals, UnitStatistics
from cmdgpu.store import format as fmt
from cmdgpu.store.chunks import ChunkDamage, read_chunk, stored_crc
from cmdgpu.store.commit import own_directory
from cmdgpu.store.scan import ChunkFile

UNIT_ARRAYS: Final = (*fmt.RESULT_ROWS, "segment_stats", "unit_hist")
"""A unit leaves one chunk in each of these."""
DONE: Final = "done"


def statistics_shapes(frame: Frame, n_modes: int) -> tuple[tuple[int, int, int], tuple[int, int]]:
    """A chunk per unit must hold the unit with the most segments; histograms of no mode keep one row."""
    most = max((len(frame.map.segments(*frame.unit(i))) for i in range(frame.n_units)), default=0)
    return (max(most, 1), len(FIELDS), 2 + n_modes), (max(n_modes, 1), N_BINS)


def unit_documents(frame: Frame, n_modes: int) -> dict[str, fmt.Json]:
    """Metadata of the arrays that have a chunk per unit, and of the records."""
    units = frame.n_units
    stats, hist = statistics_shapes(frame, n_modes)
    arrays: dict[str, tuple[tuple[int, ...], tuple[int, ...], str, tuple[str, ...], float | int]] = {
        name: ((frame.n_rows,), (frame.rows,), kind, ("parameter",), fill)
        for name, (kind, fill) in fmt.RESULT_ROWS.items()
    }
    arrays["segment_stats"] = (
        (units, *stats), (1, *stats), "float64", ("unit", "segment", "field", "class"), float("nan"),
    )  # fmt: skip
    arrays["unit_hist"] = ((units, *hist), (1, *hist), "int64", ("unit", "mode", "bin"), -1)
    arrays[DONE] = ((units, 32), (1, 32), "uint8", ("unit", "byte"), 0)
    return {
        name: fmt.array_document(*array, {"cmdgpu": fmt.own("result-array")})
        for name, array in arrays.items()
    }


def statistics_bytes(frame: Frame, n_modes: int) -> int:
    """Bytes of one unit's statistics."""
    return 8 * sum(math.prod(shape) for shape in statistics_shapes(frame, n_modes))


def plan_digest(head: Mapping[str, Any]) -> str:
    """What every unit depends on besides the run's settings: the references."""
    return fmt.sha256(fmt.canonical([head["digests"]["references"], head["digests"]["reference_row"]]))


class Ledger:
    """Reads and vouches for units; writing them is ``stored``."""

    def __init__(self, path: Path, frame: Frame, n_modes: int, fingerprint: str, plan: str) -> None:
        self.path = path
        self.frame = frame
        self._n_modes = n_modes
        for name in (*UNIT_ARRAYS, DONE):
            own_directory(path, name)
        self._binding = f"{fingerprint}\n{plan}\n".encode()
        stats, hist = statistics_shapes(frame, n_modes)
        self._chunks: dict[str, tuple[tuple[int, ...], np.dtype[Any], float | int]] = {
            name: ((frame.rows,), np.dtype(kind), fill) for name, (kind, fill) in fmt.RESULT_ROWS.items()
        }
        self._chunks["segment_stats"] = ((1, *stats), np.dtype(np.float64), 0.0)
        self._chunks["unit_hist"] = ((1, *hist), np.dtype(np.int64), 0)

    def file(self, name: str, unit: int) -> Path:
        zeros = [0] * (len(self._chunks[name][0]) - 1)
        return self.path / name / fmt.chunk_name(unit, *zeros)

    def files(self, unit: int) -> Iterator[ChunkFile]:
        """The chunk files of a unit, its record last."""
        for name, (shape, kind, _) in self._chunks.items():
            yield ChunkFile(self.file(name, unit), math.prod(shape) * kind.itemsize)
        yield ChunkFile(self.record_file(unit), 32)

    def record_file(self, unit: int) -> Path:
        return self.path / DONE / fmt.chunk_name(unit, 0)

    def is_begun(self, unit: int) -> bool:
        """Whether a record is there, sound or not."""
        return os.path.lexists(self.record_file(unit))

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
        if name == "mode" and not self._are_modes(unit, out):
            raise self.corrupt(name, unit, f"names a mode beyond the {self._n_modes} there are")
        if name == "segment_stats" and not np.isfinite(out).all():
            raise self.corrupt(name, unit, "holds sums that are no numbers")
        return out

    def _are_modes(self, unit: int, mode: AnyArray) -> bool:
        """Every row of a tensor has a mode or a sentinel; only holes and padding have none."""
        start, stop = self.frame.unit(unit)
        return all(
            np.all((mode[low:high] >= NON_FINITE) & (mode[low:high] < self._n_modes))
            for low, high in ((s.start - start, s.stop - start) for s in self.frame.map.segments(start, stop))
        )

    def corrupt(self, name: str, unit: int, problem: str) -> StoreCorrupt:
        start, stop = self.frame.unit(unit)
        return StoreCorrupt(
            f"rows {start}..{stop - 1} of {name}: {problem}",
            file=self.file(name, unit) if name in self._chunks else self.record_file(unit),
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
                found.append(stored_crc(self.file(name, unit), math.prod(shape) * kind.itemsize))
            except ChunkDamage as damage:
                raise self.corrupt(name, unit, str(damage)) from damage
        said = np.empty((1, 32), dtype=np.uint8)
        try:
            read_chunk(self.record_file(unit), said)
        except ChunkDamage as damage:
            raise self.corrupt(DONE, unit, str(damage)) from damage
        if not np.array_equal(said, self.record(unit, found)):
            raise self.corrupt(DONE, unit, "its chunks are not the ones that were fitted")
        return found

    def totals(self, n_modes: int) -> Totals:
        """Statistics of all units, each vouched for by its record, merged in unit order."""
        totals = Totals.zero(self.frame.map, n_modes)
        for unit in range(self.frame.n_units):
            start, stop = self.frame.unit(unit)
            n_segments = len(self.frame.map.segments(start, stop))
            kept = dict(zip(UNIT_ARRAYS, self.crcs(unit), strict=True))
            segments = self.read("segment_stats", unit, kept["segment_stats"])[0, :n_segments]
            histogram = self.read("unit_hist", unit, kept["unit_hist"])[0, :n_modes]
            totals.add(self.frame.map, start, stop - start, UnitStatistics(segments, histogram))
        return totals
