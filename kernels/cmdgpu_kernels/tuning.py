"""Launch configurations: frozen values, each with its reason. Nothing is tuned at run time.

A table is measured so: compile every candidate ahead of time (``tests/kernels/ahead_of_time.py``), drop what
spills or exceeds shared memory, and time the rest on the device, in turns (``benchmarks/tune.py``). Rates
below are GB/s of W on an H200, T = 100, Triton 3.6; a copy makes 4,270 there, reads and writes counted.
Ampere's entries are not timed: registers, spills, shared memory and instructions of the compiled code chose.

A value of ``TimeMajorLaunch`` changes no bit: a row's sums run over its snapshots one after the other
whatever stands here. One of ``TileLaunch`` does: the lanes that share a row add in another order. The choice
therefore depends on the architecture, the layout, the element type and the number of references only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

__all__ = [
    "ASSIGN_AND_FIT",
    "GRAM",
    "GRAM_CAREFUL",
    "GRAM_HOPPER",
    "SHARED_BYTES",
    "GramLaunch",
    "HopperGramLaunch",
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


_SIXTEEN_BITS = TimeMajorTable(
    (TimeMajorLaunch(5, 512, 4, 8), TimeMajorLaunch(8, 512, 4, 6), TimeMajorLaunch(16, 512, 4, 4))
)

ASSIGN_AND_FIT: Mapping[str, TimeMajorTable] = MappingProxyType(
    {
        # Two rows a thread, but for few references, or four: half the registers, twice the programs that
        # wait for memory. 4,161 at 5; 4,076 at 8 (3,952 with four rows); 3,870 at 10 (3,696 with four warps),
        # 2,949 at 16, 1,519 at 32 (1,574 with a ring of 8, which spills from T = 257 on). Tiles make 1,348 at
        # 16 and 1,094 at 32.
        "float32": TimeMajorTable(
            (
                TimeMajorLaunch(2, 256, 2, 8),
                TimeMajorLaunch(5, 512, 4, 8),
                TimeMajorLaunch(8, 256, 4, 8),
                TimeMajorLaunch(10, 256, 2, 8),
                TimeMajorLaunch(16, 256, 4, 4),
                TimeMajorLaunch(32, 256, 4, 4),
            )
        ),
        # 3,247 at 5, 2,518 at 8, 2,289 at 10 and 1,398 at 16 with a ring of 8, which
        # spills from T = 257 on. Tiles make 535 at 16.
        "float16": _SIXTEEN_BITS,
        "bfloat16": _SIXTEEN_BITS,
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
# Two programs fit a core.
_16 = TileLaunch(16, 128, 4, 2)
_64 = TileLaunch(64, 64, 4, 2)
# 128 rows halve what is read of the references from L2 for each row. 128 references spill in a second sweep.
_SWEEPING = TileLaunch(64, 128, 8, 1)

TILES: Mapping[tuple[int, bool, int], TileTable] = MappingProxyType(
    {
        # (architecture, time-major, bytes of an element)
        (80, True, 4): _AMPERE,
        (80, False, 4): _AMPERE,
        (80, True, 2): _AMPERE,
        (80, False, 2): _AMPERE,
        # 751 at 64; 503 at 100 in one sweep, against 392 in two.
        (90, True, 4): TileTable((TileLaunch(64, 128, 4, 3), TileLaunch(128, 64, 4, 1)), _SWEEPING),
        # 1,280 at 16, 958 at 32, 696 at 64, 478 at 100.
        (90, False, 4): TileTable(
            (_16, TileLaunch(32, 64, 4, 1), _64, TileLaunch(128, 128, 8, 2)), _SWEEPING
        ),
        # 506 at 32, 285 at 64, 185 at 100. Contiguous rows of 16 bits are not timed.
        (90, True, 2): TileTable((TileLaunch(32, 128, 4, 2), _64, TileLaunch(128, 128, 8, 2)), _SWEEPING),
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
        # 148 KB and 232 registers, one program per core; two blocks arrive during a product. 2,164, and 2,210
        # with 128 rows in 3 stages, which spill where Triton is 3.6; 4 or 16 warps are far slower.
        90: GramLaunch(block_rows=64, warps=8, stages=4, many=128),
    }
)


@dataclass(frozen=True)
class HopperGramLaunch:
    """How it is cut where products are made while the next ones are prepared."""

    block_rows: int
    """Rows of a product; two of them share an accumulator."""
    warps: int
    stages: int
    """Blocks of rows under way or here."""


# 197 KB, 247 registers. 2,823 with a product added up after every block of rows, where GRAM makes 2,239; what
# two blocks to an accumulator bring is not timed. Three stages make 2,711, 16 warps 2,592, products of 32
# rows 2,396; warps of their own that split rows, 2,793. It is the tensor cores' work, then: half of it is on
# snapshots from 101 to 128 and on the half of S that is known from the other.
GRAM_HOPPER = HopperGramLaunch(block_rows=64, warps=8, stages=4)

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
