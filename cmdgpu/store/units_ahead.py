"""The units of one snapshot, made by threads shortly before they are asked for.

Whoever walks over a model asks for its rows from the first to the last. Meanwhile the disk reads, the next
units are checked and computed, and what was written goes out: a few units at a time, so that memory does not
grow with the model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, Protocol, runtime_checkable

import numpy as np

from cmdgpu.notation import AnyArray

THREADS: Final = 2
KEPT_BYTES: Final = 8 << 20
"""Of units that are made, or to be made, before they are asked for: two of 2^20 rows."""
_MOST_UNITS: Final = 16
_ROW_BYTES: Final = 4


@runtime_checkable
class UnitSource(Protocol):
    """One snapshot as numbers, that can be had unit by unit."""

    @property
    def rows(self) -> int:
        """Rows of a unit."""
        ...

    def read(self, start: int, stop: int) -> AnyArray:
        """Rows [start, stop)."""
        ...

    def announce(self, unit: int) -> None:
        """It is asked for soon: a disk may begin to read."""
        ...

    def unit(self, unit: int) -> AnyArray:
        """Its numbers, the last unit's too, perhaps with more behind them; by several threads at once."""
        ...


def units_kept(rows: int, n_sources: int) -> int:
    """How many units of each source may wait to be asked for; below two there is nothing to be gained."""
    return min(KEPT_BYTES // (rows * _ROW_BYTES * n_sources), _MOST_UNITS)


def units_of(ranges: Iterable[tuple[int, int]], rows: int) -> list[int]:
    """The units that hold one of these rows, which ascend."""
    units: list[int] = []
    for start, stop in ranges:
        first = max(start // rows, units[-1] + 1 if units else 0)
        units.extend(range(first, (stop - 1) // rows + 1))
    return units


class UnitsAhead:
    """Rows of a source. ``units`` come in the order in which they will be asked for; others come, too."""

    def __init__(self, source: UnitSource, units: Sequence[int], pool: ThreadPoolExecutor, kept: int) -> None:
        self._source = source
        self._left = deque(units)
        self._pool = pool
        self._kept = kept
        self._made: deque[tuple[int, Future[AnyArray]]] = deque()
        self._current: tuple[int, AnyArray] | None = None

    def read(self, start: int, stop: int) -> AnyArray:
        """Rows [start, stop), not to be written to. Raises what the source raises."""
        if start >= stop:
            return self._source.read(start, stop)
        rows = self._source.rows
        parts = [
            self._unit(i)[max(start - i * rows, 0) : min(stop - i * rows, rows)]
            for i in range(start // rows, -(-stop // rows))
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _unit(self, i: int) -> AnyArray:
        if self._current is None or self._current[0] != i:
            self._current = None  # its memory goes before the next one's comes
            self._ask_ahead()
            self._current = (i, self._taken(i))
        return self._current[1]

    def _ask_ahead(self) -> None:
        while self._left and len(self._made) < self._kept:
            unit = self._left.popleft()
            self._source.announce(unit)
            self._made.append((unit, self._pool.submit(self._source.unit, unit)))

    def _taken(self, i: int) -> AnyArray:
        if all(unit != i for unit, _ in self._made):
            return self._source.unit(i)
        while True:
            unit, made = self._made.popleft()
            if unit == i:
                return made.result()
            made.cancel()
