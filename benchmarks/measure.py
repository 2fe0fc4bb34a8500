"""How it is measured: providers interleaved, medians, beside the read rate of memory in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.cases import Case
from benchmarks.providers import PROVIDERS, Labels


@dataclass(frozen=True)
class Record:
    case: str
    provider: str
    median_ms: float
    spread_ms: float
    """Slowest run less the fastest."""
    bytes: int
    """Bytes that must move, never padding."""
    gb_per_s: float
    ceiling_gb_per_s: float
    """Reading memory with a sum, same run, same threads."""
    percent_of_ceiling: float
    labels_differ: int
    """Rows whose label is not the first provider's: near-ties only."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def read_rate(n_bytes: int, runs: int) -> float:
    """GB/s of summing a float32 array that does not fit the caches."""
    values = torch.ones(max(n_bytes // 4, 1), dtype=torch.float32)
    return values.numel() * 4 / statistics.median(_seconds(values.sum) for _ in range(runs)) / 1e9


def measure(case: Case, runs: int) -> list[Record]:
    """Every provider on one case, run in turns so that a busy moment hits all alike."""
    W_tb, R_mt = case.make()
    prepared = {provider.name: provider.prepare(W_tb, R_mt) for provider in PROVIDERS}
    labels: dict[str, Labels] = {name: run() for name, run in prepared.items()}
    times: dict[str, list[float]] = {name: [] for name in prepared}
    for _ in range(runs):
        for name, run in prepared.items():
            times[name].append(_seconds(run))
    ceiling = read_rate(case.bytes, runs)
    first = labels[PROVIDERS[0].name]
    return [_record(case, name, times[name], ceiling, labels[name], first) for name in prepared]


def _record(
    case: Case, name: str, times: Sequence[float], ceiling: float, labels: Labels, first: Labels
) -> Record:
    median = statistics.median(times)
    rate = case.bytes / median / 1e9
    return Record(
        case=case.name,
        provider=name,
        median_ms=1e3 * median,
        spread_ms=1e3 * (max(times) - min(times)),
        bytes=case.bytes,
        gb_per_s=rate,
        ceiling_gb_per_s=ceiling,
        percent_of_ceiling=100 * rate / ceiling,
        labels_differ=int(np.count_nonzero(labels != first)),
    )
