"""Dynamics go from snapshot to snapshot: their steps must be even."""

from __future__ import annotations

import numpy as np

from cmdgpu.errors import UsageError
from cmdgpu.notation import I64


def gap(steps: I64) -> int:
    """Steps from snapshot to snapshot, of two at least."""
    return int(steps[1] - steps[0])


def require_even(steps: I64, file: object) -> None:
    """Raises UsageError for fewer than two, and naming the first gap that is another one than the first."""
    if len(steps) < 2:
        raise UsageError(f"dynamics of {len(steps)} snapshots", file=file, hint="two are the least")
    gaps = np.diff(steps)
    if len(odd := np.flatnonzero(gaps != gaps[0])):
        before, after = steps[odd[0]], steps[odd[0] + 1]
        raise UsageError(
            f"dynamics need even steps: {gaps[0]} at first, {gaps[odd[0]]} from {before} to {after}",
            file=file,
            hint="select evenly spaced snapshots with sel(steps=...)",
        )
