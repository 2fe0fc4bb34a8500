"""Laws of two writers: a store belongs to one of them, and nothing acknowledged is lost to the other.

A writer is a process of its own: this file, run as a program. The same harness must see the loss when the
lock or its order is taken away; what it must see is the list of ``problems``.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final
from unittest.mock import patch

import numpy as np
import pytest

from cmdgpu.errors import CmdgpuError, StoreLocked
from cmdgpu.notation import F32
from cmdgpu.store.journal import Journal
from cmdgpu.store.parameter_map import ParameterMap, whole
from cmdgpu.store.verification import verify_store
from cmdgpu.store.view import StoreView
from tests.faults.children import Child

HERE = "tests.faults.test_two_writers"
ONE, TWO = 1, 2
ROWS, N_CHUNKS, N = 256, 3, 600
LONGEST_S = 60
FLUSH: Final = "_flush_names"
"""The step of an append between its files and its fence."""


def values(writer: int, step: int) -> F32:
    """(N_CHUNKS * ROWS,) a column that tells who wrote it."""
    column = np.full(N_CHUNKS * ROWS, np.nan, dtype=np.float32)
    column[:N] = np.random.default_rng([writer, step]).standard_normal(N)
    return column


def put(journal: Journal, writer: int) -> int:
    """One more snapshot; its step."""
    step = len(journal.view.steps)
    column = values(writer, step)
    journal.append(column, step, {"writer": float(writer)}, column[:8])
    return step


# ---- the writers --------------------------------------------------------------------------------------


def hold(store: Path, writer: int, count: int) -> None:
    """Open once and append."""
    journal = Journal.open(store)
    say("OPEN")
    for _ in range(count):
        hear()
        say(f"ACK {put(journal, writer)}")
    journal.close()


def take_turns(store: Path, writer: int, count: int) -> None:
    """Open again for every append, trying until the lock is free."""
    dice = random.Random(writer)
    for _ in range(count):
        while True:
            try:
                journal = Journal.open(store)
                break
            except StoreLocked:
                time.sleep(dice.uniform(0, 0.01))
        say(f"ACK {put(journal, writer)}")
        journal.close()
        time.sleep(dice.uniform(0, 0.002))


def pause_before_the_names(store: Path, writer: int, count: int) -> None:
    """Like ``hold``, and stand still in every append once its chunks are written."""
    flush: Callable[[Journal], None] = getattr(Journal, FLUSH)

    def pause(journal: Journal) -> None:
        say("WRITTEN")
        hear()
        flush(journal)

    with patch.object(Journal, FLUSH, pause):
        hold(store, writer, count)


def fork_and_wait(store: Path, writer: int, count: int) -> None:
    """Open, fork as a data loader forks its workers, and wait to be killed."""
    journal = Journal.open(store)
    forked = os.fork()
    if not forked:
        time.sleep(LONGEST_S)
        os._exit(0)
    say(f"FORKED {forked}")
    time.sleep(LONGEST_S)
    journal.close()


VERBS: dict[str, Callable[[Path, int, int], None]] = {
    verb.__name__: verb for verb in (hold, take_turns, pause_before_the_names, fork_and_wait)
}


def no_lock() -> None:
    """A file system whose locks bind nobody."""
    patch("cmdgpu.store.durable.fcntl.flock", does_nothing).start()


def no_fence() -> None:
    patch.object(Journal, "_fence", does_nothing).start()


def read_before_locking() -> None:
    """The edge may be another's by the time the lock is granted."""
    open_journal = Journal.open

    def open_early(path: Path) -> Journal:
        view = StoreView.open(path)
        time.sleep(0.005)  # a machine is not always quick here, and the fault must not need luck to show
        with patch.object(StoreView, "open", staticmethod(lambda path: view)):  # pyright: ignore
            return open_journal(path)

    patch.object(Journal, "open", staticmethod(open_early)).start()


def keep_in_forks() -> None:
    """As if nobody had thought of forked children."""
    patch("cmdgpu.store.durable._HELD.add", does_nothing).start()


def does_nothing(*arguments: object) -> None:
    return None


MUTATIONS: dict[str, Callable[[], None]] = {
    change.__name__: change for change in (no_lock, no_fence, read_before_locking, keep_in_forks)
}


def say(line: str) -> None:
    print(line, flush=True)


def hear() -> str:
    return sys.stdin.readline().strip()


def main(verb: str, store: str, writer: str, count: str, *mutations: str) -> int:
    signal.alarm(LONGEST_S)
    for name in mutations:
        MUTATIONS[name]()
    say("READY")
    hear()
    try:
        VERBS[verb](Path(store), int(writer), int(count))
    except CmdgpuError as error:
        say(f"ERROR {type(error).__name__}: {error}")
        return 1
    return 0


# ---- what the tests ask -------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path, layout = tmp_path / "run.zarr", ParameterMap(whole([("W", "parameter", "float32", (N,))]))
    Journal.create(
        path, layout, dtype="float32", rows=ROWS, unit="step", sketch_rows=np.arange(8, dtype=np.int64)
    ).close()
    return path


def writer(verb: str, store: Path, name: int, count: int, *mutations: str) -> Child:
    child = Child(HERE, verb, store, str(name), str(count), *mutations)
    child.hear_until("READY")
    return child


def problems(store: Path, acknowledged: list[tuple[int, int]]) -> list[str]:
    """What is not as it was acknowledged, (writer, step) by (writer, step); nothing, in a good store."""
    try:
        view = StoreView.open(store)
    except CmdgpuError as error:
        return [str(error)]
    found = [str(damage) for damage in verify_store(store).damaged]
    if len(view.steps) < len(acknowledged):
        found.append(f"{len(acknowledged)} snapshots were acknowledged, {len(view.steps)} are there")
    for name, step in acknowledged:
        if step not in view.steps:
            found.append(f"step {step} of writer {name} is gone")
            continue
        column = np.empty(N_CHUNKS * ROWS, dtype=np.float32)
        try:
            for i in range(N_CHUNKS):
                view.read_chunk(i, step, column[i * ROWS : (i + 1) * ROWS])
        except CmdgpuError as error:
            found.append(str(error))
            continue
        if view.scalars["writer"][step] != name or column.tobytes() != values(name, step).tobytes():
            found.append(f"step {step} of writer {name} holds something else")
    return found


def side_by_side(store: Path, count: int, *mutations: str) -> tuple[list[tuple[int, int]], list[str]]:
    """Two writers that take turns as the lock lets them: what was acknowledged, and what went wrong."""
    with (
        writer("take_turns", store, ONE, count, *mutations) as one,
        writer("take_turns", store, TWO, count, *mutations) as two,
    ):
        for child in (one, two):
            child.tell("go")
        ended = [(child, child.end()) for child in (one, two)]
    acknowledged = [(ONE, t) for t in one.numbers("ACK")] + [(TWO, t) for t in two.numbers("ACK")]
    wrong = [f"a writer ended with {code}: {child.said[-1]}" for child, code in ended if code]
    return acknowledged, wrong + problems(store, acknowledged)


@pytest.mark.slow
def test_two_writers_who_wait_for_the_lock_lose_nothing(store: Path) -> None:
    acknowledged, wrong = side_by_side(store, 50)
    assert wrong == []
    assert len(acknowledged) == len(StoreView.open(store).steps) == 100
    order = [int(name) for name in StoreView.open(store).scalars["writer"]]
    assert sum(a != b for a, b in itertools.pairwise(order)) > 5, "they hardly met"


@pytest.mark.slow
@pytest.mark.parametrize("mutations", [("no_lock", "no_fence"), ("read_before_locking", "no_fence")])
def test_the_loss_shows_without_the_lock_or_with_a_read_before_it(
    store: Path, mutations: tuple[str, ...]
) -> None:
    _, wrong = side_by_side(store, 50, *mutations)
    assert wrong, "the harness is blind to what a lock is for"


def test_the_second_of_two_writers_is_refused_and_told_who_is_first(store: Path) -> None:
    with writer("hold", store, ONE, 50) as one, writer("hold", store, TWO, 50) as two:
        for child in (one, two):
            child.tell("go")
        heard = {child: child.hear() for child in (one, two)}
        (first,) = (child for child, line in heard.items() if line == "OPEN")
        (second,) = (child for child in heard if child is not first)
        assert heard[second].startswith("ERROR StoreLocked") and second.end() == 1
        for _ in range(50):
            with pytest.raises(StoreLocked, match=rf"writing here \(process {first.pid}\); close that"):
                Journal.open(store)
            first.tell("append")
            first.hear_until("ACK")
        assert first.end() == 0
    who = ONE if first is one else TWO
    assert problems(store, [(who, step) for step in range(50)]) == []
    assert len(StoreView.open(store).steps) == 50


# ---- the fence alone ----------------------------------------------------------------------------------


def rival_commits(store: Path, when: str, *mutations: str) -> tuple[str, list[str]]:
    """A writer without a lock, and a rival that commits the same index behind its back.

    The rival opens and commits before the append; or while the append stands between its chunks and its
    fence; or opens before and commits then.
    """
    with writer("pause_before_the_names", store, ONE, 1, "no_lock", *mutations) as slow:
        slow.tell("go")
        slow.hear_until("OPEN")
        rival = None
        if when != "chunks written":
            rival = Journal.open(store)
        if rival is not None and when == "opened":
            put(rival, TWO)
        slow.tell("append")
        if slow.hear() == "WRITTEN":
            rival = rival or Journal.open(store)
            put(rival, TWO)
            slow.tell("go on")
        slow.end()
        assert rival is not None
        rival.close()
    return slow.said[-1], problems(store, [(TWO, 0)])


@pytest.mark.parametrize("when", ["opened", "chunks written", "opened, chunks written"])
def test_a_commit_between_reading_and_committing_is_found_without_any_lock(store: Path, when: str) -> None:
    said, wrong = rival_commits(store, when)
    assert said.startswith("ERROR StoreFenced: ") and "another writer committed here" in said
    assert wrong == []
    journal = Journal.open(store)
    assert put(journal, TWO) == 1
    journal.close()
    assert problems(store, [(TWO, 0), (TWO, 1)]) == []


def test_the_loss_shows_without_the_fence(store: Path) -> None:
    said, wrong = rival_commits(store, "chunks written", "no_fence")
    assert said == "ACK 0" and wrong, "the harness is blind to what the fence is for"


# ---- forks --------------------------------------------------------------------------------------------


def kill_the_parent(store: Path, *mutations: str) -> bool:
    """Kill a writer that has forked; whether the store is free while the forked child lives on."""
    with writer("fork_and_wait", store, ONE, 0, *mutations) as parent:
        parent.tell("go")
        forked = int(parent.hear_until("FORKED").split()[1])
        try:
            with pytest.raises(StoreLocked, match=f"process {parent.pid}"):
                Journal.open(store)
            os.kill(parent.pid, signal.SIGKILL)
            os.waitid(os.P_PID, parent.pid, os.WEXITED | os.WNOWAIT)
            os.kill(forked, 0)
            try:
                Journal.open(store).close()
            except StoreLocked:
                return False
            return True
        finally:
            os.kill(forked, signal.SIGKILL)


def test_a_forked_child_does_not_keep_the_store_of_its_dead_parent(store: Path) -> None:
    assert kill_the_parent(store)


def test_a_lock_that_forks_inherit_is_found(store: Path) -> None:
    assert not kill_the_parent(store, "keep_in_forks")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
