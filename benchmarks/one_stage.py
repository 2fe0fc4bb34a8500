"""One stage of ``scale.py`` or ``page.py`` in a process: ``one_stage.py STAGE FOLDER ROWS SNAPSHOTS MODES``.

Answers with figures as JSON. The peak is anonymous and shared memory above what was held after the imports
and the same stage of a tiny store; ``read_bytes`` is what the kernel fetched from the device meanwhile.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks are no installed package

import cmdgpu as cg  # noqa: E402
from benchmarks.planted import Planted, PlantedColumn  # noqa: E402
from cmdgpu.memory import MemoryMeter  # noqa: E402
from cmdgpu.results.verification import verify_result  # noqa: E402
from cmdgpu.sampling import draw_sample  # noqa: E402
from cmdgpu.store.journal import Journal  # noqa: E402

N_SAMPLES = 1000
LIMIT = "2GiB"
STORE, RESULT, FILE, PAGE = "run.zarr", "run.cmd.zarr", "step.safetensors", "report.html"
TINY = (3000, 6, 2)


def synthesise(folder: Path, rows: int, snapshots: int, modes: int) -> dict[str, Any]:
    del modes
    planted = Planted(rows, snapshots)
    journal = Journal.create(
        folder / STORE,
        planted.map,
        dtype="float32",
        rows=planted.rows,
        unit="step",
        sketch_rows=planted.sketch_rows,
    )
    try:
        for t in range(snapshots):
            journal.append_column(PlantedColumn(planted, t), 10 * t, {})
    finally:
        journal.close()
    return {"tensors": len(planted.map), "rows_per_chunk": planted.rows}


def sample(folder: Path, rows: int, snapshots: int, modes: int) -> dict[str, Any]:
    del rows, snapshots, modes
    traj = cg.Trajectory.open(folder / STORE)
    values = traj.read_rows(draw_sample(traj.parameters, N_SAMPLES, "layer-balanced", 0).rows)
    return {"sampled": len(values)}


def fit(folder: Path, rows: int, snapshots: int, modes: int) -> dict[str, Any]:
    del rows, snapshots
    traj = cg.Trajectory.open(folder / STORE)
    cmd = cg.CMD(n_modes=modes, n_samples=N_SAMPLES, device="cpu")
    cmd.fit(traj, out=folder / RESULT, memory_limit=LIMIT)
    said = cmd.metrics_
    return {key: said[key] for key in ("planned_bytes", "stage_s", "implementation", "r2")}


def report(folder: Path, rows: int, snapshots: int, modes: int) -> dict[str, Any]:
    del rows, snapshots, modes
    made = cg.report(folder / RESULT, folder / PAGE)
    return {"page_bytes": made.n_bytes, "resident_bytes": most_held(), "figures": list(made.figures)}


def most_held() -> int:
    """The most that this process has held so far; getrusage would tell of the one it was forked from, too."""
    told = Path("/proc/self/status").read_text(encoding="ascii")
    return int(told.partition("VmHWM:")[2].split()[0]) << 10


def export(folder: Path, rows: int, snapshots: int, modes: int) -> dict[str, Any]:
    del rows, modes
    written = cg.CMD.load(folder / RESULT).export(folder / FILE, step=10 * (snapshots // 2))
    return {"file_bytes": written.n_bytes}


def verify(folder: Path, rows: int, snapshots: int, modes: int) -> dict[str, Any]:
    del rows, snapshots, modes
    return {"damaged": len(cg.Trajectory.open(folder / STORE).verify())}


def verify_fit(folder: Path, rows: int, snapshots: int, modes: int) -> dict[str, Any]:
    del rows, snapshots, modes
    return {"damaged": len(verify_result(folder / RESULT).damaged)}


STAGES: dict[str, Callable[[Path, int, int, int], dict[str, Any]]] = {
    "synthesise": synthesise,
    "sample": sample,
    "fit": fit,
    "report": report,
    "export": export,
    "verify": verify,
    "verify-fit": verify_fit,
}
"""In their order."""


def device_bytes() -> dict[str, int]:
    """What the device has fetched and taken for this process; nothing where the kernel does not say."""
    io = Path("/proc/self/io")
    if not io.exists():
        return {}
    told = dict(line.split(": ") for line in io.read_text().splitlines())
    return {name: int(told[name]) for name in ("read_bytes", "write_bytes")}


def measured(stage: str, folder: Path, rows: int, snapshots: int, modes: int) -> dict[str, Any]:
    """Figures of the stage: its own, its seconds, its peak above what is held now, bytes of the device."""
    before, started = device_bytes(), time.perf_counter()
    with MemoryMeter() as meter:
        found = STAGES[stage](folder, rows, snapshots, modes)
    found["seconds"] = time.perf_counter() - started
    found["peak_bytes"] = meter.above_start_bytes
    return found | {name: now - before[name] for name, now in device_bytes().items()}


def main(stage: str, folder: str, rows: str, snapshots: str, modes: str) -> None:
    tiny = Path(tempfile.mkdtemp(dir=Path(folder)))
    for name, work in STAGES.items():
        work(tiny, *TINY)
        if name == stage:
            break
    shutil.rmtree(tiny)
    print(json.dumps(measured(stage, Path(folder), int(rows), int(snapshots), int(modes))))


if __name__ == "__main__":
    main(*sys.argv[1:])
