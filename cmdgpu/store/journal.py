"""The commit protocol: the only code that makes a snapshot visible, or takes one away.

A column's chunks are written beyond the visible edge and made durable; then one rename of
``weights/zarr.json`` moves the edge. From that rename on the snapshot exists for every reader; before it,
it never did. The order of the steps of ``append`` is the protocol; ARCHITECTURE.md gives their reasons.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from cmdgpu.errors import (
    DurabilityUnknown,
    NotAStore,
    StepNotFound,
    StoreCorrupt,
    StoreFenced,
    UsageError,
    WriteFailed,
)
from cmdgpu.notation import F64, I64, AnyArray
from cmdgpu.store import durable, zstd
from cmdgpu.store import format as fmt
from cmdgpu.store.chunks import write_chunk
from cmdgpu.store.commit import PARAMETER_BY_SNAPSHOT
from cmdgpu.store.parameter_map import ParameterMap
from cmdgpu.store.provenance import Origin, sources_to_json
from cmdgpu.store.small import (
    digest,
    sketch_document,
    small_document,
    write_document,
    write_series,
    write_sketch_rows,
)
from cmdgpu.store.view import StoreView

_WRITERS: Final = 4
"""Chunk files in flight: an fsync waits for the device, not for a core."""
_LOCK: Final = ".lock"
_RANKS_LOCK: Final = ".ranks"


class Column(Protocol):
    """One snapshot on its way in, a chunk at a time: it need never be in memory whole."""

    def chunk(self, i: int) -> AnyArray:
        """Chunk i, (rows,) in the stored type, padded with the fill value.

        Each is asked for once, in order, by several threads at a time; it is good until the same thread asks
        for another.
        """
        ...

    def sketch(self) -> AnyArray | None:
        """(S,) the candidates' values, asked for once every chunk was; None in a store without a sketch."""
        ...

    def source(self) -> Origin | None:
        """What the snapshot was imported from, asked for last; None for one that was recorded."""
        ...


@dataclasses.dataclass(frozen=True)
class _InMemory:
    column: AnyArray
    rows: int
    candidates: AnyArray | None

    def chunk(self, i: int) -> AnyArray:
        return self.column[i * self.rows : (i + 1) * self.rows]

    def sketch(self) -> AnyArray | None:
        return self.candidates

    def source(self) -> None:
        return None


class Journal:
    """The one writer of a store; holds its lock from ``open`` or ``create`` until ``close``."""

    def __init__(self, view: StoreView, lock: durable.Lock) -> None:
        self.view = view
        self._lock = lock
        self._usable = True

    # ---- beginning and end --------------------------------------------------------------------------

    @staticmethod
    def create(
        path: Path,
        parameter_map: ParameterMap,
        *,
        dtype: str,
        rows: int,
        unit: str,
        sketch_rows: I64 | None,
        compressed: bool = False,
    ) -> Journal:
        """An empty store (N, 0): built under a temporary name, flushed, then renamed whole."""
        storage, zstd_level = fmt.storage(dtype), zstd.LEVEL if compressed else None
        durable.make_directory(path.parent)
        building = path.parent / durable.partial_name(path.name)
        try:
            durable.make_directory(building)
            group = fmt.group_document(
                {"cmdgpu": fmt.own("trajectory", unit=unit, layout=parameter_map.to_json())}
            )
            small = {fmt.STEP: fmt.sha256()}
            arrays = {fmt.STEP: small_document(fmt.STEP, 0)}
            if sketch_rows is not None:
                arrays[fmt.SKETCH] = sketch_document(len(sketch_rows), 0, storage, zstd_level)
                small[fmt.SKETCH_ROW] = digest(sketch_rows)
                durable.make_directory(building / fmt.SKETCH_ROW)
                write_sketch_rows(building / fmt.SKETCH_ROW, sketch_rows)
            head = fmt.own(
                "weights", steps=[], digests=[], small=small, layout=group["attributes"]["cmdgpu"]["self"]
            )
            if storage.name != storage.zarr:
                head["torch_dtype"] = storage.name
            arrays[fmt.WEIGHTS] = fmt.array_document(
                (parameter_map.n_rows, 0), (rows, 1), storage.zarr, PARAMETER_BY_SNAPSHOT, storage.fill,
                {"coordinates": fmt.STEP, "cmdgpu": head}, zstd_level,
            )  # fmt: skip
            for name, document in arrays.items():
                durable.make_directory(building / name)
                write_document(building / name, document)
            durable.write_file(building, fmt.DOCUMENT, [fmt.encode(group)])
            durable.flush_directory(building)
            durable.publish_directory(building, path)
            durable.make_name_last(path)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise
        return Journal.open(path)

    @staticmethod
    def open(path: Path) -> Journal:
        """Lock, *then* read: a T read before the lock could overwrite another writer's snapshot.

        Removes what a killed append left beyond the edge. Raises StoreLocked, NotAStore, StoreCorrupt.
        """
        StoreView.open(path)  # refuses what is no store before a lock file is created in it
        lock = Journal.lock(path)
        try:
            journal = Journal(StoreView.open(path), lock)
            journal.clean_up()
        except BaseException:
            lock.release()
            raise
        return journal

    @staticmethod
    def lock(path: Path) -> durable.Lock:
        """Raises StoreLocked when somebody else is writing there.

        Ranks of a sharded recording, too, may write on for a moment after the one with this lock died.
        """
        lock = durable.Lock(path / fmt.WEIGHTS / _LOCK)
        try:
            if os.path.lexists(path / fmt.WEIGHTS / _RANKS_LOCK):
                durable.Lock(path / fmt.WEIGHTS / _RANKS_LOCK).release()
        except BaseException:
            lock.release()
            raise
        return lock

    def close(self) -> None:
        self._usable = False
        self._lock.release()

    def clean_up(self) -> None:
        """Take away what a killed append or rewind left: chunks of index exactly T, unfinished files, scalars
        that were never committed, and what small arrays hold from T on (xarray refuses a ``step`` longer than
        ``weights``).

        A chunk of index > T means that somebody put an *older* commit file back: deleting would destroy
        data, so that is StoreCorrupt and nothing is touched.
        """
        edge, path = len(self.view.steps), self.view.folder
        has_sketch = self.view.sketch_rows is not None
        large = [fmt.WEIGHTS, fmt.SKETCH] if has_sketch else [fmt.WEIGHTS]
        small = [*self._small_names(), fmt.SKETCH_ROW] if has_sketch else self._small_names()
        found = [
            (m, p)
            for name in large
            for p in durable.entries(path / name)
            if (m := fmt.CHUNK.fullmatch(p.name))
        ]
        if beyond := [p for m, p in found if int(m[2]) > edge]:
            raise StoreCorrupt(
                f"lies beyond snapshot {edge}: an older {fmt.DOCUMENT} was put back",
                file=sorted(beyond)[0],
                hint=f"restore the newest {fmt.WEIGHTS}/{fmt.DOCUMENT}; nothing was deleted",
            )
        for match, orphan in found:
            if int(match[2]) == edge:
                durable.remove(orphan)
        for directory in durable.entries(path):
            if directory.name not in fmt.RESERVED and directory.name not in self.view.scalars:
                self._discard_uncommitted(directory)
        for directory in (path, *(path / name for name in (*large, *small))):
            durable.remove_partials(directory)
        self._trim_small()

    def _discard_uncommitted(self, directory: Path) -> None:
        """A scalar array that was finished and never committed; what is not ours stays where it is."""
        if not fmt.SCALAR_NAME.fullmatch(directory.name) or not directory.is_dir() or directory.is_symlink():
            return
        try:
            fmt.read_document(directory / fmt.DOCUMENT, "array", "small")
        except (NotAStore, StoreCorrupt):
            return
        durable.remove(durable.set_aside(directory))

    def _small_names(self) -> list[str]:
        return [fmt.STEP, *self.view.scalars]

    # ---- appending ----------------------------------------------------------------------------------

    def append(
        self, column: AnyArray, step: int, scalars: Mapping[str, float], sketch: AnyArray | None
    ) -> None:
        """Make one snapshot durable and visible, or raise and leave what was visible as it was.

        ``column`` is (n_chunks * rows,) in the stored type, padded with the fill value; ``sketch`` is (S,).
        """
        self.append_column(_InMemory(column, self.view.rows, sketch), step, scalars)

    def append_column(
        self, column: Column, step: int, scalars: Mapping[str, float], writers: int = _WRITERS
    ) -> None:
        """``append`` of a snapshot that is made while it is written, ``writers`` chunks at a time.

        What ``column`` raises is raised here; nothing of the snapshot is visible then.
        """
        crcs = self._write_column(column, self.begin(step), writers)
        self.append_written(crcs, step, scalars, column.sketch(), column.source())

    def begin(self, step: int) -> int:
        """The index of the snapshot that comes next, once nothing speaks against writing its chunks."""
        self.require_next(step)
        self._fence()  # already fenced: the other writer's chunks of this index must not be written over
        return len(self.view.steps)

    def append_written(
        self,
        crcs: Sequence[bytes],
        step: int,
        scalars: Mapping[str, float],
        sketch: AnyArray | None,
        source: Origin | None = None,
    ) -> None:
        """The rest of ``append``, once every chunk of the column is written and flushed, whoever wrote it.

        ``crcs`` are those of the chunks, in their order.
        """
        view, t = self.view, len(self.view.steps)
        crcs = list(crcs)
        if sketch is not None:
            crcs.append(write_chunk(view.folder / fmt.SKETCH, fmt.chunk_name(0, t), sketch, view.zstd_level))
        steps = np.append(view.steps, np.int64(step))
        series = self._extend_scalars(scalars)
        self._write_small(steps, series)
        self._flush_names()
        sources = (*view.sources, source)
        self._fence()
        self._commit(steps, (*view.digests, fmt.sha256(*crcs)), series, sources)

    def require_next(self, step: int) -> None:
        if not self._usable:
            raise WriteFailed("the journal is closed", file=self.view.folder, hint="open the store again")
        steps = self.view.steps
        if step < 0 or (len(steps) and step <= int(steps[-1])):
            last = f"the last recorded step is {int(steps[-1])}" if len(steps) else "steps count from 0"
            raise UsageError(
                f"step {step} cannot follow: {last}",
                file=self.view.folder,
                hint=f"steps increase; to go back, Recorder(path, rewind_to={max(step - 1, 0)})",
            )

    def _write_column(self, column: Column, t: int, writers: int) -> list[bytes]:
        """Beyond the visible edge, so no reader sees it; inside this step the order is free."""
        level, directory = self.view.zstd_level, self.view.folder / fmt.WEIGHTS

        def write(i: int) -> bytes:
            return write_chunk(directory, fmt.chunk_name(i, t), column.chunk(i), level)

        return _in_threads(write, range(self.view.n_chunks), writers)

    def _extend_scalars(self, scalars: Mapping[str, float]) -> dict[str, F64]:
        """Every recorded series one value longer: NaN where a scalar was not given, now or before."""
        view = self.view
        never = np.full(len(view.steps), np.nan)
        names = [*view.scalars, *(name for name in scalars if name not in view.scalars)]
        return {
            name: np.append(view.scalars.get(name, never), np.float64(scalars.get(name, np.nan)))
            for name in names
        }

    def _write_small(self, steps: I64, series: Mapping[str, F64]) -> None:
        """Before the commit, so the rule is "at least as long as T, what lies beyond T is ignored"."""
        self._write_small_array(fmt.STEP, steps)
        for name, values in series.items():
            self._write_small_array(name, values)
        view = self.view
        if view.sketch_rows is not None:
            document = sketch_document(len(view.sketch_rows), len(steps), view.storage, view.zstd_level)
            durable.write_file(view.folder / fmt.SKETCH, fmt.DOCUMENT, [fmt.encode(document)])

    def _write_small_array(self, name: str, values: AnyArray) -> None:
        """A scalar first seen now is built apart, every chunk of it; of a known one only the tail changes."""
        directory = self.view.folder / name
        tail = (len(values) - 1) // fmt.SMALL_CHUNK
        if name in self._small_names():
            write_series(directory, name, values, tail)
            return
        self._discard_uncommitted(directory)
        building = self.view.folder / durable.partial_name(name)
        try:
            durable.make_directory(building)
            write_series(building, name, values, 0)
            durable.publish_directory(building, directory)
            durable.flush_directory(self.view.folder)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise

    def _flush_names(self) -> None:
        """Without this the commit could outlive the chunks it speaks of."""
        if self.view.sketch_rows is not None:
            durable.flush_directory(self.view.folder / fmt.SKETCH)
        durable.flush_directory(self.view.folder / fmt.WEIGHTS)

    def _fence(self) -> None:
        """A second writer where ``flock`` does not work (some network filesystems) is caught here."""
        path = self.view.folder / fmt.WEIGHTS / fmt.DOCUMENT
        if fmt.read_bytes(path) != self.view.raw:
            self._usable = False
            raise StoreFenced("another writer committed here", file=path, hint="one recorder per store")

    def _commit(
        self,
        steps: I64,
        digests: tuple[str, ...],
        series: dict[str, F64],
        sources: tuple[Origin | None, ...],
    ) -> None:
        """The rename inside ``write_file`` moves every reader to the new edge; its flush makes that last."""
        document = json.loads(self.view.raw)
        document["shape"][1] = len(steps)
        head = document["attributes"]["cmdgpu"]
        head["steps"] = steps.tolist()
        head["digests"] = list(digests)
        head.pop("sources", None)
        if (said := sources_to_json(sources)) is not None:
            head["sources"] = said
        for name, values in {fmt.STEP: steps, **series}.items():
            head["small"][name] = digest(values)
        head["small"] = {n: d for n, d in head["small"].items() if n in fmt.RESERVED or n in series}
        raw = fmt.encode(fmt.seal(document))
        directory = self.view.folder / fmt.WEIGHTS
        durable.write_file(directory, fmt.DOCUMENT, [raw])
        try:
            durable.flush_directory(directory)
        except WriteFailed as error:
            self._usable = False
            raise DurabilityUnknown(
                "the disk failed after the commit",
                file=directory / fmt.DOCUMENT,
                hint="open the store again to learn which snapshots exist",
            ) from error
        self.view = dataclasses.replace(
            self.view,
            steps=steps,
            digests=digests,
            small=head["small"],
            scalars=series,
            sources=sources,
            raw=raw,
            _crcs={},
        )

    # ---- going back ---------------------------------------------------------------------------------

    def rewind(self, step: int) -> int:
        """Drop every snapshot after ``step``, one at a time, the last one first; returns how many.

        What a failed append left at index T goes first: after the commit of T - 1 it would lie *beyond* the
        edge, where ``open`` takes it for the data of a newer commit. Then commit T - 1 and delete the chunks
        of index T - 1: a kill in between leaves only what the next ``open`` cleans up. Raises StepNotFound,
        before anything is dropped, when ``step`` was not recorded.
        """
        steps = self.view.steps
        if step not in steps:
            nearest = nearest_steps(steps, step)
            raise StepNotFound(
                "is not recorded", file=self.view.folder, step=step, hint=f"nearest recorded: {nearest}"
            )
        dropped = 0
        while int(self.view.steps[-1]) > step:
            self._drop_last()
            dropped += 1
        return dropped

    def _drop_last(self) -> None:
        view, t = self.view, len(self.view.steps) - 1
        self._fence()
        self.clean_up()
        self._flush_names()
        series = {n: v[:t] for n, v in view.scalars.items()}
        self._commit(view.steps[:t], view.digests[:t], series, view.sources[:t])
        self.clean_up()
        self._flush_names()

    def forget_scalars(self, names: Collection[str]) -> None:
        """Commit the same snapshots without series that this journal's view was opened ``without``."""
        view = self.view
        self._fence()
        self._commit(view.steps, view.digests, view.scalars, view.sources)
        for name in names:
            if os.path.lexists(view.folder / name):
                durable.remove(durable.set_aside(view.folder / name))

    def _trim_small(self) -> None:
        """Shorten the shapes, leave the values."""
        view, t = self.view, len(self.view.steps)
        documents = {name: small_document(name, t) for name in self._small_names()}
        if view.sketch_rows is not None:
            documents[fmt.SKETCH] = sketch_document(len(view.sketch_rows), t, view.storage, view.zstd_level)
        for name, document in documents.items():
            directory = view.folder / name
            found, _ = fmt.read_document(directory / fmt.DOCUMENT, "array", "small")
            if found["shape"] != document["shape"]:
                write_document(directory, document)


def lock_ranks(path: Path) -> durable.Lock:
    """What every rank of a sharded recording holds, together with the others, while it may write chunks."""
    return durable.Lock(path / fmt.WEIGHTS / _RANKS_LOCK, shared=True)


def write_rows(
    path: Path, column: AnyArray, rows: int, first: int, t: int, zstd_level: int | None
) -> list[bytes]:
    """Part of a column, from chunk ``first`` on, beyond the visible edge and durable; returns the CRCs.

    By the rank that owns these rows, under ``lock_ranks``, between rank 0's ``begin`` and ``append_written``.
    """
    directory = path / fmt.WEIGHTS

    def write(i: int) -> bytes:
        values = column[i * rows : (i + 1) * rows]
        return write_chunk(directory, fmt.chunk_name(first + i, t), values, zstd_level)

    crcs = _in_threads(write, range(len(column) // rows), _WRITERS)
    durable.flush_directory(directory)
    return crcs


def _in_threads(write: Callable[[int], bytes], chunks: range, writers: int) -> list[bytes]:
    if len(chunks) <= 1:
        return [write(i) for i in chunks]
    with ThreadPoolExecutor(writers, thread_name_prefix="cmdgpu-write") as pool:
        return list(pool.map(write, chunks))


def nearest_steps(steps: I64, step: int, count: int = 3) -> str:
    """The recorded steps closest to the one asked for, as text."""
    order = sorted((int(s) for s in steps), key=lambda s: abs(s - step))[:count]
    return ", ".join(map(str, sorted(order))) if order else "none"
