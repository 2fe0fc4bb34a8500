"""The Triton kernels compiled for GPUs without one: no spill, wide loads, tensor cores, shared memory."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cmdgpu_kernels.tuning import ASSIGN_AND_FIT, SHARED_BYTES

PROGRAM = Path(__file__).with_name("ahead_of_time.py")
# Every entry of the launch table, with the most references it is for; short and long rows, several segments.
ROWS = [
    f"rows:{dtype}:{snapshots}:{launch.most}:{shape}"
    for dtype, table in ASSIGN_AND_FIT.items()
    if dtype != "float16"  # what bfloat16 takes, with another conversion
    for launch in table.launches
    for snapshots, shape in (
        (3, "even"),
        (100, "even"),
        (257, "ragged"),
        (1000, "ragged:margin"),
    )
]
ROWS.append("rows:float16:100:10:even")
# Every entry of the launch table: one sweep of 16 to 128 references, several sweeps; both layouts and sizes.
TILES = [
    f"tiles:{dtype}:{snapshots}:{modes}:{shape}:{layout}"
    for dtype in ("float32", "bfloat16")
    for layout in ("time-major", "row-major")
    for snapshots, modes, shape in (
        (100, 10, "even"),
        (100, 30, "even"),
        (1000, 64, "ragged"),
        (1000, 100, "ragged:margin"),
        (1000, 200, "ragged:margin"),
    )
]
MODULES_OF_KERNELS = [
    "cmdgpu_kernels.device_math",
    "cmdgpu_kernels.assignment.triton_kernel",
    "cmdgpu_kernels.assignment.triton_tile_kernel",
    "cmdgpu_kernels.assignment.triton_epilogue",
    "cmdgpu_kernels.gram.triton_kernel",
]
GRAMS = [
    f"gram:{dtype}:{snapshots}:0:{layout}{care}"
    for dtype in ("float32", "bfloat16")
    for layout in ("time-major", "row-major")
    for snapshots in (50, 100, 200)
    for care in ("", ":careful")
]

PIPELINED = [
    f"pipelined:{dtype}:{snapshots}:0"
    for dtype in ("float32", "float16", "bfloat16")
    for snapshots in (50, 100)
]


def compiled(target: str, variants: list[str]) -> list[dict[str, Any]]:
    """In a process of its own: whether a kernel is interpreted is decided when triton is imported."""
    pytest.importorskip("triton", reason="triton is not installed: there is nothing to compile")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), target, *variants],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [one["variant"] for one in found] == variants
    return found


def in_registers(one: dict[str, Any]) -> bool:
    return one["spills"] == one["stack"] == one["local"] == 0


def test_every_shipped_variant_fits_a_hopper_without_spills_and_reads_wide() -> None:
    for one in compiled("90", ROWS):
        assert in_registers(one), one
        # No row is shared by lanes, and no pointer changes its layout on the way.
        assert one["shuffles"] == 0 and one["barriers"] == 0, one
        if one["variant"].endswith("even"):
            assert one["loads_8_bytes"] >= 3, one


def test_it_compiles_for_ampere_too() -> None:
    (found,) = compiled("80", ["rows:float32:100:10:even"])
    assert found["spills"] == 0 and found["loads_8_bytes"] >= 4, found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "variants"),
    [
        (90, TILES),
        # Its table has no entry for 64, and T changes least where the rest is largest.
        (80, [variant for variant in TILES if ":100:30:" in variant or ":200:" in variant]),
        (90, [*GRAMS, *PIPELINED, "granules:float32:1:0"]),
        (80, [*GRAMS, "granules:float32:1:0"]),
    ],
    ids=["tiles-90", "tiles-80", "gram-90", "gram-80"],
)
def test_tiles_use_tensor_cores_without_spills_within_shared_memory(
    capability: int, variants: list[str]
) -> None:
    for one in compiled(str(capability), variants):
        assert in_registers(one), one
        assert one["shared"] <= SHARED_BYTES[capability], one
        kernel, dtype, snapshots, *flags = one["variant"].split(":")
        # Contiguous rows are read as far as the mask of the last snapshots is a multiple of what is read.
        whole = "row-major" not in flags or int(snapshots) % (4 if dtype == "float32" else 8) == 0
        if kernel != "granules":
            assert one["loads_16_bytes"] >= 1 or not whole, one
            assert (one["hopper_products"] > 0) == (capability == 90), one
            assert (one["ampere_products"] > 0) == (capability == 80), one


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["tiles:float32:100:30:time-major", "tiles:bfloat16:100:30:row-major"])
def test_a_row_is_summed_by_the_same_lanes_whatever_the_number_of_rows(variant: str) -> None:
    """Not so for a block that begins off 16 bytes: the launcher copies it."""
    same = [f"{variant}:{flags}" for flags in ("even", "ragged", "ragged:odd-N", "even:margin")]
    *found, unaligned = compiled("90", [*same, f"{variant}:even:odd-W"])
    assert len(found[0]["row_sums"]) == 2
    assert all(one["row_sums"] == found[0]["row_sums"] for one in found)
    assert unaligned["row_sums"] != found[0]["row_sums"]


@pytest.mark.slow
def test_the_kernels_compile_for_an_accelerator_of_another_make() -> None:
    """AMD's gfx942, from Ampere's table: compiled only, so that nothing in a kernel is tied to one make."""
    pytest.importorskip("triton.backends.amd", reason="this triton has no compiler for AMD")
    variants = [
        "rows:float32:100:10:even",
        "tiles:float32:100:30:even:time-major",
        "gram:float32:100:0:time-major",
    ]
    for one in compiled("gfx942", variants):
        assert one["shared"] <= 65_536, one
        assert one["spills"] == 0, one
        assert (one["products"] > 0) == (not one["variant"].startswith("rows")), one


def test_constants_of_kernels_equal_themselves() -> None:
    """Triton compares the globals of a kernel with those it was compiled with, at every launch: no NaN."""
    triton = pytest.importorskip("triton", reason="triton is not installed: there is nothing to launch")
    seen = 0
    for module in MODULES_OF_KERNELS:
        for name, value in vars(importlib.import_module(module)).items():
            if isinstance(value, triton.language.constexpr):
                seen += 1
                assert value.value == value.value, f"{module}.{name}"
    assert seen >= 4, "the constants are no longer found"
