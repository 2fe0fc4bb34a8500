"""``assign_and_fit`` in Triton: what may run it, and its launches.

Two kernels. Few references on a time-major block: one thread owns whole rows and multiplies by them one after
the other. More of them, or a block whose rows are contiguous: tiles of rows x snapshots on tensor cores.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmdgpu_kernels.assignment.row_fit import RowFit
from cmdgpu_kernels.dispatch import Problem
from cmdgpu_kernels.limits import PARTIAL, SEGMENT
from cmdgpu_kernels.precision import split_tf32
from cmdgpu_kernels.references import References
from cmdgpu_kernels.triton_here import architecture_of, current, triton_module
from cmdgpu_kernels.tuning import ASSIGN_AND_FIT, TileLaunch, TimeMajorLaunch, tiles_of

__all__ = ["TOLERANCE", "launch_rows", "launch_tiles", "refusals", "refusals_interpreted", "run"]


BY_ROWS = triton_module("assignment.triton_kernel")
ON_TILES = triton_module("assignment.triton_tile_kernel")

COPIED = 64 * 2**20
"""Bytes of a block that are copied at a time, where a kernel cannot read it as it lies."""

_SMALLEST = (8, 0)
"""Capability with the smallest tiles: the interpreter does what lanes do one by one."""

ALIGNED = 16
"""Bytes of a load at its widest. Its width decides which lane holds which snapshot, hence how a row is added
up on tiles: a block that allows narrower ones is copied, so that a row has the same bits in either."""

TOLERANCE = {"float32": 3e-6, "float16": 3e-6, "bfloat16": 3e-6}


def refusals(problem: Problem) -> tuple[str, ...]:
    """Every reason why the compiled kernel cannot serve the problem."""
    return (*BY_ROWS.refusals(problem), *_refusals(problem))


def refusals_interpreted(problem: Problem) -> tuple[str, ...]:
    """Every reason why Triton's interpreter cannot serve the problem."""
    return (*BY_ROWS.refusals_interpreted(problem), *_refusals(problem))


def _refusals(problem: Problem) -> list[str]:
    reasons: list[str] = []
    if problem.dtype not in ASSIGN_AND_FIT:
        reasons.append(f"dtype {problem.dtype} (supported: {', '.join(ASSIGN_AND_FIT)})")
    if problem.modes == 0:
        reasons.append("no reference (torch fits rows without one)")
    if (problem.modes + 64) * (problem.snapshots + PARTIAL) >= 2**31:
        reasons.append(f"{problem.modes} references of {problem.snapshots} snapshots pass 32-bit offsets")
    return reasons


def run(W_tb: Tensor, references: References, *, margin: bool = False, threads: int | None = None) -> RowFit:
    """Fit the rows of W_tb, (T, B) with any strides. ``threads`` means nothing here."""
    fit = RowFit.empty(W_tb.shape[1], W_tb.device, margin=margin)
    row_major = W_tb.stride(0) == 1 and W_tb.stride(1) != 1
    distinct = len(references.distinct)
    by_rows = ASSIGN_AND_FIT[str(W_tb.dtype).removeprefix("torch.")].choose(distinct)
    with current(W_tb.device):
        if not row_major and by_rows is not None:
            for block_tb, here in _parts(W_tb, by_rows.block_rows, padded=False):
                launch_rows(block_tb, references, by_rows, fit, here)
            return fit
        tiles, sweeps = tiles_of(
            architecture_of(W_tb.device, _SMALLEST),
            W_tb.element_size(),
            time_major=not row_major,
            references=distinct,
        )
        cut = _row_major_parts if row_major else _parts
        for block_tb, here in cut(W_tb, tiles.block_rows):
            launch_tiles(block_tb, references, tiles, sweeps, fit, here)
    return fit


def _parts(W_tb: Tensor, block_rows: int, *, padded: bool = True) -> Iterator[tuple[Tensor, slice]]:
    """W_tb as it lies, or in time-major copies that bound the extra memory; and the rows of each."""
    snapshots, rows = W_tb.shape
    # What the compiled code is specialised for: a multiple of 16 elements between snapshots.
    wide = W_tb.stride(0) % 16 == 0 and W_tb.data_ptr() % ALIGNED == 0
    if W_tb.stride(1) == 1 and (wide or not padded):
        yield W_tb, slice(0, rows)
        return
    part = max(COPIED // (snapshots * W_tb.element_size()) // block_rows, 1) * block_rows
    copy = torch.empty(snapshots, min(part, -(-rows // 16) * 16), dtype=W_tb.dtype, device=W_tb.device)
    for start in range(0, rows, part):
        here = slice(start, min(start + part, rows))
        yield copy[:, : here.stop - start].copy_(W_tb[:, here]), here


def _row_major_parts(W_tb: Tensor, block_rows: int) -> Iterator[tuple[Tensor, slice]]:
    """The same for contiguous rows: as they lie where each begins at 16 bytes, else in copies that do."""
    snapshots, rows = W_tb.shape
    step = ALIGNED // W_tb.element_size()
    # A tile is addressed by 32 bits from its first element.
    near = W_tb.stride(1) * block_rows < 2**31
    if near and W_tb.stride(1) % step == 0 and W_tb.data_ptr() % ALIGNED == 0:
        yield W_tb, slice(0, rows)
        return
    width = -(-snapshots // step) * step
    part = max(COPIED // (width * W_tb.element_size()) // block_rows, 1) * block_rows
    copy = torch.empty(min(part, rows), width, dtype=W_tb.dtype, device=W_tb.device).T[:snapshots]
    for start in range(0, rows, part):
        here = slice(start, min(start + part, rows))
        yield copy[:, : here.stop - start].copy_(W_tb[:, here]), here


def _outputs(fit: RowFit, here: slice) -> tuple[Tensor, ...]:
    correlation = fit.correlation[here]
    # The margin is not written unless asked for, but a kernel argument must be some tensor.
    margin = correlation if fit.margin is None else fit.margin[here]
    return fit.mode[here], fit.a[here], fit.b[here], correlation, fit.ss[here], margin


def launch_rows(
    W_tb: Tensor, references: References, launch: TimeMajorLaunch, fit: RowFit, here: slice
) -> None:
    """Fit the rows of a time-major W_tb into the outputs ``here``."""
    snapshots, rows = W_tb.shape
    count = len(references.distinct)
    BY_ROWS.kernels.assign_and_fit_kernel[(-(-rows // launch.block_rows),)](
        W_tb,
        *_packed(references, W_tb.device),
        *_outputs(fit, here),
        rows,
        W_tb.stride(0),
        T=snapshots,
        SEGMENT=SEGMENT,
        PARTIAL=PARTIAL,
        COUNT=count,
        BLOCK_N=launch.block_rows,
        RING=launch.ring,
        EVEN=rows % launch.block_rows == 0,
        MARGIN=fit.margin is not None,
        num_warps=launch.warps,
    )


def launch_tiles(
    W_tb: Tensor, references: References, launch: TileLaunch, sweeps: int, fit: RowFit, here: slice
) -> None:
    """Fit the rows of an aligned W_tb, contiguous in either direction, into the outputs ``here``."""
    snapshots, rows = W_tb.shape
    time_major = W_tb.stride(1) == 1
    ON_TILES.kernels.assign_and_fit_tile_kernel[(-(-rows // launch.block_rows),)](
        W_tb,
        *_packed_tiles(references, sweeps * launch.references, W_tb.device),
        *_outputs(fit, here),
        rows,
        W_tb.stride(0) if time_major else 0,
        LD=0 if time_major else W_tb.stride(1),
        T=snapshots,
        PARTIAL=PARTIAL,
        SWEEPS=sweeps,
        COUNT=launch.references,
        BLOCK_N=launch.block_rows,
        STAGES=launch.stages,
        TIME_MAJOR=time_major,
        EVEN=rows % launch.block_rows == 0,
        MARGIN=fit.margin is not None,
        num_warps=launch.warps,
        # Variants of one kernel must round alike: only what is written as a fused multiply-add is one.
        enable_fp_fusion=False,
    )


def _packed(references: References, device: torch.device) -> tuple[Tensor, ...]:
    """The distinct references, time-major, two in one integer, and what their winner is looked up in."""
    which = references.distinct

    def time_major(rows: NDArray[np.float32], width: int) -> Tensor:
        padded = np.pad(rows[which].T, ((0, 0), (0, width - len(which))))
        # NumPy keeps the order of the transposed view, and torch keeps it too.
        return torch.tensor(np.ascontiguousarray(padded), device=device)

    def build() -> tuple[Tensor, ...]:
        count = len(which)
        return (
            time_major(references.z_mt, count + count % 2).view(torch.int64),
            time_major(references.tail_mc, count),
            *_looked_up(references, count, device),
        )

    return references.cached(("triton", device), build)


def _packed_tiles(references: References, width: int, device: torch.device) -> tuple[Tensor, ...]:
    """The distinct references in two parts, (width, whole partials), and what a winner is looked up in."""

    def build() -> tuple[Tensor, ...]:
        which = references.distinct
        snapshots = references.snapshots
        short = (0, -snapshots % PARTIAL)
        z_mt = np.pad(references.z_mt[which], ((0, width - len(which)), short))
        tail_cm = np.pad(references.tail_mc[which].T, ((0, 0), (0, width - len(which))))
        return (
            *(torch.tensor(part, device=device) for part in split_tf32(z_mt)),
            torch.tensor(np.ascontiguousarray(tail_cm), device=device),
            *_looked_up(references, width, device),
        )

    return references.cached(("triton tiles", width, device), build)


def _looked_up(references: References, width: int, device: torch.device) -> tuple[Tensor, ...]:
    """Index, mean and inverse norm of each distinct reference, padded: a lane may look up a padded winner."""
    which = references.distinct
    padding = (0, width - len(which))
    return (
        torch.tensor(np.pad(which, padding), dtype=torch.int32, device=device),
        torch.tensor(np.pad(references.mean_m[which], padding), dtype=torch.float32, device=device),
        torch.tensor(np.pad(references.rnorm_inv_m[which], padding), dtype=torch.float32, device=device),
    )
