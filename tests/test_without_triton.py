"""A machine without triton is a whole machine: everything runs, and the doctor says why triton does not."""

from __future__ import annotations

import json
import subprocess
import sys

BLOCKED = """
import sys
sys.modules["triton"] = None
"""


def _run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCKED + script, *arguments], capture_output=True, text=True, check=False
    )


def test_a_fit_needs_no_triton() -> None:
    done = _run(
        """
import numpy as np
import cmdgpu
W = np.cumsum(np.random.default_rng(0).standard_normal((300, 20)), axis=1).astype(np.float32)
cmd = cmdgpu.CMD(n_modes=2, n_samples=100).fit(W)
assert "triton" not in cmd.metrics_["implementation"], cmd.metrics_
row = int(cmd.reference_rows_[0])
assert cmd.labels_[row] == 0 and abs(cmd.a_[row] - 1) < 1e-6
print("fitted")
"""
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "fitted"


def test_the_doctor_says_why_a_gpu_would_not_run_triton() -> None:
    done = _run(
        """
from cmdgpu_kernels import Problem, choose
chosen, refused = choose(Problem(dtype="float32", snapshots=8, modes=2, device="cuda"))
assert chosen.name == "torch"
assert any("triton cannot be imported" in reason for reason in refused["triton"]), refused
from cmdgpu.cli import cli
cli.main(["doctor", "--json"], prog_name="cmdgpu")
"""
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ok"] and "triton" not in found["implementations"]["assign_and_fit"]["cpu"]["chosen"]
