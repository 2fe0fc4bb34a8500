"""The operation ``class_sums``: what the rows of a fit add up to, by class, and a histogram of |corr|."""

from __future__ import annotations

from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cmdgpu_kernels import dispatch
from cmdgpu_kernels.class_sums import native_impl
from cmdgpu_kernels.class_sums.reference import FIELDS, FIRST_MODE, N_BINS, FittedRows, class_sums_reference
from cmdgpu_kernels.dispatch import Implementation, Problem
from cmdgpu_kernels.native import library

__all__ = ["FIELDS", "FIRST_MODE", "IMPLEMENTATIONS", "N_BINS", "class_sums", "class_sums_reference"]

F32 = NDArray[np.float32]


class Run(Protocol):
    def __call__(
        self, fitted: FittedRows, sums: NDArray[np.float64], histogram: NDArray[np.int64] | None, /
    ) -> None: ...


def _takes(problem: Problem) -> tuple[str, ...]:
    return () if problem.device == "cpu" else (f"needs the CPU, got {problem.device!r}",)


IMPLEMENTATIONS: tuple[Implementation[Run], ...] = (
    *(
        Implementation(
            f"native-{path}",
            partial(native_impl.run, path),
            partial(library.refusals, path),
            {"float32": 0.0},
        )
        for path in library.PATHS
    ),
    Implementation("numpy", class_sums_reference, _takes, {"float32": 0.0}),
)


def class_sums(
    mode: NDArray[np.int16],
    a: F32,
    b: F32,
    correlation: F32,
    ss: F32,
    *,
    reference_means: NDArray[np.float64],
    n_snapshots: int,
    epsilon: float,
    sums: NDArray[np.float64],
    histogram: NDArray[np.int64] | None,
    implementation: str | None = None,
) -> None:
    """Add rows of a fit to ``sums`` (FIELDS, 2 + M) and ``histogram`` (M, N_BINS), both C-contiguous.

    The sums are defined by ``class_sums_reference``; every implementation gives its bits.
    """
    candidates = [c for c in IMPLEMENTATIONS if implementation in (None, c.name)]
    problem = Problem("float32", n_snapshots, len(reference_means), "cpu")
    chosen, _ = dispatch.choose("class_sums", candidates, problem)
    fitted = FittedRows(mode, a, b, correlation, ss, reference_means, n_snapshots, epsilon)
    chosen.run(fitted, sums, histogram)
