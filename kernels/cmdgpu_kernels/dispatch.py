"""Which implementation of an operation runs: the first in order of preference that has no reason not to.

The choice depends on layout, element type, T, M and device only. It never depends on the values nor on the
number of rows: a row would otherwise change with the block it travels in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["Implementation", "NoKernelError", "Problem", "choose", "named"]

Run = TypeVar("Run")


@dataclass(frozen=True)
class Problem:
    """What an implementation is asked to support."""

    dtype: str
    """Element type in storage, by torch's name: ``float32``, ``bfloat16``, ..."""
    snapshots: int
    """T, the columns of the trajectory."""
    modes: int
    """M, the reference profiles; 0 is legal, and what an operation without references says."""
    device: str
    """Device type: ``cpu``, ``cuda``, ..."""
    time_major: bool = True
    """A snapshot is contiguous, (T, B); otherwise a row is, (B, T)."""


@dataclass(frozen=True)
class Implementation(Generic[Run]):
    """One way to compute an operation, and what it says about itself."""

    name: str
    run: Run
    refusals: Callable[[Problem], tuple[str, ...]]
    """Every reason why it cannot serve a problem; empty when it can."""
    tolerance: Mapping[str, float]
    """Largest error it may have against the float64 definition on the stored values, per storage dtype."""


class NoKernelError(RuntimeError):
    """No implementation accepts the problem; the text lists every candidate with every reason."""


def choose(
    operation: str, candidates: Sequence[Implementation[Run]], problem: Problem
) -> tuple[Implementation[Run], dict[str, tuple[str, ...]]]:
    """First candidate without reasons, and the reasons of those before it. Raises NoKernelError."""
    refusals: dict[str, tuple[str, ...]] = {}
    for candidate in candidates:
        reasons = candidate.refusals(problem)
        if not reasons:
            return candidate, refusals
        refusals[candidate.name] = reasons
    lines = [f"  {name}: {'; '.join(reasons)}" for name, reasons in refusals.items()]
    raise NoKernelError("\n".join([f"{operation}: no kernel accepts {problem}", *lines]))


def named(
    operation: str, implementations: Sequence[Implementation[Run]], name: str | None
) -> list[Implementation[Run]]:
    """The one of that name, or all of them for None. Raises ValueError for a name that is not there."""
    names = [candidate.name for candidate in implementations]
    if name is not None and name not in names:
        raise ValueError(f"no implementation of {operation} named {name!r}; have: {', '.join(names)}")
    return [candidate for candidate in implementations if name in (None, candidate.name)]
