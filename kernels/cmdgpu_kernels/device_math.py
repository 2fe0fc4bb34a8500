"""Device functions that kernels share.

Imported only where triton is.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false, reportMissingParameterType=false
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false, reportUnnecessaryIsInstance=false
# The language inside @triton.jit has no types that a checker could see.

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "fill_ring",
    "load_rows",
    "merge_moments",
    "round_split_tf32",
    "split_tf32",
    "spread_pivot",
    "sum_partial",
    "zeros",
]


@triton.jit
def load_rows(corner, lane, live, EVEN: tl.constexpr):
    """One snapshot of the program's rows, as float32. Rows beyond the last one read 0.

    ``corner`` is one pointer that the caller moves. A tensor of pointers that is carried through a loop was
    seen to change its layout in every turn, through shared memory and two barriers.
    """
    # Without a mask the loads are 16 bytes wide whatever N is.
    if EVEN:
        return tl.load(corner + lane).to(tl.float32)
    else:
        return tl.load(corner + lane, mask=live, other=0.0).to(tl.float32)


@triton.jit
def zeros(COUNT: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tuple of COUNT vectors. One 2-D tensor would be laid out across lanes and reduced by shuffles."""
    result = ()
    for _ in tl.static_range(COUNT):
        result = result + (tl.zeros([BLOCK_N], tl.float32),)
    return result


@triton.jit
def spread_pivot(corner, lane, live, ld, T: tl.constexpr, EVEN: tl.constexpr):
    """p = w_0 + mean over k < 8 of (w[floor(k T / 8)] - w_0), or w_0 when T < 8.

    Exact for a row that never moves, which the mean of 8 equal floats is not.
    """
    first = load_rows(corner, lane, live, EVEN)
    if T < 8:
        return first
    else:
        total = tl.zeros_like(first)
        for k in tl.static_range(1, 8):
            total += load_rows(corner + (k * T // 8) * ld, lane, live, EVEN) - first
        return tl.fma(total, 0.125, first)


@triton.jit
def fill_ring(corner, lane, live, ld, T: tl.constexpr, RING: tl.constexpr, EVEN: tl.constexpr):
    """The first RING snapshots as a tuple, a pointer to the next one, and how often that may still move."""
    w = ()
    for k in tl.static_range(RING):
        w = w + (load_rows(corner + min(k, T - 1) * ld, lane, live, EVEN),)
    return w, corner + min(RING, T - 1) * ld, tl.full([], max(T - 1 - RING, 0), tl.int32)


@triton.jit
def _turn_ring(
    ring,
    sums,
    lane,
    live,
    pivot,
    ld,
    STEPS: tl.constexpr,  # at most as many as the ring holds
    COUNT: tl.constexpr,
    EVEN: tl.constexpr,
    MORE: tl.constexpr,  # snapshots are still to come
    CLAMP: tl.constexpr,  # perhaps fewer than STEPS of them
):
    """Add the ring's first STEPS snapshots to the sums; each makes room for the next one to come."""
    w, coming, left, z = ring
    s1, s2, d = sums
    loaded = ()
    for k in tl.static_range(STEPS):
        x = w[k] - pivot
        if MORE:
            loaded = loaded + (load_rows(coming, lane, live, EVEN),)
            if CLAMP:
                # The last snapshot is read again: from a cache, and for nobody.
                coming += tl.minimum(left, 1) * ld
                left = tl.maximum(left - 1, 0)
            else:
                coming += ld
        s1 += x
        s2 = tl.fma(x, x, s2)
        longer = ()
        for pair in tl.static_range((COUNT + 1) // 2):
            # A uniform scalar load: no shared memory, no barrier; two at once, as these loads are what the
            # load units are busy with.
            both = tl.load(z + pair)
            longer = longer + (tl.fma(x, both.to(tl.int32).to(tl.float32, bitcast=True), d[2 * pair]),)
            if 2 * pair + 1 < COUNT:
                second = (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)
                longer = longer + (tl.fma(x, second, d[2 * pair + 1]),)
        d = longer
        z += (COUNT + 1) // 2
    return (w[STEPS:] + loaded, coming, left, z), (s1, s2, d)


@triton.jit
def sum_partial(
    ring,  # see fill_ring, and a pointer to the partial's first row of pairs of references
    d,  # sums of x z_m of the partials before
    lane,
    live,
    pivot,
    ld,
    STEPS: tl.constexpr,
    COUNT: tl.constexpr,  # references
    BLOCK_N: tl.constexpr,
    RING: tl.constexpr,
    EVEN: tl.constexpr,
    LAST: tl.constexpr,  # no snapshot comes after it
    CLAMP: tl.constexpr,  # fewer than RING do
):
    """Sums of x, x^2 and x z_m over STEPS snapshots, with x = w - pivot; and the ring after them."""
    none = tl.zeros([BLOCK_N], tl.float32)
    sums = (none, none, d)
    LOADED: tl.constexpr = max(STEPS - RING, 0) if LAST else STEPS
    for _ in tl.range(0, LOADED // RING):
        ring, sums = _turn_ring(ring, sums, lane, live, pivot, ld, RING, COUNT, EVEN, True, CLAMP)
    if LOADED % RING != 0:
        ring, sums = _turn_ring(ring, sums, lane, live, pivot, ld, LOADED % RING, COUNT, EVEN, True, CLAMP)
    if LAST:
        ring, sums = _turn_ring(ring, sums, lane, live, pivot, ld, STEPS - LOADED, COUNT, EVEN, False, CLAMP)
    return ring, sums


@triton.jit
def merge_moments(s1, s2, seen, mean, ss, steps):
    """Mean and centred sum of squares with one more partial, and that partial's mean; all from one pivot."""
    mean_x = tl.div_rn(s1, steps * 1.0)
    gap = mean_x - mean
    share = steps / (seen + steps)
    mean = tl.fma(gap, share, mean)
    ss += tl.fma(-s1, mean_x, s2)
    ss = tl.fma(gap * gap, seen * share, ss)
    return mean, ss, mean_x


@triton.jit
def split_tf32(x):
    """x = high + low, exactly; high holds the 11 bits that a tensor core reads. NaN and inf stay so."""
    high = (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def round_split_tf32(x):
    """The same with high rounded to nearest: low is half as large and has either sign. For finite x."""
    high = ((x.to(tl.int32, bitcast=True) + 0x1000) & -8192).to(tl.float32, bitcast=True)
    return high, x - high
