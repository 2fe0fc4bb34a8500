"""Trajectory: W (N x T) with its parameter map and its steps; lazy, selectable, checked when read."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from cmdgpu.errors import StepNotFound, UsageError
from cmdgpu.indexing import Index, positions
from cmdgpu.notation import F64, I64, AnyArray
from cmdgpu.progress import Progress
from cmdgpu.sources import ArraySource, Source, StoreSource
from cmdgpu.store import format as fmt
from cmdgpu.store.chunks import announce
from cmdgpu.store.journal import Journal, nearest_steps
from cmdgpu.store.parameter_map import ParameterMap, TensorEntry
from cmdgpu.store.places import Named, Place, local_path, place_of
from cmdgpu.store.verification import Damage, verify_store
from cmdgpu.store.view import StoreView

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cmdgpu.exporting import Export
    from cmdgpu.importing.discovery import Paths
    from cmdgpu.importing.naming import KeyMap
    from cmdgpu.models import Patterns
    from cmdgpu.tensors import Buffers, Snapshot


class Trajectory:
    """A training trajectory W, N parameters (rows) by T snapshots (columns).

    ``open`` a recorded store, or wrap an array with ``from_array``. Nothing is read before it is asked for,
    and everything that is read from a store is checked. A view of a store holds the snapshots that were
    committed when it was opened.
    """

    def __init__(
        self,
        source: Source,
        steps: I64,
        columns: I64,
        *,
        path: Place | None = None,
        unit: str = "step",
        scalars: dict[str, F64] | None = None,
        parameters: ParameterMap | None = None,
        params: tuple[str, ...] = (),
    ) -> None:
        self.source = source
        self.path = path
        self.unit = unit
        """What a step counts: step, epoch, ..."""
        self.columns = columns
        """(T,) positions of the selected snapshots in the source."""
        self.params = params
        """What chose the tensors, one regular expression for every ``sel``; empty when all are selected."""
        self._parameters = source.map if parameters is None else parameters
        self._all_steps = steps
        self._all_scalars = scalars or {}

    # ---- where it comes from ------------------------------------------------------------------------

    @staticmethod
    def open(path: Named) -> Trajectory:
        """A recorded trajectory, in a folder or under a URL (``s3://bucket/run.zarr``), read in place.

        Raises NotAStore for anything else, StoreCorrupt for a damaged one, RemoteFailed naming the URL where
        a server does not answer.
        """
        view = StoreView.open(place_of(path))
        return Trajectory(
            StoreSource(view),
            view.steps,
            np.arange(len(view.steps)),
            path=view.path,
            unit=view.unit,
            scalars=view.scalars,
        )

    @staticmethod
    def from_array(
        W_nt: Any,
        steps: Sequence[int] | I64 | None = None,
        *,
        out: str | os.PathLike[str] | None = None,
        dtype: str | None = None,
        rows_per_chunk: int | None = None,
        zstd: bool = False,
    ) -> Trajectory:
        """A trajectory of an array (N, T): NumPy, memmap, torch, zarr, dask, ...

        Without ``out`` the array is used where it lies. With ``out`` it is written as a store, in ``dtype``
        (the array's own by default), compressed with ``zstd``, and that is opened. float64 is rounded to
        float32 with a warning.
        Raises UsageError for another shape or type, for steps that do not increase or do not match T.
        """
        source = ArraySource(W_nt)
        step_t = _checked_steps(steps, source.n_snapshots)
        if out is None:
            if dtype not in (None, source.dtype):
                raise UsageError(
                    f"an array of {source.dtype} is not {dtype}", hint="convert it, or give out="
                )
            if zstd:
                raise UsageError("an array in memory is not compressed", hint="leave zstd out, or give out=")
            return Trajectory(source, step_t, np.arange(source.n_snapshots))
        stored = fmt.storage(dtype or source.dtype)
        fmt.check_rows_per_chunk(rows_per_chunk, compressed=zstd)
        _write_array(source, step_t, local_path(out, "a new store"), stored, rows_per_chunk, compressed=zstd)
        return Trajectory.open(out)

    @staticmethod
    def from_checkpoints(
        paths_or_glob: Paths,
        out: str | os.PathLike[str],
        steps: Sequence[int] | None = None,
        prefix: str = "",
        include: Patterns = None,
        exclude: Patterns = None,
        key_map: KeyMap | str | Path = None,
        resume: bool = True,
        *,
        dtype: str | None = None,
        memory_limit: int | str | None = None,
        rows_per_chunk: int | None = None,
        zstd: bool = False,
        unit: str = "step",
        progress: Progress | None = None,
    ) -> Trajectory:
        """A trajectory of checkpoints that some trainer left, in bounded memory; nothing of them is executed.

        ``paths_or_glob`` is a list, a folder or a glob of ``.pt``, ``.safetensors``, ``.npz``, Keras files,
        and of Hugging Face and torch.distributed.checkpoint folders. They are ordered by the step in their
        names, or in the files; ``steps`` overrides it, one for each. Every header is read and compared before
        anything is written; a snapshot is committed when its files are read whole. A killed import goes on
        where it stopped, and one of more checkpoints continues it; their names and SHA-256 are kept.

        prefix           take names that begin so, and take it off; without one, ``module.``, ``_orig_mod.``
                         and ``model.`` are stripped where every name has them
        include/exclude  regular expressions searched for in the names that came out of it
        key_map          {old: new}, a function, or a JSON file's path; after the prefix, before the filters
        resume           False refuses a path where something is already
        dtype            element type on disk; the widest of the tensors when None, float32 at most
        memory_limit     bytes, or "512MiB"; a quarter of what is free when None

        Buffers are told by their names (``running_mean``, ``running_var``): a checkpoint does not say.
        Integer tensors are listed in ``parameters.skipped``, complex ones refused by name.
        Raises UsageError for steps that cannot be told apart, listing them; CheckpointError naming file and
        tensor for what is damaged or differs; StoreExists, MemoryLimitError with both numbers.
        """
        from cmdgpu.importing import carry_out, plan_checkpoints

        plan = plan_checkpoints(
            paths_or_glob, out, steps, prefix, include, exclude, key_map, resume, dtype=dtype,
            memory_limit=memory_limit, rows_per_chunk=rows_per_chunk, zstd=zstd, unit=unit,
        )  # fmt: skip
        carry_out(plan, progress)
        return Trajectory.open(out)

    # ---- what it is ---------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        """(N, T): rows, selected snapshots.

        N counts the rows of the store whichever tensors are selected, so that a row keeps its number;
        ``parameters.n_live`` are those of the selected ones.
        """
        return self.source.map.n_rows, len(self.columns)

    @property
    def dtype(self) -> str:
        """Element type as stored: float32, float16 or bfloat16."""
        return self.source.dtype

    @property
    def steps(self) -> I64:
        """(T,) labels of the selected snapshots."""
        return self._all_steps[self.columns]

    @property
    def recorded_steps(self) -> I64:
        """Labels of all recorded snapshots, selected or not."""
        return self._all_steps

    @property
    def scalars(self) -> dict[str, F64]:
        """(T,) series recorded beside the weights: loss, accuracy, ...; NaN where not given."""
        return {name: values[self.columns] for name, values in self._all_scalars.items()}

    @property
    def parameters(self) -> ParameterMap:
        """Which tensor lies in which rows: name, kind, dtype, shape, pieces; aliases; what was skipped.

        Of a selection, the selected tensors.
        """
        return self._parameters

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weights: on disk for a store, N x T elements for an array."""
        if isinstance(self.source, StoreSource):
            return self.source.view.stored_bytes
        n, t = self.shape
        return n * t * fmt.storage(self.dtype).numpy.itemsize

    def identity(self) -> dict[str, Any]:
        """What ties a fit to these numbers: the steps and, of a store, its layout and the digests of the
        selected snapshots. An array has none of the latter. Of selected tensors a digest of their names,
        whatever patterns chose them.
        """
        identity: dict[str, Any] = {"steps": self.steps.tolist(), "dtype": self.dtype}
        if self.params:
            identity["tensors"] = fmt.sha256(fmt.canonical([tensor.name for tensor in self.parameters]))
        if isinstance(self.source, StoreSource):
            view = self.source.view
            positions: list[int] = self.columns.tolist()
            identity["layout"] = view.layout
            digests = (view.digests[t].encode() for t in positions)
            identity["digest"] = fmt.sha256(view.layout.encode(), *digests)
        return identity

    def fingerprint(self) -> str:
        """Of ``identity``: trajectories of one have the same numbers, but arrays the same steps only."""
        return fmt.sha256(fmt.canonical(self.identity()))

    def __repr__(self) -> str:
        n, t = self.shape
        where = f" at {self.path}" if self.path else ""
        live = self.parameters.n_live
        rows = f"{n}" if live == n else f"{live} of {n}"
        return f"Trajectory({rows} rows x {t} snapshots, {self.dtype}{where})"

    # ---- selecting ----------------------------------------------------------------------------------

    def sel(
        self,
        start: int | None = None,
        stop: int | None = None,
        stride: int = 1,
        steps: Sequence[int] | I64 | None = None,
        params: Patterns = None,
    ) -> Trajectory:
        """Some of the snapshots, some of the tensors; nothing is copied.

        ``start, stop, stride`` are positions, with slice semantics; ``steps`` are labels and exclude the
        other three. ``params`` are regular expressions searched for in the names, aliases included: a
        network (``^generator\\.``), a layer, a tensor. The rows of all others are holes: they keep their
        numbers, are NaN, and nothing of them is read or fitted; ``parameters.skipped`` lists their tensors.
        Buffers go where their names match. A selection of a selection narrows it.
        Raises UsageError for a selection of nothing, StepNotFound naming the nearest steps.
        """
        return self._view(self._positions(start, stop, stride, steps), *self._narrowed(params))

    def only(self, names: Collection[str], params: tuple[str, ...]) -> Trajectory:
        """The tensors of these recorded names, as ``sel`` found them by ``params`` once before.

        Raises KeyError for a name that is not there.
        """
        return self._view(np.arange(len(self.columns)), self.parameters.only(names), params)

    def _view(self, positions: I64, parameters: ParameterMap, params: tuple[str, ...]) -> Trajectory:
        return Trajectory(
            self.source,
            self._all_steps,
            self.columns[positions],
            path=self.path,
            unit=self.unit,
            scalars=self._all_scalars,
            parameters=parameters,
            params=params,
        )

    def _narrowed(self, params: Patterns) -> tuple[ParameterMap, tuple[str, ...]]:
        """The map and the patterns of a selection; as they are where nothing is left out."""
        if params is None:
            return self.parameters, self.params
        from cmdgpu.tensors import matching

        chosen = self.parameters.only([t.name for t in matching(self.parameters, params)])
        if chosen is self.parameters:
            return chosen, self.params
        return chosen, (*self.params, params if isinstance(params, str) else "|".join(params))

    def _positions(
        self, start: int | None, stop: int | None, stride: int, steps: Sequence[int] | I64 | None
    ) -> I64:
        """Positions of a selection among the selected snapshots, ascending."""
        if steps is not None:
            if start is not None or stop is not None or stride != 1:
                raise UsageError(
                    "sel takes either steps or start, stop, stride", hint="leave one of them out"
                )
            wanted = np.unique(np.asarray(steps, dtype=np.int64))
            positions = np.array([self._labelled(int(step)) for step in wanted], dtype=np.int64)
        else:
            if stride < 1:
                raise UsageError(f"a stride of {stride}", hint="it is at least 1")
            positions = np.arange(len(self.columns))[start:stop:stride]
        if not len(positions):
            raise UsageError(
                f"start={start}, stop={stop}, stride={stride} selects none of {len(self.columns)} snapshots",
                hint="start and stop are positions, not steps",
            )
        return positions

    def _position(self, step: int) -> int:
        """Position of a label among the selected snapshots; negative counts from the end."""
        if step < 0 and -step <= len(self.columns):
            return len(self.columns) + step
        return self._labelled(step)

    def _labelled(self, step: int) -> int:
        mine = self.steps
        found = np.flatnonzero(mine == step)
        if not len(found):
            raise StepNotFound(
                "is not among the snapshots",
                file=self.path,
                step=step,
                hint=f"nearest: {nearest_steps(mine, step)}",
            )
        return int(found[0])

    # ---- reading ------------------------------------------------------------------------------------

    def __getitem__(self, index: Any) -> AnyArray:
        """``traj[rows, columns]`` as numbers, with NumPy's slice and integer semantics, axes independent.

        bfloat16 comes as float32; rows of no selected tensor are NaN. Rows are read chunk by chunk; a whole
        column costs one read of it.
        """
        axes = cast(tuple[Index, ...], index if isinstance(index, tuple) else (index,))
        if len(axes) != 2:
            raise UsageError(f"{len(axes)} axes for a trajectory of two", hint="write traj[:100, -1]")
        rows, row_is_int = positions(axes[0], self.shape[0])
        columns, column_is_int = positions(axes[1], self.shape[1])
        values = self.read_rows(rows, columns)
        if row_is_int and column_is_int:
            return values[0, 0]
        return values[0] if row_is_int else values[:, 0] if column_is_int else values

    def read_rows(self, rows: I64, columns: I64 | None = None) -> AnyArray:
        """(len(rows), len(columns)) values as numbers; ``columns`` are positions among the selected ones."""
        chosen = self.columns if columns is None else self.columns[columns]
        order, back = np.unique(rows, return_inverse=True)
        live = self.parameters.are_live(order)
        if live.all():
            stored = self.source.read_rows(order, chosen)
        else:
            kind = fmt.storage(self.dtype)
            stored = np.full((len(order), len(chosen)), kind.fill, dtype=kind.numpy)
            if live.any():
                stored[live] = self.source.read_rows(order[live], chosen)
        return fmt.widen(stored, self.dtype)[back.reshape(-1)]

    def column(self, step: int) -> SnapshotReader:
        """One snapshot as rows of numbers; ``step`` is any recorded label, negative counts from the end."""
        if step < 0 or step in self.steps:
            t = int(self.columns[self._position(step)])
        else:
            t = int(self._everything()._position(step))
        return SnapshotReader(self.source, t, self.parameters)

    def _everything(self) -> Trajectory:
        columns = np.arange(len(self._all_steps))
        return Trajectory(self.source, self._all_steps, columns, path=self.path)

    def state_dict(
        self, step: int, params: Patterns = None, *, buffers: Buffers = "recorded"
    ) -> OrderedDict[str, Tensor]:
        """The selected tensors of one step, in their own dtype: bit for bit where the store is as wide.

        ``step`` is a recorded label, negative counts from the end; ``params`` are regular expressions;
        ``buffers="skip"`` leaves the buffers out.
        """
        from cmdgpu.tensors import state_dict

        return state_dict(self.parameters, self._snapshot(step, buffers), params, buffers)

    def load_into(self, model: nn.Module, step: int, *, buffers: Buffers = "recorded") -> None:
        """Copy one recorded snapshot into the model, in place; a ModelMismatch leaves it untouched.

        With ``buffers="skip"`` the model keeps its own buffers, and of a selection all that is not selected.
        """
        from cmdgpu.tensors import load_into

        load_into(model, self.parameters, self._snapshot(step, buffers), self._name)

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
        """Write one snapshot as a file, ``safetensors`` or ``pt`` (told by the suffix), or as a folder.

        format          ``dcp`` for torch.distributed.checkpoint, ``huggingface`` for shards as
                        ``save_pretrained`` writes them; the folder must not be there yet
        buffers         ``"recorded"``, or ``"skip"`` to leave them out
        max_shard_size  of the shards: bytes, or ``"5GB"``, which is the default
        """
        from cmdgpu.exporting import export_snapshot

        snapshot = self._snapshot(step, buffers)
        return export_snapshot(
            local_path(path, "an export"),
            self.parameters,
            snapshot,
            format,
            params,
            buffers=buffers,
            buffers_step=step if step >= 0 else int(self.steps[step]),
            max_shard_size=max_shard_size,
        )

    def _snapshot(self, step: int, buffers: Buffers) -> Snapshot:
        from cmdgpu.tensors import check_buffers

        check_buffers(buffers, ("recorded", "skip"))
        column = self.column(step)
        return lambda entry: None if buffers == "skip" and entry.kind == "buffer" else column

    def verify(self, *, quick: bool = False, progress: Progress | None = None) -> list[Damage]:
        """Damaged chunks; empty means sound. An array in memory has nothing to verify."""
        if self.path is None:
            return []
        return verify_store(self.path, quick=quick, progress=progress).damaged

    @property
    def _name(self) -> str:
        return str(self.path) if self.path else "the array"


class SnapshotReader:
    """One column of a source, read a chunk at a time; the last chunk is kept. Holes of the map are NaN."""

    def __init__(self, source: Source, t: int, parameters: ParameterMap) -> None:
        self._source = source
        self._parameters = parameters
        self._columns = np.array([t], dtype=np.int64)
        source.require(self._columns)
        self._slot = np.empty((1, source.rows), dtype=fmt.storage(source.dtype).numpy)
        self._unit = -1

    def read(self, start: int, stop: int) -> AnyArray:
        """Rows [start, stop) as numbers."""
        rows, kind = self._source.rows, fmt.storage(self._source.dtype)
        out = np.full(stop - start, kind.fill, dtype=kind.numpy)
        for _, first, last in self._parameters.segments(start, stop):
            for unit in range(first // rows, -(-last // rows)):
                self._load(unit)
                low, high = max(first, unit * rows), min(last, (unit + 1) * rows)
                out[low - start : high - start] = self._slot[0, low - unit * rows : high - unit * rows]
        return fmt.widen(out, self._source.dtype)

    def _load(self, unit: int) -> None:
        if unit == self._unit:
            return
        self._unit = -1
        self._fill(unit, self._slot)
        self._unit = unit

    def _fill(self, unit: int, slot: AnyArray) -> None:
        for task in self._source.fill_tasks(unit, unit + 1, self._columns, slot):
            task()

    @property
    def rows(self) -> int:
        """Rows of a unit."""
        return self._source.rows

    def announce(self, unit: int) -> None:
        """A unit is read soon: the disk may begin."""
        if isinstance(self._source, StoreSource):
            announce(self._source.view.chunk_path(unit, int(self._columns[0])))

    def unit(self, unit: int) -> AnyArray:
        """All rows of a unit as numbers, holes as they lie there; for several threads at once."""
        slot = np.empty_like(self._slot)
        self._fill(unit, slot)
        return fmt.widen(slot[0], self._source.dtype)


def _checked_steps(steps: Sequence[int] | I64 | None, n_snapshots: int) -> I64:
    step_t = np.arange(n_snapshots) if steps is None else np.asarray(steps)
    if step_t.shape != (n_snapshots,) or (n_snapshots and step_t.dtype.kind not in "iu"):
        raise UsageError(f"{step_t.size} steps for {n_snapshots} snapshots", hint="one integer per column")
    step_t = step_t.astype(np.int64)
    if n_snapshots and (step_t[0] < 0 or bool((np.diff(step_t) <= 0).any())):
        raise UsageError("steps must increase from 0 on", hint="sort the columns by step")
    return step_t


def _write_array(
    source: ArraySource,
    steps: I64,
    out: Path,
    stored: fmt.Storage,
    rows_per_chunk: int | None,
    *,
    compressed: bool,
) -> None:
    from cmdgpu.sampling import candidate_rows

    n_rows = source.map.n_rows
    rows = rows_per_chunk or fmt.default_rows_per_chunk(n_rows)
    entry = source.map.tensors[0]
    parameter_map = ParameterMap(
        (TensorEntry(entry.name, "parameter", stored.name, entry.shape, entry.pieces),)
    )
    journal = Journal.create(
        out,
        parameter_map,
        dtype=stored.name,
        rows=rows,
        unit="step",
        sketch_rows=candidate_rows(parameter_map),
        compressed=compressed,
    )
    try:
        column = np.full(fmt.round_up(n_rows, rows), stored.fill, dtype=stored.numpy)
        for t, step in enumerate(steps.tolist()):
            numbers = SnapshotReader(source, t, source.map).read(0, n_rows)
            column[:n_rows] = fmt.narrow(numbers, stored.name)
            assert journal.view.sketch_rows is not None
            journal.append(column, step, {}, column[journal.view.sketch_rows])
    finally:
        journal.close()
