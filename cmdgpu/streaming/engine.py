"""The loop: plan -> read -> compute -> write -> merge. No step goes back, no byte of W is read twice."""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from cmdgpu.notation import I64
from cmdgpu.progress import Progress
from cmdgpu.results import Frame, ResultWriter, result_bytes, statistics_bytes
from cmdgpu.sources import Source
from cmdgpu.store import format as fmt
from cmdgpu.streaming.device import Pending, make_device
from cmdgpu.streaming.passes import AssignAndFit, workspace_bytes
from cmdgpu.streaming.plan import Plan, plan_pass
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
    return plan_pass(
        n_units=frame.n_units,
        rows=frame.rows,
        n_snapshots=n_snapshots,
        itemsize=fmt.storage(source.dtype).numpy.itemsize,
        fixed_bytes=workspace_bytes(source.dtype, n_snapshots, n_modes, device)
        + source.fill_bytes(n_snapshots)
        + 3 * statistics  # of the unit in hand, as it is taken, written and summed
        + kept,
        limit_bytes=limit_bytes,
    )


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

    A unit is written behind the next one's computation, one at a time; an error of reading or writing
    surfaces here, with every unit ticked off before it kept.
    """
    frame = work.frame
    unit_bytes = frame.rows * len(columns) * fmt.storage(source.dtype).numpy.itemsize
    missing = [unit for unit in range(frame.n_units) if not writer.is_done(unit)]
    blocks = _runs(missing, plan.units_per_block)
    engine = make_device(device)
    width = plan.units_per_block * frame.rows
    slots = [engine.host_slot(len(columns), width, source.dtype) for _ in range(min(plan.slots, len(blocks)))]
    started, bytes_read = time.perf_counter(), 0
    progress.begin("fit", unit_bytes * frame.n_units)
    progress.advance(unit_bytes * (frame.n_units - len(missing)))
    try:
        with _WriteBehind() as behind, BlockReader(source, columns, blocks, slots) as reader:

            def settle(block: Block, pending: Pending) -> None:
                outputs = pending.outputs()
                reader.release(block)
                for unit, output in zip(range(block.first, block.stop), outputs, strict=True):
                    behind.write(writer, unit, work, output)
                    progress.advance(unit_bytes)

            under_way: deque[tuple[Block, Pending]] = deque()
            for block in reader:
                bytes_read += block.n_bytes
                pending = engine.submit(block, frame.rows, source.dtype, work.compute)
                under_way.append((block, pending))
                if len(under_way) > engine.ahead:
                    settle(*under_way.popleft())
            while under_way:
                settle(*under_way.popleft())
    finally:
        progress.end()
    return PassReport(plan, frame.n_units - len(missing), bytes_read, time.perf_counter() - started)


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
    """One unit's statistics and writes at a time, in a thread, while the next unit is computed."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="cmdgpu-write-behind")
        self._writing: Future[None] | None = None

    def write(
        self, writer: ResultWriter, unit: int, work: AssignAndFit, outputs: tuple[torch.Tensor, ...]
    ) -> None:
        self.settle()

        def conclude() -> None:
            writer.write(unit, *work.conclude(unit, outputs))

        self._writing = self._pool.submit(conclude)

    def settle(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def __enter__(self) -> _WriteBehind:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self.settle()
        finally:
            self._pool.shutdown()
