"""Laws at sizes that no test disk holds: rows beyond 2^32, many tensors, what a sample reads."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cmdgpu import sampling
from cmdgpu.decomposition import CMD
from cmdgpu.errors import CmdgpuWarning
from cmdgpu.notation import F32, F64, I64, UNWRITTEN, AnyArray
from cmdgpu.results import Frame
from cmdgpu.results.verification import verify_result
from cmdgpu.sampling import announcement, candidate_rows, draw_sample
from cmdgpu.sources import FillTask
from cmdgpu.statistics import Totals, tensor_shares, unit_statistics
from cmdgpu.store import format as fmt
from cmdgpu.store.parameter_map import Kind, ParameterMap, Piece, TensorEntry, whole
from cmdgpu.store.view import StoreView
from cmdgpu.trajectory import Trajectory
from tests.harness import planted, write_store

N = 5_000_000_000
T, N_PLANTED = 6, 3
UNIT = 1 << 18
EDGES = (1 << 31, 1 << 32)
"""Where int32 and uint32 end."""


# ---- rows that are made when they are asked for ---------------------------------------------------------


def _profiles() -> F64:
    walks = np.random.default_rng(3).standard_normal((N_PLANTED, T)).cumsum(axis=1)
    basis, _ = np.linalg.qr((walks - walks.mean(axis=1, keepdims=True)).T)
    return basis.T


R_MT = _profiles()


def planted_mode(rows: I64) -> I64:
    return (_hash(rows) % N_PLANTED).astype(np.int64)


def values_of(rows: I64) -> F32:
    """(len(rows), T) a r_m + b, all three told by all bits of the row's number."""
    size = (_hash(rows) >> np.uint64(8) & np.uint64(0xFFF)).astype(np.float64) / 0xFFF
    return ((0.5 + size)[:, None] * R_MT[planted_mode(rows)] + size[:, None]).astype(np.float32)


def _hash(rows: I64) -> AnyArray:
    return rows.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)


class Imagined:
    """A source of any number of rows, none of which is anywhere."""

    dtype = "float32"
    rows = UNIT
    n_snapshots = T
    reads_in_flight = 4

    def __init__(self, parameter_map: ParameterMap) -> None:
        self.map = parameter_map
        self.filled: list[int] = []

    def fill_tasks(self, unit: int, stop: int, columns: I64, W_tb: AnyArray) -> Iterator[FillTask]:
        def task(i: int) -> FillTask:
            def run() -> int:
                rows = np.arange(i * UNIT, (i + 1) * UNIT, dtype=np.int64)
                W_tb[:, (i - unit) * UNIT : (i - unit + 1) * UNIT] = values_of(rows)[:, columns].T
                self.filled.append(i)
                return UNIT * len(columns) * 4

            return run

        yield from (task(i) for i in range(unit, stop))

    def fill_bytes(self, n_columns: int) -> int:
        return 4 * UNIT * (n_columns + 4) * 8

    def require(self, columns: I64) -> None:
        del columns

    def read_rows(self, rows: I64, columns: I64) -> AnyArray:
        return values_of(rows)[:, columns]


def islands() -> ParameterMap:
    """Five tensors, of which two lie across the edges and one ends at N; holes between them."""
    spans: list[tuple[str, Kind, int, int]] = [
        ("first", "parameter", 0, 1000),
        *((f"edge{k}", "parameter", edge - 700, edge + 500) for k, edge in enumerate(EDGES)),
        ("buffer", "buffer", EDGES[1] + 500, EDGES[1] + 600),
        ("last", "parameter", N - 900, N),
    ]
    holes = [(a[3], b[2]) for a, b in itertools.pairwise(spans) if a[3] < b[2]]
    tensors = tuple(
        TensorEntry(name, kind, "float32", (stop - start,), (Piece((0,), (stop - start,), start),))
        for name, kind, start, stop in spans
    )
    return ParameterMap(tensors, holes=tuple(holes))


def test_a_fit_of_rows_beyond_int32_and_uint32_is_exact(tmp_path: Path) -> None:
    source = Imagined(islands())
    traj = Trajectory(source, 10 * np.arange(T), np.arange(T))
    assert traj.shape == (N, T)
    cmd = CMD(n_modes=N_PLANTED, n_samples=500, device="cpu").fit(traj, out=tmp_path / "r.zarr")
    live_units = sorted({row // UNIT for t in source.map for row in (t.pieces[0].row, t.pieces[0].stop - 1)})
    assert sorted(source.filled) == live_units and len(live_units) == 6, "only units with a row are read"

    sampled = cmd.sample_rows_
    assert sampled.max() > EDGES[1] and np.array_equal(cmd.sample_, values_of(sampled))
    assert np.array_equal(cmd.references_, values_of(cmd.reference_rows_))
    owner = planted_mode(cmd.reference_rows_)
    for entry in source.map:
        rows = np.arange(entry.pieces[0].row, entry.pieces[0].stop, dtype=np.int64)
        labels = np.asarray(cmd.labels_[rows[0] : rows[-1] + 1])
        assert np.array_equal(owner[labels], planted_mode(rows)), entry.name
        rebuilt = cmd.state_dict(30, [f"^{entry.name}$"], buffers="rebuilt")[entry.name].numpy()
        np.testing.assert_allclose(rebuilt, values_of(rows)[:, 3], atol=1e-5)
        shares = cmd.tensor_shares_[entry.name]
        assert shares == [0, 0, *np.bincount(labels, minlength=N_PLANTED).tolist()]
    around = np.asarray(cmd.labels_[N - 901 : N])
    assert around[0] == UNWRITTEN and (around[1:] >= 0).all()
    assert cmd.metrics_["n_rows"] == 1000 + 2 * 1200 + 900 and cmd.metrics_["n_buffer_rows"] == 100
    assert cmd.metrics_["trajectory_bytes"] >= 4 * T * 4300
    again = CMD.load(tmp_path / "r.zarr")
    assert np.array_equal(again.labels_[N - 900 : N], around[1:])
    assert verify_result(tmp_path / "r.zarr").damaged == []


WHOLE = ParameterMap(
    whole([("a", "parameter", "float32", (3_000_000_000,)), ("b", "parameter", "float32", (20_000, 100_000))])
)


def test_rows_of_five_billion_are_told_exactly() -> None:
    assert WHOLE.n_rows == N
    assert WHOLE.locate(N - 1) == "b[19999, 99999]"
    assert WHOLE.locate(EDGES[1]) == "b[12949, 67296]"
    (segment,) = WHOLE.segments(EDGES[1] - 5, EDGES[1] + 5)
    assert (segment.tensor, segment.start, segment.stop) == (1, EDGES[1] - 5, EDGES[1] + 5)
    first, second = WHOLE.segments(3_000_000_000 - 5, 3_000_000_000 + 5)
    assert (first.stop, second.start) == (3_000_000_000, 3_000_000_000)
    assert WHOLE.name_rows(N - 1, N) == "b"
    frame = Frame(WHOLE, np.arange(T), UNIT)
    assert frame.n_units == 19_074 and frame.unit(19_073) == (19_073 * UNIT, N)


def test_five_billion_rows_are_sampled_from_end_to_end() -> None:
    for k in (1000, 20_000):
        rows = draw_sample(WHOLE, k, "uniform", 1).rows
        assert rows.dtype == np.int64 and (np.diff(rows) > 0).all()
        share = np.bincount((rows * 10 // N), minlength=10)
        assert np.abs(share - k / 10).max() < 6 * np.sqrt(k / 10)
        traj = Trajectory(Imagined(WHOLE), np.arange(T), np.arange(T))
        assert np.array_equal(traj.read_rows(rows[::-1]), values_of(rows[::-1]))


def test_statistics_of_a_unit_beyond_uint32_are_its_tensors() -> None:
    first = (3_000_000_000 // UNIT) * UNIT  # holds the end of a and the start of b
    cut = 3_000_000_000 - first
    mode = np.zeros(UNIT, dtype=np.int16)
    mode[:cut] = 1
    ones = np.ones(UNIT, dtype=np.float32)
    totals = Totals.zero(WHOLE, 2)
    for start in (first, (N // UNIT) * UNIT):
        n = min(UNIT, N - start)
        unit = unit_statistics(
            WHOLE, start, mode=mode[:n], a=ones[:n], b=ones[:n], correlation=ones[:n], ss=ones[:n],
            reference_means=np.zeros(2), n_snapshots=T, epsilon=2.0**-23,
        )  # fmt: skip
        totals.add(WHOLE, start, n, unit)
    last = N - (N // UNIT) * UNIT
    assert tensor_shares(totals, WHOLE) == {"a": [0, 0, 0, cut], "b": [0, 0, UNIT - cut + last - cut, cut]}


# ---- many tensors ---------------------------------------------------------------------------------------


def many(count: int) -> ParameterMap:
    """Tensors of 1 to 5,003 rows, most in two pieces with a hole between; every eleventh a buffer."""
    rows, entries, holes = 0, list[TensorEntry](), list[tuple[int, int]]()
    for i in range(count):
        n, half = 1 + i * 7919 % 5003, (1 + i * 7919 % 5003) // 2
        kind: Kind = "buffer" if i % 11 == 10 else "parameter"
        pieces = (Piece((0,), (n,), rows),)
        if half:
            pieces = (Piece((0,), (half,), rows), Piece((half,), (n - half,), rows + half + 13))
            holes.append((rows + half, rows + half + 13))
        entries.append(TensorEntry(f"t{i}", kind, "float32", (n,), pieces))
        rows = pieces[-1].stop
    return ParameterMap(tuple(entries), holes=tuple(holes))


FROZEN = {
    3: "28dcdb7955088fcb",
    40: "b650f7a955e64a08",
    900: "f7110c0b2f1ce981",
    4600: "2ba103f17cdc3f19",
    9000: "c2710f63ea94f7f3",
}


@pytest.mark.parametrize("n_tensors", FROZEN)
def test_the_rows_of_many_tensors_never_change(n_tensors: int) -> None:
    """Candidates and samples, below, at and above what the sketch serves; more tensors than shares, too."""
    layout = many(n_tensors)
    drawn = [candidate_rows(layout)] + [
        draw_sample(layout, k, rule, 5).rows
        for rule in ("layer-balanced", "uniform")
        for k in (1000, 4096, 20_000)
    ]
    assert fmt.sha256(*(rows.tobytes() for rows in drawn))[:16] == FROZEN[n_tensors]


def test_fifty_thousand_tensors_are_sampled_at_once() -> None:
    """A union of all candidates for every tensor took 20 s."""
    layout = ParameterMap(whole([(f"t{i}", "parameter", "float32", (1 + i % 997,)) for i in range(50_000)]))
    started = time.process_time()
    for k in (1000, 4096):
        assert len(draw_sample(layout, k, "layer-balanced", 0).rows) == k
    assert time.process_time() - started < 4


# ---- what a sample reads --------------------------------------------------------------------------------


@pytest.fixture
def every_byte_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_WORTH_A_WORD", 1)


def said_by(work: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    assert all(issubclass(each.category, CmdgpuWarning) for each in caught)
    return [str(each.message) for each in caught]


def mostly_still() -> F32:
    """10,000 x 4, few rows of which move: clustering a large sample of them is no work."""
    W_nt = planted(10_000, 4)
    W_nt[np.arange(10_000) % 100 > 0] = 0.5
    return W_nt


def fitted(traj: Trajectory | F32, k: int) -> Callable[[], object]:
    return lambda: CMD(n_modes=2, n_samples=k, sampling="uniform", device="cpu").fit(traj)


@pytest.mark.usefixtures("every_byte_counts")
def test_a_sample_that_no_sketch_serves_says_what_it_reads(tmp_path: Path) -> None:
    W_nt = mostly_still()
    with_sketch = write_store(tmp_path / "with.zarr", W_nt, rows=512)
    without = write_store(tmp_path / "without.zarr", W_nt, rows=512, sketch=False)
    assert said_by(fitted(with_sketch, 5000)) == [
        "a sample of 5000 rows is beyond the 4096 that the sketch serves: 164 kB in 80 chunks are read for it"
    ]
    assert said_by(fitted(with_sketch.sel(stride=2, stop=3), 5000)) != []
    (words,) = said_by(fitted(without, 300))
    touched = len(np.unique(draw_sample(without.parameters, 300, "uniform", 0).rows // 512))
    assert words.startswith("a sample of 300 rows of a store without a sketch: ")
    assert words.endswith(f" in {4 * touched} chunks are read for it")
    assert said_by(fitted(with_sketch, 4096)) == [], "the sketch has them"
    assert said_by(fitted(W_nt, 5000)) == [], "an array costs nothing to look at"


@pytest.mark.usefixtures("every_byte_counts")
def test_a_sample_of_other_rows_than_the_sketch_says_so(tmp_path: Path) -> None:
    write_store(tmp_path / "s.zarr", mostly_still())
    view = StoreView.open(tmp_path / "s.zarr")
    assert view.sketch_rows is not None
    others = np.flatnonzero(~np.isin(np.arange(10_000), view.sketch_rows))
    elsewhere = sampling.Sample(others[:2], "uniform", True)
    words = announcement(elsewhere, view, 4)
    assert words is not None and words.startswith("a sample of 2 rows that the sketch does not hold: ")


def test_what_is_read_in_no_time_is_not_announced(tmp_path: Path) -> None:
    traj = write_store(tmp_path / "s.zarr", mostly_still())
    assert said_by(fitted(traj, 5000)) == []
