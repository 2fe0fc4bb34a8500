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
_RESERVED: Final = 32 << 20
"""Stacks of the reading and writing threads, file buffers, the interpreter's own growth, and what sampling
and clustering leave in the allocator (26 MB after 1,000 samples)."""
_WRITERS: Final = 8 << 20
"""Stacks and buffers of the threads that write, beside those that read straight from files."""
_OUTPUT_ROW_BYTES: Final = 18
"""mode 2, a 4, b 4, correlation 4, ss 4."""
WRITES_IN_FLIGHT: Final = 8
"""Units whose results are on their way to the disk."""
_SLOTS: Final = (3, 2)
"""Host slots, best first: one is computed on while the others fill."""


@dataclass(frozen=True)
class Plan:
    units_per_block: int
    slots: int
    """Host slots that blocks are read into; none when the pass goes straight from files."""
    needed_bytes: int
    """Host memory of the pass."""
    limit_bytes: int
    n_units: int
    rows: int
    lanes: int = 1
    """Devices that take blocks at the same time, each with its own slots."""
    threads: int = 0
    """Units that are read and fitted at a time, straight from files; 0 for a pass through slots."""
    past_cache: bool = False
    """Whether files that the page cache does not hold are read without it."""

    def blocks(self) -> list[tuple[int, int]]:
        """[first, stop) units of every block, in order."""
        step = self.units_per_block
        return [(i, min(i + step, self.n_units)) for i in range(0, self.n_units, step)]


def plan_direct(
    *,
    n_units: int,
    rows: int,
    itemsize: int,
    threads: int,
    past_cache: bool,
    fits: int,
    fixed_bytes: int,
    thread_bytes: int,
    limit_bytes: int,
) -> Plan:
    """As many threads as fit the limit, up to ``threads``; past the cache all of them.

    needed = reserved + writers' + fixed + threads * (kernel's + rows * itemsize)
             + ((2 * threads + 2) * fits + writes) * rows * outputs

    A chunk for each thread, should a file be wrong; outputs of every fit under way, finished, taken, and as
    they are written. Raises MemoryLimitError with both numbers when the fewest do not fit.
    """

    def needed(threads: int) -> int:
        outputs = ((2 * threads + 2) * fits + WRITES_IN_FLIGHT) * rows * _OUTPUT_ROW_BYTES
        return _RESERVED + _WRITERS + fixed_bytes + threads * (thread_bytes + rows * itemsize) + outputs

    fewest = threads if past_cache else 1
    for some in range(threads, fewest - 1, -1):
        if needed(some) <= limit_bytes:
            return Plan(1, 0, needed(some), limit_bytes, n_units, rows, threads=some, past_cache=past_cache)
    what = "one unit" if fewest == 1 else f"{fewest} units"
    raise _refusal(f"{what} ({rows} rows, straight from its files)", needed(fewest), limit_bytes, "")


def plan_pass(
    *,
    n_units: int,
    rows: int,
    n_snapshots: int,
    itemsize: int,
    fits: int,
    lanes: int,
    lane_bytes: int,
    fixed_bytes: int,
    limit_bytes: int,
    otherwise: str = "",
) -> Plan:
    """The largest sensible blocks within the limit.

    needed = reserved + fixed + writes * rows * outputs
             + lanes * (lane's + slots * T * (units * rows + padding) * itemsize
                        + fits * units * rows * outputs)

    ``lane_bytes`` and ``fixed_bytes`` are what does not grow with the block: the kernel's workspace and a
    reader's own buffers, for every device; results kept in memory. Raises MemoryLimitError with both numbers
    when one unit in two slots does not fit; ``otherwise`` ends its hint: what else would work.
    """

    def needed(units: int, slots: int) -> int:
        width = units * rows
        slot = n_snapshots * (width + SLOT_PADDING) * itemsize
        lane = lane_bytes + slots * slot + fits * width * _OUTPUT_ROW_BYTES
        return _RESERVED + fixed_bytes + lanes * lane + WRITES_IN_FLIGHT * rows * _OUTPUT_ROW_BYTES

    unit_bytes = max(n_snapshots * rows * itemsize, 1)
    wanted = max(1, min(-(-n_units // lanes), TARGET_BLOCK_BYTES // unit_bytes))
    for slots in _SLOTS:
        for units in range(wanted, 0, -1):
            if needed(units, slots) <= limit_bytes:
                return Plan(units, slots, needed(units, slots), limit_bytes, n_units, rows, lanes)
    what = f"the smallest block ({rows} rows x {n_snapshots} snapshots, {_SLOTS[-1]} slots)"
    fewer = ", or select fewer snapshots (--stride 2)"
    raise _refusal(what, needed(1, _SLOTS[-1]), limit_bytes, fewer + otherwise)


def _refusal(what: str, needed: int, limit: int, otherwise: str) -> MemoryLimitError:
    error = MemoryLimitError(
        f"{what} needs {show_bytes(needed)}, the memory limit is {show_bytes(limit)}",
        hint=f"give {-(-needed // (1 << 20))}MiB or more{otherwise}",
    )
    error.needed_bytes = needed
    return error
