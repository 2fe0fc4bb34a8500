"""CMD: Correlation Mode Decomposition of a training trajectory (arXiv 2212.09040, Algorithms 1 and 2)."""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from cmdgpu.errors import CmdgpuError, CmdgpuWarning, StepNotFound, UsageError, printable
from cmdgpu.fitting import Asked, Settings, fit_all
from cmdgpu.memory import parse_bytes
from cmdgpu.miniature import Rule
from cmdgpu.notation import F32, F64, I16, I64, NON_FINITE, AnyArray
from cmdgpu.profiles import Objective, ProfileAt, References, sample_fits
from cmdgpu.progress import Progress, Silent
from cmdgpu.quality import Quality, Sampled, assess, rows_at_hand
from cmdgpu.results import Result, RowArray, StoredRows, open_result
from cmdgpu.statistics import fraction_below, summarise_buffers, tensor_shares
from cmdgpu.store import format as fmt
from cmdgpu.store.journal import nearest_steps
from cmdgpu.store.parameter_map import TensorEntry
from cmdgpu.store.places import Named, followed, local_path, place_of
from cmdgpu.summary import in_html, in_words
from cmdgpu.trajectory import SnapshotReader, Trajectory

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cmdgpu.exporting import Export
    from cmdgpu.models import Patterns
    from cmdgpu.tensors import Buffers, RowSource, Snapshot


class CMD:
    """Decompose a trajectory into M modes: every row is an affine image of its mode's reference.

        w_i(t) ~ a_i r_m(i)(t) + b_i,     m(i) = argmax_m |corr(w_i, r_m)|

    >>> cmd = CMD(n_modes=10).fit(Trajectory.open("run.zarr"), out="run.cmd.zarr")  # doctest: +SKIP
    >>> cmd.load_into(model, step=-1)                                               # doctest: +SKIP

    n_modes       M, the largest number of clusters; ignored when a threshold is given
    threshold     cut the sample at this distance instead; with abs-corr every pair of sampled rows of a
                  mode then has |corr| >= 1 - threshold
    n_samples     K, rows that are clustered; the paper uses 1000
    sampling      "layer-balanced" (paper, section 8.2) or "uniform"
    affinity      "abs-corr": 1 - |corr|;  "corr-profile": distance between rows of the |corr| matrix
    random_state  seed of the sample
    device        "auto", "cpu", "cuda", "cuda:1"
    references    "row": the sampled row closest to all others of its mode, as in the paper; "component": the
                  first principal component of the mode's sampled rows, which is no row but explains more
    refine        rounds of Lloyd's algorithm over all rows, each one pass more: rows to their best reference,
                  references to the first components of their rows. Ends early when a round gains nothing
    objective     what component and refine make large: "energy", the R^2 of all rows together, or
                  "correlation", the mean corr^2, where every row counts alike

    After ``fit``: ``n_modes_``, ``references_`` (M, T), ``reference_rows_`` (M,), ``labels_``, ``a_``,
    ``b_``, ``correlation_`` (N,), ``metrics_``, ``linkage_``. A row that never moves has label -1, a = 0 and
    b = its value; a row with NaN or infinity has label -2 and b = NaN.

    Buffers are fitted like parameters and counted apart: the sample, ``metrics_`` and ``summary()`` are about
    parameters, ``buffer_metrics_`` about buffers. On the way back they come as they were recorded.
    """

    def __init__(
        self,
        n_modes: int = 10,
        threshold: float | None = None,
        n_samples: int = 1000,
        sampling: str = "layer-balanced",
        affinity: str = "abs-corr",
        random_state: int = 0,
        device: str = "auto",
        *,
        references: References = "row",
        refine: int = 0,
        objective: Objective = "energy",
    ) -> None:
        self.n_modes = n_modes
        self.threshold = threshold
        self.n_samples = n_samples
        self.sampling = sampling
        self.affinity = affinity
        self.random_state = random_state
        self.device = device
        self.references: References = references
        self.refine = refine
        self.objective: Objective = objective
        _ = self._settings()  # checks them
        self._result: Result | None = None
        self._trajectory: Trajectory | None = None
        self._run: dict[str, Any] = {}
        self._quality: Quality | None = None

    # ---- fitting ------------------------------------------------------------------------------------

    def fit(
        self,
        traj: Trajectory | Any,
        out: Named | None = None,
        executor: Any = None,
        memory_limit: int | str | None = None,
        resume: bool = True,
        *,
        buffers: Literal["fit", "skip"] = "fit",
        progress: Progress | None = None,
    ) -> CMD:
        """Algorithm 2, out of core: every byte of the trajectory is read once, and once for every round.

        traj          a Trajectory, or anything (N, T) that ``Trajectory.from_array`` takes
        out           folder of the result, or a URL; in memory (14 bytes per row) when None
        executor      who runs the blocks: this process (None); "ranks" of torchrun, srun or mpirun; "dask", a
                      cluster on this machine; "dask:ADDRESS" or a ``distributed.Client``, one that is there;
                      any object with ``map_blocks``. Others than this process need a store and ``out``
        buffers       "skip" leaves them out of the result: their rows count as holes, whoever loads it keeps
                      the model's own. No buffer is ever sampled
        memory_limit  bytes, or "4GiB", of host memory for the fit, of each worker where there are several; a
                      quarter of what is free by default
        resume        go on with an unfinished fit of the same settings at ``out``; False starts over

        A complete result of the same settings at ``out`` is opened, no work is done. Raises UsageError for
        no snapshot, MemoryLimitError with both numbers before anything is read, StoreExists naming the
        setting that differs, StoreCorrupt naming file, tensor and step; units done before an error are kept.
        """
        traj = traj if isinstance(traj, Trajectory) else Trajectory.from_array(traj)
        asked = Asked(traj, self._settings(), None if out is None else place_of(out), buffers)
        self._fit_all([self], [asked], executor, memory_limit, resume, progress)
        return self

    def _settings(self) -> Settings:
        return Settings(
            self.n_modes, self.threshold, self.n_samples, self.sampling, self.affinity, self.random_state,
            self.references, self.refine, self.objective,
        )  # fmt: skip

    @staticmethod
    def fit_together(
        cmds: Sequence[CMD],
        trajs: Sequence[Trajectory],
        outs: Sequence[Named],
        *,
        buffers: Literal["fit", "skip"] = "fit",
        executor: Any = None,
        memory_limit: int | str | None = None,
        resume: bool = True,
        progress: Progress | None = None,
    ) -> None:
        """Fit several in one pass over one trajectory: every block is read once for all of them.

        ``trajs`` are that trajectory, or selections of its parameters, with the same snapshots; the device is
        that of the first. The rest is as in ``fit``, and so are the bits of every result.
        """
        if not trajs:
            raise UsageError("no fit is asked for", hint="give at least one")
        first = trajs[0]
        if any(t.source is not first.source or list(t.columns) != list(first.columns) for t in trajs):
            raise UsageError(
                "fits of one pass are of one trajectory, at the same snapshots",
                hint="select parameters with sel(params=...) from one open trajectory",
            )
        asked = [
            Asked(traj, cmd._settings(), place_of(out), buffers)
            for cmd, traj, out in zip(cmds, trajs, outs, strict=True)
        ]
        CMD._fit_all(cmds, asked, executor, memory_limit, resume, progress)

    @staticmethod
    def _fit_all(
        cmds: Sequence[CMD],
        asked: Sequence[Asked],
        executor: Any,
        memory_limit: int | str | None,
        resume: bool,
        progress: Progress | None,
    ) -> None:
        fitted = fit_all(
            asked,
            device=cmds[0].device,
            executor=executor,
            memory_limit=None if memory_limit is None else parse_bytes(memory_limit),
            resume=resume,
            progress=progress or Silent(),
        )
        for cmd, one, found in zip(cmds, asked, fitted, strict=True):
            cmd._result, cmd._run, cmd._trajectory = found.result, found.run, one.traj
            cmd._quality = None

    @property
    def is_fitted(self) -> bool:
        return self._result is not None

    @property
    def trajectory(self) -> Trajectory | None:
        """What it was fitted on, as given to ``fit`` or found again by ``load``.

        None before a fit, and where the trajectory is out of reach.
        """
        return self._trajectory

    # ---- what was found -----------------------------------------------------------------------------

    @property
    def result(self) -> Result:
        """The fitted result. Raises UsageError before ``fit``."""
        if self._result is None:
            raise UsageError("this CMD is not fitted", hint="call fit(traj), or CMD.load(path)")
        return self._result

    @property
    def n_modes_(self) -> int:
        """M: no more than asked for."""
        return self.result.modes.n_modes

    @property
    def references_(self) -> F32:
        """(M, T) reference profiles: raw rows of the trajectory, or profiles that are centred over time."""
        return self.result.modes.references

    @property
    def reference_rows_(self) -> I64:
        """(M,) row of each reference; -1 for components and refined ones, which are no rows."""
        return self.result.modes.reference_row

    @property
    def labels_(self) -> RowArray:
        """(N,) int16 mode of every row; -1 constant, -2 non-finite."""
        return self.result.mode

    @property
    def a_(self) -> RowArray:
        """(N,) slope on the reference."""
        return self.result.a

    @property
    def b_(self) -> RowArray:
        """(N,) offset."""
        return self.result.b

    @property
    def correlation_(self) -> RowArray:
        """(N,) signed correlation with the reference; 0 for constant and non-finite rows.

        Its square is the R^2 of a row: the share of its movement that a * reference + b follows.
        """
        return self.result.correlation

    @property
    def sample_rows_(self) -> I64:
        """(K,) rows that were clustered, ascending."""
        return self.result.modes.sample_row

    @property
    def sample_labels_(self) -> I16:
        """(K,) their clusters."""
        return self.result.modes.sample_mode

    @property
    def sample_(self) -> F32:
        """(K, T) their values."""
        return np.asarray(self.result.modes.sample)

    @property
    def linkage_(self) -> F64:
        """(K' - 1, 4) SciPy linkage of the moving sampled rows."""
        return self.result.modes.linkage

    @property
    def steps_(self) -> I64:
        """(T,) steps of the fitted snapshots."""
        return self.result.frame.steps

    @property
    def metrics_(self) -> dict[str, Any]:
        """Counts, |corr|, R^2, error and bytes of the fit; speeds too when it ran in this process.

        All but the bytes are about parameters.
        """
        metrics = self.result.metrics
        n_rows, n_snapshots = self.result.frame.map.n_live, len(self.steps_)
        itemsize = fmt.storage(self._stored_dtype).numpy.itemsize
        return {
            "n_modes": self.n_modes_,
            "n_samples": len(self.sample_rows_),
            **metrics,
            "fraction_below": fraction_below(self.result.totals),
            **({"refinement": list(self.result.refinement)} if "refine" in self._config else {}),
            "result_bytes": self.result.n_bytes,
            "trajectory_bytes": n_rows * n_snapshots * itemsize,
            **self._run,
        }

    @property
    def buffer_metrics_(self) -> dict[str, Any]:
        """How well buffers are fitted, as ``metrics_`` says it of parameters."""
        return summarise_buffers(self.result.totals, self.result.frame.map, len(self.steps_))

    @property
    def tensor_shares_(self) -> dict[str, list[int]]:
        """Rows of every tensor in [non-finite, constant, mode 0, mode 1, ...]."""
        return tensor_shares(self.result.totals, self.result.frame.map)

    @property
    def _config(self) -> Mapping[str, Any]:
        """The settings of the fit, as they were when it was made."""
        return self.result.provenance["config"]

    @property
    def _stored_dtype(self) -> str:
        return str(self.result.provenance["source"]["dtype"])

    def quality(self) -> Quality:
        """Whether these modes are better than chance, with the numbers: see ``cmdgpu.quality.assess``.

        Computed once, in a second or two, from rows that are cheap to have (those of the sketch): nothing of
        the store is passed over again. Parameters alone are judged, of a selection the selected ones.
        """
        if self._quality is None:
            config, sample = self._config, np.asarray(self.sample_)
            drawn = Sampled(
                self.sample_rows_, sample, config["n_samples"], config["sampling"], config["random_state"]
            )
            rule = Rule(
                max(self.n_modes_, 1), None, config["affinity"], config.get("references", "row"),
                config.get("refine", 0), config.get("objective", "energy"),
            )  # fmt: skip
            self._quality = assess(
                rows_at_hand(drawn, self.trajectory), self.steps_, self.references_.astype(np.float64), rule
            )
        return self._quality

    def summary(self, *, quality: bool = True) -> str:
        """The fit in words: modes, sizes, |corr|, R^2, error, bytes, seconds; its ``quality`` at the end.

        That takes a second or two the first time; False leaves it out.
        """
        words = in_words(self.result, self.metrics_)
        return f"{words}\n{self.quality().words}" if quality else words

    def __repr__(self) -> str:
        rule = f"n_modes={self.n_modes}" if self.threshold is None else f"threshold={self.threshold}"
        return f"CMD({rule}, n_samples={self.n_samples}, {'fitted' if self._result else 'not fitted'})"

    def _repr_html_(self) -> str:
        """For a notebook: ``summary`` as a table, with the verdict where ``quality`` was asked before."""
        if self._result is None:
            return f"<pre>{escape(repr(self))}</pre>"
        return in_html(self._result, self.metrics_, self._quality)

    # ---- loading ------------------------------------------------------------------------------------

    @staticmethod
    def load(path: Named, trajectory: Trajectory | Named | None = None) -> CMD:
        """A fitted decomposition from a folder or a URL.

        Its trajectory is used where it is still found on the same machine, or on the same server; where it
        lies elsewhere, ``trajectory`` says so. Raises UsageError for one that it was not fitted on.
        """
        result = open_result(place_of(path))
        config = result.provenance["config"]
        cmd = CMD(
            n_modes=config["n_modes"] or 10,
            threshold=config["threshold"],
            n_samples=config["n_samples"],
            sampling=config["sampling"],
            affinity=config["affinity"],
            random_state=config["random_state"],
            references=config.get("references", "row"),
            refine=config.get("refine", 0),
            objective=config.get("objective", "energy"),
        )
        cmd._result = result
        if trajectory is None:
            cmd._trajectory = _find_source(result)
            return cmd
        given = trajectory if isinstance(trajectory, Trajectory) else Trajectory.open(trajectory)
        cmd._trajectory = _fitted_part(result, given)
        if cmd._trajectory is None:
            raise UsageError(
                "was not fitted on this trajectory", file=result.path, hint=f"{given.path} is another one"
            )
        return cmd

    # ---- rebuilding ---------------------------------------------------------------------------------

    def state_dict(
        self, step: int, params: Patterns = None, *, buffers: Buffers = "recorded"
    ) -> OrderedDict[str, Tensor]:
        """Every tensor at one step: parameters as a * reference + b, buffers as they were recorded.

        ``step`` is a fitted step (negative counts from the end), or any recorded one while the trajectory is
        at hand. ``params`` are regular expressions. Non-finite rows come back as NaN, with a warning that
        names their tensors.

        buffers  "recorded"  verbatim from the trajectory; left out, with a warning, when it is out of reach
                 "rebuilt"   as a * reference + b too, which can make a running variance negative
                 "skip"      left out
        """
        from cmdgpu.tensors import select, state_dict

        snapshot = self._snapshot(self._label(step), buffers)
        self._warn_of_gaps(select(self.result.frame.map, params), snapshot, buffers)
        return state_dict(self.result.frame.map, snapshot, params, buffers)

    def load_into(self, model: nn.Module, step: int, *, buffers: Buffers = "recorded") -> None:
        """Copy the rebuilt parameters of one step into the model, in place, a block at a time.

        Buffers as ``state_dict`` gives them; those it leaves out keep the model's values. Warns once when the
        model keeps running statistics: they belong to the trained weights. A ModelMismatch leaves the model
        untouched.
        """
        from cmdgpu.tensors import load_into, warn_of_running_statistics

        snapshot = self._snapshot(self._label(step), buffers)
        load_into(model, self.result.frame.map, snapshot, str(self.result.path or "the fit"))
        self._warn_of_gaps(self.result.frame.map.tensors, snapshot, buffers)
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
        """Write one rebuilt step as a file, ``safetensors`` or ``pt`` (told by the suffix), or as a folder.

        format          ``dcp`` for torch.distributed.checkpoint, ``huggingface`` for shards as
                        ``save_pretrained`` writes them; the folder must not be there yet
        buffers         as in ``state_dict``
        max_shard_size  of the shards: bytes, or ``"5GB"``, which is the default
        """
        from cmdgpu.exporting import export_snapshot
        from cmdgpu.tensors import select

        label = self._label(step)
        snapshot = self._snapshot(label, buffers)
        export = export_snapshot(
            local_path(path, "an export"),
            self.result.frame.map,
            snapshot,
            format,
            params,
            buffers=buffers,
            buffers_step=self._nearest_recorded(label) if buffers == "recorded" else None,
            max_shard_size=max_shard_size,
        )
        self._warn_of_gaps(select(self.result.frame.map, params), snapshot, buffers)
        return export

    def references_at(self, step: int) -> F64:
        """(M,) values of the references at one step, a fitted or a recorded one: those that rebuild it.

        Raises StepNotFound for another. References that are no rows are worked out at a step that was not
        fitted, refined ones from a whole snapshot.
        """
        return self._references_at(self._label(step))

    def _label(self, step: int) -> int:
        """A fitted step by its position from the end, or a fitted or recorded one by its label."""
        steps = self.steps_
        if -len(steps) <= step < 0:
            return int(steps[step])
        if step in steps or (self.trajectory is not None and step in self.trajectory.recorded_steps):
            return step
        known, what = steps, "was not fitted, and the trajectory is out of reach"
        if self.trajectory is not None:
            known, what = self.trajectory.recorded_steps, "was not recorded"
        raise StepNotFound(
            what, file=self.result.path, step=step, hint=f"nearest: {nearest_steps(known, step)}"
        )

    def _snapshot(self, label: int, buffers: Buffers) -> Snapshot:
        from cmdgpu.tensors import check_buffers

        check_buffers(buffers, ("recorded", "rebuilt", "skip"))
        rebuilt = _RebuiltRows(self.result, self._references_at(label))
        nearest = self._nearest_recorded(label)
        recorded: SnapshotReader | None = None
        if buffers == "recorded" and self.trajectory is not None and nearest is not None:
            recorded = self.trajectory.column(nearest)

        def source_of(entry: TensorEntry) -> RowSource | None:
            return rebuilt if entry.kind == "parameter" or buffers == "rebuilt" else recorded

        return source_of

    def _nearest_recorded(self, label: int) -> int | None:
        """The step that recorded buffers come from; None when the trajectory is out of reach."""
        if self.trajectory is None:
            return None
        every = self.trajectory.recorded_steps
        return int(every[np.argmin(np.abs(every - label))])

    def _references_at(self, label: int) -> F64:
        """(M,) reference values at a step."""
        found = np.flatnonzero(self.steps_ == label)
        if len(found):
            return self.references_[:, found[0]].astype(np.float64)
        assert self.trajectory is not None
        if "objective" in self._config:
            return self._profiles_at(self.trajectory, label)
        column = self.trajectory.column(label)
        values = [column.read(row, row + 1)[0] for row in self.reference_rows_.tolist()]
        return np.array(values, dtype=np.float64)

    def _profiles_at(self, traj: Trajectory, label: int) -> F64:
        """(M,) values that references which are no rows have at a step that was not fitted.

        Of components from the sampled rows, of refined references from all: a snapshot is read.
        """
        result, profile = self.result, ProfileAt(self.n_modes_, self._config["objective"])
        if "refine" not in self._config:
            modes, sample = result.modes, np.asarray(result.modes.sample)
            stored = traj.source.read_rows(modes.sample_row, np.flatnonzero(traj.recorded_steps == label))
            fits = sample_fits(sample, modes.sample_mode, modes.references)
            profile.add(modes.sample_mode, *fits, fmt.widen(stored, traj.dtype)[:, 0])
            return profile.values()
        column, parameters = traj.column(label), result.frame.map.without("buffer")
        for unit in result.frame.live_units:
            for segment in parameters.segments(*result.frame.unit(unit)):
                rows = slice(segment.start, segment.stop)
                fits = (result.mode[rows], result.a[rows], result.b[rows], result.correlation[rows])
                profile.add(*fits, column.read(segment.start, segment.stop))
        return profile.values()

    def _warn_of_gaps(self, entries: Sequence[TensorEntry], snapshot: Snapshot, buffers: Buffers) -> None:
        shares = self.tensor_shares_
        rebuilt = [t for t in entries if t.kind == "parameter" or buffers == "rebuilt"]
        if broken := [printable(t.name) for t in rebuilt if shares[t.name][0]]:
            _warn(f"non-finite rows are NaN in {', '.join(broken[:5])}{' ...' if len(broken) > 5 else ''}")
        left = [printable(t.name) for t in entries if snapshot(t) is None]
        if left and buffers == "recorded":
            _warn(
                f"the trajectory is out of reach: {len(left)} buffers are left out ({left[0]} first); "
                "put it back, or ask for buffers='rebuilt'"
            )


def _warn(text: str) -> None:
    warnings.warn(text, CmdgpuWarning, stacklevel=4)


_TILE_ROWS: Final = 1 << 16
"""Rebuilt at a time: float64 then stays in the cache."""


class _RebuiltRows:
    """One step of the decomposition as numbers: a * r_mode(step) + b, unit by unit."""

    def __init__(self, result: Result, references_m: F64) -> None:
        self._result = result
        # indexed by mode: ..., -2 and -1 take the last two entries, whose a is 0; of a hole a and b are NaN
        self._value_of = np.concatenate([references_m, [0.0, 0.0]])

    def read(self, start: int, stop: int) -> AnyArray:
        """Rows [start, stop): computed in float64, rounded once; NaN for non-finite rows."""
        rows = slice(start, stop)
        mode, a, b = (
            np.asarray(array[rows]) for array in (self._result.mode, self._result.a, self._result.b)
        )
        out = np.empty(len(mode), dtype=np.float32)
        for low in range(0, len(mode), _TILE_ROWS):
            tile = slice(low, low + _TILE_ROWS)
            rebuilt = np.take(self._value_of, mode[tile], mode="wrap")
            rebuilt *= a[tile]
            rebuilt += b[tile]
            rebuilt[mode[tile] == NON_FINITE] = np.nan
            out[tile] = rebuilt
        return out

    @property
    def rows(self) -> int:
        """Rows of a unit."""
        return self._result.frame.rows

    def announce(self, unit: int) -> None:
        """A unit is read soon: the disk may begin."""
        for array in (self._result.mode, self._result.a, self._result.b):
            if isinstance(array, StoredRows):
                array.announce(unit)

    def unit(self, unit: int) -> AnyArray:
        """All rows of a unit, holes as NaN; for several threads at once."""
        return self.read(*self._result.frame.unit(unit))


def _find_source(result: Result) -> Trajectory | None:
    """The trajectory a stored result was fitted on, if it is still there and still the same."""
    origin = result.provenance["origin"]
    if result.path is None or origin is None or (place := followed(result.path, origin)) is None:
        return None
    try:
        return _fitted_part(result, Trajectory.open(place))
    except CmdgpuError:
        return None


def _fitted_part(result: Result, traj: Trajectory) -> Trajectory | None:
    """What of a trajectory a result was fitted on; None where it was fitted on another."""
    source = result.provenance["source"]
    try:
        selected = traj.sel(steps=source["steps"])
    except StepNotFound:
        return None
    identity = selected.identity()
    same = all(identity.get(key) == source.get(key) for key in ("layout", "digest"))
    recorded, fitted = selected.parameters, result.frame.map
    if not same or any(t.name not in recorded or recorded[t.name] != t for t in fitted):
        return None
    if "tensors" not in source:
        return selected
    # by name: no regular expression of a file is ever run
    return selected.only([t.name for t in fitted], tuple(result.provenance["params"]))
