"""The Triton kernel compiled for GPUs without one: no spill, wide loads, no shuffle, within shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("ahead_of_time.py")
VARIANTS = [
    f"{dtype}:{snapshots}:{modes}:{shape}"
    for dtype in ("float32", "bfloat16", "float16")
    for snapshots, modes, shape in (
        (100, 1, "even"),
        (100, 10, "even"),
        (100, 16, "even"),
        (61, 10, "even"),
        (100, 10, "ragged"),
        (1000, 5, "ragged:margin"),
        (1000, 16, "margin:even"),
    )
]
SHARED_LIMIT = 232_448


def compiled(capability: int, variants: list[str]) -> list[dict[str, Any]]:
    """In a process of its own: whether a kernel is interpreted is decided when triton is imported."""
    pytest.importorskip("triton", reason="triton is not installed: there is nothing to compile")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(capability), *variants],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_shipped_variant_fits_a_hopper_without_spills_and_reads_sixteen_bytes() -> None:
    found = compiled(90, VARIANTS)
    assert [one["variant"] for one in found] == VARIANTS
    for one in found:
        assert one["spills"] == one["stack"] == one["local"] == 0, one
        assert one["shuffles"] == 0 and one["shared"] <= SHARED_LIMIT, one
        if one["variant"].endswith("even"):
            assert one["loads_16_bytes"] >= 4, one


def test_it_compiles_for_ampere_too() -> None:
    (found,) = compiled(80, ["float32:100:10:even"])
    assert found["spills"] == 0 and found["loads_16_bytes"] >= 4, found
