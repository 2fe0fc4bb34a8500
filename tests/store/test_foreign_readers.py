"""Laws for people without this package: a plain Zarr v3 reader and xarray see the same numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cmdgpu.store import format as fmt
from cmdgpu.store.view import StoreView
from cmdgpu.trajectory import Trajectory
from tests.verbs import (
    STEPS,
    N,
    S,
    append,
    build_store,
    create_store,
    numbers,
    open_xarray,
    plain_array,
    values_at,
    zarr_values,
)

both_chains = pytest.mark.parametrize("compressed", [False, True])


@both_chains
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_zarr_reads_the_values_we_read(tmp_path: Path, dtype: str, compressed: bool) -> None:
    store = build_store(tmp_path / "run.zarr", dtype=dtype, compressed=compressed)
    weights = zarr_values(store, fmt.WEIGHTS)
    assert weights.tobytes() == Trajectory.open(store)[:, :].tobytes()
    assert np.array_equal(weights, np.stack([values_at(s) for s in STEPS], axis=1).astype(dtype))
    assert zarr_values(store, fmt.STEP).tolist() == list(STEPS)
    assert zarr_values(store, "loss").tolist() == [s / 4 for s in STEPS]


@both_chains
def test_zarr_reads_bfloat16_as_the_patterns_it_is_made_of(tmp_path: Path, compressed: bool) -> None:
    store = build_store(tmp_path / "run.zarr", dtype="bfloat16", compressed=compressed)
    patterns = zarr_values(store, fmt.WEIGHTS)
    assert patterns.dtype == np.uint16
    widened = (patterns.astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(widened, Trajectory.open(store)[:, :])
    assert np.abs(widened - np.stack([values_at(s) for s in STEPS], axis=1)).max() < 0.02


def test_the_axes_are_named_and_step_is_a_coordinate(tmp_path: Path) -> None:
    dataset = open_xarray(build_store(tmp_path / "run.zarr"))
    assert dataset["weights"].dims == ("parameter", "snapshot")
    assert dataset["loss"].dims == dataset["step"].dims == ("snapshot",)
    assert dataset["sketch"].dims == ("sample", "snapshot")
    assert dataset["sketch_row"].dims == ("sample",)
    assert "step" in dataset["weights"].coords
    assert dict(dataset.sizes) == {"parameter": N, "snapshot": len(STEPS), "sample": S}


@both_chains
def test_xarray_selects_by_step(tmp_path: Path, compressed: bool) -> None:
    dataset = open_xarray(build_store(tmp_path / "run.zarr", compressed=compressed))
    labelled = dataset.set_coords("step").swap_dims(snapshot="step")
    for by_label in (dataset, labelled):
        assert np.array_equal(by_label["weights"].sel(step=25).values, values_at(25))
        assert float(by_label["loss"].sel(step=10).values) == 2.5
    several = labelled["weights"].sel(step=[0, 25]).values
    assert np.array_equal(several, np.stack([values_at(0), values_at(25)], axis=1))


@both_chains
def test_the_sketch_holds_the_values_of_its_rows(tmp_path: Path, compressed: bool) -> None:
    store = build_store(tmp_path / "run.zarr", compressed=compressed)
    rows = zarr_values(store, fmt.SKETCH_ROW)
    assert rows.tolist() == list(range(S)), "candidates of a small model: every parameter, no buffer"
    assert np.array_equal(zarr_values(store, fmt.SKETCH), zarr_values(store, fmt.WEIGHTS)[rows])


def test_a_store_without_snapshots_opens_everywhere(tmp_path: Path) -> None:
    store = tmp_path / "run.zarr"
    create_store(store).close()
    assert plain_array(store, fmt.WEIGHTS).shape == (N, 0)
    assert open_xarray(store).sizes["snapshot"] == 0
    assert Trajectory.open(store).shape == (N, 0)


def test_what_was_never_written_reads_as_not_a_number_and_not_as_zero(tmp_path: Path) -> None:
    store = build_store(tmp_path / "run.zarr")
    (store / fmt.WEIGHTS / fmt.chunk_name(0, 0)).unlink()
    assert np.isnan(zarr_values(store, fmt.WEIGHTS)[:256, 0]).all()
    assert plain_array(store, fmt.STEP).fill_value == np.iinfo(np.int64).min


def test_series_longer_than_a_chunk_of_theirs_are_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scalar may begin late and be left out; it is one number per snapshot all the same."""
    monkeypatch.setattr(fmt, "SMALL_CHUNK", 4)
    store = tmp_path / "run.zarr"
    journal = create_store(store)
    for step in range(11):
        given = {"loss": float(step)} if step % 3 else {}
        append(journal, step, **given, **({"late": -float(step)} if step >= 9 else {}))
    journal.close()
    loss = numbers(step if step % 3 else np.nan for step in range(11))
    late = numbers(-step if step >= 9 else np.nan for step in range(11))
    for name, expected in {"loss": loss, "late": late, "step": numbers(range(11))}.items():
        assert np.array_equal(zarr_values(store, name), expected, equal_nan=True)
    assert np.array_equal(StoreView.open(store).scalars["late"], late, equal_nan=True)
    assert np.array_equal(open_xarray(store)["loss"].values, loss, equal_nan=True)
