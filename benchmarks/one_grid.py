"""Fits of one store in a process of its own: ``one_grid.py STORE OUT MODES SEEDS``, figures as JSON.

``read_bytes`` is what the kernel fetched from the device meanwhile.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks are no installed package

import numpy as np  # noqa: E402

import cmdgpu as cg  # noqa: E402
from benchmarks.one_stage import device_bytes  # noqa: E402
from cmdgpu.batch import fit_grid  # noqa: E402
from cmdgpu.cli.steps import parse_numbers  # noqa: E402


def main(store: str, out: str, modes: str, seeds: str) -> None:
    tiny = np.random.default_rng(0).standard_normal((512, 8)).cumsum(axis=1).astype(np.float32)
    cg.CMD(n_modes=2, device="cpu").fit(tiny)
    before, started = device_bytes(), time.perf_counter()
    fits = fit_grid(
        [store], out, n_modes=parse_numbers("MODES", modes), seeds=parse_numbers("SEEDS", seeds), device="cpu"
    )
    seconds = time.perf_counter() - started
    fetched = {name: now - before[name] for name, now in device_bytes().items()}
    for fit in fits:
        if fit.error is not None:
            raise fit.error
    metrics = fits[0].cmd.metrics_
    found = {
        "fits": len(fits),
        "seconds": seconds,
        "pass_seconds": metrics["stage_s"]["pass"],
        "bytes_read": metrics["bytes_read"],
        "planned_bytes": metrics["planned_bytes"],
        "result_bytes": sum(fit.cmd.metrics_["result_bytes"] for fit in fits),
        **fetched,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
