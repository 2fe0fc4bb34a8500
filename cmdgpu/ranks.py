"""The processes of one training job, in step: they do a thing together, and what one meets all of them raise.

Their messages go through a group of their own, over the CPU, so that they never meet those of training.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, Generic, TypeVar, cast

import torch.distributed as dist

from cmdgpu.errors import CmdgpuError, RankLost, printable

T = TypeVar("T")
_dist: Final = cast(Any, dist)
"""Its collectives carry no types."""

PATIENCE: Final = timedelta(minutes=30)
"""How long a rank may write before the others take it for lost; a rank that ends is missed at once."""


def rank_here() -> int | None:
    """The number of this process in its job; None for a process that is alone in it, or in none."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    return dist.get_rank()


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    value: T | None
    error: CmdgpuError | None


class Ranks:
    """All ranks of the job; every method is called by all of them, in the same order."""

    def __init__(self, patience: timedelta = PATIENCE) -> None:
        self.rank: int = dist.get_rank()
        self.size: int = dist.get_world_size()
        self._group: Any = None
        self._lost: RankLost | None = None

        def begin() -> None:
            self._group = _dist.new_group(backend="gloo", timeout=patience)

        self._talk("finding each other", None, begin)

    def every(self, doing: str, work: Callable[[], T]) -> list[T]:
        """Every rank works; the answers of all, by rank, on all.

        Raises on every rank when one fails: its own error on the rank that met it, the same kind of error
        naming the lowest such rank on the others; RankLost when one is gone.
        """
        outcome, met = _attempt(work)
        found: list[_Outcome[T]] = cast(Any, [None] * self.size)
        self._talk(doing, met, lambda: _dist.all_gather_object(found, outcome, group=self._group))
        for rank, other in enumerate(found):
            if other.error is not None:
                raise _reported(rank, other.error)
        return [cast(T, other.value) for other in found]

    def first(self, doing: str, work: Callable[[], T]) -> T:
        """Rank 0 works, the others wait; its answer on all. Raises as ``every`` does."""
        outcome, met = _attempt(work) if self.rank == 0 else (None, None)
        told = [outcome]
        self._talk(doing, met, lambda: dist.broadcast_object_list(told, src=0, group=self._group))
        answer = cast("_Outcome[T]", told[0])
        if answer.error is not None:
            raise _reported(0, answer.error)
        return cast(T, answer.value)

    def close(self) -> None:
        if self._group is not None and dist.is_initialized():
            with contextlib.suppress(RuntimeError):  # the job has ended, or a rank of it has
                dist.destroy_process_group(self._group)
        self._group = None

    def _talk(self, doing: str, met: Exception | None, exchange: Callable[[], None]) -> None:
        """Tell the others, then raise what this rank ``met`` itself, before anything it hears of them.

        Once a rank was lost the messages are out of step, and nothing is said any more.
        """
        if self._lost is None:
            try:
                exchange()
            except RuntimeError as error:
                reason = printable((str(error).strip() or type(error).__name__).splitlines()[0], 160)
                self._lost = RankLost(
                    f"a rank was lost while {doing} (rank {self.rank} of {self.size} heard: {reason})",
                    hint="start the job again: every snapshot that was committed is whole",
                )
                self._lost.__cause__ = error
        if met is not None:
            raise met
        if self._lost is not None:
            raise self._lost


def _attempt(work: Callable[[], T]) -> tuple[_Outcome[T], Exception | None]:
    """The answer, or what went wrong: for the others as one of ours, for this rank as it was."""
    try:
        return _Outcome(work(), None), None
    except CmdgpuError as error:
        return _Outcome(None, error), error
    except Exception as error:
        return _Outcome(None, CmdgpuError(printable(f"{type(error).__name__}: {error}", 240))), error


def _reported(rank: int, error: CmdgpuError) -> CmdgpuError:
    """The same error as a rank hears it that did not meet it."""
    return type(error)(
        f"rank {rank} reports: {error.message}",
        file=error.file,
        tensor=error.tensor,
        step=error.step,
        hint=error.hint,
    )
