"""What is measured: blocks of W in memory, by T, rows, M and element type."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    snapshots: int
    rows: int
    modes: int
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return f"assign_and_fit T={self.snapshots} B={self.rows} M={self.modes} {self.dtype}"

    @property
    def bytes(self) -> int:
        """Bytes that must move: W read once, mode 2 + a 4 + b 4 + correlation 4 + ss 4 written per row."""
        itemsize: int = getattr(torch, self.dtype).itemsize
        return self.snapshots * self.rows * itemsize + 18 * self.rows

    def make(self) -> tuple[Tensor, Tensor]:
        """W_tb (T, B), time-major with padded rows, and R_mt (M, T): random walks, never zeros."""
        generator = torch.Generator().manual_seed(0)
        wide = torch.randn((self.snapshots, self.rows + 96), generator=generator).cumsum_(dim=0)
        W_tb = wide.to(getattr(torch, self.dtype))[:, : self.rows]
        R_mt = torch.randn((self.modes, self.snapshots), generator=generator).cumsum_(dim=1)
        return W_tb, R_mt


CPU_CASES = (
    Case(100, 1 << 20, 1),
    Case(100, 1 << 20, 2),
    Case(100, 1 << 20, 10),
    Case(100, 1 << 20, 30),
    Case(20, 1 << 22, 10),
    Case(500, 1 << 18, 10),
    Case(100, 1 << 20, 10, "bfloat16"),
)
TINY_CASES = (Case(20, 1024, 3), Case(20, 1024, 3, "bfloat16"))
