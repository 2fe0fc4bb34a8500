"""Recorder: a model's tensors become one column of the store, behind the training loop's back."""

from __future__ import annotations

import os
import sys
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, SupportsFloat

import torch
from torch import Tensor, nn

from cmdgpu.errors import (
    CmdgpuError,
    CmdgpuWarning,
    NotAStore,
    StoreExists,
    UnsupportedTensor,
    UsageError,
    printable,
)
from cmdgpu.models import Choice, Patterns, compile_patterns, describe_model
from cmdgpu.notation import AnyArray
from cmdgpu.sampling import candidate_rows
from cmdgpu.store import durable
from cmdgpu.store import format as fmt
from cmdgpu.store.journal import Journal
from cmdgpu.store.parameter_map import ParameterMap


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
    tensors are listed in ``skipped``; complex and sharded ones are refused by name.

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
        self.path = Path(path)
        self._every = every
        self._storage = fmt.storage(dtype)
        self._unit = unit
        self._choice = Choice(
            compile_patterns(include), compile_patterns(exclude), buffers == "record", trainable_only
        )
        self._rows_per_chunk = rows_per_chunk
        self._sketch = sketch
        self._zstd = zstd
        self._journal = self._open_existing()
        self._column: Tensor | None = None
        self._map: ParameterMap | None = None
        self._last_step: int | None = None
        if self._journal is not None and len(self._journal.view.steps):
            self._last_step = int(self._journal.view.steps[-1])
        self._writing: Future[None] | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="cmdgpu-recorder")
        self._warned: set[str] = set()
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
        """The last step that is durable, or None."""
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
        values = {_scalar_name(name): _scalar(name, value) for name, value in scalars.items()}
        if step % self._every:
            return False
        self._settle()  # first: a step whose snapshot was lost may be recorded again
        if self._last_step is not None and step <= self._last_step:
            raise UsageError(
                f"step {step} cannot follow step {self._last_step}",
                file=self.path,
                hint=f"steps increase; to go back, Recorder(path, rewind_to=...) with a step before {step}",
            )
        parameter_map, tensors = describe_model(model, self._choice)
        journal = self._begin(parameter_map)
        column = self._copy(journal.view.map, tensors)  # by the store's rows: a layout need not be ours
        sketch = None
        if journal.view.sketch_rows is not None:
            sketch = column[journal.view.sketch_rows]
        self._last_step = step
        self._writing = self._writer.submit(journal.append, column, step, values, sketch)
        return True

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

    def _require_open(self) -> None:
        if self._closed:
            raise UsageError("this recorder is closed", file=self.path, hint="open another one, it continues")

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
        if self._journal is None:
            raise NotAStore("there is nothing to go back in", file=self.path, hint="leave rewind_to out")
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
            self._journal = Journal.create(
                self.path,
                parameter_map,
                dtype=self._storage.name,
                rows=rows,
                unit=self._unit,
                sketch_rows=candidate_rows(parameter_map) if self._sketch else None,
                compressed=self._zstd,
            )
        elif parameter_map != self._map:
            self._journal.view.map.require(parameter_map, self.path)
            for entry in self._journal.view.map:
                if len(entry.pieces) > 1 or any(piece.size != entry.shape for piece in entry.pieces):
                    raise UnsupportedTensor(
                        "is stored in shards, and this recorder writes whole tensors",
                        file=self.path,
                        tensor=entry.name,
                        hint="record into another path",
                    )
        self._map = parameter_map
        return self._journal

    def _copy(self, parameter_map: ParameterMap, tensors: list[Tensor]) -> AnyArray:
        """The column in host memory, (n_chunks * rows,) in the stored type. All that training waits for."""
        assert self._journal is not None
        dtype: torch.dtype = getattr(torch, self._storage.name)
        on_cuda = any(tensor.is_cuda for tensor in tensors)
        if self._column is None:
            length = self._journal.view.n_chunks * self._journal.view.rows
            self._column = torch.full((length,), float("nan"), dtype=dtype, pin_memory=on_cuda)
        for entry, tensor in zip(parameter_map, tensors, strict=True):
            for piece in entry.pieces:
                place = self._column[piece.row : piece.stop].view(entry.shape)
                place.copy_(tensor.detach(), non_blocking=on_cuda)
            self._warn_of_rounding(entry.name, tensor)
        if on_cuda:
            torch.cuda.synchronize()
        if self._storage.name == "float16":
            self._warn_of_overflow(parameter_map, tensors)
        column = self._column.view(torch.uint16) if self._storage.name == "bfloat16" else self._column
        return column.numpy()

    def _warn_of_rounding(self, name: str, tensor: Tensor) -> None:
        if tensor.dtype == torch.float64 and "float64" not in self._warned:
            self._warned.add("float64")
            warnings.warn(f"float64 tensors ('{name}' first) are rounded", CmdgpuWarning, stacklevel=4)

    def _warn_of_overflow(self, parameter_map: ParameterMap, tensors: list[Tensor]) -> None:
        """A weight beyond 65504 becomes infinite in float16, and its row non-finite in every fit."""
        assert self._column is not None
        for entry, tensor in zip(parameter_map, tensors, strict=True):
            for piece in entry.pieces:
                stored = self._column[piece.row : piece.stop].view(entry.shape)
                lost = torch.isinf(stored) & torch.isfinite(tensor.detach()).cpu()
                if entry.name not in self._warned and bool(lost.any()):
                    self._warned.add(entry.name)
                    warnings.warn(
                        f"'{entry.name}' holds {int(lost.sum())} values beyond float16; they are stored as "
                        "infinite; record in bfloat16 or float32",
                        CmdgpuWarning,
                        stacklevel=4,
                    )


def _scalar_name(name: str) -> str:
    if name in fmt.RESERVED or not fmt.SCALAR_NAME.fullmatch(name):
        raise UsageError(
            f"a scalar cannot be named {name!r}", hint=f"taken: {', '.join(sorted(fmt.RESERVED))}"
        )
    return name


def _scalar(name: str, value: Any) -> float:
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UsageError(f"the scalar {name!r} is {type(value).__name__}, not a number") from error
