"""The loop: plan -> read -> compute -> write -> merge. No step goes back, no byte of W is read twice."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from cmdgpu import ops
from cmdgpu.errors import MemoryLimitError
from cmdgpu.notation import I64
from cmdgpu.progress import Progress
from cmdgpu.results import Frame, ResultWriter, result_bytes, statistics_bytes
from cmdgpu.sources import Source
from cmdgpu.store import format as fmt
from cmdgpu.streaming.device import Pending, make_device
from cmdgpu.streaming.direct import fitted_units, threads_for
from cmdgpu.streaming.passes import AssignAndFit, workspace_bytes
from cmdgpu.streaming.plan import WRITES_IN_FLIGHT, Plan, plan_direct, plan_pass
from cmdgpu.streaming.reader import Block, BlockReader


@dataclass(frozen=True)
class PassReport:
    """What a pass did and what it took."""

    plan: Plan
    units_resumed: int
    bytes_read: int
    seconds: float

    @property
    def bytes_per_s(self) -> float:
        return self.bytes_read / self.seconds if self.seconds > 0 else 0.0


def plan_for(
    source: Source, frame: Frame, n_modes: int, device: torch.device, limit_bytes: int, *, in_memory: bool
) -> Plan:
    """The plan of a pass against at most ``n_modes`` references, made before anything is read.

    ``in_memory``: its results are kept, too. Raises MemoryLimitError.
    """
    n_snapshots = len(frame.steps)
    statistics = statistics_bytes(frame, n_modes)
    kept = result_bytes(frame.n_rows, n_modes, n_snapshots) + frame.n_units * statistics if in_memory else 0
    written = (WRITES_IN_FLIGHT + 2) * statistics  # of units as they are taken, written and summed
    itemsize = fmt.storage(source.dtype).numpy.itemsize
    refused: MemoryLimitError | None = None
    if threads := threads_for(source, n_snapshots, n_modes, device):
        try:
            return plan_direct(
                n_units=frame.n_units,
                rows=frame.rows,
                itemsize=itemsize,
                threads=threads,
                fixed_bytes=written + kept,
                thread_bytes=ops.files_workspace_bytes(source.dtype, n_snapshots, n_modes, 1),
                limit_bytes=limit_bytes,
            )
        except MemoryLimitError as error:
            refused = error  # with few snapshots slots are smaller
    workspace = workspace_bytes(source.dtype, n_snapshots, n_modes, device)
    try:
        return plan_pass(
            n_units=frame.n_units,
            rows=frame.rows,
            n_snapshots=n_snapshots,
            itemsize=itemsize,
            fixed_bytes=workspace + source.fill_bytes(n_snapshots) + written + kept,
            limit_bytes=limit_bytes,
        )
    except MemoryLimitError as error:
        if refused is None or error.needed_bytes < refused.needed_bytes:
            raise
        raise refused from error


def run_pass(
    source: Source,
    columns: I64,
    work: AssignAndFit,
    writer: ResultWriter,
    plan: Plan,
    device: torch.device,
    progress: Progress,
) -> PassReport:
    """Every unit that is not done yet: read, computed, written, ticked off.

    Units are written behind the next ones' computation, a few at a time; an error of reading or writing
    surfaces here, with every unit ticked off before it kept.
    """
    frame = work.frame
    unit_bytes = frame.rows * len(columns) * fmt.storage(source.dtype).numpy.itemsize
    missing = _missing(writer, frame.n_units)
    started, bytes_read = time.perf_counter(), 0
    progress.begin("fit", unit_bytes * frame.n_units)
    progress.advance(unit_bytes * (frame.n_units - len(missing)))
    if plan.threads:
        units = fitted_units(source, columns, work, missing, plan.threads)
    else:
        units = _through_slots(source, columns, work, missing, plan, device)
    try:
        with _WriteBehind() as behind, contextlib.closing(units):
            for unit, output, n_bytes in units:
                bytes_read += n_bytes
                behind.write(writer, unit, work, output)
                progress.advance(unit_bytes)
    finally:
        progress.end()
    return PassReport(plan, frame.n_units - len(missing), bytes_read, time.perf_counter() - started)


def _through_slots(
    source: Source, columns: I64, work: AssignAndFit, missing: list[int], plan: Plan, device: torch.device
) -> Generator[tuple[int, tuple[Tensor, ...], int]]:
    """(unit, its outputs, bytes read) in order: blocks are read into host slots while others are computed."""
    blocks = _runs(missing, plan.units_per_block)
    width = plan.units_per_block * plan.rows
    with make_device(device) as engine:
        count = min(plan.slots, len(blocks))
        slots = [engine.host_slot(len(columns), width, source.dtype) for _ in range(count)]
        with BlockReader(source, columns, blocks, slots) as reader:

            def settle(block: Block, pending: Pending) -> Iterator[tuple[int, tuple[Tensor, ...], int]]:
                outputs = pending.outputs()
                reader.release(block)
                for unit, output in zip(range(block.first, block.stop), outputs, strict=True):
                    yield unit, output, block.n_bytes if unit == block.first else 0

            under_way: deque[tuple[Block, Pending]] = deque()
            for block in reader:
                under_way.append((block, engine.submit(block, plan.rows, source.dtype, work.compute)))
                if len(under_way) > engine.ahead:
                    yield from settle(*under_way.popleft())
            while under_way:
                yield from settle(*under_way.popleft())


def _missing(writer: ResultWriter, n_units: int) -> list[int]:
    """Units that are not done, in the order in which they are taken."""
    return [unit for unit in range(n_units) if not writer.is_done(unit)]


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

    def write(self, writer: ResultWriter, unit: int, work: AssignAndFit, outputs: tuple[Tensor, ...]) -> None:
        while len(self._writing) >= WRITES_IN_FLIGHT:
            self._writing.popleft().result()

        def conclude() -> None:
            writer.write(unit, *work.conclude(unit, outputs))

        self._writing.append(self._pool.submit(conclude))

    def __enter__(self) -> _WriteBehind:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            while kind is None and self._writing:
                self._writing.popleft().result()
        finally:
            self._pool.shutdown()
