"""``gram_kernel`` for Hopper, in Triton's lower language Gluon: a product is made while the next is prepared.

What it computes is ``gram_kernel``'s. There a product is waited for before the next rows are looked at: the
language knows of no other way. Here the rows of the next one are split into their halves meanwhile, and the
tensor cores and the others work at once.

    rows  ->  W_s: some blocks, under way  ->  high_s, low_s: two blocks, one being multiplied  ->  S

Two blocks share an accumulator before it is added to S, which the tensor cores have to wait for.

Imported only where triton is and Gluon has what this needs.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false, reportMissingParameterType=false
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false
# pyright: reportConstantRedefinition=false, reportOperatorIssue=false, reportIndexIssue=false, reportAssignmentType=false
# The language inside @gluon.jit has no types that a checker could see.

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from cmdgpu_kernels.gram.triton_kernel import LEAST_SQUARES, MOST_OF_A_TILE, SCALED_TO

__all__ = ["hopper_gram_kernel"]

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.6


@gluon.jit
def _power(exponent):
    """2^exponent, from -126 to 127."""
    return ((exponent + 127) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def _halves(w, p, scale, less):
    """Two float16 that add up to scaled rows of [p, x_1, x_2, ...], the second one doubled."""
    w = w.to(gl.float32)
    p = p.to(gl.float32)
    p, w = gl.broadcast(p, w)
    less, w = gl.broadcast(less, w)
    x = gl.fma(p, less, w) * scale
    high = x.to(gl.float16)
    return high, (x - high.to(gl.float32)).to(gl.float16) * 2.0


@gluon.jit
def _copy(W_s, corner, offsets, inside, coming, blocks, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Send for a block of rows; for none, beyond the last one, which counts all the same."""
    async_copy.async_copy_global_to_shared(
        W_s.index(coming % STAGES), corner + coming * BLOCK_N + offsets, mask=inside & (coming < blocks)
    )
    async_copy.commit_group()


@gluon.jit
def _split(
    k, W_s, halves, corner, offsets, inside, blocks, scale, less, ROWS: gl.constexpr, BLOCK_N: gl.constexpr
):
    """Halves of block k in place of those of block k - 2; and a later block of rows is sent for."""
    high_s, low_s = halves
    STAGES: gl.constexpr = W_s.shape[0]
    async_copy.wait_group(STAGES - 2)
    # Everybody's part of block k is here; everybody has read block k - 1, and waited for product k - 2.
    barrier()
    _copy(W_s, corner, offsets, inside, k + STAGES - 1, blocks, BLOCK_N, STAGES)
    block = W_s.index(k % STAGES)
    high, low = _halves(block.load(ROWS), block.slice(0, 1).load(ROWS), scale, less)
    high_s.index(k % 2).store(high)
    low_s.index(k % 2).store(low)
    fence_async_shared()
    barrier()


@gluon.jit
def _multiply(high, low, product, FRESH: gl.constexpr):
    """high (2 low)^T + high high^T, under way; in an accumulator of its own or on top of what is there."""
    product = warpgroup_mma(high, low.permute((1, 0)), product, use_acc=not FRESH, is_async=True)
    return warpgroup_mma(high, high.permute((1, 0)), product, is_async=True)


@gluon.jit
def hopper_gram_kernel(
    W,  # IN  (T, N)  a snapshot is contiguous; float32, float16 or bfloat16
    S_gtt,  # OUT (granules, TILE, TILE)  float32, to be averaged with its transpose
    flag_g,  # OUT (granules,)  int32: 1 where the granule must be computed with care
    N: gl.int64,
    ld: gl.int64,  # elements between snapshots
    T: gl.constexpr,
    TILE: gl.constexpr,  # snapshots, rounded up to 64 or 128
    GRANULE: gl.constexpr,
    BLOCK_N: gl.constexpr,  # rows of a product
    STAGES: gl.constexpr,  # blocks of rows under way or here
    num_warps: gl.constexpr,
):
    # 16 bytes of a snapshot are one thread's.
    WIDE: gl.constexpr = 128 // W.dtype.element_ty.primitive_bitwidth
    ROWS: gl.constexpr = gl.BlockedLayout(
        [1, WIDE], [32 * WIDE // BLOCK_N, BLOCK_N // WIDE], [num_warps, 1], [1, 0]
    )
    # 16 snapshots a warp; the warps that are left then share the other side.
    SIDES: gl.constexpr = num_warps * 16 // TILE
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [num_warps // SIDES, SIDES], [16, TILE // SIDES, 16]
    )
    AS_IT_LIES: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    OPERAND: gl.constexpr = gl.NVMMASharedLayout(min(2 * BLOCK_N, 128), 16, 2)

    granule = gl.program_id(0).to(gl.int64)
    start = granule * GRANULE
    here = gl.minimum(N - start, GRANULE).to(gl.int32)
    t = gl.arange(0, TILE, gl.SliceLayout(1, ROWS))
    lane = gl.arange(0, BLOCK_N, gl.SliceLayout(0, ROWS))
    corner = W + start
    offsets = t.to(gl.int64)[:, None] * ld + lane[None, :]
    inside = (t < T)[:, None] & (lane >= 0)[None, :]

    # The power of two that takes each snapshot's first rows to what float16 holds: see gram_kernel.
    first = (lane < here)[None, :]
    w = gl.load(corner + offsets, mask=inside & first, other=0.0).to(gl.float32)
    p = gl.load(corner + lane, mask=lane < here, other=0.0).to(gl.float32)
    x = w - gl.where(((t > 0) & (t < T))[:, None], p[None, :], 0.0)
    field = (gl.max(gl.abs(x), axis=1).to(gl.int32, bitcast=True) >> 23) & 255
    up = gl.minimum(-(field - SCALED_TO), 126)
    scale = gl.where(t < T, _power(up), 0.0)[:, None]
    less = gl.where(t > 0, -1.0, 0.0)[:, None]

    W_s = gl.allocate_shared_memory(W.dtype.element_ty, [STAGES, TILE, BLOCK_N], AS_IT_LIES)
    high_s = gl.allocate_shared_memory(gl.float16, [2, TILE, BLOCK_N], OPERAND)
    low_s = gl.allocate_shared_memory(gl.float16, [2, TILE, BLOCK_N], OPERAND)
    # What is beyond the last snapshot is never loaded, and 0 times what happens to lie there may be NaN.
    for stage in gl.static_range(STAGES):
        W_s.index(stage).store(gl.full([TILE, BLOCK_N], 0.0, W.dtype.element_ty, ROWS))
    barrier()

    blocks = here // BLOCK_N
    for stage in gl.static_range(STAGES - 1):
        _copy(W_s, corner, offsets, inside, stage, blocks, BLOCK_N, STAGES)
    halves = (high_s, low_s)
    none = gl.zeros([TILE, TILE], gl.float32, PRODUCT)
    S = none
    product = none
    for pair in range(blocks // 2):
        k = 2 * pair
        _split(k, W_s, halves, corner, offsets, inside, blocks, scale, less, ROWS, BLOCK_N)
        S += warpgroup_mma_wait(0, deps=[product])
        product = _multiply(high_s.index(0), low_s.index(0), none, True)
        _split(k + 1, W_s, halves, corner, offsets, inside, blocks, scale, less, ROWS, BLOCK_N)
        product = _multiply(high_s.index(1), low_s.index(1), product, False)
        # The first two have been made when the last two are left.
        product = warpgroup_mma_wait(2, deps=[product])
    S += warpgroup_mma_wait(0, deps=[product])
    async_copy.wait_group(0)

    for first in range(blocks // 2 * 2 * BLOCK_N, here, BLOCK_N):
        live = (lane < here - first)[None, :]
        w_rest = gl.load(corner + first + offsets, mask=inside & live, other=0.0)
        p_rest = gl.load(corner + first + lane[None, :], mask=live, other=0.0)
        high, low = _halves(w_rest, p_rest, scale, less)
        barrier()
        high_s.index(0).store(high)
        low_s.index(0).store(low)
        fence_async_shared()
        barrier()
        S += warpgroup_mma_wait(0, deps=[_multiply(high_s.index(0), low_s.index(0), none, True)])

    row = gl.arange(0, TILE, gl.SliceLayout(1, PRODUCT))
    column = gl.arange(0, TILE, gl.SliceLayout(0, PRODUCT))
    up_i = gl.convert_layout(up, gl.SliceLayout(1, PRODUCT))
    up_j = gl.convert_layout(up, gl.SliceLayout(0, PRODUCT))
    # Whether everything fits: see gram_kernel.
    square = gl.sum(gl.where(row[:, None] == column[None, :], S, 0.0), axis=1)
    seen = (square >= LEAST_SQUARES) | (square == 0) | (row >= T)
    down_i = _power(-up_i)
    trace = gl.sum(gl.where(row < T, square * down_i * down_i, 0.0), axis=0)
    good = (gl.min(seen.to(gl.int32), axis=0) == 1) & (trace <= MOST_OF_A_TILE)
    gl.store(flag_g + granule, 1 - good.to(gl.int32))
    down = -(up_i[:, None] + up_j[None, :])
    S = S * _power(down >> 1) * _power(down - (down >> 1))
    gl.store(S_gtt + granule * TILE * TILE + row[:, None] * TILE + column[None, :], S)
