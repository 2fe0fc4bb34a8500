"""``assign_and_fit`` in Triton: what may run it, and its launch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cmdgpu_kernels.assignment.row_fit import RowFit
from cmdgpu_kernels.dispatch import Problem
from cmdgpu_kernels.limits import PARTIAL
from cmdgpu_kernels.references import References
from cmdgpu_kernels.tuning import ASSIGN_AND_FIT

__all__ = ["MAX_REFERENCES", "TOLERANCE", "refusals", "refusals_interpreted", "run"]


def _kernels() -> tuple[Any, str | None]:
    """The module of kernels, or why there is none. A triton that is there but broken is not hidden."""
    try:
        import triton  # noqa: F401  # pyright: ignore[reportMissingTypeStubs, reportUnusedImport]
    except ImportError as error:
        return None, f"triton cannot be imported: {error}"
    from cmdgpu_kernels.assignment import triton_kernel

    return triton_kernel, None


KERNELS, ABSENT = _kernels()
INTERPRETED: bool = ABSENT is None and KERNELS.INTERPRETED

MAX_REFERENCES = 16
"""Beyond it the multiply-adds take longer than reading W, and a matrix product is the better form."""

TRANSPOSED = 64 * 2**20
"""Bytes of a row-major block that are turned at a time."""

TOLERANCE = {"float32": 3e-6, "float16": 3e-6, "bfloat16": 3e-6}


def refusals(problem: Problem) -> tuple[str, ...]:
    """Every reason why the compiled kernel cannot serve the problem."""
    reasons = [f"needs a CUDA device, got {problem.device!r}"] if problem.device != "cuda" else []
    if INTERPRETED:
        reasons.append("TRITON_INTERPRET was set when the kernels were imported")
    return (*reasons, *_refusals(problem))


def refusals_interpreted(problem: Problem) -> tuple[str, ...]:
    """Every reason why Triton's interpreter cannot serve the problem."""
    reasons = [f"needs the CPU, got {problem.device!r}"] if problem.device != "cpu" else []
    if ABSENT is None and not INTERPRETED:
        reasons.append("TRITON_INTERPRET=1 was not set before the kernels were imported")
    return (*reasons, *_refusals(problem))


def _refusals(problem: Problem) -> list[str]:
    reasons = [] if ABSENT is None else [ABSENT]
    if problem.dtype not in ASSIGN_AND_FIT:
        reasons.append(f"dtype {problem.dtype} (supported: {', '.join(ASSIGN_AND_FIT)})")
    if problem.modes == 0:
        reasons.append("no reference (torch fits rows without one)")
    if problem.modes > MAX_REFERENCES:
        reasons.append(
            f"{problem.modes} references (at most {MAX_REFERENCES}; torch takes more, as a matrix product)"
        )
    return reasons


def run(W_tb: Tensor, references: References, *, margin: bool = False, threads: int | None = None) -> RowFit:
    """Fit the rows of W_tb, (T, B) with any strides. ``threads`` means nothing here.

    A block whose snapshots are not contiguous is turned in parts that bound the extra memory.
    """
    snapshots, rows = W_tb.shape
    fit = RowFit.empty(rows, W_tb.device, margin=margin)
    if W_tb.stride(1) == 1:
        _launch(W_tb, references, fit, slice(0, rows))
        return fit
    block_rows = ASSIGN_AND_FIT[str(W_tb.dtype).removeprefix("torch.")].block_rows
    part = max(TRANSPOSED // (snapshots * W_tb.element_size()) // block_rows, 1) * block_rows
    for start in range(0, rows, part):
        here = slice(start, min(start + part, rows))
        _launch(W_tb[:, here].contiguous(), references, fit, here)
    return fit


def _launch(W_tb: Tensor, references: References, fit: RowFit, here: slice) -> None:
    """Fit the rows of W_tb into the outputs ``here``."""
    snapshots, rows = W_tb.shape
    launch = ASSIGN_AND_FIT[str(W_tb.dtype).removeprefix("torch.")]
    sweeps, count = launch.sweeps(len(references.distinct))
    packed = _packed(references, sweeps * count, W_tb.device)
    correlation = fit.correlation[here]
    on_device = torch.cuda.device(W_tb.device) if W_tb.device.type == "cuda" else torch.no_grad()
    with on_device:
        KERNELS.assign_and_fit_kernel[(-(-rows // launch.block_rows),)](
            W_tb,
            *packed,
            fit.mode[here],
            fit.a[here],
            fit.b[here],
            correlation,
            fit.ss[here],
            # Not written unless asked for, but a kernel argument must be some tensor.
            correlation if fit.margin is None else fit.margin[here],
            rows,
            W_tb.stride(0),
            T=snapshots,
            PARTIAL=PARTIAL,
            SWEEPS=sweeps,
            COUNT=count,
            BLOCK_N=launch.block_rows,
            UNROLL=launch.unroll,
            EVEN=rows % launch.block_rows == 0,
            MARGIN=fit.margin is not None,
            num_warps=launch.warps,
        )


def _packed(references: References, width: int, device: torch.device) -> tuple[Tensor, ...]:
    """The distinct references, time-major and padded to ``width``, and what their winner is looked up in."""

    which = references.distinct

    def time_major(rows: NDArray[np.float32]) -> Tensor:
        padded = np.pad(rows[which].T, ((0, 0), (0, width - len(which))))
        # NumPy keeps the order of the transposed view, and torch keeps it too.
        return torch.tensor(np.ascontiguousarray(padded), device=device)

    def build() -> tuple[Tensor, ...]:
        return (
            time_major(references.z_mt),
            time_major(references.tail_mc),
            torch.tensor(which, dtype=torch.int32, device=device),
            torch.tensor(references.mean_m[which], dtype=torch.float32, device=device),
            torch.tensor(references.rnorm_inv_m[which], dtype=torch.float32, device=device),
        )

    return references.cached(("triton", width, device), build)
