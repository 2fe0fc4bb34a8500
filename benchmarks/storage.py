"""What durability and verification cost beside plain files: ``python benchmarks/storage.py [--tiny]``.

Recording: one durable snapshot, beside writing the same bytes ended by one sync. Verifying: every byte of a
cold store, beside reading the same bytes cold and in order. All in turns on one disk; pages are dropped by
``posix_fadvise`` before every cold read.
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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks are no installed package

import numpy as np  # noqa: E402

from benchmarks.ceilings import drop_from_cache  # noqa: E402
from benchmarks.machine import machine, results_file  # noqa: E402
from benchmarks.run import write_results  # noqa: E402
from cmdgpu.notation import F32, I64  # noqa: E402
from cmdgpu.store.durable import bytes_of  # noqa: E402
from cmdgpu.store.journal import Journal  # noqa: E402
from cmdgpu.store.parameter_map import ParameterMap, whole  # noqa: E402
from cmdgpu.store.verification import verify_store  # noqa: E402

Timed = Callable[[], int]
"""Does its work and says how many bytes it moved."""
PIECE = 1 << 20


class Disk:
    """One snapshot of ``rows`` values, and a store of ``snapshots`` of them, on one disk."""

    def __init__(self, folder: Path, rows: int, snapshots: int, chunk: int) -> None:
        self.folder = folder
        self.chunk = chunk
        self.column: F32 = np.random.default_rng(0).standard_normal(rows, dtype=np.float32)
        self.candidates: I64 = np.arange(0, rows, max(rows // 8192, 1), dtype=np.int64)
        self.layout = ParameterMap(whole([("w", "parameter", "float32", (rows,))]), {}, ())
        self.journal = self._new_store("store.zarr")
        for _ in range(snapshots):
            self.append()
        self.chunks = sorted((folder / "store.zarr" / "weights").glob("c.*"), key=_written)
        self.big = folder / "one-file"
        with self.big.open("wb") as file:
            for chunk_file in self.chunks:
                file.write(chunk_file.read_bytes())
            os.fsync(file.fileno())
        self.journal = self._new_store("recording.zarr")

    def _new_store(self, name: str) -> Journal:
        return Journal.create(
            self.folder / name, self.layout, dtype="float32", rows=self.chunk, unit="step",
            sketch_rows=self.candidates,
        )  # fmt: skip

    # ---- writing ----------------------------------------------------------------------------------------

    def append(self) -> int:
        journal = self.journal
        journal.append(self.column, len(journal.view.steps), {"loss": 0.0}, self.column[self.candidates])
        return self.column.nbytes

    def write_one_file(self) -> int:
        with (self.folder / "plain").open("wb", buffering=0) as file:
            _write(file.fileno(), self.column)
            os.fsync(file.fileno())
        return self.column.nbytes

    def write_chunk_files(self) -> int:
        for i in range(0, len(self.column), self.chunk):
            with (self.folder / f"plain.{i}").open("wb", buffering=0) as file:
                _write(file.fileno(), self.column[i : i + self.chunk])
        os.sync()
        return self.column.nbytes

    def settle(self) -> None:
        """Between two writers: nobody pays for another's pages."""
        for file in self.folder.glob("plain*"):
            file.unlink()
        os.sync()

    # ---- reading ----------------------------------------------------------------------------------------

    def verify(self) -> int:
        found = verify_store(self.folder / "store.zarr")
        assert found.damaged == []
        return found.bytes_checked

    def read_one_file(self) -> int:
        return _read([self.big])

    def read_chunk_files(self) -> int:
        return _read(self.chunks)

    def make_cold(self) -> None:
        drop_from_cache([self.big, *(f for f in (self.folder / "store.zarr").rglob("*") if f.is_file())])


def _written(file: Path) -> tuple[int, int]:
    _, i, t = file.name.split(".")
    return int(t), int(i)


def _write(fd: int, values: F32) -> None:
    view = bytes_of(values)
    while view:
        view = view[os.write(fd, view) :]


def _read(files: list[Path]) -> int:
    buffer, total = bytearray(PIECE), 0
    for path in files:
        with path.open("rb", buffering=0) as file:
            while got := file.readinto(buffer):
                total += got
    return total


def in_turns(
    what: str, timed: dict[str, Timed], before: Callable[[], None], runs: int
) -> list[dict[str, Any]]:
    rates: dict[str, list[float]] = {name: [] for name in timed}
    n_bytes = 0
    for _ in range(runs):
        for name, work in timed.items():
            before()
            started = time.perf_counter()
            n_bytes = work()
            rates[name].append(n_bytes / (time.perf_counter() - started) / 1e9)
    return [
        {
            "what": what,
            "provider": name,
            "bytes": n_bytes,
            "gb_per_s": statistics.median(found),
            "slowest_gb_per_s": min(found),
            "fastest_gb_per_s": max(found),
        }
        for name, found in rates.items()
    ]


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="sizes for a test, not for a figure")
    parser.add_argument("--runs", type=int, default=9, help="runs of each provider")
    parser.add_argument("--in", dest="folder", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--out", type=Path, help="by default results/<machine>/storage.json")
    options = parser.parse_args(arguments)
    place: Path | None = options.folder
    rows, snapshots, chunk = (4096, 3, 1024) if options.tiny else (1 << 25, 16, 1 << 18)
    folder = Path(tempfile.mkdtemp(dir=place))
    try:
        disk = Disk(folder, rows, snapshots, chunk)
        writers: dict[str, Timed] = {
            "cmdgpu": disk.append,
            "one file, fsync": disk.write_one_file,
            "chunk files, sync": disk.write_chunk_files,
        }
        readers: dict[str, Timed] = {
            "cmdgpu": disk.verify,
            "one file, in order": disk.read_one_file,
            "chunk files, in order": disk.read_chunk_files,
        }
        records = in_turns("record a snapshot durably", writers, disk.settle, options.runs)
        records += in_turns("verify a cold store", readers, disk.make_cold, options.runs)
    finally:
        shutil.rmtree(folder)
    for record in records:
        print(f"{record['what']:28}  {record['provider']:22}  {record['gb_per_s']:6.2f} GB/s")
    found = machine()
    out: Path = options.out or results_file("storage", found)
    write_results(out, found, records=records)
    return out


if __name__ == "__main__":
    main()
