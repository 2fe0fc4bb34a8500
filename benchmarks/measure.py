"""How it is measured: everybody in turns, medians, beside the ceilings of memory in the same run."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import cmdgpu_kernels as kernels
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.cases import F32, Block, Case, Suite
from benchmarks.ceilings import Ceiling, Work, copy_memory, read_memory
from benchmarks.providers import Answer, NotRun, Prepared, Provider, chosen_name
from benchmarks.rivals import package, using_threads
from cmdgpu.memory import MemoryMeter

CHECKED_ROWS = 2048
MARGIN = 1e-5
"""|corr| of the best reference above the second's; closer than this, rounding may choose."""
SLOPE = 1e-3
"""Largest error of a slope, in units of correlation."""
TOO_SLOW_SECONDS = 60.0


@dataclass(frozen=True)
class Record:
    """One case and provider. Times are None where ``not_run`` says why."""

    case: str
    operation: str
    snapshots: int
    rows: int
    modes: int
    dtype: str
    threads: int
    provider: str
    chosen: bool
    """The product would run this one by itself."""
    machine: str
    commit: str | None
    note: str = ""
    """The settings that were the provider's best."""
    rows_run: int | None = None
    """Rows of a run; fewer than ``rows`` where all of them would take too long or too much memory."""
    median_ms: float | None = None
    spread_ms: float | None = None
    """Slowest run less the fastest."""
    runs: int | None = None
    bytes: int | None = None
    """Bytes that must move for ``rows_run``, as they are stored, never padding."""
    gb_per_s: float | None = None
    ceiling: str | None = None
    ceiling_gb_per_s: float | None = None
    percent_of_ceiling: float | None = None
    peak_bytes: int | None = None
    """Memory beside the matrix in the provider's own layout."""
    labels_differ: int | None = None
    """Checked rows that disagree with float64 beyond the margin, in label or slope."""
    prepare_ms: float | None = None
    """Outside the clock: the matrix into the provider's layout."""
    not_run: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class CeilingRecord:
    """Every way's rate; the fastest is the ceiling."""

    case: str
    name: str
    gb_per_s: float
    ways: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


# ---- one case -------------------------------------------------------------------------------------------


def measure(
    case: Case, block: Block, providers: Sequence[Provider], suite: Suite, machine: Mapping[str, Any]
) -> tuple[list[Record], list[CeilingRecord]]:
    """Every provider on one case, run in turns so that a busy moment hits all alike."""
    threads = case.threads or int(machine["threads"])
    chosen = chosen_name(case)
    about: dict[str, Any] = {
        "case": case.name,
        "operation": case.operation,
        "snapshots": case.snapshots,
        "rows": case.rows,
        "modes": case.modes,
        "dtype": case.dtype,
        "threads": threads,
        "machine": machine["name"],
        "commit": machine["commit"],
    }
    ready: dict[str, _Ready] = {}
    absent: dict[str, str] = {}
    R_mt = case.references()
    with using_threads(threads):
        for provider in providers:
            try:
                ready[provider.name] = _make_ready(provider, case, block, R_mt, threads, suite, chosen)
            except NotRun as reason:
                absent[provider.name] = str(reason)
        ceilings = _ceilings(block, threads)
        times = {name: list[float]() for name in ready}
        rates = {(c.name, way): list[float]() for c in ceilings for way in c.ways}
        for turn in range(suite.runs):
            # who comes after whom changes every round: a run finds in the cache what the last one left
            for name in random.Random(turn).sample(list(ready), len(ready)):
                times[name].append(ready[name].seconds())
            for ceiling in ceilings:
                for way, work in ceiling.ways.items():
                    rates[ceiling.name, way].append(rate_of(work))
    found = [_ceiling_record(case.name, ceiling, rates) for ceiling in ceilings]
    read = found[0]
    records: list[Record] = []
    for provider in providers:
        own: dict[str, Any] = {**about, "provider": provider.name, "chosen": provider.name == chosen}
        if provider.name in absent:
            records.append(Record(**own, not_run=absent[provider.name]))
            continue
        mine = ready[provider.name]
        median = statistics.median(times[provider.name])
        n_bytes = case.bytes(mine.rows)
        rate = n_bytes / median / 1e9
        records.append(
            Record(
                **own,
                note=mine.prepared.note,
                rows_run=mine.rows,
                median_ms=1e3 * median,
                spread_ms=1e3 * (max(times[provider.name]) - min(times[provider.name])),
                runs=suite.runs,
                bytes=n_bytes,
                gb_per_s=rate,
                ceiling=read.name,
                ceiling_gb_per_s=read.gb_per_s,
                percent_of_ceiling=100 * rate / read.gb_per_s,
                peak_bytes=mine.peak_bytes,
                labels_differ=count_wrong(block, mine.answer),
                prepare_ms=mine.prepared.prepare_ms,
            )
        )
    return records, found


@dataclass(frozen=True)
class _Ready:
    """A provider that has run once, on the rows it will be measured with."""

    prepared: Prepared
    rows: int
    peak_bytes: int
    answer: Answer

    def seconds(self) -> float:
        with self.prepared.around():
            return _seconds(lambda: self.prepared.run(self.rows))


def _make_ready(
    provider: Provider, case: Case, block: Block, R_mt: F32, threads: int, suite: Suite, chosen: str
) -> _Ready:
    """Raises NotRun. What a rival fails with is its reason; what ours fails with is an error."""
    try:
        return _warmed_up(provider, case, block, R_mt, threads, suite, chosen)
    except (NotRun, KeyboardInterrupt):
        raise
    except Exception as error:
        if provider.ours:
            raise
        raise NotRun(f"failed: {type(error).__name__}: {error}") from error


def _warmed_up(
    provider: Provider, case: Case, block: Block, R_mt: F32, threads: int, suite: Suite, chosen: str
) -> _Ready:
    if case.threads is not None and not provider.ours:
        package("threadpoolctl")
    prepared = provider.prepare(case, block, R_mt, threads)
    most = min(case.rows, prepared.most_rows or case.rows)
    with prepared.around():
        rows = most
        if provider.name != chosen:  # the product itself always does all of them
            rows = _affordable(prepared.run, most, suite)
        with MemoryMeter() as meter:
            answer = prepared.run(rows)
    return _Ready(prepared, rows, meter.above_start_bytes, answer)


def _affordable(run: Callable[[int], object], most: int, suite: Suite) -> int:
    """Rows of a run that ends in time. Raises NotRun when not even the least number does."""
    least = min(suite.least_rows, most)
    first = _seconds(lambda: run(least))
    if first > TOO_SLOW_SECONDS:
        raise NotRun(f"too slow: {first:.0f} s for {least} of {most} rows")
    expected = _seconds(lambda: run(least)) * most / least
    return most if expected <= suite.rival_seconds else max(least, int(most * suite.rival_seconds / expected))


def count_wrong(block: Block, answer: Answer) -> int:
    """Of some rows: labels that are not the definition's where its margin decides, slopes that are off."""
    n_rows = len(answer.mode)
    checked = np.unique(np.linspace(0, n_rows - 1, min(CHECKED_ROWS, n_rows)).astype(np.int64))
    W_tb = block.W_tb[:, torch.as_tensor(checked)].to(torch.float64).numpy()
    truth = kernels.assign_and_fit_reference(W_tb, answer.references)
    rnorm = kernels.prepare_references(answer.references).rnorm_m
    other: NDArray[np.bool_] = answer.mode[checked] != truth.mode
    off = np.abs(answer.a[checked] - truth.a) * rnorm[truth.mode] > SLOPE * np.sqrt(truth.ss)
    return int(np.count_nonzero(np.where(other, truth.margin > MARGIN, off)))


# ---- ceilings -------------------------------------------------------------------------------------------


def _ceilings(block: Block, threads: int) -> list[Ceiling]:
    """Reading as many bytes as the case does, and copying."""
    flat = block.whole.view(-1)
    values = flat.numpy() if flat.dtype == torch.float32 else flat[: len(flat) // 2].float().numpy()
    return [read_memory(values, threads), copy_memory(values, threads)]


def _ceiling_record(
    case: str, ceiling: Ceiling, rates: Mapping[tuple[str, str], Sequence[float]]
) -> CeilingRecord:
    ways = {way: statistics.median(rates[ceiling.name, way]) for way in ceiling.ways}
    return CeilingRecord(case, ceiling.name, max(ways.values()), ways)


def rate_of(work: Work) -> float:
    """GB/s of one run."""
    started = time.perf_counter()
    n_bytes = work()
    return n_bytes / (time.perf_counter() - started) / 1e9


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started
