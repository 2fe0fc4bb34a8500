"""Launch configurations: frozen values, each with its reason. Nothing is tuned at run time.

A table is measured so: compile every candidate ahead of time (``tests/kernels/ahead_of_time.py``), drop
those that spill or exceed shared memory, and time the rest on the device, interleaved in one process with the
other implementations, on random data. No entry below is timed yet: they are chosen by registers, spills,
shared memory and instructions of the compiled code. ``issue`` is how long an H200 needs to issue the
instructions of 1e9 rows at T = 100, at best; reading them takes 97 ms in float32 and 50 ms in 16 bits.

A value of ``TimeMajorLaunch`` changes no bit: a row's sums run over its snapshots one after the other
whatever stands here. One of ``TileLaunch`` does: the lanes that share a row add in another order. The choice
therefore depends on the architecture, the layout, the element type and the number of references only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = [
    "ASSIGN_AND_FIT",
    "GRAM",
    "SHARED_BYTES",
    "GramLaunch",
    "TileLaunch",
    "TimeMajorLaunch",
    "architecture",
    "tiles_of",
]

SHARED_BYTES: Mapping[int, int] = MappingProxyType({80: 166_912, 90: 232_448})
"""Shared memory a block may use, by compute capability. A kernel that asks for more compiles silently."""


def architecture(capability: tuple[int, int]) -> int:
    """The table for a device: the newest one that is not newer than it."""
    number = 10 * capability[0] + capability[1]
    return max((known for known in SHARED_BYTES if known <= number), default=min(SHARED_BYTES))


@dataclass(frozen=True)
class TimeMajorLaunch:
    """How the time-major kernel is cut."""

    block_rows: int
    """Rows of a program: 16 bytes of one snapshot per thread and load."""
    warps: int
    ring: int
    """Snapshots in flight while one is added up: the latency of memory is long."""
    sweep: int
    """Most references of one sweep over the snapshots; more are taken in further sweeps.

    Every row of a thread holds two registers per reference, a total and a partial.
    """
    most: int
    """Most references before tiles on tensor cores issue fewer instructions."""

    def sweeps(self, references: int) -> tuple[int, int]:
        """Number of sweeps and references of each; the last one may hold a few too many."""
        sweeps = -(-references // self.sweep)
        return sweeps, -(-references // sweeps)


ASSIGN_AND_FIT: Mapping[str, TimeMajorLaunch] = MappingProxyType(
    {
        # 4 rows a thread: 16 references fit the register file without a spill. Issue 89 ms at 16, about what
        # reading takes; at 17 there are two sweeps and 170 ms, against 113 ms for tiles.
        "float32": TimeMajorLaunch(block_rows=512, warps=4, ring=4, sweep=16, most=16),
        # 8 rows a thread for the same 16-byte loads: 6 references would spill at T = 1000. Issue 73 ms at 10
        # in two sweeps, 109 ms and three readings at 11, against 116 ms and one for tiles.
        "float16": TimeMajorLaunch(block_rows=1024, warps=4, ring=4, sweep=5, most=10),
        "bfloat16": TimeMajorLaunch(block_rows=1024, warps=4, ring=4, sweep=5, most=10),
    }
)


@dataclass(frozen=True)
class TileLaunch:
    """How the kernel on tiles of rows x snapshots is cut."""

    references: int
    """References of one product, a power of two from 16 on: fewer leave the fast tensor core instruction."""
    block_rows: int
    """Rows of a program; 64 for each group of 4 warps is the least that instruction takes."""
    warps: int
    stages: int
    """Partials of snapshots in flight. One leaves the hiding of latency to the other programs of the core."""


@dataclass(frozen=True)
class TileTable:
    """Launches of one architecture, for one layout and element size."""

    single: tuple[TileLaunch, ...]
    """For references that fit one sweep, ascending."""
    sweeping: TileLaunch
    """For more of them."""

    def choose(self, references: int) -> tuple[TileLaunch, int]:
        """A launch and its number of sweeps over the snapshots."""
        for launch in self.single:
            if references <= launch.references:
                return launch, 1
        return self.sweeping, -(-references // self.sweeping.references)


# Half-size tiles: with 64 references the 16-bit types spill, so that more than 32 sweep. At most 49 KB:
# devices of capability 8.6 and 8.9, with 99 KB, launch it too.
_AMPERE = TileTable(
    single=(TileLaunch(16, 64, 4, 1), TileLaunch(32, 64, 4, 1)),
    sweeping=TileLaunch(32, 64, 4, 1),
)
# Two programs fit a core. Issue 110 ms (rows contiguous 119); with 64 rows 145.
_16 = TileLaunch(16, 128, 4, 2)
# Two programs fit a core. Issue 195 ms (216); 128 rows on 4 warps spill, on 8 leave one program per core.
_64 = TileLaunch(64, 64, 4, 2)
# 128 rows halve what is read of the references from L2 for each row. 255 registers, so one program per core.
_SWEEPING = TileLaunch(64, 128, 8, 1)

TILES: Mapping[tuple[int, bool, int], TileTable] = MappingProxyType(
    {
        # (architecture, time-major, bytes of an element)
        (80, True, 4): _AMPERE,
        (80, False, 4): _AMPERE,
        (80, True, 2): _AMPERE,
        (80, False, 2): _AMPERE,
        # 32: issue 113 ms; a second stage leaves room for one program per core only.
        (90, True, 4): TileTable((_16, TileLaunch(32, 128, 4, 1), _64), _SWEEPING),
        # 32: 128 rows spill with one stage and leave one program per core with two; with 64 issue 190 ms.
        (90, False, 4): TileTable((_16, TileLaunch(32, 64, 4, 1), _64), _SWEEPING),
        # 32: half the bytes leave room for the second stage. Issue 125 and 133 ms.
        (90, True, 2): TileTable((_16, TileLaunch(32, 128, 4, 2), _64), _SWEEPING),
        (90, False, 2): TileTable((_16, TileLaunch(32, 128, 4, 2), _64), _SWEEPING),
    }
)


def tiles_of(
    architecture: int, element_bytes: int, *, time_major: bool, references: int
) -> tuple[TileLaunch, int]:
    """The launch for that many distinct references, and its number of sweeps."""
    return TILES[architecture, time_major, element_bytes].choose(references)


@dataclass(frozen=True)
class GramLaunch:
    """How the product of a granule by itself is cut."""

    block_rows: int
    """Rows of one product."""
    warps: int
    stages: int
    many: int
    """Snapshots of a tile where there are several: its two sides differ then, and take three products."""

    def tiles(self, snapshots: int) -> tuple[int, int]:
        """Snapshots of a tile, and tiles along each side: 64 is the least the fast instruction takes."""
        tile = 64 if snapshots <= 64 else 128 if snapshots <= 128 else self.many
        return tile, -(-snapshots // tile)


GRAM: Mapping[int, GramLaunch] = MappingProxyType(
    {
        # Tiles of 128 by 128 spill where there are several; 65 KB where there is one.
        80: GramLaunch(block_rows=32, warps=8, stages=2, many=64),
        # 131 KB and 225 registers, one program per core: the next rows arrive during the product. 197 KB with
        # several tiles.
        90: GramLaunch(block_rows=64, warps=8, stages=2, many=128),
    }
)
