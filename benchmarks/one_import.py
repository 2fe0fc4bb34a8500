"""One import in a process of its own: ``one_import.py FOLDER OUT MEMORY_LIMIT``, figures as JSON.

The peak is anonymous and shared memory, sampled every millisecond, above what was held after the imports and
a tiny run: what a memory limit is about. Pages of files are the system's to take back.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks are no installed package

import torch  # noqa: E402

from cmdgpu.importing import carry_out, plan_checkpoints  # noqa: E402
from cmdgpu.memory import MemoryMeter  # noqa: E402


def main(folder: str, out: str, memory_limit: str) -> None:
    tiny = Path(f"{out}.tiny")
    tiny.mkdir()
    torch.save({"w": torch.zeros(300)}, tiny / "step-0.pt")
    carry_out(plan_checkpoints(tiny, tiny / "out.zarr"))
    shutil.rmtree(tiny)
    started = time.perf_counter()
    with MemoryMeter(0.001) as meter:
        plan = plan_checkpoints(folder, out, memory_limit=memory_limit)
        planned = time.perf_counter()
        report = carry_out(plan)
    found = {
        "seconds": time.perf_counter() - started,
        "plan_seconds": planned - started,
        "peak_bytes": meter.above_start_bytes,
        "planned_bytes": plan.needed_bytes,
        "n_added": report.n_added,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
