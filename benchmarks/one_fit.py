"""One fit in a process of its own: ``python benchmarks/one_fit.py STORE OUT MODES``, figures as JSON.

The peak is the process's high-water mark above what it held after its imports and a tiny fit.
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


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"this system does not tell {field}")


def main(store: str, out: str, modes: str) -> None:
    tiny = np.random.default_rng(0).standard_normal((512, 8)).cumsum(axis=1).astype(np.float32)
    cg.CMD(n_modes=2).fit(tiny)
    with contextlib.suppress(OSError):  # forget the mark of the imports; where that is refused it only grows
        Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    started = time.perf_counter()
    cmd = cg.CMD(n_modes=int(modes)).fit(cg.Trajectory.open(store), out=out)
    seconds = time.perf_counter() - started
    peak = _status_bytes("VmHWM") - before
    print(json.dumps({"seconds": seconds, "peak_bytes": peak, "metrics": cmd.metrics_}))


if __name__ == "__main__":
    main(*sys.argv[1:])
