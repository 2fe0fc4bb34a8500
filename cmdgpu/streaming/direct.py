"""The pass straight from files: a thread reads and fits a unit a few rows at a time, without slots.

Only on the CPU, from a store on disk that is not compressed, with a compiled kernel. What a file should have
been is told by the store: a unit in which anything is wrong is looked at again, chunk by chunk, until the
store says what.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
import psutil
import torch
from torch import Tensor

from cmdgpu import ops
from cmdgpu.errors import StoreCorrupt
from cmdgpu.notation import I64
from cmdgpu.sources import READS_IN_FLIGHT, Source, StoreSource
from cmdgpu.store import format as fmt
from cmdgpu.store.places import Place
from cmdgpu.store.view import StoreView
from cmdgpu.streaming.passes import AssignAndFit
from cmdgpu.streaming.plan import Plan

_OTHER_FILES: Final = 256
"""Descriptors that are left to the rest of the process."""
_WAITING: Final = 2
"""Units for each of those threads where they wait for the disk: one is fitted while another begins."""


@dataclass(frozen=True)
class Way:
    """How files are read, and how many units at a time; past the cache so many, or it is not done."""

    past_cache: bool
    threads: int


def threads_for(source: Source, n_snapshots: int, n_modes: int, device: torch.device) -> int:
    """Units in flight, or 0 where the pass cannot go straight from files.

    Every one holds the files of all its snapshots open.
    """
    if not isinstance(source, StoreSource) or device.type != "cpu":
        return 0
    if source.view.is_compressed or not source.view.is_local:
        return 0
    if not ops.can_fit_files(source.dtype, n_snapshots, n_modes):
        return 0
    return min(torch.get_num_threads(), _most_units(n_snapshots))


def ways(source: Source, n_snapshots: int, threads: int) -> list[Way]:
    """Best first, where the page cache serves ``threads``.

    The files of a pass that would push its own beginning out of the page cache are read without it, because
    all that work, most of what the system does in a cold pass, would be for nothing. Nobody reads ahead
    then, so it wants more units at a time, or is not done. Files that have to come from the disk want them,
    too: with M = 100 a pass of cold ones took 15 % less with twice as many.
    """
    cached, waiting = Way(past_cache=False, threads=threads), _WAITING * threads
    if waiting > _most_units(n_snapshots):
        return [cached]
    read = source.map.n_rows * n_snapshots * fmt.storage(source.dtype).numpy.itemsize
    if read > _free_bytes() // 2:
        return [Way(past_cache=True, threads=waiting), cached]
    return [Way(past_cache=False, threads=waiting), cached] if _is_cold(source) else [cached]


def _is_cold(source: Source) -> bool:
    """Whether one of a few chunk files, at the ends of the store, has to come from the disk."""
    assert isinstance(source, StoreSource)
    view = source.view
    ends = [(i, t) for i in (0, view.n_chunks - 1) for t in (0, len(view.steps) - 1)]
    return not all(_is_warm(view.chunk_path(*end)) for end in ends)


def _is_warm(file: Place) -> bool:
    """Whether the file's first byte is in memory; True where the system does not tell."""
    if not hasattr(os, "RWF_NOWAIT"):
        return True
    with contextlib.suppress(OSError):
        fd = os.open(str(file), os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT)
        except BlockingIOError:
            return False
        finally:
            os.close(fd)
    return True


def _free_bytes() -> int:
    """What the page cache may grow to."""
    return psutil.virtual_memory().available


def _most_units(n_snapshots: int) -> int:
    return max((_most_files() - _OTHER_FILES) // max(n_snapshots, 1), 0)


def _most_files() -> int:
    """Descriptors this process may have."""
    if sys.platform == "win32":
        return 0
    import resource

    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if most == resource.RLIM_INFINITY else most


def fitted_units(
    source: Source,
    columns: I64,
    works: Sequence[AssignAndFit],
    todo: Mapping[int, Sequence[int]],
    plan: Plan,
) -> Generator[tuple[int, list[tuple[Tensor, ...]], int]]:
    """(unit, outputs of every work that it is to be fitted by, bytes read), in the order of ``todo``.

    Raises StoreCorrupt naming file, tensor and step.
    """
    assert isinstance(source, StoreSource)
    view, times, units, threads = source.view, columns.tolist(), list(todo), plan.threads
    with ThreadPoolExecutor(READS_IN_FLIGHT, thread_name_prefix="cmdgpu-read") as pool:
        for _ in pool.map(view.contact, times):
            pass
    n_bytes = len(times) * view.rows * view.storage.numpy.itemsize

    def fit(at: int) -> list[tuple[Tensor, ...]]:
        coming = units[at + threads] if at + threads < len(units) and not plan.past_cache else None
        asked = [works[k] for k in todo[units[at]]]
        return _fit(view, times, asked, units[at], coming, past_cache=plan.past_cache)

    # Threads inherit how their maker treats subnormals; the kernel's bits must not.
    with ThreadPoolExecutor(
        threads, "cmdgpu-read", initializer=torch.set_flush_denormal, initargs=(False,)
    ) as pool:
        under_way: deque[tuple[int, Future[list[tuple[Tensor, ...]]]]] = deque()
        try:
            for at in range(len(units) + threads):
                if at < len(units):
                    under_way.append((units[at], pool.submit(fit, at)))
                if under_way and (len(under_way) > threads or at >= len(units)):
                    unit, future = under_way.popleft()
                    yield unit, future.result(), n_bytes
        finally:
            for _, future in under_way:
                future.cancel()


def _fit(
    view: StoreView,
    times: list[int],
    works: Sequence[AssignAndFit],
    unit: int,
    coming: int | None,
    *,
    past_cache: bool,
) -> list[tuple[Tensor, ...]]:
    start, stop = works[0].frame.unit(unit)
    for _ in range(2):
        fits = ops.fit_files(
            works[0].dtype,
            [work.references for work in works],
            view.files(unit, times),
            stop - start,
            None if coming is None else view.files(coming, times).names,
            past_cache=past_cache,
        )
        if fits is not None:
            return [(fit.mode, fit.a, fit.b, fit.correlation, fit.ss) for fit in fits]
        chunk = np.empty(view.rows, dtype=view.storage.numpy)
        for t in times:
            view.read_chunk(unit, t, chunk)
    raise StoreCorrupt("its files change while they are read", file=view.path)
