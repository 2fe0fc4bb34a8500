"""What the figures were measured on, the folder of results that has its name, and processes of their own."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """Processor, threads and versions; the device, too, when it is none of the host's."""
    found: dict[str, Any] = {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }
    if device is not None and device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    found["name"] = slug(found)
    return found


def slug(found: dict[str, Any]) -> str:
    """``xeon-2-threads-avx512``: the words of the processor's name that tell one from another."""
    if "gpu" in found:
        words = re.findall(r"[a-z0-9]+", str(found["gpu"]).lower())
        return "-".join(word for word in words if word != "nvidia")
    name = re.sub(
        r"\((r|tm|c)\)|@.*|\bcpu\b|\bprocessor\b|\bintel\b|\bamd\b|\d+-core", "", found["cpu"].lower()
    )
    words = re.findall(r"[a-z0-9]+", name) or ["cpu"]
    return "-".join([*words, str(found["threads"]), "threads", str(found["capability"]).lower()])


def results_file(suite: str, found: dict[str, Any]) -> Path:
    return RESULTS / found["name"] / f"{suite}.json"


def in_own_process(script: str, *arguments: object) -> dict[str, Any]:
    """The JSON that a script of this folder prints last, run in a process of its own."""
    asked = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)]
    ended = subprocess.run(asked, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{script} failed:\n{ended.stderr}")
    return json.loads(ended.stdout.splitlines()[-1])


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """Short hash of the measured tree; a tree that is not that commit says so."""
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False)
    return answer.stdout.strip() if answer.returncode == 0 else None
