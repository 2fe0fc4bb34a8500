"""Damage one file of a store, look through every door, put the file back.

A *subject* is a small store with its doors: ways to read it that answer what they read, as one digest. After
a damage every door may refuse (a ``CmdgpuError``) or answer what it answered before; anything else is
*silent*, and so is damage that no door refuses and ``verify`` does not list.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import hashlib
import os
import shutil
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from cmdgpu.decomposition import CMD
from cmdgpu.errors import CmdgpuError, CmdgpuWarning
from cmdgpu.progress import Silent
from cmdgpu.results import describe_result, partials_of, verify_result
from cmdgpu.results.ledger import DONE, Ledger
from cmdgpu.sampling import draw_sample
from cmdgpu.store import format as fmt
from cmdgpu.store import zstd
from cmdgpu.store.chunks import ChunkDamage, stored_crc
from cmdgpu.store.durable import bytes_of
from cmdgpu.store.verification import Verification, verify_store
from cmdgpu.store.view import StoreView
from cmdgpu.trajectory import Trajectory
from tests.verbs import N_CHUNKS, ROWS, Weights, append, build_store, create_store

STEPS: Final = (0, 10, 25, 40)
Door: TypeAlias = Callable[[Path], bytes]
Verify: TypeAlias = Callable[..., Verification]


# ---- what is looked at ----------------------------------------------------------------------------------


_MODEL: Final = Weights()


def _digest(*parts: Any) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        raw = part if isinstance(part, bytes) else np.ascontiguousarray(np.asarray(part)).tobytes()
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.digest()


def _of_tensors(tensors: dict[str, Tensor]) -> bytes:
    return _digest(*(part for name, t in tensors.items() for part in (name.encode(), t.detach().numpy())))


def _of_model(load: Callable[[nn.Module, int], object]) -> bytes:
    with torch.no_grad():
        for tensor in _MODEL.state_dict().values():
            tensor.zero_()
    load(_MODEL, -1)
    return _of_tensors(_MODEL.state_dict())


def _of_file(file: Path) -> bytes:
    """What was exported, taken away again."""
    raw = file.read_bytes()
    file.unlink()
    return _digest(raw)


def _of_fit(traj: Trajectory) -> bytes:
    cmd = CMD(n_modes=2, n_samples=20, device="cpu").fit(traj, memory_limit="256MiB")
    return _digest(cmd.references_, cmd.labels_, cmd.a_, cmd.b_, cmd.correlation_)


def _of_pass(traj: Trajectory) -> bytes:
    """What the pass is fed."""
    slot = np.zeros((len(STEPS), N_CHUNKS * ROWS), dtype=np.float32)
    for task in traj.source.fill_tasks(0, N_CHUNKS, traj.columns, slot):
        task()
    return _digest(slot)


def _of_everything(traj: Trajectory) -> bytes:
    scalars = traj.scalars
    return _digest(traj[:, :], traj.steps, *(part for n, v in scalars.items() for part in (n.encode(), v)))


def _of_sample(traj: Trajectory, n: int, rule: str) -> bytes:
    return _digest(traj.read_rows(draw_sample(traj.parameters, n, rule, 0).rows))


def _trajectory(look: Callable[[Trajectory], bytes]) -> Door:
    return lambda path: look(Trajectory.open(path))


def _result(look: Callable[[CMD], bytes]) -> Door:
    return lambda path: look(CMD.load(path))


def _exported(source: Trajectory | CMD, path: Path, suffix: str) -> bytes:
    file = path.parent / f"exported{suffix}"
    source.export(file, -1)
    return _of_file(file)


def _metrics(cmd: CMD) -> bytes:
    """Without the bytes on disk, which are what is damaged."""
    numbers = {name: value for name, value in cmd.metrics_.items() if name != "result_bytes"}
    return repr((numbers, cmd.tensor_shares_, cmd.summary(quality=False).splitlines()[:-1])).encode()


def _described(path: Path) -> bytes:
    """Without how many records lie there: they are counted by their names, and nothing rests on it."""
    return repr(dataclasses.replace(describe_result(path), units_done=0)).encode()


DOCUMENT_DOORS: Final = frozenset(("one number", "one row", "metrics", "its description"))
"""All doors but the last read documents through the functions that open a store: a few stand for them."""

_SLOW_DOORS: Final = ("a fit", "a model", "pt", "safetensors")

TRAJECTORY_DOORS: Final[dict[str, Door]] = {
    "all": _trajectory(_of_everything),
    "one number": _trajectory(lambda traj: _digest(traj[ROWS + 7, -1])),
    "rows": _trajectory(lambda traj: _digest(traj[[3, ROWS, -1], ::2])),
    "a selection": _trajectory(lambda traj: _digest(traj.sel(steps=STEPS[1:3])[:, :])),
    "a state dict": _trajectory(lambda traj: _of_tensors(traj.state_dict(STEPS[1]))),
    "a tensor": _trajectory(lambda traj: _of_tensors(traj.state_dict(-1, params="fc.weight"))),
    "a model": _trajectory(lambda traj: _of_model(traj.load_into)),
    "a sample": _trajectory(lambda traj: _of_sample(traj, 50, "layer-balanced")),
    "the pass": _trajectory(_of_pass),
    "a fit": _trajectory(_of_fit),
    "safetensors": lambda path: _exported(Trajectory.open(path), path, ".safetensors"),
    "pt": lambda path: _exported(Trajectory.open(path), path, ".pt"),
}
RESULT_DOORS: Final[dict[str, Door]] = {
    "labels": _result(lambda cmd: _digest(cmd.labels_)),
    "a": _result(lambda cmd: _digest(cmd.a_)),
    "b": _result(lambda cmd: _digest(cmd.b_)),
    "correlation": _result(lambda cmd: _digest(cmd.correlation_)),
    "one row": _result(lambda cmd: _digest(cmd.a_[ROWS + 7], cmd.labels_[-1])),
    "references": _result(lambda cmd: _digest(cmd.references_, cmd.reference_rows_, cmd.steps_)),
    "the sample": _result(
        lambda cmd: _digest(cmd.sample_, cmd.sample_rows_, cmd.sample_labels_, cmd.linkage_)
    ),
    "metrics": _result(_metrics),
    "a state dict": _result(lambda cmd: _of_tensors(cmd.state_dict(-1))),
    "a model": _result(lambda cmd: _of_model(cmd.load_into)),
    "safetensors": lambda path: _exported(CMD.load(path), path, ".safetensors"),
    "pt": lambda path: _exported(CMD.load(path), path, ".pt"),
    "its description": lambda path: _described(path),
}


@dataclass
class Subject:
    """A sound store, what its doors answer, and which files each of them opens."""

    path: Path
    doors: dict[str, Door]
    verify: Verify
    good: dict[str, bytes] = field(default_factory=dict[str, bytes])
    opened: dict[Path, set[str]] = field(default_factory=dict[Path, set[str]])

    def __post_init__(self) -> None:
        assert self.verify(self.path).damaged == []
        for name, door in self.doors.items():
            with _watched() as files:
                self.good[name] = _through(door, self.path)
            for file in files:
                self.opened.setdefault(file, set()).add(name)
        for name, door in self.doors.items():
            assert _through(door, self.path) == self.good[name], (
                f"{name} answers something else the second time"
            )

    @property
    def files(self) -> list[Path]:
        return sorted(f for f in self.path.rglob("*") if f.is_file() and f.name != ".lock")

    @property
    def documents(self) -> list[Path]:
        return [file for file in self.files if file.name == fmt.DOCUMENT]

    @property
    def chunks(self) -> list[Path]:
        return [file for file in self.files if file.name != fmt.DOCUMENT]


def _through(door: Door, path: Path) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CmdgpuWarning)  # of running statistics, of buffers out of reach
        return door(path)


@contextlib.contextmanager
def _watched() -> Generator[set[Path]]:
    """The paths that are given to ``os.open``."""
    files: set[Path] = set()
    os_open = os.open

    def watching(path: Any, *arguments: Any, **options: Any) -> int:
        files.add(Path(os.fsdecode(path)))
        return os_open(path, *arguments, **options)

    with patch("os.open", watching):
        yield files


def trajectory_subject(folder: Path, *, compressed: bool = False) -> Subject:
    store = build_store(folder / "run.zarr", STEPS, compressed=compressed)
    return Subject(store, TRAJECTORY_DOORS, verify_store)


def older_states(folder: Path) -> list[Path]:
    """The same store as it was after every one of its commits."""
    journal = create_store(folder / "old.zarr")
    states: list[Path] = []
    for t, step in enumerate(STEPS):
        append(journal, step, loss=step / 4)
        states.append(Path(shutil.copytree(folder / "old.zarr", folder / f"old-{t}.zarr")))
    journal.close()
    return states


def foreign_store(folder: Path) -> Path:
    """Of the same layout and with as many snapshots, but of another run."""
    journal = create_store(folder / "foreign.zarr")
    for step in STEPS:
        append(journal, step + 1, loss=step / 3)
    journal.close()
    return folder / "foreign.zarr"


class _Keeping(Silent):
    """Keeps the document of a fit that is not finished."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self.document = b""

    def end(self) -> None:
        (partial,) = partials_of(self._out)
        self.document = (partial / fmt.DOCUMENT).read_bytes()


def fit(folder: Path, name: str, seed: int = 0) -> tuple[Path, bytes]:
    """A result of ``run.zarr`` and the document it had while it was running."""
    keeping = _Keeping(folder / name)
    cmd = CMD(n_modes=3, n_samples=60, random_state=seed, device="cpu")
    cmd.fit(Trajectory.open(folder / "run.zarr"), out=folder / name, progress=keeping)
    return folder / name, keeping.document


def result_subject(folder: Path) -> Subject:
    build_store(folder / "run.zarr", STEPS)
    return Subject(fit(folder, "out.zarr")[0], RESULT_DOORS, verify_result)


# ---- what is done to a file -----------------------------------------------------------------------------


@contextlib.contextmanager
def put_back(*files: Path) -> Generator[None]:
    """The files as they were, whatever was put in their place."""
    kept = {file: file.read_bytes() for file in files}
    try:
        yield
    finally:
        for file, raw in kept.items():
            if file.is_dir() and not file.is_symlink():
                file.rmdir()
            elif os.path.lexists(file) and (file.is_symlink() or not file.is_file()):
                file.unlink()
            file.write_bytes(raw)


def flipped(raw: bytes, bit: int) -> bytes:
    damaged = bytearray(raw)
    damaged[bit // 8] ^= 1 << (bit % 8)
    return bytes(damaged)


def bits_per_kib(size: int, per_kib: int, seed: int) -> list[int]:
    """So many bits of every KiB, and of what is left over; the first, the last, and one of the CRC always."""
    rng = np.random.default_rng(seed)
    bits = {0, 8 * size - 1, 8 * (size - 4)}
    for start in range(0, size, 1024):
        length = 8 * (min(start + 1024, size) - start)
        bits.update((8 * start + rng.choice(length, min(per_kib, length), replace=False)).tolist())
    return sorted(bits)


def _link_outside(file: Path) -> None:
    """To a faithful copy outside of the store."""
    outside = file.parent.parent.parent / f"outside-{file.name}"
    shutil.copyfile(file, outside)
    file.unlink()
    file.symlink_to(outside)


def _in_its_place(file: Path, make: Callable[[Path], object]) -> None:
    file.unlink()
    make(file)


KINDS: Final[dict[str, Callable[[Path], object]]] = {
    "emptied": lambda file: file.write_bytes(b""),
    "cut in half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "a byte short": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "a byte long": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "deleted": Path.unlink,
    "a directory": lambda file: _in_its_place(file, Path.mkdir),
    "a FIFO": lambda file: _in_its_place(file, os.mkfifo),
    "a symbolic link": _link_outside,
    "a link to nowhere": lambda file: _in_its_place(file, lambda f: f.symlink_to("nowhere")),
}


# ---- what comes of it -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """What the doors said of one damage."""

    refused: frozenset[str]
    wrong: tuple[str, ...]
    """Doors that answered something else, or ended in another exception, with what it was."""
    full: tuple[str, ...]
    """Files that ``verify`` names."""
    quick: tuple[str, ...]


def _named_by(verify: Verify, path: Path, quick: bool) -> tuple[str, ...]:
    try:
        return tuple(damage.file for damage in verify(path, quick=quick).damaged)
    except CmdgpuError as error:
        return (error.file or "",)


def look(subject: Subject, doors: Iterable[str] | None = None, *, full: bool = True) -> Look:
    """Through these doors (all of them when None), and with ``verify``; a full one sees what quick sees."""
    refused: set[str] = set()
    wrong: list[str] = []
    for name in subject.doors if doors is None else sorted(doors):
        try:
            if _through(subject.doors[name], subject.path) != subject.good[name]:
                wrong.append(name)
        except CmdgpuError:
            refused.add(name)
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {error}"[:200])
    quick = _named_by(subject.verify, subject.path, quick=True)
    whole = _named_by(subject.verify, subject.path, quick=False) if full else quick
    return Look(frozenset(refused), tuple(wrong), whole, quick)


def is_named(file: Path, said: Iterable[str], vouchers: Iterable[Path] = ()) -> bool:
    """Whether a list of places points at the file: by name, by its array, its column, or what vouches."""
    places = {str(file), str(file.parent), *map(str, vouchers)}
    return any(place in places or fnmatch.fnmatchcase(str(file), place) for place in said)


def vouchers(file: Path) -> list[Path]:
    """Where damage shows that only a digest over several chunks can tell: which one it is, nobody knows."""
    index = file.name.removeprefix("c.").split(".")
    if file.name == fmt.DOCUMENT:
        return []
    if file.parent.name == fmt.SKETCH:
        return [file.parent.parent / fmt.WEIGHTS / f"c.*.{index[-1]}"]
    return [file.parent.parent / DONE / fmt.chunk_name(int(index[0]), 0)] if index[0].isdigit() else []


def is_quick_promised(file: Path, size: int, bit: int) -> bool:
    """Quick reads no elements of what may be large; documents, small arrays, records and CRCs it does."""
    large = (fmt.WEIGHTS, fmt.SKETCH, *fmt.RESULT_ROWS, "segment_stats", "unit_hist")
    return file.name == fmt.DOCUMENT or file.parent.name not in large or bit >= 8 * (size - 4)


def is_silent(found: Look) -> bool:
    return bool(found.wrong) or not (found.refused or found.full)


@dataclass
class Tally:
    """What a sweep did and saw."""

    tried: int = 0
    refused: int = 0
    only_verify: int = 0
    """Seen by ``verify`` alone: no door reads the file."""
    silent: list[str] = field(default_factory=list[str])
    unnamed: list[str] = field(default_factory=list[str])
    unseen_by_quick: list[str] = field(default_factory=list[str])
    per_file: dict[str, int] = field(default_factory=dict[str, int])

    def count(
        self,
        subject: Subject,
        file: Path,
        what: str,
        found: Look,
        *,
        quick_promised: bool = True,
        other: Path | None = None,
    ) -> None:
        """``other`` was damaged too; one of the two must be named."""
        name = str(file.relative_to(subject.path))
        label = f"{name}: {what}"
        self.tried += 1
        self.per_file[name] = self.per_file.get(name, 0) + 1
        self.refused += bool(found.refused)
        self.only_verify += not found.refused and bool(found.full)
        if is_silent(found):
            self.silent.append(f"{label}: {found.wrong or 'nobody noticed'}")
        behind = [place for f in (file, other) if f is not None for place in (f, *vouchers(f))]
        if not is_named(file, found.full, behind):
            self.unnamed.append(f"{label}: {found.full}")
        if quick_promised and not is_named(file, found.quick, behind):
            self.unseen_by_quick.append(f"{label}: {found.quick}")

    def __str__(self) -> str:
        return (
            f"{self.tried} tried, {self.refused} refused, {self.only_verify} seen by verify alone, "
            f"{len(self.silent)} silent, {len(self.unnamed)} not named, "
            f"{len(self.unseen_by_quick)} not named by quick"
        )


def flip_each(
    subject: Subject, file: Path, bits: Iterable[int], tally: Tally, *, every_door: bool = False
) -> None:
    """One bit after the other; doors that never open the file are left out: nothing changes for them."""
    raw = file.read_bytes()
    doors = frozenset(subject.opened.get(file, set()))
    is_document = file.name == fmt.DOCUMENT
    if is_document:
        doors &= DOCUMENT_DOORS - {"metrics"}
    with put_back(file):
        for turn, bit in enumerate(bits):
            file.write_bytes(flipped(raw, bit))
            promised = is_quick_promised(file, len(raw), bit)
            # of a document quick reads all there is: a full look at every eighth bit is enough
            full = not is_document or bit % 8 == 0
            found = look(subject, doors if every_door else spared(doors, turn), full=full)
            tally.count(subject, file, f"bit {bit}", found, quick_promised=promised)


def spared(doors: frozenset[str], turn: int) -> frozenset[str]:
    """Of the doors that are slow only one, in turn."""
    return doors - {slow for i, slow in enumerate(_SLOW_DOORS) if i != turn % len(_SLOW_DOORS)}


def doors_of(subject: Subject, file: Path) -> frozenset[str]:
    """Doors that a damage to this file may show at."""
    every = frozenset(subject.doors)
    return every & DOCUMENT_DOORS if file.name == fmt.DOCUMENT else every


def damage_each(subject: Subject, files: Iterable[Path], tally: Tally, *, every_door: bool = False) -> None:
    """Every kind of damage to every one of these files."""
    for file in files:
        doors = doors_of(subject, file)
        for turn, (kind, damage) in enumerate(KINDS.items()):
            with put_back(file):
                damage(file)
                full = every_door or file.name != fmt.DOCUMENT
                found = look(subject, doors if every_door else spared(doors, turn), full=full)
                tally.count(subject, file, kind, found)


def first_silent(subject: Subject, damages: Iterator[tuple[Path, str, Callable[[], object]]]) -> str | None:
    """The first of these damages that is silent, or None when all are seen."""
    for file, what, damage in damages:
        others = [f for f in subject.chunks if f.parent == file.parent and f != file]
        with put_back(file, *others):
            damage()
            if is_silent(found := look(subject)):
                return f"{file.relative_to(subject.path)}: {what}: {found.wrong}"
    return None


# ---- readers that are wrong in one step -----------------------------------------------------------------


def _unchecked_chunk(path: Path, out: Any, kept: bytes | None = None, *, compressed: bool = False) -> bytes:
    del kept
    if compressed:
        frame = path.read_bytes()[: -fmt.CRC_BYTES]
        with contextlib.suppress(zstd.BadFrame):
            zstd.decompress(memoryview(frame), out)
        return b""
    raw = path.read_bytes()
    if len(raw) < out.nbytes:
        raise ChunkDamage("is short")
    bytes_of(out)[:] = raw[: out.nbytes]
    return raw[out.nbytes :]


def _any_crcs(view: Any, t: int) -> list[bytes]:
    itemsize = view.storage.numpy.itemsize
    found = [stored_crc(view.chunk_path(i, t), view.rows * itemsize) for i in range(view.n_chunks)]
    if view.sketch_rows is not None:
        found.append(stored_crc(view.sketch_path(t), len(view.sketch_rows) * itemsize))
    return found


def _any_unit(ledger: Any, unit: int) -> list[bytes]:
    return [stored_crc(file.path, file.n_bytes) for file in ledger.files(unit)][:-1]


def _open_anything(path: Path, n_bytes: int, compressed: bool) -> tuple[int, int]:
    del compressed
    try:
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), n_bytes
    except OSError as error:
        raise ChunkDamage("cannot be opened") from error


def _always(document: Any) -> bool:
    del document
    return True


@contextlib.contextmanager
def _careful(change: contextlib.AbstractContextManager[Any]) -> Generator[None]:
    """The change, and no compiled reader beside it, which has checks of its own."""

    def no_threads(*_: object) -> int:
        return 0

    with (
        patch("cmdgpu.ops.files.can_read", lambda: False),
        patch("cmdgpu.streaming.engine.threads_for", no_threads),
        change,
    ):
        yield


MUTANTS: Final[dict[str, Callable[[], contextlib.AbstractContextManager[Any]]]] = {
    "I: no self-digest": lambda: patch.object(fmt, "is_sealed", _always),
    "J: no digest of a column": lambda: _careful(patch.object(StoreView, "_first_contact", _any_crcs)),
    "K: no size, no type": lambda: _careful(patch("cmdgpu.store.chunks._open", _open_anything)),
    "M: no CRC": lambda: _careful(patch("cmdgpu.store.view.read_chunk", _unchecked_chunk)),
    "M: no CRC of what is compressed": lambda: patch("cmdgpu.store.view.read_chunk", _unchecked_chunk),
    "no done record": lambda: patch.object(Ledger, "crcs", _any_unit),
    "no CRC of a unit": lambda: patch("cmdgpu.results.ledger.read_chunk", _unchecked_chunk),
}
"""Each replaces one function of the reader."""
