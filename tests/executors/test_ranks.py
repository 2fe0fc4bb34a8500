"""Laws of a fit by the ranks of a launcher: they meet in the ledger, and any of them may be missing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from cmdgpu.results import Result, StoredWriter, partials_of, progress_of
from cmdgpu.streaming.executors import RankStride
from tests.executors.world import UNITS, World, digest
from tests.faults.children import ROOT

FIT = ("fit", "s.zarr", "-o", "out.zarr", "--modes", "3", "--samples", "60", "--device", "cpu")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "-m")


@contextmanager
def started(out: Path, *arguments: str, **environment: str) -> Generator[subprocess.Popen[str]]:
    """``python <arguments>`` beside a place for a fit; ended, with all its children, at the end."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=out.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def n_done(out: Path) -> int:
    return sum(progress_of(partial)[0] for partial in partials_of(out))


@pytest.mark.slow
def test_two_ranks_of_torchrun_leave_the_bytes_of_one_process(world: World, tmp_path: Path) -> None:
    out = world.out(tmp_path)
    with started(out, *TORCHRUN, "cmdgpu", *FIT, "--executor", "ranks", "--json", "-q") as torchrun:
        told, errors = torchrun.communicate(timeout=120)
    assert torchrun.returncode == 0, errors
    assert digest(out) == world.expected
    assert partials_of(out) == []
    answers = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    assert answers and all(answer["ok"] for answer in answers)


@pytest.mark.slow
def test_a_rank_killed_in_the_middle_and_started_again_alone_finishes(world: World, tmp_path: Path) -> None:
    out = world.out(tmp_path)
    slowly = ("tests.executors.slow_rank", "0.2", "0.2", *FIT, "--executor", "ranks")
    with started(out, *TORCHRUN, *slowly) as torchrun:
        deadline = time.monotonic() + 60
        while n_done(out) < 3:
            assert torchrun.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        ranks = psutil.Process(torchrun.pid).children()
        (victim,) = [rank for rank in ranks if rank.environ().get("RANK") == "1"]
        victim.kill()
        torchrun.communicate(timeout=60)
        assert torchrun.returncode != 0
    assert 3 <= n_done(out) < UNITS, "the kill came when all was done"
    with started(out, "-m", *slowly, RANK="1", WORLD_SIZE="2") as alone:
        _, errors = alone.communicate(timeout=60)
    assert alone.returncode == 0, errors
    assert digest(out) == world.expected


def test_a_rank_of_an_array_job_does_what_those_that_never_come_leave(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cmdgpu.fitting.GRACE_S", 0.3)
    out = world.out(tmp_path)
    first = world.fit(out, RankStride(1, 4))
    assert digest(out) == world.expected
    assert first.metrics_["bytes_read"] == UNITS * 256 * 6 * 4, "a unit was read twice"
    assert world.fit(out, RankStride(2, 4)).metrics_["bytes_read"] == 0
    assert digest(out) == world.expected


def test_a_rank_leaves_alone_what_others_do_in_time(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And all of them finish at once."""
    both, finish = threading.Barrier(2), StoredWriter.finish

    def together(writer: StoredWriter) -> Result:
        both.wait(30)
        return finish(writer)

    monkeypatch.setattr(StoredWriter, "finish", together)
    for attempt in range(3):
        out = world.out(tmp_path / str(attempt))
        read = list[int]()

        def work(rank: int, out: Path = out, read: list[int] = read) -> None:
            read.append(world.fit(out, RankStride(rank, 2)).metrics_["bytes_read"])

        ranks = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
        assert read == [UNITS // 2 * 256 * 6 * 4] * 2
        assert digest(out) == world.expected
