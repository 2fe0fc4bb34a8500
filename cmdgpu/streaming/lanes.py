"""Several generators at a time, each run by a thread of its own: a lane for every device of this process."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


class Shared(Generic[T]):
    """An iterator that several threads take from: every item goes to one of them."""

    def __init__(self, items: Iterable[T]) -> None:
        self._items = iter(items)
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        with self._lock:
            return next(self._items)


@dataclass(frozen=True)
class _Over:
    """A lane has ended, with an error or without."""

    error: BaseException | None


def merged(lanes: Sequence[Generator[T]]) -> Generator[T]:
    """What the lanes yield, in the order in which it comes; the first error ends all of them.

    A lane is run, and closed, by its own thread. One alone is run by the caller's.
    """
    if len(lanes) == 1:
        yield from lanes[0]
        return
    ready: queue.Queue[T | _Over] = queue.Queue(maxsize=len(lanes))
    stopping = threading.Event()

    def run(lane: Generator[T]) -> None:
        error: BaseException | None = None
        try:
            with contextlib.closing(lane):
                for item in lane:
                    if stopping.is_set():
                        break
                    ready.put(item)
        except BaseException as raised:
            error = raised
        ready.put(_Over(error))

    threads = [
        threading.Thread(target=run, args=(lane,), name=f"cmdgpu-lane-{i}", daemon=True)
        for i, lane in enumerate(lanes)
    ]
    running = 0
    try:
        for thread in threads:
            thread.start()
            running += 1
        while running:
            item = ready.get()
            if not isinstance(item, _Over):
                yield item
                continue
            running -= 1
            if item.error is not None:
                raise item.error
    finally:
        stopping.set()
        while running:  # a lane may be waiting for room to put what nobody wants any more
            running -= isinstance(ready.get(), _Over)
        for thread in threads:
            if thread.ident is not None:
                thread.join()
