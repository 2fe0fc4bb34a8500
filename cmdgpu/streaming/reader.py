"""Read-ahead: a thread fills host slots, several reads in flight, while the one before is computed on."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from cmdgpu.notation import I64, AnyArray
from cmdgpu.sources import Source


@dataclass(frozen=True)
class Block:
    """A run of whole units in a host slot, time-major."""

    first: int
    stop: int
    """Units [first, stop)."""
    W_tb: AnyArray
    """(T, (stop - first) * rows) stored elements, a view of the slot."""
    slot: int
    n_bytes: int
    """Bytes read to fill it."""


class BlockReader:
    """Context manager and iterator over blocks; hand every block back with ``release``."""

    def __init__(
        self, source: Source, columns: I64, blocks: Iterable[tuple[int, int]], slots: Sequence[AnyArray]
    ) -> None:
        self._source = source
        self._columns = columns
        self._blocks = blocks
        self._slots = slots
        self._free: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[Block | BaseException | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cmdgpu-reader", daemon=True)

    def __enter__(self) -> BlockReader:
        for slot in range(len(self._slots)):
            self._free.put(slot)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopping.set()
        self._free.put(None)
        self._thread.join()

    def __iter__(self) -> Iterator[Block]:
        while (item := self._ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def release(self, block: Block) -> None:
        """The slot of this block may be overwritten."""
        self._free.put(block.slot)

    def _run(self) -> None:
        blocks = iter(self._blocks)
        try:
            with ThreadPoolExecutor(self._source.reads_in_flight, thread_name_prefix="cmdgpu-read") as pool:
                while (slot := self._free.get()) is not None and not self._stopping.is_set():
                    # a block is taken when there is room for it: other devices may be at the same ones
                    if (block := next(blocks, None)) is None:
                        break
                    first, stop = block
                    width = (stop - first) * self._source.rows
                    W_tb = self._slots[slot][:, :width]
                    n_bytes = self._fill(pool, first, stop, W_tb)
                    self._ready.put(Block(first, stop, W_tb, slot, n_bytes))
            self._ready.put(None)
        except BaseException as error:
            self._ready.put(error)

    def _fill(self, pool: ThreadPoolExecutor, first: int, stop: int, W_tb: AnyArray) -> int:
        """Run the source's tasks with a bounded number of futures alive."""
        n_bytes = 0
        waiting: deque[Future[int]] = deque()
        try:
            for task in self._source.fill_tasks(first, stop, self._columns, W_tb):
                if self._stopping.is_set():
                    break
                waiting.append(pool.submit(task))
                if len(waiting) > 4 * self._source.reads_in_flight:
                    n_bytes += waiting.popleft().result()
            while waiting:
                n_bytes += waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
        return n_bytes
