"""What an import will do, from the headers alone: order, steps, names, layout, bytes, memory.

Every header is read and compared before anything is written, one checkpoint open at a time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cmdgpu.errors import (
    CheckpointError,
    MemoryLimitError,
    NotAStore,
    StoreExists,
    UsageError,
    printable,
)
from cmdgpu.importing.contract import Format
from cmdgpu.importing.discovery import Paths, discover
from cmdgpu.importing.headers import (
    Described,
    PlannedFile,
    Reference,
    describe_all,
    require_same,
)
from cmdgpu.importing.naming import Named, Rules, kind_of
from cmdgpu.importing.steps import Labelled, Steps, choose_steps
from cmdgpu.memory import show_bytes
from cmdgpu.sampling import N_CANDIDATES
from cmdgpu.store import format as fmt
from cmdgpu.store import zstd
from cmdgpu.store.parameter_map import Kind, ParameterMap, whole
from cmdgpu.store.view import StoreView

WRITERS: Final = 16
"""Chunks that are read and written at a time: reads and flushes wait for the disk, not for a core."""
HASH_BLOCK: Final = 1 << 20
"""Bytes of a source that are hashed at a time: still in the cache when their digest is taken."""
CONVERT_ELEMENTS: Final = 1 << 16
"""Of a tensor in another type than the store's, at a time."""
_CONVERT_BYTES: Final = CONVERT_ELEMENTS * (8 + 4 + 4 + 1)
"""As stored, as numbers, as rounded, and which of them overflowed."""
_RESERVED: Final = 32 << 20
"""Stacks of the threads, file buffers, and what allocators keep."""
_MOST_FILES: Final = 200_000
"""Of all snapshots of a store: their names and digests are written with every commit."""
_TENSOR_BYTES: Final = 2048
"""What the header of a tensor costs as objects: in the checkpoint, in the names, in the layout."""


@dataclass(frozen=True)
class PlannedCheckpoint:
    """One snapshot to be."""

    path: Path
    step: int
    opener: Format
    format: str
    files: tuple[PlannedFile, ...]
    named: Named

    @property
    def n_bytes(self) -> int:
        return sum(file.size for file in self.files)


@dataclass(frozen=True)
class ImportPlan:
    """All that is known before a byte of a tensor is read."""

    out: Path
    checkpoints: tuple[PlannedCheckpoint, ...]
    """By step; those that ``existing`` holds first."""
    existing: StoreView | None
    """What an import before this one left at the path."""
    map: ParameterMap
    dtype: str
    rows: int
    """Per chunk."""
    unit: str
    compressed: bool
    skipped_paths: tuple[tuple[str, str], ...]
    mixtures: tuple[tuple[str, tuple[str, ...]], ...]
    """(tensor, its element types over time) of tensors that have more than one."""
    needed_bytes: int
    """Memory."""
    limit_bytes: int
    writers: int
    """Chunks under way at a time."""

    @property
    def steps(self) -> list[int]:
        return [checkpoint.step for checkpoint in self.checkpoints]

    @property
    def n_committed(self) -> int:
        """Checkpoints that are in the store already."""
        last = self.last_committed
        return sum(step <= last for step in self.steps)

    @property
    def last_committed(self) -> int:
        if self.existing is None or not len(self.existing.steps):
            return -1
        return int(self.existing.steps[-1])

    @property
    def n_snapshots(self) -> int:
        """Of the store, once all is imported."""
        return (0 if self.existing is None else len(self.existing.steps)) + len(self.missing)

    @property
    def missing(self) -> tuple[PlannedCheckpoint, ...]:
        return self.checkpoints[self.n_committed :]

    @property
    def source_bytes(self) -> int:
        """Bytes that will be read, those that are only checked included."""
        return sum(checkpoint.n_bytes for checkpoint in self.checkpoints)

    @property
    def stored_bytes(self) -> int:
        """Bytes that will be written, before any compression."""
        n_chunks = -(-self.map.n_rows // self.rows)
        per_chunk = self.rows * fmt.storage(self.dtype).numpy.itemsize + fmt.CRC_BYTES
        return len(self.missing) * n_chunks * per_chunk

    @property
    def stripped(self) -> str:
        return self.checkpoints[0].named.stripped

    @property
    def rounded(self) -> list[str]:
        """Tensors that the store holds with fewer bits than the checkpoints do."""
        return [entry.name for entry in self.map if widest([entry.dtype, self.dtype]) != self.dtype]


def plan_import(
    paths: Paths,
    out: Path,
    *,
    rules: Rules,
    steps: Sequence[int] | None = None,
    resume: bool = True,
    dtype: str | None = None,
    limit_bytes: int,
    rows_per_chunk: int | None = None,
    compressed: bool = False,
    unit: str = "step",
) -> ImportPlan:
    """Find, order, name and compare; nothing is written and no tensor is read.

    ``dtype`` None takes that of the store at ``out``, or the widest element type of the tensors, float32 at
    most. Raises UsageError for steps that cannot be told, CheckpointError naming both files and the tensor
    where two checkpoints differ, StoreExists where what lies at ``out`` cannot be continued, MemoryLimitError
    with both numbers.
    """
    fmt.check_rows_per_chunk(rows_per_chunk, compressed=compressed)
    if not (unit.isprintable() and len(unit) <= 64):
        raise UsageError(f"a unit named {printable(unit)!r}", hint="a word of at most 64 characters")
    wanted = None if dtype is None else fmt.storage(dtype).name
    existing = _open_existing(out, resume, wanted, rows_per_chunk, compressed, unit)
    found = discover(paths)
    described, without_weights = describe_all(found.candidates, rules)
    chosen = choose_steps([Labelled(str(one.path), one.label, one.told) for one in described], steps)
    numbered, without_step = by_step(described, chosen)
    ordered = [one for _, one in numbered]
    reference = Reference.of(ordered[0]) if existing is None else Reference.of_store(existing)
    for one in ordered:
        require_same(reference, one)
    parameter_map, mixtures = _layout(ordered, reference, existing)
    stored = wanted or stored_type([entry.dtype for entry in parameter_map if entry.n_rows])
    stored = stored if existing is None else existing.dtype
    rows = rows_per_chunk or fmt.default_rows_per_chunk(parameter_map.n_rows)
    rows = rows if existing is None else existing.rows
    writers, needed = _fit_memory(rows, stored, compressed, ordered, limit_bytes)
    plan = ImportPlan(
        out=out,
        checkpoints=tuple(
            PlannedCheckpoint(one.path, step, one.opener, one.format, one.files, one.named)
            for step, one in numbered
        ),
        existing=existing,
        map=parameter_map,
        dtype=stored,
        rows=rows,
        unit=unit,
        compressed=compressed,
        skipped_paths=(*found.skipped, *without_weights, *without_step),
        mixtures=mixtures,
        needed_bytes=needed,
        limit_bytes=limit_bytes,
        writers=writers,
    )
    _require_appendable(plan)
    return plan


def by_step(
    described: Sequence[Described], chosen: Steps
) -> tuple[list[tuple[int, Described]], list[tuple[str, str]]]:
    """What has a step, in that order; and what has none, with the reason."""
    numbered: list[tuple[int, Described]] = []
    without: list[tuple[str, str]] = []
    for step, one in zip(chosen, described, strict=True):
        if step is not None:
            numbered.append((step, one))
        elif one.told is not None and one.told in chosen:
            without.append((str(one.path), f"says step {one.told}, which is that of another one"))
        else:
            without.append((str(one.path), "its name tells no step, beside others that do"))
    numbered.sort(key=lambda pair: pair[0])
    return numbered, without


def _open_existing(
    out: Path, resume: bool, dtype: str | None, rows: int | None, compressed: bool, unit: str
) -> StoreView | None:
    """The store that is to be continued.

    Raises StoreExists for everything else that is there, UnsupportedTensor where it was recorded in shards.
    """
    if not os.path.lexists(out):
        return None
    if not resume:
        raise StoreExists("is there already", file=out, hint="choose another path, or let it resume")
    try:
        view = StoreView.open(out)
    except NotAStore as error:
        raise StoreExists(
            f"is there already and is no trajectory to continue ({error.message})",
            file=out,
            hint="choose another path",
        ) from error
    for what, held, mine in (
        ("dtype", view.dtype, dtype or view.dtype),
        ("rows_per_chunk", view.rows, rows or view.rows),
        ("zstd", view.is_compressed, compressed),
        ("unit", view.unit, unit),
    ):
        if held != mine:
            raise StoreExists(
                f"was made with {what}={held!r}, and {what}={mine!r} is asked for",
                file=out,
                hint=f"give {what}={held!r}, or another path",
            )
    view.map.require_whole(out)
    return view


def _require_appendable(plan: ImportPlan) -> None:
    """Snapshots follow each other: what is not in the store must come after what is."""
    n_files = sum(len(planned.files) for planned in plan.missing)
    if plan.existing is not None:
        n_files += sum(len(origin.files) for origin in plan.existing.sources if origin is not None)
    if n_files > _MOST_FILES:
        raise UsageError(
            f"{n_files} files are more than one store keeps account of ({_MOST_FILES})",
            hint="import them in parts, into several stores",
        )
    if plan.existing is None:
        return
    known = set(plan.existing.steps.tolist())
    for planned in plan.checkpoints:
        if planned.step <= plan.last_committed and planned.step not in known:
            raise UsageError(
                f"step {planned.step} cannot be put before step {plan.last_committed} of {plan.out}",
                file=planned.path,
                hint="leave it out, or import all of them into another path",
            )


# ---- layout and element type ---------------------------------------------------------------------------


def _layout(
    ordered: Sequence[Described], reference: Reference, existing: StoreView | None
) -> tuple[ParameterMap, tuple[tuple[str, tuple[str, ...]], ...]]:
    """The layout of the store, or of the first checkpoint; each tensor in its widest type over time.

    Parameters come first, then buffers, each in the order of the file: a recorder's order, which then goes on
    where the checkpoints end.
    """
    distinct = list({id(one.named): one.named for one in ordered}.values())
    types: dict[str, tuple[str, ...]] = {}
    for name in reference.shapes:
        infos = [named.infos[named.source_of(name, reference.aliases) or ""] for named in distinct]
        types[name] = tuple(dict.fromkeys(info.dtype for info in infos))
    mixtures = tuple((name, several) for name, several in types.items() if len(several) > 1)
    if existing is not None:
        for entry in existing.map:
            if widest([entry.dtype, *types[entry.name]]) != entry.dtype:
                raise StoreExists(
                    f"holds it as {entry.dtype}, the checkpoints as {' and '.join(types[entry.name])}",
                    file=existing.path,
                    tensor=entry.name,
                    hint="import into another path",
                )
        return existing.map, mixtures
    described: list[tuple[str, Kind, str, tuple[int, ...]]] = [
        (name, kind_of(name), widest(types[name]), shape) for name, shape in reference.shapes.items()
    ]
    described.sort(key=lambda tensor: tensor[1] == "buffer")
    first = ordered[0].named
    skipped = tuple((name, printable(reason, 200)) for name, reason in first.skipped if _is_text(name))
    parameter_map = ParameterMap(whole(described), first.aliases, (), skipped)
    if not parameter_map.n_rows:
        raise CheckpointError("all tensors that are taken are empty", file=ordered[0].path)
    return parameter_map, mixtures


def _is_text(name: str) -> bool:
    return name.encode(errors="ignore").decode() == name


def widest(types: Sequence[str]) -> str:
    """The narrowest element type that holds every value of these."""
    distinct = set(types)
    if "float64" in distinct:
        return "float64"
    return next(iter(distinct)) if len(distinct) == 1 else "float32"


def stored_type(types: Sequence[str]) -> str:
    """The element type on disk for tensors of these: the widest, float32 at most."""
    found = widest(types)
    return "float32" if found == "float64" else found


# ---- memory ---------------------------------------------------------------------------------------------


def hashers() -> int:
    """Files that are hashed at a time."""
    return max(1, min(4, (os.cpu_count() or 1) // 2))


def _fit_memory(
    rows: int, dtype: str, compressed: bool, ordered: Sequence[Described], limit_bytes: int
) -> tuple[int, int]:
    """Chunks under way within the limit, and what they need.

    needed = reserved + 2 * headers (the next one is opened ahead) + sketch + hashers * block
             + writers * (rows * itemsize + its frame + a converted piece + one read of a checkpoint)

    Raises MemoryLimitError with both numbers when one chunk at a time does not fit.
    """
    itemsize = fmt.storage(dtype).numpy.itemsize
    headers = max(_TENSOR_BYTES * one.n_tensors + one.held_bytes for one in ordered)
    fixed = _RESERVED + 2 * headers + 2 * N_CANDIDATES * itemsize + hashers() * HASH_BLOCK
    largest = max(ordered, key=lambda one: one.read_bytes)
    frame = zstd.bound(rows * itemsize) if compressed else 0
    each = rows * itemsize + frame + _CONVERT_BYTES + largest.read_bytes
    for writers in range(WRITERS, 0, -1):
        if fixed + writers * each <= limit_bytes:
            return writers, fixed + writers * each
    needed = fixed + each
    error = MemoryLimitError(
        f"one chunk of {rows} rows at a time needs {show_bytes(needed)}, the memory limit is "
        f"{show_bytes(limit_bytes)}",
        file=largest.path if largest.read_bytes > rows * itemsize else None,
        hint=f"give {-(-needed // (1 << 20))}MiB or more",
    )
    error.needed_bytes = needed
    raise error
