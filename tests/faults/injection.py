"""Real writers, killed or refused at their k-th system call, and what must hold afterwards.

``Server`` keeps one process that has imported everything and forks a writer per run; strace attaches to it
once it is ready, so that call k is the same call in every run. A ``Subject`` is something that a writer does,
with the laws that hold wherever it stopped. ``inject`` is one point of the sweep. Mutants go the same way.
"""

from __future__ import annotations

import json
import re
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Protocol

import numpy as np
import pytest

from cmdgpu.errors import CmdgpuError
from cmdgpu.results import open_result, partials_of, verify_result
from cmdgpu.store import format as fmt
from cmdgpu.store.verification import verify_store
from cmdgpu.store.view import StoreView
from tests.faults import writers
from tests.verbs import leftovers, plain_array, tree_bytes

ROOT: Final = Path(__file__).resolve().parents[2]
PATIENCE_S: Final = 120.0
KILL: Final = "KILL"
ERRORS: Final = ("EIO", "ENOSPC")

RENAMES: Final = "?rename,?renameat,?renameat2"
TRACED: Final = f"write,pwrite64,fsync,openat,close,?unlink,?unlinkat,?rmdir,?mkdir,?mkdirat,writev,{RENAMES}"
CALLS: Final[dict[str, str]] = {
    "write": "write",
    "pwrite64": "pwrite64",
    "fsync": "fsync",
    "rename": RENAMES,
    "openat": "openat",
    "close": "close",
    "unlink": "?unlink",
    "unlinkat": "?unlinkat",
    "rmdir": "?rmdir",
    "mkdir": "?mkdir,?mkdirat",
}
"""What a sweep goes through, as strace calls it. strace counts each system call of a set apart, and a writer
uses one of each."""
MUST_SURFACE: Final = ("write", "fsync", "rename")
"""Calls whose error no writer may get over. ``openat`` looks for what need not be there, ``mkdir`` makes what
may be there already."""


@dataclass(frozen=True)
class Fault:
    call: str
    action: str
    """KILL, or the name of an error."""
    k: int

    def __str__(self) -> str:
        return f"{self.action} at {self.call} {self.k}"


# ---- the log --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One line of strace."""

    name: str
    path: str
    """Of the descriptor where the call takes one."""
    to: str
    """Where a rename leads."""
    fd: int
    """The descriptor it takes, or -1."""
    returned: int | None
    """None when the process died in it."""
    injected: bool
    arguments: str

    @property
    def is_listing(self) -> bool:
        """``opendir``, behind every look at what is in a folder."""
        flags = re.findall(r"O_\w+", self.arguments)
        return self.name == "openat" and {"O_NONBLOCK", "O_DIRECTORY"} <= set(flags)

    @property
    def is_write(self) -> bool:
        return self.name in ("write", "pwrite64")

    @property
    def is_rename(self) -> bool:
        return self.name.startswith("rename")

    @property
    def failed(self) -> bool:
        return self.returned is None or self.returned < 0


_LINE: Final = re.compile(r"(\w+)\((.*)\)\s+= (\?|-?\d+)")
_DESCRIPTOR: Final = re.compile(r"(\d+)<([^>]*)>")
_QUOTED: Final = re.compile(r'"([^"]*)"')


def read_log(log: Path) -> list[Call]:
    calls: list[Call] = []
    for line in log.read_text().splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        name, arguments, returned = match.groups()
        on = _DESCRIPTOR.match(arguments)
        names = _QUOTED.findall(arguments)
        if name.startswith(("open", "rename", "unlink", "rmdir", "mkdir")):
            base = on[2] if on else ""
            paths = [str(Path(base, part)) for part in names]
        else:
            paths = [on[2] if on else ""]
        calls.append(
            Call(
                name=name,
                path=paths[0],
                to=paths[1] if len(paths) > 1 else "",
                fd=int(on[1]) if on else -1,
                returned=None if returned == "?" else int(returned),
                injected="(INJECTED)" in line,
                arguments=arguments,
            )
        )
    return calls


def count(calls: Sequence[Call], call: str) -> int:
    """How often a call of ``CALLS`` was made."""
    names = CALLS[call].replace("?", "").split(",")
    return sum(c.name in names for c in calls)


def position(calls: Sequence[Call], wanted: Call) -> int:
    """k of this call among its like, as strace counts."""
    at = next(i for i, c in enumerate(calls) if c is wanted)
    return sum(c.name == wanted.name for c in calls[: at + 1])


# ---- running a writer -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """What a writer said, how it ended, what it called."""

    code: int
    acknowledged: list[int]
    error: str
    """Class of the error it ended with; empty when it did not."""
    text: str
    calls: list[Call] = field(default_factory=list[Call], repr=False)

    @property
    def killed(self) -> bool:
        return self.code == -9

    @property
    def fired(self) -> bool:
        return self.killed or any(call.injected for call in self.calls)


class Server:
    """Forks a writer per run; one at a time."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "strace.log"
        self._process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "tests.faults.writers", "serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            cwd=ROOT,
            env=writers.environment(),
        )
        self._pending = b""
        said = self._hear()
        assert said == "SERVING", said

    def run(self, arguments: Sequence[str | Path], mutant: str | None = None) -> Ended:
        """A writer left alone."""
        self._ask(arguments, mutant)
        return self._listen()

    def trace(
        self, arguments: Sequence[str | Path], fault: Fault | None = None, mutant: str | None = None
    ) -> Ended:
        """A writer that strace watches, and, with a fault, disturbs."""
        self._ask([*arguments, "--wait"], mutant)
        ready, pid = self._hear().split()
        assert ready == "READY"
        command = ["strace", "-y", "-s", "0", "-o", str(self._log), "-e", f"trace={TRACED}", "-p", pid]
        if fault is not None:
            action = "signal=KILL" if fault.action == KILL else f"error={fault.action}"
            command += ["-e", f"inject={CALLS[fault.call]}:{action}:when={fault.k}"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, bufsize=0) as strace:
            assert strace.stderr is not None
            said = strace.stderr.readline().decode()
            self._tell("")
            ended = self._listen()
        assert "attached" in said, said
        return Ended(ended.code, ended.acknowledged, ended.error, ended.text, read_log(self._log))

    def _ask(self, arguments: Sequence[str | Path], mutant: str | None) -> None:
        chosen = [] if mutant is None else ["--mutant", mutant]
        self._tell(json.dumps([str(argument) for argument in (*arguments, *chosen)]))

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")

    def _hear(self) -> str:
        assert self._process.stdout is not None
        while b"\n" not in self._pending:
            if not select.select([self._process.stdout], [], [], PATIENCE_S)[0]:
                raise AssertionError(f"a writer said nothing for {PATIENCE_S} s")
            more = self._process.stdout.read(4096)
            if not more:
                raise AssertionError("the server of writers is gone")
            self._pending += more
        line, _, self._pending = self._pending.partition(b"\n")
        return line.decode()

    def _listen(self) -> Ended:
        acknowledged: list[int] = []
        error = text = ""
        while True:
            word, _, rest = self._hear().partition(" ")
            if word == "ACK":
                acknowledged.append(int(rest))
            elif word in ("ERROR", "CRASH"):
                error, _, text = rest.partition(": ")
            elif word == "END":
                return Ended(int(rest), acknowledged, error, text)
            else:
                raise AssertionError(f"a writer said {word} {rest}")

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.kill()
        self._process.wait()


def require_strace() -> None:
    """Skip, with the reason, where no process may be traced."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    with subprocess.Popen(["sleep", "60"]) as target:
        command = ["strace", "-e", "inject=fsync:error=EIO:when=1", "-p", str(target.pid)]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as strace:
            assert strace.stderr is not None
            said = strace.stderr.readline().decode().strip()
            target.kill()
    if "attached" not in said:
        pytest.skip(f"strace cannot trace a process here: {said}")


# ---- laws of every writer -------------------------------------------------------------------------------


def check_a_refusal_is_final(calls: Sequence[Call]) -> None:
    """No second flush through a descriptor whose flush failed; a file that was refused never gets its name.

    After a failed fsync the kernel may have marked the lost pages clean: the next fsync would say yes.
    """
    for i, call in enumerate(calls):
        if not call.injected or not (call.name == "fsync" or call.is_write):
            continue
        for later in calls[i + 1 :]:
            if call.is_write or (later.name == "close" and later.fd == call.fd):
                break
            assert later.name != "fsync" or later.fd != call.fd, f"flushed again after it failed: {call.path}"
        named = [later for later in calls[i + 1 :] if later.is_rename and later.path == call.path]
        assert not named, f"got its name after a failed {call.name}: {named[0].to}"


def check_flushed_before_renamed(calls: Sequence[Call]) -> None:
    """Every file: all its bytes, then a flush, then its name."""
    named = 0
    for i, call in enumerate(calls):
        before = calls[:i]
        written = [j for j, c in enumerate(before) if c.is_write and c.path == call.path]
        if not call.is_rename or not written:
            continue
        named += 1
        flushed = [j for j, c in enumerate(before) if c.name == "fsync" and c.path == call.path]
        assert flushed, f"{call.to} got its name before its bytes were flushed"
        assert flushed[-1] > written[-1], f"{call.to} was written to after its flush"
    assert named, "no file was renamed: the harness no longer sees the disk"


def check_names_last(calls: Sequence[Call], is_commit: Sequence[str]) -> None:
    """Every name given is flushed before the next commit, and before anything is promised.

    A commit is a rename to what ``is_commit`` (regular expressions) says. To rename a directory commits what
    is in it.
    """
    pending: dict[str, str] = {}  # directory -> a name in it that could still be lost
    promises = 0
    for call in calls:
        if call.failed:
            continue
        if call.name == "fsync":
            pending.pop(call.path, None)
        elif call.name == "mkdir":
            pending[str(Path(call.path).parent)] = call.path
        elif call.is_rename:
            commits_all = any(re.search(pattern, call.to) for pattern in is_commit)
            lost = [pending[d] for d in pending if commits_all or Path(d).is_relative_to(call.path)]
            assert not lost, f"{call.to} could outlive {sorted(lost)}"
            pending[str(Path(call.to).parent)] = call.to
        elif call.name == "writev" and call.fd == 1:
            promises += 1
            assert not pending, f"promised, and could be lost: {sorted(pending.values())}"
    assert promises, "nothing was promised: the harness no longer hears the writer"


def check_error_is_typed(fault: Fault | None, ended: Ended, folder: Path) -> None:
    """Killed, or through, or an error of the tree; what the disk refused is never passed over.

    A file outside of the folder is not of a store: what the interpreter reads of itself is its own affair.
    """
    if fault is None or not ended.fired:
        assert ended.code == 0, f"undisturbed, and ended with {ended.code}: {ended.error} {ended.text}"
    elif fault.action == KILL:
        assert ended.killed, f"outlived its end: {ended.code}"
    elif fault.call in MUST_SURFACE:
        assert ended.code == writers.FAILED, f"{fault} ended with {ended.code}: {ended.error} {ended.text}"
        assert ended.error in ("WriteFailed", "DurabilityUnknown"), f"{fault}: {ended.error} {ended.text}"
    elif all(Path(call.path).is_relative_to(folder) for call in ended.calls if call.injected):
        assert ended.code in (0, writers.FAILED), f"{fault}: {ended.error} {ended.text}"


def check_nothing_is_left(folder: Path, but: Sequence[str] = ()) -> None:
    left = [name for name in leftovers(folder) if name not in but]
    assert not left, f"left behind: {left}"


# ---- subjects -------------------------------------------------------------------------------------------


class Subject(Protocol):
    """Something a writer does."""

    is_commit: Sequence[str]

    def prepare(self, folder: Path) -> None:
        """What is there before, in an empty folder."""
        ...

    def arguments(self, folder: Path) -> list[str | Path]: ...

    def check(
        self, server: Server, folder: Path, fault: Fault | None, ended: Ended, mutant: str | None
    ) -> None:
        """The laws, wherever the writer stopped. Raises AssertionError."""
        ...


class Appending:
    """``writes`` snapshots onto the ones of ``base``, through the journal (append) or the recorder (record).

    Where a killed writer left something in ``base``, an error on the way may leave it there.
    """

    is_commit: Sequence[str] = (r"/weights/zarr\.json$",)

    def __init__(self, verb: str, base: Path | None, writes: int) -> None:
        self._verb = verb
        self._base = base
        self._already = 0 if base is None else len(StoreView.open(base).steps)
        self._is_clean = base is None or leftovers(base) == []
        self._writes = writes
        self._known: set[str] = set()

    def prepare(self, folder: Path) -> None:
        if self._base is not None:
            shutil.copytree(self._base, folder / "run.zarr")

    def arguments(self, folder: Path) -> list[str | Path]:
        return [self._verb, folder / "run.zarr", "--snapshots", str(self._writes)]

    def check(
        self, server: Server, folder: Path, fault: Fault | None, ended: Ended, mutant: str | None
    ) -> None:
        store = folder / "run.zarr"
        promised = max(ended.acknowledged, default=self._already)
        if not ended.killed and self._is_clean:
            check_nothing_is_left(folder)
        if fault is None or not ended.fired:
            assert promised == self._already + self._writes, f"undisturbed, and only {promised} promised"
        seen = 0
        if store.exists():
            seen = len(StoreView.open(store).steps)
            self._check_once(store, seen)
        else:
            assert not promised, f"{promised} promised, no store there"
        assert promised <= seen <= promised + 1, f"{promised} promised, {seen} there"
        if ended.error == "WriteFailed":
            assert seen == promised, "an append that failed is visible"
        again = server.run([self._verb, store, "--snapshots", "1"], mutant)
        assert again.code == 0, f"the next append failed: {again.error} {again.text}"
        assert again.acknowledged[-1] == seen + 1, f"the next append promised {again.acknowledged}"
        check_nothing_is_left(store)
        self._check_once(store, seen + 1)

    def _check_once(self, store: Path, n: int) -> None:
        """Most faults leave the same bytes: each outcome is looked at once."""
        files = tree_bytes(store)
        key = fmt.sha256(*(part for name, raw in files.items() for part in (name.encode(), raw)))
        if key not in self._known:
            check_store_holds(store, n)
            self._known.add(key)


def check_store_holds(store: Path, n: int) -> None:
    """Our reader, the verification and a plain Zarr reader see the first n snapshots, and no other."""
    view = StoreView.open(store)
    steps = [writers.step_of(t) for t in range(n)]
    assert view.steps.tolist() == steps, f"steps {view.steps.tolist()} instead of {steps}"
    given = [writers.scalars_of(t) for t in range(n)]
    names = sorted({name for scalars in given for name in scalars})
    assert sorted(view.scalars) == names, f"scalars {sorted(view.scalars)} instead of {names}"
    for name, values in view.scalars.items():
        expected = [scalars.get(name, np.nan) for scalars in given]
        assert np.array_equal(values, expected, equal_nan=True), f"{name} holds other values"
    weights = plain_array(store, fmt.WEIGHTS)
    assert weights.shape == (writers.N, n), "zarr sees another shape"
    for t in range(n):
        expected = writers.column_of(t)
        column = np.empty_like(expected)
        for i in range(writers.N_CHUNKS):
            view.read_chunk(i, t, column[i * writers.ROWS : (i + 1) * writers.ROWS])
        assert column.tobytes() == expected.tobytes(), f"snapshot {t} holds other values"
        assert np.asarray(weights[:, t]).tobytes() == writers.values_of(t).tobytes(), f"{t} read by zarr"
        assert view.sketch_rows is not None
        assert view.read_sketch(t).tobytes() == expected[view.sketch_rows].tobytes(), f"the sketch of {t}"
    damaged = [str(damage) for damage in verify_store(store).damaged]
    assert not damaged, f"damaged: {damaged}"


class Fitting:
    """A fit into a result of three units."""

    is_commit: Sequence[str] = (r"/done/c\.\d+\.0$",)
    SNAPSHOTS: Final = 4

    def __init__(self, home: Path, server: Server) -> None:
        self._source = home / "source.zarr"
        writers.append(self._source, self.SNAPSHOTS, lambda _: None)
        undisturbed = home / "undisturbed"
        undisturbed.mkdir()
        self.prepare(undisturbed)
        ended = server.run(self.arguments(undisturbed))
        assert ended.acknowledged == list(range(writers.N_CHUNKS))
        self._expected = tree_bytes(undisturbed / "run.cmd.zarr")

    def prepare(self, folder: Path) -> None:
        (folder / "run.zarr").symlink_to(self._source)

    def arguments(self, folder: Path) -> list[str | Path]:
        return ["fit", folder / "run.zarr", folder / "run.cmd.zarr"]

    def check(
        self, server: Server, folder: Path, fault: Fault | None, ended: Ended, mutant: str | None
    ) -> None:
        out = folder / "run.cmd.zarr"
        if not ended.killed:
            check_nothing_is_left(folder, but=[partial.name for partial in partials_of(out)])
        if fault is None or not ended.fired:
            assert out.exists(), "undisturbed, and no result there"
        if out.exists():
            assert tree_bytes(out) == self._expected, "a finished result of other bytes"
        for partial in partials_of(out):
            self._check_every_record_is_true(partial, ended.acknowledged)
        again = server.run(self.arguments(folder), mutant)
        assert again.code == 0, f"going on failed: {again.error} {again.text}"
        twice = set(again.acknowledged) & set(ended.acknowledged)
        assert not twice, f"units {twice} were done, and are fitted again"
        assert tree_bytes(out) == self._expected, "interrupted, and other bytes than undisturbed"
        check_nothing_is_left(out)
        assert partials_of(out) == [], "the finished fit is still there under its unfinished name"
        open_result(out)

    def _check_every_record_is_true(self, partial: Path, acknowledged: list[int]) -> None:
        for unit in acknowledged:
            assert (partial / "done" / fmt.chunk_name(unit, 0)).exists(), f"unit {unit} was promised"
        damaged = [str(damage) for damage in verify_result(partial).damaged]
        assert damaged == [], f"a record vouches for what is not there: {damaged}"


class Exporting:
    """The last snapshot as a file, where nothing was (``old`` None) or over another file."""

    is_commit: Sequence[str] = ()

    def __init__(self, home: Path, server: Server, suffix: str, old: bytes | None) -> None:
        self._source = home / f"source-{suffix}.zarr"
        writers.append(self._source, 2, lambda _: None)
        self._name = f"model.{suffix}"
        self._old = old
        ended = server.run(self.arguments(home))
        assert ended.acknowledged == [1], ended
        self._new = (home / self._name).read_bytes()

    def prepare(self, folder: Path) -> None:
        if self._old is not None:
            (folder / self._name).write_bytes(self._old)

    def arguments(self, folder: Path) -> list[str | Path]:
        return ["export", self._source, folder / self._name]

    def check(
        self, server: Server, folder: Path, fault: Fault | None, ended: Ended, mutant: str | None
    ) -> None:
        file = folder / self._name
        if not ended.killed:
            check_nothing_is_left(folder)
        found = file.read_bytes() if file.exists() else None
        assert found in (self._old, self._new), f"half a file: {len(found or b'')} bytes"
        if ended.acknowledged:
            assert found == self._new, "promised, and not there"
        if ended.error == "WriteFailed":
            assert found == self._old, "an export that failed is visible"
        again = server.run(self.arguments(folder), mutant)
        assert again.code == 0, f"the next export failed: {again.error} {again.text}"
        assert file.read_bytes() == self._new, "the next export wrote something else"


# ---- points ---------------------------------------------------------------------------------------------


def watch(server: Server, subject: Subject, folder: Path, mutant: str | None = None) -> list[Call]:
    """The calls of an undisturbed run, with the laws of their order."""
    calls = watch_only(server, subject, folder, mutant)
    check_flushed_before_renamed(calls)
    check_names_last(calls, subject.is_commit)
    return calls


def watch_only(server: Server, subject: Subject, folder: Path, mutant: str | None = None) -> list[Call]:
    """The calls of an undisturbed run, whatever their order."""
    folder.mkdir()
    subject.prepare(folder)
    ended = server.trace(subject.arguments(folder), None, mutant)
    shutil.rmtree(folder)
    check_error_is_typed(None, ended, folder)
    return ended.calls


def inject(server: Server, subject: Subject, folder: Path, fault: Fault, mutant: str | None = None) -> bool:
    """One point; whether the writer came that far. Raises AssertionError for a law that does not hold."""
    folder.mkdir()
    subject.prepare(folder)
    ended = server.trace(subject.arguments(folder), fault, mutant)
    try:
        check_a_refusal_is_final(ended.calls)
        check_error_is_typed(fault, ended, folder)
        try:
            subject.check(server, folder, fault, ended, mutant)
        except CmdgpuError as error:
            raise AssertionError(f"what is there cannot be read: {error}") from error
    except AssertionError as broken:
        broken.add_note(f"{fault}; acknowledged {ended.acknowledged}; {ended.error} {ended.text}")
        raise
    finally:
        shutil.rmtree(folder)
    return ended.fired


def every_point(
    server: Server, subject: Subject, folder: Path, call: str, action: str, mutant: str | None = None
) -> int:
    """k = 1, 2, ... until a run gets through without meeting the fault; how many points there were."""
    for k in range(1, 10_000):
        if not inject(server, subject, folder, Fault(call, action, k), mutant):
            return k - 1
    raise AssertionError("the writer never got through")


def sample(calls: Sequence[Call], action: str, every: Mapping[str, int]) -> Iterator[Fault]:
    """Every n-th call of each name, the first of them included."""
    for call, stride in every.items():
        for k in range(1, count(calls, call) + 1, stride):
            yield Fault(call, action, k)
