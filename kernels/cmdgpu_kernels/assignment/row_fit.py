"""What the pass knows about every row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

__all__ = ["RowFit"]


@dataclass(frozen=True, eq=False)
class RowFit:
    """Mode and straight line of B rows: ``w ~ a * r[mode] + b``. Tensors of shape (B,), on W's device."""

    mode: Tensor
    """int16: the reference; -1 a row that never moves (or M = 0), -2 a row that is not finite."""
    a: Tensor
    b: Tensor
    correlation: Tensor
    """float32, signed, within [-1, 1]."""
    ss: Tensor
    """float32: sum of squares about the row's mean; the residual is ``ss (1 - correlation^2)``."""
    margin: Tensor | None = None
    """float32: |corr| with the best distinct reference minus |corr| with the second (0 when there is none).

    Implementations sum in different orders, so their modes may differ where it is below their tolerance.
    """

    @classmethod
    def empty(cls, rows: int, device: torch.device, *, margin: bool) -> RowFit:
        """Unwritten outputs for ``rows`` rows."""

        def vector(dtype: type[np.float32 | np.int16] = np.float32) -> Tensor:
            if device.type == "cpu":
                # NumPy asks the system for large pages, torch does not: 15 to 20 % of a pass with one or two
                # references over 4e6 rows went into pages of 4 KiB
                return torch.from_numpy(np.empty(rows, dtype=dtype))  # pyright: ignore[reportUnknownMemberType]
            return torch.empty(rows, dtype=torch.int16 if dtype is np.int16 else torch.float32, device=device)

        return cls(
            mode=vector(np.int16),
            a=vector(),
            b=vector(),
            correlation=vector(),
            ss=vector(),
            margin=vector() if margin else None,
        )
