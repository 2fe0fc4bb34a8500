"""Laws of executors that are anybody's, and of lanes: whoever runs a block, however often, it is one fit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from cmdgpu import ops
from cmdgpu.errors import StoreCorrupt, UsageError, WorkerLost
from cmdgpu.results import StoredWriter
from cmdgpu.streaming import engine
from cmdgpu.streaming.executors import RankStride, executor_for
from cmdgpu.streaming.lanes import Shared, merged
from cmdgpu.trajectory import Trajectory
from tests.executors.world import UNITS, World, digest, line_of
from tests.harness import Ticks
from tests.verbs import flip_bit

B = TypeVar("B")
R = TypeVar("R")


class Threads:
    """Ten lines of anybody's: blocks from the last to the first, each twice, three at a time."""

    def map_blocks(self, fn: Callable[[B], R], blocks: Sequence[B]) -> Iterator[tuple[B, R]]:
        twice = [block for block in reversed(blocks) for _ in range(2)]
        with ThreadPoolExecutor(3) as pool:
            yield from zip(twice, pool.map(fn, twice), strict=True)


class Forgetful:
    """Leaves a block to others, who do not exist."""

    def map_blocks(self, fn: Callable[[B], R], blocks: Sequence[B]) -> Iterator[tuple[B, R]]:
        return iter([(block, fn(block)) for block in blocks[:1] or blocks])


def test_a_third_party_executor_that_runs_blocks_twice_and_backwards(world: World, tmp_path: Path) -> None:
    out, ticks = world.out(tmp_path), Ticks()
    cmd = world.fit(out, Threads(), progress=ticks)
    assert digest(out) == world.expected
    assert ticks.done == ticks.total, "what came twice was counted twice"
    assert cmd.metrics_["blocks_total"] == UNITS


def test_blocks_that_nobody_does_are_missed(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cmdgpu.fitting.PATIENCE_S", 0.3)
    out = world.out(tmp_path)
    with pytest.raises(WorkerLost) as caught:
        world.fit(out, Forgetful())
    assert f"1 of {UNITS} units are done, and none was added for 0 s; start the" in line_of(caught.value)
    world.fit(out)
    assert digest(out) == world.expected


def test_an_executor_is_stopped_when_its_caller_is(world: World, tmp_path: Path) -> None:
    stopped = list[str]()

    class Careful(Threads):
        def map_blocks(self, fn: Callable[[B], R], blocks: Sequence[B]) -> Iterator[tuple[B, R]]:
            try:
                yield from super().map_blocks(fn, blocks)
            finally:
                stopped.append(type(fn).__name__)

    class Interrupted(Ticks):
        def advance(self, done_bytes: int) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        world.fit(world.out(tmp_path), Careful(), progress=Interrupted())
    assert stopped[-1] == "Job", f"still running while {caught.value!r} is looked at"


def test_what_is_no_executor_and_what_is_no_place(world: World, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no executor 'spark'; have: local, ranks, dask"):
        world.fit(world.out(tmp_path), "spark")
    source = Trajectory.open(world.store)
    from tests.executors.world import cmd

    with pytest.raises(UsageError, match=r"share a trajectory and its results through their files; give"):
        cmd().fit(source, executor=Threads())
    with executor_for("local") as nobody, executor_for(None) as neither:
        assert nobody is None and neither is None


# ---- lanes --------------------------------------------------------------------------------------------


@pytest.fixture
def through_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cmdgpu.streaming.plan.TARGET_BLOCK_BYTES", 1)


def two_cpus(names: str) -> list[torch.device]:
    del names
    return [torch.device("cpu"), torch.device("cpu")]


def lane_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("cmdgpu-lane")]


@pytest.mark.usefixtures("through_slots")
def test_two_devices_leave_the_bytes_of_one(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "resolve_devices", two_cpus)
    began, taken = threading.Barrier(2), dict[str, int]()
    compute = engine.AssignAndFit.compute

    def counted(work: engine.AssignAndFit, W_tb: torch.Tensor) -> Any:
        name = threading.current_thread().name
        if name not in taken:
            began.wait(30)  # neither takes all before the other has started
        taken[name] = taken.get(name, 0) + 1
        return compute(work, W_tb)

    monkeypatch.setattr(engine.AssignAndFit, "compute", counted)
    out = world.out(tmp_path)
    world.fit(out)
    assert digest(out) == world.expected
    assert sorted(taken) == ["cmdgpu-lane-0", "cmdgpu-lane-1"] and sum(taken.values()) == UNITS
    assert lane_threads() == []


@pytest.mark.usefixtures("through_slots")
def test_damage_met_by_one_lane_ends_both_and_keeps_what_is_done(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    shutil.copytree(world.store, tmp_path / "s.zarr")
    monkeypatch.setattr(ops, "resolve_devices", two_cpus)
    out, chunk = tmp_path / "out.zarr", tmp_path / "s.zarr/weights/c.7.2"
    flip_bit(chunk, 100)
    with pytest.raises(StoreCorrupt, match=r"c\.7\.2"):
        world.fit(out)
    assert lane_threads() == []
    flip_bit(chunk, 100)
    written = list[int]()
    write = StoredWriter.write

    def counted(writer: StoredWriter, unit: int, *rest: Any) -> None:
        written.append(unit)
        write(writer, unit, *rest)

    monkeypatch.setattr(StoredWriter, "write", counted)
    world.fit(out)
    assert digest(out) == world.expected
    assert 7 in written and len(written) < UNITS


def numbers(first: int, log: list[str], fail_at: int = -1) -> Generator[int]:
    try:
        for i in range(first, first + 5):
            if i == fail_at:
                raise ValueError(f"lane of {first}")
            yield i
    finally:
        log.append(f"{first} closed by {threading.current_thread().name}")


def test_lanes_yield_everything_and_each_is_closed_by_its_own_thread() -> None:
    log = list[str]()
    assert sorted(merged([numbers(0, log), numbers(10, log)])) == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]
    assert sorted(log) == ["0 closed by cmdgpu-lane-0", "10 closed by cmdgpu-lane-1"]
    assert list(merged([numbers(0, log)])) == [0, 1, 2, 3, 4]


def test_the_first_error_of_a_lane_ends_all() -> None:
    log = list[str]()
    with pytest.raises(ValueError, match="lane of 10"):
        list(merged([numbers(0, log), numbers(10, log, fail_at=12), numbers(20, log)]))
    assert len(log) == 3 and lane_threads() == []


def test_lanes_closed_early_leave_no_thread_behind() -> None:
    log = list[str]()
    lanes = merged([numbers(0, log), numbers(10, log), numbers(20, log)])
    next(lanes)
    lanes.close()
    assert len(log) == 3 and lane_threads() == []


def test_a_shared_item_goes_to_one_taker() -> None:
    shared = Shared(range(1000))
    with ThreadPoolExecutor(4) as pool:
        taken = list(pool.map(list[int], [shared] * 4))
    assert sorted(i for part in taken for i in part) == list(range(1000))


# ---- ranks, without processes -------------------------------------------------------------------------


def environment(monkeypatch: pytest.MonkeyPatch, **names: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in names.items():
        monkeypatch.setenv(name, value)


def test_the_rank_is_that_of_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, RANK="3", WORLD_SIZE="8", LOCAL_RANK="1")
    assert RankStride.here() == RankStride(3, 8, 1)
    environment(monkeypatch, SLURM_PROCID="5", SLURM_NTASKS="6", SLURM_LOCALID="1")
    assert RankStride.here() == RankStride(5, 6, 1)
    environment(monkeypatch, RANK="0", WORLD_SIZE="4")
    assert RankStride.here() == RankStride(0, 4, 0)
    environment(monkeypatch, RANK="0")
    with pytest.raises(UsageError, match="no launcher has given this process a rank; start it with torchrun"):
        RankStride.here()


@pytest.mark.parametrize(
    ("names", "line"),
    [
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK='one' in the environment is no number; unset it"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1' in the environment is no number; unset it"),
        ({"RANK": "0", "WORLD_SIZE": "9" * 5000}, f"WORLD_SIZE='{'9' * 40}… (5000 characters)' in"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 of WORLD_SIZE=2 is no rank; ranks count from 0"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "RANK=0 of WORLD_SIZE=0 is no rank"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": ""}, "LOCAL_RANK='' in the environment"),
    ],
)
def test_garbage_in_the_environment_is_one_line(
    monkeypatch: pytest.MonkeyPatch, names: dict[str, str], line: str
) -> None:
    environment(monkeypatch, **names)
    with pytest.raises(UsageError) as caught:
        RankStride.here()
    assert line_of(caught.value).startswith(line)


def test_a_rank_takes_the_device_of_its_place_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert RankStride(1, 2, 1).own("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [RankStride(9, 16, local).own("cuda") for local in (0, 3, 5)] == ["cuda:0", "cuda:3", "cuda:1"]
    assert RankStride(9, 16, 2).own("cuda:1") == "cuda:1"


def test_every_block_has_one_rank_and_whoever_takes_over_takes_all() -> None:
    blocks = list(range(11))
    ranks = [RankStride(r, 3) for r in range(3)]
    assert sorted(b for rank in ranks for b, _ in rank.map_blocks(str, blocks)) == blocks
    orders = [[b for b, _ in rank.take_over(str, blocks)] for rank in ranks]
    assert all(sorted(order) == blocks for order in orders)
    assert [order[0] for order in orders] == [0, 3, 7]


def test_ranks_do_not_start_over(world: World, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"throw away each other's work; delete the unfinished fit"):
        world.fit(world.out(tmp_path), RankStride(0, 2), resume=False)
