"""Compile the kernels as the launchers would, without a GPU; print what the machine code looks like as JSON.

Run as a program, because Triton decides at import whether kernels are compiled or interpreted. The first
argument is a compute capability, or gfx942; then variants: how a kernel is told apart, then its flags.

    env -u TRITON_INTERPRET python ahead_of_time.py 90 rows:float32:100:10:even tiles:float16:100:30:row-major
    env -u TRITON_INTERPRET python ahead_of_time.py gfx942 gram:float32:100:0:time-major ...
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportAttributeAccessIssue=false
# Triton's compiler has no types.

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from cmdgpu_kernels.assignment.triton_kernel import assign_and_fit_kernel
from cmdgpu_kernels.assignment.triton_tile_kernel import assign_and_fit_tile_kernel
from cmdgpu_kernels.gram.hopper_kernel import hopper_gram_kernel
from cmdgpu_kernels.gram.sums import GRANULE
from cmdgpu_kernels.gram.triton_impl import ADDED, AT_ONCE
from cmdgpu_kernels.gram.triton_kernel import (
    add_granules_kernel,
    careful_kernel,
    gram_kernel,
    gram_tiles_kernel,
)
from cmdgpu_kernels.limits import PARTIAL, SEGMENT
from cmdgpu_kernels.tuning import ASSIGN_AND_FIT, GRAM, GRAM_CAREFUL, GRAM_HOPPER, tiles_of
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

ELEMENT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

OUTPUTS = {
    "mode_n": "*i16",
    **dict.fromkeys(["a_n", "b_n", "correlation_n", "ss_n", "margin_n"], "*fp32"),
}
LOOKED_UP = {"index_m": "*i32", "mean_m": "*fp32", "rnorm_inv_m": "*fp32"}


@dataclass(frozen=True)
class Launch:
    """A kernel with the types and constants of one call."""

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any]
    source: Any = ASTSource


def rows(capability: int, dtype: str, snapshots: int, modes: int, flags: set[str]) -> Launch:
    """``assign_and_fit`` with one thread for whole rows."""
    launch = ASSIGN_AND_FIT[dtype].choose(modes)
    assert launch is not None, "tiles are for so many references"
    return Launch(
        assign_and_fit_kernel,
        {
            "W_tb": f"*{ELEMENT[dtype]}",
            "Z_tp": "*i64",
            "tail_cm": "*fp32",
            **LOOKED_UP,
            **OUTPUTS,
            "N": "i64",
            "ld": "i64",
        },
        {
            "T": snapshots,
            "SEGMENT": SEGMENT,
            "PARTIAL": PARTIAL,
            "COUNT": modes,
            "BLOCK_N": launch.block_rows,
            "RING": launch.ring,
            "EVEN": "even" in flags,
            "MARGIN": "margin" in flags,
        },
        {"num_warps": launch.warps},
    )


def row_stride(dtype: str, snapshots: int) -> int:
    """Elements from row to row in a block that the launcher reads as it lies, or copies."""
    step = 16 // BYTES[dtype]
    return -(-snapshots // step) * step


def tiles(capability: int, dtype: str, snapshots: int, modes: int, flags: set[str]) -> Launch:
    """``assign_and_fit`` on tiles of rows x snapshots."""
    time_major = "row-major" not in flags
    launch, sweeps = tiles_of(capability, BYTES[dtype], time_major=time_major, references=modes)
    return Launch(
        assign_and_fit_tile_kernel,
        {
            "W": f"*{ELEMENT[dtype]}",
            **dict.fromkeys(["high_mt", "low_mt", "tail_cm"], "*fp32"),
            **LOOKED_UP,
            **OUTPUTS,
            "N": "i64",
            "ld": "i64",
        },
        {
            "LD": 0 if time_major else row_stride(dtype, snapshots),
            "T": snapshots,
            "PARTIAL": PARTIAL,
            "SWEEPS": sweeps,
            "COUNT": launch.references,
            "BLOCK_N": launch.block_rows,
            "STAGES": launch.stages,
            "TIME_MAJOR": time_major,
            "EVEN": "even" in flags,
            "MARGIN": "margin" in flags,
        },
        {"num_warps": launch.warps, "enable_fp_fusion": False},
    )


def gram(capability: int, dtype: str, snapshots: int, modes: int, flags: set[str]) -> Launch:
    """``gram_matrix``: a granule by itself; as fast as it goes, or with care."""
    careful = "careful" in flags
    launch = GRAM_CAREFUL[capability] if careful else GRAM[capability].halved(snapshots)
    tile, count = launch.tiles(snapshots)
    time_major = "row-major" not in flags
    pointers = {"which_k": "*i64", "counted_n": "*i8", "left_out_k": "*i32"}
    tiled = {"TILE": tile, "TILES": count}
    if careful:
        kernel, cut = careful_kernel, tiled
    elif count == 1:
        kernel, pointers, cut = gram_kernel, {"flag_g": "*i32"}, {"TILE": tile}
    else:
        kernel, pointers, cut = gram_tiles_kernel, {"flag_gi": "*i32"}, tiled
    return Launch(
        kernel,
        {"W": f"*{ELEMENT[dtype]}", "S_gtt": "*fp32", **pointers, "N": "i64", "ld": "i64"},
        {
            "LD": 0 if time_major else row_stride(dtype, snapshots),
            "T": snapshots,
            **cut,
            "GRANULE": GRANULE,
            "BLOCK_N": launch.block_rows,
            "STAGES": launch.stages,
            "TIME_MAJOR": time_major,
        },
        {"num_warps": launch.warps, "enable_fp_fusion": False},
    )


def pipelined(capability: int, dtype: str, snapshots: int, modes: int, flags: set[str]) -> Launch:
    """``gram_matrix`` of Hopper: a product is made while the next one is prepared."""
    tile, _ = GRAM[capability].tiles(snapshots)
    return Launch(
        hopper_gram_kernel,
        {"W": f"*{ELEMENT[dtype]}", "S_gtt": "*fp32", "flag_g": "*i32", "N": "i64", "ld": "i64"},
        {
            "T": snapshots,
            "TILE": tile,
            "GRANULE": GRANULE,
            "BLOCK_N": GRAM_HOPPER.block_rows,
            "STAGES": GRAM_HOPPER.stages,
            "num_warps": GRAM_HOPPER.warps,
        },
        {"num_warps": GRAM_HOPPER.warps, "enable_fp_fusion": False},
        GluonASTSource,
    )


def granules(capability: int, dtype: str, snapshots: int, modes: int, flags: set[str]) -> Launch:
    """The sum of granules in float64."""
    return Launch(
        add_granules_kernel,
        {"S_gtt": "*fp32", "skip_g": "*i32", "high_tt": "*fp64", "rest_tt": "*fp64", "granules": "i32"},
        {"WIDTH": 128, "BLOCK": ADDED, "AT_ONCE": AT_ONCE},
        {"num_warps": 2},
    )


KERNELS = {function.__name__: function for function in (rows, tiles, gram, pipelined, granules)}


def compiled(target: str, description: str) -> Any:
    """Compile one variant: kernel:dtype:T:M[:even|ragged][:margin][:time-major|row-major][:odd-N|odd-W].

    gram also takes careful.
    """
    kernel, dtype, snapshots, modes, *flags = description.split(":")
    amd = not target.isdigit()
    # AMD's 64 KB of shared memory take the smaller tiles.
    launch = KERNELS[kernel](80 if amd else int(target), dtype, int(snapshots), int(modes), set(flags))
    names = launch.kernel.arg_names
    # What the launcher finds for blocks padded to 16 elements; without it loads are 4 bytes wide.
    divisible = [name for name, kind in launch.types.items() if kind[0] == "*" or name in ("N", "ld")]
    divisible = [name for name in divisible if f"odd-{name}" not in flags]
    return triton.compile(
        launch.source(
            fn=launch.kernel,
            signature={**launch.types, **dict.fromkeys(launch.constants, "constexpr")},
            constexprs={(names.index(name),): value for name, value in launch.constants.items()},
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in divisible},
        ),
        target=GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target), 32),
        options=launch.options,
    )


def on_nvidia(capability: str, description: str) -> dict[str, Any]:
    result = compiled(capability, description)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(result.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "-res-usage", cubin.name)
        code = _tool("nvdisasm", "-c", cubin.name)
    loads = re.findall(r"\b(?:LDG|LDGSTS)\.E(?:\.\w+)*", code)
    return {
        "variant": description,
        "registers": int(_found(r"REG:(\d+)", usage)),
        "stack": int(_found(r"STACK:(\d+)", usage)),
        "local": int(_found(r"LOCAL:(\d+)", usage)),
        "shared": result.metadata.shared,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "shuffles": len(re.findall(r"\bSHFL\b", code)),
        "barriers": len(re.findall(r"\bBAR\.SYNC\b", code)),
        "loads_8_bytes": sum(".64" in load or ".128" in load for load in loads),
        "loads_16_bytes": sum(".128" in load for load in loads),
        "loads": sorted(set(loads)),
        "hopper_products": len(re.findall(r"\bHGMMA\b", code)),
        "row_sums": row_sums(result.asm["ttgir"]),
        "ampere_products": len(re.findall(r"\bHMMA\b", code)),
    }


def row_sums(code: str) -> list[str]:
    """Which lane holds what of each tile that is summed along a row: it decides the order of the sum."""
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", code, re.MULTILINE))
    found = re.findall(r"\(tensor<\d+x\d+xf32, (#\w+)>\) -> tensor<\d+xf32", code)
    # Of the products only one per row is not 0, when they are summed; the moments come before.
    return [layouts[name] for name in found[:2]]


def on_amd(target: str, description: str) -> dict[str, Any]:
    result = compiled(target, description)
    code = result.asm["amdgcn"]
    return {
        "variant": description,
        "registers": int(_found(r"\.vgpr_count:\s*(\d+)", code)),
        "spills": int(_found(r"\.vgpr_spill_count:\s*(\d+)", code)),
        "shared": result.metadata.shared,
        "products": len(re.findall(r"\bv_mfma_", code)),
    }


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, text
    return match.group(1)


if __name__ == "__main__":
    look = on_nvidia if sys.argv[1].isdigit() else on_amd
    print(json.dumps([look(sys.argv[1], description) for description in sys.argv[2:]]))
