"""Repair: back to the last whole snapshot, and what can be had from whole files written again.

Two steps, so that a person sees what will be lost before it is: ``plan_repair`` reads everything and changes
nothing, ``Repair.carry_out`` does what the plan says. A damaged snapshot *before* a whole one is left where
it is: going back would cost the whole ones after it, and all others stay usable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cmdgpu.errors import NotAStore, StepNotFound, StoreCorrupt, StoreFenced, UsageError
from cmdgpu.notation import F64, I64, AnyArray
from cmdgpu.progress import Progress, Silent
from cmdgpu.sampling import candidate_rows
from cmdgpu.store import durable, small
from cmdgpu.store import format as fmt
from cmdgpu.store.chunks import ChunkDamage, crc32c, read_chunk, stored_crc, write_chunk
from cmdgpu.store.commit import Commit, own_directory, read_commit
from cmdgpu.store.journal import Journal, nearest_steps
from cmdgpu.store.verification import Columns, Damage, Verification, read_commit_and_edge
from cmdgpu.store.view import StoreView


@dataclass(frozen=True)
class Repair:
    """What a repair will do. Nothing has been done yet."""

    path: Path
    keep: int
    """The last step that stays."""
    n_kept: int
    dropped: tuple[int, ...]
    """Steps that go: they are damaged, or lie beyond what was asked for."""
    lost: tuple[str, ...]
    """Scalars that go, damaged beyond what their digest can vouch for."""
    left: tuple[Damage, ...]
    """Damage in snapshots before a whole one: it stays, and reading those snapshots stays an error."""
    rewritten: tuple[str, ...]
    """Arrays written again from what is whole: nothing of them is lost."""
    _commit: Commit = field(repr=False)
    _series: Mapping[str, F64] = field(repr=False)
    _sketch_rows: I64 | None = field(repr=False)
    _sketches: tuple[int, ...] = field(repr=False)

    @property
    def is_needed(self) -> bool:
        return bool(self.dropped or self.lost or self.rewritten)

    def carry_out(self) -> None:
        """Do it, one snapshot at a time: a kill in between leaves a store that can be repaired again.

        Raises StoreLocked while a recorder is at work, StoreFenced when one was since the plan was made.
        """
        lock = Journal.lock(self.path)
        try:
            if read_commit(self.path).raw != self._commit.raw:
                raise StoreFenced("has changed since it was looked at", file=self.path, hint="repair again")
            self._write_again()
            journal = Journal(StoreView.open(self.path, without=self.lost), lock)
            if self.lost:
                journal.forget_scalars(self.lost)
            journal.clean_up()
            journal.rewind(self.keep)
        finally:
            lock.release()

    def _write_again(self) -> None:
        commit, path = self._commit, self.path
        if fmt.STEP in self.rewritten:
            small.write_series(_directory_of_ours(path / fmt.STEP), fmt.STEP, commit.steps, 0)
        for name, values in self._series.items():
            small.write_document(path / name, small.small_document(name, len(values)))
        if self._sketch_rows is None:
            return
        if fmt.SKETCH_ROW in self.rewritten:
            small.write_sketch_rows(_directory_of_ours(path / fmt.SKETCH_ROW), self._sketch_rows)
        for t in self._sketches:
            values = _sketch_from_weights(commit, self._sketch_rows, t)
            write_chunk(path / fmt.SKETCH, commit.sketch_path(t).name, values, commit.zstd_level)
        if fmt.SKETCH in self.rewritten:
            document = small.sketch_document(
                len(self._sketch_rows), len(commit.steps), commit.storage, commit.zstd_level
            )
            small.write_document(path / fmt.SKETCH, document)


def plan_repair(path: Path, to: int | None = None, progress: Progress | None = None) -> Repair:
    """Read a whole trajectory and say what going back to its last whole snapshot, at ``to`` at most, will do.

    Raises NotAStore for what is no trajectory; StoreCorrupt where nothing can be gone back to: without
    the documents of the group and of ``weights``, with chunks of a newer commit than the one that is there,
    or without a single whole snapshot; StepNotFound for a ``to`` that was not recorded.
    """
    commit, beyond = read_commit_and_edge(path)
    if not len(commit.steps):
        raise UsageError("holds no snapshot yet", file=path, hint="there is nothing to go back to")
    if beyond:
        hint = f"restore the newest {fmt.WEIGHTS}/{fmt.DOCUMENT}"
        raise StoreCorrupt(beyond[0].problem, file=beyond[0].file, hint=hint)
    if to is not None and to not in commit.steps:
        hint = f"nearest recorded: {nearest_steps(commit.steps, to)}"
        raise StepNotFound("is not recorded", file=path, step=to, hint=hint)
    rewritten: list[str] = []
    lost: list[str] = []
    series: dict[str, F64] = {}
    if not _is_sound(small.read_steps, commit):
        rewritten.append(fmt.STEP)
    for name in commit.scalar_names:
        if _is_sound(small.read_scalar, commit, name):
            continue
        values = _scalar_without_document(commit, name)
        if values is None:
            lost.append(name)
        else:
            series[name] = values
            rewritten.append(name)
    sketch_rows = None
    if commit.has_sketch:
        own_directory(path, fmt.SKETCH)
        sketch_rows = _sketch_rows(commit, rewritten)
        if not _is_sound(small.check_sketch, commit, len(sketch_rows)):
            rewritten.append(fmt.SKETCH)
    damaged, sketches = _look_at_snapshots(commit, sketch_rows, progress or Silent())
    if sketches and fmt.SKETCH not in rewritten:
        rewritten.append(fmt.SKETCH)
    last = len(commit.steps) - 1 if to is None else int(np.flatnonzero(commit.steps == to)[0])
    while last >= 0 and last in damaged:
        last -= 1
    if last < 0:
        raise StoreCorrupt("has no whole snapshot to go back to", file=path, hint="record again")
    return Repair(
        path=path,
        keep=int(commit.steps[last]),
        n_kept=last + 1,
        dropped=tuple(commit.steps[last + 1 :].tolist()),
        lost=tuple(lost),
        left=tuple(damage for t, found in damaged.items() if t < last for damage in found),
        rewritten=tuple(rewritten),
        _commit=commit,
        _series=series,
        _sketch_rows=sketch_rows,
        _sketches=tuple(sketches),
    )


def _directory_of_ours(path: Path) -> Path:
    """Where an array is written again: never through a symbolic link that somebody put there."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        durable.remove(path)
    durable.make_directory(path)
    return path


# ---- what can be had from whole files -------------------------------------------------------------------


def _is_sound(check: Callable[..., object], *arguments: object) -> bool:
    try:
        check(*arguments)
    except (StoreCorrupt, NotAStore):
        return False
    return True


def _scalar_without_document(commit: Commit, name: str) -> F64 | None:
    """The committed values of a scalar whose ``zarr.json`` is damaged, or None when its chunks are too."""
    length = len(commit.steps)
    if (commit.path / name).is_symlink():
        return None
    chunk = np.empty(fmt.SMALL_CHUNK, dtype="<f8")
    parts: list[F64] = [np.empty(0, dtype="<f8")]
    for i in range(-(-length // fmt.SMALL_CHUNK)):
        try:
            read_chunk(commit.path / name / fmt.chunk_name(i), chunk)
        except ChunkDamage:
            return None
        parts.append(chunk.copy())
    values = np.concatenate(parts)[:length]
    return values if small.digest(values) == commit.small[name] else None


def _sketch_rows(commit: Commit, rewritten: list[str]) -> I64:
    """The rows of the sketch: read, or drawn again, since they follow from the map alone."""
    try:
        return small.read_sketch_rows(commit)
    except (StoreCorrupt, NotAStore) as error:
        drawn = candidate_rows(commit.map)
        if small.digest(drawn) != commit.small[fmt.SKETCH_ROW]:
            raise StoreCorrupt(
                f"cannot be had again: {error.message}", file=commit.path / fmt.SKETCH_ROW
            ) from error
        rewritten.append(fmt.SKETCH_ROW)
        return drawn


def _look_at_snapshots(
    commit: Commit, sketch_rows: I64 | None, progress: Progress
) -> tuple[dict[int, list[Damage]], list[int]]:
    """The snapshots that are damaged, and those of which only the sketch is."""
    damaged: dict[int, list[Damage]] = {}
    sketches: list[int] = []
    for t, found in Columns(commit, sketch_rows).verify(Verification(), quick=False, progress=progress):
        if found and sketch_rows is not None and _is_whole_without_sketch(commit, sketch_rows, t):
            sketches.append(t)
        elif found:
            damaged[t] = found
    return damaged, sketches


def _is_whole_without_sketch(commit: Commit, sketch_rows: I64, t: int) -> bool:
    """Whether the weights are the committed ones: with the sketch they give, the digest comes out right."""
    n_bytes = commit.rows * commit.storage.numpy.itemsize
    try:
        paths = [commit.chunk_path(i, t) for i in range(commit.n_chunks)]
        crcs = [stored_crc(path, n_bytes, compressed=commit.is_compressed) for path in paths]
        crcs.append(crc32c(_sketch_from_weights(commit, sketch_rows, t), commit.zstd_level))
    except ChunkDamage:
        return False
    return fmt.sha256(*crcs) == commit.digests[t]


def _sketch_from_weights(commit: Commit, sketch_rows: I64, t: int) -> AnyArray:
    """(S,) stored values of the sketch's rows. Every chunk is read, so that all of them are checked."""
    out = np.empty(len(sketch_rows), dtype=commit.storage.numpy)
    chunk = np.empty(commit.rows, dtype=commit.storage.numpy)
    for i in range(commit.n_chunks):
        read_chunk(commit.chunk_path(i, t), chunk, compressed=commit.is_compressed)
        here = sketch_rows // commit.rows == i
        out[here] = chunk[sketch_rows[here] - i * commit.rows]
    return out
