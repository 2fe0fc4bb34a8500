"""``gram_matrix``: a program multiplies one granule of rows by itself on tensor cores.

    x = high + low      two parts of 11 bits; low low^T, 2^-24 of the product, is dropped
    S = high high^T + high (2 low)^T
    (S + S^T) / 2 = high high^T + high low^T + low high^T      two products and one accumulator do for three

Imported only where triton is.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false, reportMissingParameterType=false
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false, reportUnnecessaryIsInstance=false
# The language inside @triton.jit has no types that a checker could see.

from __future__ import annotations

import triton
import triton.language as tl

from cmdgpu_kernels.device_math import round_split_tf32
from cmdgpu_kernels.gram import sums

__all__ = ["INTERPRETED", "add_granules_kernel", "gram_kernel", "mark_rows_kernel"]

LARGEST_SIZE = tl.constexpr(sums.LARGEST_SIZE)


@triton.jit
def _displaced(corner, t, n, live, ld, LD: tl.constexpr, T: tl.constexpr, TIME_MAJOR: tl.constexpr):
    """[p, x_1, x_2, ...] of some rows as float32, snapshots beyond the last one 0. x_0 would be 0."""
    if TIME_MAJOR:
        offsets, first = t[:, None] * ld + n[None, :], n
    else:
        offsets, first = t[:, None] + n[None, :] * LD, n * LD
    w = tl.load(corner + offsets, mask=(t < T)[:, None] & live[None, :], other=0.0).to(tl.float32)
    p = tl.load(corner + first, mask=live, other=0.0).to(tl.float32)
    return w - tl.where(((t > 0) & (t < T))[:, None], p[None, :], 0.0)


@triton.jit
def gram_kernel(
    W,  # IN  (T, N) or (N, T)  float32, float16 or bfloat16
    counted_n,  # IN  (N,)  int8: 1 where a row counts; not read when WHOLE
    S_gtt,  # OUT (granules, TILES * TILE, TILES * TILE)  float32, to be averaged with its transpose
    left_out_g,  # OUT (granules,)  int32: rows that do not count; not written unless WHOLE
    N: tl.int64,
    ld: tl.int64,  # elements between snapshots, when TIME_MAJOR
    LD: tl.constexpr,  # elements between rows, when not
    T: tl.constexpr,
    TILE: tl.constexpr,  # snapshots of a tile
    TILES: tl.constexpr,
    GRANULE: tl.constexpr,
    BLOCK_N: tl.constexpr,  # rows of one product
    STAGES: tl.constexpr,
    TIME_MAJOR: tl.constexpr,
):
    WHOLE: tl.constexpr = TILES == 1
    granule = tl.program_id(0).to(tl.int64)
    start = granule * GRANULE
    here = tl.minimum(N - start, GRANULE).to(tl.int32)
    i, j = tl.program_id(1), tl.program_id(2)
    t = tl.arange(0, TILE)
    lane = tl.arange(0, BLOCK_N)
    S = tl.zeros([TILE, TILE], tl.float32)
    left_out = tl.zeros([BLOCK_N], tl.int32)
    # S is symmetric after averaging: the tiles below the diagonal are those above it, turned.
    if i <= j:
        corner = W + start * (1 if TIME_MAJOR else LD)
        for first in tl.range(0, here, BLOCK_N, num_stages=STAGES):
            n = first + lane
            live = n < here
            x = _displaced(corner, i * TILE + t, lane, live, ld, LD, T, TIME_MAJOR)
            if WHOLE:
                # NaN compares false. What is left out is cleared: 0 times NaN is NaN.
                counted = tl.sum(x * x, axis=0) <= LARGEST_SIZE
                left_out += (live & (counted == 0)).to(tl.int32)
            else:
                counted = tl.load(counted_n + start + n, mask=live, other=0) != 0
            high, low = round_split_tf32(tl.where(counted[None, :], x, 0.0))
            # A fresh accumulator for each product: tensor cores truncate what they add to an old one.
            if WHOLE:
                product = tl.dot(high, tl.trans(low * 2.0), input_precision="tf32")
                product = tl.dot(high, tl.trans(high), product, input_precision="tf32")
            else:
                y = _displaced(corner, j * TILE + t, lane, live, ld, LD, T, TIME_MAJOR)
                high_y, low_y = round_split_tf32(tl.where(counted[None, :], y, 0.0))
                product = tl.dot(low, tl.trans(high_y), input_precision="tf32")
                product = tl.dot(high, tl.trans(low_y), product, input_precision="tf32")
                product = tl.dot(high, tl.trans(high_y), product, input_precision="tf32")
            S += product
            corner += BLOCK_N * (1 if TIME_MAJOR else LD)
        WIDTH: tl.constexpr = TILES * TILE
        S_tt = S_gtt + granule * WIDTH * WIDTH
        row, column = i * TILE + t, j * TILE + t
        tl.store(S_tt + row[:, None] * WIDTH + column[None, :], S)
        if not WHOLE and i < j:
            tl.store(S_tt + column[None, :] * WIDTH + row[:, None], S)
        if WHOLE:
            tl.store(left_out_g + granule, tl.sum(left_out, axis=0))


@triton.jit
def mark_rows_kernel(
    W,  # IN  (T, N) or (N, T)
    counted_n,  # OUT (N,)  int8: 1 where a row counts, 0 where it is left out
    N: tl.int64,
    step_t: tl.int64,  # elements between snapshots
    step_n: tl.int64,  # elements between rows
    T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = n < N
    rows = W + n * step_n
    p = tl.load(rows, mask=live, other=0.0).to(tl.float32)
    size = p * p
    for _ in tl.range(1, T):
        rows += step_t
        x = tl.load(rows, mask=live, other=0.0).to(tl.float32) - p
        size = tl.fma(x, x, size)
    tl.store(counted_n + n, (size <= LARGEST_SIZE).to(tl.int8), mask=live)


@triton.jit
def add_granules_kernel(
    S_gtt,  # IN  (granules, WIDTH, WIDTH)  float32
    high_tt,  # IN, OUT (WIDTH, WIDTH)  float64: the sum so far, averaged with its transpose
    rest_tt,  # IN, OUT (WIDTH, WIDTH)  float64: what rounding took from it
    granules,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    turned = entry % WIDTH * WIDTH + entry // WIDTH
    high = tl.load(high_tt + entry)
    rest = tl.load(rest_tt + entry)
    S_tt = S_gtt
    for _ in tl.range(0, granules):
        S = tl.load(S_tt + entry).to(tl.float64) + tl.load(S_tt + turned).to(tl.float64)
        half = S * 0.5
        total = high + half
        of_half = total - high
        rest += (high - (total - of_half)) + (half - of_half)
        high = total
        S_tt += WIDTH * WIDTH
    total = high + rest
    tl.store(high_tt + entry, total)
    tl.store(rest_tt + entry, rest - (total - high))


INTERPRETED = not isinstance(gram_kernel, triton.JITFunction)
"""TRITON_INTERPRET was set when the kernels were decorated: they run on the CPU, for tests of their logic."""
