"""Threads that compute with one BLAS thread each, beside whatever the caller's threads do.

A matrix product may be summed in another order for another number of threads; one thread per tile gives the
same bits on any machine of a kind. ``torch.set_num_threads`` acts on the calling thread *and* on the number
that threads born later start from, so the latter is put back as soon as ours are up.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

__all__ = ["run_in_workers"]

Task = TypeVar("Task")
Result = TypeVar("Result")

_lock = threading.Lock()
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
"""One pool per (process, number of threads): threads do not survive a fork."""


def run_in_workers(work: Callable[[Iterable[Task]], None], tasks: Sequence[Task], threads: int) -> None:
    """Call ``work`` in up to ``threads`` workers, each given one shared iterator over ``tasks``.

    Returns when all are done; an exception is raised when every worker has stopped.
    """
    queue = _Shared(tasks)
    futures = [_pool(threads).submit(work, queue) for _ in range(min(threads, len(tasks)))]
    try:
        wait(futures)
    finally:
        # An interrupt must not leave workers writing into buffers that the caller thinks are his again.
        queue.stop()
        wait(futures)
    for future in futures:
        future.result()


class _Shared(Iterable[Task]):
    """An iterator that several threads may draw from."""

    def __init__(self, tasks: Iterable[Task]) -> None:
        self._tasks = iter(tasks)
        self._lock = threading.Lock()

    def __iter__(self) -> _Shared[Task]:
        return self

    def __next__(self) -> Task:
        with self._lock:
            return next(self._tasks)

    def stop(self) -> None:
        with self._lock:
            self._tasks = iter(())


def _pool(threads: int) -> ThreadPoolExecutor:
    key = (os.getpid(), threads)
    with _lock:
        if key not in _pools:
            _pools[key] = _started(threads)
        return _pools[key]


def _started(threads: int) -> ThreadPoolExecutor:
    """A pool whose threads are all up: one that started later would change the global number again."""
    inherited = _in_new_thread(torch.get_num_threads)
    try:
        pool = ThreadPoolExecutor(threads, thread_name_prefix="cmdgpu-kernel", initializer=_alone)
        together = threading.Barrier(threads)
        wait([pool.submit(together.wait) for _ in range(threads)])
    finally:
        # In a thread of its own: here it would also change the caller's number.
        _in_new_thread(lambda: torch.set_num_threads(inherited))
    return pool


def _alone() -> None:
    # Asked first: torch otherwise takes the global number at this thread's first operation, and forgets ours.
    torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)


def _in_new_thread(function: Callable[[], Result]) -> Result:
    with ThreadPoolExecutor(1) as short_lived:
        return short_lived.submit(function).result()
