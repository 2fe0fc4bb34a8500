"""What is measured: blocks of W in memory, by T, rows, M and element type; and the suites they form."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

F32 = NDArray[np.float32]

PADDING = 96
"""Elements between the snapshots of a block: a power-of-two stride puts them all in the same cache sets."""
OUTPUT_ROW_BYTES = 18
"""mode 2, a 4, b 4, correlation 4, ss 4."""
_SHIFTS = 1 << 16


@dataclass(frozen=True)
class Case:
    snapshots: int
    rows: int
    modes: int
    dtype: str = "float32"
    threads: int | None = None
    """All of the machine's when None."""
    operation: str = "assign_and_fit"
    """Or ``decompose``: sample, cluster, assign and fit, from the matrix to the result."""

    @property
    def name(self) -> str:
        threads = "" if self.threads is None else f" threads={self.threads}"
        return f"{self.operation} T={self.snapshots} N={self.rows} M={self.modes} {self.dtype}{threads}"

    @property
    def block(self) -> tuple[int, int, str]:
        """What cases that share a block share."""
        return self.snapshots, self.rows, self.dtype

    def bytes(self, rows: int) -> int:
        """Bytes that must move for that many rows: W read once, 18 bytes of results written per row."""
        itemsize: int = getattr(torch, self.dtype).itemsize
        return rows * (self.snapshots * itemsize + OUTPUT_ROW_BYTES)

    def references(self) -> F32:
        """R_mt (M, T): random walks, never constant."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn((self.modes, self.snapshots), generator=generator).cumsum_(dim=1).numpy()


def walks(rows: int, snapshots: int) -> Iterator[Tensor]:
    """Columns of independent random walks, float32; the same tensor each time, a step further.

    Every step takes the same normal numbers from another place.
    """
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(rows + _SHIFTS, generator=generator)
    shifts = torch.randint(_SHIFTS, (snapshots,), generator=generator)
    column = torch.zeros(rows)
    for shift in map(int, shifts):
        column += steps[shift : shift + rows]
        yield column


@dataclass(eq=False)
class Block:
    """One matrix of random walks in every layout a provider may want; each is made when first asked for."""

    snapshots: int
    rows: int
    dtype: str
    free_bytes: int
    """Memory that the rivals' copies and everybody's intermediate matrices may take."""
    prepare_ms: dict[str, float] = field(default_factory=dict[str, float])

    @cached_property
    def whole(self) -> Tensor:
        """(T, rows + padding)."""
        width = self.rows + PADDING
        W = torch.empty((self.snapshots, width), dtype=getattr(torch, self.dtype))
        for t, column in enumerate(walks(width, self.snapshots)):
            W[t] = column
        return W

    @property
    def W_tb(self) -> Tensor:
        """Time-major, (T, rows), snapshots padded apart: the layout of a block in flight."""
        return self.whole[:, : self.rows]

    @property
    def rival_rows(self) -> int:
        """Rows that fit in memory row-major and centred, and once more within a run."""
        return min(self.rows, self.free_bytes // (12 * self.snapshots))

    def rival_rows_of(self, modes: int) -> int:
        """Of them, those whose three rows x M matrices fit, too."""
        left = self.free_bytes - 8 * self.snapshots * self.rival_rows
        return min(self.rival_rows, left // (4 * (self.snapshots + 3 * modes)))

    @cached_property
    def W_nt(self) -> F32:
        """Row-major float32, (rival_rows, T): what NumPy and torch users hold."""
        started = time.perf_counter()
        out = np.empty((self.rival_rows, self.snapshots), dtype=np.float32)
        for start in range(0, self.rival_rows, 1 << 14):
            stop = min(start + (1 << 14), self.rival_rows)
            torch.as_tensor(out[start:stop]).copy_(self.W_tb[:, start:stop].T)
        self.prepare_ms["row-major"] = 1e3 * (time.perf_counter() - started)
        return out

    @cached_property
    def mean_n(self) -> F32:
        return self.W_nt.mean(axis=1)

    @cached_property
    def centred_nt(self) -> F32:
        """Row-major float32 without each row's mean. The search for the largest |product| needs no norms."""
        W_nt, mean_n = self.W_nt, self.mean_n
        started = time.perf_counter()
        centred = W_nt - mean_n[:, None]
        self.prepare_ms["centring"] = 1e3 * (time.perf_counter() - started)
        return centred


@dataclass(frozen=True)
class Suite:
    name: str
    cases: tuple[Case, ...]
    runs: int
    rival_seconds: float
    """A run that would take longer is made on fewer rows: the work is linear in them."""
    least_rows: int
    """But never on fewer than these. Who is that slow computes, and does not wait for memory."""


def _curves(base: Case, *, N: Sequence[int], T: Sequence[int], M: Sequence[int]) -> tuple[Case, ...]:
    """Cases that differ from ``base`` along one axis at a time, each of them once."""
    cases = [
        *(replace(base, modes=modes) for modes in M),
        *(replace(base, rows=rows) for rows in N),
        *(replace(base, snapshots=snapshots) for snapshots in T),
    ]
    return tuple(dict.fromkeys(cases))


_QUICK = Case(100, 4_000_000, 10)
_FEW = replace(_QUICK, rows=1_000_000)
_FULL = Case(100, 20_000_000, 10)

SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "tiny",
            (
                Case(20, 1024, 3),
                Case(20, 1024, 5),
                Case(20, 1024, 3, "bfloat16"),
                Case(20, 1024, 3, "float16", threads=1),
                Case(20, 1024, 3, operation="decompose"),
            ),
            runs=2,
            rival_seconds=1.0,
            least_rows=256,
        ),
        Suite(
            "quick",
            (
                *_curves(_QUICK, N=(100_000, 1_000_000), T=(), M=(1, 2, 10, 30, 100, 300, 1000)),
                replace(_QUICK, threads=1),
                *_curves(_FEW, N=(), T=(20, 50, 200, 500), M=(10,))[1:],
                replace(_FEW, dtype="bfloat16"),
                replace(_FEW, dtype="float16"),
                replace(_FEW, operation="decompose"),
            ),
            runs=5,
            rival_seconds=0.4,
            least_rows=1 << 14,
        ),
        Suite(
            "full",
            (
                *_curves(
                    _FULL,
                    N=(100_000, 1_000_000, 4_000_000),
                    T=(20, 50),
                    M=(1, 2, 5, 10, 20, 30, 50, 100, 300, 1000),
                ),
                *_curves(_QUICK, N=(), T=(20, 50, 200, 500), M=(1, 2, 10, 30, 100, 300, 1000)),
                Case(20, 100_000_000, 10),
                replace(_FULL, threads=1),
                *(
                    replace(_FULL, dtype=dtype, modes=modes)
                    for dtype in ("bfloat16", "float16")
                    for modes in (1, 10, 100)
                ),
                replace(_QUICK, operation="decompose"),
            ),
            runs=7,
            rival_seconds=60.0,
            least_rows=1 << 17,
        ),
    )
}
