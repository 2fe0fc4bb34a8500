"""A fit equals its definition in float64: argmax |corr| over the references, then least squares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmdgpu.decomposition import CMD
from cmdgpu.errors import CmdgpuWarning
from cmdgpu.notation import AnyArray
from cmdgpu.store import format as fmt
from tests.harness import check_equals_definition, planted, walks, write_store


def stored(W_nt: AnyArray, dtype: str) -> AnyArray:
    """The values as the store keeps them."""
    return fmt.widen(fmt.narrow(W_nt, dtype), dtype)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("kind", "n_snapshots"), [("walks", 3), ("planted", 5), ("walks", 100)])
def test_a_stored_trajectory(tmp_path: Path, kind: str, n_snapshots: int, dtype: str) -> None:
    W = walks(900, n_snapshots) if kind == "walks" else planted(900, n_snapshots, noise=0.3, level=2.0)
    source = write_store(tmp_path / "s.zarr", W, rows=512, dtype=dtype)
    cmd = CMD(n_modes=5, n_samples=200).fit(source, out=tmp_path / "out.zarr")
    assert cmd.n_modes_ >= 3
    check_equals_definition(cmd, stored(W, dtype))


@pytest.mark.parametrize("level", [1.0, 1e2, 1e4, 1e6])
def test_rows_that_move_far_less_than_they_are_large(level: float) -> None:
    W = planted(3000, 60, noise=0.1, level=level)
    cmd = CMD(n_modes=3, n_samples=300).fit(W)
    check_equals_definition(cmd, W)
    ratio = np.abs(W.mean(axis=1)) / W.std(axis=1)
    assert 0.5 * level < np.median(ratio) < 2 * level


def test_rows_that_settle_far_from_where_they_start_over_ten_thousand_snapshots() -> None:
    t = np.arange(10_000)
    start = (100 * np.exp(-t / 2) + 5).astype(np.float32)
    W = planted(200, 10_000, noise=0.5, level=0.0) * 2 + start
    cmd = CMD(n_modes=3, n_samples=100).fit(W)
    check_equals_definition(cmd, W)


def test_one_snapshot_makes_every_row_constant(tmp_path: Path) -> None:
    W = walks(500, 1)
    source = write_store(tmp_path / "s.zarr", W)
    with pytest.warns(CmdgpuWarning) as warned:
        cmd = CMD(n_modes=3, n_samples=50).fit(source, out=tmp_path / "out.zarr")
    assert [str(w.message).partition(":")[0] for w in warned] == [
        "with 1 snapshots every row is constant",
        "none of the 50 sampled rows moves",
    ]
    check_equals_definition(cmd, W)
    assert cmd.metrics_["n_constant"] == 500
    assert np.array_equal(cmd.state_dict(0)["W"].numpy(), W[:, 0])


def test_two_snapshots_put_every_moving_row_into_mode_0(tmp_path: Path) -> None:
    W = walks(500, 2)
    W[17] = 4.25
    source = write_store(tmp_path / "s.zarr", W)
    with pytest.warns(CmdgpuWarning) as warned:
        cmd = CMD(n_modes=3, n_samples=50).fit(source)
    assert "with 2 snapshots every moving row has |corr| = 1" in str(warned[0].message)
    assert "1 distinct profiles, fewer than the 3 modes" in str(warned[1].message)
    check_equals_definition(cmd, W)
    moving = np.arange(500) != 17
    assert np.all(np.asarray(cmd.labels_)[moving] == 0) and cmd.labels_[17] == -1
    assert np.all(np.abs(np.asarray(cmd.correlation_)[moving]) == 1)
    assert "means nothing" in cmd.summary()


def test_more_samples_than_rows_sample_every_row() -> None:
    W = walks(80, 10)
    cmd = CMD(n_modes=4, n_samples=10_000).fit(W)
    assert np.array_equal(cmd.sample_rows_, np.arange(80))
    check_equals_definition(cmd, W)


def test_more_modes_than_distinct_profiles_give_fewer_modes() -> None:
    profiles = walks(3, 12, seed=4)
    rng = np.random.default_rng(0)
    W = (profiles[rng.integers(3, size=400)] * rng.choice([-2.0, 0.5, 4.0], (400, 1)) + 8.0).astype(
        np.float32
    )
    with pytest.warns(CmdgpuWarning, match="3 distinct profiles, fewer than the 7 modes asked for"):
        cmd = CMD(n_modes=7, n_samples=60).fit(W)
    assert cmd.n_modes_ == 3
    check_equals_definition(cmd, W)
    assert np.abs(np.asarray(cmd.correlation_)).min() > 1 - 1e-6


def test_w_is_2r_plus_3_gives_a_2_and_b_3() -> None:
    r = np.sin(np.arange(16, dtype=np.float32))
    cmd = CMD(n_modes=1).fit(np.stack([r, 2 * r + 3, -r, np.full_like(r, 7)]))
    assert cmd.reference_rows_.tolist() == [0]
    assert np.asarray(cmd.labels_).tolist() == [0, 0, 0, -1]
    assert np.asarray(cmd.a_) == pytest.approx([1, 2, -1, 0], abs=1e-6)
    assert np.asarray(cmd.b_) == pytest.approx([0, 3, 0, 7], abs=1e-6)
    assert np.asarray(cmd.correlation_) == pytest.approx([1, 1, -1, 0], abs=1e-6)


def test_300_modes_survive_the_way_to_disk_and_back(tmp_path: Path) -> None:
    W = walks(3000, 60)
    source = write_store(tmp_path / "s.zarr", W, rows=2048)
    cmd = CMD(n_modes=300, n_samples=900).fit(source, out=tmp_path / "out.zarr")
    assert cmd.n_modes_ == 300 and int(np.asarray(cmd.labels_).max()) > 255
    check_equals_definition(CMD.load(tmp_path / "out.zarr"), W)
    assert sum(cmd.metrics_["mode_sizes"]) == 3000


@st.composite
def odd_rows(draw: st.DrawFn) -> AnyArray:
    """Walks, some of them constant, not finite, duplicated, negated, huge or tiny."""
    n_snapshots = draw(st.integers(3, 40))
    W = walks(60, n_snapshots, draw(st.integers(0, 1 << 16)))
    for row in range(1, 60):
        kind = draw(
            st.sampled_from(["walk", "walk", "constant", "nan", "inf", "copy", "minus", "large", "small"])
        )
        at = draw(st.integers(0, n_snapshots - 1))
        if kind == "constant":
            W[row] = W[row, 0]
        elif kind in ("nan", "inf"):
            W[row, at] = np.float32(kind)
        elif kind in ("copy", "minus"):
            W[row] = W[row - 1] * (1 if kind == "copy" else -1)
        elif kind in ("large", "small"):
            W[row] *= np.float32(1e12 if kind == "large" else 1e-12)
    return W


@settings(max_examples=40)
@given(odd_rows(), st.integers(1, 12), st.integers(1, 80))
@pytest.mark.filterwarnings("ignore::cmdgpu.errors.CmdgpuWarning")
def test_any_rows(W: AnyArray, n_modes: int, n_samples: int) -> None:
    cmd = CMD(n_modes=n_modes, n_samples=n_samples).fit(W)
    check_equals_definition(cmd, W, least_sure=0.5)
