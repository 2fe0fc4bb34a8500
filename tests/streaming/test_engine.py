"""Laws of the pass: one set of bits however it is cut, every byte read once, every unit written once."""

# torch leaves the types of many methods open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import random
import resource
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cmdgpu import ops
from cmdgpu.decomposition import CMD
from cmdgpu.errors import CmdgpuWarning, MemoryLimitError, StoreCorrupt, WriteFailed
from cmdgpu.memory import parse_bytes
from cmdgpu.notation import CONSTANT, NON_FINITE, UNWRITTEN, AnyArray
from cmdgpu.results import Frame, MemoryWriter, StoredWriter, UnitRows
from cmdgpu.sources import READS_IN_FLIGHT, StoreSource
from cmdgpu.statistics import UnitStatistics
from cmdgpu.store import zstd
from cmdgpu.store.parameter_map import ParameterMap, whole
from cmdgpu.streaming.device import blocks_under_way, in_room
from cmdgpu.streaming.direct import Way, threads_for, ways
from cmdgpu.streaming.plan import WRITES_IN_FLIGHT
from cmdgpu.trajectory import Trajectory
from tests.harness import (
    StopAfter,
    Stopped,
    Ticks,
    check_equals_definition,
    chunks_read,
    fit_bits,
    planted,
    row_bits,
    walks,
    write_store,
)
from tests.page_cache import evict
from tests.verbs import flip_bit, tree_bytes

T, ROWS = 20, 16384
N = 5 * ROWS - 1234


@pytest.fixture(scope="module")
def W() -> AnyArray:
    return planted(N, T, 4, noise=0.3, level=3.0)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory, W: AnyArray) -> dict[int, Path]:
    """The same values in chunks of several sizes."""
    folder = tmp_path_factory.mktemp("engine")
    paths = {rows: folder / f"rows-{rows}.zarr" for rows in (16384, 32768, 65536)}
    for rows, path in paths.items():
        Trajectory.from_array(W, out=path, rows_per_chunk=rows)
    return paths


@pytest.fixture
def unit_by_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one unit, whatever the limit."""
    monkeypatch.setattr("cmdgpu.streaming.plan.TARGET_BLOCK_BYTES", 1)


DIRECT = ops.can_fit_files("float32", 20, 4)
ROUTES = ["direct", "past the cache", "slots", "plain"]


def take(route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a pass from a store: straight from files, the same of a store that no page cache could hold,
    through slots, and without a compiled reader."""
    straight = route in ("direct", "past the cache")
    if straight and not DIRECT:
        pytest.skip("no compiled kernel that reads files: see `cmdgpu doctor`")
    if route == "past the cache":
        monkeypatch.setattr("cmdgpu.streaming.direct._free_bytes", lambda: 0)
    if not straight:

        def no_threads(*_: object) -> int:
            return 0

        monkeypatch.setattr("cmdgpu.streaming.engine.threads_for", no_threads)
    if route == "plain":
        monkeypatch.setattr(ops.files, "can_read", lambda: False)


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    take(request.param, monkeypatch)
    return request.param


@pytest.fixture
def through_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    take("slots", monkeypatch)


def fit(source: Trajectory | AnyArray, out: Path | None = None, limit: str = "1GiB") -> CMD:
    return CMD(n_modes=4, n_samples=300).fit(source, out=out, memory_limit=limit)


@pytest.fixture
def one_thread() -> None:
    torch.set_num_threads(1)


# ---- one set of bits ----------------------------------------------------------------------------------


def smallest_limit(source: Trajectory) -> str:
    with pytest.raises(MemoryLimitError) as refused:
        fit(source, limit="20MB")
    return str(refused.value.hint).split()[1]


@pytest.mark.usefixtures("through_slots")
def test_any_memory_limit_gives_the_same_bits(stores: dict[int, Path], tmp_path: Path) -> None:
    source = Trajectory.open(stores[16384])
    limits = ["1GiB", smallest_limit(source)]
    limits.append(f"{parse_bytes(limits[1]) + 8 * ROWS * T * 4}")
    cmds = [fit(source, limit=limit) for limit in limits]
    assert len({cmd.metrics_["rows_per_block"] for cmd in cmds}) == 3, "the limits do not change the blocks"
    assert len({fit_bits(cmd) for cmd in cmds}) == 1
    trees = [tree_bytes(fit(source, tmp_path / f"{i}.zarr", limit).result.path or tmp_path / "?")
             for i, limit in enumerate(limits)]  # fmt: skip
    assert trees[0] == trees[1] == trees[2]
    assert fit_bits(CMD.load(tmp_path / "0.zarr")) == fit_bits(cmds[0])


@pytest.mark.usefixtures("route")
def test_chunk_sizes_and_an_array_in_memory_give_the_same_rows(stores: dict[int, Path], W: AnyArray) -> None:
    in_memory = fit(W)
    for path in stores.values():
        cmd = fit(Trajectory.open(path))
        assert row_bits(cmd) == row_bits(in_memory)
        # sums of other units round differently; what is counted is the same
        mine, theirs = cmd.result.totals, in_memory.result.totals
        assert np.array_equal(mine.histogram, theirs.histogram)
        assert np.array_equal(mine.tensors[:, 0], theirs.tensors[:, 0])
        np.testing.assert_allclose(mine.tensors, theirs.tensors, rtol=1e-12)


@pytest.mark.usefixtures("one_thread")
def test_any_number_of_threads_gives_the_same_bits(stores: dict[int, Path]) -> None:
    source = Trajectory.open(stores[16384])
    alone = fit_bits(fit(source))
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert fit_bits(fit(source)) == alone


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("on_disk", [False, True])
def test_any_order_of_units_gives_the_same_bits(
    stores: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_disk: bool
) -> None:
    source = Trajectory.open(stores[16384])
    straight = fit(source, tmp_path / "straight.zarr" if on_disk else None)

    def shuffled(writer: object, units: Sequence[int]) -> list[int]:
        del writer
        return random.Random(1).sample(units, len(units))

    monkeypatch.setattr("cmdgpu.streaming.engine._missing", shuffled)
    other = fit(source, tmp_path / "shuffled.zarr" if on_disk else None)
    assert fit_bits(other) == fit_bits(straight)
    if on_disk:
        assert tree_bytes(tmp_path / "shuffled.zarr") == tree_bytes(tmp_path / "straight.zarr")


@pytest.mark.usefixtures("unit_by_unit")
def test_stopped_and_resumed_equals_uninterrupted(stores: dict[int, Path], tmp_path: Path) -> None:
    source = Trajectory.open(stores[16384])
    out = tmp_path / "out.zarr"

    for most in (1, 3):
        with pytest.raises(Stopped):
            CMD(n_modes=4, n_samples=300).fit(source, out=out, progress=StopAfter(most))
        assert not out.exists()
    resumed = fit(source, out)
    assert 0 < resumed.metrics_["units_resumed"] < 5, "nothing was left to resume"
    whole_fit = fit(source, tmp_path / "whole.zarr")
    assert fit_bits(resumed) == fit_bits(whole_fit)
    assert tree_bytes(out) == tree_bytes(tmp_path / "whole.zarr")


@pytest.mark.usefixtures("unit_by_unit", "route")
def test_a_fit_that_lacks_nothing_but_its_end_is_ended(
    stores: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = Trajectory.open(stores[65536]), tmp_path / "out.zarr"

    def stop(_: StoredWriter) -> None:
        raise Stopped

    with monkeypatch.context() as stopping:
        stopping.setattr(StoredWriter, "finish", stop)
        with pytest.raises(Stopped):
            fit(source, out)
    assert fit(source, out).metrics_["units_resumed"] == 2
    fit(source, tmp_path / "whole.zarr")
    assert tree_bytes(out) == tree_bytes(tmp_path / "whole.zarr")


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory, W: AnyArray) -> Path:
    path = tmp_path_factory.mktemp("compressed") / "rows-16384.zarr"
    Trajectory.from_array(W, out=path, rows_per_chunk=16384, zstd=True)
    return path


@pytest.mark.usefixtures("one_thread")
def test_a_compressed_store_gives_the_same_bits_with_any_limit_and_any_threads(
    stores: dict[int, Path], compressed: Path
) -> None:
    plain, source = Trajectory.open(stores[16384]), Trajectory.open(compressed)
    assert source.stored_bytes < plain.stored_bytes
    expected = fit_bits(fit(plain))
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for limit in ("1GiB", smallest_limit(source)):
            assert fit_bits(fit(source, limit=limit)) == expected


@pytest.mark.usefixtures("unit_by_unit")
def test_a_compressed_store_resumed_gives_the_bits_of_one_that_is_not(
    stores: dict[int, Path], compressed: Path, tmp_path: Path
) -> None:
    source, out = Trajectory.open(compressed), tmp_path / "out.zarr"
    with pytest.raises(Stopped):
        CMD(n_modes=4, n_samples=300).fit(source, out=out, progress=StopAfter(3))
    resumed = fit(source, out)
    assert 0 < resumed.metrics_["units_resumed"] < 5
    assert fit_bits(resumed) == fit_bits(fit(Trajectory.open(stores[16384])))
    assert tree_bytes(out) == tree_bytes(fit(source, tmp_path / "whole.zarr").result.path or tmp_path / "?")


def test_the_plan_of_a_compressed_store_counts_the_frames_in_flight(
    stores: dict[int, Path], compressed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, source = Trajectory.open(stores[16384]), Trajectory.open(compressed)
    cpu = torch.device("cpu")
    assert threads_for(source.source, T, 4, cpu) == 0, "read in C++ as if it were not compressed"
    assert bool(threads_for(plain.source, T, 4, cpu)) == DIRECT
    take("slots", monkeypatch)
    frames = READS_IN_FLIGHT * (zstd.bound(4 * ROWS) + 4 + zstd.DECODER_BYTES)
    planned = [fit(traj).metrics_["planned_bytes"] for traj in (plain, source)]
    assert planned[1] == planned[0] + frames


@pytest.mark.parametrize("tail", [0, 1, 255])
def test_a_last_unit_of_any_length_is_fitted_like_the_others(tmp_path: Path, tail: int) -> None:
    n = 3 * 256 + tail
    W = planted(n, 12, noise=0.2)
    source = write_store(tmp_path / "tail.zarr", W)
    cmd = CMD(n_modes=3, n_samples=200).fit(source, out=tmp_path / "out.zarr")
    assert cmd.labels_.shape == cmd.a_.shape == (n,)
    check_equals_definition(cmd, W)
    assert sum(cmd.metrics_["mode_sizes"]) == cmd.metrics_["n_rows"] == n
    assert fit_bits(CMD(n_modes=3, n_samples=200).fit(source)) == fit_bits(cmd)


# ---- every byte once ----------------------------------------------------------------------------------


@pytest.mark.parametrize("is_compressed", [False, True])
def test_every_chunk_is_read_once(
    stores: dict[int, Path],
    compressed: Path,
    monkeypatch: pytest.MonkeyPatch,
    route: str,
    is_compressed: bool,
) -> None:
    source = Trajectory.open(compressed if is_compressed else stores[16384]).sel(stride=2)
    read = chunks_read(monkeypatch)
    cmd = fit(source)
    assert sorted(read) == sorted(f"c.{i}.{t}" for i in range(5) for t in range(0, T, 2)), route
    assert cmd.metrics_["bytes_read"] == 5 * ROWS * (T // 2) * 4


def test_files_that_change_between_two_looks_are_an_error(
    stores: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the fast way finds wrong twice and the careful way right is believed by nobody."""
    take("direct", monkeypatch)
    asked: list[int] = []

    def wrong(*_: object, **__: object) -> None:
        asked.append(1)

    monkeypatch.setattr(ops, "fit_files", wrong)
    with pytest.raises(StoreCorrupt, match="change while they are read"):
        fit(Trajectory.open(stores[65536]))
    assert len(asked) >= 2


@pytest.mark.usefixtures("route")
def test_a_callers_treatment_of_subnormals_changes_no_bit(tmp_path: Path) -> None:
    values = walks(600, 12)
    values[7] = 1e-40
    values[8] += 3e-41
    source = write_store(tmp_path / "s.zarr", values)
    plain = CMD(n_modes=2, n_samples=50).fit(source)
    assert plain.b_[7] == np.float32(1e-40)
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU always keeps subnormals")
    try:
        flushed = CMD(n_modes=2, n_samples=50).fit(source)
    finally:
        torch.set_flush_denormal(False)
    assert flushed.b_[7].tobytes() == plain.b_[7].tobytes()
    assert row_bits(flushed) == row_bits(plain)


def test_the_page_cache_is_left_alone_by_what_it_could_not_keep(
    stores: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Trajectory.open(stores[16384]).source
    read = source.map.n_rows * T * 4
    monkeypatch.setattr("cmdgpu.streaming.direct._free_bytes", lambda: 2 * read)
    cached = Way(past_cache=False, threads=2)
    assert ways(source, T, 2) == [cached]
    monkeypatch.setattr("cmdgpu.streaming.direct._free_bytes", lambda: 2 * read - 2)
    assert ways(source, T, 2) == [Way(past_cache=True, threads=4), cached]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux what its page cache holds")
def test_files_that_come_from_the_disk_are_waited_for_by_more_threads(stores: dict[int, Path]) -> None:
    source = Trajectory.open(stores[16384]).source
    assert [way.threads for way in ways(source, T, 2)] == [2]
    if not evict(stores[16384] / "weights" / f"c.4.{T - 1}"):
        pytest.skip("this file system keeps its files in memory")
    assert ways(source, T, 2) == [Way(past_cache=False, threads=4), Way(past_cache=False, threads=2)]


def test_more_snapshots_than_files_may_be_open_go_through_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    take("direct", monkeypatch)
    source = StoreSource.__new__(StoreSource)
    source.view = SimpleNamespace(dtype="float32", is_compressed=False, is_local=True)  # pyright: ignore[reportAttributeAccessIssue]
    cpu = torch.device("cpu")
    monkeypatch.setattr("resource.getrlimit", lambda _: (1024, 4096))  # pyright: ignore
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert [threads_for(source, n, 4, cpu) for n in (10, 100, 384, 768, 769)] == [8, 7, 2, 1, 0]
    source.view.map = SimpleNamespace(n_rows=10)  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr("cmdgpu.streaming.direct._free_bytes", lambda: 0)
    assert [way.threads for way in ways(source, 10, 8)] == [16, 8]
    assert [way.threads for way in ways(source, 100, 3)] == [6, 3], "no more files than may be open"
    assert [way.threads for way in ways(source, 100, 4)] == [4], "too few to keep a disk busy"
    monkeypatch.setattr("resource.getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)  # pyright: ignore
    assert threads_for(source, 100_000, 4, cpu) == 8
    assert threads_for(source, 10, 4, torch.device("cuda")) == 0


def test_what_a_device_has_no_room_for_is_one_line_and_outputs_of_two_blocks_are_planned_for() -> None:
    cuda, cpu = torch.device("cuda", 1), torch.device("cpu")
    with pytest.raises(MemoryLimitError, match=r"do not fit on cuda:1"), in_room(cuda):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
    assert (blocks_under_way(cpu), blocks_under_way(cuda)) == (1, 2)


def test_progress_ends_at_what_was_announced_resumed_units_included(
    stores: dict[int, Path], tmp_path: Path
) -> None:
    source = Trajectory.open(stores[16384])
    for out in (None, tmp_path / "out.zarr"):
        ticks = Ticks()
        CMD(n_modes=4, n_samples=300).fit(source, out=out, progress=ticks)
        assert (ticks.what, ticks.done, ticks.ends) == ("fit", ticks.total, 1)
        assert ticks.total == 5 * ROWS * T * 4


# ---- what goes wrong ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("unit_by_unit", "route")
def test_a_damaged_chunk_ends_the_fit_by_name_and_keeps_the_units_before_it(tmp_path: Path) -> None:
    store, out = tmp_path / "s.zarr", tmp_path / "out.zarr"
    source = write_store(store, walks(6 * 256, 8))
    flip_bit(store / "weights" / "c.4.2", 999)
    work = CMD(n_modes=3, n_samples=50)
    with pytest.raises(StoreCorrupt, match=r"c\.4\.2: tensor 'W' at step 2: .*crc32c mismatch; .*verify"):
        work.fit(source, out=out)
    assert not out.exists()
    flip_bit(store / "weights" / "c.4.2", 999)
    cmd = work.fit(Trajectory.open(store), out=out)
    assert cmd.metrics_["units_resumed"] == 4
    assert fit_bits(cmd) == fit_bits(CMD(n_modes=3, n_samples=50).fit(Trajectory.open(store)))


def test_a_write_that_fails_ends_the_fit_and_its_threads(
    stores: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, written = MemoryWriter.write, list[int]()

    def failing(writer: MemoryWriter, unit: int, rows: UnitRows, statistics: UnitStatistics) -> None:
        if unit == 2:
            raise WriteFailed("cannot write: the disk is full", file="c.2")
        written.append(unit)
        inner(writer, unit, rows, statistics)

    monkeypatch.setattr(MemoryWriter, "write", failing)
    with pytest.raises(WriteFailed, match="the disk is full"):
        fit(Trajectory.open(stores[16384]))
    assert {0, 1} <= set(written) and 2 not in written and len(written) < 3 + WRITES_IN_FLIGHT
    assert not [t for t in threading.enumerate() if t.name.startswith(("cmdgpu-read", "cmdgpu-write"))]


# ---- rows that are not fitted --------------------------------------------------------------------------


def test_a_hole_is_never_labelled_and_counts_nowhere(tmp_path: Path) -> None:
    """Rows of the layout that belong to no tensor, as a sharded recording pads with."""
    solid = whole([("a", "parameter", "float32", (300,)), ("b", "parameter", "float32", (500,))])
    moved = [piece.row + (100 if entry.name == "b" else 0) for entry in solid for piece in entry.pieces]
    tensors = tuple(
        type(entry)(entry.name, entry.kind, entry.dtype, entry.shape,
                    tuple(type(p)(p.offset, p.size, row) for p in entry.pieces))
        for entry, row in zip(solid, moved, strict=True)
    )  # fmt: skip
    layout = ParameterMap(tensors, holes=((300, 400),))
    W = planted(900, 10)
    W[300:400] = np.nan
    source = write_store(tmp_path / "s.zarr", W, layout=layout)
    cmd = CMD(n_modes=3, n_samples=100).fit(source, out=tmp_path / "out.zarr")
    labels = np.asarray(cmd.labels_)
    assert np.all(labels[300:400] == UNWRITTEN)
    assert np.isnan(np.asarray(cmd.a_)[300:400]).all() and np.isnan(np.asarray(cmd.b_)[300:400]).all()
    assert np.all(labels[:300] >= 0) and np.all(labels[400:] >= 0)
    assert (cmd.metrics_["n_rows"], cmd.metrics_["n_nonfinite"]) == (800, 0)
    at = slice(400, 900)
    by_hand = (
        np.asarray(cmd.a_)[at].astype(np.float64) * cmd.references_[labels[at], 3] + np.asarray(cmd.b_)[at]
    )
    assert np.array_equal(cmd.state_dict(3)["b"].numpy(), by_hand.astype(np.float32))


def test_rows_that_are_constant_or_not_finite_keep_their_place_in_every_unit(tmp_path: Path) -> None:
    W = planted(5 * 256, 9)
    W[::7] = 0.1
    W[3::11, 4] = np.inf
    W[5::13, 8] = np.nan
    source = write_store(tmp_path / "s.zarr", W)
    cmd = CMD(n_modes=3, n_samples=300).fit(source)
    check_equals_definition(cmd, W)
    finite = np.isfinite(W).all(axis=1)
    assert cmd.metrics_["n_nonfinite"] == np.sum(~finite) == np.sum(np.asarray(cmd.labels_) == NON_FINITE)
    still = np.sum(finite & (W[:, :1] == W).all(axis=1))
    assert cmd.metrics_["n_constant"] == still == np.sum(np.asarray(cmd.labels_) == CONSTANT)


def test_without_a_moving_row_in_the_sample_every_row_is_its_mean(tmp_path: Path) -> None:
    W = np.tile(np.arange(700, dtype=np.float32)[:, None], (1, 4))
    source = write_store(tmp_path / "s.zarr", W)
    with pytest.warns(CmdgpuWarning, match="none of the 100 sampled rows moves"):
        cmd = CMD(n_modes=3, n_samples=100).fit(source, out=tmp_path / "out.zarr")
    assert cmd.n_modes_ == 0 and cmd.references_.shape == (0, 4)
    assert np.array_equal(np.asarray(cmd.b_), W[:, 0])
    assert np.all(np.asarray(cmd.labels_) == CONSTANT)
    loaded = CMD.load(tmp_path / "out.zarr")
    assert np.array_equal(loaded.state_dict(2)["W"].numpy(), W[:, 2])
    assert "0 modes" in loaded.summary()


def test_a_unit_is_a_chunk_of_the_store(stores: dict[int, Path]) -> None:
    traj = Trajectory.open(stores[32768])
    frame = Frame(traj.parameters, traj.steps, traj.source.rows)
    assert (frame.rows, frame.n_units) == (32768, 3)
    assert [frame.unit(i) for i in range(3)] == [(0, 32768), (32768, 65536), (65536, N)]
