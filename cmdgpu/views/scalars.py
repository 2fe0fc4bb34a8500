"""What was recorded beside the weights: loss, accuracy, ..."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cmdgpu.notation import F64

if TYPE_CHECKING:
    from cmdgpu.decomposition import CMD


def scalars(cmd: CMD) -> dict[str, F64]:
    """(T,) at the fitted steps by name, NaN where not given; none where the trajectory is out of reach."""
    return {} if cmd.trajectory is None else cmd.trajectory.scalars


def unit_of(cmd: CMD) -> str:
    """What a step counts: step, epoch, ...; "step" where the trajectory is out of reach."""
    return "step" if cmd.trajectory is None else cmd.trajectory.unit
