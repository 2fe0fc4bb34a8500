"""How many units make a block: bytes are added up before the run, and refused before it too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cmdgpu.errors import MemoryLimitError
from cmdgpu.memory import show_bytes

TARGET_BLOCK_BYTES: Final = 128 << 20
"""Where a larger slot stops paying: launches and file opens are already small beside the bytes."""
SLOT_PADDING: Final = 96
"""Elements between the rows of a slot: a power-of-two stride puts all snapshots in the same cache sets."""
_RESERVED: Final = 16 << 20
"""Stacks of the reading and writing threads, file buffers, the interpreter's own growth."""
_OUTPUT_ROW_BYTES: Final = 18
"""mode 2, a 4, b 4, correlation 4, ss 4."""
_SLOTS: Final = (3, 2)
"""Host slots, best first: one is computed on while the others fill."""


@dataclass(frozen=True)
class Plan:
    units_per_block: int
    slots: int
    needed_bytes: int
    """Host memory of the pass."""
    limit_bytes: int
    n_units: int
    rows: int

    def blocks(self) -> list[tuple[int, int]]:
        """[first, stop) units of every block, in order."""
        step = self.units_per_block
        return [(i, min(i + step, self.n_units)) for i in range(0, self.n_units, step)]


def plan_pass(
    *,
    n_units: int,
    rows: int,
    n_snapshots: int,
    itemsize: int,
    fixed_bytes: int,
    limit_bytes: int,
) -> Plan:
    """The largest sensible blocks within the limit.

    needed = reserved + fixed + slots * T * (units * rows + padding) * itemsize
             + units * rows * outputs + 2 * rows * outputs

    ``fixed_bytes`` is what does not grow with the block: the kernel's workspace, a reader's own buffers,
    results kept in memory. Raises MemoryLimitError with both numbers when one unit in two slots does not fit.
    """

    def needed(units: int, slots: int) -> int:
        width = units * rows
        slot = n_snapshots * (width + SLOT_PADDING) * itemsize
        waiting = 2 * rows * _OUTPUT_ROW_BYTES
        return _RESERVED + fixed_bytes + slots * slot + width * _OUTPUT_ROW_BYTES + waiting

    unit_bytes = max(n_snapshots * rows * itemsize, 1)
    wanted = max(1, min(n_units, TARGET_BLOCK_BYTES // unit_bytes))
    for slots in _SLOTS:
        for units in range(wanted, 0, -1):
            if needed(units, slots) <= limit_bytes:
                return Plan(units, slots, needed(units, slots), limit_bytes, n_units, rows)
    smallest = needed(1, _SLOTS[-1])
    raise MemoryLimitError(
        f"the smallest block ({rows} rows x {n_snapshots} snapshots, {_SLOTS[-1]} slots) needs "
        f"{show_bytes(smallest)}, the memory limit is {show_bytes(limit_bytes)}",
        hint=f"give {-(-smallest // (1 << 20))}MiB or more, or select fewer snapshots (--stride 2)",
    )
