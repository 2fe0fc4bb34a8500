"""``gram_matrix`` in Triton: what may run it, and its launches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cmdgpu_kernels.dispatch import Problem
from cmdgpu_kernels.gram.sums import GRANULE, Gram, symmetric
from cmdgpu_kernels.triton_here import architecture_of, current, triton_module
from cmdgpu_kernels.tuning import GRAM, GRAM_CAREFUL, GRAM_HOPPER, GramLaunch, HopperGramLaunch

__all__ = ["TOLERANCE", "multiply", "multiply_on_hopper", "refusals", "refusals_interpreted", "run"]


TRITON = triton_module("gram.triton_kernel")
HOPPER = triton_module("gram.hopper_kernel", optional=True)

PRODUCTS_BYTES = 128 * 2**20
"""Products of granules that wait to be added up, at most; one at least."""

_FEWEST_TURNS = (9, 0)
"""Capability with the largest blocks: each turn of a loop costs the interpreter alike."""

MARKED_ROWS = 256
"""Rows of a program that looks for rows to leave out."""

ADDED = 64
"""Entries of a program that adds granules up: one a thread, and programs for every core."""
AT_ONCE = 16

ALIGNED = 16
"""Elements between snapshots, and bytes to the first one, that loads of 16 bytes ask for."""

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
    blocks = [W_tb[:, first : first + at_once * GRANULE] for first in range(0, rows, at_once * GRANULE)]
    high_tt, rest_tt = torch.zeros(2, width, width, dtype=torch.float64, device=device)
    left_out = 0
    on_hopper = _is_for_hopper(W_tb, tiles)
    with current(device):
        S_gtt = torch.empty(min(at_once, -(-rows // GRANULE)), width, width, device=device)
        flags: list[Tensor] = []
        for block_tb in blocks:
            if on_hopper:
                flags.append(multiply_on_hopper(block_tb, GRAM_HOPPER, S_gtt))
            else:
                flags.append(multiply(_addressable(block_tb), launch, S_gtt))
            _add(S_gtt, flags[-1], high_tt, rest_tt)
        # The device is waited for once: what is left to do depends on the rows.
        flagged = bool(flags) and bool(torch.cat(flags).any())
        for block_tb, flag_g in zip(blocks, flags, strict=True) if flagged else ():
            if len(which_k := flag_g.nonzero().flatten()):
                left_out += _multiply_carefully(_addressable(block_tb), launch, S_gtt, which_k)
                _add(S_gtt, 1 - flag_g, high_tt, rest_tt)
    high, rest = symmetric(high_tt.cpu().numpy(), rest_tt.cpu().numpy())
    return Gram.unpacked(high[:snapshots, :snapshots], rest[:snapshots, :snapshots].copy(), left_out)


def _addressable(block_tb: Tensor) -> Tensor:
    """The block, or a copy that the kernels can read: contiguous in one direction, and in 32 bits."""
    step_t, step_n = block_tb.stride()
    far = step_n != 1 and (step_t != 1 or step_n * MOST_ROWS >= 2**31)
    return block_tb.contiguous() if far else block_tb


def _add(S_gtt: Tensor, skip_g: Tensor, high_tt: Tensor, rest_tt: Tensor) -> None:
    """Add the first granules to the sum, but for some."""
    width = len(high_tt)
    # The interpreter runs one program after the other.
    block = ADDED if S_gtt.is_cuda else width * width
    TRITON.kernels.add_granules_kernel[(width * width // block,)](
        S_gtt, skip_g, high_tt, rest_tt, len(skip_g), WIDTH=width, BLOCK=block, AT_ONCE=AT_ONCE, num_warps=2
    )


def multiply(W_tb: Tensor, launch: GramLaunch, S_gtt: Tensor) -> Tensor:
    """Products of a block's granules into the first of ``S_gtt``; (granules,) 1 where care is needed."""
    snapshots, rows = W_tb.shape
    granules = -(-rows // GRANULE)
    tile, tiles = launch.tiles(snapshots)
    flag_gi = torch.empty(granules, tiles, dtype=torch.int32, device=W_tb.device)
    if tiles == 1:
        TRITON.kernels.gram_kernel[(granules,)](W_tb, S_gtt, flag_gi, rows, TILE=tile, **_cut(W_tb, launch))
    else:
        TRITON.kernels.gram_tiles_kernel[(granules, tiles, tiles)](
            W_tb, S_gtt, flag_gi, rows, TILE=tile, TILES=tiles, **_cut(W_tb, launch.halved(snapshots))
        )
    return flag_gi.amax(dim=1)


def multiply_on_hopper(W_tb: Tensor, launch: HopperGramLaunch, S_gtt: Tensor) -> Tensor:
    """The same for an aligned block of few snapshots."""
    snapshots, rows = W_tb.shape
    granules = -(-rows // GRANULE)
    flag_g = torch.empty(granules, dtype=torch.int32, device=W_tb.device)
    HOPPER.kernels.hopper_gram_kernel[(granules,)](
        W_tb,
        S_gtt,
        flag_g,
        rows,
        W_tb.stride(0),
        T=snapshots,
        TILE=S_gtt.shape[1],
        GRANULE=GRANULE,
        BLOCK_N=launch.block_rows,
        STAGES=launch.stages,
        num_warps=launch.warps,
        enable_fp_fusion=False,
    )
    return flag_g


def _is_for_hopper(W_tb: Tensor, tiles: int) -> bool:
    """Whether the pipelined kernel can take every block of W_tb, as it lies."""
    return (
        HOPPER.absent is None
        and W_tb.device.type == "cuda"
        and torch.cuda.get_device_capability(W_tb.device)[0] == 9
        and tiles == 1
        and W_tb.stride(1) == 1
        and W_tb.stride(0) % ALIGNED == 0
        and W_tb.data_ptr() % ALIGNED == 0
    )


def _multiply_carefully(W_tb: Tensor, launch: GramLaunch, S_gtt: Tensor, which_k: Tensor) -> int:
    """The same for some of the granules, with each of their rows looked at."""
    snapshots, rows = W_tb.shape
    tile, tiles = launch.tiles(snapshots)
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
        W_tb, which_k, counted_n, S_gtt, left_out_k, rows, TILE=tile, TILES=tiles, **_cut(W_tb, launch)
    )
    return rows - int(counted_n.sum()) if tiles > 1 else int(left_out_k.sum())


def _cut(W_tb: Tensor, launch: GramLaunch) -> dict[str, Any]:
    """What each kernel is told of the block's layout and of the launch."""
    time_major = W_tb.stride(1) == 1
    return {
        "ld": W_tb.stride(0) if time_major else 0,
        "LD": 0 if time_major else W_tb.stride(1),
        "T": W_tb.shape[0],
        "GRANULE": GRANULE,
        "BLOCK_N": launch.block_rows,
        "STAGES": launch.stages,
        "TIME_MAJOR": time_major,
        "num_warps": launch.warps,
        # Variants of one kernel must round alike: only what is written as a fused multiply-add is one.
        "enable_fp_fusion": False,
    }
