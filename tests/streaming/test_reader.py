"""Laws of reading ahead: every byte once, in order, never into a slot that is still in use."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmdgpu.errors import StoreCorrupt
from cmdgpu.notation import I64, AnyArray
from cmdgpu.sources import READS_IN_FLIGHT, ArraySource, FillTask, Source, StoreSource
from cmdgpu.streaming.reader import BlockReader
from cmdgpu.trajectory import Trajectory
from tests.harness import walks, write_store
from tests.verbs import flip_bit

ROWS, T = 256, 5
N = 9 * ROWS - 17
BLOCKS = [(0, 2), (2, 4), (4, 6), (6, 8), (8, 9)]
COLUMNS = np.array([0, 2, 3, 4], dtype=np.int64)


def slots(n: int = 2, units: int = 2) -> list[AnyArray]:
    return [np.empty((len(COLUMNS), units * ROWS), dtype=np.float32) for _ in range(n)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reader") / "walks.zarr"
    write_store(path, walks(N, T), rows=ROWS)
    return path


def source_of(store: Path) -> StoreSource:
    source = Trajectory.open(store).source
    assert isinstance(source, StoreSource)
    return source


class InUnits(ArraySource):
    """An array cut finer than usual."""

    def __init__(self, W_nt: Any) -> None:
        super().__init__(W_nt)
        self.rows = ROWS


def readers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith(("cmdgpu-reader", "cmdgpu-read_"))]


@pytest.mark.parametrize("kind", ["store", "array"])
@pytest.mark.parametrize("n_slots", [1, 2, 3])
def test_blocks_come_in_order_with_the_values_of_their_rows(store: Path, kind: str, n_slots: int) -> None:
    W = walks(N, T)
    source: Source = source_of(store) if kind == "store" else InUnits(W)
    seen: list[tuple[int, int]] = []
    with BlockReader(source, COLUMNS, BLOCKS, slots(n_slots)) as reader:
        for block in reader:
            rows = W[block.first * ROWS : block.stop * ROWS, COLUMNS].T
            assert np.array_equal(block.W_tb[:, : rows.shape[1]], rows)
            assert block.n_bytes >= rows.nbytes
            seen.append((block.first, block.stop))
            reader.release(block)
    assert seen == BLOCKS
    assert not readers()


def test_a_slot_is_not_written_before_it_is_released(store: Path) -> None:
    W = walks(N, T)
    with BlockReader(source_of(store), COLUMNS, BLOCKS, slots(2)) as reader:
        blocks = iter(reader)
        held = [next(blocks), next(blocks)]
        time.sleep(0.05)
        for block in held:
            rows = W[block.first * ROWS : block.stop * ROWS, COLUMNS].T
            assert np.array_equal(block.W_tb, rows)
        assert {block.slot for block in held} == {0, 1}
        reader.release(held[1])
        assert next(blocks).slot == held[1].slot


def test_damage_surfaces_where_the_blocks_are_used_and_ends_the_threads(tmp_path: Path) -> None:
    path = tmp_path / "walks.zarr"
    write_store(path, walks(N, T), rows=ROWS)
    flip_bit(path / "weights" / "c.5.3", 4321)
    seen = 0
    with (
        pytest.raises(StoreCorrupt, match=r"c\.5\.3: tensor 'W' at step 3: rows 1280\.\.1535 .*crc32c"),
        BlockReader(source_of(path), COLUMNS, BLOCKS, slots(2)) as reader,
    ):
        for block in reader:
            seen += 1
            reader.release(block)
    assert seen == 2
    assert not readers()


def test_who_leaves_early_leaves_no_thread_behind(store: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="enough"),
        BlockReader(source_of(store), COLUMNS, BLOCKS, slots(2)) as reader,
    ):
        for _ in reader:
            raise RuntimeError("enough")
    assert not readers()


class Counting(InUnits):
    """Counts tasks at work at the same time."""

    def __init__(self, W_nt: Any) -> None:
        super().__init__(W_nt)
        self.most = self.now = self.done = 0
        self._lock = threading.Lock()

    def fill_tasks(self, unit: int, stop: int, columns: I64, W_tb: AnyArray) -> Iterator[FillTask]:
        def task() -> int:
            with self._lock:
                self.now += 1
                self.most = max(self.most, self.now)
            time.sleep(0.001)
            with self._lock:
                self.now -= 1
                self.done += 1
            return 1

        del unit, stop, columns, W_tb
        return iter([task] * 100)


def test_a_bounded_number_of_reads_is_in_flight() -> None:
    source = Counting(walks(N, T))
    with BlockReader(source, COLUMNS, BLOCKS[:2], slots(2)) as reader:
        for block in reader:
            assert block.n_bytes == 100
            reader.release(block)
    assert 1 < source.most <= READS_IN_FLIGHT
    assert source.done == 200


def test_the_rows_a_last_unit_of_an_array_lacks_are_zero() -> None:
    source = InUnits(walks(N, T))
    slot = np.full((len(COLUMNS), ROWS), np.nan, dtype=np.float32)
    for task in source.fill_tasks(8, 9, COLUMNS, slot):
        task()
    assert not np.isnan(slot).any()
    assert not slot[:, N - 8 * ROWS :].any()
