"""Law of the power cut: what was acknowledged is there, whole, whenever the power went; and work goes on.

Writers run on a small ext4 of their own whose power is cut at a random moment, at the very moment of an
acknowledgement, just after the visible edge has moved, or in silence, after the file system has committed its
journal by itself: then names are on the disk whose bytes are not, unless somebody flushed them. Writers that
leave a flush out, or promise too early, go through the same cuts and must be caught.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import pytest

from cmdgpu.decomposition import CMD
from cmdgpu.errors import CmdgpuError
from cmdgpu.results import partials_of, verify_result
from cmdgpu.store import format as fmt
from cmdgpu.store.journal import Journal
from cmdgpu.store.verification import verify_store
from cmdgpu.store.view import StoreView
from cmdgpu.trajectory import Trajectory
from tests.faults import ext4, writers
from tests.faults.children import ROOT, Child
from tests.harness import planted, write_store
from tests.verbs import leftovers, plain_array, tree_bytes

WRITERS: Final = "tests.faults.writers"
QUIET_S: Final = ext4.COMMIT_S + 1.5
"""Long enough for ext4 to commit its journal, too short for it to write back data."""
PATIENCE_S: Final = 5.0
UNITS: Final = 24

Moment: TypeAlias = Literal["at random", "at an acknowledgement", "as the edge moves", "in silence"]
APPENDING: Final[tuple[Moment, ...]] = ("at random", "at an acknowledgement", "as the edge moves")
FITTING: Final[tuple[Moment, ...]] = ("at random", "at an acknowledgement")
SHARPEST: Final[dict[str, Moment]] = {
    "no_file_fsync": "at random",
    "no_fsync": "at random",
    "no_directory_fsync": "at an acknowledgement",
    "ack_first": "at an acknowledgement",
    "shape_first": "as the edge moves",
}
"""The moment at which a mistake shows best."""

pytestmark = pytest.mark.skipif(ext4.why_not() is not None, reason=str(ext4.why_not()))


@dataclass
class Seen:
    """What cuts left of what was acknowledged."""

    cuts: int = 0
    acknowledged: int = 0
    lost: int = 0
    wrong: list[str] = field(default_factory=list[str])

    def note(self, promised: int, kept: int, wrong: list[str]) -> None:
        self.cuts += 1
        self.acknowledged += promised
        self.lost += max(promised - kept, 0)
        self.wrong += wrong

    def __str__(self) -> str:
        return (
            f"{self.cuts} cuts, {self.acknowledged} acknowledged, {self.lost} lost, {len(self.wrong)} wrongs"
        )


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[ext4.Ext4]:
    with contextlib.ExitStack() as stack:
        try:
            mounted = stack.enter_context(ext4.Ext4(tmp_path / "power"))
        except OSError as error:
            pytest.skip(f"no ext4 of our own here: {error}")
        yield mounted


@pytest.fixture
def report(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> Callable[[Seen], None]:
    def tell(seen: Seen) -> None:
        record_property("power cuts", str(seen))
        print(f"\n{request.node.name}: {seen}")

    return tell


def settle(disk: ext4.Ext4) -> None:
    """Everything so far is on the disk."""
    subprocess.run(["sync", "-f", str(disk.root)], check=True)


def cut(
    disk: ext4.Ext4,
    child: Child,
    moment: Moment,
    dice: random.Random,
    *,
    longest_s: float,
    edge: Path | None = None,
) -> None:
    """Once something is acknowledged, at the moment asked for; then the writer is gone and the disk is back.

    ``edge`` is the file whose replacement makes the writer's work visible.
    """
    child.hear_until("ACK")
    until = time.monotonic() + dice.uniform(0.05, 1.0) * longest_s
    if moment == "at an acknowledgement":
        while child.hear() and time.monotonic() < until:
            pass
    else:
        time.sleep(max(until - time.monotonic(), 0.0))
    if moment == "as the edge moves":
        assert edge is not None
        before = edge.stat().st_ino
        while edge.stat().st_ino == before and time.monotonic() < until + PATIENCE_S:
            pass
        time.sleep(dice.uniform(0, 0.004))
    if moment == "in silence":
        os.kill(child.pid, signal.SIGSTOP)
        time.sleep(QUIET_S)
    disk.cut_power()
    child.kill()
    child.end()
    disk.start_again()


# ---- the disk itself --------------------------------------------------------------------------------------

_HOLD = """
import sys, time
from pathlib import Path
from tests.faults.ext4 import Ext4
with Ext4(Path(sys.argv[1])):
    print("MOUNTED", flush=True)
    time.sleep(60)
"""


def held_by_the_system(folder: Path) -> list[str]:
    """Mounts and loop devices of this folder."""
    loops = [file.read_text() for file in Path("/sys/block").glob("loop*/loop/backing_file")]
    return [line for line in [*Path("/proc/mounts").read_text().splitlines(), *loops] if str(folder) in line]


def test_a_mount_does_not_outlive_the_test_that_made_it(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "MOUNTED\n"
        assert os.path.ismount(tmp_path / "disk")
        holder.kill()
    until = time.monotonic() + PATIENCE_S
    while held_by_the_system(tmp_path) and time.monotonic() < until:
        time.sleep(0.01)
    assert held_by_the_system(tmp_path) == []


def test_what_was_flushed_is_there_after_a_cut_and_nothing_else(disk: ext4.Ext4) -> None:
    """The harness itself: a cut takes away what was only written."""
    for name in ("flushed", "written"):
        with (disk.root / name).open("w") as file:
            file.write(name)
            if name == "flushed":
                file.flush()
                os.fsync(file.fileno())
    disk.cut_power()
    disk.start_again()
    assert [p.name for p in disk.root.iterdir() if p.is_file()] == ["flushed"]


# ---- recording ----------------------------------------------------------------------------------------


def read_column(view: StoreView, t: int) -> bytes:
    column = np.empty(writers.N_CHUNKS * writers.ROWS, dtype=np.float32)
    for i in range(writers.N_CHUNKS):
        view.read_chunk(i, t, column[i * writers.ROWS : (i + 1) * writers.ROWS])
    return column.tobytes()


def is_kept(view: StoreView, plain: Any, t: int) -> bool:
    """Whether snapshot t is there to the bit, for us and for plain zarr."""
    told = {name: float(values[t]) for name, values in view.scalars.items() if not np.isnan(values[t])}
    return (
        int(view.steps[t]) == writers.step_of(t)
        and told == writers.scalars_of(t)
        and read_column(view, t) == writers.column_of(t).tobytes()
        and np.asarray(plain[:, t]).tobytes() == writers.values_of(t).tobytes()
    )


def kept_snapshots(store: Path) -> int:
    """How many snapshots are kept, from the first one on."""
    view, plain = StoreView.open(store), plain_array(store, fmt.WEIGHTS)
    for t in range(len(view.steps)):
        try:
            if not is_kept(view, plain, t):
                return t
        except CmdgpuError:
            return t
    return len(view.steps)


def check_store(store: Path, acknowledged: int) -> tuple[int, list[str]]:
    """Snapshots that were kept, and what is wrong with the store now or after one more append."""
    kept, wrong = 0, list[str]()
    try:
        kept = kept_snapshots(store)
        there = len(StoreView.open(store).steps)
        if there not in (acknowledged, acknowledged + 1):
            wrong.append(f"{acknowledged} acknowledged, {there} there")
        if kept != there:
            wrong.append(f"snapshot {kept} of {there} is not what was recorded")
        journal = Journal.open(store)
        found = [*leftovers(store), *(str(damage) for damage in verify_store(store).damaged)]
        wrong += [f"after opening: {problem}" for problem in found]
        writers.append_next(journal)
        journal.close()
        if kept_snapshots(store) != there + 1 or verify_store(store).damaged:
            wrong.append("the next append did not work")
    except CmdgpuError as error:
        wrong.append(str(error))
    return kept, wrong


def append_through_cuts(
    disk: ext4.Ext4, moments: tuple[Moment, ...], mutant: str | None = None, *, longest_s: float = 1.5
) -> Seen:
    """One store per cut; with a mutant only until something is wrong."""
    seen, dice = Seen(), random.Random(f"{moments}{mutant}")
    options = ("--mutant", mutant) if mutant else ()
    for i, moment in enumerate(moments):
        store = disk.root / f"run-{i}.zarr"
        writers.create(store).close()
        settle(disk)
        with Child(WRITERS, "append", store, "--forever", *options) as child:
            edge = store / fmt.WEIGHTS / fmt.DOCUMENT
            cut(disk, child, moment, dice, longest_s=longest_s, edge=edge)
        acknowledged = max(child.numbers("ACK"))
        seen.note(acknowledged, *check_store(store, acknowledged))
        if mutant and seen.wrong:
            break
        shutil.rmtree(store)
    return seen


def test_no_acknowledged_snapshot_is_lost_in_a_power_cut(
    disk: ext4.Ext4, report: Callable[[Seen], None]
) -> None:
    seen = append_through_cuts(disk, APPENDING, longest_s=0.5)
    report(seen)
    assert seen.wrong == []
    assert seen.acknowledged >= 4, "the writer hardly wrote"


@pytest.mark.long
def test_no_acknowledged_snapshot_is_lost_in_many_power_cuts(
    disk: ext4.Ext4, report: Callable[[Seen], None]
) -> None:
    seen = append_through_cuts(disk, APPENDING * 8)
    report(seen)
    assert seen.wrong == []
    assert seen.acknowledged >= 200, "the writer hardly wrote"


@pytest.mark.long
def test_no_acknowledged_snapshot_is_an_empty_file_once_the_journal_has_moved_on(
    disk: ext4.Ext4, report: Callable[[Seen], None]
) -> None:
    seen = append_through_cuts(disk, ("in silence",) * 5)
    report(seen)
    assert seen.wrong == []
    assert seen.acknowledged >= 50, "the writer hardly wrote"


def test_bytes_that_were_never_flushed_are_missed(disk: ext4.Ext4, report: Callable[[Seen], None]) -> None:
    seen = append_through_cuts(disk, ("at an acknowledgement",) * 2, "no_file_fsync", longest_s=0.3)
    report(seen)
    assert seen.lost and seen.wrong, "the harness is blind to a power cut"


@pytest.mark.long
@pytest.mark.parametrize("mutant", SHARPEST)
def test_a_writer_that_promises_too_much_is_caught(
    disk: ext4.Ext4, report: Callable[[Seen], None], mutant: str
) -> None:
    seen = append_through_cuts(disk, (SHARPEST[mutant],) * 8, mutant, longest_s=0.6)
    report(seen)
    assert seen.wrong, "the harness is blind to a power cut"


@pytest.mark.long
@pytest.mark.parametrize("mutant", ["no_file_fsync", "no_fsync"])
def test_a_flush_left_out_is_caught_once_the_journal_has_moved_on(
    disk: ext4.Ext4, report: Callable[[Seen], None], mutant: str
) -> None:
    seen = append_through_cuts(disk, ("in silence",) * 2, mutant)
    report(seen)
    assert seen.lost and seen.wrong, "the harness is blind to empty files"


# ---- fitting ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Undisturbed:
    store: Path
    fit: dict[str, bytes]
    """Every file of its fit."""


def fit(store: Path, out: Path) -> CMD:
    """What the fitting writer does."""
    return CMD(n_modes=2, n_samples=40, device="cpu").fit(Trajectory.open(store), out=out)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    write_store(folder / "run.zarr", planted(256 * UNITS - 100, 6, 4, noise=0.3))
    fit(folder / "run.zarr", folder / "out.zarr")
    return Undisturbed(folder / "run.zarr", tree_bytes(folder / "out.zarr"))


def check_fit(
    store: Path, out: Path, acknowledged: list[int], whole: dict[str, bytes]
) -> tuple[int, list[str]]:
    """Acknowledged units that were kept, and what is wrong with them or with the fit that goes on."""
    kept, wrong = len(acknowledged), list[str]()
    try:
        for partial in partials_of(out):
            damaged = verify_result(partial).damaged
            kept = sum((partial / "done" / f"c.{unit}.0").exists() for unit in acknowledged)
            kept -= len({damage.rows for damage in damaged})
            wrong += [str(damage) for damage in damaged]
        resumed = fit(store, out).metrics_["units_resumed"]
        kept = min(kept, resumed)
        if kept < len(acknowledged):
            wrong.append(f"{len(acknowledged)} units acknowledged, {kept} kept")
        if tree_bytes(out) != whole:
            wrong.append("the fit that went on has other bytes")
    except CmdgpuError as error:
        return 0, [*wrong, str(error)]
    return kept, wrong


def fit_through_cuts(
    disk: ext4.Ext4, undisturbed: Undisturbed, moments: tuple[Moment, ...], mutant: str | None = None
) -> Seen:
    """One fit per cut, taken up again after it; with a mutant only until something is wrong."""
    seen, dice = Seen(), random.Random(f"{moments}{mutant}")
    options = ("--mutant", mutant) if mutant else ()
    store = Path(shutil.copytree(undisturbed.store, disk.root / "run.zarr"))
    settle(disk)
    for i, moment in enumerate(moments):
        out = disk.root / f"out-{i}.zarr"
        with Child(WRITERS, "fit", store, out, *options) as child:
            cut(disk, child, moment, dice, longest_s=0.2)
        units = child.numbers("ACK")
        seen.note(len(units), *check_fit(store, out, units, undisturbed.fit))
        if mutant and seen.wrong:
            break
        shutil.rmtree(out)
        settle(disk)
    return seen


@pytest.mark.slow
def test_no_acknowledged_unit_of_a_fit_is_lost_in_a_power_cut(
    disk: ext4.Ext4, undisturbed: Undisturbed, report: Callable[[Seen], None]
) -> None:
    seen = fit_through_cuts(disk, undisturbed, ("at an acknowledgement",))
    report(seen)
    assert seen.wrong == []
    assert seen.acknowledged >= 2, "the fit hardly wrote"


@pytest.mark.long
def test_no_acknowledged_unit_of_a_fit_is_lost_in_many_power_cuts(
    disk: ext4.Ext4, undisturbed: Undisturbed, report: Callable[[Seen], None]
) -> None:
    seen = fit_through_cuts(disk, undisturbed, (*FITTING * 3, "in silence"))
    report(seen)
    assert seen.wrong == []
    assert seen.acknowledged >= 20, "the fits hardly wrote"


@pytest.mark.long
@pytest.mark.parametrize("mutant", ["no_file_fsync", "no_fsync"])
def test_a_fit_that_ticks_off_what_it_did_not_flush_is_caught(
    disk: ext4.Ext4, undisturbed: Undisturbed, report: Callable[[Seen], None], mutant: str
) -> None:
    seen = fit_through_cuts(disk, undisturbed, FITTING * 2, mutant)
    report(seen)
    assert seen.lost and seen.wrong, "the harness is blind to a power cut"
