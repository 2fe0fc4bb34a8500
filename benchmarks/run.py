"""Run the CPU benchmark and write one JSON file: ``python benchmarks/run.py [--tiny] [--out FILE]``."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks are no installed package

import torch  # noqa: E402

from benchmarks.cases import CPU_CASES, TINY_CASES  # noqa: E402
from benchmarks.measure import measure  # noqa: E402


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    asked = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else None


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="sizes for a test, not for a figure")
    parser.add_argument("--runs", type=int, default=7, help="runs of each provider and case")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "cpu.json")
    options = parser.parse_args(arguments)
    records: list[dict[str, Any]] = []
    for case in TINY_CASES if options.tiny else CPU_CASES:
        for record in measure(case, options.runs):
            print(
                f"{record.case:52}  {record.provider:13}  {record.median_ms:9.1f} ms  "
                f"{record.gb_per_s:6.2f} GB/s  {record.percent_of_ceiling:5.1f} % of reading",
                flush=True,
            )
            records.append(record.to_json())
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": machine(), "records": records}, indent=1) + "\n")
    return options.out


if __name__ == "__main__":
    main()
