"""Laws of damage: no bit of a store can flip, no file can be cut, go or change its place, without an error.

``flips`` damages one file at a time and looks through every door. The default run takes a seeded sample of
the bits of the documents and at least one bit of every KiB of every chunk; the long form takes every bit of
every document and sixteen of every KiB.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from cmdgpu.decomposition import CMD
from cmdgpu.errors import CmdgpuError, StoreCorrupt
from cmdgpu.recording import Recorder
from cmdgpu.results.ledger import DONE, UNIT_ARRAYS
from cmdgpu.results.modes import MODE_ARRAYS
from cmdgpu.store import format as fmt
from cmdgpu.store.journal import Journal
from cmdgpu.store.verification import verify_store
from cmdgpu.trajectory import Trajectory
from tests.faults import flips
from tests.faults.flips import STEPS, Subject, Tally
from tests.verbs import N_CHUNKS, ROWS, N, flip_bit, swap_files, values_at

BITS_PER_DOCUMENT: Final = 14
KINDS_OF_STORE: Final = ("trajectory", "result")
every_kind = pytest.mark.parametrize("subject", [*KINDS_OF_STORE, "compressed"], indirect=True)
"""For laws of files: documents and small arrays of a compressed store are those of any other."""
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    return {
        "trajectory": flips.trajectory_subject(tmp_path_factory.mktemp("trajectory")),
        "result": flips.result_subject(tmp_path_factory.mktemp("result")),
        "compressed": flips.trajectory_subject(tmp_path_factory.mktemp("compressed"), compressed=True),
    }


@pytest.fixture(scope="module")
def foreign(subjects: dict[str, Subject]) -> dict[str, Path]:
    """Whole stores of the same shape whose files must not be taken for ours."""
    folder = {name: subject.path.parent for name, subject in subjects.items()}
    return {
        "trajectory": flips.foreign_store(folder["trajectory"]),
        "result": flips.fit(folder["result"], "foreign.zarr", seed=5)[0],
    }


@pytest.fixture(params=KINDS_OF_STORE)
def subject(subjects: dict[str, Subject], request: pytest.FixtureRequest) -> Iterator[Subject]:
    """The store as it was made, before and after."""
    found = subjects[request.param]
    yield found
    assert found.verify(found.path).damaged == [], "a test did not put back what it damaged"


def check_nothing_is_silent(tally: Tally, record: Record) -> None:
    record("damages", str(tally))
    print(tally)
    assert tally.silent == []
    assert tally.unnamed == [], "verify does not name the file"
    assert tally.unseen_by_quick == [], "quick verify does not name the file"


# ---- bits ---------------------------------------------------------------------------------------------


def flip_documents(subject: Subject, per_document: int | None) -> Tally:
    """So many bits of every document; every one for None."""
    tally = Tally()
    for i, file in enumerate(subject.documents):
        n_bits = 8 * file.stat().st_size
        bits = range(n_bits) if per_document is None else _some_bits(n_bits, per_document, i)
        flips.flip_each(subject, file, bits, tally)
    return tally


def _some_bits(n_bits: int, count: int, seed: int) -> list[int]:
    chosen = np.random.default_rng(seed).choice(n_bits, count, replace=False).tolist()
    return sorted({0, n_bits - 1, *chosen})


def flip_chunks(subject: Subject, per_kib: int, *, every_door: bool = False) -> Tally:
    tally = Tally()
    for i, file in enumerate(subject.chunks):
        size = file.stat().st_size
        bits = flips.bits_per_kib(size, per_kib, i)
        flips.flip_each(subject, file, bits, tally, every_door=every_door)
        assert tally.per_file[str(file.relative_to(subject.path))] >= -(-size // 1024)
    return tally


def test_a_flipped_bit_of_a_document_is_never_silent(subject: Subject, record_property: Record) -> None:
    tally = flip_documents(subject, BITS_PER_DOCUMENT)
    assert tally.tried >= BITS_PER_DOCUMENT * len(subject.documents)
    check_nothing_is_silent(tally, record_property)


@every_kind
def test_a_flipped_bit_of_every_kib_of_every_chunk_is_never_silent(
    subject: Subject, record_property: Record
) -> None:
    tally = flip_chunks(subject, 1)
    assert len(tally.per_file) == len(subject.chunks)
    assert tally.refused == tally.tried, "a chunk that no door reads"
    check_nothing_is_silent(tally, record_property)


@pytest.mark.long
def test_every_flipped_bit_of_every_document_is_seen(subject: Subject, record_property: Record) -> None:
    tally = flip_documents(subject, None)
    assert tally.tried == sum(8 * file.stat().st_size for file in subject.documents)
    check_nothing_is_silent(tally, record_property)


@pytest.mark.long
@every_kind
def test_sixteen_flipped_bits_of_every_kib_of_every_chunk_are_seen(
    subject: Subject, record_property: Record
) -> None:
    tally = flip_chunks(subject, 16, every_door=True)
    assert tally.refused == tally.tried
    check_nothing_is_silent(tally, record_property)


def test_a_flipped_bit_of_what_no_row_lies_in_is_damage_too(subject: Subject) -> None:
    """Padding of a last chunk, and the slots of snapshots that are still to come."""
    tally = Tally()
    for file in subject.chunks:
        used = _bytes_used(subject, file)
        size = file.stat().st_size - fmt.CRC_BYTES
        if used < size:
            flips.flip_each(subject, file, [8 * used, 4 * (used + size), 8 * size - 1], tally)
    assert tally.tried >= 9
    assert (tally.silent, tally.unnamed) == ([], [])
    assert tally.refused == tally.tried


def _bytes_used(subject: Subject, file: Path) -> int:
    """Bytes of a chunk that hold numbers; what lies beyond them is padding."""
    whole = file.stat().st_size - fmt.CRC_BYTES
    name, index = file.parent.name, file.name.split(".")
    if name in (fmt.STEP, "loss"):
        return 8 * len(STEPS)
    if name == fmt.WEIGHTS and index[1] == str(N_CHUNKS - 1):
        return whole - 4 * (N_CHUNKS * ROWS - N)
    if name in fmt.RESULT_ROWS and index[1] == str(N_CHUNKS - 1):
        itemsize = np.dtype(fmt.RESULT_ROWS[name][0]).itemsize
        return itemsize * (N - (N_CHUNKS - 1) * ROWS)
    return whole


def test_a_flipped_bit_that_spells_the_same_number_otherwise_is_damage(tmp_path: Path) -> None:
    """1e-05 and 1E-05 are one bit apart; nobody but a damaged disk writes the other."""
    file = tmp_path / fmt.DOCUMENT
    file.write_bytes(fmt.encode(fmt.group_document({"cmdgpu": fmt.own("result", metrics={"mse": 1e-05})})))
    fmt.read_document(file, "group", "result")
    flip_bit(file, 8 * file.read_bytes().index(b"e-05") + 5)
    assert b"1E-05" in file.read_bytes()
    with pytest.raises(StoreCorrupt):
        fmt.read_document(file, "group", "result")


# ---- files ----------------------------------------------------------------------------------------------


@every_kind
def test_a_file_that_is_not_what_it_was_is_never_silent(subject: Subject, record_property: Record) -> None:
    """Empty, cut, longer, zeroed, gone; a directory, a FIFO, a link in its place; of every array a chunk."""
    tally = Tally()
    files = subject.documents + [last for array in _arrays(subject) for last in _in(subject, array)[-1:]]
    flips.damage_each(subject, files, tally)
    assert tally.tried == len(flips.KINDS) * len(files)
    check_nothing_is_silent(tally, record_property)


@pytest.mark.long
@every_kind
def test_no_file_at_all_can_become_something_else_in_silence(
    subject: Subject, record_property: Record
) -> None:
    tally = Tally()
    flips.damage_each(subject, subject.files, tally, every_door=True)
    assert tally.tried == len(flips.KINDS) * len(subject.files)
    check_nothing_is_silent(tally, record_property)


def swaps(subject: Subject) -> list[tuple[Path, Path]]:
    """Pairs of chunks: within a column or unit, across them, across arrays."""
    pairs: list[tuple[Path, Path]] = []
    for array in _arrays(subject):
        pairs += itertools.combinations(_in(subject, array), 2)
    pairs += itertools.combinations([_in(subject, array)[0] for array in _arrays(subject)], 2)
    return [(a, b) for a, b in pairs if a.read_bytes() != b.read_bytes()]


def _arrays(subject: Subject) -> list[Path]:
    return sorted({file.parent for file in subject.chunks})


def _in(subject: Subject, array: Path) -> list[Path]:
    return [file for file in subject.chunks if file.parent == array]


@every_kind
def test_two_chunks_that_changed_places_are_never_silent(subject: Subject, record_property: Record) -> None:
    tally = Tally()
    doors = frozenset(subject.doors)
    for turn, (a, b) in enumerate(swaps(subject)):
        with flips.put_back(a, b):
            swap_files(a, b)
            found = flips.look(subject, flips.spared(doors, turn))
            tally.count(subject, a, f"swapped with {b.name}", found, other=b)
    assert tally.tried >= 80
    assert tally.refused == tally.tried
    check_nothing_is_silent(tally, record_property)


_SOME_ARRAYS: Final = (
    "run.zarr",
    "out.zarr",
    fmt.WEIGHTS,
    fmt.STEP,
    fmt.SKETCH,
    "references",
    "mode",
    "a",
    "done",
)


def test_a_document_in_the_place_of_another_is_never_silent(
    subject: Subject, record_property: Record
) -> None:
    """Each is whole in itself; only that it lies elsewhere is wrong."""
    tally = Tally()
    for a, b in itertools.permutations(subject.documents, 2):
        if a.read_bytes() == b.read_bytes() or b.parent.name not in _SOME_ARRAYS:
            continue
        with flips.put_back(a):
            shutil.copyfile(b, a)
            found = flips.look(subject, flips.doors_of(subject, a))
            tally.count(subject, a, f"replaced by that of {b.parent.name}", found)
    check_nothing_is_silent(tally, record_property)


# ---- other runs, older states ---------------------------------------------------------------------------


def test_a_file_of_another_run_is_never_silent(
    subject: Subject, foreign: dict[str, Path], record_property: Record
) -> None:
    """The same shapes and names, other numbers: only digests tell."""
    other = foreign["trajectory" if (subject.path / fmt.WEIGHTS).exists() else "result"]
    tally = Tally()
    for file in subject.files:
        theirs = other / file.relative_to(subject.path)
        if theirs.read_bytes() == file.read_bytes():
            continue
        with flips.put_back(file):
            shutil.copyfile(theirs, file)
            tally.count(subject, file, "of another run", flips.look(subject))
    assert tally.tried >= 19
    record_property("damages", str(tally))
    assert tally.silent == []


def test_an_older_file_of_the_same_store_is_never_silent(
    subjects: dict[str, Subject], tmp_path: Path, record_property: Record
) -> None:
    """All but the commit file, which is a law of its own."""
    subject, tally = subjects["trajectory"], Tally()
    for state in flips.older_states(tmp_path):
        for file in subject.files:
            old = state / file.relative_to(subject.path)
            is_commit = file == subject.path / fmt.WEIGHTS / fmt.DOCUMENT
            if is_commit or not old.exists() or old.read_bytes() == file.read_bytes():
                continue
            with flips.put_back(file):
                shutil.copyfile(old, file)
                tally.count(subject, file, f"of {state.name}", flips.look(subject))
    assert tally.tried >= 15
    assert tally.refused == tally.tried
    check_nothing_is_silent(tally, record_property)


@pytest.mark.parametrize("back", range(1, len(STEPS)))
def test_an_older_commit_file_is_an_older_state_and_from_two_snapshots_back_an_error(
    tmp_path: Path, back: int
) -> None:
    """One snapshot back is the state of a killed append. Further back the chunks beyond the edge tell."""
    states = flips.older_states(tmp_path)
    store, left = tmp_path / "old.zarr", len(STEPS) - back
    shutil.copyfile(states[left - 1] / fmt.WEIGHTS / fmt.DOCUMENT, store / fmt.WEIGHTS / fmt.DOCUMENT)
    traj = Trajectory.open(store)
    assert traj.steps.tolist() == list(STEPS[:left])
    for t, step in enumerate(STEPS[:left]):
        assert np.array_equal(traj[:, t], values_at(step)), "not the older state"
    full, quick = verify_store(store).damaged, verify_store(store, quick=True).damaged
    assert full == quick
    newer = sorted((store / fmt.WEIGHTS).glob(f"c.*.{len(STEPS) - 1}"))
    if back == 1:
        assert full == []
        Journal.open(store).close()
        assert not any(file.exists() for file in newer), "a killed append's chunks are taken away"
        return
    assert {damage.file for damage in full} >= set(map(str, newer))
    for door in (Journal.open, Recorder):
        with pytest.raises(StoreCorrupt, match="an older") as refused:
            door(store)
        assert refused.value.hint is not None
    assert all(file.exists() for file in newer), "the newer snapshots must survive"


def test_the_document_of_a_running_fit_in_the_place_of_the_finished_one_is_an_error(
    tmp_path: Path, subjects: dict[str, Subject]
) -> None:
    folder = Path(shutil.copytree(subjects["result"].path.parent, tmp_path / "copy"))
    out, running = flips.fit(folder, "new.zarr")
    assert CMD.load(out).n_modes_ == 3
    (out / fmt.DOCUMENT).write_bytes(running)
    for door in flips.RESULT_DOORS.values():
        if door is not flips.RESULT_DOORS["its description"]:  # it says that it is not finished
            with pytest.raises(CmdgpuError, match="not finished"):
                door(out)


# ---- readers that are wrong -----------------------------------------------------------------------------


def _flips(subject: Subject, files: list[Path]) -> Iterator[tuple[Path, str, Callable[[], object]]]:
    for file in files:
        for bit in _some_bits(8 * file.stat().st_size, 40, 1):
            yield file, f"bit {bit}", lambda file=file, bit=bit: flip_bit(file, bit)


def _swaps(files: list[Path]) -> Iterator[tuple[Path, str, Callable[[], object]]]:
    for a, b in itertools.combinations(files, 2):
        yield a, f"swapped with {b.name}", lambda a=a, b=b: swap_files(a, b)


def _kinds(files: list[Path]) -> Iterator[tuple[Path, str, Callable[[], object]]]:
    for file in files:
        for kind in ("deleted", "a directory", "a byte long", "a symbolic link"):
            yield file, kind, lambda file=file, kind=kind: flips.KINDS[kind](file)


Damages = Callable[[Subject], Iterator[tuple[Path, str, Callable[[], object]]]]
CAUGHT_BY: Final[dict[str, tuple[str, Damages]]] = {
    "I: no self-digest": ("trajectory", lambda s: _flips(s, s.documents)),
    "J: no digest of a column": ("trajectory", lambda s: _swaps(_in(s, s.path / fmt.WEIGHTS))),
    "K: no size, no type": ("trajectory", lambda s: _kinds(_in(s, s.path / fmt.WEIGHTS))),
    "M: no CRC": ("trajectory", lambda s: _flips(s, _in(s, s.path / fmt.WEIGHTS))),
    "M: no CRC of what is compressed": ("compressed", lambda s: _flips(s, _in(s, s.path / fmt.WEIGHTS))),
    "no done record": ("result", lambda s: _swaps(_in(s, s.path / "a"))),
    "no CRC of a unit": ("result", lambda s: _flips(s, _in(s, s.path / "a"))),
}


@pytest.mark.parametrize("mutant", flips.MUTANTS)
def test_a_reader_without_one_of_its_checks_is_caught(
    subjects: dict[str, Subject], mutant: str, record_property: Record
) -> None:
    """Or the sweeps above would prove nothing."""
    kind, damages = CAUGHT_BY[mutant]
    subject = subjects[kind]
    assert flips.first_silent(subject, itertools.islice(damages(subject), 6)) is None, "without the mutant"
    with flips.MUTANTS[mutant]():
        silent = flips.first_silent(subject, damages(subject))
    record_property("silent", silent)
    assert silent is not None, "this reader lacks a check, and nobody noticed"
    assert subject.verify(subject.path).damaged == []


def test_the_sweeps_know_every_array() -> None:
    """A new array must not stay outside of what is damaged."""
    known = {*MODE_ARRAYS, *UNIT_ARRAYS, DONE}
    assert known == {
        "references", "reference_row", "sample_row", "sample_mode", "sample", "linkage",
        "mode", "a", "b", "correlation", "segment_stats", "unit_hist", "done",
    }  # fmt: skip
