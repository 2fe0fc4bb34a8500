"""Law of old stores: every format that was ever released stays readable, byte for byte.

The folders under ``tests/golden`` were written once by the release that introduced the format. They are added
to, never regenerated. Each holds the same trajectory: 322 rows, steps 0, 10 and 25,

    W[i, t] = (i mod 64) - 4 t,     loss = step / 4,     accuracy given at step 25 only

in which every value is exact in all element types.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from cmdgpu.recording import Recorder
from cmdgpu.store import format as fmt
from cmdgpu.store.verification import verify_store
from cmdgpu.trajectory import Trajectory
from tests.verbs import zarr_values

GOLDEN = Path(__file__).parent.parent / "golden"
STORES = sorted(path.name for path in GOLDEN.glob("trajectory-*"))

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
    formats = range(1, fmt.FORMAT + 1)
    assert set(STORES) == {f"trajectory-{version}-{dtype}" for version in formats for dtype in fmt.STORAGES}


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
