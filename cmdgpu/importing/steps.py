"""Which step a checkpoint is of: from its name, or from what the file says; never by the order of a text.

A name tells its step by the number after *step* (or *iter*), else after *checkpoint*, else after *epoch*,
else by its last whole number. What has a decimal point or an exponent, and what follows the name of a metric,
is no step: ``ep040-loss0.123`` is 40.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from cmdgpu.errors import UsageError, printable

_SUFFIX: Final = re.compile(
    r"\.(?:weights\.h5|safetensors|pt|pth|ckpt|bin|npz|h5|hdf5|keras|distcp)$", re.IGNORECASE
)
_NUMBER: Final = re.compile(r"\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")
_KEYWORDS: Final = (
    re.compile(r"(?:steps?|iters?|iterations?)[-_=. ]*$", re.IGNORECASE),
    re.compile(r"(?:checkpoint|ckpt)[-_=. ]*$", re.IGNORECASE),
    re.compile(r"(?:epochs?|(?<![a-z])ep)[-_=. ]*$", re.IGNORECASE),
)
"""What may stand before the number, best first."""
_METRIC: Final = re.compile(
    r"(?:loss|(?<![a-z])(?:acc|accuracy|val|valid|score|metric|error|ppl|lr|seed))[-_=. ]*$", re.IGNORECASE
)
_SHARD: Final = re.compile(r"\d+-of-\d+", re.IGNORECASE)
_MOST_NAMED: Final = 6


@dataclass(frozen=True)
class NamedStep:
    """The step that a name tells."""

    step: int
    kind: str
    """What stands before the number: names that differ in it do not count the same thing."""


def step_in_name(name: str) -> NamedStep | None:
    """The step in the name of a file or folder, or None when it tells none.

    >>> step_in_name("epoch=0-step=8.ckpt").step, step_in_name("ep040-loss0.123.h5").step
    (8, 40)
    """
    text = _SUFFIX.sub("", name)
    if _SHARD.search(text):
        return None
    numbers = [found for found in _NUMBER.finditer(text) if _is_whole(text, found)]
    for rank, keyword in enumerate(_KEYWORDS):
        for found in numbers:
            if keyword.search(text[: found.start()]):
                return NamedStep(int(found[0]), f"{rank}:{_pattern(text[: found.start()])}")
    numbers = [found for found in numbers if not _METRIC.search(text[: found.start()])]
    if not numbers:
        return None
    return NamedStep(int(numbers[-1][0]), _pattern(text))


def _is_whole(text: str, found: re.Match[str]) -> bool:
    """A number by itself, that an int64 holds: ``100`` of ``step100``, not of ``7b`` or ``0.100``."""
    after = text[found.end() : found.end() + 1]
    return found[0].isdigit() and not after.isalpha() and int(found[0]) < 1 << 63


def _pattern(text: str) -> str:
    return _NUMBER.sub("#", text)


def natural(name: str) -> list[tuple[bool, int, str]]:
    """Sorts ``model-2`` before ``model-10``."""
    parts = re.split(
        r"(\d+)", name
    )  # every other one is a number; isdigit() is true of more than int() reads
    return [(bool(i % 2), int(part) if i % 2 else 0, part) for i, part in enumerate(parts)]


# ---- many checkpoints -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Labelled:
    """A checkpoint as it is ordered."""

    name: str
    """For a person: the path."""
    label: str
    """The part of it that may tell a step."""
    told: int | None
    """The step in the file."""


Steps: TypeAlias = list[int | None]
"""One for every checkpoint; None for one that is left out."""


def choose_steps(found: Sequence[Labelled], given: Sequence[int] | None = None) -> Steps:
    """The step of every checkpoint.

    ``given`` are the steps themselves, one for each. Otherwise by the names; where no name tells one, by what
    the files say. A checkpoint without a number beside numbered ones (``last.ckpt``) is taken by the step in
    its file, where the files of the numbered ones agree with their names, and left out where not.
    Raises UsageError, listing them, for checkpoints that tell no step, steps of different kinds, or the same.
    """
    if given is not None:
        return list(_require_distinct(found, _checked(found, given)))
    named = [step_in_name(one.label) for one in found]
    if not any(named):
        return list(_require_distinct(found, _all_told(found)))
    kinds = {one.kind: i for i, one in reversed(list(enumerate(named))) if one is not None}
    if len(kinds) > 1:
        examples = [found[i].name for i in sorted(kinds.values())]
        raise UsageError(
            f"the names count different things: {_list(examples)}",
            hint="name those of one kind, e.g. by a glob, or give --steps, one for each",
        )
    steps: Steps = [None if one is None else one.step for one in named]
    pairs = [(one.told, step) for one, step in zip(found, steps, strict=True) if step is not None]
    if all(told == step for told, step in pairs):
        taken = {step for step in steps if step is not None}
        for i, one in enumerate(found):
            if steps[i] is None and one.told is not None and one.told not in taken:
                steps[i] = one.told
                taken.add(one.told)
    _require_distinct(found, steps)
    return steps


def _checked(found: Sequence[Labelled], given: Sequence[int]) -> list[int]:
    if len(given) != len(found):
        raise UsageError(
            f"{len(given)} steps for {len(found)} checkpoints: {_list([one.name for one in found])}",
            hint="give --steps one for each, in this order",
        )
    if wrong := [step for step in given if not 0 <= step < 1 << 63]:
        raise UsageError(f"step {wrong[0]} cannot be stored", hint="steps count from 0, up to 2^63 - 1")
    return [int(step) for step in given]


def _all_told(found: Sequence[Labelled]) -> list[int]:
    if silent := [one.name for one in found if one.told is None]:
        raise UsageError(
            f"neither name nor file tells the step of {_list(silent)}", hint="give --steps, one for each"
        )
    return [one.told for one in found if one.told is not None]


def _require_distinct(found: Sequence[Labelled], steps: Sequence[int | None]) -> Sequence[int | None]:
    owners: dict[int, list[str]] = {}
    for one, step in zip(found, steps, strict=True):
        if step is not None:
            owners.setdefault(step, []).append(one.name)
    if shared := sorted((step, names) for step, names in owners.items() if len(names) > 1):
        step, names = shared[0]
        more = f" ({len(shared)} steps are shared)" if len(shared) > 1 else ""
        raise UsageError(
            f"step {step} is told by {_list(names)}{more}", hint="leave one of them out, or give --steps"
        )
    return steps


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:_MOST_NAMED])
    return shown if len(names) <= _MOST_NAMED else f"{shown} and {len(names) - _MOST_NAMED} more"
