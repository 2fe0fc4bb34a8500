"""A model that lies in shards over the ranks of a job becomes one column, and no parameter is gathered.

Every rank owns a run of whole chunks and writes the boxes it holds there, the lowest one those that several
hold. It flushes its files and their directory, and tells rank 0 their CRCs; rank 0, which holds the store's
lock, commits when every rank has said so. Until then the snapshot lies beyond the visible edge, so that a
rank which fails or dies leaves the snapshots before it as they were.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
from torch import Tensor, nn

from cmdgpu.boxes import Box, is_sharded, local_boxes
from cmdgpu.column import HostColumn, Part
from cmdgpu.errors import DurabilityUnknown, ModelMismatch, RankLost, UnsupportedTensor, UsageError, printable
from cmdgpu.models import named_tensors
from cmdgpu.notation import I64, AnyArray, BoolArray
from cmdgpu.ranks import Ranks
from cmdgpu.store import durable
from cmdgpu.store import format as fmt
from cmdgpu.store.journal import Journal, lock_ranks, write_rows
from cmdgpu.store.parameter_map import ParameterMap, Piece, TensorEntry, tile


@dataclass(frozen=True)
class Held:
    """What one rank says of the model: its map as if it were whole, and the boxes that lie here."""

    model: ParameterMap
    boxes: tuple[tuple[Box, ...], ...]
    """Of every tensor of the map."""


def is_sharded_model(model: nn.Module) -> bool:
    """Whether any of its tensors is a DTensor. What FSDP2 left gathered is cut again by the asking."""
    return any(is_sharded(tensor) for _, _, tensor in named_tensors(model))


def held_here(model: ParameterMap, tensors: Sequence[Tensor]) -> tuple[Held, list[list[Tensor]]]:
    """What this rank holds of a model, and the memory of every box. Raises UnsupportedTensor by name."""
    found = [local_boxes(entry.name, tensor) for entry, tensor in zip(model, tensors, strict=True)]
    boxes = tuple(tuple(local.box for local in of_tensor) for of_tensor in found)
    return Held(model, boxes), [[local.values for local in of_tensor] for of_tensor in found]


@dataclass(frozen=True)
class ShardedLayout:
    map: ParameterMap
    starts: tuple[int, ...]
    """(ranks + 1,) first row that each rank owns; a multiple of the rows of a chunk."""


class _Store(NamedTuple):
    """What rank 0 tells of the store it opened."""

    path: Path
    dtype: str
    rows: int
    zstd_level: int | None
    sketch_rows: I64 | None


class _Written(NamedTuple):
    """What a rank tells of the rows it wrote."""

    crcs: list[bytes]
    sketch: AnyArray | None
    """Values of the candidates among its rows, in their order."""


Begin: TypeAlias = Callable[[Sequence[Held]], Journal]
"""On rank 0: the journal of a model in such shards, made or continued."""
Describe: TypeAlias = Callable[[], tuple[Held, list[list[Tensor]]]]
"""What this rank holds now, and the memory of its boxes."""


def layout(held: Sequence[Held], rows: int) -> ShardedLayout:
    """Which rank writes which box where; the same on every rank.

    Raises ModelMismatch when the ranks hold other tensors, UnsupportedTensor when the boxes of a tensor are
    not the tensor (shards that interleave are told by boxes that overlap).
    """
    model = held[0].model
    for rank, other in enumerate(held):
        _require_same_tensors(model, other.model, rank)
    starts, holes = [0], list[tuple[int, int]]()
    pieces: list[list[Piece]] = [[] for _ in model]
    taken: list[set[Box]] = [set() for _ in model]
    end = 0
    for rank in held:
        row = starts[-1]
        for i, boxes in enumerate(rank.boxes):
            for offset, size in boxes:
                if (offset, size) not in taken[i]:
                    taken[i].add((offset, size))
                    if end < row:  # what the last chunk of the rank before has to spare
                        holes.append((end, row))
                    pieces[i].append(Piece(offset, size, row))
                    end = row = row + math.prod(size)
        starts.append(fmt.round_up(row, rows))
    entries: list[TensorEntry] = []
    for entry, cut in zip(model, pieces, strict=True):
        if not tile(cut, entry.shape):
            raise UnsupportedTensor(
                "its shards overlap, or do not make up the tensor",
                tensor=entry.name,
                hint="leave it out with exclude=, or shard it along its axes",
            )
        entries.append(TensorEntry(entry.name, entry.kind, entry.dtype, entry.shape, tuple(cut)))
    return ShardedLayout(
        ParameterMap(tuple(entries), model.aliases, tuple(holes), model.skipped), tuple(starts)
    )


def default_rows(held: Sequence[Held]) -> int:
    """Rows per chunk: no more than the largest rank has, for every rank fills its last chunk up."""
    starts = layout(held, 1).starts
    largest = max(stop - start for start, stop in itertools.pairwise(starts))
    return min(fmt.default_rows_per_chunk(starts[-1]), fmt.default_rows_per_chunk(largest))


def require_same_layout(store: ParameterMap, model: ParameterMap, path: Path) -> None:
    """Raises ModelMismatch for another model, UnsupportedTensor for the same one in other shards."""
    store.require(model, path)
    for mine, other in zip(store, model, strict=True):
        if mine.pieces != other.pieces:
            raise UnsupportedTensor(
                f"is stored in {_shards(mine)}, and these ranks hold it in {_shards(other)}",
                file=path,
                tensor=mine.name,
                hint="continue with the ranks and the sharding it was recorded with, or take another path",
            )


def _shards(entry: TensorEntry) -> str:
    return f"{len(entry.pieces)} piece{'s' if len(entry.pieces) != 1 else ''} from row " + ", ".join(
        str(piece.row) for piece in entry.pieces[:4]
    )


def _require_same_tensors(mine: ParameterMap, other: ParameterMap, rank: int) -> None:
    for a, b in itertools.zip_longest(mine, other):
        if a is None or b is None or (a.name, a.signature) != (b.name, b.signature):
            said = [f"'{printable(x.name)}', {x.signature}" if x else "no more tensors" for x in (a, b)]
            raise ModelMismatch(
                f"rank 0 holds {said[0]}, where rank {rank} holds {said[1]}",
                hint="record a model that all ranks share, or give every group of ranks its own job and path",
            )
    if dict(mine.aliases) != dict(other.aliases):
        raise ModelMismatch(f"rank {rank} ties other tensors than rank 0", hint="tie them on every rank")


class ShardedRecording:
    """One rank's part of recording; every method is called by all ranks, with the same arguments.

    What one rank meets, all of them raise. Nothing is done behind the caller's back: a thread that talked to
    other ranks would do so at another moment on each.
    """

    def __init__(self, ranks: Ranks, describe: Callable[[], Held], begin: Begin) -> None:
        self._ranks = ranks
        self._journal: Journal | None = None
        held = ranks.every("describing the model", describe)

        def opened() -> _Store:
            journal = self._journal = begin(held)
            view = journal.view
            return _Store(view.folder, view.dtype, view.rows, view.zstd_level, view.sketch_rows)

        self._store = ranks.first("opening the store", opened)
        cut = layout(held, self._store.rows)
        self.map = cut.map
        self._held = held[ranks.rank]
        self._starts = cut.starts
        self._start, self._stop = cut.starts[ranks.rank : ranks.rank + 2]
        self._column = HostColumn(self._stop - self._start, fmt.storage(self._store.dtype))

    def record(self, describe: Describe, step: int, scalars: Mapping[str, float]) -> None:
        """Make one snapshot durable and visible, or raise on every rank and leave what was visible."""
        parts: list[Part] = []
        locks: list[durable.Lock] = []

        def prepare() -> int:
            parts.extend(self._own_parts(*describe()))
            locks.append(lock_ranks(self._store.path))
            return step

        def write() -> _Written:
            try:
                return self._write(parts, t)
            finally:
                locks[0].release()  # before it is told: rank 0 may close the store once it has committed

        try:
            self._require_one_step(self._ranks.every("agreeing on the step", prepare))
            t = self._ranks.first("beginning the snapshot", lambda: self._journal_here.begin(step))
            written = self._ranks.every("writing its rows", write)
        finally:
            for lock in locks:
                lock.release()
        self._commit(written, step, scalars)

    @property
    def _journal_here(self) -> Journal:
        assert self._journal is not None, "only rank 0 holds the store"
        return self._journal

    def _require_one_step(self, steps: Sequence[int]) -> None:
        if len(set(steps)) > 1:
            raise UsageError(
                f"the ranks record the steps {', '.join(map(str, steps))} at once",
                file=self._store.path,
                hint="call record on every rank with the same step",
            )

    def _own_parts(self, held: Held, values: Sequence[Sequence[Tensor]]) -> list[Part]:
        """The boxes that this rank writes, and where they go in its part of the column."""
        self._held.model.require(held.model, self._store.path)
        if held.boxes != self._held.boxes:
            pairs = zip(held.model, held.boxes, self._held.boxes, strict=True)
            raise UnsupportedTensor(
                "lies in other shards than at the first snapshot",
                tensor=next(entry.name for entry, now, then in pairs if now != then),
                hint="keep the sharding, or record into another path",
            )
        parts: list[Part] = []
        for entry, boxes, memory in zip(self.map, held.boxes, values, strict=True):
            mine = {(p.offset, p.size): p.row for p in entry.pieces if self._start <= p.row < self._stop}
            for box, box_values in zip(boxes, memory, strict=True):
                if box in mine:
                    parts.append(Part(entry.name, mine[box] - self._start, box_values))
        return parts

    def _write(self, parts: Sequence[Part], t: int) -> _Written:
        store = self._store
        column = self._column.take(parts)
        crcs = write_rows(store.path, column, store.rows, self._start // store.rows, t, store.zstd_level)
        if store.sketch_rows is None:
            return _Written(crcs, None)
        return _Written(crcs, column[store.sketch_rows[self._candidates(self._ranks.rank)] - self._start])

    def _candidates(self, rank: int) -> BoolArray:
        """(S,) which of the sketch's rows a rank owns."""
        assert self._store.sketch_rows is not None
        start, stop = self._starts[rank : rank + 2]
        return (self._store.sketch_rows >= start) & (self._store.sketch_rows < stop)

    def _commit(self, written: Sequence[_Written], step: int, scalars: Mapping[str, float]) -> None:
        def commit() -> None:
            crcs = [crc for part in written for crc in part.crcs]
            self._journal_here.append_written(crcs, step, scalars, self._sketch(written))

        try:
            self._ranks.first("committing the snapshot", commit)
        except RankLost as lost:
            if self._journal is not None:  # this is rank 0, and it did commit
                raise
            raise DurabilityUnknown(
                "rank 0 was lost while it committed",
                file=self._store.path,
                step=step,
                hint="open the store again to learn which snapshots exist",
            ) from lost

    def _sketch(self, written: Sequence[_Written]) -> AnyArray | None:
        rows, dtype = self._store.sketch_rows, fmt.storage(self._store.dtype).numpy
        if rows is None:
            return None
        sketch = np.empty(len(rows), dtype=dtype)
        for rank, part in enumerate(written):
            sketch[self._candidates(rank)] = part.sketch
        return sketch
