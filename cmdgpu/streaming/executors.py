"""Who runs the blocks of a pass when this process does not: the ranks of a launcher, a cluster, anybody.

An executor has one method. A block may run twice, late, or on a worker that is killed half-way: what it
leaves is a pure function of the fit and the block, and the ledger of the fit says what is done.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar, runtime_checkable

from cmdgpu.errors import UsageError, printable

B = TypeVar("B")
R = TypeVar("R")


@runtime_checkable
class Executor(Protocol):
    def map_blocks(self, fn: Callable[[B], R], blocks: Sequence[B]) -> Iterator[tuple[B, R]]:
        """Each block with what ``fn`` answered for it, in any order; ``fn`` and blocks can be pickled.

        May leave blocks to others that are at the same fit: whoever fits waits until all are done.
        """
        ...


_LAUNCHERS: Final = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),  # srun
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),  # mpirun
)


@dataclass(frozen=True)
class RankStride:
    """One of the ranks that a launcher started: of R ranks, rank r takes the blocks r, r + R, r + 2R, ...

    Ranks do not talk. They meet in the ledger of the fit, so that any of them may be started again alone.
    """

    rank: int
    size: int
    local_rank: int = 0
    """Which of this machine's ranks it is: which device is its own."""

    @staticmethod
    def here() -> RankStride:
        """The rank that torchrun, srun or mpirun made of this process. Raises UsageError outside of them."""
        for rank, size, local in _LAUNCHERS:
            if rank in os.environ and size in os.environ:
                found = RankStride(*map(_number, (rank, size, local)))
                if found.rank >= found.size:
                    raise UsageError(
                        f"{rank}={found.rank} of {size}={found.size} is no rank", hint="ranks count from 0"
                    )
                return found
        raise UsageError(
            "no launcher has given this process a rank",
            hint="start it with torchrun, srun or mpirun (RANK and WORLD_SIZE in the environment)",
        )

    def own(self, device: str) -> str:
        """The device of this rank among those of its machine, where the caller leaves it open."""
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return f"cuda:{self.local_rank % count}" if count and device in ("auto", "cuda") else device

    def map_blocks(self, fn: Callable[[B], R], blocks: Sequence[B]) -> Iterator[tuple[B, R]]:
        for block in blocks[self.rank :: self.size]:
            yield block, fn(block)

    def take_over(self, fn: Callable[[B], R], blocks: Sequence[B]) -> Iterator[tuple[B, R]]:
        """All blocks, because others are gone: each rank begins at another place, so that they meet late."""
        start = len(blocks) * self.rank // self.size
        for block in (*blocks[start:], *blocks[:start]):
            yield block, fn(block)


def _number(name: str) -> int:
    text = os.environ.get(name, "0")
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UsageError(f"{name}={printable(text, 40)!r} in the environment is no number", hint="unset it")
    return int(text)


@contextlib.contextmanager
def executor_for(executor: object) -> Generator[Executor | None]:
    """What a caller means: this process (None, "local"), "ranks", "dask", "dask:ADDRESS", an object."""
    kind, _, address = executor.partition(":") if isinstance(executor, str) else ("", "", "")
    if executor is None or executor == "local":
        yield None
    elif executor == "ranks":
        yield RankStride.here()
    elif kind == "dask":
        from cmdgpu.streaming.dask import DaskExecutor

        with DaskExecutor.connect(address) if address else DaskExecutor.local() as ours:
            yield ours
    elif any(base.__module__.partition(".")[0] == "distributed" for base in type(executor).__mro__):
        from cmdgpu.streaming.dask import DaskExecutor

        with DaskExecutor.over(executor) as theirs:
            yield theirs
    elif isinstance(executor, Executor):
        yield executor
    else:
        raise UsageError(
            f"no executor {executor!r}",
            hint="have: local, ranks, dask, dask:ADDRESS, a Client of Dask, any object with map_blocks",
        )
