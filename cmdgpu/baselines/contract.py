"""What every baseline does, whatever its filters: fit, say what was found, and give models back."""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

import numpy as np

from cmdgpu.baselines.filters import Filter, FilteredRows
from cmdgpu.baselines.found import NOTHING, Found
from cmdgpu.baselines.groups import KINDS, By, Grouping
from cmdgpu.errors import CmdgpuWarning, StepNotFound, UsageError, printable
from cmdgpu.memory import parse_bytes, show_bytes
from cmdgpu.notation import F64, I64
from cmdgpu.progress import Progress, Silent
from cmdgpu.store import format as fmt
from cmdgpu.store.journal import nearest_steps
from cmdgpu.store.parameter_map import TensorEntry
from cmdgpu.store.places import local_path
from cmdgpu.trajectory import Trajectory

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cmdgpu.baselines.gram import Grams
    from cmdgpu.exporting import Export
    from cmdgpu.models import Patterns
    from cmdgpu.tensors import Buffers, RowSource, Snapshot


_NO_PASS: Final[Mapping[str, Any]] = {"bytes_read": 0, "planned_bytes": 0, "seconds": 0.0}


class Baseline(ABC):
    """A linear filter in time: the model at a step is W f, the weighted snapshots of a trajectory.

    After ``fit``: ``metrics_``, ``summary()``, ``filter_at(step)``. A row with NaN or infinity among the
    selected snapshots is left out of every Gram matrix, counted, and comes back as NaN, with a warning that
    names its tensors. Buffers are in no Gram matrix; on the way back they come as they were recorded.
    """

    by: By | None = None
    """The groups whose Gram matrices it needs; None when it needs none."""
    buffer_ways: ClassVar[tuple[Buffers, ...]] = ("recorded", "skip")

    def __init__(self) -> None:
        self._traj: Trajectory | None = None
        self._found = Found(0)

    # ---- what a baseline is ---------------------------------------------------------------------------

    @abstractmethod
    def _check(self, traj: Trajectory) -> None:
        """Raise UsageError for a trajectory that it says nothing about; before anything is read."""

    @abstractmethod
    def _learn(self, traj: Trajectory, grams: Grams | None) -> tuple[float, float]:
        """Take what is needed from the Gram matrices; answer residual and energy over all groups.

        One that needs none is handed those of the network where another one needs them.
        """

    @abstractmethod
    def _filter(self, traj: Trajectory, step: int) -> Filter:
        """The filter of a step that ``_label`` lets through."""

    @abstractmethod
    def _size(self) -> dict[str, Any]:
        """``rank``, ``result_bytes`` and whatever else is worth telling in ``metrics_``."""

    def _beyond(self, traj: Trajectory, step: int) -> str | None:
        """Why a step beyond the last snapshot cannot be had; None when it can."""
        del traj, step
        return f"{type(self).__name__} does not extrapolate"

    # ---- fitting --------------------------------------------------------------------------------------

    def fit(
        self,
        traj: Trajectory | Any,
        *,
        memory_limit: int | str | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Learn from every selected snapshot: one pass for a Gram matrix, or none.

        traj          a Trajectory, or anything (N, T) that ``Trajectory.from_array`` takes
        memory_limit  bytes, or "4GiB", of host memory for the pass; a quarter of what is free by default

        Raises UsageError for too few snapshots, MemoryLimitError with both numbers before anything is read,
        StoreCorrupt naming file, tensor and step.
        """
        self.fit_together([self], traj, memory_limit=memory_limit, progress=progress)
        return self

    @staticmethod
    def fit_together(
        baselines: Sequence[Baseline],
        traj: Trajectory | Any,
        *,
        memory_limit: int | str | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Fit several on one trajectory in one pass: every block is read once for all of them.

        Those with the same groups share a Gram matrix. The rest is as in ``fit``, and so are all bits.
        """
        traj = traj if isinstance(traj, Trajectory) else Trajectory.from_array(traj)
        _require_something(traj)
        for baseline in baselines:
            baseline._check(traj)
        kinds: list[By] = [by for by in KINDS if any(baseline.by == by for baseline in baselines)]
        grams: dict[By, Grams] = {}
        found = nothing = Found(n_rows=traj.parameters.n_rows_of("parameter"), run=_NO_PASS)
        if kinds:
            from cmdgpu.baselines.gram import gram_pass

            limit = None if memory_limit is None else parse_bytes(memory_limit)
            groupings = [Grouping.of(traj.parameters, by) for by in kinds]
            passed, found = gram_pass(traj, groupings, limit, progress or Silent())
            grams.update(zip(kinds, passed, strict=True))
        for baseline in baselines:
            mine = grams.get(baseline.by or "network")
            residual, energy = baseline._learn(traj, mine)
            baseline._traj = traj
            baseline._found = replace(nothing if mine is None else found, residual=residual, energy=energy)

    @property
    def is_fitted(self) -> bool:
        return self._traj is not None

    @property
    def trajectory(self) -> Trajectory:
        """What it was fitted on. Raises UsageError before ``fit``."""
        if self._traj is None:
            raise UsageError(f"this {type(self).__name__} is not fitted", hint="call fit(traj)")
        return self._traj

    @property
    def steps_(self) -> I64:
        """(T,) steps of the fitted snapshots."""
        return self.trajectory.steps

    # ---- what was found -------------------------------------------------------------------------------

    @property
    def metrics_(self) -> dict[str, Any]:
        """Error and bytes, by the keys of ``CMD.metrics_``, and what the pass took; about parameters alone.

        ``weight_mse`` and ``r2_energy`` follow from the Gram matrix in float64, before a rebuilt weight is
        rounded; where none was made, as for an average fitted alone, they are NaN. So is ``r2`` of all: a
        mean over rows cannot be had from sums over them.
        """
        traj, found = self.trajectory, self._found
        n_snapshots = len(traj.columns)
        itemsize = fmt.storage(traj.dtype).numpy.itemsize
        size = self._size()
        numbers = found.n_rows * n_snapshots
        return {
            "n_rows": found.n_rows,
            "n_nonfinite": sum(found.non_finite.values()),
            "r2": NOTHING,
            "r2_energy": 1.0 - found.residual / found.energy if found.energy else NOTHING,
            "weight_mse": found.residual / numbers if numbers else NOTHING,
            **size,
            "trajectory_bytes": traj.parameters.n_live * n_snapshots * itemsize,
            **found.run,
        }

    def summary(self) -> str:
        """The fit in words: what it is, error, bytes, seconds."""
        metrics = self.metrics_
        lines = [f"{self!r}  {metrics['n_rows']} parameters x {len(self.steps_)} snapshots"]
        if not np.isnan(metrics["weight_mse"]):
            lines.append(
                f"R^2 by energy {metrics['r2_energy']:.4f}   mean squared error {metrics['weight_mse']:.3g}"
            )
        lines += self._remarks()
        if metrics["n_nonfinite"]:
            lines.append(f"non-finite {metrics['n_nonfinite']} rows, left out")
        stored, original = show_bytes(metrics["result_bytes"]), show_bytes(metrics["trajectory_bytes"])
        lines.append(f"{stored} to rebuild it, for a trajectory of {original}")
        if metrics["bytes_read"]:
            lines.append(f"pass {metrics['seconds']:.2f} s, {show_bytes(metrics['bytes_read'])} read")
        else:
            lines.append("nothing had to be read")
        return "\n".join(lines)

    def _remarks(self) -> list[str]:
        """Lines of the summary that only this baseline has."""
        return []

    def filter_at(self, step: int) -> F64:
        """(G, T) weights of the selected snapshots that make the model of a step, for every group of rows."""
        return self._filter(self.trajectory, self._label(step)).weights

    # ---- rebuilding -----------------------------------------------------------------------------------

    def state_dict(
        self, step: int, params: Patterns = None, *, buffers: Buffers = "recorded"
    ) -> OrderedDict[str, Tensor]:
        """Every tensor at one step, in its own dtype; sums in float64, rounded once to float32.

        ``step`` is a selected one (negative counts from the end), or one beyond the last where the baseline
        extrapolates. ``params`` are regular expressions.

        buffers  "recorded"  those of that snapshot, verbatim; of the last one beyond it
                 "rebuilt"   filtered like parameters: of the averages only
                 "skip"      left out
        """
        from cmdgpu.tensors import select, state_dict

        snapshot = self._snapshot(self._label(step), buffers)
        found = state_dict(self.trajectory.parameters, snapshot, params, buffers)
        self._warn_of_gaps(select(self.trajectory.parameters, params), snapshot)
        return found

    def load_into(self, model: nn.Module, step: int, *, buffers: Buffers = "recorded") -> None:
        """Copy the parameters of one step into the model, in place, a block at a time.

        Buffers as in ``state_dict``. Warns once when the model keeps running statistics: they belong to the
        trained weights. A ModelMismatch leaves the model untouched.
        """
        from cmdgpu.tensors import load_into, warn_of_running_statistics

        traj = self.trajectory
        snapshot = self._snapshot(self._label(step), buffers)
        load_into(model, traj.parameters, snapshot, str(traj.path or "the array"))
        self._warn_of_gaps(traj.parameters.tensors, snapshot)
        warn_of_running_statistics(model)

    def export(
        self,
        path: str | os.PathLike[str],
        step: int = -1,
        format: str | None = None,
        *,
        params: Patterns = None,
        buffers: Buffers = "recorded",
        max_shard_size: int | str | None = None,
    ) -> Export:
        """Write one step as a file or folder of any format that ``CMD.export`` knows."""
        from cmdgpu.exporting import export_snapshot
        from cmdgpu.tensors import select

        label = self._label(step)
        snapshot = self._snapshot(label, buffers)
        export = export_snapshot(
            local_path(path, "an export"),
            self.trajectory.parameters,
            snapshot,
            format,
            params,
            buffers=buffers,
            buffers_step=min(label, int(self.steps_[-1])) if buffers == "recorded" else None,
            max_shard_size=max_shard_size,
        )
        self._warn_of_gaps(select(self.trajectory.parameters, params), snapshot)
        return export

    def _label(self, step: int) -> int:
        """A selected step by its position from the end or by its label, or one beyond the last."""
        traj, steps = self.trajectory, self.steps_
        if -len(steps) <= step < 0:
            return int(steps[step])
        if step in steps:
            return step
        why = self._beyond(traj, step) if step > steps[-1] else "is not among the snapshots"
        if why is None:
            return step
        hint = f"the last is {steps[-1]}" if step > steps[-1] else f"nearest: {nearest_steps(steps, step)}"
        raise StepNotFound(why, file=traj.path, step=step, hint=hint)

    def _snapshot(self, label: int, buffers: Buffers) -> Snapshot:
        from cmdgpu.tensors import check_buffers

        check_buffers(buffers, self.buffer_ways)
        traj = self.trajectory
        filtered = FilteredRows(traj.source, traj.columns, self._filter(traj, label), traj.parameters)
        recorded = traj.column(min(label, int(traj.steps[-1]))) if buffers == "recorded" else None

        def source_of(entry: TensorEntry) -> RowSource | None:
            return filtered if entry.kind == "parameter" or buffers == "rebuilt" else recorded

        return source_of

    def _warn_of_gaps(self, entries: Sequence[TensorEntry], snapshot: Snapshot) -> None:
        lost = set(self._found.non_finite) if self.by is not None else set[str]()
        if broken := [printable(t.name) for t in entries if t.name in lost]:
            _warn(f"non-finite rows are NaN in {', '.join(broken[:5])}{' ...' if len(broken) > 5 else ''}")
        sources = (snapshot(t) for t in entries)
        if any(isinstance(source, FilteredRows) and source.overflowed for source in sources):
            _warn(f"{self!r} left values beyond float32: they are infinite")


def _require_something(traj: Trajectory) -> None:
    n_rows, n_snapshots = traj.parameters.n_rows_of("parameter"), len(traj.columns)
    if not n_rows or not n_snapshots:
        raise UsageError(
            f"{n_rows} rows and {n_snapshots} snapshots are nothing to fit",
            file=traj.path,
            hint="record at least one snapshot of a parameter",
        )


def require_snapshots(traj: Trajectory, least: int, who: str) -> None:
    """Raises UsageError when fewer are selected."""
    if len(traj.columns) < least:
        raise UsageError(
            f"{who} needs {least} snapshots, {len(traj.columns)} are selected",
            file=traj.path,
            hint="record or select more",
        )


def require_rank(rank: int, traj: Trajectory | None, who: str) -> None:
    """Raises UsageError for a rank that is none, or that so few snapshots cannot have."""
    if rank < 1:
        raise UsageError(f"{who} of rank {rank}", hint="it is at least 1")
    if traj is None:
        return
    require_snapshots(traj, 2, who)
    if rank > (most := len(traj.columns) - 1):
        raise UsageError(
            f"{who} of rank {rank}, and {len(traj.columns)} snapshots are selected",
            file=traj.path,
            hint=f"rank {most} is the most they can have",
        )


def warn(text: str) -> None:
    """A warning that points to who called ``fit``."""
    warnings.warn(text, CmdgpuWarning, stacklevel=5)


def _warn(text: str) -> None:
    warnings.warn(text, CmdgpuWarning, stacklevel=4)
