"""Laws of results of models with many tensors: statistics in chunks, what they cost to open and to plan."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch

from cmdgpu.decomposition import CMD
from cmdgpu.errors import StoreCorrupt
from cmdgpu.notation import AnyArray
from cmdgpu.results import Frame, partials_of, verify_result
from cmdgpu.results.ledger import segments_of_a_chunk, unit_documents
from cmdgpu.sources import ArraySource
from cmdgpu.statistics import FIELDS, Totals, totals_bytes
from cmdgpu.store.parameter_map import Kind, ParameterMap, whole
from cmdgpu.streaming.engine import plan_for
from cmdgpu.trajectory import Trajectory
from tests.harness import StopAfter, Stopped, fit_bits, planted, write_store
from tests.remote.servers import Memory
from tests.verbs import flip_bit, leftovers, plain_array, tree_bytes, zarr_values

ROWS: Final = 1024
UNITS: Final = 5
N: Final = UNITS * ROWS - 100
COUNTS: Final = {70: 2, 200: 4, 1000: 4}
"""Small tensors in the first unit, and how many chunks of statistics it has then."""


def layout(n_small: int) -> ParameterMap:
    """Tensors of one row, every seventh a buffer, then one that fills the rest."""
    small: list[tuple[str, Kind, str, tuple[int, ...]]] = [
        (f"adapter.{i}", "buffer" if i % 7 == 6 else "parameter", "float32", (1,)) for i in range(n_small)
    ]
    return ParameterMap(whole([*small, ("base", "parameter", "float32", (N - n_small,))]))


def work() -> CMD:
    return CMD(n_modes=3, n_samples=100, device="cpu")


@pytest.fixture(scope="module")
def W() -> AnyArray:
    return planted(N, 5, noise=0.2)


@pytest.fixture(scope="module", params=COUNTS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, W: AnyArray) -> Path:
    """``s.zarr`` and its fit, ``out.zarr``."""
    here = tmp_path_factory.mktemp(f"many{request.param}")
    work().fit(
        write_store(here / "s.zarr", W, rows=ROWS, layout=layout(request.param)), out=here / "out.zarr"
    )
    return here


def n_small(folder: Path) -> int:
    return len(Trajectory.open(folder / "s.zarr").parameters) - 1


def chunks_of(out: Path, unit: int) -> list[str]:
    return sorted(file.name for file in (out / "segment_stats").glob(f"c.{unit}.*"))


def test_a_unit_has_as_many_chunks_of_statistics_as_its_tensors_fill(folder: Path) -> None:
    out, n = folder / "out.zarr", n_small(folder)
    assert chunks_of(out, 0) == [f"c.0.{part}.0.0" for part in range(COUNTS[n])]
    assert all(chunks_of(out, unit) == [f"c.{unit}.0.0.0"] for unit in range(1, UNITS))
    cmd = CMD.load(out)
    assert fit_bits(cmd) == fit_bits(work().fit(Trajectory.open(folder / "s.zarr"))), "as in memory"
    assert cmd.result.n_bytes == sum(map(len, tree_bytes(out).values()))
    assert [sum(counts) for counts in cmd.tensor_shares_.values()] == [1] * n + [N - n]
    assert cmd.metrics_["n_buffer_rows"] == n // 7
    assert verify_result(out).damaged == [] and leftovers(folder) == []


def test_other_readers_see_one_array_of_statistics(folder: Path) -> None:
    n, out = n_small(folder), folder / "out.zarr"
    array = plain_array(out, "segment_stats")
    assert array.shape == (UNITS, n + 1, len(FIELDS), 2 + 3)
    assert math.ceil((n + 1) / array.chunks[1]) == COUNTS[n]
    sums = zarr_values(out, "segment_stats")
    totals = CMD.load(out).result.totals.tensors
    assert sums[0, :n].tobytes() == totals[:n].tobytes()
    assert np.allclose(sums[0, n] + sums[1:, 0].sum(axis=0), totals[n], rtol=1e-12)
    assert np.isnan(sums[1:, array.chunks[1] :]).all(), "never written"


def test_damage_of_a_later_chunk_of_statistics_is_named(folder: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(folder / "out.zarr", tmp_path / "out.zarr"))
    file = out / "segment_stats" / "c.0.1.0.0"
    flip_bit(file, 8 * 40)
    (damage,) = verify_result(out).damaged
    assert (damage.file, damage.problem, damage.rows) == (str(file), "crc32c mismatch", (0, ROWS - 1))
    with pytest.raises(StoreCorrupt, match="crc32c mismatch") as raised:
        CMD.load(out)
    assert raised.value.file == str(file)
    file.unlink()
    (damage,) = verify_result(out, quick=True).damaged
    assert (damage.file, damage.problem) == (str(file), "is missing")


@pytest.mark.parametrize("change", ["flipped", "missing", "of another part"])
def test_a_unit_whose_later_statistics_are_torn_is_computed_again(
    folder: Path, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cmdgpu.streaming.plan.TARGET_BLOCK_BYTES", 1)
    traj, out = Trajectory.open(folder / "s.zarr"), tmp_path / "out.zarr"
    with pytest.raises(Stopped):
        work().fit(traj, out=out, progress=StopAfter(2))
    (partial,) = partials_of(out)
    file = partial / "segment_stats" / "c.0.1.0.0"
    if change == "flipped":
        flip_bit(file, 8 * 40)
    elif change == "missing":
        file.unlink()
    else:
        shutil.copy(file.with_name("c.0.0.0.0"), file)
    cmd = work().fit(traj, out=out)
    assert 0 < cmd.metrics_["units_resumed"] < UNITS
    again, first = tree_bytes(out), tree_bytes(folder / "out.zarr")
    first["zarr.json"] = again["zarr.json"]  # it says where the trajectory lies
    assert again == first


def test_statistics_in_chunks_lie_on_a_server_like_in_a_folder(folder: Path) -> None:
    bucket = Memory(f"many-{n_small(folder)}")
    bucket.upload(folder / "s.zarr")
    work().fit(Trajectory.open(f"{bucket.url}/s.zarr"), out=f"{bucket.url}/out.zarr")
    assert bucket.tree("out.zarr") == tree_bytes(folder / "out.zarr")
    assert fit_bits(CMD.load(f"{bucket.url}/out.zarr")) == fit_bits(CMD.load(folder / "out.zarr"))
    bucket.change("out.zarr/segment_stats/c.0.1.0.0", lambda data: data[:9] + b"\x07" + data[10:])
    (damage,) = verify_result(bucket.place("out.zarr")).damaged
    assert damage.file == f"{bucket.url}/out.zarr/segment_stats/c.0.1.0.0"


# ---- the rule -------------------------------------------------------------------------------------------


def frame_of(sizes: list[int], rows: int) -> Frame:
    tensors = whole([(f"t{i}", "parameter", "float32", (size,)) for i, size in enumerate(sizes)])
    return Frame(ParameterMap(tensors), np.arange(8), rows)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([5], 1),
        ([1] * 63 + [10_000], 64),
        ([1] * 64 + [10_000], 64),
        ([1] * 65 + [100_000], 64),
        ([4] * 3000, 256),
        ([1] * 1000, 1000),
        ([16] * 10_000 + [10**9], 64),
    ],
)
def test_a_chunk_holds_the_most_where_that_is_little_and_about_the_mean_elsewhere(
    sizes: list[int], expected: int
) -> None:
    rows = 1 << 20 if sum(sizes) > 10**9 else 1024
    frame = frame_of(sizes, rows)
    counts = [len(frame.map.segments(*frame.unit(unit))) for unit in frame.live_units]
    assert frame.segment_counts.tolist() == counts
    assert segments_of_a_chunk(frame, 10) == expected


def test_ten_thousand_small_tensors_cost_a_billion_rows_little() -> None:
    frame = frame_of([16] * 10_000 + [10**9], 1 << 20)
    document: Any = unit_documents(frame, 10)["segment_stats"]
    per_chunk = document["chunk_grid"]["configuration"]["chunk_shape"][1]
    n_chunks = sum(-(-int(n) // per_chunk) for n in frame.segment_counts)
    assert n_chunks * per_chunk * len(FIELDS) * 12 * 8 < 50e6, "5.5 GB where every unit has the size of one"


def test_holes_and_pieces_are_counted_like_segments() -> None:
    tensors = whole([(f"t{i}", "parameter", "float32", (1 + 7 * i % 300,)) for i in range(90)])
    frame = Frame(ParameterMap(tensors).only([f"t{i}" for i in range(0, 90, 3)]), np.arange(3), 256)
    counts = [len(frame.map.segments(*frame.unit(unit))) for unit in frame.live_units]
    assert frame.segment_counts.tolist() == counts


# ---- what it costs --------------------------------------------------------------------------------------


def test_the_layout_is_read_once_by_a_fit_and_once_by_who_opens_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traj, read = Trajectory.open(folder / "s.zarr"), ParameterMap.from_json
    calls: list[object] = []

    def counted(laid_out: object, path: Any) -> ParameterMap:
        calls.append(path)
        return read(laid_out, path)

    monkeypatch.setattr(ParameterMap, "from_json", staticmethod(counted))
    work().fit(traj, out=tmp_path / "out.zarr")
    assert len(calls) == 1
    CMD.load(tmp_path / "out.zarr", trajectory=traj)
    assert len(calls) == 2


def test_the_sums_of_all_tensors_are_planned() -> None:
    few, many = (
        ParameterMap(whole([(f"t{i}", "parameter", "float32", (2,)) for i in range(n)])) for n in (1, 5000)
    )
    totals = Totals.zero(many, 100)
    assert totals_bytes(many, 100) == totals.tensors.nbytes + totals.histogram.nbytes
    source = ArraySource(planted(10_000, 4))
    plans = [
        plan_for(
            source, [Frame(each, np.arange(4), 256)], [100], [torch.device("cpu")], 4 << 30, in_memory=False
        ).needed_bytes
        for each in (few, many)
    ]
    assert plans[1] - plans[0] > totals_bytes(many, 100) - totals_bytes(few, 100)
