"""Rows of a trajectory to judge modes by, without a pass over it: those of the sketch, or of the sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from cmdgpu.errors import CmdgpuError
from cmdgpu.indexing import evenly
from cmdgpu.memory import show_bytes
from cmdgpu.notation import F32, F64, I64
from cmdgpu.sampling import candidate_rows, draw_sample, reading, uniform_candidates
from cmdgpu.sources import ArraySource, StoreSource
from cmdgpu.trajectory import Trajectory

MOST_SNAPSHOTS: Final = 256
MOST_ROWS: Final = 2048
MOST_SAMPLED: Final = 1024
"""More would tell no more: seconds and megabytes, whatever the trajectory."""
RESAMPLINGS: Final = 5
MOST_READ_BYTES: Final = 64 << 20
"""Of chunks that hold a candidate, where the sketch does not have it."""


@dataclass(frozen=True)
class Sampled:
    """What was clustered, and how it was drawn."""

    rows: I64
    """(K,)"""
    values: F32
    """(K, T)"""
    n_samples: int
    sampling: str
    random_state: int


@dataclass(frozen=True)
class AtHand:
    """Rows of a trajectory that quality is measured on, float64, at some of its snapshots."""

    columns: I64
    """(T',) positions of these snapshots among the fitted ones: all, or MOST_SNAPSHOTS evenly spread."""
    sample_kt: F64
    """(K, T') clustered rows."""
    rows_nt: F64 | None
    """(n, T') others, uniform over all rows of parameters; None where there are none to be had."""
    resampled: Sequence[F64]
    """Samples of the same kind drawn with the next seeds; none where they cannot be had."""
    note: str
    """Why there is less than there could be; empty where nothing is missing."""


def rows_at_hand(sampled: Sampled, traj: Trajectory | None) -> AtHand:
    """Parameter rows that are cheap to have: candidates of the sample, from the sketch or from memory.

    Where the sketch does not hold the candidates (selected tensors, a store without one) their chunks are
    read if that is little, otherwise rows of the sketch that are selected serve; where the trajectory is out
    of reach, or cannot be read, the clustered rows alone are left, and the note says why.
    """
    columns = evenly(sampled.values.shape[1], MOST_SNAPSHOTS)
    kept = evenly(len(sampled.rows), MOST_SAMPLED)
    sample_kt = sampled.values[np.ix_(kept, columns)].astype(np.float64)
    if traj is None:
        return AtHand(columns, sample_kt, None, (), "the trajectory is out of reach")
    rows, others, note = _choose(sampled, traj)
    try:
        values_nt = traj.read_rows(rows, columns).astype(np.float64)
    except CmdgpuError as error:
        return AtHand(columns, sample_kt, None, (), f"the trajectory cannot be read ({error})")
    others = others[evenly(len(others), MOST_ROWS)]
    drawn = [] if note else _resampled(sampled, traj)
    return AtHand(
        columns,
        sample_kt,
        values_nt[np.searchsorted(rows, others)] if len(others) else None,
        tuple(values_nt[np.searchsorted(rows, again)] for again in drawn),
        note,
    )


def _choose(sampled: Sampled, traj: Trajectory) -> tuple[I64, I64, str]:
    """Rows to read, ascending; those of them that judge; why these."""
    mapped, source = traj.parameters, traj.source
    candidates, uniform = candidate_rows(mapped), uniform_candidates(mapped)
    n_bytes = 0
    if isinstance(source, StoreSource) and not source.in_sketch(candidates):
        _, n_bytes = reading(candidates, source.view, len(traj.columns))
    elif isinstance(source, ArraySource) and not source.is_in_memory:
        n_bytes = traj.stored_bytes
    if n_bytes <= MOST_READ_BYTES:
        return candidates, np.setdiff1d(uniform, sampled.rows), ""
    note = f"the candidates are not in the sketch, and reading them would take {show_bytes(n_bytes)}"
    if isinstance(source, StoreSource) and (sketch := source.view.sketch_rows) is not None:
        drawn = np.intersect1d(sketch, uniform_candidates(source.map))
        mine = np.setdiff1d(drawn[mapped.are_live(drawn)], sampled.rows)
        return mine, mine, note
    return candidates[:0], candidates[:0], note


def _resampled(sampled: Sampled, traj: Trajectory) -> list[I64]:
    """Rows of other samples, where the candidates serve them and they can differ."""
    draws = [
        draw_sample(traj.parameters, sampled.n_samples, sampled.sampling, sampled.random_state + seed)
        for seed in range(1, RESAMPLINGS + 1)
    ]
    if not all(draw.from_candidates for draw in draws) or len(sampled.rows) == traj.parameters.n_rows_of(
        "parameter"
    ):
        return []
    return [draw.rows[evenly(len(draw.rows), MOST_SAMPLED)] for draw in draws]
