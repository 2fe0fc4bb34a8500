"""Laws of a trajectory: indexed like the array it stands for, selected without a copy, made of any array."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import dask.array
import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st

from cmdgpu import sources
from cmdgpu.errors import CmdgpuWarning, StepNotFound, StoreExists, UsageError
from cmdgpu.indexing import positions
from cmdgpu.notation import F32, AnyArray
from cmdgpu.trajectory import Trajectory
from tests.harness import run_cli
from tests.strategies import indices
from tests.verbs import STEPS, N, build_store, stored_at, values_at, zarr_values

W_NT: F32 = np.stack([values_at(step) for step in STEPS], axis=1)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Trajectory]:
    """The same numbers read from chunks, from the sketch where it has them, and from an array."""
    folder = tmp_path_factory.mktemp("stores")
    return [
        Trajectory.open(build_store(folder / "bare.zarr", sketch=False)),
        Trajectory.open(build_store(folder / "sketched.zarr")),
        Trajectory.open(build_store(folder / "zstd.zarr", sketch=False, compressed=True)),
        Trajectory.from_array(W_NT, STEPS),
    ]


# ---- indexing -------------------------------------------------------------------------------------------


@given(rows=indices(N), columns=indices(len(STEPS)))
def test_indexing_is_numpys_with_the_axes_independent(
    stores: list[Trajectory], rows: Any, columns: Any
) -> None:
    expected = W_NT[rows][..., columns]
    for traj in stores:
        found = traj[rows, columns]
        assert found.shape == expected.shape
        assert found.dtype == np.float32
        assert np.array_equal(found, expected)


@given(st.data(), st.integers(0, 12))
def test_positions_are_the_ones_numpy_takes(data: st.DataObject, size: int) -> None:
    index = data.draw(indices(size))
    found, single = positions(index, size)
    expected = np.arange(size)[index]
    assert np.array_equal(found, np.atleast_1d(expected))
    assert single == (np.ndim(expected) == 0)
    assert found.dtype == np.int64


def test_a_slice_of_a_long_axis_makes_no_array_of_its_length() -> None:
    found, _ = positions(slice(1 << 40, (1 << 40) + 3), 1 << 50)
    assert found.tolist() == [1 << 40, (1 << 40) + 1, (1 << 40) + 2]
    assert positions(-1, 1 << 50)[0].tolist() == [(1 << 50) - 1]


@pytest.mark.parametrize(
    "index",
    [
        (N, 0),
        (-N - 1, 0),
        (0, 3),
        ([0, N], 0),
        (0.5, 0),
        ([0.0], 0),
        ("x", 0),
        (None, 0),
        (..., 0),
        (np.zeros((2, 2), int), 0),
        (np.ones(N + 1, bool), 0),
        (True, 0),
        (0,),
        (0, 0, 0),
        0,
        slice(None),
    ],
    ids=repr,
)
def test_an_index_that_fits_nothing_is_refused_in_words(stores: list[Trajectory], index: Any) -> None:
    for traj in stores:
        with pytest.raises(UsageError):
            _ = traj[index]


def test_bfloat16_comes_as_the_numbers_it_stands_for(tmp_path: Path) -> None:
    traj = Trajectory.open(build_store(tmp_path / "run.zarr", dtype="bfloat16"))
    expected = torch.tensor(W_NT).to(torch.bfloat16).to(torch.float32).numpy()
    assert traj.dtype == "bfloat16"
    assert traj[:, :].dtype == np.float32
    assert np.array_equal(traj[:, :], expected)


def test_float16_stays_float16(tmp_path: Path) -> None:
    traj = Trajectory.open(build_store(tmp_path / "run.zarr", dtype="float16"))
    assert traj[:, :].dtype == np.float16
    assert np.array_equal(traj[:, :], W_NT.astype(np.float16))


# ---- selecting ------------------------------------------------------------------------------------------

LONG = Trajectory.from_array(np.arange(40, dtype=np.float32).reshape(2, 20), np.arange(0, 200, 10))


@given(
    start=st.none() | st.integers(-25, 25), stop=st.none() | st.integers(-25, 25), stride=st.integers(1, 25)
)
def test_start_stop_and_stride_are_positions_with_slice_semantics(
    start: int | None, stop: int | None, stride: int
) -> None:
    expected = LONG.steps[start:stop:stride]
    if not len(expected):
        with pytest.raises(UsageError, match="selects none of 20"):
            LONG.sel(start, stop, stride)
        return
    selected = LONG.sel(start, stop, stride)
    assert selected.steps.tolist() == expected.tolist()
    assert np.array_equal(selected[:, :], LONG[:, :][:, start:stop:stride])
    assert selected.recorded_steps.tolist() == LONG.steps.tolist()


def test_steps_are_labels_in_any_order() -> None:
    selected = LONG.sel(steps=[150, 0, 30, 30])
    assert selected.steps.tolist() == [0, 30, 150]
    assert selected[1, :].tolist() == [20.0, 23.0, 35.0]
    assert selected.shape == (2, 3)


def test_a_selection_of_a_selection_counts_in_the_first_one() -> None:
    twice = LONG.sel(start=10).sel(start=-3, stride=2)
    assert twice.steps.tolist() == [170, 190]
    with pytest.raises(StepNotFound):
        LONG.sel(start=10).sel(steps=[50])


@pytest.mark.parametrize("step", [-1, 5, 200, 1 << 62])
def test_a_label_that_is_not_there_names_the_nearest(step: int) -> None:
    with pytest.raises(StepNotFound, match=r"nearest: ") as caught:
        LONG.sel(steps=[0, step])
    assert caught.value.step == step
    if step == 5:
        assert str(caught.value).endswith("nearest: 0, 10, 20")


def test_labels_exclude_positions_and_an_empty_selection_is_refused() -> None:
    others: list[dict[str, Any]] = [{"start": 0}, {"stop": 3}, {"stride": 2}]
    for other in others:
        with pytest.raises(UsageError, match="either steps or"):
            LONG.sel(steps=[0], **other)
    with pytest.raises(UsageError):
        LONG.sel(steps=[])
    with pytest.raises(UsageError, match="stride"):
        LONG.sel(stride=0)
    with pytest.raises(UsageError, match="stride"):
        LONG.sel(stride=-1)


def test_a_selection_copies_nothing(stores: list[Trajectory]) -> None:
    for traj in stores:
        assert traj.sel(start=1).source is traj.source


# ---- arrays ---------------------------------------------------------------------------------------------


def as_memmap(W_nt: AnyArray, folder: Path) -> Any:
    mapped = np.memmap(folder / "w.bin", dtype=W_nt.dtype, mode="w+", shape=W_nt.shape)
    mapped[:] = W_nt
    return mapped


def as_zarr(W_nt: AnyArray, folder: Path) -> Any:
    return cast(Any, zarr).create_array(folder / "w.zarr", data=W_nt, chunks=(100, 2))


ARRAYS: dict[str, Callable[[AnyArray, Path], Any]] = {
    "numpy": lambda W_nt, _: W_nt,
    "columns first": lambda W_nt, _: np.asfortranarray(W_nt),
    "a view": lambda W_nt, _: np.repeat(W_nt, 2, axis=1)[:, ::2],
    "read only": lambda W_nt, _: np.frombuffer(W_nt.tobytes(), W_nt.dtype).reshape(W_nt.shape),
    "memmap": as_memmap,
    "torch": lambda W_nt, _: torch.tensor(W_nt),
    "torch with a gradient": lambda W_nt, _: torch.tensor(W_nt, requires_grad=True),
    "torch transposed": lambda W_nt, _: torch.tensor(W_nt.T.copy()).T,
    "zarr": as_zarr,
    "dask": lambda W_nt, _: cast(Any, dask.array).from_array(W_nt, chunks=(100, 1)),
}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", ARRAYS)
def test_any_array_with_a_shape_is_a_trajectory(
    tmp_path: Path, kind: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_SLAB_ROWS", 100)
    W_nt = W_NT.astype(dtype)
    traj = Trajectory.from_array(ARRAYS[kind](W_nt, tmp_path), STEPS)
    assert (traj.shape, traj.dtype, traj.steps.tolist()) == (W_nt.shape, dtype, list(STEPS))
    assert np.array_equal(traj[:, :], W_nt)
    assert np.array_equal(traj[[5, 600, 5], ::-1], W_nt[[5, 600, 5], ::-1])
    slot = np.full((2, 768), -1, dtype=dtype)
    done = [task() for task in traj.source.fill_tasks(0, 1, np.array([0, 2]), slot)]
    assert np.array_equal(slot[:, :N], W_nt[:, [0, 2]].T)
    assert len(done) == 7
    assert sum(done) == 2 * N * W_nt.itemsize
    assert (slot[:, N:] == 0).all()


def test_torch_bfloat16_is_taken_as_it_is(tmp_path: Path) -> None:
    W_nt = torch.tensor(W_NT).to(torch.bfloat16)
    traj = Trajectory.from_array(W_nt, STEPS)
    assert traj.dtype == "bfloat16"
    assert np.array_equal(traj[:, :], W_nt.float().numpy())
    stored = Trajectory.from_array(W_nt, STEPS, out=tmp_path / "run.zarr")
    assert stored.dtype == "bfloat16"
    assert np.array_equal(stored[:, :], W_nt.float().numpy())


@pytest.mark.parametrize("out", [False, True], ids=["in memory", "stored"])
def test_float64_is_rounded_with_a_warning(tmp_path: Path, out: bool) -> None:
    W_nt = W_NT.astype(np.float64) + 1e-12
    with pytest.warns(CmdgpuWarning, match="float64 rows are rounded") as caught:
        traj = Trajectory.from_array(W_nt, out=tmp_path / "run.zarr" if out else None)
    assert len(caught) == 1
    assert caught[0].filename == __file__, "the warning points to somebody else's line"
    assert traj.dtype == "float32"
    assert np.array_equal(traj[:, :], W_nt.astype(np.float32))


@pytest.mark.parametrize("dtype", ["int64", "uint8", "bool", "complex64", "object", "int32"])
def test_what_is_no_float_is_refused_by_name(dtype: str) -> None:
    with pytest.raises(UsageError, match=dtype):
        Trajectory.from_array(np.zeros((3, 2), dtype=dtype))


@pytest.mark.parametrize(
    "W_nt", [np.zeros(3, "f4"), np.zeros((1, 2, 3), "f4"), np.float32(1), [[1.0, 2.0]], None, "x"]
)
def test_what_is_no_matrix_is_refused(W_nt: Any) -> None:
    with pytest.raises(UsageError, match="is no trajectory"):
        Trajectory.from_array(W_nt)


@pytest.mark.parametrize(
    "steps",
    [
        [0, 1],
        [0, 1, 2, 3],
        [0, 2, 1],
        [0, 1, 1],
        [-1, 0, 1],
        [0.0, 1.0, 2.0],
        [[0, 1, 2]],
        [],
        5,
        ["a", "b", "c"],
    ],
)
def test_steps_that_label_nothing_are_refused(steps: Any) -> None:
    with pytest.raises(UsageError, match="steps"):
        Trajectory.from_array(W_NT, steps)


def test_without_steps_the_columns_are_counted() -> None:
    assert Trajectory.from_array(W_NT).steps.tolist() == [0, 1, 2]


@pytest.mark.parametrize("zstd", [False, True])
@pytest.mark.parametrize("dtype", [None, "float32", "float16", "bfloat16"])
def test_an_array_may_be_written_as_a_store(tmp_path: Path, dtype: str | None, zstd: bool) -> None:
    traj = Trajectory.from_array(
        W_NT, STEPS, out=tmp_path / "run.zarr", dtype=dtype, rows_per_chunk=256, zstd=zstd
    )
    said = run_cli("inspect", tmp_path / "run.zarr", "--json").json
    assert said["codecs"] == ["bytes", *["zstd"] * zstd, "crc32c"]
    assert traj.path == tmp_path / "run.zarr"
    assert traj.dtype == (dtype or "float32")
    assert traj.steps.tolist() == list(STEPS)
    for t, step in enumerate(STEPS):
        expected = stored_at(step, traj.dtype)[:N]
        assert zarr_values(tmp_path / "run.zarr", "weights")[:, t].tobytes() == expected.tobytes()
    assert traj.verify() == []
    assert [(t.name, t.kind, t.shape) for t in traj.parameters] == [("W", "parameter", (N,))]


def test_an_array_is_not_written_over_anything(tmp_path: Path) -> None:
    Trajectory.from_array(W_NT, out=tmp_path / "run.zarr")
    with pytest.raises(StoreExists):
        Trajectory.from_array(W_NT, out=tmp_path / "run.zarr")
    with pytest.raises(UsageError, match="float16"):
        Trajectory.from_array(W_NT, dtype="float16")
    with pytest.raises(UsageError, match="leave zstd out"):
        Trajectory.from_array(W_NT, zstd=True)
    with pytest.raises(UsageError, match="rows_per_chunk"):
        Trajectory.from_array(W_NT, out=tmp_path / "other.zarr", rows_per_chunk=100)
    with pytest.raises(UsageError, match="2\\^22 with zstd"):
        Trajectory.from_array(W_NT, out=tmp_path / "other.zarr", rows_per_chunk=1 << 23, zstd=True)
    assert not (tmp_path / "other.zarr").exists()


def test_nothing_is_read_before_it_is_asked_for() -> None:
    class Remote:
        shape = (1 << 40, 1 << 20)
        dtype = np.dtype("float32")
        asked: list[slice] = []  # noqa: RUF012

        def __getitem__(self, index: slice) -> AnyArray:
            self.asked.append(index)
            return np.zeros((len(range(*index.indices(self.shape[0]))), 4), np.float32)

    remote = Remote()
    traj = Trajectory.from_array(remote)
    assert traj.sel(stop=4).shape == (1 << 40, 4)
    assert "rows" in repr(traj)
    assert remote.asked == []
    assert traj.sel(stop=4)[7, 1] == 0
    assert len(remote.asked) == 1


# ---- what it says ---------------------------------------------------------------------------------------


def test_a_store_says_what_it_holds(stores: list[Trajectory]) -> None:
    bare, sketched, compressed, array = stores
    assert bare.shape == array.shape == (N, len(STEPS))
    assert bare.stored_bytes == 3 * 3 * (4 * 256 + 4)
    assert sketched.stored_bytes == bare.stored_bytes + 3 * (4 * (N - 30) + 4)
    assert array.stored_bytes == 4 * N * 3
    assert compressed.shape == bare.shape and compressed.stored_bytes < bare.stored_bytes
    assert bare.scalars["loss"].tolist() == [step / 4 for step in STEPS]
    assert array.scalars == {}
    assert array.verify() == []
    assert str(bare.path) in repr(bare)


def test_an_empty_recording_has_no_step_to_give(tmp_path: Path) -> None:
    traj = Trajectory.open(build_store(tmp_path / "run.zarr", []))
    assert traj.shape == (N, 0)
    assert traj[:, :].shape == (N, 0)
    for step in (-1, 0):
        with pytest.raises(StepNotFound, match="nearest: none"):
            traj.state_dict(step)
    with pytest.raises(UsageError, match="selects none of 0"):
        traj.sel()
