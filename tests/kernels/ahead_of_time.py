"""Compile the kernel as the launcher would, without a GPU; print what the machine code looks like as JSON.

Run as a program, because Triton decides at import whether kernels are compiled or interpreted:

    env -u TRITON_INTERPRET python ahead_of_time.py 90 float32:100:10:even bfloat16:100:16:ragged:margin ...
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
from pathlib import Path
from typing import Any

import triton
from cmdgpu_kernels.assignment.triton_kernel import assign_and_fit_kernel
from cmdgpu_kernels.limits import PARTIAL
from cmdgpu_kernels.tuning import ASSIGN_AND_FIT
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ELEMENT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def variant(capability: int, description: str) -> dict[str, Any]:
    """Compile one variant, ``dtype:T:M:even|ragged[:margin]``, and look at its machine code."""
    dtype, snapshots, modes, *flags = description.split(":")
    launch = ASSIGN_AND_FIT[dtype]
    sweeps, count = launch.sweeps(int(modes))
    pointers = {
        "W_tb": f"*{ELEMENT[dtype]}",
        "Z_tm": "*fp32",
        "tail_cm": "*fp32",
        "index_m": "*i32",
        "mean_m": "*fp32",
        "rnorm_inv_m": "*fp32",
        "mode_n": "*i16",
        "a_n": "*fp32",
        "b_n": "*fp32",
        "correlation_n": "*fp32",
        "ss_n": "*fp32",
        "margin_n": "*fp32",
    }
    constants = {
        "T": int(snapshots),
        "PARTIAL": PARTIAL,
        "SWEEPS": sweeps,
        "COUNT": count,
        "BLOCK_N": launch.block_rows,
        "UNROLL": launch.unroll,
        "EVEN": "even" in flags,
        "MARGIN": "margin" in flags,
    }
    names = assign_and_fit_kernel.arg_names
    compiled = triton.compile(
        ASTSource(
            fn=assign_and_fit_kernel,
            signature={**pointers, "N": "i64", "ld": "i64", **dict.fromkeys(constants, "constexpr")},
            constexprs={(names.index(name),): value for name, value in constants.items()},
            # What the launcher finds for blocks padded to 16 elements; without it loads are 4 bytes wide.
            attrs={(names.index(name),): [["tt.divisibility", 16]] for name in [*pointers, "N", "ld"]},
        ),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.warps},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "-res-usage", cubin.name)
        code = _tool("nvdisasm", "-c", cubin.name)
    loads = re.findall(r"LDG\.E(?:\.\w+)*", code)
    return {
        "variant": description,
        "registers": int(_found(r"REG:(\d+)", usage)),
        "stack": int(_found(r"STACK:(\d+)", usage)),
        "local": int(_found(r"LOCAL:(\d+)", usage)),
        "shared": compiled.metadata.shared,
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "shuffles": len(re.findall(r"\bSHFL\b", code)),
        "loads_16_bytes": sum(".128" in load for load in loads),
        "loads": sorted(set(loads)),
    }


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, text
    return match.group(1)


if __name__ == "__main__":
    print(json.dumps([variant(int(sys.argv[1]), description) for description in sys.argv[2:]]))
