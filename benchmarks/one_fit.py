"""One fit in a process of its own: ``one_fit.py STORE OUT MODES DEVICE [--peak]``, figures as JSON.

``--peak`` is anonymous and shared memory, sampled every millisecond, above what was held after the imports
and a tiny fit: what a memory limit is about. Pages of files are the system's to take back. Sampling takes a
part of a core, so that a run that is timed does without.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks are no installed package

import numpy as np  # noqa: E402

import cmdgpu as cg  # noqa: E402
from cmdgpu.memory import MemoryMeter  # noqa: E402


def main(store: str, out: str, modes: str, device: str, peak: str = "") -> None:
    tiny = np.random.default_rng(0).standard_normal((512, 8)).cumsum(axis=1).astype(np.float32)
    cg.CMD(n_modes=2, device=device).fit(tiny)
    started = time.perf_counter()
    with MemoryMeter(0.001) if peak else contextlib.nullcontext() as meter:
        cmd = cg.CMD(n_modes=int(modes), device=device).fit(cg.Trajectory.open(store), out=out)
    seconds = time.perf_counter() - started
    peak_bytes = None if meter is None else meter.above_start_bytes
    found = {"seconds": seconds, "peak_bytes": peak_bytes, "metrics": cmd.metrics_}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
