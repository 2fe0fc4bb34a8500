"""Laws of the pass: the definition in float64, whatever the blocks; memory as planned, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cmdgpu.baselines.found import Found
from cmdgpu.baselines.gram import Grams, gram_pass
from cmdgpu.baselines.groups import KINDS, By, Grouping
from cmdgpu.errors import MemoryLimitError, StoreCorrupt, UsageError
from cmdgpu.notation import I64
from cmdgpu.progress import Silent
from cmdgpu.store import format as fmt
from cmdgpu.store.parameter_map import ParameterMap, Piece, TensorEntry
from cmdgpu.trajectory import Trajectory
from tests.baselines.cases import LAYERS, store_of, values
from tests.harness import end_of, start_child, walks, write_store
from tests.verbs import flip_bit


def grams_of(traj: Trajectory, by: By, memory_limit: int | None = None) -> tuple[Grams, Found]:
    (grams,), found = gram_pass(traj, [Grouping.of(traj.parameters, by)], memory_limit, Silent())
    return grams, found


def rows_of(grouping: Grouping, group: int) -> I64:
    ids, start, stop = grouping.runs
    mine = np.flatnonzero(ids == group).tolist()
    return np.concatenate([np.arange(start[i], stop[i], dtype=np.int64) for i in mine])


# ---- groups -------------------------------------------------------------------------------------------


def named(grouping: Grouping) -> dict[str, int]:
    rows = grouping.n_rows().tolist()
    return {grouping.name(group): rows[group] for group in range(grouping.n_groups)}


def test_every_row_of_a_parameter_is_in_one_group() -> None:
    n = LAYERS.n_rows_of("parameter")
    assert named(Grouping.of(LAYERS, "network")) == {"the network": n}
    assert named(Grouping.of(LAYERS, "layer")) == {"conv": 224, "norm": 16, "fc": 3050, "scale": 1}
    nodes = named(Grouping.of(LAYERS, "node"))
    assert nodes["conv[3]"] == 27 + 1 and nodes["fc[49]"] == 60 + 1 and nodes["norm"] == 16
    assert len(nodes) == 8 + 1 + 50 + 1
    for by in KINDS:
        grouping = Grouping.of(LAYERS, by)
        rows = np.sort(np.concatenate([rows_of(grouping, g) for g in range(grouping.n_groups)]))
        buffer = LAYERS["norm.running_mean"].pieces[0]
        assert np.array_equal(
            rows, np.setdiff1d(np.arange(LAYERS.n_rows), np.arange(buffer.row, buffer.stop))
        )
    with pytest.raises(UsageError, match="groups cannot be 'row'; have: network, layer, tensor, node"):
        Grouping.of(LAYERS, "row")  # type: ignore[arg-type]


def test_nodes_of_a_tensor_in_shards_are_put_together_again() -> None:
    """Cut along its second axis: a node has a run in either piece."""
    halves = (Piece((0, 0), (4, 5), 0), Piece((0, 5), (4, 5), 20))
    layout = ParameterMap((TensorEntry("fc.weight", "parameter", "float32", (4, 10), halves),))
    grouping = Grouping.of(layout, "node")
    assert rows_of(grouping, 2).tolist() == [*range(10, 15), *range(30, 35)]
    assert [tuple(run) for run in grouping.runs_in(12, 32)] == [
        (2, 12, 15), (3, 15, 20), (0, 20, 25), (1, 25, 30), (2, 30, 32),
    ]  # fmt: skip


def test_a_shard_of_some_nodes_names_them_by_their_index_in_the_tensor() -> None:
    shards = (Piece((0, 0), (3, 5), 0), Piece((3, 0), (1, 5), 15))
    layout = ParameterMap((TensorEntry("fc.weight", "parameter", "float32", (4, 5), shards),))
    assert rows_of(Grouping.of(layout, "node"), 3).tolist() == [*range(15, 20)]


# ---- sums ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", KINDS)
@pytest.mark.parametrize("rows", [256, 1024])
def test_the_sums_are_those_of_the_definition_in_float64(by: By, rows: int, tmp_path: Path) -> None:
    W = values()
    grams, found = grams_of(store_of(tmp_path / "s.zarr", rows=rows), by)
    for group in range(len(grams)):
        w = W[rows_of(grams.grouping, group)].astype(np.float64)
        raw, centred = w.T @ w, w - w.mean(axis=1, keepdims=True)
        assert np.abs(grams[group].raw - raw).max() <= 1e-14 * np.abs(raw).max()
        movement = centred.T @ centred
        assert np.abs(grams[group].centred - movement).max() <= 1e-13 * np.abs(movement).max()
    assert found.n_rows == LAYERS.n_rows_of("parameter") and not found.non_finite
    n_units = -(-LAYERS.n_rows // rows)
    assert found.run["bytes_read"] == n_units * rows * W.shape[1] * 4


def test_movement_far_below_the_mean_keeps_its_digits() -> None:
    """Raw products in float64 would keep 4 of them; what is left of float32 rows is no error of ours."""
    W = (1e3 + 1e-2 * walks(2000, 20)).astype(np.float32)
    grams, _ = grams_of(Trajectory.from_array(W), "network")
    centred = W.astype(np.float64) - W.astype(np.float64).mean(axis=1, keepdims=True)
    want = centred.T @ centred
    assert np.abs(grams[0].centred - want).max() <= 1e-12 * np.abs(want).max()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rows_of_16_bits_are_summed_as_they_are_stored(dtype: str, tmp_path: Path) -> None:
    W = walks(3000, 8)
    grams, _ = grams_of(write_store(tmp_path / "s.zarr", W, rows=1024, dtype=dtype), "network")
    w = fmt.widen(fmt.narrow(W, dtype), dtype).astype(np.float64)
    assert np.allclose(grams[0].raw, w.T @ w, rtol=1e-14)


@pytest.mark.parametrize("by", ["network", "node"])
def test_chunks_blocks_limits_and_threads_leave_the_same_bits(by: By, tmp_path: Path) -> None:
    W = walks(20_000, 12)
    layout = ParameterMap(
        (TensorEntry("W", "parameter", "float32", (100, 200), (Piece((0, 0), (100, 200), 0),)),)
    )
    bits: set[bytes] = set()
    for rows, limit, threads in ((1024, "40MiB", 1), (4096, "1GiB", 3), (20_480, "1GiB", 2)):
        torch.set_num_threads(threads)
        traj = write_store(tmp_path / f"{rows}.zarr", W, rows=rows, layout=layout)
        grams, _ = grams_of(traj, by, 40 << 20 if limit == "40MiB" else 1 << 30)
        bits.add(grams.packed.tobytes())
    assert len(bits) == 1


def test_rows_that_are_not_finite_buffers_and_holes_are_in_no_sum(tmp_path: Path) -> None:
    W = values()
    conv, fc, buffer = (LAYERS[name].pieces[0] for name in ("conv.weight", "fc.weight", "norm.running_mean"))
    W[buffer.row] = np.nan  # is no parameter: not even counted
    W[conv.row + 5, 3], W[conv.row + 40, 0], W[fc.row, 11] = np.nan, np.inf, -np.inf
    traj = store_of(tmp_path / "s.zarr", W)
    for by in KINDS:
        grams, found = grams_of(traj, by)
        assert found.non_finite == {"conv.weight": 2, "fc.weight": 1}
        assert found.n_rows == LAYERS.n_rows_of("parameter") - 3
        assert np.isfinite(grams.packed).all()
        rows = np.concatenate([rows_of(grams.grouping, g) for g in range(len(grams))])
        kept = W[rows[np.isfinite(W[rows]).all(axis=1)]].astype(np.float64)
        total = sum(gram.raw for gram in grams)
        assert np.allclose(total, kept.T @ kept, rtol=1e-13)
    selected, found = grams_of(traj.sel(params="^fc", start=2), "network")
    w = W[fc.row + 1 : fc.row + 3050, 2:].astype(np.float64)
    assert np.allclose(selected[0].raw, w.T @ w, rtol=1e-13)
    assert found.n_rows == 3049 and found.non_finite == {"fc.weight": 1}


# ---- memory -------------------------------------------------------------------------------------------

MEASURED = """
import json, sys
from cmdgpu.baselines import DMD, PCA
from cmdgpu.memory import MemoryMeter
from cmdgpu.trajectory import Trajectory
from tests.harness import walks
PCA(2).fit(walks(5000, 8)).state_dict(-1)
DMD(2, groups="node").fit(walks(500, 8))
traj = Trajectory.open(sys.argv[1])
with MemoryMeter(0.001) as meter:
    pca = PCA(5).fit(traj, memory_limit="130MiB")
with MemoryMeter(0.001) as nodes:
    dmd = DMD(5, groups="node").fit(traj, memory_limit="400MiB")
print(json.dumps({
    "pca": [meter.above_start_bytes, pca.metrics_["planned_bytes"]],
    "nodes": [nodes.above_start_bytes, dmd.metrics_["planned_bytes"]],
}))
"""


@pytest.mark.slow
def test_a_pass_stays_within_its_plan(tmp_path: Path) -> None:
    """300 MB of a trajectory; a node costs three T x T matrices, and there are 2,048."""
    n, snapshots = 1 << 20, 72
    layout = ParameterMap(
        (TensorEntry("W", "parameter", "float32", (2048, 512), (Piece((0, 0), (2048, 512), 0),)),)
    )
    W = np.empty((n, snapshots), dtype=np.float32, order="F")
    rng = np.random.default_rng(0)
    for t in range(snapshots):
        W[:, t] = rng.standard_normal(n, dtype=np.float32)
    store = tmp_path / "s.zarr"
    write_store(store, W, rows=1 << 16, layout=layout)
    ended = end_of(start_child("-c", MEASURED, store))
    assert ended.code == 0, ended.err
    found: dict[str, Any] = json.loads(ended.out)
    print(found)
    for peak, planned in found.values():
        assert peak <= planned
    assert found["pca"][0] > 2 * snapshots * (1 << 16) * 4, "two slots are held"
    assert found["nodes"][0] > 2048 * snapshots**2 * 8, "the sums are held"


def test_a_limit_too_small_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touched(*args: object) -> None:
        raise AssertionError("something was read or allocated")

    traj = store_of(tmp_path / "s.zarr")
    monkeypatch.setattr("cmdgpu.store.view.StoreView.read_chunks", touched)
    monkeypatch.setattr("cmdgpu.store.view.StoreView.require", touched)
    monkeypatch.setattr("cmdgpu.baselines.groups.Grouping.runs", property(touched))
    with pytest.raises(
        MemoryLimitError, match=r"needs \S+ MB, the memory limit is 10 MB; give \d+MiB or more"
    ):
        grams_of(traj, "network", 10_000_000)
    with pytest.raises(MemoryLimitError, match=r"larger groups than the 60 by node"):
        grams_of(traj, "node", 10_000_000)


def test_nothing_is_allocated_by_what_a_layout_merely_claims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def allocated(*args: object) -> None:
        raise AssertionError("sums of rows that are not there")

    traj = store_of(tmp_path / "s.zarr")
    (tmp_path / "s.zarr" / fmt.WEIGHTS / fmt.chunk_name(2, 5)).unlink()
    monkeypatch.setattr("cmdgpu.baselines.gram._Sums", allocated)
    with pytest.raises(StoreCorrupt, match=r"c\.2\.5"):
        grams_of(traj, "node")


def test_a_damaged_chunk_is_an_error_of_the_pass(tmp_path: Path) -> None:
    traj = store_of(tmp_path / "s.zarr")
    flip_bit(tmp_path / "s.zarr" / fmt.WEIGHTS / fmt.chunk_name(1, 3), 4321)
    with pytest.raises(StoreCorrupt, match="step 30"):
        grams_of(traj, "network")
