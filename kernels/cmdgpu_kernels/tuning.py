"""Launch configurations: frozen values, each with its reason. Nothing is tuned at run time.

A row's sums run over its snapshots one after the other whatever stands here, so no value changes a bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["ASSIGN_AND_FIT", "TimeMajorLaunch"]


@dataclass(frozen=True)
class TimeMajorLaunch:
    """How the time-major kernel is cut."""

    block_rows: int
    """Rows of a program: 16 bytes of one snapshot per thread and load."""
    warps: int
    unroll: int
    """Snapshots per turn of the loop: independent loads in flight hide the latency of memory."""
    sweep: int
    """Most references of one sweep over the snapshots; more are taken in further sweeps.

    Every row of a thread holds two registers per reference, a total and a partial.
    """

    def sweeps(self, references: int) -> tuple[int, int]:
        """Number of sweeps and references of each; the last one may hold a few too many."""
        sweeps = -(-references // self.sweep)
        return sweeps, -(-references // sweeps)


ASSIGN_AND_FIT: Mapping[str, TimeMajorLaunch] = MappingProxyType(
    {
        # 4 rows a thread: 16 references fit the register file without a spill.
        "float32": TimeMajorLaunch(block_rows=512, warps=4, unroll=4, sweep=16),
        # 8 rows a thread for the same 16-byte loads: 6 references would spill at T = 1000.
        "float16": TimeMajorLaunch(block_rows=1024, warps=4, unroll=4, sweep=5),
        "bfloat16": TimeMajorLaunch(block_rows=1024, warps=4, unroll=4, sweep=5),
    }
)
