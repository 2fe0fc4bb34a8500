"""``assign_and_fit`` in plain torch: any device, any number of references, tiles of a fixed shape.

A tile of 16,384 rows is counted from the first row of the call and padded to full size, and its snapshots
pass in partials of 64 through one buffer, so every matrix product of a run has the same shapes, the same
alignment and one thread. A row's bits then depend on its place in its tile only: not on the number of rows,
of threads, nor on where a caller cuts his blocks, as long as he cuts at multiples of 16,384.

Snapshots t of partial c, pivot p_c, n of them:

    x     = w_t - p_c         p_0 = w_0 + mean over 8 snapshots spread over T of (w - w_0)
    p_c+1 = p_c + mean(x)     follows the row: what it sums stays small, however far the row drifts
    d_m  += <x, z_m> + (p_c - p_c-1) * (sum of z_m from here on)      one product, see ``_Packed``
    ss   += |x - mean(x)|^2 + what the partial's mean differs from the mean so far, as moments merge
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmdgpu_kernels.assignment.row_fit import RowFit
from cmdgpu_kernels.dispatch import Problem
from cmdgpu_kernels.limits import CONSTANT, LARGEST_SS, NOT_FINITE, PARTIAL, SMALLEST_SS
from cmdgpu_kernels.precision import exact_matmul
from cmdgpu_kernels.references import References
from cmdgpu_kernels.workers import run_in_workers

__all__ = ["TILE", "TOLERANCE", "refusals", "run", "workspace_bytes"]

F32 = NDArray[np.float32]

TILE = 16_384
"""Rows of a tile. Smaller ones fit the L2 cache but spend their time in Python: a sketch of this loop on two
threads reached 2.1 GB/s with 2,048 rows, 3.8 with 8,192 and 4.3 with 16,384."""

GROUP = 128
"""References of one product. More are taken in turns, reading W again, so that M does not size the memory."""

VECTORS = 32
"""Vectors of TILE elements for everything that is per row: moments, the best reference so far, outputs."""

LIBRARY = 16 * 2**20
"""What the BLAS library and the thread itself keep per thread: packed operands, stacks."""

NAN_BITS = 0x7FC00000
"""The one NaN of the outputs, quiet and positive."""

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


def workspace_bytes(snapshots: int, modes: int, threads: int) -> int:
    """Memory of a pass beside W and the outputs: a tile for each thread, and the packed references."""
    group = min(modes, GROUP)
    tile = 4 * TILE * (min(snapshots, PARTIAL) + 2 * group + VECTORS)
    return threads * (tile + LIBRARY) + 4 * snapshots * (modes + 1)


def run(W_tb: Tensor, references: References, *, margin: bool = False, threads: int | None = None) -> RowFit:
    """Fit the rows of W_tb, (T, B) with any strides. ``threads`` counts tiles in flight, on the CPU only."""
    rows = W_tb.shape[1]
    fit = RowFit.empty(rows, W_tb.device, margin=margin)
    packed = _packed(references, W_tb.device)
    starts = range(0, rows, TILE)

    def work(tiles: Iterable[int]) -> None:
        # Also writes outputs that were made in a caller's inference mode, which no_grad may not.
        with torch.inference_mode():
            tile = _Tile.empty(packed, W_tb.device)
            for start in tiles:
                _fit_tile(W_tb, start, packed, tile, fit)

    with exact_matmul(W_tb.device.type):
        if W_tb.device.type == "cpu":
            # In a worker even for one thread: the caller's own thread may use several inside a product.
            run_in_workers(work, starts, threads or torch.get_num_threads())
        else:
            work(starts)
    return fit


@dataclass(frozen=True)
class _Packed:
    """The distinct references as a run multiplies by them, and what their winner is looked up in."""

    groups: list[list[Tensor]]
    """Groups of references, each cut into partials: (references + 1, <= 64 snapshots [+ 1]).

    The last row is ones, for the sum of x. From the second partial on a last column holds what multiplies the
    step of the pivot: the sums of z_m from there on, and 0 in the row of ones.
    """
    index_m: Tensor
    """int32: the caller's number of each distinct reference."""
    mean_m: Tensor
    rnorm_inv_m: Tensor
    snapshots: int


def _packed(references: References, device: torch.device) -> _Packed:
    def build() -> _Packed:
        which = references.distinct
        z_mt, tail_mc, index_m = references.z_mt[which], references.tail_mc[which], which
        mean_m, rnorm_inv_m = references.mean_m[which], references.rnorm_inv_m[which]
        if len(which) == 0:
            # No reference acts like one that nothing correlates with, and that is nobody's mode.
            z_mt, tail_mc = (
                np.zeros((1, z_mt.shape[1]), np.float32),
                np.zeros((1, tail_mc.shape[1]), np.float32),
            )
            index_m, mean_m, rnorm_inv_m = np.array([CONSTANT]), np.zeros(1), np.zeros(1)
        groups = [
            _partials(z_mt[first : first + GROUP], tail_mc[first : first + GROUP])
            for first in range(0, len(z_mt), GROUP)
        ]
        return _Packed(
            [[torch.tensor(partial, device=device) for partial in group] for group in groups],
            torch.tensor(index_m, dtype=torch.int32, device=device),
            torch.tensor(mean_m, dtype=torch.float32, device=device),
            torch.tensor(rnorm_inv_m, dtype=torch.float32, device=device),
            references.snapshots,
        )

    return references.cached(("torch", device), build)


def _partials(z_mt: F32, tail_mc: F32) -> list[F32]:
    """What x and the pivot's step are multiplied by, partial by partial."""
    snapshots = z_mt.shape[1]
    partials: list[F32] = []
    for c, first in enumerate(range(0, snapshots, PARTIAL)):
        cut = z_mt[:, first : first + PARTIAL]
        partial = np.vstack([cut, np.ones((1, cut.shape[1]), np.float32)])
        if c > 0:
            partial = np.hstack([partial, np.append(tail_mc[:, c], np.float32(0))[:, None]])
        partials.append(np.ascontiguousarray(partial))
    return partials


@dataclass(frozen=True)
class _Tile:
    """Buffers of one tile, used again for the next. Per-row vectors are (TILE,), float32."""

    x: Tensor
    """(<= 64 + 1, TILE): a partial of the block behind its pivot, and the step of the pivot before it."""
    product: Tensor
    """(references + 1, TILE): d_m and the sum of x over one partial."""
    d_m: Tensor
    """(references, TILE): the totals."""
    origin: Tensor
    """The first pivot."""
    pivot: Tensor
    step: Tensor
    """What the pivot moved by before this partial."""
    mean: Tensor
    """Mean so far, from the pivot."""
    ss: Tensor
    scratch: Tensor
    size: Tensor
    best: Tensor
    """Largest |d_m| so far, and the second largest."""
    second: Tensor
    winner: Tensor
    """Position of the best among the distinct references; float32 holds 32,767 of them exactly."""
    d: Tensor
    """d_m of the winner, with its sign."""

    @classmethod
    def empty(cls, packed: _Packed, device: torch.device) -> _Tile:
        def block(*shape: int) -> Tensor:
            return torch.empty(*shape, TILE, dtype=torch.float32, device=device)

        width = max(len(group[0]) for group in packed.groups)
        return cls(
            x=block(max(z.shape[1] for z in packed.groups[0])),
            product=block(width),
            d_m=block(width),
            origin=block(),
            pivot=block(),
            step=block(),
            mean=block(),
            ss=block(),
            scratch=block(),
            size=block(),
            best=block(),
            second=block(),
            winner=block(),
            d=block(),
        )


def _fit_tile(W_tb: Tensor, start: int, packed: _Packed, tile: _Tile, fit: RowFit) -> None:
    rows_tb = W_tb[:, start : start + TILE]
    if rows_tb.shape[1] < TILE:
        # Columns beyond the last row hold 0 and stay 0 through every step below.
        tile.x.zero_()
        tile.origin.zero_()
    _set_origin(rows_tb, tile)
    for vector in (tile.mean, tile.ss, tile.best, tile.second):
        vector.zero_()
    for number, group in enumerate(packed.groups):
        first = number * GROUP
        d_m = tile.d_m[: len(group[0]) - 1].zero_()
        tile.pivot.copy_(tile.origin)
        for c, z in enumerate(group):
            seen = c * PARTIAL
            here = rows_tb[seen : seen + PARTIAL]
            x = tile.x[: len(here)]
            _load(here, tile.pivot, out=x)
            if c > 0:
                tile.x[len(here)].copy_(tile.step)
            product = torch.mm(z, tile.x[: z.shape[1]], out=tile.product[: len(z)])
            d_m.add_(product[:-1])
            _follow(x, product[-1], seen, tile, moments=number == 0)
        _keep_best(d_m, first, tile, margin=fit.margin is not None)
    _store(tile, packed, slice(start, start + rows_tb.shape[1]), fit)


def _set_origin(rows_tb: Tensor, tile: _Tile) -> None:
    """p_0 = w_0 + mean over k < 8 of (w[floor(k T / 8)] - w_0), or w_0 when T < 8.

    Exact for a row that never moves, which the mean of 8 equal floats is not.
    """
    snapshots, rows = rows_tb.shape
    first = tile.origin[:rows].copy_(rows_tb[0])
    if snapshots < 8:
        return
    sample, total = tile.scratch[:rows], tile.size[:rows].zero_()
    for k in range(1, 8):
        total.add_(sample.copy_(rows_tb[k * snapshots // 8]).sub_(first))
    first.add_(total.mul_(0.125))


def _load(rows_tb: Tensor, pivot: Tensor, *, out: Tensor) -> None:
    """x = w - p in float32; the padded columns of ``out`` are left alone."""
    rows = rows_tb.shape[1]
    x = out[:, :rows]
    if rows_tb.dtype == torch.float32:
        torch.sub(rows_tb, pivot[:rows], out=x)
    else:
        x.copy_(rows_tb).sub_(pivot[:rows])


def _follow(x: Tensor, sum_x: Tensor, seen: int, tile: _Tile, *, moments: bool) -> None:
    """Add the partial to the moments and move the pivot to its mean. Overwrites x and its sum."""
    steps = len(x)
    mean = sum_x.div_(steps)
    if moments:
        ss = torch.sum(x.mul_(x), 0, out=tile.scratch)
        tile.ss.add_(ss.addcmul_(mean, mean, value=-steps))
        gap = torch.sub(mean, tile.mean, out=tile.scratch)
        tile.mean.add_(gap, alpha=steps / (seen + steps))
        tile.ss.addcmul_(gap, gap, value=seen * steps / (seen + steps))
    tile.step.copy_(tile.pivot)
    tile.pivot.add_(mean)
    # The step that was taken, which rounding makes another than the one that was meant.
    torch.sub(tile.pivot, tile.step, out=tile.step)
    if moments:
        tile.mean.sub_(tile.step)


def _keep_best(d_m: Tensor, first: int, tile: _Tile, *, margin: bool) -> None:
    """Largest |d| so far with the references ``first, first + 1, ...``: a tie leaves the lower one.

    A few passes over all of them: ``torch.max``, which also gives the index, takes six times longer on the
    CPU, and many small operations make the threads wait for one another in Python.
    """
    count = len(d_m)
    size_m = torch.abs(d_m, out=tile.product[:count])
    size = torch.amax(size_m, 0, out=tile.size)
    if margin:
        torch.maximum(tile.second, torch.minimum(size, tile.best), out=tile.second)
        if count > 1:
            torch.maximum(tile.second, size_m.topk(2, dim=0).values[1], out=tile.second)
    # Of those that reach the maximum the lowest has the highest rank. NaN reaches nothing: rank 0.
    rank = torch.arange(count, 0, -1, dtype=torch.float32, device=d_m.device)[:, None]
    reached = torch.eq(size_m, size, out=size_m).mul_(rank)
    found = torch.amax(reached, 0, out=tile.scratch).neg_().add_(count).clamp_(max=count - 1)
    d_found = d_m.gather(0, found.long()[None])[0]
    if first == 0:
        tile.best.copy_(size)
        tile.winner.copy_(found)
        tile.d.copy_(d_found)
    else:
        better = size > tile.best
        tile.best.copy_(torch.where(better, size, tile.best))
        tile.winner.copy_(torch.where(better, found.add_(first), tile.winner))
        tile.d.copy_(torch.where(better, d_found, tile.d))


def _store(tile: _Tile, packed: _Packed, here: slice, fit: RowFit) -> None:
    """Close the fit of a tile and write the rows ``here``."""
    # NaN compares false, so a row that is not finite is neither within the limit nor moving.
    finite = _mask(torch.le, tile.ss, LARGEST_SS)
    moving = _mask(torch.ge, tile.ss, SMALLEST_SS).bitwise_and_(finite)
    winner = tile.winner.long()
    # Not sqrt: that goes to MKL's vector library, whose first call, made by two threads at once, now and then
    # answers one of them with 12 bits (measured: 1 process in 12, MKL of torch 2.13).
    norm_inv = torch.rsqrt(tile.ss)
    mean = tile.pivot.add_(tile.mean)

    mode = _where(finite, _where(moving, packed.index_m.index_select(0, winner), CONSTANT), NOT_FINITE)
    a = _where(moving, tile.d * packed.rnorm_inv_m.index_select(0, winner), 0)
    b = _where(finite, torch.addcmul(mean, a, packed.mean_m.index_select(0, winner), value=-1.0), NAN_BITS)
    # Two snapshots correlate perfectly with anything that moves; rounding has no say.
    correlation = torch.sign(tile.d) if packed.snapshots == 2 else (tile.d * norm_inv).clamp_(-1.0, 1.0)
    outputs = [
        (fit.mode, mode),
        (fit.a, a),
        (fit.b, b),
        (fit.correlation, _where(moving, correlation, 0)),
        (fit.ss, _where(finite, _where(_mask(torch.ge, tile.ss, SMALLEST_SS), tile.ss, 0), NAN_BITS)),
    ]
    if fit.margin is not None:
        outputs.append((fit.margin, _where(moving, (tile.best - tile.second) * norm_inv, 0)))
    rows = here.stop - here.start
    for target, source in outputs:
        target[here] = source[:rows]


def _mask(compare: Callable[..., Tensor], values: Tensor, limit: float) -> Tensor:
    """All bits set where the comparison holds, none elsewhere."""
    return compare(values, limit, out=torch.empty_like(values, dtype=torch.int32)).neg_()


def _where(mask: Tensor, values: Tensor, other: int) -> Tensor:
    """``values`` where the mask is set, the bits ``other`` elsewhere, in place.

    Twenty times faster on the CPU than ``torch.where``; and unlike a product with 0 it clears NaN.
    """
    values.view(torch.int32).bitwise_and_(mask).bitwise_or_(mask.bitwise_not().bitwise_and_(other))
    return values
