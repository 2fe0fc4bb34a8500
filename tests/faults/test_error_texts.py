"""Laws of what a person reads: where it is, what is wrong with it, what to do; in text and in ``--json``."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from cmdgpu.decomposition import CMD
from cmdgpu.errors import CmdgpuError
from cmdgpu.results.ledger import DONE
from cmdgpu.store import format as fmt
from cmdgpu.store.journal import Journal
from cmdgpu.store.verification import Damage
from cmdgpu.trajectory import Trajectory
from tests.faults import flips, hostile
from tests.faults.flips import KINDS, flipped
from tests.harness import Ended, run_cli
from tests.verbs import ROWS, STEPS, append, build_store, swap_files

T: Final = 2


def _flip_a_bit(file: Path) -> None:
    file.write_bytes(flipped(file.read_bytes(), 77))


DAMAGES: Final[dict[str, Callable[[Path], object]]] = {**KINDS, "a bit flipped": _flip_a_bit}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile.make_bases(tmp_path_factory.mktemp("texts"))


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "copy"))


# ---- errors ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A file of a store, and how it is met."""

    file: str
    tensor: str | None = None
    step: int | None = None


def use_trajectory(path: Path) -> None:
    traj = Trajectory.open(path)
    np.asarray(traj[:, :])
    traj.read_rows(np.arange(5))


def use_result(path: Path) -> None:
    cmd = CMD.load(path)
    for rows in (cmd.labels_, cmd.a_, cmd.b_, cmd.correlation_):
        np.asarray(rows)


def check_text(error: CmdgpuError, file: Path, place: Place) -> None:
    """The file or what vouches for it, the tensor, the step, the problem; one line that can be shown."""
    text = str(error)
    assert hostile.is_printable(text) and len(text) <= hostile.LONGEST_TEXT
    assert error.file is not None and text.startswith(error.file)
    assert flips.is_named(file, [error.file], flips.vouchers(file)), "not where it is"
    assert error.step == place.step
    if error.file in (str(file), str(file.parent)):
        assert error.tensor == place.tensor
    else:  # which chunk of the column or unit it is, nobody can tell
        assert error.tensor is not None and error.tensor.startswith("embed.weight")
    for part in (error.tensor, None if place.step is None else f"step {place.step}", error.message):
        assert part is None or part in text
    assert len(error.message) >= 8
    assert error.hint is None or text.endswith(f"; {error.hint}")


TRAJECTORY_PLACES: Final = (
    Place("weights/c.1.2", "embed.weight +1", STEPS[T]),
    Place("sketch/c.0.2", None, STEPS[T]),
    Place("step/c.0"),
    Place("loss/c.0"),
    Place("sketch_row/c.0"),
    Place("zarr.json"),
    Place("weights/zarr.json"),
    Place("step/zarr.json"),
    Place("sketch/zarr.json"),
)
RESULT_PLACES: Final = (
    Place("a/c.1", "embed.weight +1"),
    Place("segment_stats/c.1.0.0.0", "embed.weight +1"),
    Place("done/c.1.0", "embed.weight +1"),
    Place("references/c.0.0"),
    Place("linkage/c.0.0"),
    Place("references/zarr.json"),
    Place("zarr.json"),
)


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("place", TRAJECTORY_PLACES, ids=lambda place: place.file)
def test_an_error_of_a_trajectory_says_where_what_and_what_to_do(
    folder: Path, place: Place, how: str
) -> None:
    file = folder / "run.zarr" / place.file
    DAMAGES[how](file)
    with pytest.raises(CmdgpuError) as refused:
        use_trajectory(folder / "run.zarr")
    check_text(refused.value, file, place)


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("place", RESULT_PLACES, ids=lambda place: place.file)
def test_an_error_of_a_result_says_where_what_and_what_to_do(folder: Path, place: Place, how: str) -> None:
    file = folder / "out.zarr" / place.file
    DAMAGES[how](file)
    with pytest.raises(CmdgpuError) as refused:
        use_result(folder / "out.zarr")
    check_text(refused.value, file, place)


@pytest.mark.parametrize("how", ["deleted", "cut in half", "a bit flipped", "a FIFO"])
@pytest.mark.parametrize(
    ("store", "place"),
    [("run.zarr", place) for place in TRAJECTORY_PLACES] + [("out.zarr", place) for place in RESULT_PLACES],
    ids=lambda value: value if isinstance(value, str) else value.file,
)
def test_an_error_says_what_to_do(folder: Path, store: str, place: Place, how: str) -> None:
    DAMAGES[how](folder / store / place.file)
    with pytest.raises(CmdgpuError) as refused:
        (use_trajectory if store == "run.zarr" else use_result)(folder / store)
    assert refused.value.hint, f"no remedy: {refused.value}"


def test_what_only_a_digest_can_tell_names_the_column_or_the_unit(folder: Path) -> None:
    weights, done = folder / "run.zarr" / fmt.WEIGHTS, folder / "out.zarr" / DONE
    swap_files(weights / "c.0.1", weights / "c.0.2")
    with pytest.raises(CmdgpuError) as refused:
        use_trajectory(folder / "run.zarr")
    check_text(refused.value, weights / "c.*.1", Place("", "embed.weight +3", STEPS[1]))
    swap_files(folder / "out.zarr" / "a" / "c.0", folder / "out.zarr" / "a" / "c.1")
    with pytest.raises(CmdgpuError) as refused:
        use_result(folder / "out.zarr")
    check_text(refused.value, done / "c.0.0", Place("", "embed.weight"))
    assert refused.value.hint


def test_an_older_commit_says_what_to_put_back(folder: Path) -> None:
    store = build_store(folder / "old.zarr")
    older = (store / fmt.WEIGHTS / fmt.DOCUMENT).read_bytes()
    journal = Journal.open(store)
    for step in (100, 200):
        append(journal, step, loss=1.0)
    journal.close()
    (store / fmt.WEIGHTS / fmt.DOCUMENT).write_bytes(older)
    with pytest.raises(CmdgpuError) as refused:
        Journal.open(store)
    assert Path(str(refused.value.file)).name == "c.0.4"
    assert "nothing was deleted" in str(refused.value) and "weights/zarr.json" in str(refused.value.hint)


# ---- commands -------------------------------------------------------------------------------------------


def check_json_error(ended: Ended, error: CmdgpuError) -> None:
    """The fields of the same error, and its line on stderr."""
    assert ended.code == 1
    found = ended.json
    assert found["ok"] is False
    assert found["error"] == {
        "kind": type(error).__name__,
        "message": error.message,
        "file": error.file,
        "tensor": error.tensor,
        "step": error.step,
        "hint": error.hint,
    }
    assert ended.err.splitlines()[-1] == f"error: {error}"


@pytest.mark.parametrize("how", ["deleted", "a byte short", "a bit flipped", "a FIFO"])
@pytest.mark.parametrize("place", TRAJECTORY_PLACES[2:], ids=lambda place: place.file)
def test_inspect_says_it_in_json_and_ends_with_1(folder: Path, place: Place, how: str) -> None:
    store = folder / "run.zarr"
    DAMAGES[how](store / place.file)
    ended = run_cli("inspect", store, "--json")
    with pytest.raises(CmdgpuError) as refused:
        Trajectory.open(store)
    if place.file == "zarr.json":  # what kind of store it is, is asked first
        assert ended.code == 1 and ended.json["error"]["file"] in (str(store), str(store / place.file))
        return
    check_json_error(ended, refused.value)


@pytest.mark.parametrize("how", ["deleted", "a byte short", "a bit flipped", "a FIFO"])
def test_fit_says_it_in_json_and_ends_with_1(folder: Path, how: str) -> None:
    store = folder / "run.zarr"
    DAMAGES[how](store / fmt.WEIGHTS / "c.1.2")
    ended = run_cli(
        "fit", store, "-o", folder / "new.zarr", "--json", "--samples", "20", "--device", "cpu", "-q"
    )
    assert ended.code == 1
    error = ended.json["error"]
    assert (error["kind"], error["file"]) == ("StoreCorrupt", str(store / fmt.WEIGHTS / "c.1.2"))
    assert (error["tensor"], error["step"]) == ("embed.weight +1", STEPS[T])
    assert "verify" in error["hint"] and f"rows {ROWS}..{2 * ROWS - 1} of weights" in error["message"]


@pytest.mark.parametrize("how", ["deleted", "a byte short", "a bit flipped", "a FIFO"])
@pytest.mark.parametrize(
    ("store", "file", "expected"),
    [
        (
            "run.zarr",
            "weights/c.1.2",
            {"array": "weights", "step": STEPS[T], "rows": [256, 511], "tensors": "embed.weight +1"},
        ),
        ("run.zarr", "sketch/c.0.1", {"array": "sketch", "step": STEPS[1], "rows": None, "tensors": None}),
        ("run.zarr", "loss/c.0", {"array": "loss", "step": None, "rows": None, "tensors": None}),
        ("run.zarr", "loss/zarr.json", {"array": "loss", "step": None, "rows": None, "tensors": None}),
        ("out.zarr", "a/c.1", {"array": "a", "step": None, "rows": [256, 511], "tensors": "embed.weight +1"}),
        ("out.zarr", "mode/zarr.json", {"array": "mode", "step": None, "rows": None, "tensors": None}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_verify_lists_it_in_json_and_ends_with_1(
    folder: Path, store: str, file: str, expected: dict[str, Any], how: str
) -> None:
    place = folder / store / file
    DAMAGES[how](place)
    ended = run_cli("verify", folder / store, "--json")
    assert ended.code == 1 and ended.json["ok"] is False
    (found,) = ended.json["damaged"]
    assert {key: found[key] for key in expected} == expected
    assert found["file"] == str(place) and len(found["problem"]) >= 8
    text = run_cli("verify", folder / store)
    assert text.code == 1
    line = next(line for line in text.out.splitlines() if line.startswith("damaged"))
    for part in (str(place), found["problem"]):
        assert part in line
    if expected["step"] is not None:
        assert f"step {expected['step']}" in line
    if expected["rows"] is not None:
        assert f"rows {expected['rows'][0]}..{expected['rows'][1]}" in line and expected["tensors"] in line


def test_verify_says_what_to_do(folder: Path) -> None:
    """A list of damage without a remedy leaves a person alone."""
    (folder / "run.zarr" / fmt.WEIGHTS / "c.1.2").unlink()
    (folder / "out.zarr" / "a" / "c.1").unlink()
    recorded, fitted = (run_cli("verify", folder / name) for name in ("run.zarr", "out.zarr"))
    assert "repair" in recorded.out + recorded.err
    assert "fit again" in fitted.out + fitted.err


def test_a_damage_without_rows_or_tensors_is_still_a_line() -> None:
    assert str(Damage("f", "step", "is missing")) == "f  is missing"


def _unreadable(folder: Path) -> dict[str, Callable[[], object]]:
    return {
        "nothing here": lambda: Trajectory.open(folder / "absent.zarr"),
        "a file": lambda: Trajectory.open(folder / "run.zarr" / fmt.DOCUMENT),
        "a folder": lambda: Trajectory.open(folder),
        "a result": lambda: Trajectory.open(folder / "out.zarr"),
        "a trajectory": lambda: CMD.load(folder / "run.zarr"),
    }


@pytest.mark.parametrize("what", ["nothing here", "a file", "a folder", "a result", "a trajectory"])
def test_what_is_no_store_is_named(folder: Path, what: str) -> None:
    with pytest.raises(CmdgpuError) as refused:
        _unreadable(folder)[what]()
    assert refused.value.file is not None and refused.value.file.startswith(str(folder))
    assert refused.value.hint or what in ("a result", "a trajectory")
