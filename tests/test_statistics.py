"""Laws of the statistics: sums per tensor and class that equal counting by hand and merge in order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmdgpu.decomposition import CMD
from cmdgpu.notation import F32, F64, I16, AnyArray
from cmdgpu.statistics import (
    BIN_EDGES,
    FIELDS,
    N_BINS,
    QUANTILES,
    Totals,
    UnitStatistics,
    summarise,
    tensor_shares,
    unit_statistics,
)
from cmdgpu.store.parameter_map import ParameterMap, Piece, TensorEntry, whole
from tests.harness import planted, write_store

M, T = 3, 12
EPSILON = 2.0**-23
MAP = ParameterMap(
    tensors=(
        TensorEntry("first", "parameter", "float32", (7, 11), (Piece((0, 0), (7, 11), 0),)),
        TensorEntry("bn.running_var", "buffer", "float32", (90,), (Piece((0,), (90,), 77),)),
        # two pieces, as two ranks of a sharded model leave them, a hole between
        TensorEntry("sharded", "parameter", "float32", (20, 10), (Piece((0, 0), (10, 10), 167),
                                                                   Piece((10, 0), (10, 10), 300))),
        TensorEntry("last", "parameter", "float32", (113,), (Piece((0,), (113,), 400),)),
    ),
    holes=((267, 300),),
)  # fmt: skip
N = 513


class Rows:
    """Fits of N rows, as a kernel answers them."""

    def __init__(self, seed: int, n_modes: int = M) -> None:
        rng = np.random.default_rng(seed)
        self.mode: I16 = rng.integers(-2, n_modes, N).astype(np.int16)
        moving = self.mode >= 0
        self.correlation: F32 = np.where(moving, rng.uniform(-1, 1, N), 0).astype(np.float32)
        self.correlation[rng.integers(N, size=20)] *= 0
        self.correlation[moving & (rng.random(N) < 0.1)] = 1
        self.ss: F32 = rng.lognormal(0, 3, N).astype(np.float32)
        self.ss[self.mode == -1] = 0
        self.ss[self.mode == -2] = np.nan
        self.a: F32 = np.where(moving, rng.standard_normal(N), 0).astype(np.float32)
        self.b: F32 = (rng.standard_normal(N) * 10.0 ** rng.integers(0, 7, N)).astype(np.float32)
        self.b[self.mode == -2] = np.nan
        self.means: F64 = rng.standard_normal(n_modes)

    def unit(self, start: int, stop: int) -> UnitStatistics:
        at = slice(start, stop)
        return unit_statistics(
            MAP,
            start,
            mode=self.mode[at],
            a=self.a[at],
            b=self.b[at],
            correlation=self.correlation[at],
            ss=self.ss[at],
            reference_means=self.means,
            n_snapshots=T,
            epsilon=EPSILON,
        )

    def totals(self, rows: int) -> Totals:
        totals = Totals.zero(MAP, len(self.means))
        for start in range(0, N, rows):
            stop = min(start + rows, N)
            totals.add(MAP, start, stop - start, self.unit(start, stop))
        return totals


def by_hand(rows: Rows) -> tuple[F64, AnyArray]:
    """The same, one row after the other."""
    tensors = np.zeros((len(MAP), len(FIELDS), 2 + len(rows.means)))
    histogram = np.zeros((len(rows.means), N_BINS), dtype=np.int64)
    tensor_of = {row: i for start, stop, i in MAP.spans for row in range(start, stop)}
    for row, i in tensor_of.items():
        mode, corr = int(rows.mode[row]), float(rows.correlation[row])
        ss = 0.0 if mode == -2 else float(rows.ss[row])
        mean = 0.0
        if mode >= 0:
            mean = float(rows.b[row]) + float(rows.a[row]) * float(rows.means[mode])
        below = mode >= 0 and ss <= T * (4 * EPSILON * mean) ** 2
        values = (1, ss, ss * (1 - corr**2), abs(corr), corr**2, below)
        tensors[i, :, mode + 2] += values
        if mode >= 0 and MAP.tensors[i].kind == "parameter":
            place = int(np.searchsorted(BIN_EDGES, abs(corr), side="right")) - 1
            histogram[mode, min(place, N_BINS - 1)] += 1
    return tensors, histogram


@settings(max_examples=25)
@given(st.integers(0, 1 << 20), st.sampled_from([1, 7, 64, 256, 400, N]))
def test_sums_over_units_equal_counting_row_by_row(seed: int, rows_per_unit: int) -> None:
    rows = Rows(seed)
    found = rows.totals(rows_per_unit)
    tensors, histogram = by_hand(rows)
    assert np.array_equal(found.tensors[:, 0], tensors[:, 0])
    assert np.array_equal(found.tensors[:, 5], tensors[:, 5])
    np.testing.assert_allclose(found.tensors, tensors, rtol=1e-12, atol=1e-12)
    assert np.array_equal(found.histogram, histogram)


def test_units_are_merged_as_they_come() -> None:
    """Float sums of another order round differently: the order is the contract, and it is the units'."""
    rows = Rows(1)
    totals = Totals.zero(MAP, M)
    expected = np.zeros_like(totals.tensors)
    for start in range(0, N, 64):
        stop = min(start + 64, N)
        unit = rows.unit(start, stop)
        for segment, sums in zip(MAP.segments(start, stop), unit.segments, strict=True):
            expected[segment.tensor] = expected[segment.tensor] + sums
        totals.add(MAP, start, stop - start, unit)
    assert totals.tensors.tobytes() == expected.tobytes()


def test_buffers_stand_apart() -> None:
    rows = Rows(2)
    metrics = summarise(rows.totals(64), MAP, T)
    buffer = np.zeros(N, dtype=bool)
    buffer[77:167] = True
    hole = np.zeros(N, dtype=bool)
    hole[267:300] = True
    parameter = ~buffer & ~hole
    assert metrics["n_rows"] == parameter.sum() == 390
    assert metrics["n_buffer_rows"] == 90
    assert metrics["n_constant"] == np.sum(parameter & (rows.mode == -1))
    assert metrics["n_nonfinite"] == np.sum(parameter & (rows.mode == -2))
    assert metrics["mode_sizes"] == [int(np.sum(parameter & (rows.mode == m))) for m in range(M)]
    moving = parameter & (rows.mode >= 0)
    corr, ss = rows.correlation[moving].astype(np.float64), rows.ss[moving].astype(np.float64)
    assert metrics["mean_abs_correlation"] == pytest.approx(np.abs(corr).mean(), rel=1e-12)
    assert metrics["r2"] == pytest.approx((corr**2).mean(), rel=1e-12)
    assert metrics["r2_energy"] == pytest.approx(1 - np.sum(ss * (1 - corr**2)) / ss.sum(), rel=1e-9)
    finite = np.sum(parameter & (rows.mode >= -1))
    assert metrics["weight_mse"] == pytest.approx(np.sum(ss * (1 - corr**2)) / (finite * T), rel=1e-12)


def test_shares_count_the_rows_of_every_tensor_by_class() -> None:
    rows = Rows(3)
    shares = tensor_shares(rows.totals(100), MAP)
    assert list(shares) == ["first", "bn.running_var", "sharded", "last"]
    for name, at in {
        "first": slice(0, 77),
        "bn.running_var": slice(77, 167),
        "last": slice(400, 513),
    }.items():
        assert shares[name] == [int(np.sum(rows.mode[at] == m)) for m in (-2, -1, 0, 1, 2)]
    both = np.concatenate([rows.mode[167:267], rows.mode[300:400]])
    assert shares["sharded"] == [int(np.sum(both == m)) for m in (-2, -1, 0, 1, 2)]


# ---- quantiles ----------------------------------------------------------------------------------------


def test_bins_crowd_where_correlations_do() -> None:
    assert BIN_EDGES[0] == 0 and BIN_EDGES[-1] == 1 and len(BIN_EDGES) == N_BINS + 1
    widths = np.diff(BIN_EDGES)
    assert np.all(np.diff(widths) < 0)
    assert widths[0] < 8e-3 and widths[-1] < 2e-5


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=60))
def test_quantiles_lie_within_a_bin_of_the_exact_ones(values: list[float]) -> None:
    rows = Rows(0, 1)
    rows.mode[:] = -1
    rows.mode[400 : 400 + len(values)] = 0
    rows.correlation[:] = 0
    rows.correlation[400 : 400 + len(values)] = values
    (found,) = summarise(rows.totals(64), MAP, T)["mode_quantiles"]
    assert found == sorted(found)
    ordered = np.sort(np.abs(values))
    for q, value in zip(QUANTILES, found, strict=True):
        at = q * len(ordered)
        low = ordered[max(int(np.floor(at - 1e-9)), 0)]
        high = ordered[min(int(np.ceil(at + 1e-9)) - 1, len(ordered) - 1)]
        slack = np.diff(BIN_EDGES).max() * 1.01
        assert min(low, high) - slack <= value <= max(low, high) + slack


def test_an_empty_mode_has_a_line_of_nothing() -> None:
    rows = Rows(4)
    rows.mode[rows.mode == 1] = 0
    metrics = summarise(rows.totals(64), MAP, T)
    assert metrics["mode_sizes"][1] == 0
    assert np.isnan(metrics["mode_quantiles"][1]).all()
    assert len(metrics["mode_quantiles"]) == M


def test_without_modes_or_rows_there_are_no_numbers_and_no_warnings() -> None:
    rows = Rows(5, 0)
    metrics = summarise(rows.totals(64), MAP, T)
    assert metrics["mode_sizes"] == [] and metrics["mode_quantiles"] == []
    assert np.isnan(metrics["r2"]) and np.isnan(metrics["mean_abs_correlation"])
    nothing = ParameterMap(whole([("b", "buffer", "float32", (4,))]))
    empty = summarise(Totals.zero(nothing, 2), nothing, T)
    assert (empty["n_rows"], empty["mode_sizes"]) == (0, [0, 0])
    assert all(np.isnan(empty[key]) for key in ("r2", "r2_energy", "weight_mse", "mean_abs_correlation"))


# ---- through a whole fit --------------------------------------------------------------------------------


def fitted_by_hand(cmd: CMD, W: AnyArray, rows: slice) -> dict[str, Any]:
    """What metrics_ says, from labels, a, b and the recorded values alone."""
    mode = np.asarray(cmd.labels_)[rows]
    values = W[rows].astype(np.float64)
    finite, moving = mode >= -1, mode >= 0
    references = np.concatenate([cmd.references_.astype(np.float64), np.zeros((2, W.shape[1]))])
    rebuilt = np.asarray(cmd.a_)[rows, None].astype(np.float64) * references[mode]
    rebuilt += np.asarray(cmd.b_)[rows, None]
    error = (values - rebuilt)[finite]
    centred = values[moving] - values[moving].mean(axis=1, keepdims=True)
    ss = np.sum(centred**2, axis=1)
    rss = np.sum((values - rebuilt)[moving] ** 2, axis=1)
    return {
        "weight_mse": np.mean(error**2),
        "r2_energy": 1 - rss.sum() / ss.sum(),
        "r2": np.mean(1 - rss / ss),
        "n_nonfinite": int(np.sum(~finite)),
        "n_constant": int(np.sum(mode == -1)),
        "n_rows": len(mode),
    }


@pytest.mark.parametrize("level", [0.0, 100.0])
def test_the_error_reported_is_the_error_of_the_matrix_rebuilt(tmp_path: Any, level: float) -> None:
    W = planted(1500, 30, noise=0.2, level=level)
    W[::9] = 2.5
    W[4::50, 3] = np.nan
    layout = ParameterMap(
        whole([("w", "parameter", "float32", (1000,)), ("running_mean", "buffer", "float32", (500,))])
    )
    source = write_store(tmp_path / "s.zarr", W, layout=layout)
    cmd = CMD(n_modes=3, n_samples=300).fit(source)
    expected = fitted_by_hand(cmd, W, slice(0, 1000))
    metrics = cmd.metrics_
    for key, value in expected.items():
        assert metrics[key] == pytest.approx(value, rel=1e-3), key
    assert metrics["n_buffer_rows"] == 500
    assert sum(cmd.tensor_shares_["running_mean"]) == 500
    # buffers are another population: were they counted, the numbers would be these
    assert metrics["weight_mse"] != pytest.approx(
        fitted_by_hand(cmd, W, slice(0, 1500))["weight_mse"], rel=1e-3
    )


def test_rows_whose_movement_is_rounding_are_counted(tmp_path: Any) -> None:
    W = planted(600, 8, noise=0.1, level=1.0)
    W[::6] = 1.0
    W[::6, 3] = np.nextafter(np.float32(1), np.float32(2))
    cmd = CMD(n_modes=3, n_samples=200).fit(write_store(tmp_path / "s.zarr", W))
    assert cmd.metrics_["n_below_quantisation"] == 100
    low = write_store(tmp_path / "low.zarr", W, dtype="bfloat16")
    assert CMD(n_modes=3, n_samples=200).fit(low).metrics_["n_constant"] >= 100


@pytest.mark.parametrize(("level", "share"), [(1e5, 0.0), (2.2e6, 0.5), (2e7, 1.0)])
def test_rounding_is_judged_by_the_mean_of_the_row(level: float, share: float) -> None:
    """Rows that are multiples of their reference: the mean lies in a r, and nothing of it in b."""
    n_snapshots = 40
    size = np.random.default_rng(0).uniform(0.7, 1.4, (2000, 1)).astype(np.float32)
    W = planted(2000, n_snapshots, noise=0.3, level=level) * size
    cmd = CMD(n_modes=3, n_samples=300).fit(W)
    mean = W.mean(axis=1, dtype=np.float64)
    ss = np.sum((W - mean[:, None]) ** 2, axis=1)
    expected = np.sum(ss <= n_snapshots * (4 * EPSILON * mean) ** 2)
    assert cmd.metrics_["n_below_quantisation"] == pytest.approx(expected, abs=3)
    assert expected / 2000 == pytest.approx(share, abs=0.45)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rounding_is_that_of_the_type_stored(tmp_path: Any, dtype: str) -> None:
    """One row in four moves by one last place of 1."""
    eps = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}[dtype]
    W = planted(400, 8, noise=0.1, level=0.0) + 1
    W[::4] = 1.0
    W[::4, 3] = 1 + eps
    source = write_store(tmp_path / "s.zarr", W, dtype=dtype)
    assert CMD(n_modes=3, n_samples=200).fit(source).metrics_["n_below_quantisation"] == 100
