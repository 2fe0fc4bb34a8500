"""The streamed import: one checkpoint after the other becomes a column, a few chunks of rows at a time.

While the chunks of one checkpoint are read and written, its files are hashed beside it, the next one is
opened, and its hash begins. A snapshot is committed when all its chunks are down and every file that it was
read from turned out to be whole; a kill leaves the snapshots before it.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from cmdgpu.errors import CheckpointError, CmdgpuWarning, StoreFenced, WriteFailed, printable
from cmdgpu.importing.elements import numpy_type
from cmdgpu.importing.hashing import Digests, Hasher, require_unchanged
from cmdgpu.importing.headers import opened
from cmdgpu.importing.planning import CONVERT_ELEMENTS, ImportPlan, PlannedCheckpoint, hashers, widest
from cmdgpu.memory import show_bytes
from cmdgpu.notation import I64, AnyArray, BoolArray
from cmdgpu.progress import Progress, Silent
from cmdgpu.sampling import candidate_rows
from cmdgpu.store import durable
from cmdgpu.store import format as fmt
from cmdgpu.store.journal import Journal
from cmdgpu.store.parameter_map import TensorEntry
from cmdgpu.store.provenance import Origin
from cmdgpu.store.view import StoreView


@dataclass(frozen=True)
class ImportReport:
    """What an import did."""

    plan: ImportPlan
    n_added: int
    n_snapshots: int
    """Of the store, now."""
    bytes_read: int
    """Of sources, those that were only checked included."""
    bytes_written: int
    seconds: float


def carry_out(plan: ImportPlan, progress: Progress | None = None) -> ImportReport:
    """Import what the plan says and the store does not hold yet.

    Raises CheckpointError naming the file that is damaged, has changed or is not the one imported before,
    StoreLocked, StoreFenced, WriteFailed. The snapshots that are committed by then stay, and the same call
    goes on after them.
    """
    progress, started = progress or Silent(), time.perf_counter()
    _warn_of_rounding(plan)
    _check_committed(plan, progress)
    view = _write_missing(plan, progress)
    return ImportReport(
        plan,
        n_added=len(plan.missing),
        n_snapshots=len(view.steps),
        bytes_read=plan.source_bytes,
        bytes_written=view.stored_bytes * len(plan.missing) // max(len(view.steps), 1),
        seconds=time.perf_counter() - started,
    )


def _warn_of_rounding(plan: ImportPlan) -> None:
    if plan.rounded:
        entry = plan.map[plan.rounded[0]]
        more = f" and {len(plan.rounded) - 1} more are" if len(plan.rounded) > 1 else " is"
        warnings.warn(
            f"'{printable(entry.name)}' ({entry.dtype}){more} rounded to {plan.dtype}",
            CmdgpuWarning,
            stacklevel=4,
        )
    if plan.mixtures:
        name, types = plan.mixtures[0]
        more = f" ({len(plan.mixtures)} tensors are so)" if len(plan.mixtures) > 1 else ""
        warnings.warn(
            f"'{printable(name)}' is {' and '.join(types)} over time{more}; it is kept as "
            f"{plan.map[name].dtype}, and stored in {plan.dtype}",
            CmdgpuWarning,
            stacklevel=4,
        )


def _check_committed(plan: ImportPlan, progress: Progress) -> None:
    """The checkpoints that the store already holds must be, byte for byte, those it was made from.

    Raises CheckpointError naming the file that is another one, or the rules that are.
    """
    if not plan.n_committed:
        return
    assert plan.existing is not None
    committed = dict(zip(plan.existing.steps.tolist(), plan.existing.sources, strict=True))
    done = plan.checkpoints[: plan.n_committed]
    for planned in done:
        _require_same_origin(planned, committed[planned.step], None)
    under_way: deque[tuple[PlannedCheckpoint, Digests]] = deque()

    def compare_first() -> None:
        planned, digests = under_way.popleft()
        _require_same_origin(planned, committed[planned.step], digests.origin())
        progress.advance(planned.n_bytes)

    progress.begin("check", sum(planned.n_bytes for planned in done))
    try:
        with Hasher() as hasher:
            hasher.has_read(sys.maxsize)  # nobody reads tensors behind it
            for planned in done:
                under_way.append((planned, _announce(planned, hasher)))
                if len(under_way) > hashers():  # each holds the checksums of all its tensors
                    compare_first()
            while under_way:
                compare_first()
    finally:
        progress.end()


def _announce(planned: PlannedCheckpoint, hasher: Hasher) -> Digests:
    with opened(planned.opener, planned.path) as checkpoint:
        return hasher.announce(planned, checkpoint)


def _write_missing(plan: ImportPlan, progress: Progress) -> StoreView:
    """Append every checkpoint that the store does not hold; the store is made where it is not there."""
    missing, out = plan.missing, plan.out
    if not missing:
        assert plan.existing is not None
        return plan.existing
    durable.make_directory(out.parent)
    if not plan.compressed and (free := shutil.disk_usage(out.parent).free) < plan.stored_bytes:
        raise WriteFailed(
            f"{show_bytes(plan.stored_bytes)} are to be written, {show_bytes(free)} are free",
            file=out,
            hint="free some space, or choose another path",
        )
    journal = _open_journal(plan)
    progress.begin("import", sum(planned.n_bytes for planned in missing))
    try:
        _append_all(plan, missing, journal, progress)
        return journal.view
    finally:
        progress.end()
        journal.close()


def _open_journal(plan: ImportPlan) -> Journal:
    if plan.existing is None:
        return Journal.create(
            plan.out,
            plan.map,
            dtype=plan.dtype,
            rows=plan.rows,
            unit=plan.unit,
            sketch_rows=candidate_rows(plan.map),
            compressed=plan.compressed,
        )
    journal = Journal.open(plan.out)
    if journal.view.raw != plan.existing.raw:
        journal.close()
        raise StoreFenced(
            "has changed since it was looked at", file=plan.out, hint="run the same command again"
        )
    return journal


def _append_all(
    plan: ImportPlan, missing: Sequence[PlannedCheckpoint], journal: Journal, progress: Progress
) -> None:
    overflowed: set[str] = set()
    with ThreadPoolExecutor(1, thread_name_prefix="cmdgpu-open") as opener, Hasher() as hasher:
        opening = deque([opener.submit(_Stage, missing[0], hasher, journal.view, progress)])
        try:
            for planned, following in zip(missing, [*missing[1:], None], strict=True):
                stage = opening.popleft().result()
                try:
                    if following is not None:
                        opening.append(opener.submit(_Stage, following, hasher, journal.view, progress))
                    journal.append_column(stage, planned.step, {}, plan.writers)
                finally:
                    stage.close()
                _warn_of_overflow(stage, planned, plan.dtype, overflowed)
        finally:
            for unwanted in opening:
                _close(unwanted)


def _close(unwanted: Future[_Stage]) -> None:
    """What was opened ahead, after an error; why it could perhaps not be opened is no news then."""
    if not unwanted.cancel() and unwanted.exception() is None:
        unwanted.result().close()


def _warn_of_overflow(stage: _Stage, planned: PlannedCheckpoint, dtype: str, met: set[str]) -> None:
    for name, count in stage.overflowed.items():
        if name not in met:
            met.add(name)
            warnings.warn(
                f"{planned.path}: '{printable(name)}' holds {count} values beyond {dtype}; they are stored "
                "as infinite",
                CmdgpuWarning,
                stacklevel=5,
            )


# ---- one checkpoint on its way into the store -----------------------------------------------------------


class _Stage:
    """A checkpoint as a Column: what is asked for is read; nothing of it is kept but the candidates."""

    def __init__(
        self, planned: PlannedCheckpoint, hasher: Hasher, view: StoreView, progress: Progress
    ) -> None:
        for file in planned.files:
            require_unchanged(file)
        self._planned = planned
        self._checkpoint = planned.opener.open(planned.path)
        try:
            self._digests: Digests = hasher.announce(planned, self._checkpoint)
        except BaseException:
            self._checkpoint.close()
            raise
        self._view = view
        self._progress = progress
        self._own = threading.local()
        self._lock = threading.Lock()
        self._chunks_read = self._bytes_told = 0
        self._sketch: AnyArray | None = None
        if view.sketch_rows is not None:
            self._sketch = np.empty(len(view.sketch_rows), dtype=view.storage.numpy)
        self.overflowed: Counter[str] = Counter()
        """Values of a tensor that became infinite by rounding."""

    def close(self) -> None:
        self._checkpoint.close()

    # ---- as a Column --------------------------------------------------------------------------------

    def chunk(self, i: int) -> AnyArray:
        view = self._view
        if not hasattr(self._own, "chunk"):
            self._own.chunk = np.empty(view.rows, dtype=view.storage.numpy)
        out = cast(AnyArray, self._own.chunk)
        first = i * view.rows
        last = min(first + view.rows, view.map.n_rows)
        for segment in view.map.segments(first, last):
            entry = view.map.tensors[segment.tensor]
            place = out[segment.start - first : segment.stop - first]
            self._read(entry, segment.start - entry.pieces[0].row, place)
        out[last - first :] = view.storage.fill
        self._keep_candidates(out, first, last)
        self._count()
        return out

    def sketch(self) -> AnyArray | None:
        return self._sketch

    def source(self) -> Origin:
        return self._digests.origin()

    # ---- how ----------------------------------------------------------------------------------------

    def _read(self, entry: TensorEntry, start: int, out: AnyArray) -> None:
        """Elements of a tensor from ``start`` on, in the store's type."""
        named, dtype = self._planned.named, self._view.dtype
        source = named.source_of(entry.name, self._view.map.aliases)
        assert source is not None
        held = self._checkpoint.tensors[source].dtype
        if held == dtype:
            self._checkpoint.read(source, start, start + len(out), out)
            return
        piece = self._piece(held)
        for at in range(0, len(out), CONVERT_ELEMENTS):
            place = out[at : at + CONVERT_ELEMENTS]
            raw = piece[: len(place)]
            self._checkpoint.read(source, start + at, start + at + len(place), raw)
            self._round(entry.name, fmt.widen(raw, held), place, exact=widest([held, dtype]) == dtype)

    def _piece(self, dtype: str) -> AnyArray:
        pieces = cast(dict[str, AnyArray] | None, getattr(self._own, "pieces", None))
        if pieces is None:
            pieces = self._own.pieces = dict[str, AnyArray]()
        if dtype not in pieces:
            pieces[dtype] = np.empty(CONVERT_ELEMENTS, dtype=numpy_type(dtype))
        return pieces[dtype]

    def _round(self, name: str, numbers: AnyArray, out: AnyArray, *, exact: bool) -> None:
        with np.errstate(over="ignore"):
            out[:] = fmt.narrow(numbers, self._view.dtype)
        if exact:
            return
        lost: BoolArray = np.isinf(fmt.widen(out, self._view.dtype)) & np.isfinite(numbers)
        if count := int(np.count_nonzero(lost)):
            with self._lock:
                self.overflowed[name] += count

    def _keep_candidates(self, chunk: AnyArray, first: int, last: int) -> None:
        if self._sketch is None:
            return
        rows = cast(I64, self._view.sketch_rows)
        low, high = np.searchsorted(rows, (first, last))
        self._sketch[low:high] = chunk[rows[low:high] - first]

    def _count(self) -> None:
        """Progress is counted in bytes of the files, as the tensors that are taken go by."""
        with self._lock:
            self._chunks_read += 1
            share = self._chunks_read / self._view.n_chunks
            told = int(share * self._planned.n_bytes)
            self._progress.advance(told - self._bytes_told)
            self._bytes_told = told
        self._digests.has_read(share)


# ---- recognising what was imported before ---------------------------------------------------------------


def _require_same_origin(planned: PlannedCheckpoint, kept: Origin | None, found: Origin | None) -> None:
    """Raise CheckpointError for a checkpoint that is not what its snapshot was imported from.

    Without ``found`` only names and sizes are looked at, which costs nothing.
    """

    def refuse(what: str, hint: str, file: Path) -> CheckpointError:
        return CheckpointError(what, file=file, step=planned.step, hint=hint)

    another = "leave it out, or import into another path"
    if kept is None:
        raise refuse("is recorded in the store, and was not imported", another, planned.path)
    if kept.names != planned.named.digest:
        raise refuse(
            "was imported under other rules: another prefix, include, exclude or key map",
            "give the same rules, or import into another path",
            planned.path,
        )
    sizes = [(file.size, "") for file in planned.files]
    contents = sizes if found is None else [(file.size, file.sha256) for file in found.files]
    known = Counter((file.size, "" if found is None else file.sha256) for file in kept.files)
    for file, content in zip(planned.files, contents, strict=True):
        if not known[content]:
            raise refuse("is not the file that was imported: it has changed", another, file.path)
        known[content] -= 1
    if known.total():
        raise refuse(f"was imported from {len(kept.files)} files", another, planned.path)
