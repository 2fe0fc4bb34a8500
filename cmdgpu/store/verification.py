"""Is every byte of a trajectory the one that was committed? Answers with a list, never stops at the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cmdgpu.errors import CmdgpuError, NotAStore, StoreCorrupt
from cmdgpu.notation import I64
from cmdgpu.progress import Progress, Silent
from cmdgpu.store import durable
from cmdgpu.store import format as fmt
from cmdgpu.store.chunks import ChunkDamage, stored_size
from cmdgpu.store.commit import Commit, own_directory, read_commit
from cmdgpu.store.places import Place, RemotePath
from cmdgpu.store.scan import ChunkFile, scan
from cmdgpu.store.small import check_sketch, read_scalar, read_sketch_rows, read_steps


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong on disk."""

    file: str
    array: str
    problem: str
    step: int | None = None
    rows: tuple[int, int] | None = None
    """[first, last] row of the trajectory, inclusive."""
    tensors: str | None = None

    def __str__(self) -> str:
        where = [] if self.step is None else [f"step {self.step}"]
        where += [] if self.rows is None else [f"rows {self.rows[0]}..{self.rows[1]}"]
        where += [] if self.tensors is None else [self.tensors]
        return "  ".join([self.file, *where, self.problem])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Verification:
    chunks_checked: int = 0
    bytes_checked: int = 0
    damaged: list[Damage] = field(default_factory=list[Damage])


def verify_store(path: Place, *, quick: bool = False, progress: Progress | None = None) -> Verification:
    """Check a trajectory store, in the memory of a few small buffers; of a few chunks if they are compressed.

    quick   metadata, small arrays, presence, type, size and the CRC every chunk carries against the digests
    full    every byte besides, and that what is compressed can be read

    Damage never hides damage: what the small arrays lost, the chunks are checked all the same. Only without
    its two documents, ``zarr.json`` of the group and of ``weights``, is there nothing to check against.
    Raises NotAStore for a path that never was a store.
    """
    try:
        commit, beyond = read_commit_and_edge(path)
    except StoreCorrupt as error:
        return Verification(damaged=[_metadata_damage(error, path)])
    found = Verification(damaged=[*beyond, *_small_damage(commit)])
    sketch_rows = None
    complete = True
    if commit.has_sketch:
        try:
            own_directory(commit.path, fmt.SKETCH)
            sketch_rows = read_sketch_rows(commit)
        except (StoreCorrupt, NotAStore):
            complete = False  # told already; how long a sketch chunk is nobody knows now
    columns = Columns(commit, sketch_rows, complete)
    for _, damaged in columns.verify(found, quick=quick, progress=progress or Silent()):
        found.damaged += damaged
    return found


def _metadata_damage(error: CmdgpuError, path: Place, array: str = "metadata") -> Damage:
    return Damage(error.file or str(path), array, error.message)


def read_commit_and_edge(path: Place) -> tuple[Commit, list[Damage]]:
    """The commit, and the chunks that lie beyond it. Raises NotAStore, StoreCorrupt.

    Plain HTTP lists nothing: what lies beyond the commit is not looked for there.
    """
    read_commit(path)  # refuses what is no store, or a link, before anything is listed
    can_list = not isinstance(path, RemotePath) or path.client.can_list
    listed = (
        durable.entries(path / fmt.WEIGHTS) if can_list else []
    )  # before T: a recorder may go on meanwhile
    commit = read_commit(path)
    return commit, list(_beyond_the_edge(listed, len(commit.steps)))


def _beyond_the_edge(files: Sequence[Place], edge: int) -> Iterator[Damage]:
    """A chunk of index T is a killed append's; one beyond it tells of an older commit file put back."""
    for file in files:
        match = fmt.CHUNK.fullmatch(file.name)
        if match and int(match[2]) > edge:
            yield Damage(str(file), fmt.WEIGHTS, f"lies beyond snapshot {edge}: an older commit was put back")


def _small_damage(commit: Commit) -> Iterator[Damage]:
    """What is wrong with the small arrays, each for itself."""
    checks: dict[str, Callable[[], object]] = {fmt.STEP: lambda: read_steps(commit)}
    for name in commit.scalar_names:
        checks[name] = lambda name=name: read_scalar(commit, name)
    if commit.has_sketch:
        checks[fmt.SKETCH_ROW] = lambda: check_sketch(commit, len(read_sketch_rows(commit)))
    for name, check in checks.items():
        try:
            check()
        except (StoreCorrupt, NotAStore) as error:
            yield _metadata_damage(error, commit.path, name)


class Columns:
    """The chunk files of every snapshot, and the judgement on them."""

    def __init__(self, commit: Commit, sketch_rows: I64 | None, complete: bool = True) -> None:
        """``complete`` is False when the sketch cannot be looked at: digests then say nothing."""
        self._commit = commit
        itemsize = commit.storage.numpy.itemsize
        self._chunk_bytes = commit.rows * itemsize
        self._sketch_bytes = None if sketch_rows is None else len(sketch_rows) * itemsize
        self._complete = complete

    def files(self, t: int) -> Iterator[ChunkFile]:
        for i in range(self._commit.n_chunks):
            yield self._file(self._commit.chunk_path(i, t), self._chunk_bytes)
        if self._sketch_bytes is not None:
            yield self._file(self._commit.sketch_path(t), self._sketch_bytes)

    def _file(self, path: Place, n_bytes: int) -> ChunkFile:
        return ChunkFile(path, n_bytes, self._commit.is_compressed)

    def verify(
        self, found: Verification, *, quick: bool, progress: Progress
    ) -> Iterator[tuple[int, list[Damage]]]:
        """(t, what is wrong with snapshot t) for every snapshot; counts into ``found`` what was looked at."""
        times = range(len(self._commit.steps))
        progress.begin("verify", sum(_length(file) for file in self.files(0)) * len(times))
        answers = scan((file for t in times for file in self.files(t)), quick=quick)
        try:
            for t in times:
                answered: list[tuple[ChunkFile, bytes | ChunkDamage]] = []
                for file in self.files(t):
                    answered.append((file, next(answers)))
                    progress.advance(_length(file))
                found.chunks_checked += len(answered)
                found.bytes_checked += 0 if quick else sum(_stored(file) for file, _ in answered)
                yield t, self._judge(t, answered)
        finally:
            progress.end()

    def _judge(self, t: int, answers: list[tuple[ChunkFile, bytes | ChunkDamage]]) -> list[Damage]:
        """Damaged chunks by name; whole ones must be the ones that were committed."""
        commit, step = self._commit, int(self._commit.steps[t])
        damages: list[Damage] = []
        for i, (file, answer) in enumerate(answers):
            if isinstance(answer, ChunkDamage) and i < commit.n_chunks:
                start, stop = i * commit.rows, min((i + 1) * commit.rows, commit.map.n_rows)
                names = commit.map.name_rows(start, stop)
                damages.append(
                    Damage(str(file.path), fmt.WEIGHTS, str(answer), step, (start, stop - 1), names)
                )
            elif isinstance(answer, ChunkDamage):
                damages.append(Damage(str(file.path), fmt.SKETCH, str(answer), step))
        crcs = [answer for _, answer in answers if isinstance(answer, bytes)]
        if not damages and self._complete and fmt.sha256(*crcs) != commit.digests[t]:
            where = str(commit.path / fmt.WEIGHTS / f"c.*.{t}")
            problem, n_rows = "not the chunks that were committed (swapped or stale)", commit.map.n_rows
            names = commit.map.name_rows(0, n_rows)
            damages = [Damage(where, fmt.WEIGHTS, problem, step, (0, n_rows - 1), names)]
        return damages


def _length(file: ChunkFile) -> int:
    """Bytes of a chunk that is not compressed: what progress is counted in."""
    return file.n_bytes + fmt.CRC_BYTES


def _stored(file: ChunkFile) -> int:
    return stored_size(file.path) if file.compressed else _length(file)
