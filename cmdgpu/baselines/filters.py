"""The streaming product: one snapshot of a baseline is W f, read a unit at a time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np

from cmdgpu.baselines.groups import Grouping
from cmdgpu.notation import F64, I64, AnyArray
from cmdgpu.sources import Source
from cmdgpu.store import format as fmt
from cmdgpu.store.parameter_map import ParameterMap

_SLOT_BYTES: Final = 64 << 20
"""Snapshots of one unit that are read at once: with 2^18 rows of float32, 64 of them."""
_BLOCK_ROWS: Final = 1 << 14
"""Rows whose float64 sums stay in a core's cache while the snapshots pass by."""


@dataclass(frozen=True)
class Filter:
    """Weights of the selected snapshots, for every group of rows."""

    weights: F64
    """(G, T)"""
    grouping: Grouping | None = None
    """Which rows are in which group; None when all rows of all kinds are in one."""
    only_finite: bool = False
    """A row with NaN or infinity among the snapshots is NaN, whatever its weight there."""

    def columns(self) -> I64:
        """Positions of the snapshots that have to be read."""
        if self.only_finite:
            return np.arange(self.weights.shape[1], dtype=np.int64)
        largest: F64 = np.abs(self.weights).max(axis=0)
        return np.flatnonzero(largest > 0)


class FilteredRows:
    """One rebuilt snapshot as numbers: sums in float64, snapshot after snapshot, rounded once to float32.

    Neither the units of the source nor the reads in flight change a bit. Beside one unit in float32 and in
    float64 it holds 64 MiB of snapshots, one at least. Rows of no tensor are NaN.
    """

    def __init__(self, source: Source, columns: I64, filter: Filter, parameters: ParameterMap) -> None:
        read = filter.columns()
        self._source = source
        self._parameters = parameters
        self._columns = columns[read]
        self._grouping = filter.grouping
        # by snapshot; the last column is that of rows in no group
        self._weights = np.append(filter.weights[:, read].T, np.zeros((len(read), 1)), axis=1)
        self._only_finite = filter.only_finite
        source.require(self._columns)
        stored = fmt.storage(source.dtype).numpy
        at_once = max(1, min(len(read), _SLOT_BYTES // (source.rows * stored.itemsize)))
        self._slot = np.empty((at_once, source.rows), dtype=stored)
        self._sums = np.empty(source.rows)
        self._rows = np.empty(source.rows, dtype=np.float32)
        self._unit = -1
        self.overflowed = False
        """Whether a finite value so far was beyond float32: it is infinite."""

    def read(self, start: int, stop: int) -> AnyArray:
        """Rows [start, stop) in float32."""
        out = np.full(stop - start, np.nan, dtype=np.float32)
        rows = self._source.rows
        for _, first, last in self._parameters.segments(start, stop):
            for unit in range(first // rows, -(-last // rows)):
                self._load(unit)
                low, high = max(first, unit * rows), min(last, (unit + 1) * rows)
                out[low - start : high - start] = self._rows[low - unit * rows : high - unit * rows]
        return out

    def _load(self, unit: int) -> None:
        if unit == self._unit:
            return
        self._unit = -1
        self._sums[:] = 0.0
        blocks = [slice(low, low + _BLOCK_ROWS) for low in range(0, len(self._sums), _BLOCK_ROWS)]
        with ThreadPoolExecutor(self._source.reads_in_flight, thread_name_prefix="cmdgpu-filter") as pool:
            for first in range(0, len(self._columns), len(self._slot)):
                columns = self._columns[first : first + len(self._slot)]
                slot = self._slot[: len(columns)]
                tasks = [pool.submit(t) for t in self._source.fill_tasks(unit, unit + 1, columns, slot)]
                for task in tasks:
                    task.result()
                weights = self._weights[first : first + len(columns)]
                for added in [pool.submit(self._add, unit, block, slot, weights) for block in blocks]:
                    added.result()
        self._round()
        self._unit = unit

    def _add(self, unit: int, block: slice, slot: AnyArray, weights: F64) -> None:
        """Add snapshots to the sums of a block. An infinity makes no noise here: its row says it later."""
        sums = self._sums[block]
        group = self._groups_of(unit, block.start, len(sums))
        term = np.empty_like(sums)
        with np.errstate(invalid="ignore", over="ignore"):
            for stored, weight_g in zip(slot[:, block], weights, strict=True):
                values = fmt.widen(stored, self._source.dtype)
                np.multiply(values, weight_g[group], out=term, dtype=np.float64)
                sums += term

    def _groups_of(self, unit: int, first: int, n_rows: int) -> int | I64:
        """The group of every row of a block, or the one of all of them."""
        if self._grouping is None:
            return 0
        start = unit * self._source.rows + first
        runs = self._grouping.runs_in(start, start + n_rows)
        if len({run.group for run in runs}) <= 1:
            return runs[0].group if runs else -1
        group = np.full(n_rows, -1, dtype=np.int64)
        for run in runs:
            group[run.start - start : run.stop - start] = run.group
        return group

    def _round(self) -> None:
        if self._only_finite:
            self._sums[~np.isfinite(self._sums)] = np.nan
        with np.errstate(over="ignore"):
            self._rows[:] = self._sums
        self.overflowed |= bool((np.isinf(self._rows) & np.isfinite(self._sums)).any())
