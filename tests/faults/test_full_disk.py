"""Laws of a disk with f free pages: a write that does not fit raises, and changes nothing that was visible.

The disk is a small tmpfs that a filler leaves f pages of; f goes from nothing to more than enough.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
import torch
from torch import nn

from cmdgpu.errors import CmdgpuError, WriteFailed
from cmdgpu.recording import Recorder
from cmdgpu.results import partials_of, verify_result
from cmdgpu.store import format as fmt
from cmdgpu.store.journal import Journal
from cmdgpu.trajectory import Trajectory
from tests.faults import mutants, writers
from tests.faults.injection import check_nothing_is_left, check_store_holds
from tests.verbs import tree_bytes

PAGE: Final = os.sysconf("SC_PAGE_SIZE")
SIZE: Final = 8 << 20
ALREADY: Final = 2


@dataclass(frozen=True)
class Room:
    """A disk of ``SIZE`` bytes, mounted at ``path``."""

    path: Path

    def leave(self, pages: int) -> None:
        """Fill it up, but for so many pages."""
        filler = self.path / "filler"
        with filler.open("wb", buffering=0) as file:
            try:
                while file.write(bytes(PAGE)) == PAGE:
                    pass
            except OSError:
                pass
            file.truncate(filler.stat().st_size // PAGE * PAGE - pages * PAGE)
        assert self.free_pages == pages, "this file system counts otherwise"

    def make_room(self) -> None:
        (self.path / "filler").unlink()

    @property
    def free_pages(self) -> int:
        status = os.statvfs(self.path)
        return status.f_bavail * status.f_frsize // PAGE

    def clear(self) -> None:
        for entry in self.path.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    path = (tmp_path / "room").resolve()
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", str(path)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    try:
        yield Room(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def promise_nothing(_: int) -> None:
    pass


# ---- a snapshot -------------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path) -> Path:
    writers.append(tmp_path / "base.zarr", ALREADY, promise_nothing)
    return tmp_path / "base.zarr"


def check_full(error: WriteFailed, folder: Path) -> None:
    assert re.search("the disk is full|No space left", str(error)), str(error)
    assert error.file is not None
    assert Path(error.file).is_relative_to(folder), error.file


def check_append(base: Path, room: Room, pages: int) -> bool:
    """One append with so many pages free; whether it fitted."""
    store = Path(shutil.copytree(base, room.path / "run.zarr"))
    visible = {
        name: raw for name, raw in tree_bytes(store).items() if name.startswith(("weights/", "sketch/c"))
    }
    journal = Journal.open(store)
    room.leave(pages)
    fitted = True
    try:
        writers.append_next(journal)
    except WriteFailed as error:
        fitted = False
        check_full(error, store)
    check_nothing_is_left(store)
    held = ALREADY + fitted
    check_store_holds(store, held)
    if not fitted:
        assert visible.items() <= tree_bytes(store).items(), "committed bytes changed"
    room.make_room()
    assert writers.append_next(journal) == held + 1  # the same journal goes on
    journal.close()
    check_store_holds(store, held + 1)
    journal = Journal.open(store)
    assert writers.append_next(journal) == held + 2  # and so does another
    journal.close()
    check_store_holds(store, held + 2)
    room.clear()
    return fitted


def check_appends(base: Path, room: Room, pages: Iterable[int]) -> None:
    fitted = {f: check_append(base, room, f) for f in pages}
    assert not fitted[min(fitted)], "the disk was never full"
    assert fitted[max(fitted)], "the disk was always full"
    last_full = max(f for f in fitted if not fitted[f])
    assert all(fitted[f] == (f > last_full) for f in fitted), "fitted into less and not into more"


def test_an_append_that_does_not_fit_raises_and_changes_nothing_visible(base: Path, room: Room) -> None:
    check_appends(base, room, (0, 1, 3, 5, 6, 7, 63))


@pytest.mark.long
def test_an_append_with_any_number_of_free_pages_fits_or_changes_nothing_visible(
    base: Path, room: Room
) -> None:
    check_appends(base, room, range(64))


@pytest.mark.parametrize(
    ("mutant", "pages", "seen"),
    [
        ("swallow_write_errors", 1, r"holds 0 bytes instead of"),
        ("leave_temps", 1, "left behind"),
        ("shape_first", 3, r"steps \[0, 10, 20\]"),
    ],
)
def test_a_wrong_step_is_caught_on_a_full_disk(
    base: Path, room: Room, mutant: str, pages: int, seen: str
) -> None:
    with (
        mutants.in_place(mutant, promise_nothing),
        pytest.raises((AssertionError, CmdgpuError), match=seen),
    ):
        check_append(base, room, pages)


@pytest.mark.parametrize("pages", [0, 1, 4, 6])
def test_a_store_on_a_full_disk_can_be_read_and_taken_over(base: Path, room: Room, pages: int) -> None:
    store = Path(shutil.copytree(base, room.path / "run.zarr"))
    journal = Journal.open(store)
    room.leave(pages)
    with pytest.raises(WriteFailed):
        writers.append_next(journal)
    journal.close()
    check_store_holds(store, ALREADY)
    journal = Journal.open(store)
    assert len(journal.view.steps) == ALREADY
    journal.close()


def test_a_recorder_on_a_full_disk_says_so_and_records_the_same_step_when_there_is_room(
    base: Path, room: Room
) -> None:
    store = Path(shutil.copytree(base, room.path / "run.zarr"))
    model = nn.Module()
    model.register_parameter("weight", nn.Parameter(torch.zeros(writers.N_WEIGHTS)))
    model.register_buffer("running", torch.zeros(writers.N - writers.N_WEIGHTS))
    recorder = Recorder(store, rows_per_chunk=writers.ROWS)
    last, step = writers.step_of(ALREADY - 1), writers.step_of(ALREADY)
    room.leave(3)
    recorder.record(model, step, loss=0.0)
    with pytest.raises(WriteFailed) as caught:
        recorder.flush()
    check_full(caught.value, store)
    assert recorder.last_committed == last
    room.make_room()
    recorder.record(model, step, loss=0.0)
    recorder.flush()
    assert recorder.last_committed == step
    recorder.close()


# ---- a fit ------------------------------------------------------------------------------------------------


def check_fits(source: Path, room: Room, pages: Iterable[int]) -> None:
    out = room.path / "run.cmd.zarr"
    writers.fit(source, out, promise_nothing)
    expected = tree_bytes(out)
    done: dict[int, int] = {}
    for f in pages:
        room.clear()
        room.leave(f)
        promised: list[int] = []
        try:
            writers.fit(source, out, promised.append)
            assert out.exists()
        except WriteFailed as error:
            check_full(error, room.path)
            assert not out.exists(), "a result that is not complete"
        done[f] = len(promised) + out.exists()
        partials = partials_of(out)
        check_nothing_is_left(room.path, but=[partial.name for partial in partials])
        for partial in partials:
            assert [str(damage) for damage in verify_result(partial).damaged] == []
            assert all((partial / "done" / fmt.chunk_name(unit, 0)).exists() for unit in promised)
        room.make_room()
        again: list[int] = []
        writers.fit(source, out, again.append)
        assert not set(promised) & set(again), "a unit that was done is fitted again"
        assert tree_bytes(out) == expected, "interrupted, and other bytes than undisturbed"
        check_nothing_is_left(room.path)
    assert done[min(done)] == 0, "the disk was never full"
    assert done[max(done)] == writers.N_CHUNKS + 1, "the disk was always full"
    assert any(0 < units <= writers.N_CHUNKS for units in done.values()), "no fit was stopped midway"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    writers.append(tmp_path / "run.zarr", 4, promise_nothing)
    return tmp_path / "run.zarr"


def test_a_fit_that_does_not_fit_keeps_its_units_and_ends_in_the_same_bytes(
    source: Path, room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of units that are written together a full disk may stop all or none, as their threads will have it.
    monkeypatch.setattr("cmdgpu.streaming.engine.WRITES_IN_FLIGHT", 1)
    check_fits(source, room, (0, 7, 17, 21, 29, 37, 45, 60))


@pytest.mark.long
def test_a_fit_with_any_number_of_free_pages_ends_in_the_same_bytes(source: Path, room: Room) -> None:
    check_fits(source, room, range(64))


# ---- an export --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [None, b"an older file"], ids=["new", "over"])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_an_export_that_does_not_fit_leaves_what_was_there(
    source: Path, room: Room, suffix: str, old: bytes | None
) -> None:
    file = room.path / f"model.{suffix}"
    writers.export(source, file, promise_nothing)
    expected, refused = file.read_bytes(), 0
    for pages in range(8):
        room.clear()
        if old is not None:
            file.write_bytes(old)
        room.leave(pages)
        try:
            writers.export(source, file, promise_nothing)
            assert file.read_bytes() == expected
        except WriteFailed as error:
            check_full(error, room.path)
            refused += 1
            assert (file.read_bytes() if file.exists() else None) == old
        check_nothing_is_left(room.path)
        room.make_room()
        writers.export(source, file, promise_nothing)
        assert file.read_bytes() == expected
    assert 0 < refused < 8, "the disk was never full, or always"


@pytest.mark.parametrize("kind", ["dcp", "huggingface"])
def test_a_folder_that_does_not_fit_leaves_nothing(source: Path, room: Room, kind: str) -> None:
    traj, folder, refused = Trajectory.open(source), room.path / "model", 0
    traj.export(folder, -1, kind)
    expected = tree_bytes(folder)
    for pages in range(16):
        room.clear()
        room.leave(pages)
        try:
            traj.export(folder, -1, kind)
            assert tree_bytes(folder) == expected
        except WriteFailed as error:
            check_full(error, room.path)
            refused += 1
            assert not folder.exists()
        check_nothing_is_left(room.path)
    assert 0 < refused < 16, "the disk was never full, or always"
