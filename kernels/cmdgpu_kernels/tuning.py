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
from dataclasses import dataclass, replace
from types import MappingProxyType

from cmdgpu_kernels.limits import SEGMENT

__all__ = [
    "ASSIGN_AND_FIT",
    "GRAM",
    "GRAM_CAREFUL",
    "SHARED_BYTES",
    "GramLaunch",
    "TileLaunch",
    "TimeMajorLaunch",
    "TimeMajorTable",
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

    most: int
    """References it is for."""
    block_rows: int
    """Rows of a program."""
    warps: int
    ring: int
    """Snapshots in flight while one is added up: the latency of memory is long."""
    registers: int | None = None
    """Most of a thread, where the compiler would take more and leave fewer programs on a core."""

    def registers_of(self, snapshots: int) -> int | None:
        """Totals of several segments need room of their own."""
        return self.registers if snapshots <= SEGMENT else None


@dataclass(frozen=True)
class TimeMajorTable:
    """Launches for one element type, by ascending number of references; tiles are for more of them."""

    launches: tuple[TimeMajorLaunch, ...]

    @property
    def most(self) -> int:
        return self.launches[-1].most

    def choose(self, references: int) -> TimeMajorLaunch | None:
        """None where tiles are the better way."""
        return next((launch for launch in self.launches if references <= launch.most), None)


ASSIGN_AND_FIT: Mapping[str, TimeMajorTable] = MappingProxyType(
    {
        "float32": TimeMajorTable((TimeMajorLaunch(16, 256, 4, 8),)),
        "float16": TimeMajorTable((TimeMajorLaunch(10, 512, 4, 8),)),
        "bfloat16": TimeMajorTable((TimeMajorLaunch(10, 512, 4, 8),)),
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

    def halved(self, snapshots: int) -> GramLaunch:
        """With half the rows where a product takes two tiles of 128 snapshots: they would leave registers."""
        tile, tiles = self.tiles(snapshots)
        return replace(self, block_rows=self.block_rows // 2) if tile == 128 and tiles > 1 else self


GRAM: Mapping[int, GramLaunch] = MappingProxyType(
    {
        # 66 KB. A third stage spills bfloat16 with 64 snapshots.
        80: GramLaunch(block_rows=32, warps=8, stages=2, many=64),
        # 148 KB and 232 registers, one program per core; two blocks arrive during a product. On an H200 128
        # rows in 3 stages read 7 % faster, but spill where Triton is 3.6; 4 or 16 warps are far slower.
        90: GramLaunch(block_rows=64, warps=8, stages=4, many=128),
    }
)

GRAM_CAREFUL: Mapping[int, GramLaunch] = MappingProxyType(
    {
        # Tiles of 128 by 128 spill where there are several; 65 KB where there is one.
        80: GramLaunch(block_rows=32, warps=8, stages=2, many=64),
        # 131 KB and 225 registers, one program per core: the next rows arrive during the product. 197 KB with
        # several tiles.
        90: GramLaunch(block_rows=64, warps=8, stages=2, many=128),
    }
)
"""For granules that must be computed with care. Tiles are those of ``GRAM``: both write one sum."""
