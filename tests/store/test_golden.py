"""Law of old stores: every format that was ever released stays readable, byte for byte.

The folders under ``tests/golden`` were written once by the release that introduced the format. They are added
to, never regenerated. Each trajectory holds 322 rows, steps 0, 10 and 25,

    W[i, t] = (i mod 64) - 4 t,     loss = step / 4,     accuracy given at step 25 only

in which every value is exact in all element types. Beside it lies its decomposition, fitted on a CPU: all
rows move alike, so there is one mode, and against the reference row r every row is

    a = 1,     b = (i mod 64) - (r mod 64),     correlation = 1
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cmdgpu.decomposition import CMD
from cmdgpu.errors import CmdgpuWarning
from cmdgpu.recording import Recorder
from cmdgpu.results import describe_result, verify_result
from cmdgpu.store import format as fmt
from cmdgpu.store.verification import verify_store
from cmdgpu.trajectory import Trajectory
from tests.harness import row_bits
from tests.verbs import plain_array, tree_bytes, zarr_values

GOLDEN = Path(__file__).parent.parent / "golden"
STORES = sorted(path.name for path in GOLDEN.glob("trajectory-*"))
RESULTS = sorted(path.name for path in GOLDEN.glob("result-*"))

ROWS = np.arange(322)[:, None] % 64
W_NT = (ROWS - 4 * np.arange(3)).astype(np.float32)


class GoldenModel(nn.Module):
    """The model of the golden stores, at snapshot t."""

    def __init__(self, dtype: str, t: int = 3) -> None:
        super().__init__()
        rows = torch.tensor(ROWS[:, 0] - 4 * t)
        self.embed = nn.Embedding(40, 8, dtype=getattr(torch, dtype))
        self.head = nn.Linear(8, 40, bias=False)
        self.head.weight = self.embed.weight
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.register_buffer("mean", rows[320:].float())
        self.register_buffer("count", torch.tensor(t))
        with torch.no_grad():
            self.embed.weight.copy_(rows[:320].reshape(40, 8))


def test_there_is_one_of_every_format_and_element_type() -> None:
    kinds = [f"{version}-{dtype}" for version in range(1, fmt.FORMAT + 1) for dtype in fmt.STORAGES]
    assert set(STORES) == {f"trajectory-{kind}" for kind in kinds}
    assert set(RESULTS) == {f"result-{kind}" for kind in kinds}


@pytest.mark.parametrize("name", STORES)
def test_an_old_store_reads_as_the_day_it_was_written(name: str) -> None:
    traj = Trajectory.open(GOLDEN / name)
    assert traj.dtype == name.rpartition("-")[2]
    assert (traj.steps.tolist(), traj.unit) == ([0, 10, 25], "epoch")
    assert np.array_equal(traj[:, :], W_NT)
    assert traj.scalars["loss"].tolist() == [0.0, 2.5, 6.25]
    assert np.array_equal(traj.scalars["accuracy"], [np.nan, np.nan, 0.5], equal_nan=True)
    assert [(t.name, t.kind, t.dtype, t.shape) for t in traj.parameters] == [
        ("empty", "parameter", "float32", (0, 3)),
        ("embed.weight", "parameter", traj.dtype, (40, 8)),
        ("mean", "buffer", "float32", (2,)),
    ]
    assert traj.parameters.aliases == {"head.weight": "embed.weight"}
    assert traj.parameters.skipped == (("count", "int64 has no rows"),)
    assert verify_store(GOLDEN / name).damaged == []


@pytest.mark.parametrize("name", STORES)
def test_zarr_reads_an_old_store(name: str) -> None:
    weights = fmt.widen(zarr_values(GOLDEN / name, fmt.WEIGHTS), name.rpartition("-")[2])
    assert np.array_equal(weights, W_NT)
    assert zarr_values(GOLDEN / name, fmt.STEP).tolist() == [0, 10, 25]


@pytest.mark.parametrize("name", STORES)
def test_an_old_store_is_taken_up_again(name: str, tmp_path: Path) -> None:
    path = Path(shutil.copytree(GOLDEN / name, tmp_path / name))
    traj = Trajectory.open(path)
    with Recorder(path, dtype=traj.dtype, unit="epoch") as recorder:
        recorder.record(GoldenModel(traj.dtype), 30)
    assert Trajectory.open(path).steps.tolist() == [0, 10, 25, 30]
    assert verify_store(path).damaged == []


# ---- decompositions ---------------------------------------------------------------------------------------

FITTED: dict[str, dict[str, Any]] = {
    "result-1-bfloat16": {"n_modes": 1, "sampling": "uniform", "random_state": 7},
    "result-1-float16": {"threshold": 0.5, "affinity": "corr-profile"},
    "result-1-float32": {"n_modes": 1},
}
"""What each was fitted with, besides eight samples."""
BITS = {
    "result-1-bfloat16": (1, "63251d323439200294eb4719e5c02772f76e99a8cabc7e1b536d006fd905dc2c"),
    "result-1-float16": (5, "3540bd05b0d4e7dd760596f0cf7559873b6954f082d9eea89107fb6eee1dfcc3"),
    "result-1-float32": (5, "3540bd05b0d4e7dd760596f0cf7559873b6954f082d9eea89107fb6eee1dfcc3"),
}
"""Reference row, and the digest of everything that was found, as of the day it was fitted."""
B = np.arange(322) % 64


def source_of(name: str) -> Path:
    return GOLDEN / name.replace("result", "trajectory")


@pytest.mark.parametrize("name", RESULTS)
def test_an_old_decomposition_reads_as_the_day_it_was_fitted(name: str) -> None:
    cmd = CMD.load(GOLDEN / name)
    r, bits = BITS[name]
    assert row_bits(cmd) == bits
    assert cmd.reference_rows_.tolist() == [r]
    assert np.array_equal(cmd.references_, W_NT[[r]])
    assert np.asarray(cmd.labels_).tolist() == [0] * 322
    for found, formula in ((cmd.a_, 1.0), (cmd.b_, B - B[r]), (cmd.correlation_, 1.0)):
        assert np.allclose(np.asarray(found), formula, rtol=0, atol=1e-6)
    assert np.array_equal(cmd.sample_, W_NT[cmd.sample_rows_])
    assert cmd.sample_labels_.tolist() == [0] * 8 and cmd.linkage_.shape == (7, 4)
    asked = {key: getattr(cmd, key) for key in FITTED[name]}
    assert asked == FITTED[name] and cmd.n_samples == 8
    assert verify_result(GOLDEN / name).damaged == []


@pytest.mark.parametrize("name", RESULTS)
def test_an_old_decomposition_still_knows_its_sums(name: str) -> None:
    cmd = CMD.load(GOLDEN / name)
    metrics = cmd.metrics_
    assert cmd.tensor_shares_ == {"empty": [0, 0, 0], "embed.weight": [0, 0, 320], "mean": [0, 0, 2]}
    counts = {key: metrics[key] for key in metrics if key.startswith("n_")}
    assert counts == {
        "n_modes": 1,
        "n_samples": 8,
        "n_rows": 320,
        "n_buffer_rows": 2,
        "n_constant": 0,
        "n_nonfinite": 0,
        "n_below_quantisation": 0,
    }
    assert metrics["mode_sizes"] == [320] and metrics["weight_mse"] < 1e-5
    for key in ("mean_abs_correlation", "r2", "r2_energy"):
        assert abs(metrics[key] - 1.0) < 1e-6
    assert all(0.9999 < quantile <= 1.0 for quantile in metrics["mode_quantiles"][0])
    said = describe_result(GOLDEN / name)
    assert (said.status, said.units_done, said.frame.n_units) == ("complete", 2, 2)
    assert said.metrics is not None
    assert said.metrics == {key: metrics[key] for key in said.metrics}


@pytest.mark.parametrize("t", range(3))
@pytest.mark.parametrize("name", RESULTS)
def test_an_old_decomposition_rebuilds_the_model(name: str, t: int) -> None:
    dtype: torch.dtype = getattr(torch, name.rpartition("-")[2])
    state = CMD.load(GOLDEN / name).state_dict([0, 10, 25][t])
    assert list(state) == ["empty", "embed.weight", "mean", "head.weight"]
    assert state["embed.weight"].dtype == state["head.weight"].dtype == dtype
    rows = torch.tensor(W_NT[:, t])
    assert torch.allclose(state["embed.weight"].float(), rows[:320].reshape(40, 8), rtol=0, atol=1e-5)
    assert torch.equal(state["head.weight"], state["embed.weight"])
    assert torch.equal(state["mean"], rows[320:])
    assert state["empty"].shape == (0, 3)


def test_an_old_decomposition_needs_its_trajectory_for_buffers_only(tmp_path: Path) -> None:
    alone = Path(shutil.copytree(GOLDEN / "result-1-float32", tmp_path / "alone"))
    with pytest.warns(CmdgpuWarning, match="1 buffers are left out"):
        state = CMD.load(alone).state_dict(25)
    assert list(state) == ["empty", "embed.weight", "head.weight"]


@pytest.mark.parametrize("name", RESULTS)
def test_zarr_reads_an_old_decomposition(name: str) -> None:
    cmd = CMD.load(GOLDEN / name)
    mine = {"mode": cmd.labels_, "a": cmd.a_, "b": cmd.b_, "correlation": cmd.correlation_}
    for array, values in mine.items():
        found = plain_array(GOLDEN / name, array)
        assert found.metadata.dimension_names == ("parameter",)
        assert np.asarray(found[...]).tobytes() == np.asarray(values).tobytes()
    assert np.array_equal(zarr_values(GOLDEN / name, "references"), cmd.references_)


def shape_of(path: Path) -> dict[str, Any]:
    """Every file with its size, every array's metadata, and what the group says of itself by name."""
    documents = {
        str(file.relative_to(path)): json.loads(file.read_bytes()) for file in path.rglob(fmt.DOCUMENT)
    }
    head = documents.pop(fmt.DOCUMENT)["attributes"]["cmdgpu"]
    for document in documents.values():
        del document["attributes"]["cmdgpu"]["self"]
    sizes = {name: len(raw) for name, raw in tree_bytes(path).items() if not name.endswith(fmt.DOCUMENT)}
    named = {part: sorted(head[part]) for part in ("digests", "units", "source", "config", "code", "metrics")}
    return {"files": sizes, "arrays": documents, "head": sorted(head), **named}


@pytest.mark.parametrize("name", [name for name in RESULTS if name.startswith(f"result-{fmt.FORMAT}-")])
def test_a_fit_of_today_lies_on_disk_as_the_golden_one_does(name: str, tmp_path: Path) -> None:
    """Otherwise the format has changed: it needs a new number, and golden stores of that number."""
    source = Trajectory.open(source_of(name))
    CMD(n_samples=8, device="cpu", **FITTED[name]).fit(source, out=tmp_path / "today")
    assert shape_of(tmp_path / "today") == shape_of(GOLDEN / name)
