"""What a reader sees: one trajectory, frozen at one commit.

``weights/zarr.json`` is read once; its T and its digests hold for the life of the view. Committed chunks
never change, so this is snapshot isolation for free: a recorder may append meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields

import numpy as np

from cmdgpu.errors import StoreCorrupt
from cmdgpu.notation import F64, I64, AnyArray
from cmdgpu.store import format as fmt
from cmdgpu.store import remote
from cmdgpu.store.ahead import in_order
from cmdgpu.store.chunks import ChunkDamage, read_chunk, stored_crc, stored_size
from cmdgpu.store.commit import Commit, read_commit
from cmdgpu.store.places import Place
from cmdgpu.store.small import check_sketch, read_scalar, read_sketch_rows, read_steps


@dataclass(frozen=True)
class ChunkFiles:
    """Files of one size in one directory, and the CRC that each must carry and have."""

    directory: str
    names: tuple[str, ...]
    n_bytes: int
    kept: tuple[bytes, ...]


@dataclass(frozen=True)
class StoreView(Commit):
    """A commit with its small arrays, and the way to its chunks."""

    scalars: dict[str, F64]
    """Recorded scalars, (T,) each."""
    sketch_rows: I64 | None
    """(S,) rows the sketch holds."""
    _crcs: dict[int, list[bytes]] = field(default_factory=dict[int, list[bytes]], repr=False)
    _locks: dict[int, threading.Lock] = field(default_factory=dict[int, threading.Lock], repr=False)
    """One per column: a cold disk answers for many columns at once faster than one after the other."""

    @staticmethod
    def open(path: Place, *, without: Collection[str] = ()) -> StoreView:
        """Read and check the metadata and the small arrays.

        ``without`` names scalars to do without. Raises NotAStore for a path that is no trajectory of this
        format, StoreCorrupt for a damaged one.
        """
        commit = read_commit(path)
        read_steps(commit)
        sketch_rows = None
        if commit.has_sketch:
            sketch_rows = read_sketch_rows(commit)
            check_sketch(commit, len(sketch_rows))
        return StoreView(
            **{part.name: getattr(commit, part.name) for part in fields(Commit)},
            scalars={name: read_scalar(commit, name) for name in commit.scalar_names if name not in without},
            sketch_rows=sketch_rows,
        )

    @property
    def shape(self) -> tuple[int, int]:
        return self.map.n_rows, len(self.steps)

    @property
    def stored_bytes(self) -> int:
        """Bytes of weights and sketch on disk; compressed files are asked for their sizes, one by one."""
        if self.is_compressed:
            times = range(len(self.steps))
            files = [self.chunk_path(i, t) for t in times for i in range(self.n_chunks)]
            sketches = [] if self.sketch_rows is None else [self.sketch_path(t) for t in times]
            if self.is_local:
                return sum(map(stored_size, files + sketches))
            return sum(in_order(stored_size, files + sketches, remote.READS_IN_FLIGHT))
        per_chunk = self.rows * self.storage.numpy.itemsize + fmt.CRC_BYTES
        sketch = 0
        if self.sketch_rows is not None:
            sketch = len(self.sketch_rows) * self.storage.numpy.itemsize + fmt.CRC_BYTES
        return len(self.steps) * (self.n_chunks * per_chunk + sketch)

    # ---- reading ------------------------------------------------------------------------------------

    def crcs(self, t: int) -> list[bytes]:
        """The committed CRC of every chunk of column t, the sketch chunk last.

        First contact with a column: presence, type, size and the CRC each file carries; together they
        must reproduce the committed digest. So even a read of one chunk learns of a missing, swapped or
        stale one anywhere in its column.
        """
        if (found := self._crcs.get(t)) is not None:
            return found
        with self._locks.setdefault(t, threading.Lock()):
            if t not in self._crcs:
                self._crcs[t] = self._first_contact(t)
            return self._crcs[t]

    def require(self, times: Sequence[int]) -> None:
        """First contact with many columns. Raises StoreCorrupt for the first of them that is damaged.

        Of a server many things are asked at once: a round trip for each chunk adds up.
        """
        if self.is_local:
            for t in times:
                self.crcs(t)
            return
        new = [t for t in dict.fromkeys(times) if t not in self._crcs]
        tails = in_order(lambda at: self._stored_crc(*at), self._contacts(new), remote.READS_IN_FLIGHT)
        for t in new:
            self._crcs[t] = self._vouched(t, [next(tails) for _ in self._contacts([t])])

    def _first_contact(self, t: int) -> list[bytes]:
        if not self.is_local:
            self.require([t])
            return self._crcs[t]
        return self._vouched(t, [self._stored_crc(i, at) for i, at in self._contacts([t])])

    def _contacts(self, times: Sequence[int]) -> Iterator[tuple[int, int]]:
        """(i, t) of every chunk of these columns, that of the sketch last: as their digests go."""
        n_files = self.n_chunks if self.sketch_rows is None else self.n_chunks + 1
        return ((i, t) for t in times for i in range(n_files))

    def _stored_crc(self, i: int, t: int) -> bytes:
        """The CRC that chunk i of a column carries, or that of its sketch for the one after the last."""
        itemsize = self.storage.numpy.itemsize
        if i < self.n_chunks:
            try:
                return stored_crc(self.chunk_path(i, t), self.rows * itemsize, compressed=self.is_compressed)
            except ChunkDamage as damage:
                raise self._corrupt(str(damage), i, t) from damage
        assert self.sketch_rows is not None
        try:
            n_bytes = len(self.sketch_rows) * itemsize
            return stored_crc(self.sketch_path(t), n_bytes, compressed=self.is_compressed)
        except ChunkDamage as damage:
            raise self._corrupt_sketch(str(damage), t) from damage

    def _vouched(self, t: int, found: list[bytes]) -> list[bytes]:
        """These CRCs, which must be the ones that were committed."""
        if fmt.sha256(*found) != self.digests[t]:
            raise StoreCorrupt(
                "its chunks are not the ones that were committed (swapped, stale or foreign)",
                file=self.path / fmt.WEIGHTS / f"c.*.{t}",
                tensor=self.map.name_rows(0, self.map.n_rows),
                step=int(self.steps[t]),
                hint=_REMEDY,
            )
        return found

    def read_chunks(self, i: int, times: list[int], places: list[AnyArray]) -> None:
        """Chunk i of several columns, each into its place: the fast way of a pass, many files in one call.

        What the compiled reader does not find right, ``crcs`` and ``read_chunk`` look at again: they say what
        is wrong, and they serve where there is no such reader, or chunks are compressed.
        """
        from cmdgpu.ops import files  # brings torch, which only a pass needs

        wrong = list(range(len(times)))
        if self.is_local and files.can_read() and not self.is_compressed:
            here = self.files(i, times)
            wrong = files.read_checked(here.directory, here.names, here.n_bytes, places, here.kept)
        for k in wrong:
            self.read_chunk(i, times[k], places[k])

    def files(self, i: int, times: list[int]) -> ChunkFiles:
        """Chunk i of several columns, for whoever reads them himself: of a local store, not compressed."""
        kept = [self.contact(t)[i] for t in times]
        names = tuple(fmt.chunk_name(i, t) for t in times)
        n_bytes = self.rows * self.storage.numpy.itemsize
        return ChunkFiles(str(self.path / fmt.WEIGHTS), names, n_bytes, tuple(kept))

    def contact(self, t: int) -> list[bytes]:
        """``crcs``, with all files of the column looked at by one call where that can be done."""
        return self._crcs.get(t) or self._tails(t) or self.crcs(t)

    def _tails(self, t: int) -> list[bytes] | None:
        """``_first_contact`` without the words: None when anything is not as it was committed."""
        from cmdgpu.ops import files

        if not self.is_local or self.is_compressed or not files.can_read():
            return None
        with self._locks.setdefault(t, threading.Lock()):
            if t in self._crcs:
                return self._crcs[t]
            itemsize = self.storage.numpy.itemsize
            names = [fmt.chunk_name(i, t) for i in range(self.n_chunks)]
            found = files.read_tails(str(self.path / fmt.WEIGHTS), names, self.rows * itemsize)
            if self.sketch_rows is not None and found is not None:
                sketch = self.path / fmt.SKETCH
                n_bytes = len(self.sketch_rows) * itemsize
                found = found + (files.read_tails(str(sketch), [fmt.chunk_name(0, t)], n_bytes) or [])
            if found is None or fmt.sha256(*found) != self.digests[t]:
                return None
            self._crcs[t] = found
            return found

    def read_chunk(self, i: int, t: int, out: AnyArray) -> None:
        """Chunk i of column t, checked, into ``out`` (rows,) of the stored type."""
        kept = self.crcs(t)[i]
        try:
            read_chunk(self.chunk_path(i, t), out, kept, compressed=self.is_compressed)
        except ChunkDamage as damage:
            raise self._corrupt(str(damage), i, t) from damage

    def read_sketch(self, t: int) -> AnyArray:
        """(S,) stored values of the candidate rows at column t."""
        assert self.sketch_rows is not None
        out = np.empty(len(self.sketch_rows), dtype=self.storage.numpy)
        try:
            read_chunk(self.sketch_path(t), out, self.crcs(t)[-1], compressed=self.is_compressed)
        except ChunkDamage as damage:
            raise self._corrupt_sketch(str(damage), t) from damage
        return out

    def _corrupt(self, problem: str, i: int, t: int) -> StoreCorrupt:
        start, stop = i * self.rows, min((i + 1) * self.rows, self.map.n_rows)
        return StoreCorrupt(
            f"rows {start}..{stop - 1} of {fmt.WEIGHTS}: {problem}",
            file=self.chunk_path(i, t),
            tensor=self.map.name_rows(start, stop),
            step=int(self.steps[t]),
            hint=_REMEDY,
        )

    def _corrupt_sketch(self, problem: str, t: int) -> StoreCorrupt:
        path = self.sketch_path(t)
        return StoreCorrupt(problem, file=path, step=int(self.steps[t]), hint=_REMEDY)


_REMEDY = "`cmdgpu verify` lists all damage; the other snapshots stay usable with sel(steps=...)"
