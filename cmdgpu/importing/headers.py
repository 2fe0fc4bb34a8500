"""The headers of many checkpoints: read one after the other, named by the rules, compared with each other."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cmdgpu.errors import CheckpointError, printable
from cmdgpu.importing.contract import Checkpoint, Format
from cmdgpu.importing.discovery import Candidate
from cmdgpu.importing.naming import Named, Rules, name_tensors
from cmdgpu.store import durable
from cmdgpu.store.view import StoreView


@dataclass(frozen=True)
class PlannedFile:
    path: Path
    name: str
    """Below the folder that the checkpoint lies in."""
    identity: tuple[int, ...]
    """Device, number, size and time of the last change: a file that training still writes is found out."""

    @property
    def size(self) -> int:
        return self.identity[2]


# ---- one header -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Described:
    """The header of one checkpoint, under the names that the rules give."""

    path: Path
    label: str
    opener: Format
    format: str
    told: int | None
    """The step in the file."""
    files: tuple[PlannedFile, ...]
    named: Named
    n_tensors: int
    """In the file, taken or not."""
    read_bytes: int
    """Memory of one read."""
    held_bytes: int
    """Memory of an open one, beside its tensors' headers."""

    @property
    def n_bytes(self) -> int:
        return sum(file.size for file in self.files)


def describe_all(
    candidates: Sequence[Candidate], rules: Rules
) -> tuple[list[Described], list[tuple[str, str]]]:
    """Headers, one checkpoint open at a time, and (path, reason) of what holds no weights.

    Raises CheckpointError where none of them does.
    """
    described: list[Described] = []
    skipped: list[tuple[str, str]] = []
    for candidate in candidates:
        one = describe(candidate, rules, described[-1].named if described else None)
        if isinstance(one, str):
            skipped.append((str(candidate.path), one))
        else:
            described.append(one)
    if not described:
        path, reason = skipped[0]
        more = f", and so are {len(skipped) - 1} more" if len(skipped) > 1 else ""
        raise CheckpointError(
            f"{reason}{more}",
            file=path,
            hint="name checkpoints of the model; optimizer state is left out",
        )
    return described, skipped


def describe(candidate: Candidate, rules: Rules, before: Named | None) -> Described | str:
    """The header of a checkpoint, or why it is none of a model."""
    with opened(candidate.format, candidate.path) as checkpoint:
        return describe_open(checkpoint, candidate, rules, before)


def describe_open(
    checkpoint: Checkpoint, candidate: Candidate, rules: Rules, before: Named | None
) -> Described | str:
    """``describe`` of one that is open. ``before`` is shared where the names are the same."""
    if not checkpoint.tensors:
        reasons = sorted({reason for _, reason in checkpoint.skipped})
        return f"holds no weights{f' ({reasons[0]})' if reasons else ''}"
    named = name_tensors(checkpoint, rules)
    if not named.sources:
        first = ", ".join(printable(name) for name in list(checkpoint.tensors)[:3])
        raise CheckpointError(
            f"none of its {len(checkpoint.tensors)} tensors is taken; it holds {first}",
            file=candidate.path,
            hint="change prefix, include or exclude",
        )
    return Described(
        candidate.path,
        candidate.label,
        candidate.format,
        checkpoint.format,
        checkpoint.step,
        _files(checkpoint),
        before if before is not None and before == named else named,  # thousands may have the same names
        len(checkpoint.tensors),
        checkpoint.read_bytes,
        checkpoint.held_bytes,
    )


@contextlib.contextmanager
def opened(format: Format, path: Path) -> Generator[Checkpoint]:
    checkpoint = format.open(path)
    try:
        yield checkpoint
    finally:
        checkpoint.close()


def _files(checkpoint: Checkpoint) -> tuple[PlannedFile, ...]:
    folder = checkpoint.path.parent
    return tuple(
        PlannedFile(path, _shown(os.path.relpath(path, folder)), identity(path)) for path in checkpoint.files
    )


def identity(path: Path) -> tuple[int, ...]:
    """Raises CheckpointError for what is no regular file any more."""
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"cannot be read: {durable.reason_of(error)}", file=path) from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError("is no regular file", file=path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _shown(name: str) -> str:
    """As a document can hold it, whatever bytes the file system allows in a name."""
    return printable(os.fsencode(name).decode("utf-8", "backslashreplace"), 4096)


# ---- all headers ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """What every checkpoint must hold."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str]

    @staticmethod
    def of(first: Described) -> Reference:
        shapes = {name: first.named.infos[source].shape for name, source in first.named.sources.items()}
        return Reference(first.path, shapes, first.named.aliases)

    @staticmethod
    def of_store(view: StoreView) -> Reference:
        return Reference(view.folder, {entry.name: entry.shape for entry in view.map}, view.map.aliases)


def require_same(reference: Reference, one: Described) -> None:
    """Names and shapes of the reference. Raises CheckpointError naming both files and the tensor."""

    def refuse(name: str, what: str) -> CheckpointError:
        hint = "leave the tensor out with include or exclude, or import the checkpoints apart"
        return CheckpointError(f"{what} {reference.path}", file=one.path, tensor=name, hint=hint)

    met: dict[str, str] = {}
    for name, shape in reference.shapes.items():
        source = one.named.source_of(name, reference.aliases)
        if source is None:
            raise refuse(name, "is missing, and is in")
        if (found := one.named.infos[source].shape) != shape:
            raise refuse(name, f"has shape {list(found)}, and {list(shape)} in")
        if source in met:
            raise refuse(name, f"is tied to '{printable(met[source])}', and is not in")
        met[source] = name
    for name, source in one.named.sources.items():
        if source not in met:
            tied = name in reference.aliases
            raise refuse(name, "is a tensor of its own, and is tied in" if tied else "is not in")
