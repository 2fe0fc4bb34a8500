"""One pass: inner products of the snapshots over the rows of every group, in float64.

Rows are displaced by their first value p, x = w - p, before anything is multiplied. A *granule* of 1,024
absolute rows is multiplied at a time, by one thread; what it leaves is added in the order of the rows. Units
of any multiple of a granule, blocks, threads and memory limits then leave the same bits.

Products are float64 where ``gram_matrix`` of the kernels has float32: a Gram matrix squares the condition,
and the noise of float32 would hide singular values below 3e-4 of the largest, of float64 below 1.5e-8.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import torch
from torch import Tensor

from cmdgpu.baselines.found import Found
from cmdgpu.baselines.groups import Grouping, Run
from cmdgpu.memory import default_limit
from cmdgpu.notation import F64, I64
from cmdgpu.progress import Progress
from cmdgpu.results import Frame
from cmdgpu.store import format as fmt
from cmdgpu.store.parameter_map import ParameterMap
from cmdgpu.streaming.plan import Plan, plan_pass
from cmdgpu.streaming.sums import AHEAD, add_all, in_task_order, products_of_a_task
from cmdgpu.trajectory import Trajectory

GRANULE: Final = 1024
_KEPT: Final = 3
"""T x T matrices that a group costs at most: its sums, and what a decomposition leaves of them."""


@dataclass(frozen=True)
class Gram:
    """Sums over the finite rows of one group, x = w - p, p = w at the first selected snapshot."""

    G: F64
    """(T, T): sum_n x_n x_n^T. Its row and column 0 are 0."""
    q: F64
    """(T,): sum_n p_n x_n."""
    sum_pp: float
    """sum_n p_n^2."""

    @property
    def raw(self) -> F64:
        """(T, T): sum_n w_n w_n^T."""
        return self.G + self.q[:, None] + self.q[None, :] + self.sum_pp

    @property
    def centred(self) -> F64:
        """(T, T): the same of rows that are centred over time."""
        of_rows = self.G - self.G.mean(axis=1, keepdims=True)
        centred = of_rows - of_rows.mean(axis=0, keepdims=True)
        return (centred + centred.T) / 2

    @property
    def energy(self) -> float:
        """Squares of all rows around their means over time."""
        return float(np.trace(self.centred))

    def residual(self, F: F64) -> float:
        """Squared error of the filters F = [f_0 ... f_T-1] over all rows: tr(D^T G D) with D = I - F.

        Infinity where it is beyond float64.
        """
        D = np.eye(len(F)) - F
        with np.errstate(over="ignore", invalid="ignore"):
            residual = float(np.einsum("tk,tk->", D, self.raw @ D))
        return max(residual, 0.0) if np.isfinite(residual) else float("inf")


@dataclass(frozen=True)
class Grams:
    """What a pass leaves for one grouping."""

    grouping: Grouping
    packed: F64
    """(G, T, T): sums of [p, x_1, x_2, ...] with themselves; x_0 is 0, and its place carries p."""

    def __len__(self) -> int:
        return len(self.packed)

    def __getitem__(self, group: int) -> Gram:
        both = self.packed[group]
        both = (both + both.T) / 2
        G, q = both.copy(), both[0].copy()
        G[0], G[:, 0], q[0] = 0.0, 0.0, 0.0
        return Gram(G, q, float(both[0, 0]))

    def __iter__(self) -> Iterator[Gram]:
        return (self[group] for group in range(len(self)))


def gram_pass(
    traj: Trajectory, groupings: Sequence[Grouping], memory_limit: int | None, progress: Progress
) -> tuple[list[Grams], Found]:
    """The Gram matrices of every group of these groupings; buffers are in none.

    Raises MemoryLimitError with both numbers before anything is read or allocated.
    """
    started = time.perf_counter()
    source, columns = traj.source, traj.columns
    frame = Frame(traj.parameters.without("buffer"), traj.steps, source.rows)
    threads = torch.get_num_threads()
    plan = _plan(traj, frame, groupings, threads, default_limit() if memory_limit is None else memory_limit)
    source.require(columns)  # that N is what the layout claims, before anything is allocated by it
    sums = [_Sums(frame.map, grouping, len(columns), threads) for grouping in groupings]
    bytes_read = add_all(source, columns, frame, plan, sums, progress, "gram")
    non_finite = sums[0].non_finite
    found = Found(
        n_rows=frame.map.n_live - non_finite.total(),
        non_finite={tensor.name: non_finite[tensor.name] for tensor in frame.map if non_finite[tensor.name]},
        run={
            "bytes_read": bytes_read,
            "planned_bytes": plan.needed_bytes,
            "seconds": time.perf_counter() - started,
        },
    )
    return [each.grams for each in sums], found


def _plan(
    traj: Trajectory, frame: Frame, groupings: Sequence[Grouping], threads: int, limit_bytes: int
) -> Plan:
    """Blocks as those of a fit; the sums of all groups, and what threads compute with, are fixed."""
    n_snapshots = len(traj.columns)
    square = 8 * n_snapshots**2
    kept = sum(_KEPT * square * grouping.n_groups + grouping.n_bytes for grouping in groupings)
    of_a_task = square * products_of_a_task(n_snapshots)
    working = threads * (2 * 8 * n_snapshots * GRANULE + AHEAD * of_a_task) + 8 * square
    most = max(groupings, key=lambda grouping: grouping.n_groups)
    return plan_pass(
        n_units=frame.n_units,
        rows=frame.rows,
        n_snapshots=n_snapshots,
        itemsize=fmt.storage(traj.dtype).numpy.itemsize,
        fits=0,
        lanes=1,
        lane_bytes=working + traj.source.fill_bytes(n_snapshots),
        fixed_bytes=kept,
        limit_bytes=limit_bytes,
        otherwise=f", or larger groups than the {most.n_groups} by {most.by}" if most.n_groups > 1 else "",
    )


class _Sums:
    """The sums of one grouping, unit after unit."""

    def __init__(self, parameters: ParameterMap, grouping: Grouping, n_snapshots: int, threads: int) -> None:
        self.grams = Grams(grouping, np.zeros((grouping.n_groups, n_snapshots, n_snapshots)))
        self.non_finite: Counter[str] = Counter()
        """Rows left out, by tensor."""
        self._parameters = parameters
        self._threads = threads
        self._runs_of_a_task = products_of_a_task(n_snapshots)
        """A node's runs are short."""

    def add(self, W_tb: Tensor, start: int, stop: int) -> None:
        """The rows [start, stop) of a unit, (T, >= stop - start) with any strides."""
        work = partial(_multiply, W_tb, start)
        for runs, found in in_task_order(work, list(self._tasks(start, stop)), self._threads):
            for run, product in zip(runs, found.products, strict=True):
                self.grams.packed[run.group] += product
            self._name(found.non_finite)

    def _tasks(self, start: int, stop: int) -> Iterator[list[Run]]:
        """A few neighbouring runs each, cut at the granules."""
        for low in range(start - start % GRANULE, stop, GRANULE):
            runs = self.grams.grouping.runs_in(max(low, start), min(low + GRANULE, stop))
            for first in range(0, len(runs), self._runs_of_a_task):
                yield runs[first : first + self._runs_of_a_task]

    def _name(self, rows: I64) -> None:
        for row in rows.tolist():
            segment = self._parameters.segments(row, row + 1)[0]
            self.non_finite[self._parameters.tensors[segment.tensor].name] += 1


@dataclass(frozen=True)
class _Found:
    products: list[F64]
    """(T, T) of every run."""
    non_finite: I64
    """Rows."""


def _multiply(W_tb: Tensor, start: int, runs: Sequence[Run]) -> _Found:
    """[p, x_1, x_2, ...] of a few runs with themselves; ``start`` is the row of W_tb's first column."""
    first, last = runs[0].start, runs[-1].stop
    x = torch.empty(W_tb.shape[0], GRANULE, dtype=torch.float64)[:, : last - first]
    x.copy_(W_tb[:, first - start : last - start])
    x[1:].sub_(x[0])
    # finite rows cannot add up to more than float64 holds; NaN and infinities do not add up to less
    bad = ~torch.isfinite(x.sum(0))
    non_finite = np.empty(0, dtype=np.int64)
    if bool(bad.any()):
        rows = np.flatnonzero(bad.numpy()) + first
        non_finite = rows[[any(run.start <= row < run.stop for run in runs) for row in rows]]
        x[:, bad] = 0.0  # cleared: 0 times NaN is NaN
    parts = [x[:, run.start - first : run.stop - first] for run in runs]
    return _Found([torch.mm(part, part.T).numpy() for part in parts], non_finite)
