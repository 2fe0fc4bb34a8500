"""Laws of many workers at one fit: a unit done twice, late, or for somebody else changes nothing.

A worker is a process of its own: this file, run as a program. It can stop itself at a chosen call, as if its
machine had gone to sleep there, and wakes up when the world has moved on. The same harness must see what goes
wrong when names are shared or records are not checked.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import numpy as np
import pytest

from cmdgpu.decomposition import CMD
from cmdgpu.errors import CmdgpuError, StoreCorrupt
from cmdgpu.results import Result, StoredWriter, partials_of, progress_of, verify_result
from cmdgpu.results.ledger import UNIT_ARRAYS, Ledger
from cmdgpu.store import durable
from cmdgpu.store import format as fmt
from cmdgpu.trajectory import Trajectory
from tests.faults.children import Child

HERE: Final = "tests.faults.test_late_workers"
ROWS: Final = 256
UNITS: Final = 12
MIDDLE: Final = 5
"""The unit at which a worker falls asleep."""
LONGEST_S: Final = 120
MISSING: Final = "_missing"
"""Which units a pass takes, in which order."""


# ---- the workers --------------------------------------------------------------------------------------

PLACES: Final = (
    "its folder has no name",
    "in a chunk file",
    "before a record",
    "before the check",
    "before the mark",
    "before the name",
    "in the name",
)


def fall_asleep(place: str, out: Path) -> None:
    """Stop at this place of the fit of ``out``, once."""
    slept: list[str] = []

    def sleep(here: str, is_here: bool = True) -> None:
        if is_here and here == place and not slept:
            slept.append(here)
            # a signal to the process would let this very thread run on for a moment
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)

    rename, write_file, publish = durable.rename, durable.write_file, durable.publish_directory
    finish = StoredWriter.finish

    def rename_late(old: Path, new: Path) -> None:
        sleep("in a chunk file", new.parts[-2:] == ("b", f"c.{MIDDLE}"))
        sleep("in the name", new == out)
        rename(old, new)

    def write_file_late(
        directory: Path, name: str, parts: Iterable[durable.Buffer], *, cached: bool = True
    ) -> None:
        sleep("before a record", (directory.name, name) == ("done", f"c.{MIDDLE}.0"))
        # not in the folder that a fit is first built in: that is unfinished twice
        is_running = directory.name.startswith(out.name) and directory.name.count(durable.PARTIAL) == 1
        sleep("before the mark", is_running and name == fmt.DOCUMENT)
        write_file(directory, name, parts, cached=cached)

    def publish_late(temporary: Path, final: Path) -> None:
        sleep("before the name" if final == out else "its folder has no name")
        publish(temporary, final)

    def finish_late(writer: StoredWriter) -> Result:
        sleep("before the check")
        return finish(writer)

    patch.object(durable, "rename", rename_late).start()
    patch.object(durable, "write_file", write_file_late).start()
    patch.object(durable, "publish_directory", publish_late).start()
    patch.object(StoredWriter, "finish", finish_late).start()


def fixed_names() -> None:
    """Two workers at one unit share a temporary file."""

    def shared(name: str) -> str:
        return f"{name}.{'0' * 16}{durable.PARTIAL}"

    patch.object(durable, "partial_name", shared).start()


def no_fingerprint() -> None:
    """Every fit of one output runs in the same folder."""

    def shared(out: Path, fingerprint: str) -> Path:
        return out.parent / f"{out.name}.{'0' * 16}{durable.PARTIAL}"

    patch("cmdgpu.results.stored.partial_path", shared).start()


def no_check() -> None:
    """Chunks are taken for what was fitted whatever the record says."""

    from tests.verbs import on_disk

    def believe(ledger: Ledger, unit: int) -> list[bytes]:
        return [on_disk(ledger.file(name, unit)).read_bytes()[-4:] for name in UNIT_ARRAYS]

    patch.object(Ledger, "crcs", believe).start()


MUTATIONS: Final = {change.__name__: change for change in (fixed_names, no_fingerprint, no_check)}


def work(seed: int) -> CMD:
    return CMD(n_modes=3, n_samples=60, random_state=seed, device="cpu")


def go_backwards() -> None:
    """The last unit first: two workers meet in the middle."""
    from cmdgpu.streaming import engine

    missing: Callable[[object, int], list[int]] = getattr(engine, MISSING)

    def reversed_missing(writer: object, n_units: int) -> list[int]:
        return missing(writer, n_units)[::-1]

    patch.object(engine, MISSING, reversed_missing).start()


def tell_units() -> None:
    write = StoredWriter.write

    def write_and_tell(writer: StoredWriter, unit: int, *rest: Any) -> None:
        write(writer, unit, *rest)
        say(f"UNIT {unit}")
        time.sleep(0.06)  # somebody else gets his turn, and a kill its time

    patch.object(StoredWriter, "write", write_and_tell).start()


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")  # at once: several threads speak
    sys.stdout.flush()


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("store", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start-over", action="store_true")
    parser.add_argument("--backwards", action="store_true")
    parser.add_argument("--sleep", choices=PLACES)
    parser.add_argument("--mutation", choices=MUTATIONS)
    asked = parser.parse_args(argv)
    signal.alarm(LONGEST_S)
    import torch

    torch.set_num_threads(1)
    # what is loaded late is loaded now: workers told to go at one time begin at one time
    CMD(2, n_samples=8, device="cpu").fit(np.random.default_rng(0).standard_normal((300, 4), np.float32))
    patch("cmdgpu.streaming.plan.TARGET_BLOCK_BYTES", 1).start()
    patch("cmdgpu.streaming.engine.WRITES_IN_FLIGHT", 2).start()  # so that a fit is under way for a while
    tell_units()
    if asked.backwards:
        go_backwards()
    if asked.sleep:
        fall_asleep(asked.sleep, asked.out)
    if asked.mutation:
        MUTATIONS[asked.mutation]()
    say("READY")
    sys.stdin.readline()
    try:
        work(asked.seed).fit(Trajectory.open(asked.store), out=asked.out, resume=not asked.start_over)
    except CmdgpuError as error:
        say(f"ERROR {type(error).__name__}: {error}")
        return 1
    say("ENDED")
    return 0


# ---- what the tests ask -------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """A trajectory, and what undisturbed fits of it look like."""

    folder: Path
    fits: dict[int, dict[str, bytes]]
    """Every file of the fit of a seed."""

    def enter(self, folder: Path) -> Path:
        """A folder for a fit; the trajectory lies beside it."""
        folder.mkdir(exist_ok=True)
        (folder / "s.zarr").symlink_to(self.folder / "s.zarr")
        return folder / "out.zarr"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    from tests.harness import planted, write_store
    from tests.verbs import tree_bytes

    folder = tmp_path_factory.mktemp("world")
    source = write_store(folder / "s.zarr", planted(ROWS * UNITS - 100, 6, 4, noise=0.3))
    for seed in (0, 1):
        work(seed).fit(source, out=folder / str(seed))
    fits = {seed: tree_bytes(folder / str(seed)) for seed in (0, 1)}
    assert fits[0] != fits[1]
    return World(folder, fits)


def worker(out: Path, *options: str) -> Child:
    return Child(HERE, out.parent / "s.zarr", out, *options)


def fit_here(out: Path, seed: int, *, start_over: bool = False) -> None:
    """By this process, while another one sleeps."""
    work(seed).fit(Trajectory.open(out.parent / "s.zarr"), out=out, resume=not start_over)


def differences(out: Path, expected: dict[str, bytes]) -> list[str]:
    from tests.verbs import tree_bytes

    if not out.exists():
        return ["there is no result"]
    found = tree_bytes(out)
    wrong = [f"{name} is gone" for name in sorted(expected.keys() - found.keys())]
    wrong += [f"{name} should not be there" for name in sorted(found.keys() - expected.keys())]
    return wrong + [
        f"{name} differs" for name in expected if found.get(name, expected[name]) != expected[name]
    ]


# ---- two at once, and kills ---------------------------------------------------------------------------


@dataclass
class Race:
    midway: int = 0
    """Kills that left a fit with some of its units done."""
    wrong: list[str] = field(default_factory=list[str])


def race(world: World, folder: Path, kills: int, *options: str, abreast: bool = False) -> Race:
    """Two workers at a time, killed one after the other; the last two may end.

    They begin at both ends and meet in the middle; ``abreast`` they meet at every unit.
    """
    other = () if abreast else ("--backwards",)
    out, dice, seen = world.enter(folder), random.Random(folder.name), Race()
    for attempt in range(kills + 1):
        with worker(out, *options) as one, worker(out, *other, *options) as two:
            pair = [one, two]
            for child in pair:
                child.hear_until("READY")
            for child in pair:
                child.tell("go")
            if attempt < kills:
                dice.shuffle(pair)
                for _ in range(dice.randint(1, 2)):
                    pair[0].hear()
                for child in pair:
                    time.sleep(dice.uniform(0, 0.03))
                    child.kill()
            codes = [child.end() for child in pair]
        allowed = (-signal.SIGKILL, 0) if attempt < kills else (0,)
        seen.wrong += [c.said[-1] for c, code in zip(pair, codes, strict=True) if code not in allowed]
        if not out.exists() and (unfinished := partials_of(out)):
            units = {unit for child in pair for unit in child.numbers("UNIT")}
            done = unfinished[0] / "done"
            seen.midway += 0 < progress_of(unfinished[0])[0] < UNITS
            seen.wrong += [
                f"unit {u} was done and is gone" for u in units if not (done / f"c.{u}.0").exists()
            ]
    seen.wrong += differences(out, world.fits[0])
    return seen


@pytest.mark.slow
def test_two_workers_and_kills_leave_the_bytes_of_one_undisturbed_worker(
    world: World, tmp_path: Path
) -> None:
    races = (race(world, tmp_path / str(i), kills=2) for i in range(6))
    for seen in races:  # a fit is short: another try where every kill came before it or after
        assert seen.wrong == []
        if seen.midway:
            return
    raise AssertionError("no kill came while the fit was under way")


@pytest.mark.long
def test_many_kills_leave_the_bytes_of_one_undisturbed_worker(world: World, tmp_path: Path) -> None:
    races = [race(world, tmp_path / str(i), kills=3) for i in range(8)]
    assert [seen.wrong for seen in races] == [[]] * len(races)
    assert sum(seen.midway for seen in races) > 8, "hardly a kill came while a fit was under way"


@pytest.mark.slow
def test_shared_temporary_names_are_found(world: World, tmp_path: Path) -> None:
    races = (race(world, tmp_path / str(i), 1, "--mutation", "fixed_names", abreast=True) for i in range(8))
    assert any(seen.wrong for seen in races), "the harness is blind to torn files"


# ---- a sleeper wakes up -------------------------------------------------------------------------------

MEANWHILE: Final = ("ended", "replaced", "other", "same", "beside")
SEED_THERE: Final = {"ended": 0, "same": 0, "replaced": 1, "other": 1, "beside": 1}


def sleep_and_wake(world: World, folder: Path, place: str, meanwhile: str, *options: str) -> list[str]:
    """A worker sleeps at a place while

    ended     the same fit is ended by another process
    replaced  it is ended, and a fit of other settings takes its place
    other     a fit of other settings throws the unfinished one away and ends
    same      the same fit is started over and ends
    beside    a fit of other settings throws it away, has done all units, and ends after the sleeper

    and wakes up. What is wrong in the end.
    """
    out = world.enter(folder)
    with contextlib.ExitStack() as children:
        sleeper = children.enter_context(worker(out, "--sleep", place, *options))
        beside = None
        if meanwhile == "beside":
            late = ("--seed", "1", "--start-over", "--sleep", "before the check")
            beside = children.enter_context(worker(out, *late, *options))
        sleeper.tell("go")
        sleeper.wait_until_stopped()
        if beside is not None:
            beside.tell("go")
            beside.wait_until_stopped()
        elif meanwhile in ("ended", "replaced"):
            fit_here(out, 0)
            if meanwhile == "replaced":
                shutil.rmtree(out)
                fit_here(out, 1)
        else:
            fit_here(out, SEED_THERE[meanwhile], start_over=True)
        sleeper.go_on()
        code, wrong = sleeper.end(), list[str]()
        first_named = 0 if beside is not None and code == 0 else SEED_THERE[meanwhile]
        well = SEED_THERE[meanwhile] == 0 or (beside is not None and place == PLACES[0])
        if code != (0 if well else 1):
            wrong.append(f"the sleeper ended with {code}: {sleeper.said[-1]}")
        if beside is not None:
            beside.go_on()
            if beside.end() != (1 if well else 0):
                wrong.append(f"the fit beside it: {beside.said[-1]}")
    return wrong + differences(out, world.fits[first_named])


PAIRS: Final = [(place, meanwhile) for place in PLACES for meanwhile in MEANWHILE]
SAMPLE: Final = [
    ("before a record", "ended"),
    ("in a chunk file", "replaced"),
    ("in the name", "other"),
    ("before a record", "beside"),
]


@pytest.mark.parametrize(
    ("place", "meanwhile"),
    [pytest.param(*pair, marks=() if pair in SAMPLE else pytest.mark.long) for pair in PAIRS],
)
def test_a_worker_that_wakes_up_late_changes_nothing(
    world: World, tmp_path: Path, place: str, meanwhile: str
) -> None:
    assert sleep_and_wake(world, tmp_path / "late", place, meanwhile) == []


def test_a_folder_without_the_fingerprint_is_found(world: World, tmp_path: Path) -> None:
    options = ("before a record", "beside", "--mutation", "no_fingerprint")
    assert sleep_and_wake(world, tmp_path / "late", *options), "the harness is blind to a zombie's units"


# ---- the last check -----------------------------------------------------------------------------------


def flip(file: Path, byte: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[byte] ^= 16
    file.write_bytes(raw)


def exchange(out: Path, name: str) -> None:
    """Two chunks, each whole by its own checksum."""
    a, b = (out / name / f"c.{unit}" for unit in (1, 2))
    first = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(first)


DAMAGE: Final[dict[str, Callable[[Path], None]]] = {
    "a flipped sum": lambda partial: flip(partial / "segment_stats" / "c.1.0.0.0", 40),
    "a flipped count": lambda partial: flip(partial / "unit_hist" / "c.1.0.0", 40),
    "a flipped checksum": lambda partial: flip(partial / "a" / "c.1", -1),
    "chunks exchanged": lambda partial: exchange(partial, "b"),
    "a flipped record": lambda partial: flip(partial / "done" / "c.1.0", 3),
    "a chunk gone": lambda partial: (partial / "mode" / "c.1").unlink(),
    "a flipped number": lambda partial: flip(partial / "a" / "c.1", 40),
}


def damage_before_the_end(world: World, folder: Path, damage: str, *options: str) -> str:
    """A worker has done all units; something happens to one before it checks them. Its last word."""
    out = world.enter(folder)
    with worker(out, "--sleep", "before the check", *options) as child:
        child.tell("go")
        child.wait_until_stopped()
        (partial,) = partials_of(out)
        DAMAGE[damage](partial)
        child.go_on()
        child.end()
    return child.said[-1]


FOUND_ON_USE: Final = "a flipped number"
CHECKED: Final = ("a flipped sum", "chunks exchanged")


@pytest.mark.parametrize(
    "damage",
    [pytest.param(d, marks=() if d in CHECKED else pytest.mark.long) for d in DAMAGE if d != FOUND_ON_USE],
)
def test_a_unit_damaged_before_the_end_keeps_the_result_from_its_name(
    world: World, tmp_path: Path, damage: str
) -> None:
    said = damage_before_the_end(world, tmp_path / "damaged", damage)
    assert said.startswith("ERROR StoreCorrupt") and "rows 256..511 of" in said
    out = tmp_path / "damaged" / "out.zarr"
    assert not out.exists() and len(partials_of(out)) == 1
    fit_here(out, 0)
    assert differences(out, world.fits[0]) == []


def test_a_last_check_left_out_is_found(world: World, tmp_path: Path) -> None:
    said = damage_before_the_end(world, tmp_path / "damaged", "chunks exchanged", "--mutation", "no_check")
    assert said == "ENDED" and differences(tmp_path / "damaged" / "out.zarr", world.fits[0])


@pytest.mark.long
def test_a_number_flipped_before_the_end_is_an_error_on_use(world: World, tmp_path: Path) -> None:
    """The end checks records and sums, not every number: those are checked whenever they are read."""
    said = damage_before_the_end(world, tmp_path / "damaged", FOUND_ON_USE)
    assert said == "ENDED"
    out = tmp_path / "damaged" / "out.zarr"
    with pytest.raises(StoreCorrupt, match=r"rows 256\.\.511 of a: crc32c mismatch"):
        np.asarray(CMD.load(out).a_)
    assert [damage.rows for damage in verify_result(out).damaged] == [(256, 511)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
