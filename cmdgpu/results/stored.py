"""A result on disk, written: begun under a name of its own, filled unit by unit, named when complete."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, cast

import numpy as np

from cmdgpu.errors import CmdgpuError, StoreCorrupt, StoreExists, WriteFailed
from cmdgpu.notation import AnyArray
from cmdgpu.results.contract import Frame, ModeSet, Provenance, Result, UnitRows
from cmdgpu.results.head import read_head
from cmdgpu.results.ledger import DONE, UNIT_ARRAYS, Ledger, plan_digest, unit_documents
from cmdgpu.results.modes import MODE_ARRAYS, read_modes
from cmdgpu.results.opened import open_result, partial_path, partials_of
from cmdgpu.statistics import UnitStatistics, summarise
from cmdgpu.store import durable
from cmdgpu.store import format as fmt
from cmdgpu.store.chunks import crc32c

_WRITERS: Final = 3
"""Chunk files in flight: an fsync waits for the device, not for a core."""


def begin_result(
    out: Path, frame: Frame, provenance: Provenance, make_modes: Callable[[], ModeSet], *, resume: bool
) -> StoredWriter | Result:
    """The writer of a fit that is to end up at ``out``; the result itself when it is there already.

    ``make_modes`` (sample and cluster) is called only when no unfinished fit of this fingerprint is found:
    its references are then taken from disk, since a second clustering could split a near-tie differently.
    Raises StoreExists, naming the setting that differs, for another fit at ``out`` or unfinished beside it;
    ``resume=False`` throws unfinished ones away, never a finished one.
    """
    if out.exists() or out.is_symlink():
        return _same_or_refuse(out, provenance)
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
                return _same_or_refuse(out, provenance)
        return StoredWriter(out, mine, frame, provenance)
    except CmdgpuError:
        if not out.exists():
            raise
        return _same_or_refuse(out, provenance)  # another process ended this fit just now


def _same_or_refuse(out: Path, provenance: Provenance) -> Result:
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
        for name, (kind, dims) in MODE_ARRAYS.items():
            values = np.ascontiguousarray(getattr(modes, name))
            chunks = tuple(max(size, 1) for size in values.shape)
            attributes = {"cmdgpu": fmt.own("result-array")}
            document = fmt.array_document(values.shape, chunks, kind, dims, 0, attributes)
            _create_array(building / name, document)
            if values.size:
                file = fmt.chunk_name(*[0] * values.ndim)
                durable.write_file(building / name, file, [durable.bytes_of(values), crc32c(values)])
        for name, document in unit_documents(frame, modes.n_modes).items():
            _create_array(building / name, document)
        head = fmt.own(
            "result",
            status="incomplete",
            fingerprint=provenance.fingerprint,
            digests=modes.digests(),
            units={"rows": frame.rows, "count": frame.n_units},
            steps=frame.steps.tolist(),
            layout=frame.map.to_json(),
            **provenance.to_json(),
        )
        durable.write_file(building, fmt.DOCUMENT, [fmt.encode(fmt.group_document({"cmdgpu": head}))])
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


def _create_array(directory: Path, document: fmt.Json) -> None:
    durable.make_directory(directory)
    durable.write_file(directory, fmt.DOCUMENT, [fmt.encode(document)])


class StoredWriter:
    """Units into ``<out>.<fingerprint>.partial``; ``finish`` gives it its name.

    Several processes may be at one fit: they write the same bytes. The first to finish sweeps up and renames;
    the others find their files gone and take its result for theirs.
    """

    def __init__(self, out: Path, partial: Path, frame: Frame, provenance: Provenance) -> None:
        document, head, _ = read_head(partial)
        self.modes = read_modes(partial, head, frame.n_rows)
        self._out = out
        self._partial = partial
        self._frame = frame
        self._ledger = Ledger(partial, frame, self.modes.n_modes, head["fingerprint"], plan_digest(head))
        self._document = document

    def is_done(self, unit: int) -> bool:
        """A unit counts when its record is whole and every chunk is, byte for byte, what it vouches for."""
        if not self._ledger.is_begun(unit):
            return False
        try:
            for name, kept in zip(UNIT_ARRAYS, self._ledger.crcs(unit), strict=True):
                self._ledger.read(name, unit, kept)
        except StoreCorrupt:
            return False  # torn by a crash: the unit is computed again, to the same bytes
        return True

    def write(self, unit: int, rows: UnitRows, statistics: UnitStatistics) -> None:
        chunks = {name: self._filled(name, getattr(rows, name)) for name in fmt.RESULT_ROWS}
        chunks |= {name: self._ledger.empty(name) for name in ("segment_stats", "unit_hist")}
        chunks["segment_stats"][0, : len(statistics.segments)] = statistics.segments
        chunks["unit_hist"][0, : len(statistics.histogram)] = statistics.histogram

        def put(name: str) -> bytes:
            file, crc = self._ledger.file(name, unit), crc32c(chunks[name])
            durable.write_file(file.parent, file.name, [durable.bytes_of(chunks[name]), crc])
            durable.flush_directory(file.parent)
            return crc

        try:
            with ThreadPoolExecutor(_WRITERS, thread_name_prefix="cmdgpu-result") as pool:
                crcs = list(pool.map(put, UNIT_ARRAYS))
            self._tick_off(unit, crcs)
        except WriteFailed as error:
            # swept up by who finished this fit: the unit was done already; any other failure is ours
            if not _vanished(error) or not (self.is_done(unit) or self._ended_elsewhere()):
                raise

    def _filled(self, name: str, values: AnyArray) -> AnyArray:
        """The rows as a whole chunk: a last unit is filled up, the others are one already."""
        if values.dtype == fmt.RESULT_ROWS[name][0] and len(values) == self._frame.rows:
            return np.ascontiguousarray(values)
        chunk = self._ledger.empty(name)
        chunk[: len(values)] = values
        return chunk

    def _tick_off(self, unit: int, crcs: list[bytes]) -> None:
        """Only after the data are durable: done before data would acknowledge nothing."""
        record = self._ledger.record(unit, crcs)
        directory = self._partial / DONE
        durable.write_file(directory, fmt.chunk_name(unit, 0), [record.tobytes(), crc32c(record)])
        durable.flush_directory(directory)

    def finish(self) -> Result:
        """Check every record, merge the statistics in unit order, mark complete, rename.

        ``out`` never exists incomplete. Raises StoreCorrupt naming the unit whose chunks are not the ones
        that were fitted.
        """
        try:
            self._mark_complete()
        except (CmdgpuError, OSError):
            if not self._ended_elsewhere():
                raise
            return open_result(self._out)
        try:
            durable.publish_directory(self._partial, self._out)
        except (StoreExists, WriteFailed) as error:
            if not (isinstance(error, StoreExists) or _vanished(error)) or not self._is_mine(self._out):
                raise
            shutil.rmtree(self._partial, ignore_errors=True)
        durable.make_name_last(self._out)
        _sweep(self._out)  # what others began meanwhile
        durable.remove_partials(self._out)
        return open_result(self._out)

    def _is_mine(self, path: Path) -> bool:
        """Whether the result of this very fit lies there."""
        try:
            _, head, _ = read_head(path)
        except CmdgpuError:
            return False
        return head["fingerprint"] == self._document["attributes"]["cmdgpu"]["fingerprint"]

    def _ended_elsewhere(self) -> bool:
        return not self._partial.exists() and self._is_mine(self._out)

    def _mark_complete(self) -> None:
        totals = self._ledger.totals(self.modes.n_modes)
        head = self._document["attributes"]["cmdgpu"]
        head["status"] = "complete"
        head["metrics"] = _finite(summarise(totals, self._frame.map, len(self._frame.steps)))
        _sweep(self._partial)
        durable.write_file(self._partial, fmt.DOCUMENT, [fmt.encode(fmt.seal(self._document))])
        durable.flush_directory(self._partial)


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
