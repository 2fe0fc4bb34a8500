"""What every baseline does alike: give models back, beside recorded buffers, from any trajectory."""

# torch leaves the types of many methods open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from cmdgpu import baselines
from cmdgpu.baselines import DMD, EMA, LAWA, PCA, SWA, Baseline, RankOne, ReferenceDMD
from cmdgpu.decomposition import CMD
from cmdgpu.errors import CmdgpuWarning, ModelMismatch, UsageError
from cmdgpu.recording import Recorder
from cmdgpu.store.view import StoreView
from cmdgpu.trajectory import Trajectory
from tests.baselines.cases import store_of
from tests.verbs import Net, bits, check_same_bits, float_tensors, net_at

STEPS = (0, 10, 20, 30, 40)
MAKERS = {
    "ema": lambda: EMA(0.5),
    "swa": lambda: SWA(),
    "lawa": lambda: LAWA(2),
    "pca": lambda: PCA(2),
    "rank one": lambda: RankOne(),
    "dmd": lambda: DMD(2),
    "dmd by layer": lambda: DMD(2, amplitudes="all", groups="layer"),
    "dmd by node": lambda: DMD(2, groups="node"),
}

pytestmark = pytest.mark.filterwarnings("ignore:BatchNorm1d keeps running statistics")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("baselines") / "run.zarr"
    with Recorder(path, rows_per_chunk=256) as recorder:
        for step in STEPS:
            recorder.record(net_at(step), step)
    return path


@pytest.mark.parametrize("kind", MAKERS)
def test_state_dict_load_into_and_export_give_one_model(kind: str, run: Path, tmp_path: Path) -> None:
    baseline = MAKERS[kind]().fit(Trajectory.open(run))
    state = baseline.state_dict(20)
    assert state["head.weight"] is state["embed.weight"], "tied names share one tensor"
    model = Net()
    baseline.load_into(model, 20)
    check_same_bits(float_tensors(model), dict(state))
    baseline.export(tmp_path / "model.safetensors", step=20)
    exported = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert all(bits(exported[name]) == bits(state[name]) for name in exported)
    recorded = net_at(20).state_dict()
    for name in ("body.1.running_mean", "running"):
        assert bits(state[name]) == bits(recorded[name]), "buffers come as they were recorded"
    assert sorted(baseline.state_dict(-1, "^body.0")) == ["body.0.bias", "body.0.weight"]
    assert "running" not in baseline.state_dict(20, buffers="skip")
    if kind.startswith(("rank", "dmd")):
        assert bits(baseline.state_dict(70)["running"]) == bits(net_at(40).state_dict()["running"])
    summary, metrics = baseline.summary(), baseline.metrics_
    assert repr(baseline) in summary
    assert metrics["n_rows"] == sum(p.numel() for p in Net().parameters())
    assert {"rank", "r2", "r2_energy", "weight_mse", "result_bytes", "seconds", "bytes_read"} <= set(metrics)


@pytest.mark.parametrize("kind", MAKERS)
def test_buffers_are_averaged_where_that_means_something(kind: str, run: Path) -> None:
    baseline = MAKERS[kind]().fit(Trajectory.open(run))
    if baseline.by is not None:
        with pytest.raises(UsageError, match="buffers cannot be 'rebuilt' here; have: recorded, skip"):
            baseline.state_dict(20, buffers="rebuilt")
        return
    weights = baseline.filter_at(20)[0]
    each = [net_at(step).state_dict()["running"].double() for step in STEPS]
    expected = sum(float(w) * x for w, x in zip(weights, each, strict=True))
    assert isinstance(expected, torch.Tensor)
    found = baseline.state_dict(20, buffers="rebuilt")["running"]
    assert torch.equal(found, expected.float())


def test_a_model_that_does_not_match_is_left_as_it_is(run: Path) -> None:
    model = torch.nn.Linear(3, 3)
    before = {name: bits(tensor) for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelMismatch, match=r"run\.zarr: tensor .*: the model lacks it"):
        PCA(2).fit(Trajectory.open(run)).load_into(model, -1)
    assert before == {name: bits(tensor) for name, tensor in model.state_dict().items()}


def test_selections_of_snapshots_and_tensors_are_all_a_baseline_knows(run: Path) -> None:
    traj = Trajectory.open(run).sel(start=1, stop=4, params="^body")
    pca = PCA(1).fit(traj)
    assert sorted(pca.state_dict(-1, buffers="skip")) == [
        "body.0.bias", "body.0.weight", "body.1.bias", "body.1.weight",
    ]  # fmt: skip
    assert pca.filter_at(-1).shape == (1, 3) and pca.steps_.tolist() == [10, 20, 30]
    other = PCA(1).fit(Trajectory.open(run).sel(start=1, stop=4))
    assert not np.array_equal(pca.profiles_, other.profiles_)
    model = net_at(77)
    pca.load_into(model, 20)
    assert bits(model.frozen) == bits(net_at(77).frozen), "what is not selected stays"


def test_fits_together_read_once_and_leave_the_bits_of_fits_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traj = store_of(tmp_path / "s.zarr")
    makers: list[Any] = [lambda: PCA(2), lambda: PCA(5), lambda: DMD(3), lambda: RankOne(),
                         lambda: DMD(2, groups="node"), lambda: SWA()]  # fmt: skip
    alone = [make().fit(traj) for make in makers]
    together: list[Baseline] = [make() for make in makers]
    chunks: list[int] = []
    read = StoreView.read_chunks

    def watched(view: StoreView, i: int, times: list[int], into: list[Any]) -> None:
        chunks.extend(times)
        read(view, i, times, into)

    monkeypatch.setattr(StoreView, "read_chunks", watched)
    Baseline.fit_together(together, traj)
    n_units = -(-traj.shape[0] // 1024)
    assert len(chunks) == n_units * traj.shape[1]
    for one, other in zip(alone, together, strict=True):
        assert one.filter_at(50).tobytes() == other.filter_at(50).tobytes()


def test_a_carried_cmd_gives_models_as_a_cmd_does(run: Path, tmp_path: Path) -> None:
    cmd = CMD(n_modes=2, n_samples=100).fit(Trajectory.open(run))
    carried = ReferenceDMD(2).fit(cmd)
    model = Net()
    carried.load_into(model, 60)
    check_same_bits(float_tensors(model), carried.state_dict(60))
    assert bits(model.running) == bits(net_at(40).running), "the last that was recorded"
    carried.export(tmp_path / "model.pt", step=60)
    check_same_bits(torch.load(tmp_path / "model.pt"), carried.state_dict(60))
    # at a step whose references are known, they alone make the difference
    error = carried.references_[:, 2] - cmd.references_[:, 2]
    mode, a = np.asarray(cmd.labels_), np.asarray(cmd.a_)
    piece = cmd.result.frame.map["embed.weight"].pieces[0]
    rows = slice(piece.row, piece.stop)
    moved = carried.state_dict(20)["embed.weight"] - cmd.state_dict(20)["embed.weight"]
    expected = a[rows] * np.where(mode[rows] >= 0, error[mode[rows]], 0.0)
    assert np.allclose(moved.numpy().reshape(-1), expected, atol=1e-5)


def test_a_missing_trajectory_is_no_fit_and_names_resolve_late() -> None:
    with pytest.raises(UsageError, match=r"this PCA is not fitted; call fit\(traj\)"):
        _ = PCA(2).metrics_
    with pytest.raises(AttributeError, match=r"'cmdgpu\.baselines' has no attribute 'ICA'"):
        _ = getattr(baselines, "ICA")  # noqa: B009
    assert set(baselines.__all__) == set(dir(baselines))
    for name in baselines.__all__:
        assert getattr(baselines, name) is not None
    code = "import sys, cmdgpu; cmdgpu.baselines; print('torch' in sys.modules, 'scipy' in sys.modules)"
    said = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert said.stdout.split() == ["False", "False"]


def test_warnings_point_to_who_asked() -> None:
    W = np.outer(np.arange(1, 30), np.arange(1, 9)).astype(np.float32)
    with pytest.warns(CmdgpuWarning) as caught:
        pca = PCA(3).fit(W)
    assert [each.filename for each in caught] == [__file__]
    W[3, 3] = np.nan
    with pytest.warns(CmdgpuWarning):
        pca.fit(W)
    with pytest.warns(CmdgpuWarning) as caught:
        pca.state_dict(-1)
    assert [each.filename for each in caught] == [__file__]
