"""A pass that adds up: sums over all rows, added in the order of the rows.

What a thread makes of a few rows is a sum of its own; these are added one after the other as the rows lie,
whoever was ready first. Blocks, threads and memory limits then leave the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, Protocol, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from cmdgpu import ops
from cmdgpu.notation import I64
from cmdgpu.progress import Progress
from cmdgpu.results import Frame
from cmdgpu.sources import Source
from cmdgpu.store import format as fmt
from cmdgpu.streaming.plan import SLOT_PADDING, Plan
from cmdgpu.streaming.reader import BlockReader

AHEAD: Final = 2
"""Tasks per thread that are finished before they are added up."""
_PRODUCT_BYTES: Final = 1 << 20
_MOST_PRODUCTS: Final = 8

Task = TypeVar("Task")
Answer = TypeVar("Answer")


class Sums(Protocol):
    """What the rows are added to."""

    def add(self, W_tb: Tensor, start: int, stop: int) -> None:
        """The rows [start, stop): the first columns of a whole unit (T, rows), in the stored type."""
        ...


def add_all(
    source: Source,
    columns: I64,
    frame: Frame,
    plan: Plan,
    sums: Sequence[Sums],
    progress: Progress,
    what: str,
) -> int:
    """Read every live unit of the frame once and add it to each of ``sums``, in order; answer bytes read."""
    stored = fmt.storage(source.dtype).numpy
    width = plan.units_per_block * plan.rows
    blocks = list(_blocks(frame.live_units, plan.units_per_block))
    shape = (len(columns), width + SLOT_PADDING)
    slots = [np.empty(shape, dtype=stored)[:, :width] for _ in range(min(plan.slots, len(blocks)))]
    unit_bytes, bytes_read = frame.rows * len(columns) * stored.itemsize, 0
    progress.begin(what, unit_bytes * len(frame.live_units))
    try:
        with BlockReader(source, columns, blocks, slots) as reader:
            for block in reader:
                W_tb = ops.as_tensor(block.W_tb, source.dtype)
                for unit in range(block.first, block.stop):
                    at = (unit - block.first) * frame.rows
                    for each in sums:
                        each.add(W_tb[:, at : at + frame.rows], *frame.unit(unit))
                bytes_read += block.n_bytes
                reader.release(block)
                progress.advance(unit_bytes * (block.stop - block.first))
    finally:
        progress.end()
    return bytes_read


def _blocks(units: Iterable[int], longest: int) -> Iterator[tuple[int, int]]:
    """Consecutive units as [first, stop), none longer than a block."""
    first = stop = -1
    for unit in units:
        if unit == stop and stop - first < longest:
            stop += 1
            continue
        if stop > first:
            yield first, stop
        first, stop = unit, unit + 1
    if stop > first:
        yield first, stop


def in_task_order(
    work: Callable[[Task], Answer], tasks: Sequence[Task], threads: int
) -> Iterator[tuple[Task, Answer]]:
    """Every task and what ``work`` makes of it in a thread, in the order of the tasks; a few are held."""
    ahead = threads * AHEAD
    for first in range(0, len(tasks), ahead):
        here = tasks[first : first + ahead]
        answers: list[Answer | None] = [None] * len(here)

        def run(
            places: Iterable[int], here: Sequence[Task] = here, answers: list[Answer | None] = answers
        ) -> None:
            with torch.inference_mode():
                for place in places:
                    answers[place] = work(here[place])

        # in workers even for one thread: the caller's own thread may use several inside a product
        ops.run_in_workers(run, range(len(here)), threads)
        for place, task in enumerate(here):
            answer, answers[place] = answers[place], None
            yield task, cast(Answer, answer)


def products_of_a_task(n_snapshots: int) -> int:
    """T x T products that one task makes: one where they are large, some where handing out costs more."""
    return min(max(_PRODUCT_BYTES // (8 * n_snapshots**2), 1), _MOST_PRODUCTS)
