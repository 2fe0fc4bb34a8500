"""Is every byte of a result the one that was fitted? Answers with a list, like its twin for trajectories."""

from __future__ import annotations

from collections.abc import Iterator

from cmdgpu.errors import CmdgpuError, StoreCorrupt
from cmdgpu.progress import Progress, Silent
from cmdgpu.results.ledger import Ledger, unit_documents
from cmdgpu.results.opened import open_parts
from cmdgpu.store import format as fmt
from cmdgpu.store.chunks import ChunkDamage
from cmdgpu.store.places import Place, place_of
from cmdgpu.store.scan import ChunkFile, scan
from cmdgpu.store.verification import Damage, Verification


def verify_result(path: Place, *, quick: bool = False, progress: Progress | None = None) -> Verification:
    """Check a result on disk like a trajectory: every record, and in full every byte it vouches for.

    Of a fit that is still running, the units whose record is there.
    """
    progress = progress or Silent()
    try:
        ledger, modes, head = open_parts(path)
    except StoreCorrupt as error:
        return Verification(damaged=[Damage(error.file or str(path), "metadata", error.message)])
    found = Verification(damaged=list(_document_damage(ledger, modes.n_modes)))
    units = [u for u in ledger.frame.live_units if head["status"] == "complete" or ledger.is_begun(u)]
    progress.begin("verify", sum(map(ledger.unit_bytes, units)))
    answers = scan((file for unit in units for file in ledger.files(unit)), quick=quick)
    try:
        for unit in units:
            answered = [(file, next(answers)) for file in ledger.files(unit)]
            unit_bytes = ledger.unit_bytes(unit)
            found.damaged += _unit_damage(ledger, unit, answered)
            found.chunks_checked += len(answered)
            found.bytes_checked += 0 if quick else unit_bytes
            progress.advance(unit_bytes)
    finally:
        progress.end()
    return found


def _document_damage(ledger: Ledger, n_modes: int) -> Iterator[Damage]:
    """Metadata only other Zarr readers believe: ours knows the shapes of its arrays."""
    for name, expected in unit_documents(ledger.frame, n_modes).items():
        file = ledger.path / name / fmt.DOCUMENT
        dims, fill = expected["dimension_names"], expected["fill_value"]
        fill = float("nan") if fill == "NaN" else fill
        try:
            document, _ = fmt.read_document(file, "array", "result-array")
            if fmt.check_array(document, file, dims, fill) != fmt.check_array(expected, file, dims, fill):
                raise StoreCorrupt("describes another array", file=file)
        except CmdgpuError as error:
            yield Damage(str(file), name, error.message)


def _unit_damage(
    ledger: Ledger, unit: int, answers: list[tuple[ChunkFile, bytes | ChunkDamage]]
) -> list[Damage]:
    """Damaged chunks by name; whole ones must be those that the record vouches for."""
    start, stop = ledger.frame.unit(unit)
    names = ledger.frame.map.name_rows(start, stop)

    def damage(file: Place, problem: str) -> Damage:
        return Damage(str(file), file.parent.name, problem, None, (start, stop - 1), names)

    damaged = [damage(file.path, str(told)) for file, told in answers if isinstance(told, ChunkDamage)]
    if not damaged:
        try:
            ledger.crcs(unit)
        except StoreCorrupt as error:
            damaged.append(damage(place_of(error.file or ledger.path), error.message.rpartition(": ")[2]))
    return damaged
