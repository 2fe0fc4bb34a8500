"""Laws of what is kept of an imported snapshot, and of a column that is made while it is written."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmdgpu.errors import CheckpointError, StoreCorrupt
from cmdgpu.notation import AnyArray
from cmdgpu.store import format as fmt
from cmdgpu.store.journal import Journal
from cmdgpu.store.provenance import Origin, SourceFile
from cmdgpu.store.view import StoreView
from tests.verbs import (
    N_CHUNKS,
    ROWS,
    STEPS,
    append,
    build_store,
    check_store_holds,
    edit_document,
    leftovers,
    stored_at,
    tree_bytes,
)

ORIGIN = Origin((SourceFile("runs/ep30.pt", 17, "ab" * 32), SourceFile("b", 0, "0" * 64)), "cd" * 32)
COMMIT = Path(fmt.WEIGHTS, fmt.DOCUMENT)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_store(tmp_path_factory.mktemp("base") / "run.zarr")


@pytest.fixture
def store(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "run.zarr"))


class Streamed:
    """``values_at(step)``, a chunk at a time, in the buffer of the thread that asks."""

    def __init__(self, step: int, sketch_rows: AnyArray, *, broken: bool = False) -> None:
        self._column = stored_at(step)
        self._rows = sketch_rows
        self._own = threading.local()
        self._broken = broken
        self.asked: list[int] = []

    def chunk(self, i: int) -> AnyArray:
        self.asked.append(i)
        if self._broken and i == N_CHUNKS - 1:
            raise CheckpointError("is damaged", file="ep30.pt")
        if not hasattr(self._own, "buffer"):
            self._own.buffer = np.empty(ROWS, dtype=np.float32)
        buffer: AnyArray = self._own.buffer
        buffer[:] = self._column[i * ROWS : (i + 1) * ROWS]
        return buffer

    def sketch(self) -> AnyArray:
        assert sorted(self.asked) == list(range(N_CHUNKS)), "asked before every chunk was"
        return self._column[self._rows]

    def source(self) -> Origin:
        return ORIGIN


def stream(store: Path, step: int, *, broken: bool = False) -> None:
    journal = Journal.open(store)
    try:
        assert journal.view.sketch_rows is not None
        journal.append_column(
            Streamed(step, journal.view.sketch_rows, broken=broken), step, {"loss": step / 4}
        )
    finally:
        journal.close()


def test_a_streamed_snapshot_is_an_appended_one_and_says_where_it_came_from(store: Path, base: Path) -> None:
    stream(store, 30)
    check_store_holds(store, [*STEPS, 30])
    assert StoreView.open(store).sources == (None, None, None, ORIGIN)
    other = Path(shutil.copytree(base, store.parent / "other.zarr"))
    journal = Journal.open(other)
    append(journal, 30, loss=7.5)
    journal.close()
    mine, theirs = tree_bytes(store), tree_bytes(other)
    assert {name for name in mine if mine[name] != theirs[name]} == {str(COMMIT)}
    assert b"sources" not in theirs[str(COMMIT)], "what was recorded has no such field"


def test_what_fails_while_it_is_made_was_never_there(store: Path) -> None:
    with pytest.raises(CheckpointError, match=r"ep30\.pt: is damaged"):
        stream(store, 30, broken=True)
    check_store_holds(store, STEPS)
    stream(store, 30)
    assert leftovers(store) == []
    check_store_holds(store, [*STEPS, 30])


def test_what_is_kept_follows_its_snapshot(store: Path) -> None:
    stream(store, 30)
    journal = Journal.open(store)
    append(journal, 40, loss=10.0)
    assert journal.view.sources == (None, None, None, ORIGIN, None)
    journal.rewind(30)
    journal.close()
    assert StoreView.open(store).sources == (None, None, None, ORIGIN)
    journal = Journal.open(store)
    journal.rewind(STEPS[-1])
    journal.close()
    assert StoreView.open(store).sources == (None,) * 3
    assert b"sources" not in (store / COMMIT).read_bytes()


_FILE = ["ep30.pt", 17, "ab" * 32]
WRONG: dict[str, Any] = {
    "no list": {},
    "too few": [None],
    "a text": [None, None, None, "x"],
    "other fields": [None, None, None, {"files": [], "names": "0" * 64, "more": 1}],
    "no digest of names": [None, None, None, {"files": [], "names": "x"}],
    "files that are no list": [None, None, None, {"files": {}, "names": "0" * 64}],
    "a file without a digest": [None, None, None, {"files": [_FILE[:2]], "names": "0" * 64}],
    "a negative size": [None, None, None, {"files": [["a", -1, "ab" * 32]], "names": "0" * 64}],
    "a size that is true": [None, None, None, {"files": [["a", True, "ab" * 32]], "names": "0" * 64}],
    "a name for a terminal": [None, None, None, {"files": [["\x1b[2J", 1, "ab" * 32]], "names": "0" * 64}],
}


@pytest.mark.parametrize("what", WRONG)
def test_sources_that_nobody_writes_are_damage(what: str, store: Path) -> None:
    stream(store, 30)

    def edit(document: dict[str, Any]) -> None:
        document["attributes"]["cmdgpu"]["sources"] = WRONG[what]

    edit_document(store / COMMIT, edit)
    with pytest.raises(StoreCorrupt, match=r"weights/zarr\.json: its sources cannot be read: ") as refused:
        StoreView.open(store)
    assert str(refused.value).isprintable()
