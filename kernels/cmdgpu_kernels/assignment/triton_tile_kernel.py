"""``assign_and_fit`` on tiles of rows x snapshots: products on tensor cores, references in sweeps.

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
from cmdgpu_kernels.device_math import merge_moments, split_tf32

__all__ = ["INTERPRETED", "assign_and_fit_tile_kernel"]


@triton.jit
def assign_and_fit_tile_kernel(
    W,  # IN  (T, N) or (N, T)  float32, float16 or bfloat16
    high_mt,  # IN  (SWEEPS * COUNT, partials * PARTIAL)  float32: distinct references in TF32, then 0
    low_mt,  # IN  the same shape: what the TF32 part leaves, rounded to TF32
    tail_cm,  # IN  (partials, SWEEPS * COUNT)  float32, sums of the references from each partial on
    index_m,  # IN  (SWEEPS * COUNT,)    int32   the caller's number of each distinct reference
    mean_m,  # IN  (SWEEPS * COUNT,)    float32 mean of the raw reference
    rnorm_inv_m,  # IN  (SWEEPS * COUNT,)    float32 1 / |r - mean(r)|
    mode_n,  # OUT (N,)    int16
    a_n,  # OUT (N,)    float32
    b_n,  # OUT (N,)    float32
    correlation_n,  # OUT (N,)    float32
    ss_n,  # OUT (N,)    float32
    margin_n,  # OUT (N,)    float32, not touched unless MARGIN
    N: tl.int64,
    ld: tl.int64,  # elements between snapshots, when TIME_MAJOR
    LD: tl.constexpr,  # elements between rows, when not; a constant, or loads would be 4 bytes wide
    T: tl.constexpr,
    PARTIAL: tl.constexpr,
    SWEEPS: tl.constexpr,  # passes over the snapshots
    COUNT: tl.constexpr,  # references of one of them
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,  # partials in flight
    TIME_MAJOR: tl.constexpr,
    EVEN: tl.constexpr,  # N is a multiple of BLOCK_N
    MARGIN: tl.constexpr,
):
    PARTIALS: tl.constexpr = (T + PARTIAL - 1) // PARTIAL
    start = tl.program_id(0).to(tl.int64) * BLOCK_N
    lane = tl.arange(0, BLOCK_N)
    t = tl.arange(0, PARTIAL)
    m = tl.arange(0, COUNT)
    live = lane < N - start
    if TIME_MAJOR:
        corner = W + start
        tile = lane[:, None] + t[None, :] * ld
        origin = tl.load(corner + lane, mask=live, other=0.0).to(tl.float32)
    else:
        corner = W + start * LD
        tile = lane[:, None] * LD + t[None, :]
        origin = tl.load(corner + lane * LD, mask=live, other=0.0).to(tl.float32)

    mean = tl.zeros([BLOCK_N], tl.float32)
    ss = tl.zeros([BLOCK_N], tl.float32)
    best = tl.zeros([BLOCK_N], tl.float32)
    d_best = tl.zeros([BLOCK_N], tl.float32)
    second = tl.zeros([BLOCK_N], tl.float32)
    winner = tl.zeros([BLOCK_N], tl.int32)
    for sweep in tl.range(0, SWEEPS, num_stages=1):
        pivot = origin
        mean = tl.zeros([BLOCK_N], tl.float32)
        ss = tl.zeros([BLOCK_N], tl.float32)
        d = tl.zeros([BLOCK_N, COUNT], tl.float32)
        here = corner
        reference = sweep * COUNT + m
        z = reference[None, :] * (PARTIALS * PARTIAL) + t[:, None]
        tail = tail_cm + reference
        for c in tl.range(0, PARTIALS, num_stages=STAGES):
            seen = c * PARTIAL
            if T % PARTIAL == 0:
                inside = tl.full([1, PARTIAL], True, tl.int1)
                steps = PARTIAL * 1.0
            else:
                inside = (t < T - seen)[None, :]
                steps = tl.minimum(T - seen, PARTIAL) * 1.0
            if EVEN and T % PARTIAL == 0:
                w = tl.load(here + tile).to(tl.float32)
            else:
                w = tl.load(here + tile, mask=inside & live[:, None], other=0.0).to(tl.float32)
            # The partial is on chip, so its own mean can be its pivot; the last one's leads there.
            x = tl.where(inside, w - pivot[:, None], 0.0)
            s1 = tl.sum(x, axis=1)
            moved = pivot + tl.div_rn(s1, steps)
            # The step that is taken, which rounding makes another than the one that is meant.
            step = moved - pivot
            x = tl.where(inside, w - moved[:, None], 0.0)
            s2 = tl.sum(x * x, axis=1)
            mean, ss, _ = merge_moments(tl.fma(step, -steps, s1), s2, seen, mean - step, ss, steps)
            pivot = moved

            x_high, x_low = split_tf32(x)
            z_high = tl.load(high_mt + z)
            z_low = tl.load(low_mt + z)
            partial = tl.dot(x_low, z_high, input_precision="tf32")
            partial = tl.dot(x_high, z_low, partial, input_precision="tf32")
            partial = tl.dot(x_high, z_high, partial, input_precision="tf32")
            # What the step of the pivot takes out of this and all later partials.
            d = tl.fma(step[:, None], tl.load(tail)[None, :], d + partial)
            z += PARTIAL
            tail += SWEEPS * COUNT
            here += PARTIAL * (ld if TIME_MAJOR else 1)
        mean += pivot

        # The lowest index of equal ones. Only the winner is not 0 in the sum, so its order means nothing.
        size = tl.abs(d)
        best_here, first = tl.max(size, axis=1, return_indices=True)
        first_here = m[None, :] == first[:, None]
        d_here = tl.sum(tl.where(first_here, d, 0.0), axis=1)
        if MARGIN:
            second_here = tl.max(tl.where(first_here, 0.0, size), axis=1)
            second = tl.maximum(tl.maximum(second, second_here), tl.minimum(best, best_here))
        # Strictly greater: the lowest index wins a tie, and padding, d = 0, never does.
        better = best_here > best
        d_best = tl.where(better, d_here, d_best)
        winner = tl.where(better, sweep * COUNT + first, winner)
        best = tl.where(better, best_here, best)

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


INTERPRETED = not isinstance(assign_and_fit_tile_kernel, triton.JITFunction)
"""TRITON_INTERPRET was set when the kernel was decorated: it runs on the CPU, for tests of its logic."""
