"""Fits of one trajectory in one pass: sample, cluster, read every block once for all of them, finish.

Algorithm 2 for one fit or many: each decides its own references, and a unit that several fits lack is read
once. Who reads is an executor's business: this process, a Dask cluster, or the ranks of a launcher.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import time
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import numpy as np

from cmdgpu.clustering import AFFINITIES, Tree, check_stopping_rule, clustering_bytes, grow_tree
from cmdgpu.errors import CmdgpuWarning, MemoryLimitError, UsageError, WorkerLost
from cmdgpu.memory import default_limit, show_bytes
from cmdgpu.notation import F32, I64, MAX_MODES, NO_ROW
from cmdgpu.profiles import Objective, References, check_references, sample_components
from cmdgpu.progress import Progress
from cmdgpu.results import (
    Frame,
    MemoryWriter,
    ModeSet,
    Provenance,
    Refine,
    Refined,
    Result,
    StoredWriter,
    begin_result,
    is_taken,
)
from cmdgpu.sampling import announcement, check_sampling, draw_sample
from cmdgpu.sources import StoreSource
from cmdgpu.store import format as fmt
from cmdgpu.store.places import Place, seen_from
from cmdgpu.trajectory import Trajectory

if TYPE_CHECKING:
    from cmdgpu.streaming.executors import Executor

Buffers = Literal["fit", "skip"]
T = TypeVar("T")

PATIENCE_S: Final = 1800.0
"""How long nothing may be added to a fit that others work at before they are taken for lost."""
GRACE_S: Final = 60.0
"""How long nothing may be added before a rank does what is left for other ranks. Whoever waits has worked for
as long as they had, so that ranks that are merely late have been started by then."""
_POLL_S: Final = 0.2


@dataclass(frozen=True)
class Settings:
    """What decides the modes of a fit; see ``CMD``."""

    n_modes: int = 10
    threshold: float | None = None
    n_samples: int = 1000
    sampling: str = "layer-balanced"
    affinity: str = "abs-corr"
    random_state: int = 0
    references: References = "row"
    refine: int = 0
    objective: Objective = "energy"

    def __post_init__(self) -> None:
        check_stopping_rule(self.n_modes, self.threshold)
        check_sampling(self.n_samples, self.sampling, self.random_state)
        check_references(self.references, self.refine, self.objective)
        _ = AFFINITIES[self.affinity]

    @property
    def most_modes(self) -> int:
        return min(self.n_modes if self.threshold is None else MAX_MODES, self.n_samples)

    @property
    def are_rows(self) -> bool:
        """Whether the references are the rows that the paper takes."""
        return self.references == "row" and not self.refine

    def to_json(self) -> dict[str, Any]:
        """References are said where they are no rows: a fit as in the paper keeps its fingerprint."""
        others: dict[str, Any] = {} if self.references == "row" else {"references": self.references}
        if self.refine:
            others["refine"] = self.refine
        if others:
            others["objective"] = self.objective
        return {
            "n_modes": self.n_modes if self.threshold is None else None,
            "threshold": self.threshold,
            "n_samples": self.n_samples,
            "sampling": self.sampling,
            "affinity": self.affinity,
            "random_state": self.random_state,
            **others,
        }


@dataclass(frozen=True)
class Asked:
    """One fit that is wanted: of which rows, how, and where it goes (in memory when None)."""

    traj: Trajectory
    settings: Settings
    out: Place | None = None
    buffers: Buffers = "fit"

    @cached_property
    def frame(self) -> Frame:
        """The rows of the result: buffers that are skipped are holes in it."""
        traj = self.traj
        mapped = traj.parameters if self.buffers == "fit" else traj.parameters.without("buffer")
        return Frame(mapped, traj.steps, traj.source.rows)


@dataclass(frozen=True)
class Fitted:
    result: Result
    run: dict[str, Any]
    """Figures of the pass it took part in: speeds, seconds, bytes."""


def fit_all(
    asked: Sequence[Asked],
    *,
    device: str = "auto",
    executor: object = None,
    memory_limit: int | None = None,
    resume: bool = True,
    progress: Progress,
) -> list[Fitted]:
    """Fits of one trajectory, or of selections of its parameters, in one pass over it.

    All have the same snapshots, and all go to disk or none. Those that are complete are opened, those that
    were begun go on. Raises what ``CMD.fit`` raises; units done before an error are kept.
    """
    from cmdgpu.streaming.executors import executor_for

    for one in asked:
        _require_fittable(one)
    with executor_for(executor) as workers:
        if workers is None:
            return _fit_here(asked, device, memory_limit, resume, progress)
        return _fit_by(workers, asked, device, memory_limit, resume, progress)


def _fit_here(
    asked: Sequence[Asked], device: str, memory_limit: int | None, resume: bool, progress: Progress
) -> list[Fitted]:
    """In this process, a lane for every device."""
    from cmdgpu import ops
    from cmdgpu.streaming.engine import Fit, plan_for, run_pass
    from cmdgpu.streaming.passes import AssignAndFit, code_identity

    traj = asked[0].traj
    devices = ops.resolve_devices(device)
    limit = default_limit() if memory_limit is None else memory_limit
    in_memory = asked[0].out is None
    plan = None
    if missing := [one for one in asked if one.out is None or not is_taken(one.out)]:
        for one in missing:
            _require_room_for_clustering(one, limit)
            _require_room_for_rounds(one, limit)
        plan = plan_for(
            traj.source,
            [one.frame for one in missing],
            [one.settings.most_modes for one in missing],
            devices,
            limit,
            in_memory=in_memory,
        )
    begun = _begin_all(asked, code_identity(devices), resume, limit, progress)
    writers = [each.writer for each in begun if each.writer is not None]
    ran: _Ran | None = None
    if writers:
        assert plan is not None
        fits = [Fit(AssignAndFit.of(w.frame, traj.dtype, w.modes.references), w) for w in writers]
        report = run_pass(traj.source, traj.columns, fits, plan, devices, progress)
        under_way = (each for each in begun if each.writer is not None)
        for each, n_units in zip(under_way, report.units_resumed, strict=True):
            each.units_resumed = n_units
        most = max(writer.modes.n_modes for writer in writers)
        ran = _Ran(
            implementation=ops.choose(traj.dtype, len(traj.columns), most, devices[0])[0],
            rows_per_block=plan.units_per_block * plan.rows,
            blocks_total=len(plan.blocks()),
            bytes_read=report.bytes_read,
            planned_bytes=plan.needed_bytes,
            seconds=report.seconds,
        )
    return [each.finish(",".join(map(str, devices)), ran) for each in begun]


def _fit_by(
    workers: Executor,
    asked: Sequence[Asked],
    device: str,
    memory_limit: int | None,
    resume: bool,
    progress: Progress,
) -> list[Fitted]:
    """By workers of other processes: they are told places and units, and meet in the ledgers of the fits."""
    from cmdgpu import ops
    from cmdgpu.streaming.executors import RankStride
    from cmdgpu.streaming.jobs import Describe, Job, blocks_of
    from cmdgpu.streaming.passes import code_identity

    traj = asked[0].traj
    if traj.path is None or any(one.out is None for one in asked):
        raise UsageError(
            "workers of other processes share a trajectory and its results through their files",
            hint="give a recorded store and out=, or leave the executor out",
        )
    if isinstance(workers, RankStride):
        if not resume and workers.size > 1:
            raise UsageError(
                "ranks that start over throw away each other's work",
                hint="delete the unfinished fit (*.partial) by hand, then start them without --no-resume",
            )
        if workers.size > 1 and any(one.settings.refine for one in asked):
            raise UsageError(
                f"{workers.size} ranks would each refine the same references",
                hint="fit in one process, or with dask: references are refined first, by the one that asks",
            )
        device = workers.own(device)
        code = code_identity(ops.resolve_devices(device))
    else:
        (_, code), *_ = workers.map_blocks(Describe(device), [0])
    limit = default_limit() if memory_limit is None else memory_limit
    for one in asked:
        if one.out is not None and not is_taken(one.out):
            _require_room_for_clustering(one, limit)
            _require_room_for_rounds(one, limit)
    begun = _begin_all(asked, code, resume, limit, progress)
    writers = [each.writer for each in begun if isinstance(each.writer, StoredWriter)]
    ran: _Ran | None = None
    if writers:
        for each in begun:
            if isinstance(each.writer, StoredWriter):
                each.units_resumed = each.writer.n_begun()
        frames = [writer.frame for writer in writers]
        unit_bytes = frames[0].rows * len(traj.columns) * fmt.storage(traj.dtype).numpy.itemsize
        blocks, per_block = blocks_of(frames, unit_bytes)
        job = Job(
            traj.path.absolute(), tuple((w.out.absolute(), w.partial.absolute()) for w in writers),
            device, memory_limit,
        )  # fmt: skip
        left = {unit for frame in frames for unit in frame.live_units}
        started, bytes_read, planned = time.perf_counter(), 0, 0
        implementation = None
        progress.begin("fit", unit_bytes * len(left))
        rest = workers.take_over(job, blocks) if isinstance(workers, RankStride) else None
        try:
            with _closing(workers.map_blocks(job, blocks)) as reports:
                for (first, stop), report in itertools.chain(reports, _for_the_others(writers, rest)):
                    bytes_read += report.bytes_read
                    planned = max(planned, report.planned_bytes)
                    implementation = report.implementation or implementation
                    device = report.device
                    here = left.intersection(range(first, stop))
                    left -= here  # a block may come twice
                    progress.advance(unit_bytes * len(here))
        finally:
            progress.end()
        ran = _Ran(
            implementation=implementation,
            rows_per_block=per_block * frames[0].rows,
            blocks_total=len(blocks),
            bytes_read=bytes_read,
            planned_bytes=planned,
            seconds=time.perf_counter() - started,
        )
    return [each.finish(device, ran) for each in begun]


def _for_the_others(writers: Sequence[StoredWriter], rest: Iterator[T] | None) -> Iterator[T]:
    """Until every unit of every fit is there, whoever leaves it.

    When nothing comes for a while, the others are gone, or were never started: ``rest``, their blocks, is
    done here as far as nobody else has. Raises WorkerLost where there is none.
    """
    if rest is not None and not _all_come(writers, GRACE_S):
        for taken in rest:
            yield taken
            if _n_done(writers) == _n_units(writers):
                break
    if not _all_come(writers, PATIENCE_S):
        raise WorkerLost(
            f"{_n_done(writers)} of {_n_units(writers)} units are done, and none was added for "
            f"{PATIENCE_S:.0f} s",
            file=writers[0].out,
            hint="start the workers that are gone again: what is done is kept",
        )


def _all_come(writers: Sequence[StoredWriter], patience_s: float) -> bool:
    """Wait as long as something is added from time to time; whether all units are there then."""
    most, since = -1, time.monotonic()
    while (done := _n_done(writers)) < _n_units(writers):
        if done > most:
            most, since = done, time.monotonic()
        elif time.monotonic() - since > patience_s:
            return False
        time.sleep(_POLL_S)
    return True


def _n_done(writers: Sequence[StoredWriter]) -> int:
    return sum(writer.n_begun() for writer in writers)


def _n_units(writers: Sequence[StoredWriter]) -> int:
    return sum(len(writer.frame.live_units) for writer in writers)


@contextlib.contextmanager
def _closing(iterator: Iterator[T]) -> Generator[Iterator[T]]:
    """An executor stops what is outstanding when its iterator is closed: now, not when it is collected."""
    try:
        yield iterator
    finally:
        if isinstance(iterator, Generator):
            iterator.close()


@dataclass(frozen=True)
class _Ran:
    """Figures of a pass, whoever ran it; those of one that found nothing to do by default."""

    implementation: str | None = None
    rows_per_block: int | None = None
    blocks_total: int = 0
    bytes_read: int = 0
    planned_bytes: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        figures = dataclasses.asdict(self)
        seconds = figures.pop("seconds")
        return {**figures, "bytes_per_s": self.bytes_read / seconds if seconds else 0.0}


@dataclass
class _Begun:
    """A fit that is under way, or was found complete."""

    one: Asked
    writer: MemoryWriter | StoredWriter | None
    result: Result | None
    stage_s: dict[str, float]
    units_resumed: int = 0

    def finish(self, device: str, ran: _Ran | None) -> Fitted:
        n_units, result = len(self.one.frame.live_units), self.result
        if self.writer is None:
            ran, self.units_resumed, self.stage_s = _Ran(), n_units, {}
        else:
            assert ran is not None
            self.stage_s["pass"] = ran.seconds
            started = time.perf_counter()
            result = self.writer.finish()
            self.stage_s["finish"] = time.perf_counter() - started
        assert result is not None
        run = {"device": device, "units_total": n_units, "units_resumed": self.units_resumed}
        return Fitted(result, {**run, **ran.to_json(), "stage_s": self.stage_s})


def _begin_all(
    asked: Sequence[Asked], code: Mapping[str, Any], resume: bool, limit: int, progress: Progress
) -> list[_Begun]:
    """In the order asked; those of one sample are decided one after the other, each by rounds of its own."""
    sampler, begun = _Sampler(), dict[int, _Begun]()
    for i in sorted(range(len(asked)), key=lambda i: _sample_key(asked[i])):
        begun[i] = _begin(asked[i], code, resume, sampler, limit, progress)
    return [begun[i] for i in range(len(asked))]


def _begin(
    one: Asked,
    code: Mapping[str, Any],
    resume: bool,
    sampler: _Sampler,
    limit: int,
    progress: Progress,
) -> _Begun:
    stage_s: dict[str, float] = {}

    def decide() -> ModeSet:
        return sampler.decide(one, stage_s)

    refine: Refine | None = None
    if one.settings.refine:
        from cmdgpu import ops

        refine = _rounds(one, stage_s, limit, progress)
        code = {**code, "refined_by": ops.device_class(ops.resolve_device("cpu"))}
    config = one.settings.to_json()
    if one.buffers != "fit":
        config["buffers"] = one.buffers
    source = one.traj.identity()
    if "digest" not in source and one.out is not None:
        source["token"] = os.urandom(16).hex()  # an array: its fits are never resumed by mistake
    provenance = Provenance(source, config, code, _origin(one), one.traj.params)
    if one.out is None:
        modes = decide()
        state = Refined(modes.references)
        for after in refine(state) if refine is not None else ():
            state = after
        modes = dataclasses.replace(modes, references=state.references)
        return _Begun(one, MemoryWriter(one.frame, modes, provenance, state.values), None, stage_s)
    begun = begin_result(one.out, one.frame, provenance, decide, resume=resume, refine=refine)
    if isinstance(begun, Result):
        return _Begun(one, None, begun, stage_s)
    return _Begun(one, begun, None, stage_s)


def _rounds(one: Asked, stage_s: dict[str, float], limit: int, progress: Progress) -> Refine:
    """The rounds of refinement of a fit: in this process and on its CPU, whoever computes the pass."""
    from cmdgpu.refinement import refined

    def refine(state: Refined) -> Iterator[Refined]:
        started = time.perf_counter()
        yield from refined(one.traj, state, one.settings.refine, one.settings.objective, limit, progress)
        stage_s["refine"] = time.perf_counter() - started

    return refine


def _origin(one: Asked) -> str | None:
    """Where the trajectory lies, seen from the folder of the result."""
    if one.traj.path is None or one.out is None:
        return None
    return seen_from(one.out, one.traj.path)


def _require_fittable(one: Asked) -> None:
    if one.buffers not in ("fit", "skip"):
        raise UsageError(f"buffers cannot be {one.buffers!r} in a fit", hint="have: fit, skip")
    n_rows, n_snapshots = one.frame.map.n_live, len(one.traj.columns)
    if n_snapshots == 0 or n_rows == 0:
        raise UsageError(
            f"{n_rows} rows and {n_snapshots} snapshots are nothing to fit",
            file=one.traj.path,
            hint="record at least one snapshot, three for correlations that mean anything"
            if n_rows
            else "choose tensors that have rows",
        )
    if n_snapshots < 3:
        what = "every row is constant" if n_snapshots == 1 else "every moving row has |corr| = 1"
        warnings.warn(f"with {n_snapshots} snapshots {what}", CmdgpuWarning, stacklevel=4)


def _require_room_for_clustering(one: Asked, limit: int) -> None:
    k = min(one.settings.n_samples, one.traj.parameters.n_rows_of("parameter"))
    needed = clustering_bytes(k, len(one.traj.columns))
    if needed > limit:
        raise MemoryLimitError(
            f"clustering {k} sampled rows needs {show_bytes(needed)}, "
            f"the memory limit is {show_bytes(limit)}",
            hint=f"give {-(-needed // (1 << 20))}MiB or more, or sample fewer rows",
        )


def _require_room_for_rounds(one: Asked, limit: int) -> None:
    """Of modes whose number is known; those of a threshold are counted before their first round."""
    if one.settings.refine and one.settings.threshold is None:
        from cmdgpu.refinement import plan_round

        plan_round(one.traj, one.settings.most_modes, limit)


class _Sampler:
    """Algorithm 1, steps 2 to 4. Fits that differ in M alone share a sample and its linkage.

    The last one is kept: who asks for many asks for those of one sample one after the other.
    """

    def __init__(self) -> None:
        self._key: object = None
        self._kept: tuple[I64, F32, Tree] | None = None

    def decide(self, one: Asked, stage_s: dict[str, float]) -> ModeSet:
        rows, values, tree = self._grown(one, stage_s)
        settings = one.settings
        started = time.perf_counter()
        clustering = tree.cut(n_modes=settings.n_modes, threshold=settings.threshold)
        medoids = clustering.references
        references = np.ascontiguousarray(values[medoids])
        if settings.references == "component":
            references = sample_components(values, clustering.labels, medoids, settings.objective)
        stage_s["cluster"] += time.perf_counter() - started
        return ModeSet(
            references=references,
            reference_row=rows[medoids] if settings.are_rows else np.full_like(rows[medoids], NO_ROW),
            sample_row=rows,
            sample_mode=clustering.labels,
            sample=values,
            linkage=np.ascontiguousarray(clustering.linkage),
        )

    def _grown(self, one: Asked, stage_s: dict[str, float]) -> tuple[I64, F32, Tree]:
        stage_s.update(sample=0.0, cluster=0.0)
        key = _sample_key(one)
        if self._kept is None or key != self._key:
            self._kept = None  # before the next one takes its place
            self._key, self._kept = key, self._grow(one, stage_s)
        return self._kept

    def _grow(self, one: Asked, stage_s: dict[str, float]) -> tuple[I64, F32, Tree]:
        settings, traj = one.settings, one.traj
        started = time.perf_counter()
        sample = draw_sample(traj.parameters, settings.n_samples, settings.sampling, settings.random_state)
        if isinstance(traj.source, StoreSource) and (
            words := announcement(sample, traj.source.view, len(traj.columns))
        ):
            warnings.warn(words, CmdgpuWarning, stacklevel=6)
        values = traj.read_rows(sample.rows).astype(np.float32)
        stage_s["sample"] = time.perf_counter() - started
        started = time.perf_counter()
        tree = grow_tree(values.astype(np.float64), settings.affinity)
        stage_s["cluster"] = time.perf_counter() - started
        return sample.rows, values, tree


def _sample_key(one: Asked) -> tuple[Any, ...]:
    """What fits of one trajectory have in common that share a sample and its linkage."""
    s, tensors = one.settings, tuple(tensor.name for tensor in one.traj.parameters)
    return tensors, s.n_samples, s.sampling, s.random_state, s.affinity
