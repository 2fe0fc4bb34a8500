"""Laws of the append protocol: what is acknowledged survives, what is not was never there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from cmdgpu.errors import (
    CmdgpuError,
    DurabilityUnknown,
    NotAStore,
    StoreCorrupt,
    StoreExists,
    StoreFenced,
    StoreLocked,
    UsageError,
    WriteFailed,
)
from cmdgpu.store import format as fmt
from cmdgpu.store.journal import Journal
from cmdgpu.store.view import StoreView
from tests.faults.disk import FAULTS, Call, Died, Disk, Fault, every_fault
from tests.verbs import (
    N_CHUNKS,
    STEPS,
    append,
    build_store,
    check_store_holds,
    create_store,
    leftovers,
    open_xarray,
    tree_bytes,
)

NEXT = 30
"""The step every test appends."""
COMMIT = Path(fmt.WEIGHTS, fmt.DOCUMENT)
ARRAYS = (fmt.WEIGHTS, fmt.STEP, fmt.SKETCH, fmt.SKETCH_ROW)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_store(tmp_path_factory.mktemp("base") / "run.zarr")


@pytest.fixture
def store(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "run.zarr"))


def watch(store: Path, act: Callable[[Journal], object]) -> list[Call]:
    journal = Journal.open(store)
    disk = Disk()
    try:
        with disk.in_place():
            act(journal)
    finally:
        journal.close()
    return disk.calls


def where(calls: list[Call], name: str, path: Path, *, to: bool = False) -> list[int]:
    return [i for i, c in enumerate(calls) if c.name == name and (c.to if to else c.path) == path]


# ---- order of the calls ---------------------------------------------------------------------------------


def check_flushed_before_renamed(calls: list[Call]) -> None:
    """Every file: all writes, then a flush, then the rename."""
    renames = [(i, c) for i, c in enumerate(calls) if c.name == "rename" and where(calls, "write", c.path)]
    assert renames
    for i, call in renames:
        writes, flushes = where(calls, "write", call.path), where(calls, "fsync", call.path)
        assert flushes, f"{call.to} was never flushed"
        assert max(writes) < max(flushes) < i, f"{call.to} was renamed before its bytes were flushed"


def test_every_file_is_flushed_before_it_gets_its_name(store: Path) -> None:
    check_flushed_before_renamed(watch(store, lambda journal: append(journal, NEXT, loss=1.0, fresh=2.0)))


def test_chunks_and_their_names_are_flushed_before_the_commit_and_the_commit_after_it(store: Path) -> None:
    calls = watch(store, lambda journal: append(journal, NEXT, loss=1.0, fresh=2.0))
    (commit,) = where(calls, "rename", store / COMMIT, to=True)
    t = len(STEPS)
    for directory, names in {
        fmt.WEIGHTS: [fmt.chunk_name(i, t) for i in range(N_CHUNKS)],
        fmt.SKETCH: [fmt.chunk_name(0, t), fmt.DOCUMENT],
        fmt.STEP: [fmt.chunk_name(0), fmt.DOCUMENT],
        "loss": [fmt.chunk_name(0), fmt.DOCUMENT],
    }.items():
        named = [i for name in names for i in where(calls, "rename", store / directory / name, to=True)]
        assert len(named) == len(names)
        flushes = where(calls, "fsync", store / directory)
        assert any(max(named) < i < commit for i in flushes), f"the names in {directory}/ could be lost"
    assert where(calls, "fsync", store / fmt.WEIGHTS)[-1] > commit, "the commit could be lost"
    assert [c for c in calls[commit + 1 :] if c.name in ("write", "rename")] == [], "work after the commit"


def test_a_new_scalar_is_whole_and_named_durably_before_the_commit(store: Path) -> None:
    calls = watch(store, lambda journal: append(journal, NEXT, fresh=2.0))
    (commit,) = where(calls, "rename", store / COMMIT, to=True)
    (published,) = where(calls, "rename", store / "fresh", to=True)
    building = calls[published].path
    inside = [i for i, c in enumerate(calls) if c.name == "rename" and c.path.parent == building]
    assert len(inside) == 2
    assert any(max(inside) < i < published for i in where(calls, "fsync", building))
    assert any(published < i < commit for i in where(calls, "fsync", store))


def test_a_new_store_is_flushed_whole_before_it_gets_its_name(tmp_path: Path) -> None:
    path, disk = tmp_path / "runs" / "first" / "run.zarr", Disk()
    with disk.in_place():
        create_store(path).close()
    calls = disk.calls
    check_flushed_before_renamed(calls)
    (published,) = where(calls, "rename", path, to=True)
    building = calls[published].path
    for directory in [building, *(building / name for name in ("weights", "step", "sketch", "sketch_row"))]:
        inside = [
            i for i, c in enumerate(calls[:published]) if c.name == "rename" and c.path.parent == directory
        ]
        flushes = where(calls, "fsync", directory)
        assert any(max(inside, default=0) < i < published for i in flushes), f"{directory.name} not flushed"
    assert any(i > published for i in where(calls, "fsync", path.parent))
    for made in (tmp_path / "runs" / "first", tmp_path / "runs"):
        assert where(calls, "fsync", made.parent), f"the name of the new directory {made.name} could be lost"


# ---- faults at every call -------------------------------------------------------------------------------


class Reopened:
    """After a fault and the end of its writer: all of the old or all of the new, and work goes on.

    Most faults leave the same bytes; each outcome is looked at once.
    """

    def __init__(self) -> None:
        self._known: set[str] = set()

    def check(self, store: Path, allowed: list[list[int]]) -> list[int]:
        view = StoreView.open(store)
        seen, scalars = view.steps.tolist(), sorted(view.scalars)
        assert seen in allowed
        assert json.loads((store / COMMIT).read_bytes())["shape"][1] == len(seen)
        Journal.open(store).close()
        assert leftovers(store) == []
        if self._is_new(store):
            check_store_holds(store, seen, scalars)
            with open_xarray(store) as opened:
                assert set(opened.data_vars) | set(opened.coords) == set(ARRAYS) | set(scalars)
                assert opened["step"].values.tolist() == seen
            journal = Journal.open(store)
            append(journal, NEXT + 5, loss=9.0)
            journal.close()
            check_store_holds(store, [*seen, NEXT + 5], sorted({*scalars, "loss"}))
        return seen

    def check_now(self, store: Path, steps: list[int], scalars: Sequence[str]) -> None:
        if self._is_new(store):
            check_store_holds(store, steps, scalars)

    def _is_new(self, store: Path) -> bool:
        key = fmt.sha256(*(part for name, raw in tree_bytes(store).items() for part in (name.encode(), raw)))
        fresh = key not in self._known
        self._known.add(key)
        return fresh


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_any_call_of_an_append_leaves_the_old_or_the_new_snapshots(
    base: Path, tmp_path: Path, fault: Fault
) -> None:
    old, new, scalars = list(STEPS), [*STEPS, NEXT], ("fresh", "loss")
    reopened, visible = Reopened(), Reopened()
    for disk in every_fault(fault):
        store = Path(shutil.copytree(base, tmp_path / f"{disk.fail_at}.zarr"))
        journal, acknowledged = Journal.open(store), False
        try:
            with disk.in_place():
                append(journal, NEXT, **dict.fromkeys(scalars, 7.0))
                acknowledged = True
        except Died:
            pass
        except DurabilityUnknown:
            with pytest.raises(CmdgpuError):  # nobody knows what is on disk: the handle is dropped
                append(journal, NEXT + 1)
        except WriteFailed as error:
            assert error.file is not None
            assert leftovers(store) == []
            visible.check_now(store, old, ["loss"])
            with Disk().in_place():
                append(journal, NEXT, **dict.fromkeys(scalars, 8.0))
            visible.check_now(store, new, scalars)
            assert StoreView.open(store).scalars["loss"][-1] == 8.0
        assert acknowledged != disk.fired, "the fault was swallowed"
        journal.close()
        seen = reopened.check(store, [old, new])
        assert seen == new or not acknowledged
        shutil.rmtree(store)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_any_call_of_a_creation_leaves_nothing_or_an_empty_store(
    tmp_path: Path, fault: Fault
) -> None:
    for disk in every_fault(fault):
        folder = tmp_path / str(disk.fail_at)
        path = folder / "run.zarr"
        try:
            with disk.in_place():
                journal = create_store(path)
            journal.close()
        except Died:
            pass
        except CmdgpuError:
            assert not folder.exists() or leftovers(folder) == []
        if path.exists():
            journal = Journal.open(path)
            assert journal.view.steps.tolist() == []
        else:
            assert disk.fired
            journal = create_store(path)
        with Disk().in_place():
            append(journal, 1)
        journal.close()
        check_store_holds(path, [1], [])


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_any_call_of_a_rewind_leaves_a_prefix_that_goes_on(
    base: Path, tmp_path: Path, fault: Fault
) -> None:
    reopened = Reopened()
    for disk in every_fault(fault):
        store = Path(shutil.copytree(base, tmp_path / f"{disk.fail_at}.zarr"))
        journal = Journal.open(store)
        done = False
        try:
            with disk.in_place():
                journal.rewind(STEPS[0])
                done = True
        except (Died, CmdgpuError):
            pass
        journal.close()
        assert done != disk.fired, "the fault was swallowed"
        seen = reopened.check(store, [list(STEPS[:n]) for n in (1, 2, 3)])
        assert seen == [STEPS[0]] or not done
        shutil.rmtree(store)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_failed_append_left_never_lies_beyond_the_edge_of_a_rewind(
    base: Path, tmp_path: Path, fault: Fault
) -> None:
    """The journal goes on after a full disk; its orphans must be gone before T - 1 is committed."""
    reopened = Reopened()
    calls = watch(Path(shutil.copytree(base, tmp_path / "twin.zarr")), lambda journal: append(journal, NEXT))
    committed = max(i for i, c in enumerate(calls) if c.to is not None and c.to.name == fmt.DOCUMENT)
    for disk in every_fault(fault):
        store = Path(shutil.copytree(base, tmp_path / f"{disk.fail_at}.zarr"))
        journal = Journal.open(store)
        with pytest.raises(WriteFailed), Disk(committed + 1, "disk").in_place():
            append(journal, NEXT)
        assert (store / fmt.WEIGHTS / fmt.chunk_name(0, len(STEPS))).exists()
        with contextlib.suppress(Died, CmdgpuError), disk.in_place():
            journal.rewind(STEPS[0])
        journal.close()
        reopened.check(store, [list(STEPS[:n]) for n in (1, 2, 3)])
        shutil.rmtree(store)


def test_a_scalar_of_an_append_that_failed_does_not_haunt_a_later_one(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its leftover directory must not stand for chunks that were never written."""
    monkeypatch.setattr(fmt, "SMALL_CHUNK", 2)
    path = build_store(store.parent / "small.zarr")
    twin = Path(shutil.copytree(path, path.with_name("twin.zarr")))
    calls = watch(twin, lambda journal: append(journal, NEXT, fresh=1.0))
    (published,) = [i for i, c in enumerate(calls) if c.to is not None and c.to.name == "fresh"]
    journal = Journal.open(path)
    with pytest.raises(Died), Disk(published + 2).in_place():
        append(journal, NEXT, fresh=1.0)
    assert (path / "fresh").is_dir()
    journal.close()
    journal = Journal.open(path)
    for step in range(40, 46):
        append(journal, step, loss=0.0)
    append(journal, 50, loss=0.0, fresh=5.0)
    journal.close()
    check_store_holds(path, [*STEPS, *range(40, 46), 50], ["fresh", "loss"])
    fresh = StoreView.open(path).scalars["fresh"]
    assert np.isnan(fresh[:-1]).all()
    assert fresh[-1] == 5.0


# ---- leftovers ------------------------------------------------------------------------------------------


def test_opening_a_writer_removes_what_a_killed_one_left(store: Path) -> None:
    before = tree_bytes(store)
    t = len(STEPS)
    for name in (f"c.0.{t}", f"c.2.{t}", "c.1.3.0123456789abcdef.partial", "zarr.json.00ff.partial"):
        (store / fmt.WEIGHTS / name).write_bytes(b"torn")
    (store / fmt.SKETCH / f"c.0.{t}").write_bytes(b"torn")
    (store / fmt.STEP / "c.0.ab.partial").write_bytes(b"torn")
    Journal.open(store).close()
    assert tree_bytes(store) == before


def test_a_reader_does_not_see_what_lies_beyond_the_edge_and_removes_nothing(store: Path) -> None:
    (store / fmt.WEIGHTS / f"c.0.{len(STEPS)}").write_bytes(b"torn")
    before = tree_bytes(store)
    check_store_holds(store, STEPS)
    assert tree_bytes(store) == before


@pytest.mark.parametrize("array", [fmt.WEIGHTS, fmt.SKETCH])
def test_a_chunk_beyond_the_next_one_is_refused_and_nothing_is_deleted(store: Path, array: str) -> None:
    t = len(STEPS)
    (store / fmt.WEIGHTS / f"c.0.{t}").write_bytes(b"index T: would be deleted")
    (store / array / f"c.0.{t + 1}").write_bytes(b"index T + 1: tells of a newer commit")
    (store / fmt.WEIGHTS / "c.0.77.partial").write_bytes(b"unfinished")
    before = tree_bytes(store)
    with pytest.raises(StoreCorrupt, match=r"older zarr\.json was put back") as caught:
        Journal.open(store)
    assert caught.value.file == str(store / array / f"c.0.{t + 1}")
    assert tree_bytes(store) == before


def test_an_older_commit_put_back_loses_no_newer_chunk(store: Path) -> None:
    old = (store / COMMIT).read_bytes()
    journal = Journal.open(store)
    append(journal, 30, loss=0.0)
    append(journal, 40, loss=0.0)
    journal.close()
    newest = (store / COMMIT).read_bytes()
    (store / COMMIT).write_bytes(old)
    before = tree_bytes(store)
    with pytest.raises(StoreCorrupt):
        Journal.open(store)
    assert tree_bytes(store) == before
    (store / COMMIT).write_bytes(newest)
    check_store_holds(store, [*STEPS, 30, 40])


# ---- one writer -----------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_naming_the_first_ones_process(store: Path) -> None:
    journal = Journal.open(store)
    with pytest.raises(StoreLocked, match=f"process {os.getpid()}") as caught:
        Journal.open(store)
    assert caught.value.file == str(store)
    append(journal, NEXT, loss=1.0)
    journal.close()
    Journal.open(store).close()
    check_store_holds(store, [*STEPS, NEXT])


def test_a_store_that_cannot_be_opened_is_left_without_a_lock_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(NotAStore):
        Journal.open(tmp_path / "folder")
    assert list((tmp_path / "folder").iterdir()) == []


def test_a_commit_behind_the_writers_back_is_fenced_and_stays(store: Path) -> None:
    mine = Journal.open(store)
    (store / fmt.WEIGHTS / ".lock").unlink()  # a file system whose locks bind nobody
    rival = Journal.open(store)
    append(rival, NEXT, loss=1.0)
    rival.close()
    theirs = (store / COMMIT).read_bytes()
    with pytest.raises(StoreFenced) as caught:
        append(mine, NEXT + 1, loss=2.0)
    assert caught.value.file == str(store / COMMIT)
    assert (store / COMMIT).read_bytes() == theirs
    with pytest.raises(CmdgpuError):
        append(mine, NEXT + 2)
    mine.close()
    assert StoreView.open(store).steps.tolist() == [*STEPS, NEXT]


def test_the_edge_is_read_after_the_lock_is_taken(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read before, it could be the edge of a writer that has committed since."""
    from cmdgpu.store import durable

    taken = durable.Lock.__init__

    def commit_first(lock: durable.Lock, path: Path) -> None:
        monkeypatch.setattr(durable.Lock, "__init__", taken)
        other = Journal.open(store)
        append(other, NEXT, loss=1.0)
        other.close()
        taken(lock, path)

    monkeypatch.setattr(durable.Lock, "__init__", commit_first)
    journal = Journal.open(store)
    assert journal.view.steps.tolist() == [*STEPS, NEXT]
    append(journal, NEXT + 1, loss=1.0)
    journal.close()
    check_store_holds(store, [*STEPS, NEXT, NEXT + 1])


def test_nothing_is_created_over_something_that_is_there(store: Path, tmp_path: Path) -> None:
    before = tree_bytes(store)
    with pytest.raises(StoreExists):
        create_store(store)
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreExists):
        create_store(tmp_path / "empty")
    assert tree_bytes(store) == before
    assert leftovers(tmp_path) == []


# ---- what an append says --------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 24, 25])
def test_a_step_that_does_not_increase_is_refused_before_a_byte_is_written(store: Path, step: int) -> None:
    journal = Journal.open(store)
    before = tree_bytes(store)
    with pytest.raises(UsageError, match=rf"step {step}"):
        append(journal, step, loss=1.0)
    assert tree_bytes(store) == before
    journal.close()


def test_a_committed_chunk_is_never_touched_again(store: Path) -> None:
    def inodes() -> dict[str, int]:
        chunks = [store / name for name in tree_bytes(store) if name.startswith(("weights/c.", "sketch/c."))]
        return {str(chunk): chunk.stat().st_ino for chunk in chunks}

    before = inodes()
    journal = Journal.open(store)
    append(journal, NEXT, loss=1.0)
    journal.close()
    assert before
    assert before.items() <= inodes().items()


def test_a_reader_keeps_its_snapshots_while_a_writer_appends(store: Path) -> None:
    view = StoreView.open(store)
    journal = Journal.open(store)
    append(journal, NEXT, loss=1.0)
    assert view.steps.tolist() == list(STEPS)
    assert StoreView.open(store).steps.tolist() == [*STEPS, NEXT]
    out = np.empty(view.rows, dtype=np.float32)
    view.read_chunk(0, len(STEPS) - 1, out)
    journal.close()


def test_the_commit_carries_the_digest_of_the_crcs_each_file_carries(store: Path) -> None:
    head = json.loads((store / COMMIT).read_bytes())["attributes"]["cmdgpu"]
    for t in range(len(STEPS)):
        files = [store / fmt.WEIGHTS / fmt.chunk_name(i, t) for i in range(N_CHUNKS)]
        files.append(store / fmt.SKETCH / fmt.chunk_name(0, t))
        assert head["digests"][t] == fmt.sha256(*(file.read_bytes()[-4:] for file in files))
