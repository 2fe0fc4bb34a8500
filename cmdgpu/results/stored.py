"""A result on disk, written: begun under a name of its own, filled unit by unit, named when complete."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np

from cmdgpu.errors import CmdgpuError, StoreCorrupt, StoreExists, WriteFailed
from cmdgpu.notation import AnyArray
from cmdgpu.results.contract import Frame, ModeSet, Provenance, Refine, Result, UnitRows, result_bytes
from cmdgpu.results.head import read_head
from cmdgpu.results.ledger import (
    DONE,
    SEGMENTS,
    UNIT_ARRAYS,
    Chunk,
    Ledger,
    n_begun,
    plan_digest,
    unit_documents,
)
from cmdgpu.results.modes import StoredSample, mode_documents, read_modes
from cmdgpu.results.opened import open_result, partial_path, partials_of, result_of
from cmdgpu.results.rounds import settle, unsettled
from cmdgpu.statistics import Totals, UnitStatistics, summarise
from cmdgpu.store import durable
from cmdgpu.store import format as fmt
from cmdgpu.store.chunks import crc32c
from cmdgpu.store.places import Place


def begin_result(
    out: Path,
    frame: Frame,
    provenance: Provenance,
    make_modes: Callable[[], ModeSet],
    *,
    resume: bool,
    refine: Refine | None = None,
) -> StoredWriter | Result:
    """``begin_result`` of ``beginning``, in a folder."""
    if out.exists() or out.is_symlink():
        return same_or_refuse(out, provenance)
    mine = partial_path(out, provenance.fingerprint)
    for partial in partials_of(out):
        if not resume:
            durable.remove(durable.set_aside(partial))  # a worker still at it finds it gone, not half gone
        elif partial != mine:
            _, head, _ = read_head(partial)
            difference = provenance.difference(head)
            raise StoreExists(
                f"an unfinished fit with other settings is here ({difference})",
                file=partial,
                hint="finish that one, choose another output, or start over with --no-resume",
            )
    try:
        if not mine.exists():
            _create(mine, frame, provenance, make_modes())
            if out.exists():  # ended by another process while this one sampled: nobody would need ours
                durable.remove(durable.set_aside(mine))
                return same_or_refuse(out, provenance)
        if refine is not None:
            settle(mine, refine)
        return StoredWriter(out, mine, frame)
    except CmdgpuError:
        if not out.exists():
            raise
        return same_or_refuse(out, provenance)  # another process ended this fit just now


def same_or_refuse(out: Place, provenance: Provenance) -> Result:
    """The result at ``out`` if it is the one that is asked for. Raises StoreExists."""
    try:
        _, head, _ = read_head(out)
    except CmdgpuError as error:
        raise StoreExists("something else is here", file=out, hint="choose another output") from error
    if head["fingerprint"] == provenance.fingerprint:
        return open_result(out)
    difference = provenance.difference(head)
    raise StoreExists(
        f"a fit with other settings is here ({difference})", file=out, hint="choose another output"
    )


def _create(path: Path, frame: Frame, provenance: Provenance, modes: ModeSet) -> None:
    durable.make_directory(path.parent)
    building = path.parent / durable.partial_name(path.name)
    try:
        durable.make_directory(building)
        for name, document in mode_documents(modes).items():
            values = np.ascontiguousarray(getattr(modes, name))
            _create_array(building / name, document)
            if values.size:
                file = fmt.chunk_name(*[0] * values.ndim)
                durable.write_file(building / name, file, [durable.bytes_of(values), crc32c(values)])
        for name, document in unit_documents(frame, modes.n_modes).items():
            _create_array(building / name, document)
        durable.write_file(building, fmt.DOCUMENT, [fmt.encode(first_head(frame, provenance, modes))])
        for directory in (*(p for p in durable.entries(building) if p.is_dir()), building):
            durable.flush_directory(directory)
        try:
            durable.publish_directory(building, path)
        except StoreExists:
            if not path.exists():
                raise
        durable.flush_directory(path.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def first_head(frame: Frame, provenance: Provenance, modes: ModeSet) -> fmt.Json:
    """The group document of a fit that begins."""
    digests = modes.digests()
    head = fmt.own(
        "result",
        status="incomplete",
        fingerprint=provenance.fingerprint,
        digests=digests,
        units={"rows": frame.rows, "count": frame.n_units},
        steps=frame.steps.tolist(),
        layout=frame.map.to_json(),
        **provenance.to_json(),
        **(unsettled(digests) if provenance.config.get("refine") else {}),
    )
    return fmt.group_document({"cmdgpu": head})


def _create_array(directory: Path, document: fmt.Json) -> None:
    durable.make_directory(directory)
    durable.write_file(directory, fmt.DOCUMENT, [fmt.encode(document)])


class StoredWriter:
    """Units into ``<out>.<fingerprint>.partial``; ``finish`` gives it its name.

    Several processes may be at one fit: they write the same bytes. The first to finish sweeps up and renames;
    the others find their files gone and take its result for theirs.
    """

    cached_below = 64 << 20
    """Bytes of a result whose rows may stay in the page cache: a larger one would push the trajectory out."""
    in_flight = 3
    """Chunk files at once: an fsync waits for the device, not for a core."""
    keeps_sample = False
    """Whether the sample is held in memory: many fits share a pass, and only the references are for it."""

    def __init__(self, out: Place, partial: Place, frame: Frame | None = None) -> None:
        """``frame`` is the one that was begun here, and is read where it is not at hand."""
        _, head, said = read_head(partial)
        self.frame = frame = frame or said
        self._is_small = result_bytes(frame.n_rows, 0, 0) < self.cached_below
        self.modes = read_modes(partial, head, frame.n_rows, keeps_sample=self.keeps_sample)
        self.out = out
        self.partial = partial
        self._ledger = Ledger(partial, frame, self.modes.n_modes, head["fingerprint"], plan_digest(head))
        self.head: Mapping[str, Any] = {**head, "layout": None}
        """What was said of the fit when it was begun: source, config, code, steps. The layout is ``frame``'s:
        as objects of JSON, 20,000 tensors of every fit that shares a pass would be 19 MB more."""

    @staticmethod
    def join(out: Path, partial: Path) -> StoredWriter | None:
        """The writer of a fit that another process began; None when it has ended there meanwhile."""
        try:
            return StoredWriter(out, partial)
        except CmdgpuError:
            if out.exists() and partial_path(out, read_head(out)[1]["fingerprint"]) == partial:
                return None
            raise

    def n_begun(self) -> int:
        """Units whose record is there, sound or not, whoever wrote it; all once others have ended the fit."""
        return n_begun(self.partial) if self.partial.exists() else len(self.frame.live_units)

    def is_done(self, unit: int) -> bool:
        """A unit counts when its record is whole and every chunk is, byte for byte, what it vouches for."""
        if not self._ledger.is_begun(unit):
            return False
        try:
            for (name, part), kept in zip(self._ledger.chunks(unit), self._ledger.crcs(unit), strict=True):
                self._ledger.read(name, unit, kept, part)
        except StoreCorrupt:
            return False  # torn by a crash: the unit is computed again, to the same bytes
        return True

    def write(self, unit: int, rows: UnitRows, statistics: UnitStatistics) -> None:
        histogram = self._ledger.empty("unit_hist")
        histogram[0, : len(statistics.histogram)] = statistics.histogram

        def values_of(name: str, part: int) -> AnyArray:
            if name == SEGMENTS:
                return self._ledger.part_of(statistics.segments, part)
            return histogram if name == "unit_hist" else self._filled(name, getattr(rows, name))

        def put(chunk: Chunk) -> bytes:
            file, values = self._ledger.file(chunk[0], unit, chunk[1]), values_of(*chunk)
            crc = crc32c(values)
            durable.write_file(file.parent, file.name, [durable.bytes_of(values), crc], cached=self._is_small)
            return crc

        try:
            with ThreadPoolExecutor(self.in_flight, thread_name_prefix="cmdgpu-result") as pool:
                crcs = list(pool.map(put, self._ledger.chunks(unit)))
            # after all renames: a journal takes them in one commit, which the first flush waits for
            for name in UNIT_ARRAYS:
                durable.flush_directory(self.partial / name)
            self._tick_off(unit, crcs)
        except WriteFailed as error:
            # swept up by who finished this fit: the unit was done already; any other failure is ours
            if not _vanished(error) or not (self.is_done(unit) or self._ended_elsewhere()):
                raise

    def _filled(self, name: str, values: AnyArray) -> AnyArray:
        """The rows as a whole chunk: a last unit is filled up, the others are one already."""
        if values.dtype == fmt.RESULT_ROWS[name][0] and len(values) == self.frame.rows:
            return np.ascontiguousarray(values)
        chunk = self._ledger.empty(name)
        chunk[: len(values)] = values
        return chunk

    def _tick_off(self, unit: int, crcs: list[bytes]) -> None:
        """Only after the data are durable: done before data would acknowledge nothing."""
        record = self._ledger.record(unit, crcs)
        directory = self.partial / DONE
        durable.write_file(directory, fmt.chunk_name(unit, 0), [record.tobytes(), crc32c(record)])
        durable.flush_directory(directory)

    def finish(self) -> Result:
        """Check every record, merge the statistics in unit order, mark complete, rename.

        ``out`` never exists incomplete. Raises StoreCorrupt naming the unit whose chunks are not the ones
        that were fitted.
        """
        partial, out = self.partial, self.out
        assert isinstance(partial, Path) and isinstance(out, Path)
        try:
            head, totals = self._mark_complete()
        except (CmdgpuError, OSError):
            if not self._ended_elsewhere():
                raise
            return open_result(out)
        try:
            durable.publish_directory(partial, out)
        except (StoreExists, WriteFailed) as error:
            if not (isinstance(error, StoreExists) or _vanished(error)) or not self._is_mine(out):
                raise
            shutil.rmtree(partial, ignore_errors=True)
        durable.make_name_last(out)
        _sweep(out)  # what others began meanwhile
        durable.remove_partials(out)
        return self._result_at(out, head, totals)

    def _result_at(self, path: Place, head: Mapping[str, Any], totals: Totals) -> Result:
        """The result that was just completed: what was merged for it is not read again."""
        n_modes = self.modes.n_modes
        ledger = Ledger(path, self.frame, n_modes, head["fingerprint"], plan_digest(head), keeps=True)
        sample = StoredSample(path / "sample", self.modes.sample.shape, head["digests"]["sample"])
        self.modes = dataclasses.replace(self.modes, sample=sample)  # what was kept of it may go
        return result_of(ledger, self.modes, head, totals)

    def _is_mine(self, path: Place) -> bool:
        """Whether the result of this very fit lies there."""
        try:
            _, head, _ = read_head(path)
        except CmdgpuError:
            return False
        return head["fingerprint"] == self.head["fingerprint"]

    def _ended_elsewhere(self) -> bool:
        return not self.partial.exists() and self._is_mine(self.out)

    def _mark_complete(self) -> tuple[Mapping[str, Any], Totals]:
        """What the head says now, and the statistics of all units."""
        totals = self._ledger.totals(self.modes.n_modes)
        head = {**self.head, "layout": self.frame.map.to_json()}
        head["status"] = "complete"
        head["metrics"] = _finite(summarise(totals, self.frame.map, len(self.frame.steps)))
        if isinstance(self.partial, Path):
            _sweep(self.partial)
        durable.write_file(self.partial, fmt.DOCUMENT, [fmt.encode(fmt.group_document({"cmdgpu": head}))])
        durable.flush_directory(self.partial)
        return head, totals


def _sweep(path: Path) -> None:
    """Delete what killed and late workers left in the arrays of a result."""
    for directory in (p for p in durable.entries(path) if p.is_dir()):
        durable.remove_partials(directory)


def _vanished(error: WriteFailed) -> bool:
    return isinstance(error.__cause__, FileNotFoundError)


def _finite(value: Any) -> Any:
    """NaN has no place in strict JSON."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in cast(dict[str, Any], value).items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in cast(list[Any], value)]
    return None if isinstance(value, float) and not np.isfinite(value) else value
