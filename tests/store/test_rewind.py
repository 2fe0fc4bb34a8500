"""Laws of going back: what lies after a step is dropped, one snapshot at a time, and recording goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from cmdgpu.errors import StepNotFound, StoreFenced
from cmdgpu.store import format as fmt
from cmdgpu.store.journal import Journal
from cmdgpu.store.view import StoreView
from tests.faults.disk import Died, Disk
from tests.verbs import STEPS, append, build_store, check_store_holds, open_xarray, tree_bytes


@pytest.fixture(params=[False, True], ids=["plain", "zstd"])
def store(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return build_store(tmp_path / "run.zarr", [*STEPS, 30], compressed=request.param)


@pytest.mark.parametrize("keep", [1, 2, 3, 4])
def test_every_snapshot_up_to_and_including_the_step_stays(store: Path, keep: int) -> None:
    steps = [*STEPS, 30]
    journal = Journal.open(store)
    assert journal.rewind(steps[keep - 1]) == len(steps) - keep
    journal.close()
    check_store_holds(store, steps[:keep])
    assert open_xarray(store)["step"].values.tolist() == steps[:keep]


def test_a_rewound_store_is_the_store_that_was_never_that_long(store: Path, tmp_path: Path) -> None:
    journal = Journal.open(store)
    journal.rewind(STEPS[-1])
    append(journal, 40, loss=10.0)
    journal.close()
    compressed = journal.view.is_compressed
    straight = build_store(tmp_path / "straight.zarr", [*STEPS, 40], compressed=compressed)
    assert tree_bytes(store) == tree_bytes(straight)


def test_another_course_after_a_rewind_leaves_nothing_of_the_first(store: Path) -> None:
    journal = Journal.open(store)
    journal.rewind(STEPS[0])
    for step in (5, 7, 9, 11, 13):
        append(journal, step, loss=step / 4)
    journal.close()
    check_store_holds(store, [STEPS[0], 5, 7, 9, 11, 13])


def test_a_step_that_was_not_recorded_is_refused_before_anything_is_dropped(store: Path) -> None:
    before = tree_bytes(store)
    journal = Journal.open(store)
    with pytest.raises(StepNotFound, match=r"nearest recorded: 10, 25") as caught:
        journal.rewind(20)
    journal.close()
    assert (caught.value.step, caught.value.file) == (20, str(store))
    assert tree_bytes(store) == before


def test_killed_between_commit_and_deletion_the_next_open_deletes(store: Path) -> None:
    watched = Disk()
    twin = Path(shutil.copytree(store, store.with_name("twin.zarr")))
    journal = Journal.open(twin)
    with watched.in_place():
        journal.rewind(STEPS[-1])
    journal.close()
    commit = next(i for i, c in enumerate(watched.calls) if c.to == twin / fmt.WEIGHTS / fmt.DOCUMENT)
    first_deletion = next(i for i, c in enumerate(watched.calls) if c.name == "unlink")
    assert commit < first_deletion, "a chunk was deleted while it was committed"
    flushed = [i for i, c in enumerate(watched.calls) if c.name == "fsync" and c.path == twin / fmt.WEIGHTS]
    assert any(commit < i < first_deletion for i in flushed), "the deletion could outlive the commit"

    journal = Journal.open(store)
    with pytest.raises(Died), Disk(first_deletion + 1).in_place():
        journal.rewind(STEPS[-1])
    journal.close()
    gone = store / fmt.WEIGHTS / fmt.chunk_name(0, len(STEPS))
    assert gone.exists()
    check_store_holds(store, STEPS)
    Journal.open(store).close()
    assert not gone.exists()
    check_store_holds(store, STEPS)


def test_a_rewind_is_fenced_like_an_append(store: Path) -> None:
    mine = Journal.open(store)
    (store / fmt.WEIGHTS / ".lock").unlink()
    rival = Journal.open(store)
    append(rival, 50, loss=0.0)
    rival.close()
    with pytest.raises(StoreFenced):
        mine.rewind(STEPS[0])
    mine.close()
    assert StoreView.open(store).steps.tolist() == [*STEPS, 30, 50]


def test_scalars_first_given_after_the_step_stay_as_series_of_nothing(store: Path) -> None:
    journal = Journal.open(store)
    append(journal, 50, loss=1.0, late=2.0)
    journal.rewind(30)
    append(journal, 60, loss=15.0)
    journal.close()
    check_store_holds(store, [*STEPS, 30, 60], ["late", "loss"])
    assert np.isnan(StoreView.open(store).scalars["late"]).all()
