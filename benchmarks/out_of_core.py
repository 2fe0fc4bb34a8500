"""A store fitted out of core, beside what its stages do alone: ``python benchmarks/out_of_core.py --in DIR``.

The pass of ``CMD(...).fit(Trajectory.open(store), out=...)`` with its pages cached and cold; reading and
checking the same chunk files; the kernel over resident blocks of the same shape; and both at once. The
ceiling of the cached pass is two stages on shared cores, ``1 / (1 / read + 1 / kernel)``: filling, draining,
statistics, writing and ticking off are all held against us. With ``--device cuda`` the second stage, carrying
blocks there and the kernel, has hardware of its own: the ceiling is the slower of the two.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks are no installed package

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import cmdgpu as cg  # noqa: E402
from benchmarks.cases import PADDING, walks  # noqa: E402
from benchmarks.ceilings import CRC_BYTES, decode, drop_from_cache, in_threads, read_files  # noqa: E402
from benchmarks.machine import in_own_process, machine, results_file  # noqa: E402
from benchmarks.run import write_results  # noqa: E402
from cmdgpu import ops  # noqa: E402

READS_IN_FLIGHT = 8
CHECKED_ROWS = 2048


@dataclass(frozen=True)
class Size:
    """A store and the fits of it."""

    rows: int
    snapshots: int
    modes: tuple[int, ...]
    rows_per_chunk: int | None
    """The product's own choice when None."""
    runs: int


SIZES = {
    "tiny": Size(2048, 12, (2,), 512, runs=1),
    "quick": Size(20 << 18, 100, (10, 100), None, runs=3),
    "full": Size(76 << 18, 100, (1, 10, 30, 100, 300, 1000), None, runs=5),
}
"""2.1 GB and 8 GB in float32; ``--gb`` gives any other size."""


@dataclass(frozen=True)
class Record:
    case: str
    provider: str
    machine: str
    commit: str | None
    median_ms: float
    spread_ms: float
    runs: int
    bytes: int
    """The weights, once; results and padding do not count."""
    gb_per_s: float
    ceiling: str | None = None
    ceiling_gb_per_s: float | None = None
    percent_of_ceiling: float | None = None
    peak_bytes: int | None = None
    planned_bytes: int | None = None
    labels_differ: int | None = None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def make_store(path: Path, size: Size) -> None:
    """Random walks, recorded as a model of one tensor would be."""
    model = nn.Module()
    weight = nn.Parameter(torch.zeros(size.rows))
    model.register_parameter("w", weight)
    with cg.Recorder(path, rows_per_chunk=size.rows_per_chunk) as recorder, torch.no_grad():
        for step, column in enumerate(walks(size.rows, size.snapshots)):
            weight.copy_(column)
            recorder.record(model, step)


# ---- stages ---------------------------------------------------------------------------------------------


class Stages:
    """What the pass is made of, each alone, over the bytes of the whole store."""

    def __init__(
        self, store: Path, references: np.ndarray[Any, np.dtype[np.float32]], width: int, device: str
    ) -> None:
        """``width``: rows of a block of the plan."""
        self._device = torch.device(device)
        self.trajectory = cg.Trajectory.open(store)
        self.files = sorted((store / "weights").glob("c.*"), key=_by_block)
        n, t = self.trajectory.shape
        self.n_bytes = n * t * 4
        self.threads = torch.get_num_threads()
        self._references = ops.prepare_references(references)
        rows, T = self.trajectory.source.rows, len(self.trajectory.columns)
        self._unit_rows = rows
        units = width // rows
        self._passes = -(-self.trajectory.shape[0] // width)
        self._blocks = [self._block(first * units, units, width, T) for first in range(min(2, self._passes))]

    def _block(self, first: int, units: int, width: int, T: int) -> Tensor:
        source = self.trajectory.source
        slot = np.zeros((T, width + PADDING), dtype=np.float32)[:, :width]
        last = -(-self.trajectory.shape[0] // source.rows)
        with ThreadPoolExecutor(self.threads) as pool:
            tasks = source.fill_tasks(first, min(first + units, last), self.trajectory.columns, slot)
            for done in [pool.submit(task) for task in tasks]:
                done.result()
        W_tb = ops.as_tensor(slot, self.trajectory.dtype)
        return W_tb if self._device.type == "cpu" else W_tb.pin_memory()

    def read_and_check(self) -> None:
        read_files(self.files, self.threads, crc=True)

    def read_in_order(self) -> None:
        read_files(self.files, 1, crc=False)

    def read_in_flight(self) -> None:
        read_files(self.files, READS_IN_FLIGHT, crc=False)

    def compute(self) -> None:
        """The kernel over resident blocks in turn, unit by unit as the pass does; carried there first."""
        left = self.trajectory.shape[0]
        for number in range(self._passes):
            W_tb = self._blocks[number % len(self._blocks)].to(self._device, non_blocking=True)
            for start in range(0, min(left, W_tb.shape[1]), self._unit_rows):
                ops.assign_and_fit(W_tb[:, start : start + self._unit_rows], self._references)
            left -= W_tb.shape[1]
        if self._device.type == "cuda":
            torch.cuda.synchronize()

    def read_beside_compute(self) -> None:
        in_threads([self.read_and_check, self.compute])

    def make_cold(self) -> None:
        drop_from_cache(self.files)

    def make_cached(self) -> None:
        """Twice: the second reader of a page pays for moving it among those in use."""
        for _ in range(2):
            read_files(self.files, self.threads, crc=False)


def _by_block(file: Path) -> tuple[int, int]:
    _, i, t = file.name.split(".")
    return int(i), int(t)


def shared_cores(*rates: float) -> float:
    """GB/s of stages that share the same cores, each of them alone as fast as given."""
    return 1 / sum(1 / rate for rate in rates)


# ---- one case -------------------------------------------------------------------------------------------


def measure(
    store: Path, size: Size, modes: int, folder: Path, found: Mapping[str, Any], runs: int, device: str
) -> list[Record]:
    """Everything in turns: the pass cached and cold, its stages alone and at once."""
    numbers = iter(range(10**6))

    def new_result() -> Path:
        return folder / f"result-{next(numbers)}.zarr"

    first = new_result()
    warm = in_own_process("one_fit.py", store, first, modes, device, "--peak")
    width = int(warm["metrics"]["rows_per_block"])
    fitted = cg.CMD.load(first)
    stages = Stages(store, fitted.references_, width, device)
    wrong = count_wrong(fitted, stages.trajectory)
    seconds: dict[str, list[float]] = {}

    def fitting(before: Callable[[], None], name: str) -> None:
        before()
        out = new_result()
        said = in_own_process("one_fit.py", store, out, modes, device)
        shutil.rmtree(out)
        seconds.setdefault(f"pass, {name}", []).append(float(said["metrics"]["stage_s"]["pass"]))
        seconds.setdefault(f"whole fit, {name}", []).append(float(said["seconds"]))

    def stage(before: Callable[[], None], name: str, work: Callable[[], None]) -> None:
        before()
        started = time.perf_counter()
        work()
        seconds.setdefault(name, []).append(time.perf_counter() - started)

    for _ in range(runs):
        fitting(stages.make_cached, "cached")
        stage(stages.make_cached, "read + crc", stages.read_and_check)
        stage(stages.make_cached, "kernel", stages.compute)
        stage(stages.make_cached, "read + crc beside kernel", stages.read_beside_compute)
        fitting(stages.make_cold, "cold")
        stage(stages.make_cold, "cold read, in order", stages.read_in_order)
        stage(stages.make_cold, "cold read, 8 in flight", stages.read_in_flight)
    shutil.rmtree(first)

    rate = {name: stages.n_bytes / statistics.median(times) / 1e9 for name, times in seconds.items()}
    if device == "cpu":
        stage_limit = (
            "read + crc and kernel on shared cores",
            shared_cores(rate["read + crc"], rate["kernel"]),
        )
    else:
        slower = min(("read + crc", "kernel"), key=lambda name: rate[name])
        stage_limit = slower, rate[slower]
    disk = max(rate["cold read, in order"], rate["cold read, 8 in flight"])
    limits = {"cached": stage_limit, "cold": min(("disk", disk), stage_limit, key=lambda limit: limit[1])}
    about: dict[str, Any] = {
        "case": f"fit T={size.snapshots} N={size.rows} M={modes} {stages.trajectory.dtype}",
        "machine": found["name"],
        "commit": found["commit"],
        "runs": runs,
        "bytes": stages.n_bytes,
    }
    records: list[Record] = []
    for name, times in seconds.items():
        limit, limit_rate = limits.get(name.partition(", ")[2], (None, None))
        ours = limit is not None
        records.append(
            Record(
                **about,
                provider=name,
                median_ms=1e3 * statistics.median(times),
                spread_ms=1e3 * (max(times) - min(times)),
                gb_per_s=rate[name],
                ceiling=limit,
                ceiling_gb_per_s=limit_rate,
                percent_of_ceiling=100 * rate[name] / limit_rate if limit_rate else None,
                peak_bytes=int(warm["peak_bytes"]) if ours else None,
                planned_bytes=int(warm["metrics"]["planned_bytes"]) if ours else None,
                labels_differ=wrong if ours else None,
                note=str(warm["metrics"]["implementation"]) if ours or name == "kernel" else "",
            )
        )
    return records + _decoding(stages, about)


def _decoding(stages: Stages, about: Mapping[str, Any]) -> list[Record]:
    """Decompressing alone, from memory, where the store is compressed."""
    document = json.loads((stages.files[0].parent / "zarr.json").read_text())
    if "zstd" not in [codec["name"] for codec in document["codecs"]]:
        return []
    payloads = [file.read_bytes()[:-CRC_BYTES] for file in stages.files[: 4 * stages.threads]]
    started = time.perf_counter()
    n_bytes = decode(payloads, stages.threads)
    seconds = time.perf_counter() - started
    own: dict[str, Any] = {**about, "runs": 1, "bytes": n_bytes}
    return [
        Record(
            **own, provider="decode", median_ms=1e3 * seconds, spread_ms=0.0, gb_per_s=n_bytes / seconds / 1e9
        )
    ]


def count_wrong(fitted: cg.CMD, trajectory: cg.Trajectory) -> int:
    """Checked rows whose label is not the definition's, beyond the margin."""
    import cmdgpu_kernels as kernels

    from benchmarks.measure import MARGIN

    rows = np.unique(np.linspace(0, trajectory.shape[0] - 1, CHECKED_ROWS).astype(np.int64))
    first = rows[rows < trajectory.source.rows]  # one chunk of each snapshot: the check stays short
    W_nt = trajectory.source.read_rows(first, trajectory.columns)
    truth = kernels.assign_and_fit_reference(W_nt, fitted.references_, time_major=False)
    labels = np.asarray(fitted.labels_[: int(first[-1]) + 1])[first]
    return int(np.count_nonzero((labels != truth.mode) & (truth.margin > MARGIN)))


def shown(record: Record) -> str:
    percent = (
        "" if record.percent_of_ceiling is None else f"{record.percent_of_ceiling:5.1f} % of {record.ceiling}"
    )
    return f"{record.case:40}  {record.provider:26}  {record.gb_per_s:6.2f} GB/s  {percent}"


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", choices=list(SIZES), default="quick")
    parser.add_argument("--gb", type=float, help="size of the store instead of the suite's")
    parser.add_argument("--modes", type=int, nargs="+", help="M instead of the suite's")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--in", dest="folder", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--out", type=Path, help="by default results/<machine>/out-of-core.json")
    options = parser.parse_args(arguments)
    size: Size = SIZES[options.suite]
    if options.gb is not None:
        rows = int(options.gb * 1e9 / (4 * size.snapshots))
        size = Size(rows, size.snapshots, size.modes, size.rows_per_chunk, size.runs)
    found = machine(torch.device(options.device))
    place: Path | None = options.folder
    folder = Path(tempfile.mkdtemp(dir=place))
    records: list[Record] = []
    try:
        make_store(folder / "store.zarr", size)
        for modes in options.modes or size.modes:
            for record in measure(
                folder / "store.zarr", size, modes, folder, found, size.runs, options.device
            ):
                print(shown(record), flush=True)
                records.append(record)
    finally:
        shutil.rmtree(folder)
    out: Path = options.out or results_file("out-of-core", found)
    write_results(out, found, records=[record.to_json() for record in records])
    if any(record.labels_differ for record in records):
        raise SystemExit("a fit has other labels than the definition")
    return out


if __name__ == "__main__":
    main()
