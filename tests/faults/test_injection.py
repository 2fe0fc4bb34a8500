"""Laws of a writer that ends at any system call: killed there, or told that the disk is broken or full.

What was promised is there, what was not is not there in part, and work goes on. The default run looks at a
sample of the points; the long one at all of them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest

from tests.faults import writers
from tests.faults.injection import (
    CALLS,
    ERRORS,
    KILL,
    Appending,
    Call,
    Exporting,
    Fault,
    Fitting,
    Server,
    Subject,
    count,
    every_point,
    inject,
    position,
    require_strace,
    sample,
    watch,
    watch_only,
)
from tests.faults.mutants import MUTANTS

SUBJECTS: Final = ("append", "append after a kill", "create", "record", "fit", "safetensors", "pt")
LEAST: Final = {
    "append": 200,
    "append after a kill": 150,
    "create": 150,
    "record": 200,
    "fit": 500,
    "safetensors": 40,
    "pt": 40,
}
"""Calls a sweep of this subject sees, or it no longer sees the disk."""


@dataclass
class Yard:
    """The writers and what they are made to do; each subject is made when it is first asked for."""

    home: Path
    server: Server
    _subjects: dict[str, Subject] = field(default_factory=dict[str, Subject], repr=False)
    _calls: dict[str, list[Call]] = field(default_factory=dict[str, list[Call]], repr=False)

    def subject(self, name: str) -> Subject:
        if name not in self._subjects:
            self._subjects[name] = self._make(name)
        return self._subjects[name]

    def calls(self, name: str) -> list[Call]:
        """What an undisturbed run calls."""
        if name not in self._calls:
            self._calls[name] = watch(self.server, self.subject(name), self.place)
        return self._calls[name]

    @property
    def place(self) -> Path:
        return self.home / "point"

    def _make(self, name: str) -> Subject:
        if name == "fit":
            return Fitting(self.home, self.server)
        if name == "safetensors":
            return Exporting(self.home, self.server, name, None)
        if name == "pt":
            return Exporting(self.home, self.server, name, b"an older file")
        if name == "create":
            return Appending("append", None, 1)
        if name == "append after a kill":
            return Appending("append", self._killed_store(), 1)
        return Appending(name, self._store(), 2)

    def _store(self) -> Path:
        base = self.home / "base.zarr"
        if not base.exists():
            writers.append(base, 2, lambda _: None)
        return base

    def _killed_store(self) -> Path:
        """Three snapshots, and all of a fourth but its commit, a new scalar included."""
        killed = self.home / "killed.zarr"
        shutil.copytree(self._store(), killed)
        commits = [c for c in self.calls("append") if c.is_rename and c.to.endswith("/weights/zarr.json")]
        fault = Fault("rename", KILL, position(self.calls("append"), commits[1]))
        ended = self.server.trace(["append", killed, "--snapshots", "2"], fault)
        assert ended.killed and ended.acknowledged == [3]
        assert (killed / "late").is_dir()
        return killed


@pytest.fixture(scope="module")
def yard() -> Iterator[Yard]:
    """In memory where there is such a place: a kill cannot tell a flush that waited from one that did not."""
    require_strace()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        home = Path(folder).resolve()
        with Server(home) as server:
            yield Yard(home, server)


# ---- order ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUBJECTS)
def test_bytes_are_flushed_before_their_name_and_names_before_the_commit_and_the_promise(
    yard: Yard, name: str
) -> None:
    calls = yard.calls(name)
    assert sum(count(calls, call) for call in CALLS) > LEAST[name], "the harness no longer sees the disk"


# ---- every point, and a sample of them ------------------------------------------------------------------

STRIDES: Final[dict[str, dict[str, dict[str, int]]]] = {
    "append": {
        KILL: {"write": 9, "fsync": 9, "rename": 6, "openat": 25, "close": 31, "mkdir": 1},
        "EIO": {"write": 17, "fsync": 9, "rename": 8, "openat": 22, "mkdir": 1},
        "ENOSPC": {"write": 13},
    },
    "append after a kill": {
        KILL: {"unlink": 2, "unlinkat": 1, "rmdir": 1, "rename": 9},
        "EIO": {"unlink": 3, "unlinkat": 2, "rename": 10},
    },
    "create": {
        KILL: {"write": 11, "fsync": 13, "rename": 8, "mkdir": 4},
        "EIO": {"fsync": 20},
        "ENOSPC": {"write": 15},
    },
    "record": {KILL: {"write": 17, "rename": 11}, "EIO": {"write": 19, "fsync": 17}},
    "fit": {
        KILL: {"write": 25, "fsync": 21, "rename": 11, "openat": 130, "mkdir": 9},
        "EIO": {"write": 40, "fsync": 41, "rename": 26},
        "ENOSPC": {"write": 45},
    },
    "safetensors": {KILL: {"write": 2, "rename": 1, "close": 9}, "EIO": {"fsync": 1, "write": 3}},
    "pt": {KILL: {"write": 2, "rename": 1, "unlink": 1}, "EIO": {"fsync": 1}, "ENOSPC": {"write": 1}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SUBJECTS)
def test_a_writer_stopped_at_a_call_keeps_every_promise_and_the_next_one_goes_on(
    yard: Yard, name: str
) -> None:
    for action, every in STRIDES[name].items():
        for fault in sample(yard.calls(name), action, every):
            assert inject(yard.server, yard.subject(name), yard.place, fault), f"{fault} was not met"


ERRORS_OF: Final = ("write", "fsync", "rename", "openat", "mkdir")


@pytest.mark.parametrize(("name", "every"), [("append", 1), ("fit", 12)])
def test_a_folder_that_cannot_be_listed_is_an_error_of_the_tree(yard: Yard, name: str, every: int) -> None:
    opened = [call for call in yard.calls(name) if call.name == "openat"]
    listed = [
        k
        for k, call in enumerate(opened, start=1)
        if call.is_listing and Path(call.path).is_relative_to(yard.place)
    ]
    assert len(listed) > 5
    for k in listed[::every]:
        assert inject(yard.server, yard.subject(name), yard.place, Fault("openat", "EIO", k))


@pytest.mark.long
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", SUBJECTS)
def test_a_writer_stopped_at_any_call_keeps_every_promise_and_the_next_one_goes_on(
    yard: Yard, name: str, call: str
) -> None:
    expected = count(yard.calls(name), call)
    for action in (KILL, *(ERRORS if call in ERRORS_OF else ())):
        points = every_point(yard.server, yard.subject(name), yard.place, call, action)
        print(f"{name}: {action} at {points} calls of {call}")
        assert points == expected, "the sweep did not meet every call"


# ---- mutants --------------------------------------------------------------------------------------------


def first(calls: list[Call], is_wanted: Callable[[Call], bool]) -> Call:
    return next(call for call in calls if is_wanted(call))


def after(calls: list[Call], call: Call) -> list[Call]:
    return calls[next(i for i, c in enumerate(calls) if c is call) + 1 :]


def is_commit(call: Call) -> bool:
    return call.is_rename and call.to.endswith("/weights/zarr.json")


def kill_at_the_commit(calls: list[Call]) -> Fault:
    return Fault("rename", KILL, position(calls, first(calls, is_commit)))


def kill_after_the_commit(calls: list[Call]) -> Fault:
    later = first(after(calls, first(calls, is_commit)), lambda call: call.is_rename)
    return Fault("rename", KILL, position(calls, later))


def kill_after_a_record(calls: list[Call]) -> Fault:
    record = first(calls, lambda call: call.is_rename and "/done/c." in call.to)
    return Fault("rename", KILL, position(calls, first(after(calls, record), lambda call: call.is_rename)))


def kill_before_a_rename(calls: list[Call]) -> Fault:
    return Fault("rename", KILL, 1)


def kill_halfway_through(ending: str) -> Callable[[list[Call]], Fault]:
    """At the second write to a file that has its final name already."""

    def aim(calls: list[Call]) -> Fault:
        written = [call for call in calls if call.name == "write" and call.path.endswith(ending)]
        return Fault("write", KILL, position(calls, written[1]))

    return aim


def refuse_the_first_write(calls: list[Call]) -> Fault:
    return Fault("write", "ENOSPC", 1)


def refuse_a_flush_of(*, files: bool) -> Callable[[list[Call]], Fault]:
    def aim(calls: list[Call]) -> Fault:
        written = {call.path for call in calls if call.is_write}
        flush = first(calls, lambda call: call.name == "fsync" and (call.path in written) == files)
        return Fault("fsync", "EIO", position(calls, flush))

    return aim


AIMED: Final[list[tuple[str, str, Callable[[list[Call]], Fault], str]]] = [
    ("shape_first", "append", kill_after_the_commit, "cannot be read"),
    ("ack_first", "append", kill_at_the_commit, "3 promised, 2 there"),
    ("ack_first", "record", kill_at_the_commit, "3 promised, 2 there"),
    ("done_first", "fit", kill_after_a_record, "a record vouches for what is not there"),
    ("swallow_write_errors", "append", refuse_the_first_write, "got its name after a failed write"),
    ("swallow_write_errors", "fit", refuse_the_first_write, "got its name after a failed write"),
    ("swallow_write_errors", "safetensors", refuse_the_first_write, "got its name after a failed write"),
    ("retry_fsync", "append", refuse_a_flush_of(files=True), "flushed again after it failed"),
    ("retry_fsync", "fit", refuse_a_flush_of(files=True), "flushed again after it failed"),
    ("retry_fsync", "pt", refuse_a_flush_of(files=True), "flushed again after it failed"),
    ("retry_directory_fsync", "append", refuse_a_flush_of(files=False), "flushed again after it failed"),
    ("leave_temps", "append", refuse_the_first_write, "left behind"),
    ("leave_temps", "safetensors", refuse_the_first_write, "left behind"),
    ("keep_partials", "append", kill_before_a_rename, "left behind"),
    ("copy_instead_of_rename", "append", kill_halfway_through("/weights/zarr.json"), "cannot be read"),
    ("copy_instead_of_rename", "fit", kill_halfway_through("/done/c.0.0"), "a record vouches"),
    ("copy_instead_of_rename", "safetensors", kill_halfway_through("/model.safetensors"), "half a file"),
    ("copy_instead_of_rename", "pt", kill_halfway_through("/model.pt"), "half a file"),
]
UNORDERED: Final[list[tuple[str, str, str]]] = [
    ("no_file_fsync", "append", "before its bytes were flushed"),
    ("no_file_fsync", "fit", "before its bytes were flushed"),
    ("no_file_fsync", "pt", "before its bytes were flushed"),
    ("no_directory_fsync", "append", r"weights/zarr\.json could outlive"),
    ("no_directory_fsync", "create", "could outlive"),
    ("no_directory_fsync", "fit", "could outlive"),
    ("no_directory_fsync", "safetensors", "promised, and could be lost"),
    ("no_fsync", "append", "before its bytes were flushed"),
]


@pytest.mark.parametrize(("mutant", "name", "aim", "law"), AIMED)
def test_a_wrong_step_is_caught_at_the_call_that_shows_it(
    yard: Yard, mutant: str, name: str, aim: Callable[[list[Call]], Fault], law: str
) -> None:
    subject = yard.subject(name)
    calls = watch_only(yard.server, subject, yard.place, mutant)
    with pytest.raises(AssertionError, match=law):
        inject(yard.server, subject, yard.place, aim(calls), mutant)


@pytest.mark.parametrize(("mutant", "name", "law"), UNORDERED)
def test_a_missing_flush_is_caught_in_the_order_of_the_calls(
    yard: Yard, mutant: str, name: str, law: str
) -> None:
    with pytest.raises(AssertionError, match=law):
        watch(yard.server, yard.subject(name), yard.place, mutant)


def test_every_mutant_is_caught_somewhere() -> None:
    caught: Mapping[str, object] = dict.fromkeys([*(m for m, *_ in AIMED), *(m for m, *_ in UNORDERED)])
    assert sorted(caught) == sorted(MUTANTS)
