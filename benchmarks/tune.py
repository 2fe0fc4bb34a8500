"""Time every launch a kernel could have on the GPU that is here: ``python benchmarks/tune.py``.

The tables of ``cmdgpu_kernels.tuning`` are frozen; this measures what stands in them beside the alternatives,
on a resident block of random walks, in turns. Nothing is changed: whoever reads the table decides.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks are no installed package

import cmdgpu_kernels as kernels  # noqa: E402
import torch  # noqa: E402
from cmdgpu_kernels.assignment import triton_impl as assignment  # noqa: E402
from cmdgpu_kernels.gram import triton_impl as gram  # noqa: E402
from cmdgpu_kernels.gram.sums import GRANULE  # noqa: E402
from cmdgpu_kernels.tuning import (  # noqa: E402
    ASSIGN_AND_FIT,
    GRAM,
    GRAM_HOPPER,
    GramLaunch,
    HopperGramLaunch,
    TileLaunch,
    TimeMajorLaunch,
    architecture,
    tiles_of,
)
from torch import Tensor  # noqa: E402

from benchmarks.cases import OUTPUT_ROW_BYTES  # noqa: E402
from benchmarks.gpu import Clock, copies, profiles, walks  # noqa: E402
from benchmarks.machine import machine, results_file  # noqa: E402
from benchmarks.run import write_results  # noqa: E402

Launch = TimeMajorLaunch | TileLaunch | GramLaunch | HopperGramLaunch

SNAPSHOTS = 100
COMPILED_ROWS = 1 << 14
TIMED_ROWS = 10_240_000
"""4 GB of float32, a whole number of programs of every candidate."""
ROUNDS = 7
_BLOCKS = (("float32", "time-major"), ("float32", "row-major"), ("bfloat16", "time-major"))


@dataclass(frozen=True)
class Candidate:
    kernel: str
    """``rows``, ``tiles`` or ``gram``."""
    dtype: str
    layout: str
    modes: int
    launch: Launch

    @property
    def case(self) -> tuple[str, str, int]:
        """What candidates that compete share."""
        return self.dtype, self.layout, self.modes

    @property
    def shipped(self) -> bool:
        here = architecture(torch.cuda.get_device_capability())
        itemsize = getattr(torch, self.dtype).itemsize
        time_major = self.layout == "time-major"
        if isinstance(self.launch, HopperGramLaunch):
            return self.launch == GRAM_HOPPER
        if isinstance(self.launch, GramLaunch):
            # Where the other kernel does not serve.
            return self.launch == GRAM[here] and not time_major
        if isinstance(self.launch, TimeMajorLaunch):
            chosen = ASSIGN_AND_FIT[self.dtype].choose(self.modes)
            return chosen is not None and self.launch == replace(chosen, most=self.modes)
        if time_major and self.modes <= ASSIGN_AND_FIT[self.dtype].most:
            return False
        return self.launch == tiles_of(here, itemsize, time_major=time_major, references=self.modes)[0]

    def prepared(self, W_tb: Tensor) -> Callable[[], object]:
        if isinstance(self.launch, GramLaunch | HopperGramLaunch):
            return self._gram(W_tb, self.launch)
        references = kernels.prepare_references(profiles(self.modes, len(W_tb)))
        rows = slice(0, W_tb.shape[1])
        fit = kernels.RowFit.empty(W_tb.shape[1], W_tb.device, margin=False)
        if isinstance(self.launch, TimeMajorLaunch):
            by_rows = self.launch
            return lambda: assignment.launch_rows(W_tb, references, by_rows, fit, rows)
        by_tiles, sweeps = self.launch, -(-self.modes // self.launch.references)
        return lambda: assignment.launch_tiles(W_tb, references, by_tiles, sweeps, fit, rows)

    def _gram(self, W_tb: Tensor, launch: GramLaunch | HopperGramLaunch) -> Callable[[], object]:
        tile, tiles = GRAM[90].tiles(len(W_tb))
        S_gtt = torch.empty(-(-W_tb.shape[1] // GRANULE), *[tile * tiles] * 2, device=W_tb.device)
        if isinstance(launch, HopperGramLaunch):
            return lambda: gram.multiply_on_hopper(W_tb, launch, S_gtt)
        return lambda: gram.multiply(W_tb, launch, S_gtt)


def candidates(kernel: str) -> Iterator[Candidate]:
    return {"rows": _rows, "tiles": _tiles, "gram": _gram}[kernel]()


def _rows() -> Iterator[Candidate]:
    shapes = ((256, 2), (512, 4), (1024, 8), (256, 4), (512, 8))
    for dtype, modes in product(("float32", "bfloat16"), (1, 2, 5, 8, 10, 16, 24, 32)):
        for (rows, warps), ring in product(shapes, (3, 4, 6, 8)):
            yield Candidate("rows", dtype, "time-major", modes, TimeMajorLaunch(modes, rows, warps, ring))


def _tiles() -> Iterator[Candidate]:
    for (dtype, layout), modes in product(_BLOCKS, (16, 30, 64, 100, 1000)):
        sizes = [references for references in (16, 32, 64, 128) if references < 2 * modes]
        for references, (rows, warps), stages in product(sizes, ((64, 4), (128, 4), (128, 8)), (1, 2)):
            yield Candidate("tiles", dtype, layout, modes, TileLaunch(references, rows, warps, stages))


def _gram() -> Iterator[Candidate]:
    for (dtype, layout), rows, warps, stages in product(_BLOCKS, (32, 64, 128), (4, 8), range(1, 7)):
        if warps == 4 and stages > 3:
            continue
        yield Candidate("gram", dtype, layout, 0, GramLaunch(rows, warps, stages, GRAM[90].many))
    for dtype, warps, stages in product(("float32", "bfloat16"), (4, 8, 16), (2, 3, 4)):
        yield Candidate("gram", dtype, "time-major", 0, HopperGramLaunch(GRAM[90].block_rows, warps, stages))


# ---- compile, then time ---------------------------------------------------------------------------------


def why_not(candidate: Candidate) -> str | None:
    """Compile and run once, into the cache on disk; what keeps it from being launched."""
    W_tb = block(candidate.dtype, candidate.layout, COMPILED_ROWS)
    try:
        candidate.prepared(W_tb)()
        torch.cuda.synchronize()
    except Exception as error:  # a candidate that asks for too much is no fault: it is reported
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    return None


def block(dtype: str, layout: str, rows: int) -> Tensor:
    W_tb = walks(rows, SNAPSHOTS, dtype, torch.device("cuda"))
    return W_tb if layout == "time-major" else W_tb.T.contiguous().T


def timed(candidates: Sequence[Candidate], W_tb: Tensor, clock: Clock) -> list[list[float]]:
    works = [candidate.prepared(W_tb) for candidate in candidates]
    for work in works:
        work()
    seconds: list[list[float]] = [[] for _ in works]
    for _ in range(ROUNDS):
        for mine, work in zip(seconds, works, strict=True):
            mine.append(clock.on_device(work))
    return seconds


def ceilings(W_tb: Tensor, clock: Clock) -> dict[str, float]:
    found: dict[str, float] = {}
    for one in copies(W_tb, clock):
        one.seconds()
        rate = one.bytes / statistics.median(one.seconds() for _ in range(ROUNDS)) / 1e9
        found[one.case] = max(rate, found.get(one.case, 0.0))
    return found


def measured(wanted: Sequence[str], workers: int) -> Iterator[dict[str, Any]]:
    """A record per candidate, the fastest of each case first."""
    every = [candidate for kernel in wanted for candidate in candidates(kernel)]
    started = time.perf_counter()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        refused = dict(zip(every, pool.map(why_not, every, chunksize=4), strict=True))
    print(f"{len(every)} candidates compiled in {time.perf_counter() - started:.0f} s", flush=True)
    clock = Clock(torch.device("cuda"))
    limits: dict[str, dict[str, float]] = {}
    for dtype, layout in dict.fromkeys((candidate.dtype, candidate.layout) for candidate in every):
        W_tb = block(dtype, layout, TIMED_ROWS)
        if dtype not in limits:
            limits[dtype] = ceilings(W_tb, clock)
        here = [c for c in every if (c.dtype, c.layout) == (dtype, layout)]
        running = [c for c in here if refused[c] is None]
        rates: dict[Candidate, float] = {}
        for mine, candidate in zip(timed(running, W_tb, clock), running, strict=True):
            outputs = 0 if candidate.kernel == "gram" else OUTPUT_ROW_BYTES
            n_bytes = TIMED_ROWS * (SNAPSHOTS * W_tb.element_size() + outputs)
            rates[candidate] = n_bytes / statistics.median(mine) / 1e9
        for candidate in sorted(here, key=lambda c: (c.case, -rates.get(c, 0.0))):
            yield {
                "kernel": candidate.kernel,
                "dtype": dtype,
                "layout": layout,
                "modes": candidate.modes,
                "launch": asdict(candidate.launch),
                "shipped": candidate.shipped,
                "gb_per_s": rates.get(candidate),
                "not_run": refused[candidate],
                "ceilings": limits[dtype],
            }
        del W_tb


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kernels", nargs="*", default=["rows", "tiles", "gram"])
    parser.add_argument("--out", type=Path, help="by default results/<machine>/tune.json")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: there is nothing to tune")
    found = machine(torch.device("cuda", 0))
    records = [
        {**record, "commit": found["commit"]} for record in measured(options.kernels, os.cpu_count() or 1)
    ]
    seen: dict[tuple[Any, ...], int] = {}
    for record in records:
        case = record["dtype"], record["layout"], record["modes"]
        place = seen[case] = seen.get(case, 0) + 1
        if record["gb_per_s"] and (place <= 3 or record["shipped"]):
            mark, launch = "*" if record["shipped"] else " ", json.dumps(record["launch"])
            print(f"{mark} {case} {record['gb_per_s']:7.0f} GB/s {record['kernel']} {launch}")
    write_results(options.out or results_file("tune", found), found, records=records)


if __name__ == "__main__":
    main()
