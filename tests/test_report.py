"""The report: numbers of the decomposition, read back from the page; whatever the fit, a right page."""

# torch leaves the types of many methods open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import base64
import html
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image
from torch import nn

from cmdgpu.baselines import EMA
from cmdgpu.comparison import compare
from cmdgpu.decomposition import CMD
from cmdgpu.errors import CmdgpuError, CmdgpuWarning, UsageError
from cmdgpu.mode_space import landscape
from cmdgpu.notation import F64
from cmdgpu.recording import Recorder
from cmdgpu.reporting import report
from cmdgpu.reporting.gathering import MOST_PIXELS, MOST_TENSORS, drawn_snapshots, matrix_png, movements
from cmdgpu.store.parameter_map import ParameterMap, whole
from cmdgpu.trajectory import Trajectory
from tests.harness import planted, run_cli, walks, write_store

CLOSE: dict[str, Any] = {"rel": 6e-6, "abs": 1e-12}


class Net(nn.Module):
    """Two blocks of two layers, and a head that never moves."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)) for _ in range(2)])
        self.norm = nn.BatchNorm1d(12)
        self.head = nn.Linear(12, 4)


def record(place: Path, snapshots: int = 24, seed: int = 0, *, scalars: bool = True) -> Trajectory:
    """A network whose weights follow three shapes, some noise, and one row that breaks."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    net = Net()
    t = np.linspace(0, 1, snapshots)
    shapes = np.stack([1 - np.exp(-5 * t), t**2, np.sin(4 * t)])
    moving = [p for name, p in net.named_parameters() if not name.startswith("head")]
    plan = [
        (p, p.detach().numpy().copy(), rng.integers(0, 3, p.shape), rng.normal(0.1, 0.4, p.shape))
        for p in moving
    ]
    with Recorder(place, unit="epoch") as recorder, torch.no_grad():
        for step in range(snapshots):
            for p, first, mode, size in plan:
                noise = 0.03 * rng.standard_normal(p.shape)
                p.copy_(torch.from_numpy(first + size * shapes[mode, step] + noise))
            told = {"loss": float(np.exp(-step / 6)), "accuracy": step / snapshots} if scalars else {}
            recorder.record(net, step, **told)
    return Trajectory.open(place)


def data_of(page: Path) -> dict[str, Any]:
    """The numbers that a browser would find."""
    text = page.read_text(encoding="utf-8")
    (found,) = re.findall(r'<script type="application/json" id="data"[^>]*>(.*?)</script>', text, re.DOTALL)
    return json.loads(found)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> CMD:
    folder = tmp_path_factory.mktemp("report")
    return CMD(3, n_samples=200).fit(record(folder / "run.zarr"), folder / "fit.cmd.zarr")


@pytest.fixture(scope="module")
def page(fitted: CMD, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    report(fitted, path, baselines="ema:decay=0.5,pca:components=2")
    return path


@pytest.fixture(scope="module")
def data(page: Path) -> dict[str, Any]:
    return data_of(page)


def dense(cmd: CMD) -> F64:
    """(N, T) of everything, in float64."""
    assert cmd.trajectory is not None
    return np.asarray(cmd.trajectory[:, :], dtype=np.float64)


def parameter_rows(cmd: CMD) -> Iterator[tuple[str, slice]]:
    for tensor in cmd.result.frame.map:
        if tensor.kind == "parameter":
            yield tensor.name, slice(tensor.pieces[0].row, tensor.pieces[0].row + tensor.n_rows)


# ---- the numbers of every figure -------------------------------------------------------------------------


def test_profiles_are_the_references(fitted: CMD, data: dict[str, Any]) -> None:
    shown = data["profiles"]
    R_mt = fitted.references_.astype(np.float64)
    z_mt = R_mt - R_mt.mean(axis=1, keepdims=True)
    z_mt /= np.linalg.norm(z_mt, axis=1, keepdims=True)
    np.testing.assert_allclose(shown["raw"], R_mt, rtol=6e-6)
    np.testing.assert_allclose(shown["z"], z_mt, rtol=1e-5, atol=1e-6)
    sizes = fitted.metrics_["mode_sizes"]
    assert shown["size"] == sizes and shown["share"] == pytest.approx(np.array(sizes) / sum(sizes), **CLOSE)
    assert shown["sampled"] == [int((fitted.sample_labels_ == m).sum()) for m in range(3)]
    assert data["steps"] == fitted.steps_.tolist() and data["unit"] == "epoch"
    np.testing.assert_allclose(shown["quantiles"], fitted.metrics_["mode_quantiles"], rtol=6e-6)
    inside = 0
    for m in range(3):
        rows = fitted.sample_[fitted.sample_labels_ == m].astype(np.float64)
        x = rows - rows.mean(axis=1, keepdims=True)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        x *= np.sign(x @ z_mt[m])[:, None]
        low, high = np.quantile(x, (0.025, 0.975), axis=0)
        np.testing.assert_allclose(shown["low"][m], low, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(shown["high"][m], high, rtol=1e-5, atol=1e-6)
        inside += int(((x >= low) & (x <= high)).sum())
    assert 0.93 < inside / (24 * sum(shown["sampled"])) < 0.97


def test_the_matrix_is_that_of_the_sampled_rows(fitted: CMD, data: dict[str, Any]) -> None:
    shown = data["correlation"]
    moving = fitted.sample_labels_ >= 0
    corr = np.abs(np.corrcoef(fitted.sample_[moving].astype(np.float64)))
    assert shown["rows"] == shown["shown"] == int(moving.sum())
    labels = fitted.sample_labels_[moving]
    assert np.diff(shown["edges"]).tolist() == np.bincount(labels).tolist() and shown["modes"] == [0, 1, 2]
    np.testing.assert_allclose(pixels(shown["unordered"]), corr, atol=0.5 / 63 + 1e-6)
    ordered = pixels(shown["ordered"])
    # the same values, block by block: all pairs within a mode in its block
    for m, (low, high) in enumerate(zip(shown["edges"], shown["edges"][1:], strict=False)):
        mine = np.sort(corr[np.ix_(labels == m, labels == m)].ravel())
        np.testing.assert_allclose(np.sort(ordered[low:high, low:high].ravel()), mine, atol=0.5 / 63 + 1e-6)
        assert shown["within"][m] == pytest.approx(mine.mean(), rel=1e-5)
        for other in range(3):
            pairs = corr[np.ix_(labels == m, labels == other)]
            assert shown["between"][m][other] == pytest.approx(pairs.mean(), rel=1e-5)


def pixels(url: str) -> F64:
    """|corr| that the colours stand for."""
    png = base64.b64decode(url.removeprefix("data:image/png;base64,"))
    rgb = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
    palette = (colormaps["magma"](np.linspace(0, 1, 64))[:, :3] * 255).round().astype(int)
    return np.abs(rgb[:, :, None, :] - palette).sum(axis=3).argmin(axis=2) / 63


def test_a_large_matrix_is_averaged_not_sampled() -> None:
    corr = np.random.default_rng(0).random((2 * MOST_PIXELS, 2 * MOST_PIXELS))
    means = corr.reshape(MOST_PIXELS, 2, MOST_PIXELS, 2).mean(axis=(1, 3))
    np.testing.assert_allclose(pixels(matrix_png(corr)), means, atol=0.5 / 63 + 1e-6)


def test_modes_are_counted_tensor_by_tensor(fitted: CMD, data: dict[str, Any]) -> None:
    labels, a, b = (np.asarray(x[:]) for x in (fitted.labels_, fitted.a_, fitted.b_))
    corr, W = np.asarray(fitted.correlation_[:], dtype=np.float64), dense(fitted)
    tensors = {one["name"]: one for one in data["network"]["tensors"]}
    R_mt = fitted.references_.astype(np.float64)
    for name, rows in parameter_rows(fitted):
        shown, mine = tensors[name], labels[rows]
        assert shown["counts"] == [int((mine == m).sum()) for m in range(3)]
        assert (shown["constant"], shown["nonfinite"]) == (int((mine == -1).sum()), int((mine == -2).sum()))
        assert shown["rows"] == len(mine) and shown["shape"] == list(fitted.result.frame.map[name].shape)
        if name.startswith("head"):
            assert shown["constant"] == len(mine) and shown["r2"] is None
            continue
        assert shown["mean_abs_correlation"] == pytest.approx(np.abs(corr[rows]).mean(), rel=1e-4)
        assert shown["r2"] == pytest.approx((corr[rows] ** 2).mean(), rel=1e-4)
        residual = W[rows] - a[rows, None] * R_mt[mine] - b[rows, None]
        moved = W[rows] - W[rows].mean(axis=1, keepdims=True)
        assert shown["weight_mse"] == pytest.approx((residual**2).mean(), rel=1e-3)
        assert shown["r2_energy"] == pytest.approx(1 - (residual**2).sum() / (moved**2).sum(), rel=1e-4)
    blocks = {one["name"]: one for one in data["network"]["blocks"]}
    assert {"blocks.0", "blocks.1"} <= set(blocks)
    inside = [one for name, one in tensors.items() if name.startswith("blocks.0.")]
    assert blocks["blocks.0"]["counts"] == np.sum([one["counts"] for one in inside], axis=0).tolist()
    assert len(data["network"]["layers"]) == len({name.rpartition(".")[0] for name in tensors})


def test_histograms_are_of_all_moving_rows(fitted: CMD, data: dict[str, Any]) -> None:
    shown = data["histogram"]
    corr = np.concatenate(
        [np.abs(np.asarray(fitted.correlation_[rows])) for _, rows in parameter_rows(fitted)]
    )
    labels = np.concatenate([np.asarray(fitted.labels_[rows]) for _, rows in parameter_rows(fitted)])
    corr = corr[labels >= 0].astype(np.float64)
    assert sum(shown["abs_correlation"]) == pytest.approx(1) and sum(shown["r2"]) == pytest.approx(1)
    at = np.searchsorted(shown["edges"], [0.5, 0.8, 0.9])
    for quantity, values in (("abs_correlation", corr), ("r2", corr**2)):
        below = [float(sum(shown[quantity][:i])) for i in at]
        truth = [float((values < shown["edges"][i]).mean()) for i in at]
        assert below == pytest.approx(truth, abs=0.02)
    together = np.array(data["profiles"]["share"]) @ np.array(shown["per_mode"])
    np.testing.assert_allclose(together, shown["abs_correlation"], atol=2e-5)
    assert set(shown["chance"]) == {"random walks", "signed steps", "phase-shuffled"}
    for band in shown["chance"].values():
        for part in band.values():
            assert sum(part["mean"]) == pytest.approx(1, abs=1e-4)
            assert (np.array(part["low"]) <= np.array(part["mean"]) + 1e-9).all()
            assert (np.array(part["mean"]) <= np.array(part["high"]) + 1e-9).all()


def test_sampled_weights_are_recorded_and_rebuilt(fitted: CMD, data: dict[str, Any]) -> None:
    W = dense(fitted)
    rows = [one["row"] for one in data["weights"]]
    assert len(set(rows)) == len(rows) and {one["mode"] for one in data["weights"]} == {0, 1, 2}
    assert set(fitted.reference_rows_.tolist()) <= set(rows)
    assert fitted.trajectory is not None
    average = EMA(0.5).fit(fitted.trajectory)
    for one in data["weights"]:
        row = one["row"]
        np.testing.assert_allclose(one["recorded"], W[row], rtol=6e-6)
        for key, rows_of in (("a", fitted.a_), ("b", fitted.b_), ("correlation", fitted.correlation_)):
            assert one[key] == pytest.approx(float(rows_of[row]), rel=1e-5, abs=1e-6)
        assert one["mode"] == fitted.labels_[row]
        tensor = fitted.result.frame.map[one["tensor"]]
        index = tuple(map(int, one["index"]))
        assert tensor.pieces[0].row + int(np.ravel_multi_index(index, tensor.shape)) == row
        assert set(one["rebuilt"]) == {"ema:decay=0.5", "pca:components=2"}
        for t, step in enumerate(fitted.steps_.tolist()):
            filtered = W[row] @ average.filter_at(step)[0]
            assert one["rebuilt"]["ema:decay=0.5"][t] == pytest.approx(filtered, rel=1e-5, abs=1e-6)


def test_large_weights_that_hardly_move_are_no_stairs(tmp_path: Path) -> None:
    """What the page rounds is small beside what each weight does, not beside its value."""
    rng = np.random.default_rng(0)
    shapes = np.cumsum(rng.standard_normal((2, 30)), axis=1)
    W = (1 + 2e-5 * rng.standard_normal((60, 2)) @ shapes).astype(np.float32)
    cmd = CMD(2, n_samples=60).fit(Trajectory.from_array(W, out=tmp_path / "run.zarr"))
    data = report(cmd, tmp_path / "p.html").data
    for one in data["weights"]:
        row, truth = one["row"], W[one["row"]].astype(np.float64)
        moved = truth.max() - truth.min()
        np.testing.assert_allclose(one["recorded"], truth, rtol=0, atol=5.1e-6 * moved)
        rebuilt = one["a"] * np.array(data["profiles"]["raw"][one["mode"]]) + one["b"]
        exact = float(cmd.a_[row]) * cmd.references_[one["mode"]].astype(np.float64) + float(cmd.b_[row])
        np.testing.assert_allclose(rebuilt, exact, rtol=0, atol=2.5e-7)  # a and b are stored as float32


def test_curves_keep_what_they_have_of_digits() -> None:
    assert movements([[1.23456789, 2.0], [0.0, 0.0], [1e9, 1e9 + 1]]) == [
        [1.234568, 2.0],
        [0.0, 0.0],
        [1e9, 1e9 + 1],
    ]
    assert movements([[np.nan, 1.0, np.inf], [np.nan, np.nan, np.nan]]) == [[None, 1.0, None], [None] * 3]


def test_the_plane_is_that_of_the_first_components(fitted: CMD, data: dict[str, Any]) -> None:
    w_kt = fitted.sample_[fitted.sample_labels_ >= 0].astype(np.float64)
    _, s, vt = np.linalg.svd(w_kt - w_kt.mean(axis=1, keepdims=True), full_matrices=False)
    shown = np.array(data["plane"]["recorded"])
    for i in range(2):
        expected = s[i] * vt[i]
        sign = np.sign(expected @ shown[i])
        np.testing.assert_allclose(sign * shown[i], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(data["plane"]["explained"], s[:2] ** 2 / (s**2).sum(), rtol=1e-4)


def test_scalars_methods_and_words_are_those_of_the_run(fitted: CMD, data: dict[str, Any]) -> None:
    assert fitted.trajectory is not None
    for name, values in fitted.trajectory.scalars.items():
        np.testing.assert_allclose(data["scalars"][name], values, rtol=6e-6)
    comparison = compare(fitted, ["recorded", "cmd", "ema:decay=0.5", "pca:components=2"])
    told: dict[tuple[str, int], Any] = {
        (row["label"], row["step"]): row for row in data["methods"]["methods"]
    }
    assert len(told) == 4 * 24
    for row in comparison.rows:
        label = row.label if row.method != "cmd" else next(name for name, _ in told if name.startswith("cmd"))
        assert told[label, row.step]["relative_error"] == pytest.approx(
            row.relative_error, rel=1e-5, abs=1e-9
        )
    assert data["words"]["verdict"] == fitted.quality().verdict
    assert data["words"]["quality"] == fitted.quality().words.splitlines()
    assert data["n"] == {
        "rows": fitted.metrics_["n_rows"], "buffers": 24, "snapshots": 24, "modes": 3, "samples": 200,
        "tensors": len(fitted.result.frame.map),
    }  # fmt: skip


def test_error_against_m_is_over_all_fits(fitted: CMD, tmp_path: Path) -> None:
    assert fitted.trajectory is not None and fitted.result.path is not None
    other = CMD(6, n_samples=200).fit(fitted.trajectory, tmp_path / "six.cmd.zarr")
    report(fitted, tmp_path / "p.html", fits=[tmp_path / "six.cmd.zarr", fitted.result.path])
    shown = {one["name"]: one for one in data_of(tmp_path / "p.html")["fits"]}
    assert set(shown) == {"fit.cmd.zarr", "six.cmd.zarr"}
    assert shown["fit.cmd.zarr"]["this"] and not shown["six.cmd.zarr"]["this"]
    for name, cmd in (("fit.cmd.zarr", fitted), ("six.cmd.zarr", other)):
        for key in ("weight_mse", "r2", "r2_energy", "mean_abs_correlation", "result_bytes"):
            assert shown[name][key] == pytest.approx(cmd.metrics_[key], **CLOSE)


# ---- the page --------------------------------------------------------------------------------------------


def test_the_page_is_the_same_every_time_and_tells_no_place(fitted: CMD, tmp_path: Path) -> None:
    path = fitted.result.path or ""
    first = report(path, tmp_path / "report.html")
    bytes_of = first.path.read_bytes()
    assert first.n_bytes == len(bytes_of)
    report(CMD.load(path), tmp_path / "report.html")
    assert (tmp_path / "report.html").read_bytes() == bytes_of
    assert str(tmp_path.parent).encode() not in bytes_of
    assert list(tmp_path.iterdir()) == [tmp_path / "report.html"]


def test_the_command_makes_the_fit_again(data: dict[str, Any], fitted: CMD, tmp_path: Path) -> None:
    fit, page = data["command"].splitlines()
    assert fitted.result.path is not None
    words = fit.split()[2:]
    words[words.index("fit.cmd.zarr")] = str(tmp_path / "again.cmd.zarr")
    words[0] = str(fitted.result.path.parent / words[0])
    assert run_cli("fit", *words).code == 0
    again = CMD.load(tmp_path / "again.cmd.zarr")
    assert again.result.provenance["config"] == fitted.result.provenance["config"]
    assert again.references_.tobytes() == fitted.references_.tobytes()
    assert page == "cmdgpu report fit.cmd.zarr -o report.html --baselines ema:decay=0.5,pca:components=2"


def test_the_command_names_what_stands_beside_the_fit(fitted: CMD, tmp_path: Path) -> None:
    assert fitted.trajectory is not None
    CMD(2, n_samples=100).fit(fitted.trajectory, tmp_path / "my two.cmd.zarr")
    scores = compare(fitted, ["recorded", "cmd"]).to_json()
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    made = report(
        fitted,
        tmp_path / "p.html",
        fits=[tmp_path / "my two.cmd.zarr"],
        scores=tmp_path / "scores.json",
        title="Mine",
    )
    assert made.data["command"].splitlines()[1] == (
        "cmdgpu report fit.cmd.zarr -o p.html --fits 'my two.cmd.zarr' --scores scores.json --title Mine"
    )
    assert str(tmp_path.parent) not in made.path.read_text(), "files are named, places are not told"
    in_memory = report(fitted, tmp_path / "p.html", scores=scores)
    assert in_memory.data["command"].splitlines()[1] == "cmdgpu report fit.cmd.zarr -o p.html"


NAMES = (
    "<script>alert(1)</script>", "</script><script>alert(2)</script>", "a" * 1000, '"quoted" & \'single\'',
    "<img src=x onerror=alert(3)>", "\u202eright to left", "line\u2028separator",
)  # fmt: skip


def test_names_are_text(tmp_path: Path) -> None:
    """Markup in names of tensors, scalars and the title reaches the page as characters."""
    layout = ParameterMap(whole([(name, "parameter", "float32", (8, 5)) for name in NAMES]))
    cmd = CMD(2, n_samples=100).fit(
        write_store(tmp_path / "run.zarr", walks(layout.n_rows, 10), layout=layout)
    )
    made = report(cmd, tmp_path / "p.html", title="<script>alert(4)</script>")
    text = made.path.read_text(encoding="utf-8")
    assert [one["name"] for one in data_of(made.path)["network"]["tensors"]] == list(NAMES)
    for evil in ("<script>alert", "<img src=x"):
        assert evil not in text
    assert html.escape("<script>alert(4)</script>") in text
    assert "\u2028" not in text.split('id="data"')[1].split("</script>")[0]


def test_one_mode_two_snapshots_nothing_moves_many_modes(tmp_path: Path) -> None:
    with pytest.warns(CmdgpuWarning, match="none of the 50 sampled rows moves"):
        still = CMD(3).fit(np.ones((50, 12), np.float32))
    made = report(still, tmp_path / "still.html")
    assert "nothing of modes to draw" in made.warnings[0] and made.figures == ()
    assert data_of(made.path)["correlation"] is None and data_of(made.path)["weights"] == []

    W = planted(600, 12)
    one = report(CMD(1, n_samples=300).fit(W), tmp_path / "one.html")
    assert data_of(one.path)["n"]["modes"] == 1

    with pytest.warns(CmdgpuWarning, match="with 2 snapshots"):
        few = CMD(1, n_samples=300).fit(W[:, :2])
    two = report(few, tmp_path / "two.html")
    assert any("fewer than three snapshots" in note for note in two.warnings)
    assert two.data["words"]["verdict"] == "cannot tell" and two.data["histogram"]["chance"] == {}

    broken = W.copy()
    broken[::7, 3] = np.nan
    nan = report(CMD(2, n_samples=300).fit(broken), tmp_path / "nan.html")
    assert any("NaN or an infinity" in note for note in nan.warnings)

    many = CMD(500, n_samples=1500).fit(walks(4000, 90))
    page = report(many, tmp_path / "many.html")
    assert page.n_bytes < 3e6 and data_of(page.path)["n"]["modes"] == 500
    drawn = drawn_snapshots(90, 500)
    assert data_of(page.path)["steps"] == many.steps_[drawn].tolist() and len(drawn) == 51
    assert any("of 90 snapshots 51" in note for note in page.warnings)


def test_snapshots_are_thinned_evenly_and_the_ends_stay() -> None:
    assert drawn_snapshots(256, 10).tolist() == list(range(256))
    drawn = drawn_snapshots(10_000, 10)
    assert len(drawn) == 256 and drawn[0] == 0 and drawn[-1] == 9999 and np.ptp(np.diff(drawn)) <= 1


def test_many_tensors_are_cut_and_that_is_said(tmp_path: Path) -> None:
    names = [f"layer{i:05}.weight" for i in range(MOST_TENSORS + 300)]
    sizes = [2 + i % 3 for i in range(len(names))]
    named = zip(names, sizes, strict=True)
    layout = ParameterMap(whole([(name, "parameter", "float32", (size,)) for name, size in named]))
    traj = write_store(tmp_path / "run.zarr", walks(layout.n_rows, 9), layout=layout)
    made = report(CMD(3, n_samples=400).fit(traj), tmp_path / "p.html")
    shown = made.data["network"]
    assert shown["tensors_left_out"] == 300 and len(shown["tensors"]) == MOST_TENSORS
    kept = [one["name"] for one in shown["tensors"]]
    assert kept == sorted(kept) and min(one["rows"] for one in shown["tensors"]) == 2
    assert sum(one["rows"] == 2 for one in shown["tensors"]) == sizes.count(2) - 300
    assert made.n_bytes < 3e6


# ---- what cannot be shown --------------------------------------------------------------------------------


def test_scores_of_a_file_are_drawn_or_refused(fitted: CMD, tmp_path: Path) -> None:
    assert fitted.trajectory is not None
    comparison = compare(fitted, ["recorded", "cmd"], lambda net: {"acc": 0.5}, model=Net())
    (tmp_path / "scores.json").write_text(json.dumps(comparison.to_json()))
    made = report(fitted, tmp_path / "p.html", scores=tmp_path / "scores.json")
    assert made.data["methods"]["scores"] == ["acc"] and "methods" in made.figures
    assert [row["fit_s"] for row in made.data["methods"]["last"] if row["method"] == "recorded"] == [None]
    assert report(fitted, tmp_path / "q.html", scores=comparison).data["methods"] == made.data["methods"]
    for text, said in (
        ("{", "is no JSON"),
        ("[1, 2]", "holds no comparison"),
        ('{"methods": [{"label": 1}]}', "holds no comparison"),
        (json.dumps({**comparison.to_json(), "steps": [0, 99]}), "compares step 99"),
        (json.dumps({**comparison.to_json(), "n_parameters": 7}), "compares 7 weights"),
        (json.dumps({**comparison.to_json(), "trajectory": "0" * 64}), "recorded in another run"),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UsageError, match=said) as caught:
            report(fitted, tmp_path / "r.html", scores=tmp_path / "bad.json")
        assert "bad.json" in str(caught.value)
    with pytest.raises(UsageError, match="cannot be read"):
        report(fitted, tmp_path / "r.html", scores=tmp_path / "none.json")
    assert not (tmp_path / "r.html").exists()


def test_a_landscape_is_drawn_where_it_is_of_this_fit(fitted: CMD, tmp_path: Path) -> None:
    def evaluate(net: nn.Module) -> dict[str, float]:
        return {"norm": float(sum(p.square().sum() for p in net.parameters()))}

    with pytest.warns(CmdgpuWarning, match="BatchNorm keeps the statistics"):
        found = landscape(fitted, evaluate, Net(), modes=(0, 2), points=3, out=tmp_path / "plane.json")
    made = report(fitted, tmp_path / "p.html", landscape=tmp_path / "plane.json")
    assert made.data["landscape"] == found.to_json() and "landscape" in made.figures
    assert report(fitted, tmp_path / "p.html", landscape=found).data["landscape"] == found.to_json()
    assert fitted.trajectory is not None
    other = CMD(2, n_samples=200).fit(fitted.trajectory)
    with pytest.raises(UsageError, match="landscape of another fit") as caught:
        report(other, tmp_path / "q.html", landscape=tmp_path / "plane.json")
    assert "plane.json" in str(caught.value)


def test_what_is_refused_is_refused_before_baselines_read_anything(
    fitted: CMD, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reads(*_: Any, **__: Any) -> None:
        raise AssertionError("the trajectory is read")

    monkeypatch.setattr("cmdgpu.reporting.compare", reads)
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(UsageError, match="no comparison"):
        report(fitted, tmp_path / "p.html", baselines="ema", scores=tmp_path / "bad.json")
    with pytest.raises(CmdgpuError, match="no landscape"):
        report(fitted, tmp_path / "p.html", baselines="ema", landscape=tmp_path / "bad.json")


def test_what_cannot_be_shown_is_told_in_one_line(fitted: CMD, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not fitted"):
        report(CMD(3), tmp_path / "p.html")
    traj = record(tmp_path / "other.zarr", seed=5)
    other = CMD(3, n_samples=100).fit(traj, tmp_path / "other.cmd.zarr")
    with pytest.raises(UsageError, match="trajector"):
        report(fitted, tmp_path / "p.html", fits=[other])
    (tmp_path / "other.zarr").rename(tmp_path / "moved.zarr")
    alone = CMD.load(tmp_path / "other.cmd.zarr")
    with pytest.raises(UsageError, match="out of reach"):
        report(alone, tmp_path / "p.html", baselines="ema")
    made = report(alone, tmp_path / "p.html")
    assert any("out of reach" in note for note in made.warnings) and made.data["scalars"] == {}
    with pytest.raises(UsageError, match="nonsense"):
        report(fitted, tmp_path / "p.html", baselines="nonsense")
    with pytest.raises(CmdgpuError, match="cannot write"):
        report(fitted, tmp_path / "no folder" / "p.html")


def test_an_unfinished_fit_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traj = record(tmp_path / "run.zarr")

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cmdgpu.results.stored.StoredWriter.finish", stop)
    with pytest.raises(KeyboardInterrupt):
        CMD(3, n_samples=100).fit(traj, tmp_path / "fit.cmd.zarr")
    with pytest.raises(CmdgpuError, match=r"not finished: . of 1 units done"):
        report(tmp_path / "fit.cmd.zarr", tmp_path / "p.html")


def test_the_command_line(fitted: CMD, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = run_cli("report", str(fitted.result.path), "-o", "page.html", "--title", "Mine", "--json").json
    assert said["ok"] and said["out"] == "page.html" and said["bytes"] == Path("page.html").stat().st_size
    assert {"profiles", "correlation", "histogram", "network", "weights", "plane", "scalars"} <= set(
        said["figures"]
    )
    assert {"modes", "tensors", "costs", "provenance"} <= set(said["tables"])
    assert said["verdict"] == fitted.quality().verdict and "<title>Mine" in Path("page.html").read_text()
    ended = run_cli(
        "report", str(fitted.result.path), "-o", "page.html", "--baselines", "ema,pca:components=2"
    )
    assert ended.code == 0 and "wrote page.html" in ended.out
    missing = run_cli("report", "nothing.cmd.zarr", "-o", "x.html")
    assert missing.code != 0 and "nothing.cmd.zarr" in missing.err and missing.err.count("\n") == 1
