"""Lloyd's algorithm for lines: references that stand for all rows of their modes, a pass for each round.

A round is one pass over the trajectory: every row goes to its best reference, and is added to the Gram matrix
of that mode; the references of the next round are their first principal components (``profiles``). Neither
step can make the objective worse, with or without the squares that the rows differ by: |corr| decides either
way, because rss = ss (1 - corr^2). What is said of a round is computed in float64 from the Gram matrices, and
a round that gains nothing is not taken.

Rows are grouped by mode in granules of 16,384 absolute rows, each of which one thread multiplies, and the
products are added in row order: the bits are those of any blocks, threads and memory limits, in chunks of any
multiple of 16,384 rows. Products are float64. float32 would make the multiplication 1.9 times as fast
(measured, T = 101), the round 1.5 times: not worth a range that squares of 1e19 leave.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Final, TypeAlias

import numpy as np
import torch
from torch import Tensor

from cmdgpu import ops
from cmdgpu.memory import show_bytes
from cmdgpu.notation import CONSTANT, F32, F64, I16, I64
from cmdgpu.profiles import Objective, explained, first_components
from cmdgpu.progress import Progress
from cmdgpu.results import Frame, Refined
from cmdgpu.store import format as fmt
from cmdgpu.store.parameter_map import ParameterMap
from cmdgpu.streaming.plan import Plan, plan_pass
from cmdgpu.streaming.sums import AHEAD, add_all, in_task_order, products_of_a_task
from cmdgpu.trajectory import Trajectory

GRANULE: Final = 16_384
"""Rows that are put in order of their modes: of each there are then enough for a product."""
PIECE: Final = 1024
"""Rows of one product at most: what a thread computes with stays small."""
LEAST_GAIN: Final = 1e-6
"""Share of the whole that a round must gain for another one to be worth its pass."""

Group: TypeAlias = tuple[int, I64]
"""A mode, and columns of a unit whose rows are in it."""


def refined(
    traj: Trajectory,
    state: Refined,
    rounds: int,
    objective: Objective,
    memory_limit: int,
    progress: Progress,
) -> Iterator[Refined]:
    """What every further round leaves, until there were ``rounds`` of them or one gains next to nothing.

    Parameters alone are looked at. ``state.values`` are shares of all movement (``energy``) or means over the
    moving rows (``correlation``): of the references that the first round begins with, then of what each round
    leaves, on the rows it was made from. They never fall. Raises MemoryLimitError with both numbers.
    """
    if is_settled(state, rounds):
        return
    plan = plan_round(traj, len(state.references), memory_limit)
    frame = _frame(traj)
    traj.source.require(traj.columns)
    while not is_settled(state, rounds):
        sums = _ModeSums(frame.map, state.references, objective)
        add_all(
            traj.source, traj.columns, frame, plan, [sums], progress, f"round {max(len(state.values), 1)}"
        )
        state = _better(state, sums.G_mtt)
        yield state


def is_settled(state: Refined, rounds: int) -> bool:
    """Whether there is nothing left to do."""
    values = state.values
    stands_still = len(values) > 1 and values[-1] - values[-2] < LEAST_GAIN
    return len(values) > rounds or stands_still or not len(state.references)


def _better(state: Refined, G_mtt: F64) -> Refined:
    """The references that fit the modes as they are; those at hand where they are no better."""
    total = float(np.einsum("mtt->", G_mtt)) or 1.0
    along_m, references = first_components(G_mtt, state.references)
    values = state.values or (explained(G_mtt, state.references) / total,)
    value = float(along_m.sum()) / total
    if value <= values[-1]:
        return Refined(state.references, (*values, values[-1]))
    return Refined(references, (*values, value))


def _frame(traj: Trajectory) -> Frame:
    return Frame(traj.parameters.without("buffer"), traj.steps, traj.source.rows)


def plan_round(traj: Trajectory, n_modes: int, memory_limit: int) -> Plan:
    """Blocks as those of a fit; a Gram matrix for every mode, and what threads compute with, are fixed.

    Raises MemoryLimitError with both numbers.
    """
    frame, n_snapshots, threads = _frame(traj), len(traj.columns), torch.get_num_threads()
    square = 8 * n_snapshots**2
    product = square * products_of_a_task(n_snapshots)
    piece = PIECE * n_snapshots * (8 + 8 + 8)  # rows as they are stored, in float64, squared
    ordered = 3 * 8 * frame.rows  # the columns of every mode, twice while they are made
    kept = square * (n_modes + 4 * threads)  # four of an eigenproblem
    cpu = torch.device("cpu")
    kernel = ops.workspace_bytes(traj.dtype, n_snapshots, n_modes, cpu, threads) + 18 * frame.rows
    working = threads * (piece + AHEAD * product) + ordered + kernel
    grams = show_bytes(square * n_modes)
    return plan_pass(
        n_units=frame.n_units,
        rows=frame.rows,
        n_snapshots=n_snapshots,
        itemsize=fmt.storage(traj.dtype).numpy.itemsize,
        fits=0,
        lanes=1,
        lane_bytes=working + traj.source.fill_bytes(n_snapshots),
        fixed_bytes=kept,
        limit_bytes=memory_limit,
        otherwise=f", or refine fewer modes: their {n_modes} Gram matrices take {grams}",
    )


class _ModeSums:
    """The Gram matrix of the rows of every mode, unit after unit."""

    def __init__(self, parameters: ParameterMap, R_mt: F32, objective: Objective) -> None:
        n_modes, n_snapshots = R_mt.shape
        self.G_mtt = np.zeros((n_modes, n_snapshots, n_snapshots))
        self._parameters = parameters
        self._references = ops.prepare_references(R_mt)
        self._objective: Objective = objective
        self._threads = torch.get_num_threads()

    def add(self, W_tb: Tensor, start: int, stop: int) -> None:
        mode = ops.assign_and_fit(W_tb, self._references).mode.numpy()[: stop - start]
        for low, high in self._parameters.holes_in(start, stop):
            mode[low - start : high - start] = CONSTANT
        work = partial(_multiply, W_tb, self._objective)
        tasks = list(_tasks(mode, start, products_of_a_task(len(W_tb))))
        for groups, products in in_task_order(work, tasks, self._threads):
            for (m, _), product in zip(groups, products, strict=True):
                self.G_mtt[m] += product


def _tasks(mode: I16, start: int, at_once: int) -> Iterator[list[Group]]:
    """The rows of every granule, mode by mode; a few modes each."""
    stop = start + len(mode)
    for low in range(start - start % GRANULE, stop, GRANULE):
        first = max(low, start) - start
        here = mode[first : low + GRANULE - start]
        order = np.argsort(here, kind="stable")
        modes, begins = np.unique(here[order], return_index=True)
        groups = [
            (int(m), first + columns)
            for m, columns in zip(modes, np.split(order, begins[1:]), strict=True)
            if m >= 0
        ]
        for some in range(0, len(groups), at_once):
            yield groups[some : some + at_once]


def _multiply(W_tb: Tensor, objective: Objective, groups: Sequence[Group]) -> list[F64]:
    """(T, T) sum of v x x^T of every group, x its rows less their means."""
    products: list[F64] = []
    for _, columns in groups:
        G = torch.zeros(len(W_tb), len(W_tb), dtype=torch.float64)
        for first in range(0, len(columns), PIECE):
            piece = torch.as_tensor(columns[first : first + PIECE])
            # 1 ns per element, where index_select takes 800 along this axis (torch 2.13)
            x = torch.gather(W_tb, 1, piece.expand(len(W_tb), len(piece))).double()
            x.sub_(x[0].clone())
            x.sub_(x.mean(0))
            if objective == "correlation":
                x.mul_(x.square().sum(0).rsqrt_())
            G.addmm_(x, x.T)
        products.append(G.numpy())
    return products
