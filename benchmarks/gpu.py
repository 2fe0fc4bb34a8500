"""Correctness, then speed, on a CUDA device, in one command: ``python benchmarks/gpu.py``.

Every operation is held against float64 first, in one process per core, as most of that time is compiling;
anything wrong ends the run with exit code 1 before a speed is measured. Without a CUDA device it says so and
exits with 2.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeAlias

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks are no installed package

import cmdgpu_kernels as kernels  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from cmdgpu_kernels import gram  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.cases import F32, OUTPUT_ROW_BYTES, PADDING  # noqa: E402
from benchmarks.machine import machine, results_file  # noqa: E402
from benchmarks.run import write_results  # noqa: E402
from cmdgpu.streaming.device import Device, make_device  # noqa: E402
from cmdgpu.streaming.reader import Block  # noqa: E402

Work: TypeAlias = Callable[[], object]

MARGIN = 1e-5
GPU_ALLOWANCE = 3e-6
"""Tensor cores truncate where the tolerances of the implementations were emulated with rounding."""
_COPY_BYTES = 1 << 32
_RIVAL_BYTES = 24 << 30
_CUT = 16_384
"""Where a block may be cut in two without another bit, by every implementation's word."""


@dataclass(frozen=True)
class Sizes:
    correct_snapshots: tuple[int, ...]
    correct_rows: int
    correct_modes: tuple[int, ...]
    snapshots: int
    rows: int
    modes: tuple[int, ...]
    block_rows: int
    """Of a streamed block."""
    blocks: int
    runs: int


LARGE = Sizes((3, 20, 100, 300), 20_001, (1, 2, 8, 16, 32, 40, 64, 100, 1000), 100, 40_000_000,
             (1, 2, 5, 8, 10, 16, 32, 64, 100, 1000), 1 << 18, 64, 7)  # fmt: skip
"""16 GB of float32, far beyond the L2 cache; a streamed block is 105 MB."""
TINY = Sizes((3, 20), 300, (1, 3), 20, 512, (1, 3), 256, 3, 2)


@dataclass(frozen=True)
class Record:
    case: str
    provider: str
    chosen: bool
    machine: str
    commit: str | None
    median_ms: float
    spread_ms: float
    runs: int
    bytes: int
    gb_per_s: float
    ceiling: str | None = None
    ceiling_gb_per_s: float | None = None
    percent_of_ceiling: float | None = None
    percent_of_copy: float | None = None
    """Copying counts its writes, and the pass hardly writes: reading is the ceiling, this is beside it."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


# ---- clocks ---------------------------------------------------------------------------------------------


class Clock:
    """Seconds of a piece of work on one device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._backlog = torch.empty(1 << 26 if self._cuda else 1, device=device)

    def on_device(self, work: Work) -> float:
        """Between events, behind a backlog: launches are over before the work begins."""
        if not self._cuda:
            return self.wall(work)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._backlog.fill_(1.0)
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def wall(self, work: Work) -> float:
        self.wait()
        started = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - started

    def wait(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


# ---- data -----------------------------------------------------------------------------------------------


def walks(rows: int, snapshots: int, dtype: str, device: torch.device, padding: int = PADDING) -> Tensor:
    """(T, rows) random walks, a multiple of 16 elements and ``padding`` more apart."""
    generator = torch.Generator(device).manual_seed(0)
    width = -(-rows // 16) * 16 + padding
    W_tb = torch.empty((snapshots, width), dtype=getattr(torch, dtype), device=device)
    column = torch.zeros(width, device=device)
    for t in range(snapshots):
        column += torch.randn(width, generator=generator, device=device)
        W_tb[t] = column
    return W_tb[:, :rows]


def profiles(modes: int, snapshots: int) -> F32:
    generator = torch.Generator().manual_seed(1)
    return torch.randn((modes, snapshots), generator=generator).cumsum_(dim=1).numpy()


def accepting(dtype: str, snapshots: int, modes: int, device: torch.device) -> tuple[list[Any], str]:
    """Every implementation that serves the problem, and the name of the one that the product would run."""
    problem = kernels.Problem(dtype=dtype, snapshots=snapshots, modes=modes, device=device.type)
    found = [candidate for candidate in kernels.IMPLEMENTATIONS if not candidate.refusals(problem)]
    return found, kernels.choose(problem)[0].name


def gram_accepting(dtype: str, snapshots: int, device: torch.device) -> tuple[list[Any], str]:
    """The same of the Gram matrix."""
    problem = kernels.Problem(dtype=dtype, snapshots=snapshots, modes=0, device=device.type)
    found = [candidate for candidate in gram.IMPLEMENTATIONS if not candidate.refusals(problem)]
    return found, found[0].name


# ---- correctness ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checked:
    """A block whose answers are held against float64."""

    dtype: str
    snapshots: int
    layout: str
    """``time-major``, ``row-major``, or ``ragged``: snapshots an odd number of elements apart."""


def blocks_of(sizes: Sizes) -> list[Checked]:
    """The longest first: they run side by side."""
    return [
        Checked(dtype, T, layout)
        for T in sorted(sizes.correct_snapshots, reverse=True)
        for dtype in ("float32", "bfloat16", "float16")
        for layout in ("time-major", "row-major", *(["ragged"] if dtype == "float32" else []))
    ]


def faults(device: torch.device, sizes: Sizes) -> Iterator[str]:
    """What is wrong, in words; nothing when everything is right."""
    blocks = blocks_of(sizes)
    if device.type == "cpu":
        for block in blocks:
            yield from faults_of(block, device, sizes)
        return
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read by the children
    with ProcessPoolExecutor(
        os.cpu_count(), get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        for found in pool.map(faults_of, blocks, [device] * len(blocks), [sizes] * len(blocks)):
            yield from found


def faults_of(block: Checked, device: torch.device, sizes: Sizes) -> list[str]:
    T = block.snapshots
    W_tb = walks(sizes.correct_rows, T, block.dtype, device, 1 if block.layout == "ragged" else PADDING)
    W_tb[T // 2, 0], W_tb[0, 1], W_tb[:, 2] = torch.nan, torch.inf, 0.1
    if block.layout == "row-major":
        W_tb = W_tb.T.contiguous().T
    found = list(_gram_faults(W_tb, block))
    for modes in sizes.correct_modes:
        found += _fit_faults(W_tb, profiles(modes, T), block)
    return found


def _fit_faults(W_tb: Tensor, R_mt: F32, block: Checked) -> Iterator[str]:
    T, modes = W_tb.shape[0], len(R_mt)
    truth = kernels.assign_and_fit_reference(W_tb.double().cpu().numpy(), R_mt)
    references = kernels.prepare_references(R_mt)
    sure = truth.margin > MARGIN
    special = truth.mode < 0
    for candidate in accepting(block.dtype, T, modes, W_tb.device)[0]:
        where = f"assign_and_fit {candidate.name} T={T} M={modes} {block.dtype} {block.layout}"
        fit = kernels.assign_and_fit(W_tb, references, implementation=candidate.name)
        mode = fit.mode.cpu().numpy()
        if (n := int(np.count_nonzero((mode != truth.mode) & (sure | special)))) > 0:
            yield f"{where}: {n} labels are wrong"
        allowed = candidate.tolerance[block.dtype] + GPU_ALLOWANCE
        same = (mode == truth.mode) & ~special
        for field, error in _errors(fit, truth, references, same).items():
            if not (worst := float(error.max(initial=0.0))) <= allowed:
                yield f"{where}: {field} errs by {worst:.1e}, allowed are {allowed:.1e}"
        for field, value in (("a", 0.0), ("correlation", 0.0)):
            if (numpy_of(getattr(fit, field))[special] != value).any():
                yield f"{where}: {field} of a row without a mode is not {value}"
        parts = [
            kernels.assign_and_fit(part, references, implementation=candidate.name)
            for part in (W_tb[:, :_CUT], W_tb[:, _CUT:])
        ]
        for field in ("a", "b", "correlation", "ss"):
            again = torch.cat([getattr(part, field) for part in parts])
            if not torch.equal(again.view(torch.int32), getattr(fit, field).view(torch.int32)):
                yield f"{where}: {field} has other bits in two blocks than in one"


def numpy_of(values: Tensor) -> NDArray[np.float64]:
    return values.double().cpu().numpy()


def _errors(
    fit: kernels.RowFit, truth: Any, references: kernels.References, rows: NDArray[np.bool_]
) -> dict[str, NDArray[np.float64]]:
    """Errors of rows whose label is the definition's, each as a part of what it is measured against."""
    mode = truth.mode[rows]
    norm = np.sqrt(truth.ss[rows])
    rnorm, rmean = references.rnorm_m[mode], references.mean_m[mode]
    a, b = numpy_of(fit.a)[rows], numpy_of(fit.b)[rows]
    mean = truth.b[rows] + truth.a[rows] * rmean
    size = np.abs(mean) + np.abs(a * rmean) + norm
    return {
        "correlation": np.abs(numpy_of(fit.correlation)[rows] - truth.correlation[rows]),
        "a": np.abs(a - truth.a[rows]) * rnorm / norm,
        "b": np.abs(b + a * rmean - mean) / size,
        "ss": np.abs(numpy_of(fit.ss)[rows] - truth.ss[rows]) / truth.ss[rows] / 2,
    }


def _gram_faults(W_tb: Tensor, block: Checked) -> Iterator[str]:
    candidates, _ = gram_accepting(block.dtype, W_tb.shape[0], W_tb.device)
    x = W_tb.double().cpu().numpy()
    x = x[:, np.isfinite(x).all(axis=0)]
    x = x - x[0]
    truth = x @ x.T
    size = np.sqrt(np.diag(truth))[1:]
    for candidate in candidates:
        found = candidate.run(W_tb)
        error = np.abs(found.G - truth)[1:, 1:] / np.outer(size, size)
        allowed = candidate.tolerance[block.dtype] + GPU_ALLOWANCE
        where = f"gram_matrix {candidate.name} T={len(x)} {block.dtype} {block.layout}"
        if not (worst := float(error.max(initial=0.0))) <= allowed:
            yield f"{where}: errs by {worst:.1e}, allowed are {allowed:.1e}"
        if (left_out := W_tb.shape[1] - x.shape[1]) != found.left_out:
            yield f"{where}: leaves {found.left_out} rows out instead of {left_out}"


# ---- speed ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timed:
    case: str
    provider: str
    bytes: int
    seconds: Callable[[], float]
    chosen: bool = False
    ceiling: str | None = None


def copies(W: Tensor, clock: Clock) -> list[Timed]:
    """The two ceilings of a resident pass: a copy counts reads and writes, a sum only reads."""
    flat = torch.as_strided(W, (W.shape[0] * W.stride(0),), (1,))
    n_bytes = flat.numel() * flat.element_size()
    source = flat[: _COPY_BYTES // flat.element_size()]
    target = torch.empty_like(source)
    copied = 2 * source.numel() * source.element_size()
    return [
        Timed("device copy", "torch copy", copied, lambda: clock.on_device(lambda: target.copy_(source))),
        Timed("device read", "torch sum", n_bytes, lambda: clock.on_device(flat.sum)),
        Timed("device read", "torch max", n_bytes, lambda: clock.on_device(flat.amax)),
    ]


def plain_torch(W_tb: Tensor, R_mt: F32) -> tuple[Callable[[], object], int]:
    """The lines one writes, in float32 over as many rows as have room beside what they make; and how many."""
    T, modes = W_tb.shape[0], len(R_mt)
    rows = min(W_tb.shape[1], _RIVAL_BYTES // (4 * (2 * T + 2 * modes)))
    references = kernels.prepare_references(R_mt)
    z_mt = torch.tensor(references.z_mt, device=W_tb.device)
    mean_m, rnorm_m = (
        torch.tensor(values, dtype=torch.float32, device=W_tb.device)
        for values in (references.mean_m, references.rnorm_m)
    )

    def work() -> object:
        w = W_tb[:, :rows].float()
        mean = w.mean(dim=0)
        x = w - mean
        d = z_mt @ x
        mode = d.abs().argmax(dim=0)
        best = d.gather(0, mode[None])[0]
        ss: Tensor = (x * x).sum(dim=0)
        a = best / rnorm_m[mode]
        return mode.to(torch.int16), a, mean - a * mean_m[mode], best / torch.sqrt(ss), ss

    return work, rows


def resident(W_tb: Tensor, dtype: str, sizes: Sizes, device: torch.device, clock: Clock) -> list[Timed]:
    """The fused pass over a block that lies on the device, and the Gram matrix of the same block."""
    T, rows = W_tb.shape
    found: list[Timed] = []
    for modes in sizes.modes:
        references = kernels.prepare_references(profiles(modes, T))
        candidates, chosen = accepting(dtype, T, modes, device)
        for candidate in candidates:

            def work(name: str = candidate.name, references: kernels.References = references) -> object:
                return kernels.assign_and_fit(W_tb, references, implementation=name)

            found.append(
                Timed(
                    f"assign_and_fit T={T} N={rows} M={modes} {dtype}",
                    f"cmdgpu {candidate.name}",
                    rows * (T * W_tb.element_size() + OUTPUT_ROW_BYTES),
                    lambda work=work: clock.on_device(work),
                    candidate.name == chosen,
                    "device read",
                )
            )
        plain, fewer = plain_torch(W_tb, profiles(modes, T))
        found.append(
            Timed(
                f"assign_and_fit T={T} N={rows} M={modes} {dtype}",
                "plain torch" if fewer == rows else f"plain torch, {fewer} rows",
                fewer * (T * W_tb.element_size() + OUTPUT_ROW_BYTES),
                lambda work=plain: clock.on_device(work),
                ceiling="device read",
            )
        )
    candidates, chosen = gram_accepting(dtype, T, device)
    found += [
        Timed(
            f"gram_matrix T={T} N={rows} {dtype}",
            f"cmdgpu {candidate.name}",
            rows * T * W_tb.element_size(),
            lambda run=candidate.run: clock.on_device(lambda: run(W_tb)),
            candidate.name == chosen,
            "device read",
        )
        for candidate in candidates
    ]
    return found


def carried(sizes: Sizes, engine: Device, device: torch.device, clock: Clock) -> list[Timed]:
    """Plain copies to and from pinned memory, and blocks through the product's own engine from there."""
    T, width = sizes.snapshots, sizes.block_rows
    slots = [engine.host_slot(T, width, "float32") for _ in range(3)]
    for slot in slots:
        slot[:] = walks(width, T, "float32", torch.device("cpu")).numpy()
    pinned = torch.empty(T * width, pin_memory=device.type == "cuda").normal_()
    there = torch.empty(T * width, device=device)
    references = kernels.prepare_references(profiles(10, T))
    n_bytes = sizes.blocks * T * width * 4

    def compute(unit: int, W_tb: Tensor) -> list[tuple[Tensor, ...]]:
        del unit
        fit = kernels.assign_and_fit(W_tb, references)
        return [(fit.mode, fit.a, fit.b, fit.correlation, fit.ss)]

    def stream() -> None:
        under_way: deque[Any] = deque()
        for number in range(sizes.blocks):
            slot = number % len(slots)
            block = Block(number, number + 1, slots[slot], slot, slots[slot].nbytes)
            under_way.append(engine.submit(block, width, "float32", compute))
            if len(under_way) > engine.ahead:
                under_way.popleft().outputs()
        while under_way:
            under_way.popleft().outputs()

    def repeat(target: Tensor, source: Tensor) -> Callable[[], None]:
        def run() -> None:
            for _ in range(sizes.blocks):
                target.copy_(source, non_blocking=True)

        return run

    up, down = repeat(there, pinned), repeat(pinned, there)
    return [
        Timed("host to device", "torch copy", n_bytes, lambda: clock.wall(up)),
        Timed("device to host", "torch copy", n_bytes, lambda: clock.wall(down)),
        Timed(
            f"stream T={T} N={sizes.blocks * width} M=10 float32, from pinned memory",
            "cmdgpu engine",
            n_bytes,
            lambda: clock.wall(stream),
            True,
            "host to device",
        ),
    ]


def in_turns(timed: Sequence[Timed], runs: int, found: dict[str, Any]) -> list[Record]:
    """All once to warm up, then in turns; a ceiling is the fastest of its ways, in the same turns."""
    for one in timed:
        one.seconds()
    seconds: list[list[float]] = [[] for _ in timed]
    for _ in range(runs):
        for mine, one in zip(seconds, timed, strict=True):
            mine.append(one.seconds())
    rates = [one.bytes / statistics.median(mine) / 1e9 for one, mine in zip(timed, seconds, strict=True)]
    limits: dict[str, float] = {}
    for one, rate in zip(timed, rates, strict=True):
        limits[one.case] = max(rate, limits.get(one.case, 0.0))
    copy = limits.get("device copy")
    records: list[Record] = []
    for one, mine, rate in zip(timed, seconds, rates, strict=True):
        limit = limits[one.ceiling] if one.ceiling else None
        on_device = copy is not None and one.ceiling == "device read"
        records.append(
            Record(
                case=one.case,
                provider=one.provider,
                chosen=one.chosen,
                machine=found["name"],
                commit=found["commit"],
                median_ms=1e3 * statistics.median(mine),
                spread_ms=1e3 * (max(mine) - min(mine)),
                runs=runs,
                bytes=one.bytes,
                gb_per_s=rate,
                ceiling=one.ceiling,
                ceiling_gb_per_s=limit,
                percent_of_ceiling=100 * rate / limit if limit else None,
                percent_of_copy=100 * rate / copy if copy is not None and on_device else None,
            )
        )
    return records


def speeds(device: torch.device, sizes: Sizes, found: dict[str, Any]) -> list[Record]:
    clock = Clock(device)
    with make_device(device) as engine:
        records = in_turns(carried(sizes, engine, device, clock), sizes.runs, found)
    for dtype in ("float32", "bfloat16"):
        W_tb = walks(sizes.rows, sizes.snapshots, dtype, device)
        timed = [*copies(W_tb, clock), *resident(W_tb, dtype, sizes, device, clock)]
        records += in_turns(timed, sizes.runs, found)
        del W_tb, timed
    return records


def run(device: torch.device, sizes: Sizes, out: Path | None) -> Path:
    """Raises SystemExit with everything that is wrong, before any speed is measured."""
    found = machine(device)
    with np.errstate(all="ignore"):  # where Triton is interpreted it computes in NumPy, which warns
        wrong = list(faults(device, sizes))
    if wrong:
        raise SystemExit("\n".join(wrong))
    print("every operation agrees with float64", flush=True)
    records = speeds(device, sizes, found)
    for record in records:
        percent = (
            ""
            if record.percent_of_ceiling is None
            else f"{record.percent_of_ceiling:5.1f} % of {record.ceiling}"
        )
        print(f"{record.case:56}  {record.provider:20}  {record.gb_per_s:8.1f} GB/s  {percent}")
    target = out or results_file("gpu", found)
    write_results(target, found, records=[record.to_json() for record in records])
    return target


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="by default results/<machine>/gpu.json")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing was checked or measured", file=sys.stderr)
        raise SystemExit(2)
    return run(torch.device("cuda", 0), LARGE, options.out)


if __name__ == "__main__":
    main()
