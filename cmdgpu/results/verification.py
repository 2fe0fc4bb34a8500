"""Is every byte of a result the one that was fitted? Answers with a list, like its twin for trajectories."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from cmdgpu.errors import CmdgpuError, StoreCorrupt
from cmdgpu.progress import Progress, Silent
from cmdgpu.results.ledger import DONE, UNIT_ARRAYS, Ledger
from cmdgpu.results.opened import open_parts
from cmdgpu.store import format as fmt
from cmdgpu.store.verification import Damage, Verification


def verify_result(path: Path, *, quick: bool = False, progress: Progress | None = None) -> Verification:
    """Check a result on disk like a trajectory: every record, and in full every byte it vouches for."""
    progress = progress or Silent()
    try:
        ledger, _, _ = open_parts(path)
    except StoreCorrupt as error:
        return Verification(0, 0, [Damage(error.file or str(path), "metadata", error.message)])
    found = Verification(0, 0, list(_document_damage(path)))
    unit_bytes = ledger.frame.rows * 14
    progress.begin("verify", unit_bytes * ledger.frame.n_units)
    try:
        for unit in range(ledger.frame.n_units):
            found.damaged += _unit_damage(ledger, unit, quick)
            found.chunks_checked += len(UNIT_ARRAYS)
            found.bytes_checked += 0 if quick else unit_bytes
            progress.advance(unit_bytes)
    finally:
        progress.end()
    return found


def _document_damage(path: Path) -> Iterator[Damage]:
    """Metadata only other Zarr readers believe: ours knows the shapes of its arrays."""
    for name in (*UNIT_ARRAYS, DONE):
        file = path / name / fmt.DOCUMENT
        try:
            fmt.read_document(file, "array", "result-array")
        except CmdgpuError as error:
            yield Damage(str(file), name, error.message)


def _unit_damage(ledger: Ledger, unit: int, quick: bool) -> list[Damage]:
    start, stop = ledger.frame.unit(unit)
    damaged: list[Damage] = []

    def note(error: StoreCorrupt) -> None:
        file = Path(error.file or os.fspath(ledger.path))
        tensors = ledger.frame.map.name_rows(start, stop)
        damaged.append(
            Damage(
                str(file),
                file.parent.name,
                error.message.rpartition(": ")[2],
                None,
                (start, stop - 1),
                tensors,
            )
        )

    if not quick:
        for name in UNIT_ARRAYS:
            try:
                ledger.read(name, unit)
            except StoreCorrupt as error:
                note(error)
    if not damaged:
        try:
            ledger.crcs(unit)
        except StoreCorrupt as error:
            note(error)
    return damaged
