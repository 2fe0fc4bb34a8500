"""Laws for stores that somebody forged: a typed error of one line, no hang, no memory, nothing outside.

``hostile`` holds the corpus and the process in which each store is opened.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from torch import nn

from cmdgpu.errors import CmdgpuError
from cmdgpu.recording import Recorder
from cmdgpu.store.journal import Journal
from cmdgpu.store.parameter_map import ParameterMap, Piece, TensorEntry
from cmdgpu.trajectory import Trajectory
from tests.faults import hostile
from tests.faults.hostile import (
    COMPRESSED,
    LARGE_TRAJECTORIES,
    RESULTS,
    TRAJECTORIES,
    Case,
    Seen,
    Zygote,
)
from tests.verbs import check_same_bits, float_tensors

Record = Callable[[str, object], None]

OPENING: Final = {
    "run.zarr": ("open", "verify", "fit"),
    "zstd.zarr": ("open", "verify", "fit"),
    "out.zarr": ("load",),
}
"""Doors that a store must be refused at when nothing about it can be read."""


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as found:
        yield found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile.make_bases(tmp_path_factory.mktemp("hostile"))


def look(zygote: Zygote, base: Path, folder: Path, name: str, case: Case) -> dict[str, Seen]:
    """Through every door; those that may write into the store come last."""
    doors = hostile.BASES[name]
    with hostile.forged(base, folder / "case", name, case) as store:
        out = folder / "out"
        out.mkdir()
        return zygote.ask(doors, store, out)


def check(seen: dict[str, Seen], name: str, case: Case, record: Record) -> None:
    record("peak_bytes", max(found.peak for found in seen.values()))
    problems = [f"{door}: {problem}" for door, found in seen.items() for problem in found.problems]
    assert problems == []
    if not case.is_readable:
        believed = [door for door in OPENING[name] if seen[door].kind == "ok"]
        assert believed == [], "was believed"


@pytest.mark.parametrize("name", hostile.BASES)
def test_a_sound_store_passes_every_door_under_these_limits(
    zygote: Zygote, base: Path, tmp_path: Path, name: str, record_property: Record
) -> None:
    """Or everything below would pass for want of room."""
    seen = look(zygote, base, tmp_path, name, Case(lambda path: None, is_readable=True))
    check(seen, name, Case(lambda path: None, is_readable=True), record_property)
    assert {door: found.kind for door, found in seen.items() if found.kind != "ok"} == {}


def _some(cases: dict[str, Case]) -> list[Any]:
    """Of what can lie in the place of a file the FIFO and the link stand for all in the default run."""
    rest = ("a device as", "a link to a device as", "a link to itself as")
    return [pytest.param(name, marks=[pytest.mark.long] if name.startswith(rest) else []) for name in cases]


@pytest.mark.parametrize("name", _some(TRAJECTORIES))
def test_a_forged_trajectory_is_refused_in_one_line(
    zygote: Zygote, base: Path, tmp_path: Path, name: str, record_property: Record
) -> None:
    case = TRAJECTORIES[name]
    check(look(zygote, base, tmp_path, "run.zarr", case), "run.zarr", case, record_property)


@pytest.mark.parametrize("name", COMPRESSED)
def test_a_forged_compressed_trajectory_is_refused_in_one_line(
    zygote: Zygote, base: Path, tmp_path: Path, name: str, record_property: Record
) -> None:
    """Bombs and everything that is not exactly one frame of a chunk; the commit vouches for each."""
    case = COMPRESSED[name]
    check(look(zygote, base, tmp_path, "zstd.zarr", case), "zstd.zarr", case, record_property)


@pytest.mark.parametrize("name", _some(RESULTS))
def test_a_forged_result_is_refused_in_one_line(
    zygote: Zygote, base: Path, tmp_path: Path, name: str, record_property: Record
) -> None:
    case = RESULTS[name]
    check(look(zygote, base, tmp_path, "out.zarr", case), "out.zarr", case, record_property)


@pytest.mark.long
@pytest.mark.parametrize("name", LARGE_TRAJECTORIES)
def test_a_document_of_many_megabytes_is_refused_in_one_line(
    zygote: Zygote, base: Path, tmp_path: Path, name: str, record_property: Record
) -> None:
    case = LARGE_TRAJECTORIES[name]
    check(look(zygote, base, tmp_path, "run.zarr", case), "run.zarr", case, record_property)


def test_a_recorder_never_writes_rows_where_the_store_has_others(tmp_path: Path) -> None:
    """The same tensors in other rows, and a hole: what is read must be what was recorded, or refused."""
    model = nn.Linear(3, 2)
    layout = ParameterMap(
        (
            TensorEntry("weight", "parameter", "float32", (2, 3), (Piece((0, 0), (2, 3), 4),)),
            TensorEntry("bias", "parameter", "float32", (2,), (Piece((0,), (2,), 0),)),
        ),
        holes=((2, 4),),
    )
    Journal.create(
        tmp_path / "run.zarr", layout, dtype="float32", rows=256, unit="step", sketch_rows=None
    ).close()
    with contextlib.suppress(CmdgpuError), Recorder(tmp_path / "run.zarr") as recorder:
        recorder.record(model, 1)
    found = Trajectory.open(tmp_path / "run.zarr")
    if len(found.steps):
        check_same_bits(found.state_dict(1), float_tensors(model))


MUTANTS: Final = (
    ("T: documents of any type", "a FIFO as zarr.json", "hang"),
    ("T: documents of any type", "a link out of the store as zarr.json", "outside"),
    ("T: chunks of any type", "a FIFO as weights/c.1.2", "hang"),
    ("T: chunks of any type", "a link out of the store as step/c.0", "outside"),
    ("U: memory from metadata", "a chunk of a gigabyte for a few rows", "MemoryError"),
    ("V: frames of any size", "a gigabyte in 33 kB where 256 KiB may be", "MemoryError"),
)
"""The wrong step, a store of the corpus, and what it must be seen by."""


@pytest.mark.parametrize(("mutant", "name", "sign"), MUTANTS)
def test_a_reader_without_one_of_its_checks_is_caught(
    zygote: Zygote, base: Path, tmp_path: Path, mutant: str, name: str, sign: str
) -> None:
    """Or hangs, escapes and memory would go unseen."""
    of = "run.zarr" if name in TRAJECTORIES else "zstd.zarr"
    with hostile.forged(base, tmp_path / "case", of, {**COMPRESSED, **TRAJECTORIES}[name]) as store:
        out = tmp_path / "out"
        out.mkdir()
        assert zygote.ask(["open"], store, out)["open"].problems == []
        shutil.rmtree(out)
        out.mkdir()
        seen = zygote.ask(["open"], store, out, seconds=2, mutant=mutant)["open"]
    assert any(sign in problem for problem in seen.problems), seen


def test_every_mutant_is_used() -> None:
    assert {mutant for mutant, _, _ in MUTANTS} == set(hostile.MUTANTS)
