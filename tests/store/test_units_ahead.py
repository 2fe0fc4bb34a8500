"""Laws of units made ahead: the same numbers in any order, a few at a time, errors where they belong."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cmdgpu.errors import StoreCorrupt
from cmdgpu.notation import AnyArray
from cmdgpu.store.units_ahead import KEPT_BYTES, UnitsAhead, UnitSource, units_kept, units_of

ROWS = 10
N = 97


class Counting:
    """The numbers 0, 1, 2, ...; remembers what was made and announced."""

    rows = ROWS

    def __init__(self, broken: int = -1) -> None:
        self.made: list[int] = []
        self.announced: list[int] = []
        self._broken = broken
        self._lock = threading.Lock()

    def read(self, start: int, stop: int) -> AnyArray:
        return np.arange(start, stop, dtype=np.float32)

    def announce(self, unit: int) -> None:
        self.announced.append(unit)

    def unit(self, unit: int) -> AnyArray:
        with self._lock:
            self.made.append(unit)
        if unit == self._broken:
            raise StoreCorrupt(f"unit {unit}")
        return self.read(unit * ROWS, (unit + 1) * ROWS)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as found:
        yield found


def test_rows_are_those_of_the_source_and_every_unit_is_made_once(pool: ThreadPoolExecutor) -> None:
    source = Counting()
    assert isinstance(source, UnitSource)
    ahead = UnitsAhead(source, range(10), pool, 3)
    cuts = [0, 3, 3, 9, 10, 11, 38, 60, 61, N]
    for start, stop in itertools.pairwise(cuts):
        assert np.array_equal(ahead.read(start, stop), np.arange(start, stop))
    assert sorted(source.made) == source.announced == list(range(10))


def test_units_nobody_asks_for_are_passed_over_and_others_come_too(pool: ThreadPoolExecutor) -> None:
    source = Counting()
    ahead = UnitsAhead(source, range(6), pool, 2)
    for unit in (0, 4, 3, 9, 5, 0):
        assert np.array_equal(ahead.read(unit * ROWS, unit * ROWS + 2), [unit * ROWS, unit * ROWS + 1])


def test_no_more_is_made_than_may_wait(pool: ThreadPoolExecutor) -> None:
    source = Counting()
    ahead = UnitsAhead(source, range(50), pool, 4)
    for unit in range(20):
        ahead.read(unit * ROWS, unit * ROWS + 1)
        assert len(source.announced) <= unit + 4


def test_an_error_comes_when_its_unit_is_asked_for(pool: ThreadPoolExecutor) -> None:
    ahead = UnitsAhead(Counting(broken=2), range(10), pool, 4)
    assert ahead.read(0, 20)[-1] == 19
    with pytest.raises(StoreCorrupt, match="unit 2"):
        ahead.read(20, 30)


def test_what_waits_is_bounded_in_bytes() -> None:
    for rows in (256, 1 << 18, 1 << 20, 1 << 26):
        for n_sources in (1, 2):
            assert units_kept(rows, n_sources) * rows * 4 * n_sources <= KEPT_BYTES


def test_the_units_of_ranges_ascend_without_repeating() -> None:
    assert units_of([(0, 5), (5, 5), (5, 10), (10, 31), (75, 80)], ROWS) == [0, 1, 2, 3, 7]
    assert units_of([], ROWS) == []
