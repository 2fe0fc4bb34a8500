"""What checkpoints hold, from headers alone, before anybody imports them; problems are told, not raised."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cmdgpu.errors import CheckpointError, CmdgpuError, UsageError
from cmdgpu.importing.contract import TensorInfo
from cmdgpu.importing.discovery import Paths, discover
from cmdgpu.importing.headers import Described, Reference, describe_open, opened, require_same
from cmdgpu.importing.naming import Named, Rules
from cmdgpu.importing.planning import by_step, stored_type
from cmdgpu.importing.steps import Labelled, choose_steps
from cmdgpu.store import format as fmt


@dataclass(frozen=True)
class Seen:
    """One checkpoint."""

    path: Path
    format: str
    n_tensors: int
    n_bytes: int
    """Of its files."""
    step: int | None
    """None where the steps of all of them cannot be told."""


@dataclass(frozen=True)
class Look:
    checkpoints: tuple[Seen, ...]
    """By step; as they were found where no steps can be told."""
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    """Of the first of them, by the names in the file; where there is none, of the first that opened."""
    named: Named | None = field(repr=False)
    """The same as an import without rules would take them; None where none could."""
    skipped_paths: tuple[tuple[str, str], ...]
    problems: tuple[str, ...]
    """What an import without rules would refuse."""

    @property
    def total_bytes(self) -> int:
        return sum(seen.n_bytes for seen in self.checkpoints)

    @property
    def stored_bytes(self) -> int:
        """Of the trajectory, without compression and padding."""
        if self.named is None:
            return 0
        infos = self.named.infos.values()
        itemsize = fmt.storage(stored_type([info.dtype for info in infos])).numpy.itemsize
        return len(self.checkpoints) * sum(math.prod(info.shape) for info in infos) * itemsize


def look(paths: Paths) -> Look:
    """Raises UsageError where there is no checkpoint, and for one alone what is wrong with it."""
    found = discover(paths)
    skipped, problems = list(found.skipped), list[str]()
    described: list[Described] = []
    tensors: Mapping[str, TensorInfo] = {}
    for candidate in found.candidates:
        try:
            with opened(candidate.format, candidate.path) as checkpoint:
                tensors = tensors or dict(checkpoint.tensors)
                before = described[-1].named if described else None
                one = describe_open(checkpoint, candidate, Rules(), before)
        except CmdgpuError as error:
            if len(found.candidates) == 1 and not tensors:
                raise
            problems.append(str(error))
            continue
        if isinstance(one, str):
            skipped.append((str(candidate.path), one))
        else:
            described.append(one)
    numbered = _numbered(described, skipped, problems)
    seen = [Seen(one.path, one.format, one.n_tensors, one.n_bytes, step) for step, one in numbered]
    named = None
    if numbered:
        first = numbered[0][1]
        named = first.named
        with opened(first.opener, first.path) as checkpoint:
            tensors = dict(checkpoint.tensors)
        problems += _differences([one for _, one in numbered])
    return Look(tuple(seen), tensors, named, tuple(skipped), tuple(problems))


def _numbered(
    described: list[Described], skipped: list[tuple[str, str]], problems: list[str]
) -> list[tuple[int | None, Described]]:
    """What an import would take, by step; what it would leave out goes to ``skipped``."""
    if not described:
        return []
    try:
        steps = choose_steps([Labelled(str(one.path), one.label, one.told) for one in described])
    except UsageError as error:
        problems.append(str(error))
        return [(None, one) for one in described]
    numbered, without = by_step(described, steps)
    skipped += without
    return list(numbered)


def _differences(described: list[Described]) -> list[str]:
    reference, found = Reference.of(described[0]), list[str]()
    for one in described[1:]:
        try:
            require_same(reference, one)
        except CheckpointError as error:
            found.append(str(error))
    return found
