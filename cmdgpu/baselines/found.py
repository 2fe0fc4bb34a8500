"""What a fit learned about all rows, and what it took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

NOTHING: Final = float("nan")
"""A number that cannot be had."""


@dataclass(frozen=True)
class Found:
    n_rows: int
    """Finite rows of parameters; all of them where nothing was read."""
    non_finite: Mapping[str, int] = field(default_factory=dict[str, int])
    """Rows with NaN or infinity, by tensor: in no sum."""
    run: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What the pass took: bytes, seconds."""
    residual: float = NOTHING
    """Squared error over all finite rows and selected snapshots."""
    energy: float = NOTHING
    """The same of every row's mean over time."""
