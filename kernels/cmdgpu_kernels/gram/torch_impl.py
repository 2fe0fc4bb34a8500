"""``gram_matrix`` in plain torch: any device, float32 products of a fixed shape, sums in float64.

A granule is passed in parts through one buffer; the last part is padded with zeros. Every product of a run
then has the same shape, the same alignment and, on the CPU, one thread.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from cmdgpu_kernels.dispatch import Problem
from cmdgpu_kernels.gram.sums import GRANULE, LARGEST_SIZE, Gram, add_two
from cmdgpu_kernels.precision import exact_matmul
from cmdgpu_kernels.workers import run_in_workers

__all__ = ["TOLERANCE", "refusals", "run"]

PART = 4_096
"""Rows of one product: at T = 100 its operand (1.6 MB) stays in the L2 cache between the passes over it."""

AHEAD = 4
"""Granules per thread that are finished before they are added up: with fewer the threads wait longer."""

DTYPES = ("float32", "float16", "bfloat16")
TOLERANCE = {"float32": 3e-6, "float16": 3e-6, "bfloat16": 3e-6}


def refusals(problem: Problem) -> tuple[str, ...]:
    """Every reason why torch cannot serve the problem."""
    reasons: list[str] = []
    if problem.dtype not in DTYPES:
        reasons.append(f"dtype {problem.dtype} (supported: {', '.join(DTYPES)})")
    if problem.device not in ("cpu", "cuda"):
        reasons.append(f"needs a cpu or cuda device, got {problem.device!r}")
    return tuple(reasons)


def run(W_tb: Tensor, *, threads: int | None = None) -> Gram:
    """Sum the rows of W_tb, (T, B) with any strides. ``threads``, on the CPU only, is granules in flight."""
    snapshots, rows = W_tb.shape
    workers = (threads or torch.get_num_threads()) if W_tb.device.type == "cpu" else 1
    granules = range(0, rows, GRANULE)
    ahead = min(workers * AHEAD, max(len(granules), 1))
    sums = torch.zeros(ahead, snapshots, snapshots, dtype=torch.float64, device=W_tb.device)
    left_out = torch.zeros(ahead, dtype=torch.int64, device=W_tb.device)
    high, rest = np.zeros((2, snapshots, snapshots))
    total_left_out = 0

    def work(slots: Iterable[tuple[int, int]]) -> None:
        with torch.inference_mode():
            x, squares = torch.empty(2, snapshots, PART, dtype=torch.float32, device=W_tb.device)
            for slot, start in slots:
                left_out[slot] = _sum_granule(W_tb[:, start : start + GRANULE], x, squares, sums[slot])

    with exact_matmul(W_tb.device.type):
        for first in range(0, len(granules), ahead):
            slots = list(enumerate(granules[first : first + ahead]))
            if W_tb.device.type == "cpu":
                # In a worker even for one thread: the caller's own thread may use several inside a product.
                run_in_workers(work, slots, workers)
            else:
                work(slots)
            # In the order of the rows, whoever was ready first.
            for slot, _ in slots:
                granule = sums[slot].cpu().numpy()
                high, rest = add_two(high, rest, (granule + granule.T) / 2, np.zeros_like(granule))
                total_left_out += int(left_out[slot])
    return Gram.unpacked(high, rest, total_left_out)


def _sum_granule(W_tb: Tensor, x: Tensor, squares: Tensor, out: Tensor) -> Tensor:
    """Products of [p, x_1, x_2, ...] over a granule, and the number of rows left out of them."""
    out.zero_()
    left_out = torch.zeros((), dtype=torch.int64, device=W_tb.device)
    for first in range(0, W_tb.shape[1], PART):
        part_tb = W_tb[:, first : first + PART]
        x[:, : part_tb.shape[1]].copy_(part_tb)
        x[:, part_tb.shape[1] :].zero_()
        # x_0 would be 0: its place keeps p.
        x[1:].sub_(x[0])
        size = torch.mul(x, x, out=squares).sum(0)
        # NaN compares false. What is left out is cleared: 0 times NaN is NaN.
        outside = ~(size <= LARGEST_SIZE)
        if W_tb.is_cuda or bool(outside.any()):
            x.masked_fill_(outside, 0.0)
            left_out += outside.sum()
        out.add_(torch.mm(x, x.T))
    return left_out
