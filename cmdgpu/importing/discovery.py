"""Paths as a person gives them -> checkpoints, each with the part of its name that may tell its step.

A path is a checkpoint (a file, or a folder of one), a folder of checkpoints, or a glob. What else lies beside
them is skipped and listed with the reason; a file that should be a checkpoint and is none is an error.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias, cast

from cmdgpu.errors import CheckpointError, UsageError, printable
from cmdgpu.importing.contract import FORMATS, Format
from cmdgpu.importing.foreign import what_it_is
from cmdgpu.importing.steps import natural
from cmdgpu.store import durable

Paths: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

SUFFIXES: Final = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".npz", ".h5", ".hdf5", ".keras")
"""A file that ends so is meant to be a checkpoint."""
_BESIDE: Final = ("optimizer", "optim", "scheduler", "scaler", "rng_state", "random_states", "training_args")
"""How files begin that trainers write beside the model: never opened."""
_MOST_INSIDE: Final = 64
"""Entries of a folder that is no checkpoint itself, in which one is looked for."""


@dataclass(frozen=True)
class Candidate:
    path: Path
    label: str
    """What may tell its step: the last part of its path that is its own."""
    format: Format


@dataclass(frozen=True)
class Found:
    candidates: tuple[Candidate, ...]
    """In natural order of their paths; in the order given for a list."""
    skipped: tuple[tuple[str, str], ...]
    """(path, reason)."""


def discover(paths: Paths) -> Found:
    """Every checkpoint that ``paths`` name; nothing of them is opened but what tells their format.

    Raises UsageError for a path or glob that matches nothing and where there is no checkpoint at all,
    CheckpointError for a file that should be one, and for a folder among others that holds several.
    """
    search = _Search()
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(cast(Iterable[str], paths))
    for path in given:
        matches = _matches(path)
        for match in matches:
            search.take(match, alone=len(given) == 1 and len(matches) == 1)
    if not search.found:
        what = ", ".join(printable(str(path)) for path in given[:3]) or "no path"
        first = f" ({printable(search.skipped[0][0])}: {search.skipped[0][1]})" if search.skipped else ""
        raise UsageError(
            f"there is no checkpoint at {what}{first}", hint="name checkpoints, a folder of them, or a glob"
        )
    return Found(_labelled(search.found), tuple(search.skipped))


def _matches(path: str | os.PathLike[str]) -> list[Path]:
    """The path itself, or what the glob matches."""
    text = os.fspath(path)
    if os.path.lexists(text):
        return [Path(text)]
    if isinstance(path, str) and glob.has_magic(text):
        matched = sorted(glob.glob(text, recursive=True), key=natural)  # noqa: PTH207, an absolute one too
        if not matched:
            raise UsageError(f"the glob {printable(text)} matches nothing", hint="check the path")
        return [Path(match) for match in matched]
    raise UsageError("there is nothing here", file=text, hint="check the path")


class _Search:
    def __init__(self) -> None:
        self.found: list[tuple[Path, Path, Format]] = []
        """(path, the part of it that is named after its step, format)."""
        self.skipped: list[tuple[str, str]] = []

    def take(self, path: Path, *, alone: bool) -> None:
        """A path that was given: what is no checkpoint is an error where it is the only one."""
        if path.is_dir():
            self._take_folder(path)
        elif alone and _format_of(path) is None:
            raise _unreadable(path)
        else:
            self._take_file(path)

    def _take_file(self, path: Path) -> None:
        if path.name.startswith(_BESIDE):
            self.skipped.append((str(path), "lies beside a model"))
        elif not path.is_file():
            self.skipped.append((str(path), "is no regular file"))
        elif (format := _format_of(path)) is not None:
            self.found.append((path, path, format))
        elif path.name.lower().endswith(SUFFIXES):
            raise _unreadable(path)
        else:
            self.skipped.append((str(path), "is no checkpoint"))

    def _take_folder(self, folder: Path) -> None:
        """A checkpoint or a folder of them; one that is both is a trainer's: a folder of them."""
        format = _format_of(folder)
        inside = _Search()
        entries = inside._own_entries(folder)
        for entry in entries:
            if entry.is_dir():
                inside._take_child(entry)
        if format is not None and not inside.found:
            self.found.append((folder, folder, format))
            return
        for entry in entries:
            if entry.is_dir():
                continue
            if format is not None:
                inside.skipped.append((str(entry), "lies beside the checkpoints"))
            else:
                inside._take_file(entry)
        self.found += sorted(inside.found, key=lambda found: natural(str(found[0])))
        self.skipped += inside.skipped

    def _take_child(self, folder: Path) -> None:
        """A folder in a folder of checkpoints: one itself, or one that holds one beside other things."""
        if (format := _format_of(folder)) is not None:
            self.found.append((folder, folder, format))
            return
        inside = _Search()
        for entry in inside._own_entries(folder)[:_MOST_INSIDE]:
            if not entry.is_dir():
                inside._take_file(entry)
            elif (format := _format_of(entry)) is not None and not entry.name.startswith(_BESIDE):
                inside.found.append((entry, folder, format))
        if len(inside.found) > 1:
            names = ", ".join(printable(path.name) for path, _, _ in inside.found[:4])
            raise CheckpointError(
                f"holds {len(inside.found)} checkpoints: {names}",
                file=folder,
                hint=f"name this folder if they are a run of their own, or one of them in each folder by a "
                f"glob: '{folder.parent}/*/{inside.found[0][0].name}'",
            )
        if not inside.found:
            self.skipped.append((str(folder), "holds no checkpoint"))
            return
        ((path, _, format),) = inside.found
        self.found.append((path, folder, format))
        self.skipped += inside.skipped

    def _own_entries(self, folder: Path) -> list[Path]:
        """What lies in a folder, hidden names left out. What a link there leads to was named by nobody."""
        own: list[Path] = []
        for entry in sorted(durable.entries(folder), key=lambda entry: natural(entry.name)):
            if entry.name.startswith("."):
                continue
            if entry.is_symlink():
                target = printable(os.fspath(entry.readlink()))
                self.skipped.append((str(entry), f"is a symbolic link to {target}: name it to take it"))
            else:
                own.append(entry)
        return own


def _format_of(path: Path) -> Format | None:
    """The first format that claims a path."""
    if not (path.is_file() or path.is_dir()):
        return None
    return next((FORMATS[name] for name in FORMATS if FORMATS[name].claims(path)), None)


def _labelled(found: list[tuple[Path, Path, Format]]) -> tuple[Candidate, ...]:
    """What all paths end in alike (``step-3/model.pt``) tells none of them apart: the part before it does."""
    parts = [named.parts for _, named, _ in found]
    alike = 0
    while len(parts) > 1 and all(len(p) > alike + 1 for p in parts):
        if len({p[-1 - alike] for p in parts}) > 1:
            break
        alike += 1
    else:
        alike = 0
    return tuple(
        Candidate(path, p[-1 - alike], format) for (path, _, format), p in zip(found, parts, strict=True)
    )


def _unreadable(path: Path) -> CheckpointError:
    """What it is instead, where that can be told."""
    if (foreign := what_it_is(path)) is not None:
        return CheckpointError(foreign.found, file=path, hint=foreign.hint)
    found = "is no checkpoint that can be read: cut short, or of a kind unknown here"
    return CheckpointError(found, file=path, hint=_WAY_OUT)


_WAY_OUT: Final = f"have: {', '.join(SUFFIXES)}, Hugging Face and torch.distributed.checkpoint folders"
