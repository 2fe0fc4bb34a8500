"""Is every byte of a trajectory the one that was committed? Answers with a list, never stops at the first."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cmdgpu.errors import StoreCorrupt
from cmdgpu.progress import Progress, Silent
from cmdgpu.store import format as fmt
from cmdgpu.store.chunks import ChunkDamage, read_chunk, stored_crc
from cmdgpu.store.view import StoreView

_READERS = 4


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
    chunks_checked: int
    bytes_checked: int
    damaged: list[Damage]


def verify_store(path: Path, *, quick: bool = False, progress: Progress | None = None) -> Verification:
    """Check a trajectory store. Bounded memory: a few chunks at a time.

    quick   metadata, presence, type, size and the CRC every file carries against the digests
    full    every byte besides

    Damaged metadata is a finding like any other; NotAStore is raised for a path that never was a store.
    """
    progress = progress or Silent()
    listed = sorted((path / fmt.WEIGHTS).glob("c.*.*"))  # before T is read: a recorder may go on meanwhile
    try:
        view = StoreView.open(path)
    except StoreCorrupt as error:
        return Verification(0, 0, [Damage(error.file or str(path), "metadata", error.message)])
    found = Verification(0, 0, list(_beyond_the_edge(listed, len(view.steps))))
    progress.begin("verify", view.stored_bytes)
    try:
        with ThreadPoolExecutor(_READERS, thread_name_prefix="cmdgpu-verify") as pool:
            for t in range(len(view.steps)):
                _verify_column(view, t, quick, pool, found)
                progress.advance(view.stored_bytes // len(view.steps))
    finally:
        progress.end()
    return found


def _beyond_the_edge(files: list[Path], edge: int) -> Iterator[Damage]:
    """A chunk of index T is a killed append's; one beyond it tells of an older commit file put back."""
    for file in files:
        last = file.name.rpartition(".")[2]
        if last.isdigit() and int(last) > edge:
            yield Damage(str(file), fmt.WEIGHTS, f"lies beyond snapshot {edge}: an older commit was put back")


def _verify_column(
    view: StoreView, t: int, quick: bool, pool: ThreadPoolExecutor, found: Verification
) -> None:
    itemsize = view.storage.numpy.itemsize
    step = int(view.steps[t])

    def check(i: int) -> tuple[bytes | None, Damage | None]:
        path = view.chunk_path(i, t)
        try:
            if quick:
                return stored_crc(path, view.rows * itemsize), None
            return read_chunk(path, np.empty(view.rows, dtype=view.storage.numpy)), None
        except ChunkDamage as damage:
            start, stop = i * view.rows, min((i + 1) * view.rows, view.map.n_rows)
            names = view.map.name_rows(start, stop)
            return None, Damage(str(path), fmt.WEIGHTS, str(damage), step, (start, stop - 1), names)

    answers = list(pool.map(check, range(view.n_chunks)))
    if view.sketch_rows is not None:
        path = view.path / fmt.SKETCH / fmt.chunk_name(0, t)
        n = len(view.sketch_rows)
        try:
            if quick:
                answers.append((stored_crc(path, n * itemsize), None))
            else:
                answers.append((read_chunk(path, np.empty(n, dtype=view.storage.numpy)), None))
        except ChunkDamage as damage:
            answers.append((None, Damage(str(path), fmt.SKETCH, str(damage), step)))
    damages = [damage for _, damage in answers if damage is not None]
    crcs = [crc for crc, _ in answers if crc is not None]
    if not damages and fmt.sha256(*crcs) != view.digests[t]:
        where = str(view.path / fmt.WEIGHTS / f"c.*.{t}")
        problem, n_rows = "not the chunks that were committed (swapped or stale)", view.map.n_rows
        names = view.map.name_rows(0, n_rows)
        damages = [Damage(where, fmt.WEIGHTS, problem, step, (0, n_rows - 1), names)]
    found.damaged += damages
    found.chunks_checked += len(answers)
    found.bytes_checked += 0 if quick else view.stored_bytes // len(view.steps)
