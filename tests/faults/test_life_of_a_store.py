"""Laws of a store over its whole life: whatever happens to it, a reader sees a state it was once given."""

from __future__ import annotations

import math
import shutil
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from cmdgpu.errors import CmdgpuError, DurabilityUnknown, StoreLocked
from cmdgpu.store import format as fmt
from cmdgpu.store.journal import Journal
from cmdgpu.store.verification import verify_store
from cmdgpu.store.view import StoreView
from tests.faults.disk import FAULTS, Died, Disk, Fault
from tests.verbs import (
    N_CHUNKS,
    ROWS,
    append,
    create_store,
    flip_bit,
    leftovers,
    replace_by_directory,
    stored_at,
)

Snapshot = tuple[int, int, float]
"""step, seed of the values, loss (NaN where not given)"""
CALLS = st.integers(1, 80)


def read_column(view: StoreView, t: int) -> bytes:
    column = np.empty(N_CHUNKS * ROWS, dtype=view.storage.numpy)
    for i in range(N_CHUNKS):
        view.read_chunk(i, t, column[i * ROWS : (i + 1) * ROWS])
    return column.tobytes()


class Life(RuleBasedStateMachine):
    """The model is a list of snapshots; the store must be that list after everything."""

    compressed = False

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.store = self.folder / "run.zarr"
        self.held: list[Snapshot] = []
        self.seed = 0
        with Disk().in_place():
            self.journal = create_store(self.store, compressed=self.compressed)

    def teardown(self) -> None:
        self.journal.close()
        shutil.rmtree(self.folder)

    def take(self, gap: int, loss: float | None) -> Snapshot:
        self.seed += 1
        last = self.held[-1][0] if self.held else -1
        return last + gap, self.seed, math.nan if loss is None else loss

    def put(self, snapshot: Snapshot) -> None:
        step, seed, loss = snapshot
        column = stored_at(seed)
        rows = self.journal.view.sketch_rows
        assert rows is not None
        self.journal.append(column, step, {} if math.isnan(loss) else {"loss": loss}, column[rows])

    def open_again(self) -> None:
        self.journal.close()
        self.journal = Journal.open(self.store)
        assert leftovers(self.store) == []

    @rule(gap=st.integers(1, 9), loss=st.none() | st.integers(0, 9).map(float))
    def append(self, gap: int, loss: float | None) -> None:
        snapshot = self.take(gap, loss)
        with Disk().in_place():
            self.put(snapshot)
        self.held.append(snapshot)

    @rule(gap=st.integers(1, 9), loss=st.none() | st.just(1.0), at=CALLS, fault=st.sampled_from(FAULTS))
    def append_with_a_fault(self, gap: int, loss: float | None, at: int, fault: Fault) -> None:
        snapshot = self.take(gap, loss)
        dropped = True
        try:
            with Disk(at, fault).in_place():
                self.put(snapshot)
                self.held.append(snapshot)
                dropped = False
        except (Died, DurabilityUnknown):
            if StoreView.open(self.store).shape[1] > len(self.held):
                self.held.append(snapshot)
        except CmdgpuError:
            dropped = False  # the same journal goes on
        if dropped:
            self.open_again()

    @precondition(lambda self: self.held)
    @rule(data=st.data(), at=CALLS, fault=st.none() | st.sampled_from(FAULTS))
    def go_back(self, data: st.DataObject, at: int, fault: Fault | None) -> None:
        keep = data.draw(st.integers(1, len(self.held)))
        try:
            with Disk(at if fault else 0, fault or "killed").in_place():
                self.journal.rewind(self.held[keep - 1][0])
            del self.held[keep:]
        except (Died, CmdgpuError):
            seen = StoreView.open(self.store).shape[1]
            assert keep <= seen <= len(self.held)
            del self.held[seen:]
            self.open_again()

    @rule()
    def leave_and_return(self) -> None:
        self.open_again()

    @rule()
    def another_writer_comes(self) -> None:
        with pytest.raises(StoreLocked):
            Journal.open(self.store)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def a_file_is_damaged_and_restored(self, data: st.DataObject) -> None:
        t = data.draw(st.integers(0, len(self.held) - 1))
        file = self.store / fmt.WEIGHTS / fmt.chunk_name(data.draw(st.integers(0, N_CHUNKS - 1)), t)
        good = file.read_bytes()
        kind = data.draw(st.sampled_from(["flip", "cut", "delete", "directory"]))
        if kind == "flip":
            flip_bit(file, data.draw(st.integers(0, 8 * len(good) - 1)))
        elif kind == "cut":
            file.write_bytes(good[: data.draw(st.integers(0, len(good) - 1))])
        elif kind == "delete":
            file.unlink()
        else:
            replace_by_directory(file)
        with pytest.raises(CmdgpuError):
            read_column(StoreView.open(self.store), t)
        assert [Path(damage.file).name for damage in verify_store(self.store).damaged] == [file.name]
        if kind == "directory":
            file.rmdir()
        file.write_bytes(good)

    @invariant()
    def the_store_is_the_list(self) -> None:
        view = StoreView.open(self.store)
        assert view.steps.tolist() == [step for step, _, _ in self.held]
        loss = view.scalars.get("loss", np.full(len(self.held), np.nan))
        assert np.array_equal(loss, [loss for _, _, loss in self.held], equal_nan=True)
        for t, (_, seed, _) in enumerate(self.held):
            assert read_column(view, t) == stored_at(seed).tobytes()
        assert verify_store(self.store).damaged == []


TestLife = Life.TestCase
TestLife.settings = settings(stateful_step_count=12)


class CompressedLife(Life):
    compressed = True


TestCompressedLife = CompressedLife.TestCase
TestCompressedLife.settings = settings(stateful_step_count=12)


def test_readers_beside_a_writer_see_whole_snapshots_only(tmp_path: Path) -> None:
    store = tmp_path / "run.zarr"
    journal = create_store(store)
    done = threading.Event()
    errors: list[BaseException] = []
    looks: list[int] = []

    def look() -> None:
        try:
            seen = 0
            while not done.is_set():
                view = StoreView.open(store)
                assert len(view.steps) >= seen, "a snapshot was taken back"
                seen = len(view.steps)
                for t in range(max(seen - 2, 0), seen):
                    assert read_column(view, t) == stored_at(int(view.steps[t])).tobytes()
                assert verify_store(store, quick=True).damaged == []
                looks.append(seen)
        except BaseException as error:
            errors.append(error)

    readers = [threading.Thread(target=look) for _ in range(3)]
    for reader in readers:
        reader.start()
    for step in range(40):
        append(journal, step, loss=float(step), **({"late": 1.0} if step > 20 else {}))
    done.set()
    for reader in readers:
        reader.join()
    journal.close()
    assert errors == []
    assert len(set(looks)) > 5, "the readers hardly ever looked"
