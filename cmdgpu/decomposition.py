"""CMD: Correlation Mode Decomposition of a training trajectory (arXiv 2212.09040, Algorithms 1 and 2)."""

from __future__ import annotations

import os
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cmdgpu.clustering import AFFINITIES, check_stopping_rule, cluster_sample, clustering_bytes
from cmdgpu.errors import CmdgpuError, CmdgpuWarning, MemoryLimitError, StepNotFound, UsageError, printable
from cmdgpu.memory import default_limit, parse_bytes, show_bytes
from cmdgpu.notation import F32, F64, I16, I64, MAX_MODES, NON_FINITE, AnyArray
from cmdgpu.progress import Progress, Silent
from cmdgpu.results import (
    Frame,
    MemoryWriter,
    ModeSet,
    Provenance,
    Result,
    ResultWriter,
    RowArray,
    begin_result,
    open_result,
)
from cmdgpu.sampling import check_sampling, draw_sample
from cmdgpu.sources import StoreSource
from cmdgpu.statistics import summarise_buffers, tensor_shares
from cmdgpu.store import format as fmt
from cmdgpu.store.journal import nearest_steps
from cmdgpu.store.parameter_map import TensorEntry
from cmdgpu.trajectory import SnapshotReader, Trajectory
from cmdgpu.version import __version__

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cmdgpu.exporting import Export
    from cmdgpu.models import Patterns
    from cmdgpu.streaming.engine import PassReport
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
    ) -> None:
        check_stopping_rule(n_modes, threshold)
        check_sampling(n_samples, sampling, random_state)
        _ = AFFINITIES[affinity]
        self.n_modes = n_modes
        self.threshold = threshold
        self.n_samples = n_samples
        self.sampling = sampling
        self.affinity = affinity
        self.random_state = random_state
        self.device = device
        self._result: Result | None = None
        self._trajectory: Trajectory | None = None
        self._run: dict[str, Any] = {}

    # ---- fitting ------------------------------------------------------------------------------------

    def fit(
        self,
        traj: Trajectory | Any,
        out: str | os.PathLike[str] | None = None,
        *,
        buffers: Literal["fit", "skip"] = "fit",
        memory_limit: int | str | None = None,
        resume: bool = True,
        progress: Progress | None = None,
    ) -> CMD:
        """Algorithm 2, out of core: every byte of the trajectory is read once.

        traj          a Trajectory, or anything (N, T) that ``Trajectory.from_array`` takes
        out           folder of the result; in memory (14 bytes per row) when None
        buffers       "skip" leaves them out of the result: their rows count as holes, whoever loads it keeps
                      the model's own. No buffer is ever sampled
        memory_limit  bytes, or "4GiB", of host memory for the fit; a quarter of what is free by default
        resume        go on with an unfinished fit of the same settings at ``out``; False starts over

        A complete result of the same settings at ``out`` is opened, no work is done. Raises UsageError for
        no snapshot, MemoryLimitError with both numbers before anything is read, StoreExists naming the
        setting that differs, StoreCorrupt naming file, tensor and step; units done before an error are kept.
        """
        from cmdgpu import ops
        from cmdgpu.streaming.engine import plan_for, run_pass
        from cmdgpu.streaming.passes import AssignAndFit

        traj = traj if isinstance(traj, Trajectory) else Trajectory.from_array(traj)
        progress = progress or Silent()
        limit = default_limit() if memory_limit is None else parse_bytes(memory_limit)
        device = ops.resolve_device(self.device)
        if buffers not in ("fit", "skip"):
            raise UsageError(f"buffers cannot be {buffers!r} in a fit", hint="have: fit, skip")
        self._require_fittable(traj)
        mapped = traj.parameters if buffers == "fit" else traj.parameters.without("buffer")
        frame = Frame(mapped, traj.steps, traj.source.rows)
        most_modes = min(self.n_modes if self.threshold is None else MAX_MODES, self.n_samples)
        plan = None
        if out is None or not Path(out).exists():
            self._require_room_for_clustering(traj, limit)
            plan = plan_for(traj.source, frame, most_modes, device, limit, in_memory=out is None)
        stage_s: dict[str, float] = {}

        def decide() -> ModeSet:
            return self._sample_and_cluster(traj, stage_s)

        config = self._config() if buffers == "fit" else {**self._config(), "buffers": buffers}
        provenance = self._provenance(
            traj, config, ops.device_class(device), Path(out) if out is not None else None
        )
        begun = self._begin(out, frame, provenance, decide, resume)
        if isinstance(begun, Result):
            self._result, self._trajectory = begun, traj
            self._run = _nothing_to_do(frame, str(device))
            return self
        assert plan is not None
        work = AssignAndFit.of(frame, traj.dtype, begun.modes.references)
        report = run_pass(traj.source, traj.columns, work, begun, plan, device, progress)
        stage_s["pass"] = report.seconds
        started = time.perf_counter()
        self._result, self._trajectory = begun.finish(), traj
        stage_s["finish"] = time.perf_counter() - started
        name, _ = ops.choose(traj.dtype, len(frame.steps), begun.modes.n_modes, device)
        self._run = _run_figures(report, stage_s, str(device), name)
        return self

    def _require_fittable(self, traj: Trajectory) -> None:
        n_rows, n_snapshots = traj.shape
        if n_snapshots == 0 or n_rows == 0:
            raise UsageError(
                f"{n_rows} rows and {n_snapshots} snapshots are nothing to fit",
                file=traj.path,
                hint="record at least one snapshot, three for correlations that mean anything",
            )
        if n_snapshots < 3:
            what = "every row is constant" if n_snapshots == 1 else "every moving row has |corr| = 1"
            warnings.warn(f"with {n_snapshots} snapshots {what}", CmdgpuWarning, stacklevel=3)

    def _require_room_for_clustering(self, traj: Trajectory, limit: int) -> None:
        k = min(self.n_samples, traj.parameters.n_rows_of("parameter"))
        needed = clustering_bytes(k, len(traj.columns))
        if needed > limit:
            raise MemoryLimitError(
                f"clustering {k} sampled rows needs {show_bytes(needed)}, "
                f"the memory limit is {show_bytes(limit)}",
                hint=f"give {-(-needed // (1 << 20))}MiB or more, or sample fewer rows",
            )

    def _sample_and_cluster(self, traj: Trajectory, stage_s: dict[str, float]) -> ModeSet:
        """Algorithm 1, steps 2 to 4."""
        started = time.perf_counter()
        sample = draw_sample(traj.parameters, self.n_samples, self.sampling, self.random_state)
        values = traj.read_rows(sample.rows).astype(np.float32)
        stage_s["sample"] = time.perf_counter() - started
        started = time.perf_counter()
        clustering = cluster_sample(
            values.astype(np.float64),
            n_modes=self.n_modes,
            threshold=self.threshold,
            affinity=self.affinity,
        )
        stage_s["cluster"] = time.perf_counter() - started
        return ModeSet(
            references=np.ascontiguousarray(values[clustering.references]),
            reference_row=sample.rows[clustering.references],
            sample_row=sample.rows,
            sample_mode=clustering.labels,
            sample=values,
            linkage=np.ascontiguousarray(clustering.linkage),
        )

    def _begin(
        self,
        out: str | os.PathLike[str] | None,
        frame: Frame,
        provenance: Provenance,
        decide: Callable[[], ModeSet],
        resume: bool,
    ) -> ResultWriter | Result:
        if out is None:
            return MemoryWriter(frame, decide(), provenance)
        return begin_result(Path(out), frame, provenance, decide, resume=resume)

    def _config(self) -> dict[str, Any]:
        return {
            "n_modes": self.n_modes if self.threshold is None else None,
            "threshold": self.threshold,
            "n_samples": self.n_samples,
            "sampling": self.sampling,
            "affinity": self.affinity,
            "random_state": self.random_state,
        }

    def _provenance(
        self, traj: Trajectory, config: dict[str, Any], device_class: str, out: Path | None
    ) -> Provenance:
        import torch

        from cmdgpu import ops

        code = {
            "cmdgpu": __version__,
            "operation": "assign_and_fit",
            "torch": torch.__version__,
            "triton": ops.triton_version(),
            "numpy": np.__version__,
            "device_class": device_class,
        }
        return Provenance(_source_identity(traj, out), config, code, _origin(traj, out))

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
        """(M, T) reference profiles: raw rows of the trajectory."""
        return self.result.modes.references

    @property
    def reference_rows_(self) -> I64:
        """(M,) row of each reference."""
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
        """(N,) signed correlation with the reference; 0 for constant and non-finite rows."""
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
        return self.result.modes.sample

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
        n_rows, n_snapshots = self.result.frame.n_rows, len(self.steps_)
        itemsize = fmt.storage(self._stored_dtype).numpy.itemsize
        return {
            "n_modes": self.n_modes_,
            "n_samples": len(self.sample_rows_),
            **metrics,
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
    def _stored_dtype(self) -> str:
        return str(self.result.provenance["source"]["dtype"])

    def summary(self) -> str:
        """The fit in words: modes, sizes, |corr|, R^2, error, bytes, seconds."""
        metrics = self.metrics_
        n = max(int(metrics["n_rows"]), 1)
        stored, original = show_bytes(metrics["result_bytes"]), show_bytes(metrics["trajectory_bytes"])
        lines = [
            f"CMD  {self.n_modes_} modes, {metrics['n_rows']} parameters x {len(self.steps_)} snapshots, "
            f"{metrics['n_samples']} rows sampled",
            " mode        rows    share   |corr| median       5-95 %    reference",
            *(self._mode_line(m, metrics, n) for m in range(self.n_modes_)),
            f"mean |corr| {metrics['mean_abs_correlation']:.4f}   R^2 {metrics['r2']:.4f} "
            f"(by energy {metrics['r2_energy']:.4f})   mean squared error {metrics['weight_mse']:.3g}",
            f"constant {metrics['n_constant']} rows   non-finite {metrics['n_nonfinite']}   "
            f"below quantisation {metrics['n_below_quantisation']}   "
            f"buffers apart {metrics['n_buffer_rows']} rows",
            f"{stored} for a trajectory of {original}",
        ]
        if self._run and not self._run["stage_s"]:
            lines.append("this fit was complete already: nothing was read")
        elif self._run:
            lines.append(
                f"pass {self._run['stage_s']['pass']:.2f} s, {self._run['bytes_per_s'] / 1e9:.2f} GB/s, "
                f"{self._run['implementation']} on {self._run['device']}"
            )
        if len(self.steps_) < 3:
            lines.append("fewer than three snapshots: every |corr| is 1 or undefined and means nothing")
        return "\n".join(lines)

    def _mode_line(self, m: int, metrics: dict[str, Any], n_rows: int) -> str:
        low, _, median, _, high = metrics["mode_quantiles"][m]
        size = metrics["mode_sizes"][m]
        where = self.result.frame.map.locate(int(self.reference_rows_[m]))
        share = f"{100 * size / n_rows:6.2f} %"
        return f"{m:5d}  {size:10d}  {share}   {median:13.4f}  {low:.4f}-{high:.4f}   {where}"

    def __repr__(self) -> str:
        rule = f"n_modes={self.n_modes}" if self.threshold is None else f"threshold={self.threshold}"
        return f"CMD({rule}, n_samples={self.n_samples}, {'fitted' if self._result else 'not fitted'})"

    # ---- loading ------------------------------------------------------------------------------------

    @staticmethod
    def load(path: str | os.PathLike[str]) -> CMD:
        """A fitted decomposition from disk; its trajectory is used where it is still found beside it."""
        result = open_result(Path(path))
        config = result.provenance["config"]
        cmd = CMD(
            n_modes=config["n_modes"] or 10,
            threshold=config["threshold"],
            n_samples=config["n_samples"],
            sampling=config["sampling"],
            affinity=config["affinity"],
            random_state=config["random_state"],
        )
        cmd._result = result
        cmd._trajectory = _find_source(result)
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
            Path(path),
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

    def _label(self, step: int) -> int:
        """A fitted step by its position from the end, or a fitted or recorded one by its label."""
        steps = self.steps_
        if -len(steps) <= step < 0:
            return int(steps[step])
        if step in steps or (self._trajectory is not None and step in self._trajectory.recorded_steps):
            return step
        known, what = steps, "was not fitted, and the trajectory is out of reach"
        if self._trajectory is not None:
            known, what = self._trajectory.recorded_steps, "was not recorded"
        raise StepNotFound(
            what, file=self.result.path, step=step, hint=f"nearest: {nearest_steps(known, step)}"
        )

    def _snapshot(self, label: int, buffers: Buffers) -> Snapshot:
        from cmdgpu.tensors import check_buffers

        check_buffers(buffers, ("recorded", "rebuilt", "skip"))
        rebuilt = _RebuiltRows(self.result, self._references_at(label))
        nearest = self._nearest_recorded(label)
        recorded: SnapshotReader | None = None
        if buffers == "recorded" and self._trajectory is not None and nearest is not None:
            recorded = self._trajectory.column(nearest)

        def source_of(entry: TensorEntry) -> RowSource | None:
            return rebuilt if entry.kind == "parameter" or buffers == "rebuilt" else recorded

        return source_of

    def _nearest_recorded(self, label: int) -> int | None:
        """The step that recorded buffers come from; None when the trajectory is out of reach."""
        if self._trajectory is None:
            return None
        every = self._trajectory.recorded_steps
        return int(every[np.argmin(np.abs(every - label))])

    def _references_at(self, label: int) -> F64:
        """(M,) reference values at a step."""
        found = np.flatnonzero(self.steps_ == label)
        if len(found):
            return self.references_[:, found[0]].astype(np.float64)
        assert self._trajectory is not None
        column = self._trajectory.column(label)
        values = [column.read(row, row + 1)[0] for row in self.reference_rows_.tolist()]
        return np.array(values, dtype=np.float64)

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


class _RebuiltRows:
    """One step of the decomposition as numbers: a * r_mode(step) + b, unit by unit."""

    def __init__(self, result: Result, references_m: F64) -> None:
        self._result = result
        # indexed by mode: ..., -2 and -1 take the last two entries, whose a is 0
        self._value_of = np.concatenate([references_m, [0.0, 0.0]])

    def read(self, start: int, stop: int) -> AnyArray:
        """Rows [start, stop): computed in float64, rounded once; NaN for non-finite rows."""
        rows = slice(start, stop)
        mode = np.asarray(self._result.mode[rows])
        a = np.asarray(self._result.a[rows]).astype(np.float64)
        b = np.asarray(self._result.b[rows]).astype(np.float64)
        rebuilt = a * self._value_of[mode] + b
        rebuilt[mode == NON_FINITE] = np.nan
        return rebuilt.astype(np.float32)


def _source_identity(traj: Trajectory, out: Path | None) -> dict[str, Any]:
    """What ties a result to its trajectory: the committed digests of the selected snapshots.

    An array has none; a random token then stands for it, and its fits are never resumed by mistake.
    """
    identity: dict[str, Any] = {"steps": traj.steps.tolist(), "dtype": traj.dtype}
    if isinstance(traj.source, StoreSource):
        view = traj.source.view
        positions: list[int] = traj.columns.tolist()
        chosen = "".join(view.digests[t] for t in positions)
        identity["layout"] = view.layout
        identity["digest"] = fmt.sha256(view.layout.encode(), chosen.encode())
    elif out is not None:
        identity["token"] = os.urandom(16).hex()
    return identity


def _origin(traj: Trajectory, out: Path | None) -> str | None:
    if traj.path is None or out is None:
        return None
    return os.path.relpath(traj.path.absolute(), out.absolute().parent)


def _find_source(result: Result) -> Trajectory | None:
    """The trajectory a stored result was fitted on, if it is still there and still the same."""
    source, origin = result.provenance["source"], result.provenance["origin"]
    if result.path is None or origin is None:
        return None
    try:
        traj = Trajectory.open(result.path.absolute().parent / origin)
        selected = traj.sel(steps=source["steps"])
    except CmdgpuError:
        return None
    identity = _source_identity(selected, None)
    same = all(identity.get(key) == source.get(key) for key in ("layout", "digest"))
    return selected if same else None


def _nothing_to_do(frame: Frame, device: str) -> dict[str, Any]:
    """The figures of a run that found its result complete."""
    return {
        "device": device,
        "implementation": None,
        "rows_per_block": None,
        "blocks_total": 0,
        "units_total": frame.n_units,
        "units_resumed": frame.n_units,
        "bytes_read": 0,
        "bytes_per_s": 0.0,
        "planned_bytes": 0,
        "stage_s": {},
    }


def _run_figures(report: PassReport, stage_s: dict[str, float], device: str, name: str) -> dict[str, Any]:
    return {
        "device": device,
        "implementation": name,
        "rows_per_block": report.plan.units_per_block * report.plan.rows,
        "blocks_total": len(report.plan.blocks()),
        "units_total": report.plan.n_units,
        "units_resumed": report.units_resumed,
        "bytes_read": report.bytes_read,
        "bytes_per_s": report.bytes_per_s,
        "planned_bytes": report.plan.needed_bytes,
        "stage_s": stage_s,
    }
