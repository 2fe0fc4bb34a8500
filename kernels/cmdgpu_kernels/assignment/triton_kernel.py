"""``assign_and_fit`` on a time-major block: one thread owns whole rows, float32 fused multiply-adds.

Imported only where triton is.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false, reportMissingParameterType=false
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false, reportUnnecessaryIsInstance=false
# The language inside @triton.jit has no types that a checker could see.

from __future__ import annotations

import triton
import triton.language as tl

from cmdgpu_kernels.assignment.triton_epilogue import store_fit
from cmdgpu_kernels.device_math import fill_ring, merge_moments, spread_pivot, sum_partial, zeros

__all__ = ["INTERPRETED", "assign_and_fit_kernel"]


@triton.jit
def _add_partial(
    state,
    lane,
    live,
    ld,
    STEPS: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RING: tl.constexpr,
    EVEN: tl.constexpr,
    LAST: tl.constexpr,
    CLAMP: tl.constexpr,
):
    """Add STEPS snapshots to the sums, then move the pivot to their mean."""
    ring, tail, seen, pivot, step, mean, ss, d = state
    moved_d = ()
    for i in tl.static_range(COUNT):
        # What the last step of the pivot takes out of this and all later partials.
        moved_d = moved_d + (tl.fma(step, tl.load(tail + i), d[i]),)
    ring, sums = sum_partial(
        ring, moved_d, lane, live, pivot, ld, STEPS, COUNT, BLOCK_N, RING, EVEN, LAST, CLAMP
    )
    s1, s2, d = sums
    mean, ss, mean_x = merge_moments(s1, s2, seen, mean, ss, STEPS)
    moved = pivot + mean_x
    # The step that is taken, which rounding makes another than the one that is meant.
    step = moved - pivot
    return ring, tail + COUNT, seen + STEPS, moved, step, mean - step, ss, d


@triton.jit
def _add_segment(
    state,
    lane,
    live,
    ld,
    STEPS: tl.constexpr,
    PARTIAL: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RING: tl.constexpr,
    EVEN: tl.constexpr,
    LAST: tl.constexpr,
    CLAMP: tl.constexpr,
):
    """Add STEPS snapshots to the sums, in partials."""
    WHOLE: tl.constexpr = (STEPS - 1) // PARTIAL
    for _ in tl.range(0, WHOLE):
        state = _add_partial(state, lane, live, ld, PARTIAL, COUNT, BLOCK_N, RING, EVEN, False, CLAMP)
    return _add_partial(
        state, lane, live, ld, STEPS - WHOLE * PARTIAL, COUNT, BLOCK_N, RING, EVEN, LAST, CLAMP
    )


@triton.jit
def _sum_all(
    corner,
    z,
    tail,
    lane,
    live,
    pivot,
    ld,
    T: tl.constexpr,
    SEGMENT: tl.constexpr,
    PARTIAL: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RING: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Mean, centred sum of squares and d over all T snapshots.

    One sum of each product, up to SEGMENT snapshots: a total beside it would double the registers and halve
    the programs of a core. Beyond, where one sum would lose digits, segments are added up.
    """
    none = tl.zeros([BLOCK_N], tl.float32)
    d = zeros(COUNT, BLOCK_N)
    # Only what is added last can be shorter than the ring, and what comes before it then runs out of turns.
    CLAMP: tl.constexpr = (T - 1) % PARTIAL + 1 < RING
    w, coming, left = fill_ring(corner, lane, live, ld, T, RING, EVEN)
    state = ((w, coming, left, z), tail, 0.0, pivot, none, none, none, d)
    WHOLE: tl.constexpr = (T - 1) // SEGMENT
    for _ in tl.range(0, WHOLE):
        state = _add_segment(
            state, lane, live, ld, SEGMENT, PARTIAL, COUNT, BLOCK_N, RING, EVEN, False, CLAMP
        )
        total = ()
        for i in tl.static_range(COUNT):
            total = total + (d[i] + state[7][i],)
        d = total
        state = state[:7] + (zeros(COUNT, BLOCK_N),)
    state = _add_segment(
        state, lane, live, ld, T - WHOLE * SEGMENT, PARTIAL, COUNT, BLOCK_N, RING, EVEN, True, CLAMP
    )
    total = ()
    for i in tl.static_range(COUNT):
        total = total + (d[i] + state[7][i],)
    return state[3] + state[5], state[6], total


@triton.jit
def assign_and_fit_kernel(
    W_tb,  # IN  (T, N)  a snapshot is contiguous; float32, float16 or bfloat16
    Z_tp,  # IN  (T, ceil(COUNT / 2))  int64: pairs of float32 of distinct references, centred, unit norm
    tail_cm,  # IN  (partials, COUNT)  float32, sums of Z_tm from each partial on
    index_m,  # IN  (M,)    int32   the caller's number of each distinct reference
    mean_m,  # IN  (M,)    float32 mean of the raw reference
    rnorm_inv_m,  # IN  (M,)    float32 1 / |r - mean(r)|
    mode_n,  # OUT (N,)    int16
    a_n,  # OUT (N,)    float32
    b_n,  # OUT (N,)    float32
    correlation_n,  # OUT (N,)    float32
    ss_n,  # OUT (N,)    float32
    margin_n,  # OUT (N,)    float32, not touched unless MARGIN
    N: tl.int64,
    ld: tl.int64,  # elements between snapshots; t * ld passes 2**31 from ld of 2e7 at T = 100
    T: tl.constexpr,
    SEGMENT: tl.constexpr,
    PARTIAL: tl.constexpr,
    COUNT: tl.constexpr,  # references
    BLOCK_N: tl.constexpr,
    RING: tl.constexpr,
    EVEN: tl.constexpr,  # N is a multiple of BLOCK_N
    MARGIN: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    lane = tl.arange(0, BLOCK_N)
    live = lane < N - start
    corner = W_tb + start
    pivot = spread_pivot(corner, lane, live, ld, T, EVEN)

    mean, ss, d = _sum_all(
        corner, Z_tp, tail_cm, lane, live, pivot, ld, T, SEGMENT, PARTIAL, COUNT, BLOCK_N, RING, EVEN
    )
    best = tl.zeros([BLOCK_N], tl.float32)
    second = tl.zeros([BLOCK_N], tl.float32)
    d_best = tl.zeros([BLOCK_N], tl.float32)
    winner = tl.zeros([BLOCK_N], tl.int32)
    for i in tl.static_range(COUNT):
        # Ascending and strictly greater: the lowest index wins a tie.
        size = tl.abs(d[i])
        better = size > best
        if MARGIN:
            second = tl.maximum(second, tl.minimum(size, best))
        d_best = tl.where(better, d[i], d_best)
        winner = tl.where(better, i, winner)
        best = tl.where(better, size, best)

    store_fit(
        winner,
        d_best,
        best,
        second,
        mean,
        ss,
        index_m,
        mean_m,
        rnorm_inv_m,
        mode_n,
        a_n,
        b_n,
        correlation_n,
        ss_n,
        margin_n,
        start + lane,
        live,
        T,
        EVEN,
        MARGIN,
    )


INTERPRETED = not isinstance(assign_and_fit_kernel, triton.JITFunction)
"""TRITON_INTERPRET was set when the kernel was decorated: it runs on the CPU, for tests of its logic."""
