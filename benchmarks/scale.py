"""A billion parameters on one machine: ``python benchmarks/scale.py --rows 1e9 --snapshots 8 --in DIR``.

A transformer's trajectory is synthesised, sampled, fitted, one step of the fit exported, both verified: each
in a process of its own (``one_stage.py``) whose memory and device reads are measured, the files it reads
dropped from the page cache before. Beside them, on the same disk in the same run, the same bytes read and
written by plain files; of several ways to do that the fastest counts. Deletes everything at the end; needs
room for the trajectory and 18 bytes a row.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks are no installed package

import cmdgpu_kernels as kernels  # noqa: E402
import numpy as np  # noqa: E402
import safetensors  # noqa: E402

import cmdgpu as cg  # noqa: E402
from benchmarks.ceilings import drop_from_cache, read_files  # noqa: E402
from benchmarks.machine import in_own_process, machine, results_file  # noqa: E402
from benchmarks.measure import MARGIN  # noqa: E402
from benchmarks.one_stage import FILE, LIMIT, RESULT, STORE, measured  # noqa: E402
from benchmarks.planted import NOISE, Planted  # noqa: E402
from benchmarks.run import write_results  # noqa: E402
from cmdgpu.memory import parse_bytes, show_bytes  # noqa: E402

IN_FLIGHT = 8
SAMPLE_SHARE, SAMPLE_BYTES = 0.01, 1 << 20
"""What a sample may fetch from the device: this part of the store, or in a tiny one this much."""
CHECKED_ROWS = 2048
TINY = (20_000, 8, 6)
_PIECE = 1 << 20
_SAFETENSORS: Any = safetensors


@dataclass(frozen=True)
class Record:
    case: str
    stage: str
    bytes: int
    """What must be moved: read, and then written."""
    seconds: float
    gb_per_s: float
    plain: str | None
    """What the same bytes were moved by for the next figure."""
    plain_seconds: float | None
    times_plain: float | None
    peak_bytes: int
    limit_bytes: int
    device_read_bytes: int | None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


# ---- the same bytes by plain files ------------------------------------------------------------------------


def chunk_files(folder: Path, *arrays: str) -> list[Path]:
    """In the order of their rows, all snapshots of a chunk together: that of the pass."""
    return sorted((file for name in arrays for file in (folder / name).glob("c.*")), key=_by_index)


def _by_index(file: Path) -> list[int]:
    return [int(part) for part in file.name.split(".")[1:]]


def read_cold(files: Sequence[Path]) -> float:
    drop_from_cache(files)
    started = time.perf_counter()
    read_files(files, IN_FLIGHT, crc=False)
    return time.perf_counter() - started


def write_synced(folder: Path, sizes: Sequence[int]) -> float:
    """Random bytes, so that no disk makes them fewer: several files at a time and each flushed, or one after
    the other and one flush of all."""
    block = os.urandom(_PIECE)
    plain = folder / "plain"

    def write(number: int, *, flush: bool) -> None:
        with (plain / str(number)).open("wb", buffering=0) as file:
            for start in range(0, sizes[number], _PIECE):
                file.write(block[: sizes[number] - start])
            if flush:
                os.fsync(file.fileno())

    def several() -> None:
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            for _ in pool.map(functools.partial(write, flush=True), range(len(sizes))):
                pass

    def one_by_one() -> None:
        for number in range(len(sizes)):
            write(number, flush=False)
        os.sync()

    def timed(way: Callable[[], None]) -> float:
        plain.mkdir()
        os.sync()
        started = time.perf_counter()
        way()
        seconds = time.perf_counter() - started
        shutil.rmtree(plain)
        return seconds

    return min(timed(several), timed(one_by_one))


# ---- what came out ----------------------------------------------------------------------------------------


class Checks:
    """Chunks from both ends and the middle, against what was planted in them."""

    def __init__(self, folder: Path, planted: Planted) -> None:
        self._folder = folder
        self._planted = planted
        self._chunks = sorted({0, planted.n_chunks // 2, planted.n_chunks - 1})

    def _rows(self, i: int) -> slice:
        return slice(i * self._planted.rows, min((i + 1) * self._planted.rows, self._planted.map.n_rows))

    def synthesise(self) -> str | None:
        traj = cg.Trajectory.open(self._folder / STORE)
        for i in self._chunks:
            rows, t = self._rows(i), int(i % self._planted.n_snapshots)
            written = self._planted.chunk(i, t).values[: rows.stop - rows.start]
            if not np.array_equal(traj[rows, t], written):
                return f"chunk {i} of snapshot {t} holds other values than were written"
        return None

    def fit(self) -> str | None:
        """Labels that are the definition's, and of one planted mode each."""
        cmd, traj = cg.CMD.load(self._folder / RESULT), cg.Trajectory.open(self._folder / STORE)
        owner: dict[int, int] = {}
        for i in self._chunks:
            rows = self._rows(i)
            planted = self._planted.chunk(i, 0).mode[: rows.stop - rows.start]
            labels = np.asarray(cmd.labels_[rows])
            for mode in np.unique(labels).tolist():
                mine = np.unique(planted[labels == mode]).tolist()
                if mode < 0 or mine != [owner.setdefault(mode, mine[0])]:
                    return f"mode {mode} of chunk {i} has rows of the planted modes {mine}"
            looked = rows.start + np.arange(0, len(labels), -(-len(labels) // CHECKED_ROWS))
            W_nt = traj.read_rows(looked)
            truth = kernels.assign_and_fit_reference(W_nt, cmd.references_, time_major=False)
            other = (labels[looked - rows.start] != truth.mode) & (truth.margin > MARGIN)
            if other.any():
                return f"{int(other.sum())} of {len(looked)} rows of chunk {i} have other labels"
        return None

    def export(self) -> str | None:
        """Elements that are a r + b of their rows, and close to what was recorded."""
        t = self._planted.n_snapshots // 2
        cmd = cg.CMD.load(self._folder / RESULT)
        with _SAFETENSORS.safe_open(self._folder / FILE, framework="np") as file:
            for entry in (self._planted.map.tensors[k] for k in (0, len(self._planted.map) // 2, -1)):
                if not entry.n_rows:
                    continue
                first = entry.pieces[0].row
                i, at = divmod(first, self._planted.rows)
                n = min(entry.n_rows, self._planted.rows - at, CHECKED_ROWS)
                part = file.get_slice(entry.name)
                values = part[: -(-n // max(entry.n_rows // entry.shape[0], 1))].reshape(-1)[:n]
                mode, a, b = (
                    np.asarray(array[first : first + n]).astype(np.float64)
                    for array in (cmd.labels_, cmd.a_, cmd.b_)
                )
                rebuilt = a * cmd.references_[mode.astype(np.int64), t] + b
                if not np.array_equal(values, rebuilt.astype(np.float32)):
                    return f"{entry.name} is not a r + b"
                off = np.abs(values - self._planted.chunk(i, t).values[at : at + n]).max()
                if off > 6 * NOISE:
                    return f"{entry.name} is {off:.2g} from what was recorded"
        return None


# ---- the stages in turn --------------------------------------------------------------------------------

Sizes: TypeAlias = tuple[int, int, int]
"""Rows, snapshots, modes."""
Stage: TypeAlias = Callable[[str, Path, int, int, int], dict[str, Any]]


class Scale:
    """One store from its first byte to its last, and what was found on the way."""

    def __init__(self, folder: Path, sizes: Sizes, stage: Stage) -> None:
        self._folder = folder
        self._sizes = sizes
        self._stage = stage
        rows, snapshots, modes = sizes
        self._case = f"N={rows:.3g} T={snapshots} M={modes} float32"
        self.records: list[Record] = []
        self.problems: list[str] = []

    def run(self) -> None:
        rows, snapshots, _ = self._sizes
        store, result = self._folder / STORE, self._folder / RESULT
        checks = Checks(self._folder, Planted(rows, snapshots))
        row_arrays = ("mode", "a", "b")

        told = self._told("synthesise")
        weights = chunk_files(store, "weights")
        weight_bytes = _total(weights)
        self._note("synthesise", told, weight_bytes, None, None, checks.synthesise)

        drop_from_cache([*weights, *chunk_files(store, "sketch")])
        told = self._told("sample")
        self._note("sample", told, told["sampled"] * snapshots * 4, None, None)
        fetched = told.get("read_bytes", 0)
        if fetched > max(SAMPLE_SHARE * weight_bytes, SAMPLE_BYTES):
            self._fail(f"a sample fetched {show_bytes(fetched)} of {show_bytes(weight_bytes)}")

        per_chunk = Planted(rows, snapshots).rows
        sizes = [per_chunk * width + 4 for _ in range(len(weights) // snapshots) for width in (2, 4, 4, 4)]
        reading, writing = read_cold(weights), write_synced(self._folder, sizes)
        drop_from_cache([*weights, *chunk_files(store, "sketch")])
        told = self._told("fit")
        both = "a cold read of the store, then a synced write of the result"
        self._note("fit", told, weight_bytes + sum(sizes), both, reading + writing, checks.fit)

        results = chunk_files(result, *row_arrays)
        reading, writing = read_cold(results), write_synced(self._folder, [rows * 4])
        drop_from_cache([*results, *weights])
        told = self._told("export")
        both = "a cold read of mode, a and b, then a synced write of the file"
        self._note("export", told, _total(results) + rows * 4, both, reading + writing, checks.export)
        (self._folder / FILE).unlink()

        everything = chunk_files(result, *row_arrays, "correlation")
        for stage, files in (("verify", weights), ("verify-fit", everything)):
            reading = read_cold(files)
            drop_from_cache(files)
            told = self._told(stage)
            self._note(stage, told, _total(files), "a cold read", reading)
            if told["damaged"]:
                self._fail(f"{stage}: {told['damaged']} damaged chunks in a sound store")

    def _told(self, stage: str) -> dict[str, Any]:
        return self._stage(stage, self._folder, *self._sizes)

    def _note(
        self,
        stage: str,
        told: dict[str, Any],
        n_bytes: int,
        plain: str | None,
        plain_seconds: float | None,
        check: Callable[[], str | None] | None = None,
    ) -> None:
        seconds, limit = float(told["seconds"]), parse_bytes(LIMIT)
        record = Record(
            case=self._case,
            stage=stage,
            bytes=n_bytes,
            seconds=seconds,
            gb_per_s=n_bytes / seconds / 1e9,
            plain=plain,
            plain_seconds=plain_seconds,
            times_plain=None if plain_seconds is None else seconds / plain_seconds,
            peak_bytes=int(told["peak_bytes"]),
            limit_bytes=limit,
            device_read_bytes=told.get("read_bytes"),
            note=_words(told),
        )
        self.records.append(record)
        print(shown(record), flush=True)
        if record.peak_bytes > limit:
            self._fail(f"{stage} held {show_bytes(record.peak_bytes)}")
        if check is not None and (problem := check()) is not None:
            self._fail(f"{stage}: {problem}")

    def _fail(self, problem: str) -> None:
        print(f"  PROBLEM  {problem}", flush=True)
        self.problems.append(problem)


def _total(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _words(told: dict[str, Any]) -> str:
    words = [f"{told['tensors']} tensors"] if "tensors" in told else []
    words += [f"{show_bytes(told['planned_bytes'])} planned"] if "planned_bytes" in told else []
    words += [f"{name} {seconds:.1f} s" for name, seconds in told.get("stage_s", {}).items()]
    return ", ".join(words)


def shown(record: Record) -> str:
    times = "" if record.times_plain is None else f"{record.times_plain:5.2f} x {record.plain}"
    fetched = record.device_read_bytes
    read = "" if fetched is None else f", {show_bytes(fetched)} from the device"
    return (
        f"{record.stage:12}{record.seconds:8.1f} s  {record.gb_per_s:6.2f} GB/s  "
        f"peak {show_bytes(record.peak_bytes)}{read}  {times}  {record.note}"
    )


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="sizes for a test, all in this process")
    parser.add_argument("--rows", type=float, default=1e9)
    parser.add_argument("--snapshots", type=int, default=8)
    parser.add_argument("--modes", type=int, default=10)
    parser.add_argument("--in", dest="folder", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--out", type=Path, help="a file, by default results/<machine>/scale.json")
    options = parser.parse_args(arguments)
    rows, snapshots, modes = (
        TINY if options.tiny else (int(options.rows), int(options.snapshots), int(options.modes))
    )
    found = machine()
    out: Path = options.out or results_file("scale", found)
    if out.is_dir():
        parser.error(f"--out {out} is a folder: --in DIR is where to measure, --out names the JSON")
    place: Path | None = options.folder
    folder = Path(tempfile.mkdtemp(dir=place))
    try:
        needed = rows * (4 * snapshots + 18) + (1 << 20)
        if (free := shutil.disk_usage(folder).free) < needed:
            parser.error(f"{show_bytes(needed)} are needed in {folder}, {show_bytes(free)} are free")
        scale = Scale(
            folder,
            (rows, snapshots, modes),
            measured if options.tiny else partial(in_own_process, "one_stage.py"),
        )
        scale.run()
    finally:
        shutil.rmtree(folder)
    write_results(out, found, records=[record.to_json() for record in scale.records])
    if scale.problems:
        raise SystemExit("; ".join(scale.problems))
    return out


if __name__ == "__main__":
    main()
