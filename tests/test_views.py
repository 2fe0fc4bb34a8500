"""Laws of the views: each is its definition, a few lines of float64, on the rows that the fit saw."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cmdgpu.baselines import DMD, EMA, PCA, Baseline, RankOne
from cmdgpu.decomposition import CMD
from cmdgpu.errors import UsageError
from cmdgpu.notation import F32, F64, I64
from cmdgpu.quality import verdict
from cmdgpu.statistics import BIN_EDGES
from cmdgpu.views.correlation import correlations
from cmdgpu.views.fits import fits
from cmdgpu.views.histogram import histograms
from cmdgpu.views.network import block_of, network
from cmdgpu.views.plane import plane
from cmdgpu.views.profiles import profiles
from cmdgpu.views.scalars import scalars
from cmdgpu.views.weights import rebuilt_by, weights
from tests.harness import define, planted, walks
from tests.small_fits import (
    DEGENERATE,
    SHAPES,
    SNAPSHOTS,
    STEPS,
    fit,
    in_memory,
    layout,
    network_rows,
    stored,
)

N_BUFFER_ROWS = 16


@pytest.fixture(scope="module")
def cmd(tmp_path_factory: pytest.TempPathFactory) -> CMD:
    """A stored fit of a small network, opened again."""
    folder = tmp_path_factory.mktemp("views")
    CMD(4, n_samples=300).fit(stored(folder / "run.zarr"), out=folder / "run.cmd.zarr")
    return CMD.load(folder / "run.cmd.zarr")


@pytest.fixture(scope="module")
def W_nt() -> F32:
    return network_rows()


def parameters() -> I64:
    """Rows of parameters of the small network."""
    tensors = [t for t in layout() if t.kind == "parameter"]
    return np.concatenate([np.arange(t.pieces[0].row, t.pieces[0].stop) for t in tensors])


def unit_rows(rows_nt: F32 | F64) -> F64:
    x = rows_nt.astype(np.float64) - rows_nt.astype(np.float64).mean(axis=1, keepdims=True)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


# ---- profiles -----------------------------------------------------------------------------------------


def test_a_profile_is_its_reference_and_its_band_holds_95_percent_of_the_turned_rows(cmd: CMD) -> None:
    view = profiles(cmd)
    assert view.steps.tolist() == STEPS
    assert np.array_equal(view.raw_mt, cmd.references_)
    assert np.allclose(view.z_mt, unit_rows(cmd.references_), atol=1e-12)
    for m in range(4):
        rows = unit_rows(cmd.sample_[cmd.sample_labels_ == m])
        rows *= np.sign(rows @ view.z_mt[m])[:, None]
        assert np.allclose(view.low_mt[m], np.quantile(rows, 0.025, axis=0), atol=1e-12)
        assert np.allclose(view.high_mt[m], np.quantile(rows, 0.975, axis=0), atol=1e-12)
        assert view.sampled_m[m] == len(rows)


def test_a_mode_s_size_share_and_quantiles_are_those_of_its_rows_of_parameters(cmd: CMD) -> None:
    view = profiles(cmd)
    label_n, correlation_n = (np.asarray(x)[parameters()] for x in (cmd.labels_, cmd.correlation_))
    assert view.size_m.tolist() == [np.count_nonzero(label_n == m) for m in range(4)]
    assert np.allclose(view.share_m, view.size_m / np.count_nonzero(label_n >= 0))
    for m in range(4):
        exact = np.quantile(np.abs(correlation_n[label_n == m]), (0.05, 0.25, 0.5, 0.75, 0.95))
        assert np.allclose(view.quantiles_m5[m], exact, atol=0.01)


def test_a_reference_says_where_in_the_model_it_lies(cmd: CMD) -> None:
    for where, row in zip(profiles(cmd).where_m, cmd.reference_rows_.tolist(), strict=True):
        tensor = next(t for t in layout() if t.pieces[0].row <= row < t.pieces[0].stop)
        at = np.arange(tensor.n_rows).reshape(tensor.shape) == row - tensor.pieces[0].row
        index = np.argwhere(at)[0].tolist()
        assert where == f"{tensor.name}{index or ''}"
    assert profiles(fit(walks(50, 9), references="component")).where_m == [None] * 3


# ---- correlation --------------------------------------------------------------------------------------


def test_the_matrix_is_the_correlation_of_the_sample_and_its_order_is_by_mode(cmd: CMD) -> None:
    view = correlations(cmd)
    moving = cmd.sample_labels_ >= 0
    label_k = cmd.sample_labels_[moving]
    expected = np.abs(np.corrcoef(cmd.sample_[moving].astype(np.float64)))
    assert np.allclose(view.corr_kk, expected, atol=1e-12) and view.corr_kk.max() <= 1
    assert view.n_moving == np.count_nonzero(moving) < len(moving), "constant rows are left out"
    assert sorted(view.order.tolist()) == list(range(view.n_moving))
    assert np.array_equal(view.mode_k, label_k[view.order]) and np.all(np.diff(view.mode_k) >= 0)
    for m, (start, stop) in enumerate(zip(view.edges[:-1], view.edges[1:], strict=True)):
        block = view.ordered_kk[start:stop, start:stop]
        assert set(view.mode_k[start:stop].tolist()) == {m} == {int(view.block_modes[m])}
        assert np.all(np.diff(block.sum(axis=1)) <= 1e-9), "by falling sum of |corr| to its mode"
        assert cmd.sample_rows_[moving][view.order[start]] == cmd.reference_rows_[m]


def test_of_too_many_rows_some_are_shown_and_modes_without_a_row_have_no_block(cmd: CMD) -> None:
    view, whole = correlations(cmd, at_most=7), correlations(cmd)
    kept = np.round(np.linspace(0, whole.n_moving - 1, 7)).astype(int)
    assert np.allclose(view.corr_kk, whole.corr_kk[np.ix_(kept, kept)], atol=1e-12)
    assert view.n_moving == whole.n_moving and view.edges[-1] == 7
    assert view.block_modes.tolist() == sorted(set(view.mode_k.tolist()))


# ---- network ------------------------------------------------------------------------------------------


def test_the_shares_of_a_tensor_are_the_labels_of_its_rows(cmd: CMD, W_nt: F32) -> None:
    label_n, correlation_n = np.asarray(cmd.labels_), np.asarray(cmd.correlation_, dtype=np.float64)
    a_n, b_n = np.asarray(cmd.a_, dtype=np.float64), np.asarray(cmd.b_, dtype=np.float64)
    view = network(cmd)
    assert [share.name for share in view.tensors] == list(SHAPES)
    for share, tensor in zip(view.tensors, layout(), strict=True):
        rows = np.arange(tensor.pieces[0].row, tensor.pieces[0].stop)
        label, moving, finite = label_n[rows], rows[label_n[rows] >= 0], rows[label_n[rows] >= -1]
        assert (share.shape, share.kind, share.rows) == (tensor.shape, tensor.kind, len(rows))
        assert share.counts.tolist() == [np.count_nonzero(label == m) for m in range(4)]
        assert (share.n_constant, share.n_nonfinite) == (
            np.count_nonzero(label == -1), np.count_nonzero(label == -2)
        )  # fmt: skip
        assert share.mean_abs_correlation == pytest.approx(np.abs(correlation_n[moving]).mean(), rel=1e-5)
        assert share.r2 == pytest.approx((correlation_n[moving] ** 2).mean(), rel=1e-5)
        w = W_nt[finite].astype(np.float64)
        model = a_n[finite, None] * cmd.references_[np.maximum(label_n[finite], 0)] + b_n[finite, None]
        residual, energy = ((w - model) ** 2).sum(), ((w - w.mean(axis=1, keepdims=True)) ** 2).sum()
        assert share.weight_mse == pytest.approx(residual / w.size, rel=1e-4)
        assert share.r2_energy == pytest.approx(1 - residual / energy, rel=1e-4)


def test_layers_and_blocks_add_up_their_parameters_and_no_buffer(cmd: CMD) -> None:
    view = network(cmd)
    layers, blocks = view.groups("layer"), view.groups("block")
    assert [layer.name for layer in layers] == [
        "conv1", "layer1.0.conv", "layer1.0.bn", "layer1.1.conv", "layer1.1.bn", "scale", "fc"
    ]  # fmt: skip
    assert [block.name for block in blocks] == ["conv1", "layer1.0", "layer1.1", "scale", "fc"]
    metrics = cmd.metrics_
    for groups in (layers, blocks):
        assert sum(group.rows for group in groups) == metrics["n_rows"]
        assert sum(group.counts for group in groups).tolist() == metrics["mode_sizes"]  # pyright: ignore
        assert sum(group.n_nonfinite for group in groups) == metrics["n_nonfinite"]
    first = [t for t in view.tensors if t.name.startswith("layer1.0.") and t.kind == "parameter"]
    together = blocks[1]
    assert together.rows == sum(t.rows for t in first) == 8 * 8 * 9 + 8
    assert together.weight_mse * together.rows == pytest.approx(sum(t.weight_mse * t.rows for t in first))


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("layer1.0.downsample.0.weight", "layer1.0"),
        ("blocks.3.attn.qkv.weight", "blocks.3"),
        ("transformer.h.11.mlp.c_fc.weight", "transformer.h.11"),
        ("encoder.layers.encoder_layer_3.ln_1.weight", "encoder.layers.encoder_layer_3"),
        ("0.weight", "0"),
        ("fc.weight", "fc"),
        ("conv2d_1.kernel", "conv2d_1"),
        ("heads.head.bias", "heads"),
        ("cls_token", "cls_token"),
        ("weight_1", "weight_1"),
        ("params.0", "params"),
        ("", ""),
        ("._1.x", ""),
    ],
)
def test_a_block_is_the_shallowest_module_that_repeats(name: str, block: str) -> None:
    assert block_of(name) == block


# ---- histogram ----------------------------------------------------------------------------------------


def shares_between(edges: F64, values_n: F64) -> F64:
    """Counts between BIN_EDGES, each spread evenly over its bin; then the shares between other edges."""
    counts = np.histogram(values_n, BIN_EDGES)[0]
    low, high = np.maximum.outer(edges[:-1], BIN_EDGES[:-1]), np.minimum.outer(edges[1:], BIN_EDGES[1:])
    overlap = np.maximum(high - low, 0.0) / np.diff(BIN_EDGES)
    return overlap @ counts / counts.sum()


def test_a_histogram_is_exact_at_the_edges_of_the_pass_and_linear_between(cmd: CMD) -> None:
    label_n = np.asarray(cmd.labels_)[parameters()]
    correlation_n = np.abs(np.asarray(cmd.correlation_, dtype=np.float64)[parameters()])
    view = histograms(cmd)
    assert np.array_equal(view.edges, np.linspace(0, 1, 51))
    moving = correlation_n[label_n >= 0]
    assert np.allclose(view.abs_correlation, shares_between(view.edges, moving), atol=1e-3)
    assert np.allclose(view.r2, shares_between(np.sqrt(view.edges), moving), atol=1e-3)
    for m in range(4):
        mine = correlation_n[label_n == m]
        assert np.allclose(view.per_mode[m], shares_between(view.edges, mine), atol=4e-3)
    for shares in (view.abs_correlation, view.r2, *view.per_mode):
        assert shares.sum() == pytest.approx(1) and shares.min() >= 0


def test_chance_is_that_of_the_verdict_and_comes_out_of_the_same_repeats(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []
    real = verdict.null_views

    def counted(name: str, *args: object, **settings: object) -> object:
        seen.append(name)
        return real(name, *args, **settings)  # pyright: ignore

    monkeypatch.setattr(verdict, "null_views", counted)
    cmd = fit(planted(600, 24), n_samples=200)
    levels = cmd.quality().levels
    assert levels is not None
    view = histograms(cmd)
    centre = (view.edges[:-1] + view.edges[1:]) / 2
    assert list(view.chance) == list(levels.chance) == seen
    for name, band in view.chance.items():
        assert band.abs_correlation_mean.sum() == pytest.approx(1)
        assert band.r2_mean.sum() == pytest.approx(1)
        assert centre @ band.abs_correlation_mean == pytest.approx(levels.chance[name].mean, abs=0.01)
        assert centre @ band.r2_mean < centre @ band.abs_correlation_mean
        for low, mean, high in (
            (band.abs_correlation_low, band.abs_correlation_mean, band.abs_correlation_high),
            (band.r2_low, band.r2_mean, band.r2_high),
        ):
            assert np.all(low <= mean + 1e-12) and np.all(mean <= high + 1e-12) and np.any(low < high)


def test_without_a_verdict_there_is_no_chance() -> None:
    assert histograms(fit(walks(60, 5))).chance == {}


# ---- weights ------------------------------------------------------------------------------------------


def test_a_weight_is_a_row_of_the_trajectory_and_is_rebuilt_as_the_fit_rebuilds_it(
    cmd: CMD, W_nt: F32
) -> None:
    view = weights(cmd)
    assert np.array_equal(view.recorded, W_nt[view.row].astype(np.float64))
    assert np.array_equal(view.mode, np.asarray(cmd.labels_)[view.row])
    for mine, stored_n in ((view.a, cmd.a_), (view.b, cmd.b_), (view.correlation, cmd.correlation_)):
        assert np.allclose(mine, np.asarray(stored_n)[view.row], rtol=1e-4, atol=1e-5)
    for t, step in ((0, 0), (SNAPSHOTS - 1, STEPS[-1])):
        with pytest.warns(match="non-finite rows are NaN"):
            model = cmd.state_dict(step)
        rebuilt = [float(model[name][index]) for name, index in zip(view.tensor, view.index, strict=True)]
        assert np.allclose(view.rebuilt[:, t], rebuilt, rtol=1e-4, atol=1e-5)
    assert view.steps.tolist() == STEPS


def test_of_a_mode_come_its_reference_then_rows_from_the_best_followed_to_the_worst(cmd: CMD) -> None:
    view = weights(cmd, per_mode=5)
    sampled = np.asarray(cmd.labels_)[cmd.sample_rows_]
    strength = np.abs(np.asarray(cmd.correlation_)[cmd.sample_rows_])
    assert np.bincount(view.mode).tolist() == [5] * 4
    for m in range(4):
        mine = view.mode == m
        assert view.row[mine][0] == cmd.reference_rows_[m]
        assert np.all(np.diff(np.abs(view.correlation[mine])) <= 1e-12)
        assert np.abs(view.correlation[mine][-1]) == pytest.approx(strength[sampled == m].min(), abs=1e-6)
    assert len(set(view.row.tolist())) == 20
    assert len(weights(cmd, per_mode=5, at_most=9).row) == 8
    assert weights(cmd, at_most=3).mode.tolist() == [0, 1, 2]


BASELINES: dict[str, Callable[[], Baseline]] = {
    "average": lambda: EMA(0.7),
    "network": lambda: PCA(2),
    "tensor": RankOne,
    "node": lambda: DMD(2, groups="node"),
}


@pytest.mark.parametrize("groups", BASELINES)
def test_a_baseline_rebuilds_a_weight_as_its_models_have_it(groups: str) -> None:
    shapes = {"a.weight": (20, 10), "a.bias": (20,), "b.weight": (30, 20)}
    traj = in_memory(planted(820, 16), shapes)
    baseline, view = BASELINES[groups]().fit(traj), weights(fit(traj))
    rebuilt = rebuilt_by(baseline, view)
    for t in (0, 7, 15):
        model = baseline.state_dict(int(view.steps[t]))
        expected = [float(model[name][index]) for name, index in zip(view.tensor, view.index, strict=True)]
        assert np.allclose(rebuilt[:, t], expected, rtol=1e-5, atol=1e-6)


def test_a_baseline_of_other_snapshots_or_rows_is_refused() -> None:
    traj = in_memory(planted(300, 16), {"a.weight": (10, 20), "b.weight": (100,)})
    view = weights(fit(traj))
    with pytest.raises(UsageError, match=r"PCA\(2\) was fitted on other snapshots .*8 of them, 16 there"):
        rebuilt_by(PCA(2).fit(traj.sel(stride=2)), view)
    with pytest.raises(UsageError, match="not fitted on all rows that are shown"):
        rebuilt_by(PCA(2).fit(traj.sel(params="^a")), view)


# ---- scalars, plane, fits -----------------------------------------------------------------------------


def test_scalars_are_those_of_the_fitted_steps() -> None:
    loss = np.linspace(2, 1, 12)
    loss[3] = np.nan
    traj = in_memory(walks(60, 12), scalars={"loss": loss})
    found = scalars(fit(traj.sel(stride=3)))
    assert np.array_equal(found["loss"], loss[::3], equal_nan=True)
    assert profiles(fit(traj)).unit == "epoch"


def test_the_plane_is_that_of_the_two_largest_singular_values(cmd: CMD) -> None:
    view = plane(cmd)
    w_kt = cmd.sample_[cmd.sample_labels_ >= 0].astype(np.float64)
    x_kt = w_kt - w_kt.mean(axis=1, keepdims=True)
    is_ = define(w_kt, cmd.references_)
    model = is_.a[:, None] * cmd.references_.astype(np.float64)[is_.mode] + is_.b[:, None]
    u, s, _ = np.linalg.svd(x_kt, full_matrices=False)
    assert np.allclose(view.explained, s[:2] ** 2 / (s**2).sum())
    for k in range(2):
        turned = u[:, k] * np.sign(u[:, k] @ (x_kt[:, -1] - x_kt[:, 0]))
        assert np.allclose(view.recorded[k], turned @ x_kt, atol=1e-9 * s[0])
        assert np.allclose(view.rebuilt[k], turned @ (model - w_kt.mean(axis=1)[:, None]), atol=1e-6 * s[0])
    assert np.all(view.recorded[:, -1] >= view.recorded[:, 0])


def test_one_mode_without_noise_is_a_line_that_is_rebuilt_exactly() -> None:
    r, rng = walks(1, 20)[0].astype(np.float64), np.random.default_rng(0)
    view = plane(fit(rng.uniform(0.5, 2, (50, 1)) * r + rng.normal(size=(50, 1)), 1))
    assert view.explained == pytest.approx([1, 0], abs=1e-9)
    assert np.allclose(view.rebuilt, view.recorded, atol=1e-4)


def test_fits_are_told_by_their_metrics_in_the_order_of_their_modes() -> None:
    traj = in_memory(planted(300, 16))
    given = {f"M = {m}": fit(traj, m) for m in (4, 1, 2)}
    found = fits(given)
    assert [one.n_modes for one in found] == [1, 2, 4]
    for one in found:
        metrics = given[one.name].metrics_
        for field in ("weight_mse", "r2", "r2_energy", "mean_abs_correlation", "n_samples"):
            assert getattr(one, field) == metrics[field]
        assert (one.result_bytes, one.trajectory_bytes) == (
            metrics["result_bytes"], metrics["trajectory_bytes"]
        )  # fmt: skip
    assert fits({}) == []


def test_fits_of_different_trajectories_are_refused_by_name(tmp_path: Path) -> None:
    a, b = stored(tmp_path / "a.zarr"), stored(tmp_path / "b.zarr")
    assert len(fits({"a": fit(a), "b": fit(b, 2)})) == 2, "the same weights at another place"
    with pytest.raises(UsageError, match="a and short are not fits of one trajectory: the steps differ"):
        fits({"a": fit(a), "short": fit(a.sel(stride=2))})
    with pytest.raises(UsageError, match="the selected tensors differ"):
        fits({"a": fit(a), "part": fit(a.sel(params="conv1"))})
    c = in_memory(network_rows(seed=1), SHAPES)
    with pytest.raises(UsageError, match="the weights differ"):
        fits({"a": fit(a), "c": fit(c)})


# ---- fits of nothing much -----------------------------------------------------------------------------


def check_every_view(cmd: CMD) -> None:
    """Shapes agree, and nothing raises or warns."""
    n_modes, n_snapshots = cmd.n_modes_, len(cmd.steps_)
    view = profiles(cmd)
    for array in (view.raw_mt, view.z_mt, view.low_mt, view.high_mt):
        assert array.shape == (n_modes, n_snapshots)
    assert view.quantiles_m5.shape == (n_modes, 5)
    assert len(view.where_m) == len(view.size_m) == len(view.share_m) == len(view.sampled_m) == n_modes
    few = view.sampled_m < 2
    assert np.isnan(view.low_mt[few]).all() and np.isfinite(view.high_mt[~few]).all()
    matrix = correlations(cmd)
    n_shown = len(matrix.order)
    assert matrix.ordered_kk.shape == (n_shown, n_shown) and len(matrix.mode_k) == n_shown
    assert matrix.edges[-1] == n_shown and len(matrix.edges) == len(set(matrix.mode_k.tolist())) + 1
    for share in (*network(cmd).tensors, *network(cmd).groups("layer"), *network(cmd).groups("block")):
        assert len(share.counts) == n_modes
        assert share.rows == share.counts.sum() + share.n_constant + share.n_nonfinite
    histogram = histograms(cmd)
    assert histogram.abs_correlation.shape == histogram.r2.shape == (50,)
    assert histogram.per_mode.shape == (n_modes, 50)
    assert np.isnan(histogram.abs_correlation).all() == (not view.size_m.any())
    shown = weights(cmd)
    assert shown.recorded.shape == shown.rebuilt.shape == (len(shown.row), n_snapshots)
    assert len(shown.tensor) == len(shown.index) == len(shown.mode) == len(shown.a) == len(shown.row)
    path = plane(cmd)
    assert path.recorded.shape == path.rebuilt.shape == (2, n_snapshots) and path.explained.shape == (2,)
    assert np.isfinite(path.recorded).all() and np.isfinite(path.rebuilt).all()
    assert path.explained.any() == bool(len(shown.row)) == bool(n_modes)
    assert fits({"this": cmd})[0].n_modes == n_modes


@pytest.mark.parametrize("name", DEGENERATE)
def test_a_fit_of_nothing_much_has_every_view(name: str) -> None:
    check_every_view(DEGENERATE[name]())


def test_where_nothing_moves_the_views_are_empty_and_say_what_stands_still() -> None:
    cmd = DEGENERATE["nothing moves"]()
    assert len(profiles(cmd).z_mt) == len(correlations(cmd).order) == len(weights(cmd).row) == 0
    assert correlations(cmd).edges.tolist() == [0]
    share = network(cmd).groups("layer")[0]
    assert share.n_constant == 60 and np.isnan(share.r2) and np.isnan(share.r2_energy)
    assert share.weight_mse == 0
    assert not plane(cmd).recorded.any() and not plane(cmd).explained.any()


def test_with_two_snapshots_the_path_is_a_line() -> None:
    view = plane(DEGENERATE["two snapshots"]())
    assert view.explained == pytest.approx([1, 0]) and view.recorded[1] == pytest.approx([0, 0], abs=1e-6)


def test_five_hundred_modes_have_every_view() -> None:
    cmd = fit(walks(1000, 7), 500)  # too few snapshots for a verdict, whose null models would take the time
    check_every_view(cmd)
    assert np.bincount(weights(cmd).mode, minlength=500).tolist() == [1] * 240 + [0] * 260


def test_a_selection_is_shown_alone(tmp_path: Path) -> None:
    traj = stored(tmp_path / "run.zarr").sel(params="^layer1")
    cmd = fit(traj, n_samples=200)
    check_every_view(cmd)
    assert [share.name for share in network(cmd).tensors] == [n for n in SHAPES if n.startswith("layer1")]
    assert set(weights(cmd).tensor) <= {n for n in SHAPES if n.startswith("layer1")}


def test_without_its_trajectory_a_result_has_every_view_but_the_scalars(tmp_path: Path) -> None:
    CMD(3, n_samples=300).fit(stored(tmp_path / "run.zarr"), out=tmp_path / "run.cmd.zarr")
    shutil.rmtree(tmp_path / "run.zarr")
    cmd = CMD.load(tmp_path / "run.cmd.zarr")
    check_every_view(cmd)
    assert cmd.trajectory is None and scalars(cmd) == {}
    assert profiles(cmd).unit == "step"
