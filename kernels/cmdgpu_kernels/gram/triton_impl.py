"""``gram_matrix`` in Triton: what may run it, and its launches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cmdgpu_kernels.dispatch import Problem
from cmdgpu_kernels.gram.sums import GRANULE, Gram
from cmdgpu_kernels.triton_here import architecture_of, current, triton_module
from cmdgpu_kernels.tuning import GRAM, GRAM_CAREFUL, GramLaunch

__all__ = ["TOLERANCE", "multiply", "refusals", "refusals_interpreted", "run"]


TRITON = triton_module("gram.triton_kernel")

PRODUCTS_BYTES = 128 * 2**20
"""Products of granules that wait to be added up, at most; one at least."""

_FEWEST_TURNS = (9, 0)
"""Capability with the largest blocks: each turn of a loop costs the interpreter alike."""

MARKED_ROWS = 256
"""Rows of a program that looks for rows to leave out."""

MOST_ROWS = max(launch.block_rows for launch in (*GRAM.values(), *GRAM_CAREFUL.values()))

DTYPES = ("float32", "float16", "bfloat16")
TOLERANCE = {"float32": 3e-6, "float16": 3e-6, "bfloat16": 3e-6}


def refusals(problem: Problem) -> tuple[str, ...]:
    """Every reason why the compiled kernels cannot serve the problem."""
    return (*TRITON.refusals(problem), *_refusals(problem))


def refusals_interpreted(problem: Problem) -> tuple[str, ...]:
    """Every reason why Triton's interpreter cannot serve the problem."""
    return (*TRITON.refusals_interpreted(problem), *_refusals(problem))


def _refusals(problem: Problem) -> list[str]:
    if problem.dtype not in DTYPES:
        return [f"dtype {problem.dtype} (supported: {', '.join(DTYPES)})"]
    return []


def run(W_tb: Tensor, *, threads: int | None = None) -> Gram:
    """Sum the rows of W_tb, (T, B) with any strides. ``threads`` means nothing here."""
    snapshots, rows = W_tb.shape
    device = W_tb.device
    launch = GRAM[architecture_of(device, _FEWEST_TURNS)]
    tile, tiles = launch.tiles(snapshots)
    width = tile * tiles
    at_once = max(PRODUCTS_BYTES // (4 * width * width), 1)
    high_tt, rest_tt = torch.zeros(2, width, width, dtype=torch.float64, device=device)
    left_out = 0
    with current(device):
        S_gtt = torch.empty(
            min(at_once, -(-rows // GRANULE)), width, width, dtype=torch.float32, device=device
        )
        for first in range(0, rows, at_once * GRANULE):
            block_tb = W_tb[:, first : first + at_once * GRANULE]
            step_t, step_n = block_tb.stride()
            # Rows of a product are addressed by 32 bits.
            if step_n != 1 and (step_t != 1 or step_n * MOST_ROWS >= 2**31):
                block_tb = block_tb.contiguous()
            left_out += multiply(block_tb, launch, S_gtt)
            TRITON.kernels.add_granules_kernel[(width * width // 256,)](
                S_gtt, high_tt, rest_tt, -(-block_tb.shape[1] // GRANULE), WIDTH=width, BLOCK=256
            )
    high, rest = (part[:snapshots, :snapshots].cpu().numpy().copy() for part in (high_tt, rest_tt))
    return Gram.unpacked(high, rest, left_out)


def multiply(W_tb: Tensor, launch: GramLaunch, S_gtt: Tensor) -> int:
    """Products of the granules of a block into the first of ``S_gtt``; the rows left out of them."""
    snapshots, rows = W_tb.shape
    granules = -(-rows // GRANULE)
    _, tiles = launch.tiles(snapshots)
    flag_gi = torch.empty(granules, tiles, dtype=torch.int32, device=W_tb.device)
    TRITON.kernels.gram_kernel[(granules, tiles, tiles)](
        W_tb, S_gtt, flag_gi, rows, **_cut(W_tb, launch.halved(snapshots))
    )
    # The device is waited for here: what comes next depends on the rows.
    which_k = flag_gi.any(dim=1).nonzero().flatten()
    return _multiply_carefully(W_tb, launch, S_gtt, which_k) if len(which_k) else 0


def _multiply_carefully(W_tb: Tensor, launch: GramLaunch, S_gtt: Tensor, which_k: Tensor) -> int:
    """The same for some of the granules, with each of their rows looked at."""
    snapshots, rows = W_tb.shape
    _, tiles = launch.tiles(snapshots)
    launch = replace(GRAM_CAREFUL[architecture_of(W_tb.device, _FEWEST_TURNS)], many=launch.many)
    left_out_k = torch.zeros(len(which_k), dtype=torch.int32, device=W_tb.device)
    counted_n = torch.ones(rows if tiles > 1 else 1, dtype=torch.int8, device=W_tb.device)
    if tiles > 1:
        # No program sees a whole row.
        TRITON.kernels.mark_rows_kernel[(len(which_k), GRANULE // MARKED_ROWS)](
            W_tb,
            which_k,
            counted_n,
            rows,
            W_tb.stride(0),
            W_tb.stride(1),
            T=snapshots,
            GRANULE=GRANULE,
            BLOCK_N=MARKED_ROWS,
        )
    TRITON.kernels.careful_kernel[(len(which_k), tiles, tiles)](
        W_tb, which_k, counted_n, S_gtt, left_out_k, rows, **_cut(W_tb, launch)
    )
    return rows - int(counted_n.sum()) if tiles > 1 else int(left_out_k.sum())


def _cut(W_tb: Tensor, launch: GramLaunch) -> dict[str, Any]:
    """What both kernels are told of the block's layout and of the launch."""
    time_major = W_tb.stride(1) == 1
    tile, tiles = launch.tiles(W_tb.shape[0])
    return {
        "ld": W_tb.stride(0) if time_major else 0,
        "LD": 0 if time_major else W_tb.stride(1),
        "T": W_tb.shape[0],
        "TILE": tile,
        "TILES": tiles,
        "GRANULE": GRANULE,
        "BLOCK_N": launch.block_rows,
        "STAGES": launch.stages,
        "TIME_MAJOR": time_major,
        "num_warps": launch.warps,
        # Variants of one kernel must round alike: only what is written as a fused multiply-add is one.
        "enable_fp_fusion": False,
    }
