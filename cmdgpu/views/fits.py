"""Fits of one trajectory beside each other: what more modes, or rows, buy and cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cmdgpu.errors import UsageError, printable

if TYPE_CHECKING:
    from cmdgpu.decomposition import CMD


@dataclass(frozen=True)
class Fit:
    """One of them; the metrics as in ``metrics_``: of parameters, NaN where nothing moves."""

    name: str
    n_modes: int
    n_samples: int
    weight_mse: float
    r2: float
    r2_energy: float
    mean_abs_correlation: float
    result_bytes: int
    trajectory_bytes: int


def fits(cmds: Mapping[str, CMD]) -> list[Fit]:
    """Fits by name, ordered by their modes, then as given.

    Raises UsageError naming two that are not of the same rows at the same snapshots: their errors cannot be
    compared. Arrays in memory have no digest; of them the steps and the tensors are compared.
    """
    names = list(cmds)
    for name in names[1:]:
        if what := _difference(cmds[names[0]], cmds[name]):
            raise UsageError(
                f"{printable(names[0])} and {printable(name)} are not fits of one trajectory: {what} differ",
                hint="compare fits of the same store, steps and parameters",
            )
    return sorted((_fit(name, cmd) for name, cmd in cmds.items()), key=lambda fit: fit.n_modes)


def _difference(one: CMD, other: CMD) -> str | None:
    mine, theirs = one.result.provenance["source"], other.result.provenance["source"]
    for key, what in (("steps", "the steps"), ("digest", "the weights"), ("layout", "the tensors")):
        if mine.get(key) != theirs.get(key):
            return what
    return None if one.result.frame.map.tensors == other.result.frame.map.tensors else "the selected tensors"


def _fit(name: str, cmd: CMD) -> Fit:
    metrics = cmd.metrics_
    return Fit(
        name=name,
        n_modes=cmd.n_modes_,
        n_samples=len(cmd.sample_rows_),
        weight_mse=metrics["weight_mse"],
        r2=metrics["r2"],
        r2_energy=metrics["r2_energy"],
        mean_abs_correlation=metrics["mean_abs_correlation"],
        result_bytes=metrics["result_bytes"],
        trajectory_bytes=metrics["trajectory_bytes"],
    )
