"""``gram_matrix``: a program multiplies one granule of rows by itself on tensor cores.

    x = high + low      two parts of 11 bits; low low^T, 2^-24 of the product, is dropped
    S = high high^T + high (2 low)^T
    (S + S^T) / 2 = high high^T + high low^T + low high^T      two products and one accumulator do for three

``gram_kernel`` holds the parts in float16, at twice the rate of TF32 and half its bytes. float16 spans
little, so each snapshot of a granule is multiplied by a power of two, which the granule's first rows suggest.
What came of it is looked at once, in the end: a granule whose rows do not fit, or may not all count, is
flagged. Where a program cannot hold the products of all snapshots, ``gram_tiles_kernel`` makes tiles of them.
``careful_kernel`` computes a flagged granule again, in TF32, and looks at every row. Which of them answers
depends on the rows of the granule and on how the block lies, and on nothing else.

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

__all__ = [
    "INTERPRETED",
    "add_granules_kernel",
    "careful_kernel",
    "gram_kernel",
    "gram_tiles_kernel",
    "mark_rows_kernel",
]

LARGEST_SIZE = tl.constexpr(sums.LARGEST_SIZE)

# The largest |x| of a snapshot's first rows becomes 2^6 to 2^7, whose exponent reads 127 + 6: later ones may
# be 2^9 times as large.
SCALED_TO = tl.constexpr(133)
MOST_OF_A_TILE = tl.constexpr(sums.LARGEST_SIZE / 2)
# Least sum of squares, but for 0, of a scaled snapshot. float16 holds the low part in steps of 2^-24: half of
# one, in all rows of a granule, is 5e-8 of the root of this.
LEAST_SQUARES = tl.constexpr(6000.0)


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
def _exponents(corner, t, lane, here, ld, LD: tl.constexpr, T: tl.constexpr, TIME_MAJOR: tl.constexpr):
    """The power of two that takes each snapshot's first rows to what float16 holds.

    Any is right, and is a normal number, as its inverse is. For rows of 0 it is so large that no row that
    follows, whatever else it is, becomes 0.
    """
    x = _displaced(corner, t, lane, lane < here, ld, LD, T, TIME_MAJOR)
    field = (tl.max(tl.abs(x), axis=1).to(tl.int32, bitcast=True) >> 23) & 255
    return tl.minimum(-(field - SCALED_TO), 126)


@triton.jit
def _power(exponent):
    """2^exponent, from -126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _halves(corner, offsets, first, mask, live, scale, less, RAGGED: tl.constexpr):
    """Two float16 that add up to scaled rows of [p, x_1, x_2, ...]: the bits of scaling w - p."""
    if RAGGED:
        w = tl.load(corner + offsets, mask=mask & live[None, :], other=0.0).to(tl.float32)
        p = tl.load(corner + first, mask=live, other=0.0).to(tl.float32)
    else:
        w = tl.load(corner + offsets, mask=mask, other=0.0).to(tl.float32)
        p = tl.load(corner + first).to(tl.float32)
    # Less 0 or p, as a multiple of it: no choice between two values in every turn.
    x = tl.fma(tl.broadcast_to(p[None, :], w.shape), tl.broadcast_to(less[:, None], w.shape), w)
    x = x * scale[:, None]
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def _offsets(row, lane, ld, LD: tl.constexpr, TIME_MAJOR: tl.constexpr):
    """Of each snapshot's values from the corner of a block."""
    if TIME_MAJOR:
        return row[:, None] * ld + lane[None, :]
    else:
        return row[:, None] + lane[None, :] * LD


@triton.jit
def _product(high_i, low_i, high_j, low_j, SAME: tl.constexpr):
    """Product of some snapshots with others, or the same ones, over a block of rows.

    In an accumulator of its own: tensor cores truncate what they add to an old one.
    """
    if SAME:
        product = tl.dot(high_i, tl.trans(low_i * 2.0))
    else:
        product = tl.dot(low_i, tl.trans(high_j))
        product = tl.dot(high_i, tl.trans(low_j), product)
    return tl.dot(high_i, tl.trans(high_j), product)


@triton.jit
def _looked_at(S, t, row, up, T: tl.constexpr):
    """Of a product of some snapshots with themselves: 1 where each of them fits, and their sum of squares."""
    # float16 overflows to inf, and inf and NaN of a row reach its own square: the diagonal tells.
    square = tl.sum(tl.where(t[:, None] == t[None, :], S, 0.0), axis=1)
    # Each condition is false of NaN. A snapshot of zeros is exact: see _exponents.
    seen = (square >= LEAST_SQUARES) | (square == 0) | (row >= T)
    down = _power(-up)
    trace = tl.sum(tl.where(row < T, square * down * down, 0.0), axis=0)
    return tl.min(seen.to(tl.int32), axis=0), trace


@triton.jit
def _scaled_back(S, up_i, up_j):
    """Without the powers of two of either side."""
    # Two nearly equal powers: what lies between S and the result is no further out than they are.
    down = -(up_i[:, None] + up_j[None, :])
    return S * _power(down >> 1) * _power(down - (down >> 1))


@triton.jit
def gram_kernel(
    W,  # IN  (T, N) or (N, T)  float32, float16 or bfloat16
    S_gtt,  # OUT (granules, TILE, TILE)  float32, to be averaged with its transpose
    flag_g,  # OUT (granules,)  int32: 1 where the granule must be computed with care
    N: tl.int64,
    ld: tl.int64,  # elements between snapshots, when TIME_MAJOR
    LD: tl.constexpr,  # elements between rows, when not
    T: tl.constexpr,
    TILE: tl.constexpr,  # at least T
    GRANULE: tl.constexpr,
    BLOCK_N: tl.constexpr,  # rows of a product
    STAGES: tl.constexpr,
    TIME_MAJOR: tl.constexpr,
):
    granule = tl.program_id(0).to(tl.int64)
    start = granule * GRANULE
    here = tl.minimum(N - start, GRANULE).to(tl.int32)
    t = tl.arange(0, TILE)
    lane = tl.arange(0, BLOCK_N)
    corner = W + start * (1 if TIME_MAJOR else LD)
    first = lane if TIME_MAJOR else lane * LD
    offsets = _offsets(t, lane, ld, LD, TIME_MAJOR)
    mask = tl.broadcast_to((t < T)[:, None], (TILE, BLOCK_N))
    up = _exponents(corner, t, lane, here, ld, LD, T, TIME_MAJOR)
    scale = tl.where(t < T, _power(up), 0.0)
    less = tl.where(t > 0, -1.0, 0.0)
    S = tl.zeros([TILE, TILE], tl.float32)
    # Of whole blocks only the snapshots are masked, alike in every turn.
    even = here // BLOCK_N * BLOCK_N
    for _ in tl.range(0, even, BLOCK_N, num_stages=STAGES):
        high, low = _halves(corner, offsets, first, mask, None, scale, less, False)
        S += _product(high, low, high, low, True)
        corner += BLOCK_N * (1 if TIME_MAJOR else LD)
    # At most once. A branch in its place costs registers.
    for last in tl.range(even, here, BLOCK_N, num_stages=1):
        high, low = _halves(corner, offsets, first, mask, last + lane < here, scale, less, True)
        S += _product(high, low, high, low, True)
    seen, trace = _looked_at(S, t, t, up, T)
    # No row that does not count has a place in this; half of it is room for rounding.
    good = (seen == 1) & (trace <= MOST_OF_A_TILE)
    tl.store(flag_g + granule, 1 - good.to(tl.int32))
    S_tt = S_gtt + granule * TILE * TILE
    tl.store(S_tt + t[:, None] * TILE + t[None, :], _scaled_back(S, up, up))


@triton.jit
def gram_tiles_kernel(
    W,  # IN  (T, N) or (N, T)  float32, float16 or bfloat16
    S_gtt,  # OUT (granules, TILES * TILE, TILES * TILE)  float32, to be averaged with its transpose
    flag_gi,  # OUT (granules, TILES)  int32: 1 where the granule must be computed with care
    N: tl.int64,
    ld: tl.int64,  # elements between snapshots, when TIME_MAJOR
    LD: tl.constexpr,  # elements between rows, when not
    T: tl.constexpr,
    TILE: tl.constexpr,  # snapshots of a tile
    TILES: tl.constexpr,
    GRANULE: tl.constexpr,
    BLOCK_N: tl.constexpr,  # rows of a product
    STAGES: tl.constexpr,
    TIME_MAJOR: tl.constexpr,
):
    granule = tl.program_id(0).to(tl.int64)
    start = granule * GRANULE
    here = tl.minimum(N - start, GRANULE).to(tl.int32)
    i, j = tl.program_id(1), tl.program_id(2)
    # S is symmetric after averaging: the tiles below the diagonal are those above it, turned.
    if i <= j:
        t = tl.arange(0, TILE)
        row, column = i * TILE + t, j * TILE + t
        lane = tl.arange(0, BLOCK_N)
        corner = W + start * (1 if TIME_MAJOR else LD)
        first = lane if TIME_MAJOR else lane * LD
        offsets_i = _offsets(row, lane, ld, LD, TIME_MAJOR)
        offsets_j = _offsets(column, lane, ld, LD, TIME_MAJOR)
        mask_i = tl.broadcast_to((row < T)[:, None], (TILE, BLOCK_N))
        mask_j = tl.broadcast_to((column < T)[:, None], (TILE, BLOCK_N))
        up_i = _exponents(corner, row, lane, here, ld, LD, T, TIME_MAJOR)
        up_j = _exponents(corner, column, lane, here, ld, LD, T, TIME_MAJOR)
        scale_i = tl.where(row < T, _power(up_i), 0.0)
        scale_j = tl.where(column < T, _power(up_j), 0.0)
        less_i = tl.where(row > 0, -1.0, 0.0)
        less_j = tl.where(column > 0, -1.0, 0.0)
        S = tl.zeros([TILE, TILE], tl.float32)
        even = here // BLOCK_N * BLOCK_N
        for _ in tl.range(0, even, BLOCK_N, num_stages=STAGES):
            high_i, low_i = _halves(corner, offsets_i, first, mask_i, None, scale_i, less_i, False)
            high_j, low_j = _halves(corner, offsets_j, first, mask_j, None, scale_j, less_j, False)
            S += _product(high_i, low_i, high_j, low_j, False)
            corner += BLOCK_N * (1 if TIME_MAJOR else LD)
        for last in tl.range(even, here, BLOCK_N, num_stages=1):
            live = last + lane < here
            high_i, low_i = _halves(corner, offsets_i, first, mask_i, live, scale_i, less_i, True)
            high_j, low_j = _halves(corner, offsets_j, first, mask_j, live, scale_j, less_j, True)
            S += _product(high_i, low_i, high_j, low_j, False)
        if i == j:
            seen, trace = _looked_at(S, t, row, up_i, T)
            good = (seen == 1) & (trace <= MOST_OF_A_TILE / TILES)
            tl.store(flag_gi + granule * TILES + i, 1 - good.to(tl.int32))
        WIDTH: tl.constexpr = TILES * TILE
        S_tt = S_gtt + granule * WIDTH * WIDTH
        S = _scaled_back(S, up_i, up_j)
        tl.store(S_tt + row[:, None] * WIDTH + column[None, :], S)
        if i < j:
            tl.store(S_tt + column[None, :] * WIDTH + row[:, None], S)


@triton.jit
def careful_kernel(
    W,  # IN  (T, N) or (N, T)  float32, float16 or bfloat16
    which_k,  # IN  (programs,)  int64: granules
    counted_n,  # IN  (N,)  int8: 1 where a row counts; not read when WHOLE
    S_gtt,  # OUT (granules, TILES * TILE, TILES * TILE)  float32, to be averaged with its transpose
    left_out_k,  # OUT (programs,)  int32: rows that do not count; not written unless WHOLE
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
    granule = tl.load(which_k + tl.program_id(0))
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
            tl.store(left_out_k + tl.program_id(0), tl.sum(left_out, axis=0))


@triton.jit
def mark_rows_kernel(
    W,  # IN  (T, N) or (N, T)
    which_k,  # IN  (granules to look at,)  int64
    counted_n,  # OUT (N,)  int8: 1 where a row of those counts, 0 where it is left out
    N: tl.int64,
    step_t: tl.int64,  # elements between snapshots
    step_n: tl.int64,  # elements between rows
    T: tl.constexpr,
    GRANULE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n = tl.load(which_k + tl.program_id(0)) * GRANULE + tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
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
    skip_g,  # IN  (granules,)  int32: 1 where a granule is left out, whatever lies there
    high_tt,  # IN, OUT (WIDTH, WIDTH)  float64: the sum so far
    rest_tt,  # IN, OUT (WIDTH, WIDTH)  float64: what rounding took from it
    granules,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,  # granules under way: an entry's sum is a chain, and memory is far
):
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    high = tl.load(high_tt + entry)
    rest = tl.load(rest_tt + entry)
    S_tt = S_gtt + entry
    whole = granules // AT_ONCE * AT_ONCE
    for _ in tl.range(0, whole, AT_ONCE):
        products = ()
        for k in tl.static_range(AT_ONCE):
            product = tl.load(S_tt + k * WIDTH * WIDTH)
            products = products + (tl.where(tl.load(skip_g + k) != 0, 0.0, product),)
        for k in tl.static_range(AT_ONCE):
            high, rest = _add(high, rest, products[k])
        S_tt += AT_ONCE * WIDTH * WIDTH
        skip_g += AT_ONCE
    for _ in tl.range(whole, granules):
        high, rest = _add(high, rest, tl.where(tl.load(skip_g) != 0, 0.0, tl.load(S_tt)))
        S_tt += WIDTH * WIDTH
        skip_g += 1
    total = high + rest
    tl.store(high_tt + entry, total)
    tl.store(rest_tt + entry, rest - (total - high))


@triton.jit
def _add(high, rest, product):
    """high + rest + product, with what rounding takes."""
    more = product.to(tl.float64)
    total = high + more
    of_more = total - high
    rest += (high - (total - of_more)) + (more - of_more)
    return total, rest


INTERPRETED = not isinstance(gram_kernel, triton.JITFunction)
"""TRITON_INTERPRET was set when the kernels were decorated: they run on the CPU, for tests of their logic."""
