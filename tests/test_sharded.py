"""Laws of recording a sharded model: no rank gathers, and what comes back is the full model, bit for bit."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

import cmdgpu as cg
from cmdgpu.errors import ModelMismatch, StoreLocked, UnsupportedTensor
from cmdgpu.recording import Recorder
from cmdgpu.sharded import Box, Held, layout, require_same_layout
from cmdgpu.store import durable
from cmdgpu.store.journal import lock_ranks, write_rows
from cmdgpu.store.parameter_map import ParameterMap, whole
from cmdgpu.store.view import StoreView
from tests import ranks
from tests.ranks import error_of, run_job
from tests.verbs import check_same_bits, float_tensors, leftovers, net_at


def check_placed(path: Path, steps: list[int]) -> None:
    traj = cg.Trajectory.open(path)
    assert traj.steps.tolist() == steps
    for step in steps:
        check_same_bits(traj.state_dict(step), ranks.whole_at(step))
    assert traj.scalars["loss"].tolist() == steps
    assert traj.verify() == []


def test_fsdp2_gives_the_full_model_back_bit_for_bit(tmp_path: Path) -> None:
    """Uneven rows, one row for two ranks, tied weights, two dtypes, BatchNorm; into every way out."""
    assert run_job(ranks.record_training, tmp_path) == [0, 0], list(tmp_path.glob("error.*"))
    traj = cg.Trajectory.open(tmp_path / "run.zarr")
    assert traj.verify() == []
    assert traj.scalars["loss"].tolist() == [0.0, 0.5, 1.0]
    assert traj.parameters.aliases == {"head.weight": "embed.weight"}
    sizes = [piece.size for piece in traj.parameters["odd.weight"].pieces]
    assert sizes == [(3, 16), (2, 16)]  # though the forward pass before had gathered it
    fulls = [torch.load(tmp_path / f"full.{step}.pt") for step in range(3)]
    for step, full in enumerate(fulls):
        check_same_bits(traj.state_dict(step), full)
        bare = ranks.Uneven()
        traj.load_into(bare, step)
        check_same_bits(float_tensors(bare), full)
    traj.export(tmp_path / "end.safetensors", 2)
    untied = {name: tensor for name, tensor in fulls[2].items() if name != "head.weight"}
    check_same_bits(load_file(tmp_path / "end.safetensors"), untied)


def test_every_placement_comes_back_bit_for_bit(tmp_path: Path) -> None:
    assert run_job(ranks.record_placed, tmp_path, (0, 1)) == [0, 0], list(tmp_path.glob("error.*"))
    assert run_job(ranks.record_placed, tmp_path, (1, 4), 0) == [0, 0], list(tmp_path.glob("error.*"))
    check_placed(tmp_path / "run.zarr", [0, 1, 4])
    assert run_job(ranks.record_placed, tmp_path, (5,), world=1) == [1]
    assert "in 2 pieces" in error_of(tmp_path, 0) and "continue with the ranks" in error_of(tmp_path, 0)
    check_placed(tmp_path / "run.zarr", [0, 1, 4])
    view = StoreView.open(tmp_path / "run.zarr")
    assert view.sketch_rows is not None
    column = cg.Trajectory.open(view.path)[:, 1]  # more than the sketch holds: from the chunks
    assert np.array_equal(view.read_sketch(1), column[view.sketch_rows])


def test_replicas_are_recorded_once(tmp_path: Path) -> None:
    assert run_job(ranks.record_replicas, tmp_path) == [0, 0], list(tmp_path.glob("error.*"))
    traj = cg.Trajectory.open(tmp_path / "run.zarr")
    assert traj.steps.tolist() == [0, 2]
    check_same_bits(traj.state_dict(2), torch.load(tmp_path / "full.pt"))


def test_what_one_rank_meets_all_raise_and_recording_goes_on(tmp_path: Path) -> None:
    assert run_job(ranks.misuse, tmp_path) == [0, 0], list(tmp_path.glob("error.*"))
    traj = cg.Trajectory.open(tmp_path / "run.zarr")
    assert traj.steps.tolist() == [2, 3] and traj.verify() == []
    check_same_bits(traj.state_dict(3), ranks.whole_at(3))
    assert not (tmp_path / "apart.zarr").exists()


@pytest.mark.parametrize(
    ("victim", "moment"),
    [
        *((rank, moment) for rank in (0, 1) for moment in ("agree", "chunk", "written")),
        (0, "small"),
        (0, "committed"),
    ],
)
def test_a_rank_killed_while_it_records_leaves_whole_snapshots(
    tmp_path: Path, victim: int, moment: str
) -> None:
    codes = run_job(ranks.die_while_recording, tmp_path, victim, moment)
    assert codes[victim] == -9 and codes[1 - victim] == 1, codes
    said = error_of(tmp_path, 1 - victim)
    in_commit = moment in ("small", "committed")
    assert said.startswith("DurabilityUnknown" if in_commit else "RankLost"), said
    kept = [0, 1, 2] if moment == "committed" else [0, 1]
    check_placed(tmp_path / "run.zarr", kept)
    assert run_job(ranks.record_placed, tmp_path, (5,)) == [0, 0], list(tmp_path.glob("error.*"))
    check_placed(tmp_path / "run.zarr", [*kept, 5])
    assert leftovers(tmp_path / "run.zarr") == []


def test_a_rank_makes_its_names_last_after_its_last_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit by rank 0 must not outlive the chunks of the others, and rank 0 flushes only what it sees."""
    (tmp_path / "weights").mkdir()
    order: list[str] = []
    rename, flush = durable.rename, durable.flush_directory

    def renamed(old: Path, new: Path) -> None:
        rename(old, new)
        order.append(new.name)

    def flushed(directory: Path) -> None:
        flush(directory)
        order.append(directory.name)

    monkeypatch.setattr(durable, "rename", renamed)
    monkeypatch.setattr(durable, "flush_directory", flushed)
    crcs = write_rows(tmp_path, np.zeros(768, dtype=np.float32), 256, 4, 7, None)
    assert len(crcs) == 3
    assert sorted(order[:3]) == ["c.4.7", "c.5.7", "c.6.7"] and order[3:] == ["weights"]


def test_flat_parameters_are_refused_with_the_way_out(tmp_path: Path) -> None:
    assert run_job(ranks.flat, tmp_path, world=1) == [0], error_of(tmp_path, 0)


def test_a_recorder_opened_before_the_process_group_says_so(tmp_path: Path) -> None:
    assert run_job(ranks.opened_too_early, tmp_path) == [0, 0], list(tmp_path.glob("error.*"))


def test_a_store_that_ranks_still_write_to_is_locked(tmp_path: Path) -> None:
    """A job whose rank 0 died: its other ranks may be between two chunks."""
    path = tmp_path / "run.zarr"
    with Recorder(path) as recorder:
        recorder.record(net_at(0), 0)
    straggler, other = lock_ranks(path), lock_ranks(path)
    straggler.release()
    with pytest.raises(StoreLocked):
        Recorder(path)
    other.release()
    with Recorder(path) as recorder:
        recorder.record(net_at(1), 1)


# ---- who writes what where ----------------------------------------------------------------------------


def held(*boxes: list[Box], shape: tuple[int, ...] = (4, 3), name: str = "w") -> list[Held]:
    """One tensor as each rank holds it."""
    model = ParameterMap(whole([(name, "parameter", "float32", shape)]))
    return [Held(model, (tuple(of_rank),)) for of_rank in boxes]


@st.composite
def grids(draw: st.DrawFn) -> tuple[list[Held], int]:
    """Tensors cut over up to four ranks along any axis, or held by all of them, and the rows of a chunk."""
    n_ranks = draw(st.integers(1, 4))
    shapes = draw(st.lists(st.lists(st.integers(0, 5), max_size=3).map(tuple), min_size=1, max_size=5))
    boxes: list[list[tuple[Box, ...]]] = [[] for _ in range(n_ranks)]
    for shape in shapes:
        axis = draw(st.none() | st.integers(0, len(shape) - 1)) if shape else None
        for rank in range(n_ranks):
            offset, size = [0] * len(shape), list(shape)
            if axis is not None:
                step = -(-shape[axis] // n_ranks)
                offset[axis] = min(rank * step, shape[axis])
                size[axis] = min(offset[axis] + step, shape[axis]) - offset[axis]
            boxes[rank].append(((tuple(offset), tuple(size)),) if math.prod(size) else ())
    model = ParameterMap(whole([(f"t{i}", "parameter", "float32", shape) for i, shape in enumerate(shapes)]))
    return [Held(model, tuple(of_rank)) for of_rank in boxes], draw(st.sampled_from([4, 8, 64]))


@given(grids())
def test_ranks_own_whole_chunks_and_every_element_is_owned_once(grid: tuple[list[Held], int]) -> None:
    ranks_hold, rows = grid
    cut = layout(ranks_hold, rows)
    assert all(start % rows == 0 for start in cut.starts)
    assert list(cut.starts) == sorted(cut.starts)
    document = cut.map.to_json()
    assert ParameterMap.from_json(document, Path("x")) == cut.map  # covered exactly once
    for entry, mine in zip(cut.map, zip(*(of.boxes for of in ranks_hold), strict=True), strict=True):
        for piece in entry.pieces:
            (owner,) = [r for r, (a, b) in enumerate(itertools.pairwise(cut.starts)) if a <= piece.row < b]
            assert piece.stop <= cut.starts[owner + 1]
            holders = [rank for rank, boxes in enumerate(mine) if (piece.offset, piece.size) in boxes]
            assert owner == min(holders)


def test_boxes_that_are_not_the_tensor_are_refused() -> None:
    """Interleaved shards show as boxes that overlap, a stage of a pipeline as a box that nobody holds."""
    top, middle = ((0, 0), (2, 3)), ((1, 0), (2, 3))
    with pytest.raises(UnsupportedTensor, match="'w': its shards overlap, or do not make up the tensor"):
        layout(held([top], [middle]), 256)
    with pytest.raises(UnsupportedTensor, match="do not make up"):
        layout(held([top], []), 256)


def test_ranks_that_hold_other_tensors_are_told_apart() -> None:
    box = [((0, 0), (4, 3))]
    with pytest.raises(ModelMismatch, match=r"rank 0 holds 'w', .* where rank 1 holds 'v'"):
        layout([*held(box), *held(box, name="v")], 256)


def test_another_sharding_is_another_store() -> None:
    two = layout(held([((0, 0), (2, 3))], [((2, 0), (2, 3))]), 256).map
    one = layout(held([((0, 0), (4, 3))], []), 256).map
    require_same_layout(two, two, Path("run.zarr"))
    with pytest.raises(
        UnsupportedTensor, match=r"stored in 2 pieces .* hold it in 1 piece .*; continue with"
    ):
        require_same_layout(two, one, Path("run.zarr"))
