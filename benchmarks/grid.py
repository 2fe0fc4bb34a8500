"""Twelve fits of one store beside one of them: ``python benchmarks/grid.py --gb 8 --in DIR``.

M = 2, 5, 10 with four seeds each in one pass, and M = 10 with one seed, in turns, each in a process of its
own on a cold store. What the device delivered is counted, and the same bytes are read cold by plain files.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks are no installed package

from benchmarks.ceilings import drop_from_cache, read_files  # noqa: E402
from benchmarks.machine import in_own_process, machine, results_file  # noqa: E402
from benchmarks.out_of_core import READS_IN_FLIGHT, Size, make_store  # noqa: E402
from benchmarks.run import write_results  # noqa: E402

SNAPSHOTS = 100
GRIDS = {"one fit, M = 10": ("10", "0"), "twelve fits, M = 2, 5, 10": ("2,5,10", "0:4")}


@dataclass(frozen=True)
class Record:
    case: str
    provider: str
    fits: int
    seconds: float
    """Of the whole command after the imports, the median of the runs."""
    spread_s: float
    times_one: float | None
    """Beside one fit."""
    store_bytes: int
    device_read_bytes: int | None
    result_bytes: int
    runs: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(folder: Path, rows: int, snapshots: int, runs: int, rows_per_chunk: int | None) -> list[Record]:
    store = folder / "store.zarr"
    make_store(store, Size(rows, snapshots, (), rows_per_chunk, runs))
    files = sorted((store / "weights").glob("c.*"))
    n_bytes = sum(file.stat().st_size for file in files)
    everything = [*files, *(store / "sketch").glob("c.*")]
    told: dict[str, list[dict[str, Any]]] = {name: [] for name in GRIDS}
    plain: list[float] = []
    for _ in range(runs):  # results stay: a filesystem that has just deleted files is slow to make others
        for name, (modes, seeds) in GRIDS.items():
            drop_from_cache(everything)
            out = folder / f"fits-{modes}-{len(plain)}"
            told[name].append(in_own_process("one_grid.py", store, out, modes, seeds))
        drop_from_cache(everything)
        started = time.perf_counter()
        read_files(files, READS_IN_FLIGHT, crc=False)
        plain.append(time.perf_counter() - started)
    case = f"N={rows:.3g} T={snapshots} float32, cold"
    one = statistics.median(run["seconds"] for run in told["one fit, M = 10"])
    records = [
        Record(
            case, "plain files, 8 reads in flight", 0, statistics.median(plain), max(plain) - min(plain),
            None, n_bytes, None, 0, runs,
        )
    ]  # fmt: skip
    for name, found in told.items():
        seconds = [run["seconds"] for run in found]
        records.append(
            Record(
                case=case,
                provider=name,
                fits=found[0]["fits"],
                seconds=statistics.median(seconds),
                spread_s=max(seconds) - min(seconds),
                times_one=statistics.median(seconds) / one,
                store_bytes=n_bytes,
                device_read_bytes=max((run.get("read_bytes", 0) for run in found), default=None),
                result_bytes=found[0]["result_bytes"],
                runs=runs,
            )
        )
    return records


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="sizes for a test")
    parser.add_argument("--gb", type=float, default=8.0, help="size of the store of 100 snapshots")
    parser.add_argument("--snapshots", type=int, nargs="+", default=[100, 200], help="T, of as many rows")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--in", dest="folder", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--out", type=Path, help="by default results/<machine>/grid.json")
    options = parser.parse_args(arguments)
    rows, chunk, runs = int(options.gb * 1e9 / (4 * SNAPSHOTS)), None, int(options.runs)
    lengths: list[int] = options.snapshots
    if options.tiny:
        rows, chunk, runs, lengths = 2048, 512, 1, [12]
    found = machine()
    place: Path | None = options.folder
    records: list[Record] = []
    for snapshots in lengths:
        folder = Path(tempfile.mkdtemp(dir=place))
        try:
            records += measure(folder, rows, snapshots, runs, chunk)
        finally:
            shutil.rmtree(folder)
        for record in records[-1 - len(GRIDS) :]:
            times = "" if record.times_one is None else f"{record.times_one:5.2f} x one fit"
            print(f"{record.case}  {record.provider:32}{record.seconds:8.2f} s  {times}", flush=True)
    out: Path = options.out or results_file("grid", found)
    write_results(out, found, records=[record.to_json() for record in records])
    return out


if __name__ == "__main__":
    main()
