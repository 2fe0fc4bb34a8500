"""Laws of a result on disk: complete or not there, bound to its run, never damaged, resumed to the bit."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cmdgpu.decomposition import CMD
from cmdgpu.errors import (
    CmdgpuError,
    CmdgpuWarning,
    DurabilityUnknown,
    NotAStore,
    StoreCorrupt,
    StoreExists,
    UsageError,
    WriteFailed,
)
from cmdgpu.fitting import Settings
from cmdgpu.notation import AnyArray
from cmdgpu.results import (
    Frame,
    MemoryWriter,
    ModeSet,
    Provenance,
    Result,
    StoredWriter,
    UnitRows,
    begin_result,
    describe_result,
    kind_of,
    open_result,
    partials_of,
    progress_of,
    require_result,
    verify_result,
)
from cmdgpu.statistics import FIELDS, N_BINS
from cmdgpu.store import format as fmt
from cmdgpu.trajectory import Trajectory
from tests.faults.disk import FAULTS, Died, Disk, Fault
from tests.harness import (
    StopAfter,
    Stopped,
    Ticks,
    fit_bits,
    one_tensor,
    planted,
    row_bits,
    walks,
    write_store,
)
from tests.verbs import (
    LAYOUT,
    edit_document,
    flip_bit,
    leftovers,
    plain_array,
    replace_by_directory,
    replace_by_fifo,
    replace_by_symlink,
    swap_files,
    tree_bytes,
    zarr_values,
)

ROWS = 256
UNITS = 4
N = 3 * ROWS + 100
ROW_ARRAYS = ("mode", "a", "b", "correlation")
UNIT_ARRAYS = (*ROW_ARRAYS, "segment_stats", "unit_hist")
MODE_ARRAYS = ("references", "reference_row", "sample_row", "sample_mode", "sample", "linkage")


def work(n_modes: int = 3, **settings: Any) -> CMD:
    return CMD(n_modes=n_modes, n_samples=60, **settings)


@pytest.fixture(scope="module")
def W() -> AnyArray:
    return planted(N, 6, noise=0.2)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory, W: AnyArray) -> Path:
    """A folder with a trajectory and a complete result: s.zarr, out.zarr."""
    folder = tmp_path_factory.mktemp("results")
    work().fit(write_store(folder / "s.zarr", W), out=folder / "out.zarr")
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(pristine, tmp_path / "copy"))


@pytest.fixture
def unit_by_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one unit, whatever the limit."""
    monkeypatch.setattr("cmdgpu.streaming.plan.TARGET_BLOCK_BYTES", 1)


def stop_midway(store: Path, out: Path, cmd: CMD | None = None) -> Path:
    """An unfinished fit with some units done; where it lies."""
    with pytest.raises(Stopped):
        (cmd or work()).fit(Trajectory.open(store), out=out, progress=StopAfter(3))
    (partial,) = partials_of(out)
    done, total = progress_of(partial)
    assert 0 < done < total == UNITS
    return partial


def unit_file(path: Path, name: str, unit: int) -> Path:
    zeros = {"segment_stats": (0, 0, 0), "unit_hist": (0, 0), "done": (0,)}.get(name, ())
    return path / name / fmt.chunk_name(unit, *zeros)


# ---- what lies there ----------------------------------------------------------------------------------


def test_a_result_is_plain_zarr_with_the_numbers_of_the_fit(pristine: Path, W: AnyArray) -> None:
    cmd = CMD.load(pristine / "out.zarr")
    m, t, k = cmd.n_modes_, 6, 60
    expected: dict[str, tuple[tuple[int, ...], str, tuple[str, ...]]] = {
        "references": ((m, t), "float32", ("mode", "snapshot")),
        "reference_row": ((m,), "int64", ("mode",)),
        "sample_row": ((k,), "int64", ("sample",)),
        "sample_mode": ((k,), "int16", ("sample",)),
        "sample": ((k, t), "float32", ("sample", "snapshot")),
        "linkage": ((k - 1, 4), "float64", ("merge", "field")),
        "mode": ((N,), "int16", ("parameter",)),
        **dict.fromkeys(("a", "b", "correlation"), ((N,), "float32", ("parameter",))),
        "segment_stats": (
            (UNITS, 1, len(FIELDS), 2 + m),
            "float64",
            ("unit", "segment", "field", "class"),
        ),
        "unit_hist": ((UNITS, m, N_BINS), "int64", ("unit", "mode", "bin")),
        "done": ((UNITS, 32), "uint8", ("unit", "byte")),
    }
    assert {p.name for p in (pristine / "out.zarr").iterdir()} == {*expected, "zarr.json"}
    for name, (shape, dtype, dims) in expected.items():
        array = plain_array(pristine / "out.zarr", name)
        assert (array.shape, str(array.dtype), array.metadata.dimension_names) == (shape, dtype, dims), name
    for name, mine in zip(ROW_ARRAYS, (cmd.labels_, cmd.a_, cmd.b_, cmd.correlation_), strict=True):
        assert zarr_values(pristine / "out.zarr", name).tobytes() == np.asarray(mine).tobytes()
    assert np.array_equal(zarr_values(pristine / "out.zarr", "references"), W[cmd.reference_rows_])
    assert np.array_equal(zarr_values(pristine / "out.zarr", "sample"), W[cmd.sample_rows_])
    hist = zarr_values(pristine / "out.zarr", "unit_hist")
    assert np.array_equal(hist.sum(axis=0), cmd.result.totals.histogram)
    document = json.loads((pristine / "out.zarr" / "zarr.json").read_bytes())
    assert "consolidated_metadata" not in document
    assert leftovers(pristine) == []


def test_the_document_says_where_the_numbers_come_from(pristine: Path) -> None:
    head = json.loads((pristine / "out.zarr" / "zarr.json").read_bytes())["attributes"]["cmdgpu"]
    assert head["status"] == "complete" and head["kind"] == "result" and head["format"] == 1
    assert head["origin"] == "s.zarr" and head["steps"] == head["source"]["steps"] == list(range(6))
    assert head["units"] == {"rows": ROWS, "count": UNITS}
    assert head["config"]["n_modes"] == 3 and head["config"]["random_state"] == 0
    assert set(head["code"]) >= {"cmdgpu", "torch", "numpy", "operation", "device_class", "triton"}
    assert sum(head["metrics"]["mode_sizes"]) == N
    said = describe_result(pristine / "out.zarr")
    assert (said.status, said.units_done, said.n_modes) == ("complete", UNITS, 3)
    assert said.fingerprint == head["fingerprint"] and said.metrics == head["metrics"]


def test_two_fits_of_the_same_settings_write_the_same_bytes(folder: Path) -> None:
    source = Trajectory.open(folder / "s.zarr")
    work().fit(source, out=folder / "again.zarr")
    assert tree_bytes(folder / "again.zarr") == tree_bytes(folder / "out.zarr")


def test_on_disk_equals_in_memory(pristine: Path) -> None:
    source = Trajectory.open(pristine / "s.zarr")
    assert fit_bits(work().fit(source)) == fit_bits(CMD.load(pristine / "out.zarr"))


# ---- rows on disk read like an array ----------------------------------------------------------------------


@st.composite
def indices(draw: st.DrawFn) -> Any:
    edge = st.none() | st.integers(-N - 3, N + 3)
    kind = draw(st.sampled_from(["slice", "int", "array", "mask"]))
    if kind == "slice":
        step = draw(st.none() | st.integers(-300, 300).filter(bool))
        return slice(draw(edge), draw(edge), step)
    if kind == "int":
        return draw(st.integers(-N, N - 1))
    if kind == "array":
        return np.array(draw(st.lists(st.integers(-N, N - 1), max_size=30)), dtype=np.int64)
    return np.random.default_rng(draw(st.integers(0, 99))).random(N) < draw(st.floats(0, 1))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(index=indices())
def test_rows_on_disk_are_indexed_like_an_array(pristine: Path, index: Any) -> None:
    rows = open_result(pristine / "out.zarr").a
    whole = np.asarray(rows)
    found, expected = rows[index], whole[index]
    assert np.array_equal(found, expected) and np.shape(found) == np.shape(expected)
    assert found.dtype == expected.dtype


def test_only_the_units_touched_are_read(folder: Path) -> None:
    for name in ROW_ARRAYS:
        flip_bit(unit_file(folder / "out.zarr", name, 2), 77)
    cmd = CMD.load(folder / "out.zarr")
    for name, rows in zip(ROW_ARRAYS, (cmd.labels_, cmd.a_, cmd.b_, cmd.correlation_), strict=True):
        assert len(rows[: 2 * ROWS]) == 2 * ROWS and len(rows[3 * ROWS :]) == 100
        with pytest.raises(StoreCorrupt, match=f"rows 512..767 of {name}: crc32c mismatch"):
            _ = rows[2 * ROWS - 1 : 2 * ROWS + 1]


def test_rows_outside_are_refused_and_never_copied_in_part(pristine: Path) -> None:
    rows = open_result(pristine / "out.zarr").b
    assert (rows.shape, rows.dtype, len(rows)) == ((N,), np.float32, N)
    for index in (N, -N - 1, np.array([0, N])):
        with pytest.raises(UsageError, match=f"outside of {N}"):
            _ = rows[index]
    with pytest.raises(ValueError, match="copy"):
        np.array(rows, copy=False)
    assert np.asarray(rows, dtype=np.float64).dtype == np.float64


# ---- damage is never data -----------------------------------------------------------------------------


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "flipped": lambda file: flip_bit(file, 100),
    "crc flipped": lambda file: flip_bit(file, 8 * file.stat().st_size - 1),
    "cut": truncate,
    "emptied": lambda file: file.write_bytes(b""),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "missing": Path.unlink,
    "a directory": replace_by_directory,
    "a fifo": replace_by_fifo,
    "a symbolic link": replace_by_symlink,
}


def use_everything(path: Path) -> None:
    cmd = CMD.load(path)
    for rows in (cmd.labels_, cmd.a_, cmd.b_, cmd.correlation_):
        np.asarray(rows)
    assert cmd.metrics_["n_rows"] == N


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", [*UNIT_ARRAYS, "done"])
def test_a_damaged_unit_is_an_error_on_use_and_listed_by_verify(folder: Path, name: str, how: str) -> None:
    out = folder / "out.zarr"
    file = unit_file(out, name, 1)
    DAMAGE[how](file)
    with pytest.raises(StoreCorrupt, match=r"rows 256\.\.511 of") as refused:
        use_everything(out)
    assert refused.value.tensor == "W" and "verify" in str(refused.value.hint)
    damaged = verify_result(out).damaged
    assert [(d.rows, d.tensors) for d in damaged] == [((256, 511), "W")]
    assert Path(damaged[0].file).name == file.name and damaged[0].array in (name, "done")
    if how not in ("flipped",):
        assert len(verify_result(out, quick=True).damaged) == 1


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", MODE_ARRAYS)
def test_damaged_references_and_samples_are_errors_on_opening(folder: Path, name: str, how: str) -> None:
    out = folder / "out.zarr"
    rank = 2 if name in ("references", "sample", "linkage") else 1
    DAMAGE[how](out / name / fmt.chunk_name(*[0] * rank))
    with pytest.raises(StoreCorrupt, match=name):
        CMD.load(out)
    (damage,) = verify_result(out, quick=True).damaged
    assert name in damage.file


@pytest.mark.parametrize("name", ["", *MODE_ARRAYS, *UNIT_ARRAYS, "done"])
def test_every_flip_of_metadata_is_found(folder: Path, name: str) -> None:
    file = folder / "out.zarr" / name / "zarr.json"
    whole = file.read_bytes()
    rng = np.random.default_rng(len(name))
    for bit in rng.choice(8 * len(whole), size=12, replace=False).tolist():
        flip_bit(file, bit)
        try:
            found = [str(damage) for damage in verify_result(folder / "out.zarr", quick=True).damaged]
        except CmdgpuError as error:
            found = [str(error)]
        assert any("zarr.json" in line or "out.zarr" in line for line in found), f"bit {bit} of {name}"
        file.write_bytes(whole)
    assert verify_result(folder / "out.zarr").damaged == []


@pytest.mark.parametrize("name", [*UNIT_ARRAYS, "done"])
def test_chunks_swapped_between_units_are_not_taken(folder: Path, name: str) -> None:
    """Each is whole by its own checksum; only the record ties it to its unit."""
    out = folder / "out.zarr"
    swap_files(unit_file(out, name, 0), unit_file(out, name, 2))
    with pytest.raises(StoreCorrupt, match="not the ones that were fitted"):
        CMD.load(out)
    assert [d.rows for d in verify_result(out).damaged] == [(0, 255), (512, 767)]


def test_a_whole_unit_in_the_place_of_another_is_not_taken(folder: Path) -> None:
    out = folder / "out.zarr"
    for name in (*UNIT_ARRAYS, "done"):
        swap_files(unit_file(out, name, 0), unit_file(out, name, 1))
    with pytest.raises(StoreCorrupt, match="not the ones that were fitted"):
        use_everything(out)


@pytest.mark.parametrize("how", ["another seed", "another selection"])
def test_a_unit_of_another_fit_is_not_taken(folder: Path, how: str) -> None:
    out, other, source = folder / "out.zarr", folder / "other.zarr", Trajectory.open(folder / "s.zarr")
    if how == "another seed":
        work(random_state=5).fit(source, out=other)
    else:
        work().fit(source.sel(steps=[0, 1, 2, 3, 4]), out=other)
    for name in (*UNIT_ARRAYS, "done"):
        shutil.copy(unit_file(other, name, 3), unit_file(out, name, 3))
    with pytest.raises(StoreCorrupt, match="not the ones that were fitted"):
        use_everything(out)
    assert [d.rows for d in verify_result(out).damaged] == [(768, N - 1)]


def test_references_of_another_fit_are_not_taken(folder: Path) -> None:
    out, other = folder / "out.zarr", folder / "other.zarr"
    work(random_state=5).fit(Trajectory.open(folder / "s.zarr"), out=other)
    shutil.copy(other / "references" / "c.0.0", out / "references" / "c.0.0")
    with pytest.raises(StoreCorrupt, match="does not hold the values of this fit"):
        CMD.load(out)


def test_a_forged_plan_makes_every_unit_a_stranger(folder: Path) -> None:
    out = folder / "out.zarr"

    def forge(document: Any) -> None:
        document["attributes"]["cmdgpu"]["fingerprint"] = "0" * 64

    edit_document(out / "zarr.json", forge)
    with pytest.raises(StoreCorrupt, match="not the ones that were fitted"):
        use_everything(out)


def test_a_sound_result_verifies_and_says_what_was_checked(pristine: Path) -> None:
    found, quick = verify_result(pristine / "out.zarr"), verify_result(pristine / "out.zarr", quick=True)
    assert (found.damaged, quick.damaged) == ([], [])
    files = [f for name in (*UNIT_ARRAYS, "done") for f in (pristine / "out.zarr" / name).glob("c.*")]
    assert found.chunks_checked == len(files) == UNITS * 7
    assert (found.bytes_checked, quick.bytes_checked) == (sum(f.stat().st_size for f in files), 0)


@pytest.mark.usefixtures("unit_by_unit")
def test_of_an_unfinished_fit_the_units_that_are_done_are_verified(folder: Path) -> None:
    partial = stop_midway(folder / "s.zarr", folder / "new.zarr")
    done, _ = progress_of(partial)
    found = verify_result(partial)
    assert (found.damaged, found.chunks_checked) == ([], done * 7)
    flip_bit(unit_file(partial, "b", 0), 77)
    assert [damage.array for damage in verify_result(partial).damaged] == ["b"]


# ---- complete, or not there -------------------------------------------------------------------------------


@pytest.mark.usefixtures("unit_by_unit")
def test_the_final_name_is_never_seen_incomplete(folder: Path) -> None:
    out = folder / "new.zarr"

    class Watching(Ticks):
        def advance(self, done_bytes: int) -> None:
            super().advance(done_bytes)
            assert not out.exists()
            assert len(partials_of(out)) == 1

    work().fit(Trajectory.open(folder / "s.zarr"), out=out, progress=Watching())
    assert open_result(out).path == out and partials_of(out) == []


@pytest.mark.usefixtures("unit_by_unit")
def test_every_door_finds_an_unfinished_fit_and_says_how_far_it_is(folder: Path) -> None:
    out = folder / "new.zarr"
    partial = stop_midway(folder / "s.zarr", out)
    done, total = progress_of(partial)
    doors: list[Callable[[Path], object]] = [require_result, open_result, kind_of, describe_result, CMD.load]
    for door in doors:
        with pytest.raises(CmdgpuError, match=f"not finished: {done} of {total} units done; run the same"):
            door(out)
    with pytest.raises(CmdgpuError, match=f"not finished: {done} of {total} units done"):
        open_result(partial)
    said = describe_result(partial)
    assert (said.status, said.units_done, said.metrics) == ("incomplete", done, None)
    assert kind_of(partial) == "result"


def test_a_path_without_a_result_is_refused_in_words(folder: Path) -> None:
    with pytest.raises(UsageError, match="there is nothing here"):
        open_result(folder / "none.zarr")
    (folder / "file").write_text("no store")
    with pytest.raises(NotAStore, match="is no store of cmdgpu"):
        open_result(folder / "file")
    with pytest.raises(NotAStore, match="holds a 'trajectory', not a 'result'"):
        open_result(folder / "s.zarr")
    (folder / "foreign").mkdir()
    (folder / "foreign" / "zarr.json").write_text('{"zarr_format":3,"node_type":"group","attributes":{}}')
    with pytest.raises(NotAStore, match="is no store of cmdgpu"):
        kind_of(folder / "foreign")


def test_names_that_only_look_like_an_unfinished_fit_are_none(tmp_path: Path) -> None:
    out = tmp_path / "a.zarr"
    for name in ("a.zarr.partial", "a.zarr.0123.partial", "aXzarr.0123456789abcdef.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / "a.zarr.0123456789abcdef.partial").write_text("a file")
    assert partials_of(out) == []
    assert partials_of(tmp_path / "missing" / "a.zarr") == []


# ---- the same settings, others, again ---------------------------------------------------------------------


def test_a_complete_fit_is_opened_without_reading_a_chunk(folder: Path) -> None:
    source = Trajectory.open(folder / "s.zarr")
    for array in ("weights", "sketch"):
        for chunk in (folder / "s.zarr" / array).glob("c.*"):
            chunk.unlink()
    before = tree_bytes(folder / "out.zarr")
    for resume in (True, False):
        cmd = work().fit(source, out=folder / "out.zarr", resume=resume)
        assert (cmd.metrics_["bytes_read"], cmd.metrics_["units_resumed"]) == (0, UNITS)
        assert "complete already: nothing was read" in cmd.summary()
    assert tree_bytes(folder / "out.zarr") == before


OTHER: dict[str, tuple[Callable[[], CMD], Callable[[Trajectory], Trajectory], str]] = {
    "modes": (lambda: work(4), lambda t: t, "config n_modes: 3 there, 4 asked"),
    "threshold": (lambda: work(threshold=0.5), lambda t: t, "config n_modes: 3 there, None asked"),
    "seed": (lambda: work(random_state=1), lambda t: t, "config random_state: 0 there, 1 asked"),
    "sampling": (
        lambda: work(sampling="uniform"),
        lambda t: t,
        "config sampling: layer-balanced there, unif",
    ),
    "affinity": (lambda: work(affinity="corr-profile"), lambda t: t, "config affinity: abs-corr there"),
    "samples": (lambda: CMD(3, n_samples=61), lambda t: t, "config n_samples: 60 there, 61 asked"),
    "steps": (work, lambda t: t.sel(stop=5), r"source digest: \w+\.\.\. there, \w+\.\.\. asked"),
}


@pytest.mark.usefixtures("unit_by_unit")
@pytest.mark.parametrize("what", OTHER)
@pytest.mark.parametrize("where", ["at the output", "beside it"])
def test_other_settings_are_refused_by_name(folder: Path, what: str, where: str) -> None:
    make, select, said = OTHER[what]
    source = select(Trajectory.open(folder / "s.zarr"))
    out = folder / "out.zarr"
    if where == "beside it":
        shutil.rmtree(out)
        stop_midway(folder / "s.zarr", out)
    before = tree_bytes(folder)
    with pytest.raises(StoreExists, match=said):
        make().fit(source, out=out)
    assert tree_bytes(folder) == before


@pytest.mark.parametrize("what", ["another version", "another device", "another trajectory"])
def test_what_makes_the_bits_is_part_of_the_settings(
    folder: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    source, said = Trajectory.open(folder / "s.zarr"), "code torch"
    if what == "another version":
        monkeypatch.setattr("torch.__version__", "0.0.1")
    elif what == "another device":
        monkeypatch.setattr("cmdgpu.ops.device_class", lambda device: "cuda Imaginary")  # pyright: ignore
        said = "code device_class: cpu .* there, cuda Imaginary asked"
    else:
        source, said = write_store(folder / "other.zarr", walks(N, 6, seed=8)), "source digest"
    with pytest.raises(StoreExists, match=said):
        work().fit(source, out=folder / "out.zarr")


def test_threads_limits_and_places_are_no_part_of_the_settings(folder: Path) -> None:
    moved = folder / "elsewhere"
    moved.mkdir()
    shutil.move(folder / "s.zarr", moved / "renamed.zarr")
    torch.set_num_threads(torch.get_num_threads() + 1)
    again = work().fit(Trajectory.open(moved / "renamed.zarr"), out=folder / "out.zarr", memory_limit="3GiB")
    assert again.metrics_["bytes_read"] == 0


@pytest.mark.parametrize("what", ["a file", "a folder", "a trajectory", "a dangling link"])
def test_what_is_no_result_is_never_written_over(folder: Path, what: str) -> None:
    out = folder / "taken"
    if what == "a file":
        out.write_text("precious")
    elif what == "a folder":
        out.mkdir()
        (out / "precious").write_text("precious")
    elif what == "a trajectory":
        shutil.copytree(folder / "s.zarr", out)
    else:
        out.symlink_to(folder / "nowhere")
    before = tree_bytes(folder)
    with pytest.raises(StoreExists, match="something else is here; choose another output"):
        work().fit(Trajectory.open(folder / "s.zarr"), out=out, resume=False)
    assert tree_bytes(folder) == before


@pytest.mark.usefixtures("unit_by_unit")
def test_starting_over_throws_every_unfinished_fit_away(folder: Path) -> None:
    out = folder / "new.zarr"
    stop_midway(folder / "s.zarr", out, work(4))
    cmd = work().fit(Trajectory.open(folder / "s.zarr"), out=out, resume=False)
    assert cmd.metrics_["units_resumed"] == 0
    assert partials_of(out) == [] and tree_bytes(out) == tree_bytes(folder / "out.zarr")
    second = folder / "second.zarr"
    stop_midway(folder / "s.zarr", second)
    cmd = work().fit(Trajectory.open(folder / "s.zarr"), out=second, resume=False)
    assert cmd.metrics_["units_resumed"] == 0


def test_an_array_has_no_digest_so_its_fits_are_never_resumed(tmp_path: Path, W: AnyArray) -> None:
    work().fit(W, out=tmp_path / "out.zarr")
    with pytest.raises(StoreExists, match="source token"):
        work().fit(W, out=tmp_path / "out.zarr")
    assert row_bits(CMD.load(tmp_path / "out.zarr")) == row_bits(work().fit(W))


# ---- going on -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unit_by_unit")
@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("name", [*UNIT_ARRAYS, "done"])
def test_a_torn_unit_is_computed_again(folder: Path, name: str, how: str) -> None:
    out = folder / "new.zarr"
    partial = stop_midway(folder / "s.zarr", out)
    done, _ = progress_of(partial)
    file = unit_file(partial, name, 0)
    DAMAGE[how](file)
    if how == "a directory":
        with pytest.raises(WriteFailed, match="Is a directory"):
            work().fit(Trajectory.open(folder / "s.zarr"), out=out)
        return
    cmd = work().fit(Trajectory.open(folder / "s.zarr"), out=out)
    assert cmd.metrics_["units_resumed"] == done - 1
    assert tree_bytes(out) == tree_bytes(folder / "out.zarr")


@pytest.mark.usefixtures("unit_by_unit")
def test_references_of_an_unfinished_fit_are_taken_from_disk(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second clustering could split a near-tie differently."""

    def never(*args: object, **options: object) -> None:
        raise AssertionError("clustered again")

    out = folder / "new.zarr"
    stop_midway(folder / "s.zarr", out)
    monkeypatch.setattr("cmdgpu.fitting.grow_tree", never)
    cmd = work().fit(Trajectory.open(folder / "s.zarr"), out=out)
    assert "cluster" not in cmd.metrics_["stage_s"]
    assert tree_bytes(out) == tree_bytes(folder / "out.zarr")


@pytest.mark.usefixtures("unit_by_unit")
def test_what_killed_workers_left_is_swept_up_at_the_end(folder: Path) -> None:
    out = folder / "new.zarr"
    partial = stop_midway(folder / "s.zarr", out)
    (partial / "a" / "c.1.0123456789abcdef.partial").write_bytes(b"torn")
    (partial / "zarr.json.0123456789abcdef.partial").write_bytes(b"torn")
    copy = Path(shutil.copytree(folder, folder.parent / "second"))
    disk = Disk()
    with disk.in_place():
        work().fit(Trajectory.open(folder / "s.zarr"), out=out)
    assert leftovers(out) == [] and tree_bytes(out) == tree_bytes(folder / "out.zarr")
    # killed the moment it got its name, a result holds no chunk that was torn
    named = next(i for i, call in enumerate(disk.calls, start=1) if call.to == out)
    with pytest.raises(Died), Disk(named + 1).in_place():
        work().fit(Trajectory.open(copy / "s.zarr"), out=copy / "new.zarr")
    assert leftovers(copy / "new.zarr") == ["zarr.json.0123456789abcdef.partial"]
    assert CMD.load(copy / "new.zarr").metrics_["n_rows"] == N


# ---- two at once ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unit_by_unit")
@pytest.mark.parametrize("attempt", range(8))
def test_two_fits_of_the_same_settings_at_once_both_end_well(folder: Path, attempt: int) -> None:
    out = folder / f"both-{attempt}.zarr"
    together = threading.Barrier(2)
    ended: list[str | Exception] = []

    def fit() -> None:
        source = Trajectory.open(folder / "s.zarr")
        together.wait()
        try:
            ended.append(fit_bits(work().fit(source, out=out)))
        except Exception as error:
            ended.append(error)

    threads = [threading.Thread(target=fit) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ended == [fit_bits(CMD.load(folder / "out.zarr"))] * 2
    assert tree_bytes(out) == tree_bytes(folder / "out.zarr")
    assert leftovers(folder) == []


def unit_of_nothing(frame: Frame, unit: int) -> tuple[UnitRows, Any]:
    from cmdgpu.statistics import unit_statistics

    start, stop = frame.unit(unit)
    n = stop - start
    rows = UnitRows(np.full(n, -1, np.int16), *(np.zeros(n, np.float32) for _ in range(3)))
    statistics = unit_statistics(
        frame.map, start, mode=rows.mode, a=rows.a, b=rows.b, correlation=rows.correlation,
        ss=np.zeros(n, np.float32), reference_means=np.zeros(1), n_snapshots=2, epsilon=1e-7,
    )  # fmt: skip
    return rows, statistics


def a_writer(out: Path) -> StoredWriter:
    frame = Frame(one_tensor(600), np.array([0, 1]), ROWS)
    modes = ModeSet(
        np.array([[0, 1]], np.float32), np.array([3]), np.array([3]), np.array([0], np.int16),
        np.array([[0, 1]], np.float32), np.empty((0, 4)),
    )  # fmt: skip
    source = {"dtype": "float32", "steps": frame.steps.tolist()}
    provenance = Provenance(source, Settings(1).to_json(), {"cmdgpu": "0"})
    begun = begin_result(out, frame, provenance, lambda: modes, resume=True)
    assert isinstance(begun, StoredWriter)
    return begun


def test_who_comes_late_takes_the_result_of_who_was_first(tmp_path: Path) -> None:
    """A zombie wakes up after the folder was renamed, and again after another began it anew."""
    out = tmp_path / "out.zarr"
    first, late = a_writer(out), a_writer(out)
    frame = Frame(one_tensor(600), np.array([0, 1]), ROWS)
    for unit in range(3):
        first.write(unit, *unit_of_nothing(frame, unit))
    first.finish()
    before = tree_bytes(out)
    late.write(1, *unit_of_nothing(frame, 1))
    assert late.finish().path == out
    assert tree_bytes(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["out.zarr"]


def test_a_unit_that_cannot_be_written_is_an_error_although_others_are_done(tmp_path: Path) -> None:
    writer = a_writer(tmp_path / "out.zarr")
    frame = Frame(one_tensor(600), np.array([0, 1]), ROWS)
    writer.write(0, *unit_of_nothing(frame, 0))
    (partial,) = partials_of(tmp_path / "out.zarr")
    shutil.rmtree(partial / "b")
    with pytest.raises(WriteFailed, match="No such file"):
        writer.write(1, *unit_of_nothing(frame, 1))
    with pytest.raises(StoreCorrupt, match="is missing"):
        writer.finish()


# ---- the order of units leaves no trace ------------------------------------------------------------------


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 2, 0, 0, 2]])
def test_any_order_and_repetition_of_units_gives_one_result(tmp_path: Path, order: list[int]) -> None:
    frame = Frame(one_tensor(600), np.array([0, 1]), ROWS)
    rng = np.random.default_rng(1)
    units: list[tuple[UnitRows, Any]] = []
    for unit in range(3):
        rows, statistics = unit_of_nothing(frame, unit)
        statistics.segments[...] = rng.lognormal(0, 9, statistics.segments.shape)
        units.append((rows, statistics))
    stored = a_writer(tmp_path / "out.zarr")
    memory = MemoryWriter(frame, stored.modes, Provenance({}, {}, {}))
    for unit in order:
        stored.write(unit, *units[unit])
        memory.write(unit, *units[unit])
    results: list[Result] = [stored.finish(), memory.finish()]
    expected = units[0][1].segments[0] + units[1][1].segments[0] + units[2][1].segments[0]
    for result in results:
        assert result.totals.tensors[0].tobytes() == expected.tobytes()


# ---- the disk fails -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As few system calls as a fit of two units can make: s.zarr, out.zarr."""
    folder = tmp_path_factory.mktemp("small")
    source = write_store(folder / "s.zarr", planted(300, 3))
    CMD(n_modes=2, n_samples=8).fit(source, out=folder / "out.zarr")
    return folder


def fit_on(disk: Disk, store: Path, out: Path) -> CMD:
    with disk.in_place():
        return CMD(n_modes=2, n_samples=8).fit(Trajectory.open(store), out=out)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_disk_that_fails_at_any_call_loses_nothing_that_was_there(
    small: Path, tmp_path: Path, fault: Fault
) -> None:
    """An error, no half result, a rerun to the same bytes.

    Every call is refused; a kill comes at every fourth, and so does a refusal while the sixteen arrays are
    made, which is one thing done sixteen times.
    """
    expected = tree_bytes(small / "out.zarr")
    watched = Disk()
    fit_on(watched, small / "s.zarr", tmp_path / "watched.zarr")
    assert tree_bytes(tmp_path / "watched.zarr") == {**expected, "zarr.json": renamed(small, tmp_path)}
    calls = len(watched.calls)
    assert calls > 200, "hardly any call was watched: the harness no longer sees the disk"
    for k, call in enumerate(watched.calls, start=1):
        making = any(re.search(r"\.partial\.[0-9a-f]{16}\.partial$", part) for part in call.path.parts)
        if k % 4 and (fault == "killed" or making):
            continue
        folder = tmp_path / str(k)
        folder.mkdir()
        (folder / "s.zarr").symlink_to(small / "s.zarr")
        out, disk = folder / "out.zarr", Disk(k, fault)
        try:
            fit_on(disk, folder / "s.zarr", out)
        except (CmdgpuError, Died) as error:
            assert isinstance(error, Died) == (fault == "killed"), error
            if fault == "disk":
                assert isinstance(error, WriteFailed | DurabilityUnknown) and error.file is not None, error
                assert isinstance(error, DurabilityUnknown) == out.exists(), error
                told = str(error) + str(error.__cause__)
                assert os.strerror(errno.EIO) in told or "disk is full" in told, error
        else:
            assert not disk.fired or fault == "killed", f"call {k} of {calls} failed in silence"
        assert disk.fired
        if out.exists():
            assert tree_bytes(out) == expected
        cmd = fit_on(Disk(), folder / "s.zarr", out)
        assert tree_bytes(out) == expected, f"other bytes after a failure at call {k}"
        assert cmd.metrics_["n_rows"] == 300
        if fault == "disk":
            assert leftovers(folder) == [], f"call {k}"
        shutil.rmtree(folder)


def renamed(small: Path, folder: Path) -> bytes:
    """The document of the result, as it is with its trajectory elsewhere."""
    document = json.loads((small / "out.zarr" / "zarr.json").read_bytes())
    document["attributes"]["cmdgpu"]["origin"] = os.path.relpath(small / "s.zarr", folder)
    return fmt.encode(fmt.seal(document))


def test_every_name_lasts_before_what_vouches_for_it(small: Path, tmp_path: Path) -> None:
    """Chunks, then their record, then the document, then the folder: each flushed before the next is renamed.

    No kill can show it, a power cut would.
    """
    disk = Disk()
    fit_on(disk, small / "s.zarr", tmp_path / "out.zarr")
    calls = disk.calls
    (partial,) = {c.path for c in calls if c.name == "rename" and c.to == tmp_path / "out.zarr"}

    def renames(file: Path) -> list[int]:
        return [i for i, c in enumerate(calls) if c.name == "rename" and c.to == file]

    def flush_after(i: int, directory: Path) -> int:
        return next(
            j for j in range(i, len(calls)) if calls[j].name == "fsync" and calls[j].path == directory
        )

    def check_flushed_first(i: int) -> None:
        """The renamed file itself was flushed."""
        assert any(c.name == "fsync" and c.path == calls[i].path for c in calls[:i]), calls[i]

    last_record = 0
    for unit in range(2):
        (record,) = renames(unit_file(partial, "done", unit))
        for name in UNIT_ARRAYS:
            (chunk,) = renames(unit_file(partial, name, unit))
            check_flushed_first(chunk)
            assert flush_after(chunk, partial / name) < record, f"{name} of unit {unit}"
        check_flushed_first(record)
        last_record = flush_after(record, partial / "done")
    (document,) = renames(partial / "zarr.json")
    check_flushed_first(document)
    (publication,) = renames(tmp_path / "out.zarr")
    assert last_record < document < flush_after(document, partial) < publication
    assert flush_after(publication, tmp_path) > publication


# ---- several tensors, buffers ---------------------------------------------------------------------------


def test_statistics_of_a_unit_with_few_tensors_are_padded_to_the_one_with_most(tmp_path: Path) -> None:
    source = write_store(tmp_path / "s.zarr", planted(LAYOUT.n_rows, 5), layout=LAYOUT)
    cmd = work(2).fit(source, out=tmp_path / "out.zarr")
    assert zarr_values(tmp_path / "out.zarr", "segment_stats").shape == (3, 3, len(FIELDS), 4)
    assert {name: sum(counts) for name, counts in cmd.tensor_shares_.items()} == {
        "embed.weight": 320,
        "fc.weight": 256,
        "fc.bias": 16,
        "norm.running_mean": 30,
    }
    assert fit_bits(work(2).fit(source)) == fit_bits(CMD.load(tmp_path / "out.zarr"))


def test_a_result_of_an_unknown_version_is_refused_by_name(folder: Path) -> None:
    def age(document: Any) -> None:
        document["attributes"]["cmdgpu"]["format"] = 7

    edit_document(folder / "out.zarr" / "zarr.json", age)
    with pytest.raises(NotAStore, match="has format version 7, this cmdgpu reads version 1"):
        CMD.load(folder / "out.zarr")


def test_warnings_of_a_fit_come_once(tmp_path: Path) -> None:
    source = write_store(tmp_path / "s.zarr", np.repeat(walks(2, 5), 200, axis=0))
    with pytest.warns(CmdgpuWarning) as warned:
        work(5).fit(source, out=tmp_path / "out.zarr")
    assert len(warned) == 1 and "2 distinct profiles" in str(warned[0].message)
