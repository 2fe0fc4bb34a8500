"""The loop: plan -> read -> compute -> write -> merge. No step goes back, no byte of W is read twice.

Several fits may share a pass: a unit that some of them lack is read once and computed for each.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import torch
from torch import Tensor

from cmdgpu import ops
from cmdgpu.errors import MemoryLimitError
from cmdgpu.notation import I64
from cmdgpu.progress import Progress
from cmdgpu.results import Frame, ResultWriter, result_bytes, statistics_bytes
from cmdgpu.sources import Source
from cmdgpu.statistics import totals_bytes
from cmdgpu.store import format as fmt
from cmdgpu.streaming.device import Pending, blocks_under_way, make_device
from cmdgpu.streaming.direct import fitted_units, threads_for, ways
from cmdgpu.streaming.lanes import Shared, merged
from cmdgpu.streaming.passes import AssignAndFit, workspace_bytes
from cmdgpu.streaming.plan import WRITES_IN_FLIGHT, Plan, plan_direct, plan_pass
from cmdgpu.streaming.reader import Block, BlockReader

_TENSOR_BYTES: Final = 4 << 10
"""Of a tensor: its entry in the maps of store and result, their text while it is read and written."""

Computed: TypeAlias = tuple[int, list[tuple[Tensor, ...]], int]
"""A unit, the outputs of every fit that lacked it, and the bytes that were read."""


@dataclass(frozen=True)
class Fit:
    """One of the fits that share a pass."""

    work: AssignAndFit
    writer: ResultWriter


@dataclass(frozen=True)
class PassReport:
    """What a pass did and what it took."""

    plan: Plan
    units_resumed: tuple[int, ...]
    """Of every fit: units that were done already."""
    bytes_read: int
    seconds: float


def plan_for(
    source: Source,
    frames: Sequence[Frame],
    modes: Sequence[int],
    devices: Sequence[torch.device],
    limit_bytes: int,
    *,
    in_memory: bool,
) -> Plan:
    """The plan of a pass, made before anything is read: fits of these frames, of at most these modes each.

    ``in_memory``: their results are kept, too. Every device has a share of what is left. Raises
    MemoryLimitError.
    """
    frame, fits, most = frames[0], len(frames), max(modes)
    n_snapshots = len(frame.steps)
    asked = list(zip(frames, modes, strict=True))
    statistics = np.concatenate([statistics_bytes(each, m) for each, m in asked])
    kept = sum(totals_bytes(each.map, m) for each, m in asked)
    kept += _TENSOR_BYTES * max(len(each.map) for each in frames)
    if in_memory:
        kept += sum(result_bytes(each.n_rows, m, n_snapshots) for each, m in asked) + int(statistics.sum())
    # of the largest units, should they be taken, written and summed at the same time
    written = int(np.sort(statistics)[-(WRITES_IN_FLIGHT + 2) :].sum())
    itemsize = fmt.storage(source.dtype).numpy.itemsize
    refused: MemoryLimitError | None = None
    threads = min(threads_for(source, n_snapshots, m, devices[0]) for m in modes) if len(devices) == 1 else 0
    for way in ways(source, n_snapshots, threads) if threads else ():
        try:
            return plan_direct(
                n_units=frame.n_units,
                rows=frame.rows,
                itemsize=itemsize,
                threads=way.threads,
                past_cache=way.past_cache,
                fits=fits,
                fixed_bytes=written + kept,
                thread_bytes=ops.files_workspace_bytes(
                    source.dtype, n_snapshots, modes, 1, past_cache=way.past_cache
                ),
                limit_bytes=limit_bytes,
            )
        except MemoryLimitError as error:
            refused = error  # with few snapshots slots are smaller
    workspace = max(workspace_bytes(source.dtype, n_snapshots, most, device) for device in devices)
    try:
        return plan_pass(
            n_units=frame.n_units,
            rows=frame.rows,
            n_snapshots=n_snapshots,
            itemsize=itemsize,
            fits=fits * max(map(blocks_under_way, devices)),  # each leaves outputs of every block
            lanes=len(devices),
            lane_bytes=workspace + source.fill_bytes(n_snapshots),
            fixed_bytes=written + kept,
            limit_bytes=limit_bytes,
        )
    except MemoryLimitError as error:
        if refused is None or error.needed_bytes < refused.needed_bytes:
            raise
        raise refused from error


def run_pass(
    source: Source,
    columns: I64,
    fits: Sequence[Fit],
    plan: Plan,
    devices: Sequence[torch.device],
    progress: Progress,
    units: Sequence[int] | None = None,
) -> PassReport:
    """Every unit that a fit lacks: read once, computed for each, written, ticked off.

    ``units`` are those to look at, all by default. They are written behind the next ones' computation, a few
    at a time; an error of reading or writing surfaces here, with every unit ticked off before it kept.
    """
    frame = fits[0].work.frame
    unit_bytes = frame.rows * len(columns) * fmt.storage(source.dtype).numpy.itemsize
    asked = [_asked(fit, units) for fit in fits]
    todo, resumed = _todo(fits, asked)
    n_units = len(set[int]().union(*asked))
    started, bytes_read = time.perf_counter(), 0
    progress.begin("fit", unit_bytes * n_units)
    progress.advance(unit_bytes * (n_units - len(todo)))
    works = [fit.work for fit in fits]
    if plan.threads:
        computed = fitted_units(source, columns, works, todo, plan)
    else:
        blocks = Shared(_runs(list(todo), plan.units_per_block))
        busy = devices[: len(todo)]  # none where every unit is done already
        computed = merged(
            [_through_slots(source, columns, works, todo, blocks, plan, device) for device in busy]
        )
    try:
        with _WriteBehind() as behind, contextlib.closing(computed):
            for unit, outputs, n_bytes in computed:
                bytes_read += n_bytes
                for at, output in zip(todo[unit], outputs, strict=True):
                    behind.write(fits[at], unit, output)
                progress.advance(unit_bytes)
    finally:
        progress.end()
    return PassReport(plan, resumed, bytes_read, time.perf_counter() - started)


def _through_slots(
    source: Source,
    columns: I64,
    works: Sequence[AssignAndFit],
    todo: Mapping[int, Sequence[int]],
    blocks: Shared[tuple[int, int]],
    plan: Plan,
    device: torch.device,
) -> Generator[Computed]:
    """The units of the blocks this device takes: read into host slots while others are computed."""
    width = plan.units_per_block * plan.rows

    def compute(unit: int, W_tb: Tensor) -> list[tuple[Tensor, ...]]:
        return [works[at].compute(W_tb) for at in todo[unit]]

    with make_device(device) as engine:
        count = min(plan.slots, -(-len(todo) // plan.units_per_block))
        slots = [engine.host_slot(len(columns), width, source.dtype) for _ in range(count)]
        with BlockReader(source, columns, blocks, slots) as reader:

            def settle(block: Block, pending: Pending) -> Iterator[Computed]:
                outputs = pending.outputs()
                reader.release(block)
                for unit, output in zip(range(block.first, block.stop), outputs, strict=True):
                    yield unit, output, block.n_bytes if unit == block.first else 0

            under_way: deque[tuple[Block, Pending]] = deque()
            for block in reader:
                under_way.append((block, engine.submit(block, plan.rows, source.dtype, compute)))
                if len(under_way) > engine.ahead:
                    yield from settle(*under_way.popleft())
            while under_way:
                yield from settle(*under_way.popleft())


def _asked(fit: Fit, units: Sequence[int] | None) -> Sequence[int]:
    """The units of a fit among those to look at."""
    live = fit.work.frame.live_units
    return live if units is None else sorted(set(units).intersection(live))


def _todo(
    fits: Sequence[Fit], asked: Sequence[Sequence[int]]
) -> tuple[dict[int, list[int]], tuple[int, ...]]:
    """Which fits lack a unit that is asked of them, by unit, in the order in which they are taken; and how
    many of its units each has already.
    """
    todo: dict[int, list[int]] = {}
    resumed: list[int] = []
    for at, (fit, units) in enumerate(zip(fits, asked, strict=True)):
        missing = _missing(fit.writer, units)
        resumed.append(len(units) - len(missing))
        for unit in missing:
            todo.setdefault(unit, []).append(at)
    return (dict(sorted(todo.items())) if len(fits) > 1 else todo), tuple(resumed)


def _missing(writer: ResultWriter, units: Sequence[int]) -> list[int]:
    """Units that are not done, in the order in which they are taken."""
    return [unit for unit in units if not writer.is_done(unit)]


def _runs(units: list[int], longest: int) -> list[tuple[int, int]]:
    """Consecutive units as [first, stop), none longer than a block."""
    runs: list[tuple[int, int]] = []
    for unit in units:
        if runs and runs[-1][1] == unit and unit - runs[-1][0] < longest:
            runs[-1] = (runs[-1][0], unit + 1)
        else:
            runs.append((unit, unit + 1))
    return runs


class _WriteBehind:
    """Statistics and writes of a few units at a time, in threads, while the next units are computed.

    A write waits for the disk to acknowledge it; several waits at once cost little more than one.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(WRITES_IN_FLIGHT, thread_name_prefix="cmdgpu-write-behind")
        self._writing: deque[Future[None]] = deque()

    def write(self, fit: Fit, unit: int, outputs: tuple[Tensor, ...]) -> None:
        while len(self._writing) >= WRITES_IN_FLIGHT:
            self._writing.popleft().result()

        def conclude() -> None:
            fit.writer.write(unit, *fit.work.conclude(unit, outputs))

        self._writing.append(self._pool.submit(conclude))

    def __enter__(self) -> _WriteBehind:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            while kind is None and self._writing:
                self._writing.popleft().result()
        finally:
            self._pool.shutdown()
