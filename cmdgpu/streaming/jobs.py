"""What a worker in another process is told, and what it does: its units of fits on disks that all can see.

A job holds places and numbers, no arrays: the worker opens the trajectory itself, takes references from the
unfinished results, and leaves units and records there.
"""

from __future__ import annotations

import contextlib
import functools
import platform
import secrets
import threading
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final

import torch

from cmdgpu import ops
from cmdgpu.errors import CmdgpuError, MemoryLimitError, UsageError, printable
from cmdgpu.memory import default_limit
from cmdgpu.notation import I64
from cmdgpu.progress import Silent
from cmdgpu.results import Frame, join_result
from cmdgpu.store.places import Place
from cmdgpu.streaming.engine import Fit, plan_for, run_pass
from cmdgpu.streaming.passes import AssignAndFit, code_identity
from cmdgpu.streaming.plan import Plan
from cmdgpu.trajectory import Trajectory

BLOCK_BYTES: Final = 1 << 30
"""Read by one block of an executor: seconds of work, which is what a killed worker costs."""
_FEWEST_BLOCKS: Final = 32
"""Of a small trajectory, so that its workers all have something to do."""


def blocks_of(frames: Sequence[Frame], unit_bytes: int) -> tuple[list[tuple[int, int]], int]:
    """The blocks [first, stop) in which a unit of a fit lies, and how many units make one.

    They follow from the fits alone, so that ranks agree on them without a word.
    """
    n_units = frames[0].n_units
    per_block = max(1, min(BLOCK_BYTES // max(unit_bytes, 1), -(-n_units // _FEWEST_BLOCKS)))
    found = sorted({unit // per_block for frame in frames for unit in frame.live_units})
    return [(i * per_block, min((i + 1) * per_block, n_units)) for i in found], per_block


@dataclass(frozen=True)
class Describe:
    """Asks a worker what the bits of its fits depend on."""

    label: ClassVar[str] = "describe"
    device: str

    def __call__(self, block: int) -> dict[str, Any]:
        del block
        return code_identity(ops.resolve_devices(self.device))


@dataclass(frozen=True)
class BlockReport:
    """What a worker did for one block."""

    bytes_read: int
    implementation: str
    device: str
    planned_bytes: int


@dataclass(frozen=True)
class Job:
    """Fits that share a pass over one trajectory, as a worker is told of them."""

    label: ClassVar[str] = "fit"
    store: Place
    fits: tuple[tuple[Place, Place], ...]
    """Of every fit: where it will be, and where it is while it is unfinished."""
    device: str
    memory_limit: int | None
    """Of every worker; a quarter of what is free there when None."""
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    """Of this run: what a worker keeps of another one, whose files may be gone, is not for it."""

    def __call__(self, block: tuple[int, int]) -> BlockReport:
        """Fit the units [first, stop) that are not done. Raises what a fit in one process raises.

        Once a fit has ended, nothing more is done for it.
        """
        with whole_process():
            ready = _prepare(self)
            fits = [fit for fit, partial in ready.fits if not _is_over(partial)]
            try:
                if not fits:
                    _require_kept(self)
                    return BlockReport(0, "", self.device, 0)
                source, columns = ready.traj.source, ready.columns
                report = run_pass(source, columns, fits, ready.plan, ready.devices, Silent(), range(*block))
            except CmdgpuError:
                _require_kept(self)
                raise
        return BlockReport(report.bytes_read, ready.implementation, ready.device, report.plan.needed_bytes)


_ONE_AT_A_TIME = threading.RLock()


@contextlib.contextmanager
def whole_process(threads: int | None = None) -> Generator[None]:
    """One at a time: a pass takes all threads of its process, and its memory limit is that of the process.

    ``threads`` are those of the kernels meanwhile; as many as torch has when None.
    """
    with _ONE_AT_A_TIME:
        before = torch.get_num_threads()
        torch.set_num_threads(threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@dataclass(frozen=True)
class _Ready:
    traj: Trajectory
    columns: I64
    fits: list[tuple[Fit, Place]]
    """And where each lies while it is unfinished."""
    plan: Plan
    devices: list[torch.device]

    @property
    def device(self) -> str:
        return ",".join(map(str, self.devices))

    @property
    def implementation(self) -> str:
        modes = max(fit.writer.modes.n_modes for fit, _ in self.fits)
        return ops.choose(self.traj.dtype, len(self.columns), modes, self.devices[0])[0]


@functools.lru_cache(maxsize=1)
def _prepare(job: Job) -> _Ready:
    """Once per worker: the store opened, the unfinished results joined, the pass planned."""
    devices = ops.resolve_devices(job.device)
    try:
        traj = Trajectory.open(job.store)
    except CmdgpuError as error:
        raise (error if job.store.exists() else _unseen(job.store)) from None
    code = code_identity(devices)
    fits: list[tuple[Fit, Place]] = []
    for out, partial in job.fits:
        try:
            writer = join_result(out, partial)
        except CmdgpuError as error:
            raise (error if partial.exists() else _unseen(partial)) from None
        if writer is None:
            continue  # ended by others meanwhile
        selected = traj.sel(steps=writer.frame.steps)
        _require_same(selected, {"source": selected.identity(), "code": code}, writer.head)
        work = AssignAndFit.of(writer.frame, traj.dtype, writer.modes.references)
        fits.append((Fit(work, writer), partial))
    if not fits:
        return _Ready(traj, traj.columns, [], Plan(1, 0, 0, 0, 0, 1), devices)
    columns = traj.sel(steps=fits[0][0].work.frame.steps).columns
    try:
        plan = plan_for(
            traj.source,
            [fit.work.frame for fit, _ in fits],
            [fit.writer.modes.n_modes for fit, _ in fits],
            devices,
            default_limit() if job.memory_limit is None else job.memory_limit,
            in_memory=False,
        )
    except MemoryLimitError as error:
        raise MemoryLimitError(f"{_here()}: {error.message}", file=error.file, hint=error.hint) from None
    return _Ready(traj, columns, fits, plan, devices)


def _require_same(traj: Trajectory, mine: Mapping[str, Any], head: Mapping[str, Any]) -> None:
    """The worker must see the trajectory of the fit, and compute the bits of its other workers."""
    for part, have in mine.items():
        for key, value in have.items():
            if head[part].get(key) != value:
                raise CmdgpuError(
                    f"{_here()} has another {part} {key} than the fit was begun with "
                    f"({_short(value)}, not {_short(head[part].get(key))})",
                    file=traj.path,
                    hint="give all workers the same files, versions and kind of device",
                )


def _short(value: object) -> str:
    return printable(str(value), 48)


def _here() -> str:
    return f"a worker on {printable(platform.node())}"


def _unseen(place: Place) -> CmdgpuError:
    return UsageError(
        f"{_here()} does not see it",
        file=place,
        hint="trajectory and result must lie on a filesystem that all workers share",
    )


def _is_over(partial: Place) -> bool:
    """Whether an unfinished result is no more: others have ended it, and its units are not read again."""
    return isinstance(partial, Path) and not partial.exists()


def _require_kept(job: Job) -> None:
    """Refuse a fit whose unfinished result was taken away under its workers, instead of being ended."""
    for out, partial in job.fits:
        if _is_over(partial) and not out.exists():
            raise CmdgpuError(
                "the unfinished fit was removed while workers were at it",
                file=partial,
                hint="run the same `cmdgpu fit` again, it begins anew",
            )
