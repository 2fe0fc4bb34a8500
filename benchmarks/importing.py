"""Checkpoints imported beside plain files: ``python benchmarks/importing.py --in DIR [--megabytes 200]``.

Twenty checkpoints of 500 MB, in float32, as torch and as safetensors write them, taken into a trajectory
under a memory limit: cold sources, durable snapshots, every file hashed, every chunk checked. Beside it, in
turns on the same disk: the same files read cold and in order, and as many bytes written in files of 1 MiB and
synced at the end. The measure is one after the other, a cold read plus a synced write.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks are no installed package

import numpy as np  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.ceilings import drop_from_cache  # noqa: E402
from benchmarks.machine import in_own_process, machine, results_file  # noqa: E402
from benchmarks.run import write_results  # noqa: E402
from cmdgpu.trajectory import Trajectory  # noqa: E402

PIECE = 1 << 20
N_LAYERS = 12
CHECKED_ROWS = 1000
LIMIT = "512MiB"

Save = Callable[[dict[str, Tensor], Path], object]
_SAFETENSORS: Any = safetensors.torch
WRITERS: dict[str, tuple[str, Save]] = {
    "torch": (".pt", lambda state, path: torch.save({"model": state, "step": 0}, path)),
    "safetensors": (".safetensors", lambda state, path: _SAFETENSORS.save_file(state, path)),
}


@dataclass(frozen=True)
class Record:
    case: str
    provider: str
    bytes: int
    """Of the sources; what is written is as much, to a few per cent."""
    median_s: float
    spread_s: float
    runs: int
    gb_per_s: float
    percent_of_ceiling: float | None = None
    """Of a cold read plus a synced write, in the same run; the median."""
    peak_bytes: int | None = None
    planned_bytes: int | None = None
    limit: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Sources:
    """Checkpoints of one writer on the disk, and the ways to move their bytes."""

    def __init__(self, folder: Path, writer: str, count: int, n_bytes: int) -> None:
        self.folder, self.writer, self.count = folder, writer, count
        self.runs = folder / "runs"
        self.runs.mkdir()
        suffix, save = WRITERS[writer]
        generator = torch.Generator().manual_seed(0)
        rows = max(n_bytes // 4 // N_LAYERS // 64, 1)
        self.state = {
            f"layers.{i}.weight": torch.randn(rows, 64, generator=generator) for i in range(N_LAYERS)
        }
        for step in range(count):
            self._advance(step)
            save(self.state, self.runs / f"step-{step}{suffix}")
        os.sync()
        self.files = sorted(self.runs.iterdir())
        self.n_bytes = sum(file.stat().st_size for file in self.files)
        self.found: list[dict[str, Any]] = []

    def _advance(self, step: int) -> None:
        for i, tensor in enumerate(self.state.values()):
            tensor.view(-1)[step :: self.count] += 1 + i

    def read(self) -> float:
        drop_from_cache(self.files)
        buffer, started = bytearray(PIECE), time.perf_counter()
        for path in self.files:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        return time.perf_counter() - started

    def write(self) -> float:
        """Random bytes, so that no disk makes them fewer."""
        block = os.urandom(PIECE)
        plain = self.folder / "plain"
        plain.mkdir()
        os.sync()
        started = time.perf_counter()
        for number in range(-(-self.n_bytes // PIECE)):
            with (plain / str(number)).open("wb", buffering=0) as file:
                file.write(block[: self.n_bytes - number * PIECE])
        os.sync()
        seconds = time.perf_counter() - started
        shutil.rmtree(plain)
        os.sync()
        return seconds

    def import_(self) -> float:
        drop_from_cache(self.files)
        out = self.folder / "run.zarr"
        self.found.append(in_own_process("one_import.py", self.runs, out, LIMIT))
        self._check(out)
        shutil.rmtree(out)
        os.sync()
        return self.found[-1]["seconds"]

    def _check(self, out: Path) -> None:
        """The last snapshot is what was saved last, in as many rows as are looked at."""
        traj = Trajectory.open(out)
        rows = np.unique(np.linspace(0, traj.shape[0] - 1, CHECKED_ROWS).astype(np.int64))
        saved = torch.cat([self.state[entry.name].view(-1) for entry in traj.parameters])[
            torch.as_tensor(rows)
        ]
        last = traj.read_rows(rows, np.array([self.count - 1]))[:, 0]
        if traj.shape[1] != self.count or not np.array_equal(last, saved.numpy()):
            raise SystemExit(f"{self.writer}: the import holds other numbers than the checkpoints")


def measure(sources: Sources, runs: int) -> list[Record]:
    times: dict[str, list[float]] = {"cmdgpu": [], "cold read": [], "synced write": []}
    for _ in range(runs):
        times["cold read"].append(sources.read())
        times["synced write"].append(sources.write())
        times["cmdgpu"].append(sources.import_())
    both = [r + w for r, w in zip(times["cold read"], times["synced write"], strict=True)]
    times["cold read, then synced write"] = both
    ratios = [100 * ceiling / mine for ceiling, mine in zip(both, times["cmdgpu"], strict=True)]
    case = f"{sources.count} checkpoints of {sources.n_bytes / sources.count / 1e6:.3g} MB, {sources.writer}"
    records: list[Record] = []
    for provider, seconds in times.items():
        median = statistics.median(seconds)
        mine: dict[str, Any] = {}
        if provider == "cmdgpu":
            peaks = {
                name: max(run[name] for run in sources.found) for name in ("peak_bytes", "planned_bytes")
            }
            mine = {"percent_of_ceiling": statistics.median(ratios), **peaks, "limit": LIMIT}
        rate, spread = sources.n_bytes / median / 1e9, max(seconds) - min(seconds)
        records.append(Record(case, provider, sources.n_bytes, median, spread, runs, rate, **mine))
    return records


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="sizes for a test, not for a figure")
    parser.add_argument("--checkpoints", type=int, default=20)
    parser.add_argument("--megabytes", type=float, default=500, help="of one checkpoint")
    parser.add_argument("--runs", type=int, default=3, help="runs of each provider")
    parser.add_argument("--in", dest="folder", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--out", type=Path, help="by default results/<machine>/importing.json")
    options = parser.parse_args(arguments)
    count, megabytes, runs = (
        (2, 0.1, 1) if options.tiny else (options.checkpoints, options.megabytes, options.runs)
    )
    place: Path | None = options.folder
    records: list[Record] = []
    for writer in WRITERS:
        folder = Path(tempfile.mkdtemp(dir=place))
        try:
            records += measure(Sources(folder, writer, count, int(megabytes * 1e6)), runs)
        finally:
            shutil.rmtree(folder)
    for record in records:
        of = "" if record.percent_of_ceiling is None else f"  {record.percent_of_ceiling:.0f} %"
        print(f"{record.case:48}  {record.provider:30}  {record.gb_per_s:6.2f} GB/s{of}")
    found = machine()
    out: Path = options.out or results_file("importing", found)
    write_results(out, found, records=[record.to_json() for record in records])
    return out


if __name__ == "__main__":
    main()
