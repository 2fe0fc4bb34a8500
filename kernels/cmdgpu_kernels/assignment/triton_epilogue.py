"""The end of every ``assign_and_fit`` kernel: a winner and moments become the outputs of a row.

Imported only where triton is.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownParameterType=false, reportUnknownArgumentType=false, reportMissingParameterType=false
# pyright: reportGeneralTypeIssues=false, reportInvalidTypeForm=false, reportUnnecessaryIsInstance=false
# The language inside @triton.jit has no types that a checker could see.

from __future__ import annotations

import triton
import triton.language as tl

from cmdgpu_kernels import limits

__all__ = ["store_fit"]

CONSTANT = tl.constexpr(limits.CONSTANT)
NOT_FINITE = tl.constexpr(limits.NOT_FINITE)
SMALLEST_SS = tl.constexpr(limits.SMALLEST_SS)
LARGEST_SS = tl.constexpr(limits.LARGEST_SS)


@triton.jit
def store_fit(
    winner,  # position among the distinct references; any valid one for a row without a mode
    d_best,  # <w, z_winner>
    best,  # |d_best|
    second,  # the next smaller |<w, z_m>|
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
    out,  # rows to write
    live,
    T: tl.constexpr,
    EVEN: tl.constexpr,
    MARGIN: tl.constexpr,
):
    """Close the fit of the program's rows and write every output."""
    # NaN compares false, so a row that is not finite is neither within the limit nor still.
    finite = ss <= LARGEST_SS
    still = ss < SMALLEST_SS
    moving = finite & (ss >= SMALLEST_SS)
    # The divisor is guarded, not the quotient: the interpreter would warn about the latter.
    norm = tl.sqrt_rn(tl.where(moving, ss, 1.0))

    a = tl.where(moving, d_best * tl.load(rnorm_inv_m + winner), 0.0)
    b = tl.fma(-a, tl.load(mean_m + winner), mean)
    if T == 2:
        # Two snapshots correlate perfectly with anything that moves; rounding has no say.
        correlation = tl.where(d_best < 0.0, -1.0, 1.0)
    else:
        correlation = tl.minimum(tl.maximum(tl.div_rn(d_best, norm), -1.0), 1.0)
    mode = tl.where(moving, tl.load(index_m + winner), CONSTANT)

    stored = live if not EVEN else None
    tl.store(mode_n + out, tl.where(finite, mode, NOT_FINITE).to(tl.int16), mask=stored)
    tl.store(a_n + out, a, mask=stored)
    # Not a global: one that is not equal to itself counts as changed since the kernel was compiled.
    nan = float("nan")
    tl.store(b_n + out, tl.where(finite, b, nan), mask=stored)
    tl.store(correlation_n + out, tl.where(moving, correlation, 0.0), mask=stored)
    tl.store(ss_n + out, tl.where(finite, tl.where(still, 0.0, ss), nan), mask=stored)
    if MARGIN:
        margin = tl.where(moving, tl.div_rn(best - second, norm), 0.0)
        tl.store(margin_n + out, margin, mask=stored)
