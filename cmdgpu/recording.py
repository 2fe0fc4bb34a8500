"""Recorder: a model's tensors become one column of the store, behind the training loop's back."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Literal, SupportsFloat

from torch import Tensor, nn

from cmdgpu.column import HostColumn, Part
from cmdgpu.errors import (
    CmdgpuError,
    CmdgpuWarning,
    NotAStore,
    StoreExists,
    UsageError,
    printable,
)
from cmdgpu.models import Choice, Patterns, compile_patterns, describe_model
from cmdgpu.notation import AnyArray
from cmdgpu.ranks import Ranks, rank_here
from cmdgpu.sampling import candidate_rows
from cmdgpu.sharded import (
    Held,
    ShardedRecording,
    default_rows,
    held_here,
    is_sharded_model,
    layout,
    require_same_layout,
)
from cmdgpu.store import durable
from cmdgpu.store import format as fmt
from cmdgpu.store.journal import Journal
from cmdgpu.store.parameter_map import ParameterMap
from cmdgpu.store.places import local_path


class Recorder:
    """Record a training run: one snapshot of the model per ``record`` call.

    >>> with Recorder("run.zarr", every=100) as recorder:  # doctest: +SKIP
    ...     for step, batch in enumerate(loader):
    ...         train(model, batch)
    ...         recorder.record(model, step, loss=loss)

    ``record`` returns True once the tensors are copied off the device; writing goes on behind, at most one
    snapshot at a time. A snapshot is durable when the *next* ``record`` that takes one, or ``flush``, or
    ``close`` has returned, and ``last_committed`` is the last durable step; errors of the writer surface
    there. A path that holds a trajectory of the same model is continued.

    Parameters and the floating-point buffers of the state dict are recorded, tied weights once. Integer
    tensors are listed in ``skipped``; complex ones are refused by name.

    In a job of several ranks every rank opens a recorder on the same path, after ``init_process_group``,
    and calls it alike. Whole models (DistributedDataParallel, a bare one) are recorded by rank 0; on the
    others ``record`` answers the same and touches nothing. A sharded model (``fully_shard``, any DTensor) is
    never gathered: each rank writes what it holds, nothing goes on behind, and ``record`` returns when the
    snapshot is durable, or raises on every rank. Whole tensors in it, and buffers, are those of rank 0.

    Raises, before training starts: StoreLocked when another recorder is at work there, StoreExists when the
    path is something else or a trajectory of another ``dtype`` or ``zstd``, StepNotFound for a ``rewind_to``
    that was not recorded.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        every: int = 1,
        dtype: str = "float32",
        *,
        unit: str = "step",
        include: Patterns = None,
        exclude: Patterns = None,
        buffers: Literal["record", "skip"] = "record",
        trainable_only: bool = False,
        rows_per_chunk: int | None = None,
        sketch: bool = True,
        zstd: bool = False,
        rewind_to: int | None = None,
    ) -> None:
        """
        every           record a step when it is a multiple of this
        dtype           element type on disk: float32, float16 or bfloat16
        unit            what a step counts, for labels: "step", "epoch", ...
        include/exclude regular expressions searched for in tensor names
        buffers         "skip" leaves all buffers out
        trainable_only  only parameters that require a gradient
        rows_per_chunk  a multiple of 256; 2^18 by default, 2^20 from a billion rows up
        sketch          keep the sampling candidates' values apart, so that a fit samples in megabytes
        zstd            compress chunks: noisy float32 weights shrink by 7 %, reading is several times slower
        rewind_to       drop every snapshot after this step first: training restarts from its checkpoint
        """
        if sys.platform == "win32":
            raise CmdgpuError("recording needs file locks and flushes that Windows lacks", hint="use WSL")
        if every < 1:
            raise UsageError(f"every={every} never records", hint="every is at least 1")
        if buffers not in ("record", "skip"):
            raise UsageError(f"no treatment of buffers named {buffers!r}", hint="have: record, skip")
        if not (unit.isprintable() and len(unit) <= 64):
            raise UsageError(f"a unit named {printable(unit)!r}", hint="a word of at most 64 characters")
        fmt.check_rows_per_chunk(rows_per_chunk, compressed=zstd)
        self.path = local_path(path, "recording")
        self._every = every
        self._storage = fmt.storage(dtype)
        self._unit = unit
        self._choice = Choice(
            compile_patterns(include), compile_patterns(exclude), buffers == "record", trainable_only
        )
        self._rows_per_chunk = rows_per_chunk
        self._sketch = sketch
        self._zstd = zstd
        self._rank = rank_here()
        self._journal = self._open_existing() if self._holds_the_store else None
        self._column: HostColumn | None = None
        self._map: ParameterMap | None = None
        self._ranks: Ranks | None = None
        self._shards: ShardedRecording | None = None
        self._committed_in_shards: int | None = None
        self._last_step: int | None = None
        if self._journal is not None and len(self._journal.view.steps):
            self._last_step = int(self._journal.view.steps[-1])
        self._writing: Future[None] | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="cmdgpu-recorder")
        self._closed = False
        if rewind_to is not None:
            try:
                self._rewind(rewind_to)
            except BaseException:
                self.close()
                raise

    # ---- what a person asks -------------------------------------------------------------------------

    @property
    def last_committed(self) -> int | None:
        """The last step that is durable, or None; rank 0 alone knows what an earlier recorder committed."""
        if not self._holds_the_store:
            return self._committed_in_shards
        if self._journal is None or not len(self._journal.view.steps):
            return None
        return int(self._journal.view.steps[-1])

    @property
    def skipped(self) -> tuple[tuple[str, str], ...]:
        """(name, reason) of the model's tensors that are not recorded; known after the first ``record``."""
        return () if self._map is None else self._map.skipped

    def record(self, model: nn.Module, step: int, **scalars: SupportsFloat) -> bool:
        """Take a snapshot; False when ``every`` passes over this step.

        ``scalars`` (loss=..., accuracy=...) become series beside ``step``, NaN where not given.
        Raises UsageError for a step that does not increase, ModelMismatch naming the first tensor that
        differs from the recorded model, UnsupportedTensor by name, and whatever writing the snapshot
        before this one met.
        """
        self._require_open()
        step = int(step)
        if not 0 <= step < 1 << 63:
            raise UsageError(f"step {step} cannot be stored", hint="steps count from 0, up to 2^63 - 1")
        for name in scalars:
            _require_scalar_name(name)
        if step % self._every:
            return False  # before the numbers: a loss that is still being computed would be waited for
        values = {name: _scalar(name, value) for name, value in scalars.items()}
        self._settle()  # first: a step whose snapshot was lost may be recorded again
        if self._shards is not None or is_sharded_model(model):
            self._record_shards(model, step, values)
            return True
        self._require_next(step)
        parameter_map, tensors = describe_model(model, self._choice)
        if not self._holds_the_store:
            self._leave_to_rank_0(model)
            self._last_step = step
            return True
        journal = self._begin(parameter_map)
        column = self._copy(journal.view.map, tensors)  # by the store's rows: a layout need not be ours
        sketch = None
        if journal.view.sketch_rows is not None:
            sketch = column[journal.view.sketch_rows]
        self._last_step = step
        self._writing = self._writer.submit(journal.append, column, step, values, sketch)
        return True

    def check(self, model: nn.Module, step: int) -> None:
        """Raise now what the first ``record`` after ``step`` would; nothing is written.

        For trainers, before training that may have been resumed goes on from ``step``. Raises UsageError
        when the path holds later snapshots, ModelMismatch, UnsupportedTensor. Called by all ranks alike.
        """
        self._require_open()
        if is_sharded_model(model):
            self._ranks = self._ranks or Ranks()
            self._ranks.first("looking at the store", lambda: self._require_none_after(step))
            return
        self._require_none_after(step)
        parameter_map, _ = describe_model(model, self._choice)
        if self._journal is not None:
            self._begin(parameter_map)

    def flush(self) -> None:
        """Wait until the snapshot in flight is durable. Raises what writing it met."""
        self._require_open()
        self._settle()

    def close(self) -> None:
        """Flush, then let go of the store; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            self._settle()
        finally:
            self._writer.shutdown()
            if self._ranks is not None:
                self._ranks.close()
            if self._journal is not None:
                self._journal.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except CmdgpuError as failed:
            if error is None:
                raise
            # the training's own exception is the news; this one must not replace it
            warnings.warn(f"the last snapshot was lost: {failed}", CmdgpuWarning, stacklevel=2)

    # ---- how it is done -----------------------------------------------------------------------------

    @property
    def _holds_the_store(self) -> bool:
        return self._rank in (None, 0)

    def _require_open(self) -> None:
        if self._closed:
            raise UsageError("this recorder is closed", file=self.path, hint="open another one, it continues")
        if rank_here() not in (None, self._rank):
            raise UsageError(
                "the process group was started after this recorder was opened",
                file=self.path,
                hint="open the recorder after init_process_group",
            )

    def _require_next(self, step: int) -> None:
        if self._last_step is not None and step <= self._last_step:
            raise UsageError(
                f"step {step} cannot follow step {self._last_step}",
                file=self.path,
                hint=f"steps increase; to go back, Recorder(path, rewind_to=...) with a step before {step}",
            )

    def _require_none_after(self, step: int) -> None:
        if self._journal is None or self._last_step is None or self._last_step <= step:
            return
        before = [int(recorded) for recorded in self._journal.view.steps if recorded <= step]
        to_go_back = f"rewind_to={before[-1]} drops what comes after, or " if before else ""
        raise UsageError(
            f"holds snapshots up to step {self._last_step}, and training goes on from step {step}",
            file=self.path,
            hint=f"{to_go_back}record into another path",
        )

    def _leave_to_rank_0(self, model: nn.Module) -> None:
        """A pipeline stage or another run on this rank would be lost without a word."""
        replicated = any(isinstance(part, nn.parallel.DistributedDataParallel) for part in model.modules())
        if not replicated and self._last_step is None:
            warnings.warn(
                f"rank {self._rank} holds whole tensors and leaves recording to rank 0",
                CmdgpuWarning,
                stacklevel=3,
            )

    def _open_existing(self) -> Journal | None:
        if not (self.path.exists() or self.path.is_symlink()):
            durable.make_directory(self.path.parent)
            return None
        try:
            journal = Journal.open(self.path)
        except NotAStore as error:
            raise StoreExists(
                f"is there already and is no trajectory to continue ({error.message})",
                file=self.path,
                hint="choose another path",
            ) from error
        if journal.view.dtype != self._storage.name:
            journal.close()
            raise StoreExists(
                f"holds {journal.view.dtype}, this recorder writes {self._storage.name}",
                file=self.path,
                hint=f"use dtype={journal.view.dtype!r} or another path",
            )
        if journal.view.is_compressed != self._zstd:
            journal.close()
            held, mine = ("without", "with") if self._zstd else ("with", "without")
            raise StoreExists(
                f"was made {held} zstd, this recorder writes {mine}",
                file=self.path,
                hint=f"use zstd={not self._zstd} or another path",
            )
        return journal

    def _rewind(self, step: int) -> None:
        if self._journal is None and self._holds_the_store:
            raise NotAStore("there is nothing to go back in", file=self.path, hint="leave rewind_to out")
        if self._journal is not None:
            self._journal.rewind(step)
        self._last_step = step

    def _settle(self) -> None:
        """Wait for the snapshot in flight; its error, if any, is raised here once."""
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        try:
            writing.result()
        except BaseException:
            self._last_step = self.last_committed
            raise

    def _begin(self, parameter_map: ParameterMap) -> Journal:
        """The journal of this model: created at the first snapshot, checked against the model ever after."""
        if self._journal is None:
            rows = self._rows_per_chunk or fmt.default_rows_per_chunk(parameter_map.n_rows)
            self._journal = self._create(parameter_map, rows)
        elif parameter_map != self._map:
            self._journal.view.map.require(parameter_map, self.path)
            self._journal.view.map.require_whole(self.path)
        self._map = parameter_map
        return self._journal

    def _create(self, parameter_map: ParameterMap, rows: int) -> Journal:
        return Journal.create(
            self.path,
            parameter_map,
            dtype=self._storage.name,
            rows=rows,
            unit=self._unit,
            sketch_rows=candidate_rows(parameter_map) if self._sketch else None,
            compressed=self._zstd,
        )

    def _copy(self, parameter_map: ParameterMap, tensors: list[Tensor]) -> AnyArray:
        """The column in host memory, (n_chunks * rows,) in the stored type."""
        assert self._journal is not None
        if self._column is None:
            view = self._journal.view
            self._column = HostColumn(view.n_chunks * view.rows, self._storage)
        return self._column.take(
            [
                Part(entry.name, piece.row, tensor)
                for entry, tensor in zip(parameter_map, tensors, strict=True)
                for piece in entry.pieces
            ]
        )

    # ---- in shards ----------------------------------------------------------------------------------

    def _record_shards(self, model: nn.Module, step: int, scalars: dict[str, float]) -> None:
        """Together with the other ranks, which raise whatever this one meets."""

        def describe() -> tuple[Held, list[list[Tensor]]]:
            self._require_next(step)
            return held_here(*describe_model(model, self._choice))

        if self._shards is None:
            self._ranks = self._ranks or Ranks()
            self._shards = ShardedRecording(self._ranks, lambda: describe()[0], self._begin_shards)
            self._map = self._shards.map
        self._shards.record(describe, step, scalars)
        self._last_step = self._committed_in_shards = step

    def _begin_shards(self, held: Sequence[Held]) -> Journal:
        """``_begin`` of a model that lies over the ranks like this."""
        if self._journal is None:
            rows = self._rows_per_chunk or default_rows(held)
            self._journal = self._create(layout(held, rows).map, rows)
        else:
            cut = layout(held, self._journal.view.rows).map
            require_same_layout(self._journal.view.map, cut, self.path)
        return self._journal


def _require_scalar_name(name: str) -> None:
    if name in fmt.RESERVED or not fmt.SCALAR_NAME.fullmatch(name):
        raise UsageError(
            f"a scalar cannot be named {name!r}", hint=f"taken: {', '.join(sorted(fmt.RESERVED))}"
        )


def _scalar(name: str, value: Any) -> float:
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UsageError(f"the scalar {name!r} is {type(value).__name__}, not a number") from error
