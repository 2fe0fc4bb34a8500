"""How far the rebuilt weights are from the recorded ones at every step: one pass for all methods."""

# torch leaves the types of many methods open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import torch
from torch import Tensor

from cmdgpu import ops
from cmdgpu.baselines import Baseline
from cmdgpu.baselines.groups import Grouping
from cmdgpu.comparison.methods import Fittable, Method, Recorded
from cmdgpu.decomposition import CMD
from cmdgpu.errors import CmdgpuError
from cmdgpu.memory import default_limit
from cmdgpu.notation import F64, I64
from cmdgpu.progress import Progress
from cmdgpu.results import Frame
from cmdgpu.store import format as fmt
from cmdgpu.streaming.plan import SLOT_PADDING, plan_pass
from cmdgpu.streaming.reader import BlockReader
from cmdgpu.trajectory import Trajectory

_TILE: Final = 1024
"""Rows, counted from the first of the trajectory, whose errors are one addend: units of any multiple of it,
threads and memory limits leave the same bits."""


@dataclass(frozen=True)
class WeightErrors:
    """Over the parameters that are finite at every selected snapshot."""

    n_rows: int
    squared: F64
    """(methods, S) sum_i (what_i - w_i)^2 before a rebuilt weight is rounded; infinity beyond float64."""
    energy: F64
    """(S,) sum_i w_i^2"""

    @property
    def mse(self) -> F64:
        """(methods, S) of a weight; NaN without a finite row."""
        return self.squared / self.n_rows if self.n_rows else np.full_like(self.squared, np.nan)

    @property
    def relative(self) -> F64:
        """(methods, S) |what - w| / |w|; NaN where all weights are 0."""
        nothing = np.full_like(self.squared, np.nan)
        return np.sqrt(np.divide(self.squared, self.energy, out=nothing, where=self.energy > 0))


def weight_errors(
    methods: Sequence[Method], traj: Trajectory, steps: I64, memory_limit: int | None, progress: Progress
) -> WeightErrors:
    """Of every fitted method at (S,) steps that all of them were fitted on.

    The trajectory is read once, a unit at a time; sums are float64. Raises MemoryLimitError with both numbers
    before anything is read.
    """
    source, columns = traj.source, traj.columns
    frame = Frame(traj.parameters.without("buffer"), traj.steps, source.rows)
    slots = _slots(methods, traj, frame, len(steps), memory_limit or default_limit())
    source.require(columns)
    tiles = _Tiles(
        [_error_of(method.fittable, traj, steps) for method in methods],
        Grouping.of(traj.parameters, "network"),
        np.searchsorted(traj.steps, steps),
    )
    unit_bytes = frame.rows * len(columns) * slots[0].itemsize
    progress.begin("weight errors", unit_bytes * len(frame.live_units))
    try:
        blocks = [(unit, unit + 1) for unit in frame.live_units]
        with BlockReader(source, columns, blocks, slots) as reader:
            for block in reader:
                tiles.add(ops.as_tensor(block.W_tb, source.dtype), *frame.unit(block.first))
                reader.release(block)
                progress.advance(unit_bytes)
    finally:
        progress.end()
    return WeightErrors(tiles.n_rows, np.where(np.isnan(tiles.squared), np.inf, tiles.squared), tiles.energy)


class _Error(Protocol):
    """What one method makes of rows."""

    def begin(self, start: int, stop: int) -> None:
        """The rows [start, stop) of a unit come next."""
        ...

    def squared(self, x: Tensor, x_s: Tensor, live: Tensor, first: int) -> Tensor:
        """(S,) squared errors of the rows from ``first`` on, added up.

        x is (T, n) in float64, 0 where a row does not count; x_s is (S, n), the same at the steps asked for.
        """
        ...


class _None:
    """Recorded weights are what they are."""

    def begin(self, start: int, stop: int) -> None:
        del start, stop

    def squared(self, x: Tensor, x_s: Tensor, live: Tensor, first: int) -> Tensor:
        del x, live, first
        return torch.zeros(len(x_s), dtype=torch.float64)


class _Filtered:
    """w(s) - W f_s = W d_s, for every group of rows its own d_s."""

    def __init__(self, baseline: Baseline, traj: Trajectory, steps: I64) -> None:
        self._grouping = Grouping.of(traj.parameters, baseline.by or "network")
        mine = np.searchsorted(traj.columns, baseline.trajectory.columns)
        D = np.zeros((self._grouping.n_groups, len(traj.columns), len(steps)))
        self._beyond = torch.zeros(len(steps), dtype=torch.float64)
        for s, step in enumerate(steps.tolist()):
            try:
                D[:, mine, s] = -baseline.filter_at(step)
            except CmdgpuError:  # the step is a fitted one: a mode has grown beyond float64 by then
                self._beyond[s] = torch.inf
            D[:, np.flatnonzero(traj.steps == step)[0], s] += 1.0
        self._d_gst = torch.from_numpy(D).transpose(1, 2)

    def begin(self, start: int, stop: int) -> None:
        del start, stop

    def squared(self, x: Tensor, x_s: Tensor, live: Tensor, first: int) -> Tensor:
        del x_s, live
        total = self._beyond.clone()
        for run in self._grouping.runs_in(first, first + x.shape[1]):
            total += (self._d_gst[run.group] @ x[:, run.start - first : run.stop - first]).square().sum(1)
        return total


class _Modes:
    """w(s) - a r(s) - b."""

    def __init__(self, cmd: CMD, references_mt: F64, steps: I64) -> None:
        self._cmd = cmd
        at = np.searchsorted(cmd.steps_, steps)
        # the last two are those of rows without a mode, whose labels are -1 and -2
        self._r_ms = torch.from_numpy(np.concatenate([references_mt[:, at], np.zeros((2, len(at)))]))
        self._start = 0
        self._rows: tuple[Tensor, Tensor, Tensor] | None = None

    def begin(self, start: int, stop: int) -> None:
        rows = slice(start, stop)
        mode, a, b = (np.asarray(array[rows]) for array in (self._cmd.labels_, self._cmd.a_, self._cmd.b_))
        index = mode.astype(np.int64) % len(self._r_ms)
        self._start = start
        self._rows = torch.from_numpy(index), torch.from_numpy(a), torch.from_numpy(b)

    def squared(self, x: Tensor, x_s: Tensor, live: Tensor, first: int) -> Tensor:
        assert self._rows is not None
        rows = slice(first - self._start, first - self._start + x_s.shape[1])
        index, a, b = (each[rows] for each in self._rows)
        rebuilt = self._r_ms[index].T * a.double() + b.double()
        return torch.where(live, x_s - rebuilt, 0.0).square().sum(1)


def _error_of(fittable: Fittable, traj: Trajectory, steps: I64) -> _Error:
    if isinstance(fittable, Recorded):
        return _None()
    if isinstance(fittable, Baseline):
        return _Filtered(fittable, traj, steps)
    if isinstance(fittable, CMD):
        return _Modes(fittable, fittable.references_.astype(np.float64), steps)
    return _Modes(fittable.forecast, fittable.references_, steps)


class _Tiles:
    """The sums, tile after tile."""

    def __init__(self, errors: Sequence[_Error], parameters: Grouping, at: I64) -> None:
        self._errors = errors
        self._parameters = parameters
        self._at = torch.from_numpy(at)
        self._threads = torch.get_num_threads()
        self.n_rows = 0
        self.squared = np.zeros((len(errors), len(at)))
        self.energy = np.zeros(len(at))

    def add(self, W_tb: Tensor, start: int, stop: int) -> None:
        """The rows [start, stop) of a unit, (T, >= stop - start)."""
        for error in self._errors:
            error.begin(start, stop)
        cuts = [start, *range(start - start % _TILE + _TILE, stop, _TILE), stop]
        found: list[tuple[int, F64] | None] = [None] * (len(cuts) - 1)

        def work(tiles: Iterable[int]) -> None:
            with torch.inference_mode():
                for i in tiles:
                    found[i] = self._judge(W_tb[:, cuts[i] - start : cuts[i + 1] - start], cuts[i])

        ops.run_in_workers(work, range(len(found)), self._threads)
        # in the order of the rows, whoever was ready first
        for each in found:
            assert each is not None
            n_rows, sums = each
            self.n_rows += n_rows
            self.squared += sums[:-1]
            self.energy += sums[-1]

    def _judge(self, W_tb: Tensor, first: int) -> tuple[int, F64]:
        """Rows that count, and (methods + 1, S) sums over them; the last is their energy."""
        n = W_tb.shape[1]
        x = torch.empty(W_tb.shape, dtype=torch.float64).copy_(W_tb)
        # finite rows cannot add up to more than float64 holds; NaN and infinities do not add up to less
        live = torch.zeros(n, dtype=torch.bool)
        for run in self._parameters.runs_in(first, first + n):
            live[run.start - first : run.stop - first] = True
        live &= torch.isfinite(x.sum(0))
        x[:, ~live] = 0.0
        x_s = x[self._at]
        sums = [error.squared(x, x_s, live, first) for error in self._errors]
        return int(live.sum()), torch.stack([*sums, x_s.square().sum(1)]).numpy()


def _slots(
    methods: Sequence[Method], traj: Trajectory, frame: Frame, n_steps: int, limit_bytes: int
) -> list[np.ndarray]:
    """Room for one unit at a time and for those read ahead of it."""
    n_snapshots, stored = len(traj.columns), fmt.storage(traj.dtype).numpy
    threads = torch.get_num_threads()
    kept = 0
    for method in methods:
        if isinstance(method.fittable, Baseline):
            grouping = Grouping.of(traj.parameters, method.fittable.by or "network")
            kept += 8 * grouping.n_groups * n_snapshots * n_steps + grouping.n_bytes
        elif not isinstance(method.fittable, Recorded):
            kept += 18 * frame.rows  # label, slope, offset, and an index made of the label
    working = threads * 8 * _TILE * (2 * n_snapshots + 4 * n_steps)
    plan = plan_pass(
        n_units=1,
        rows=frame.rows,
        n_snapshots=n_snapshots,
        itemsize=stored.itemsize,
        fits=0,
        lanes=1,
        lane_bytes=working + traj.source.fill_bytes(n_snapshots),
        fixed_bytes=kept,
        limit_bytes=limit_bytes,
    )
    n_slots = min(plan.slots, len(frame.live_units))
    return [
        np.empty((n_snapshots, frame.rows + SLOT_PADDING), dtype=stored)[:, : frame.rows]
        for _ in range(n_slots)
    ]
