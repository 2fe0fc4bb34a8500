"""Laws of what a worker is told: it does what is asked of it, or says in one line why it cannot."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch

from cmdgpu.errors import CmdgpuError, MemoryLimitError, UsageError
from cmdgpu.streaming import jobs
from cmdgpu.streaming.jobs import Job, whole_process
from tests.executors.world import UNITS, World, digest, line_of
from tests.harness import planted, write_store

B = TypeVar("B")
R = TypeVar("R")


class Stopped(Exception):
    """The caller is gone, its fit is begun."""


class Overheard:
    """An executor that keeps what it was told."""

    job: Job
    blocks: Sequence[Any]

    def map_blocks(self, fn: Callable[[B], R], blocks: Sequence[B]) -> Iterator[tuple[B, R]]:
        if isinstance(fn, Job):
            self.job, self.blocks = fn, blocks
            raise Stopped
        return iter([(block, fn(block)) for block in blocks])


@pytest.fixture
def out(world: World, tmp_path: Path) -> Path:
    return world.out(tmp_path)


@pytest.fixture
def begun(world: World, out: Path) -> Overheard:
    told = Overheard()
    with pytest.raises(Stopped):
        world.fit(out, told)
    return told


def refused(kind: type[CmdgpuError], job: Job) -> str:
    with pytest.raises(kind) as caught:
        job((0, 1))
    return line_of(caught.value)


def test_a_job_is_small_and_blocks_done_by_it_are_a_fit(world: World, out: Path, begun: Overheard) -> None:
    assert len(pickle.dumps(begun.job)) < 1024
    assert begun.blocks == [(i, i + 1) for i in range(UNITS)]
    job: Job = pickle.loads(pickle.dumps(begun.job))
    first = job((0, 3))
    assert first.bytes_read > 0
    assert job((0, 3)).bytes_read == 0, "a unit that was done is read again"
    for block in begun.blocks[:2:-1]:
        job(block)
    world.fit(out)
    assert digest(out) == world.expected


def test_a_job_of_a_fit_that_ended_does_nothing(world: World, out: Path, begun: Overheard) -> None:
    begun.job((0, 1))
    world.fit(out)
    before = digest(out)
    assert begun.job((0, 1)).bytes_read == 0  # joined before it ended
    assert dataclasses.replace(begun.job, token="late")((1, 2)).bytes_read == 0
    assert digest(out) == before


def test_a_fit_begun_anew_at_the_place_of_an_ended_one_is_joined_anew(world: World, out: Path) -> None:
    for ended_before in (False, True):
        told = Overheard()
        with pytest.raises(Stopped):
            world.fit(out, told)
        if ended_before:
            assert told.job((0, 1)).bytes_read > 0, "taken for the one that ended"
        world.fit(out)
        assert told.job((0, 1)).bytes_read == 0
        shutil.rmtree(out)


def test_a_fit_that_was_removed_under_its_workers(out: Path, begun: Overheard) -> None:
    begun.job((0, 1))
    (partial,) = [partial for _, partial in begun.job.fits]
    assert isinstance(partial, Path)
    shutil.rmtree(partial)
    with pytest.raises(CmdgpuError) as caught:
        begun.job((1, 2))
    assert line_of(caught.value).startswith(
        f"{partial}: the unfinished fit was removed while workers were at"
    )
    again = dataclasses.replace(begun.job, token="again")
    assert refused(UsageError, again).startswith(f"{partial}: a worker on ")


def test_what_a_worker_does_not_see_or_has_otherwise(
    begun: Overheard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = dataclasses.replace(begun.job, store=tmp_path / "nowhere.zarr")
    line = refused(UsageError, nowhere)
    assert line.startswith(f"{tmp_path}/nowhere.zarr: a worker on ") and "does not see it; trajectory" in line
    write_store(tmp_path / "other.zarr", planted(256 * UNITS - 100, 6, 4, seed=1))
    line = refused(CmdgpuError, dataclasses.replace(begun.job, store=tmp_path / "other.zarr"))
    assert "has another source digest than the fit was begun with (sha256:" in line or "digest" in line
    limited = dataclasses.replace(begun.job, memory_limit=10_000_000)
    assert "the memory limit is 10 MB; give" in refused(MemoryLimitError, limited)
    real = jobs.code_identity

    def other(devices: Sequence[torch.device]) -> dict[str, str | None]:
        return {**real(devices), "torch": "1.0\x1b[2J"}

    monkeypatch.setattr(jobs, "code_identity", other)
    line = refused(CmdgpuError, begun.job)
    assert (
        f"has another code torch than the fit was begun with (1.0\\x1b[2J, not {torch.__version__})" in line
    )


def test_a_process_does_one_thing_at_a_time_with_the_threads_it_is_told() -> None:
    before, inside, told = torch.get_num_threads(), list[int](), list[int]()

    def work(threads: int) -> None:
        with whole_process(threads), whole_process():
            inside.append(threads)
            time.sleep(0.01)
            told.append(torch.get_num_threads() if inside == [threads] else -1)
            inside.remove(threads)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(1, 5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(told) == [1, 2, 3, 4]
    work(before + 1)
    assert torch.get_num_threads() == before
