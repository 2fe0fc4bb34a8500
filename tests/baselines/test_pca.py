"""Laws of PCA and of one component per tensor: the oracle of scikit-learn, the optimum, the line beyond."""

# scikit-learn has no types; torch leaves those of many methods open.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmdgpu.baselines import DMD, PCA, Baseline, RankOne
from cmdgpu.decomposition import CMD
from cmdgpu.errors import CmdgpuWarning, UsageError
from cmdgpu.notation import F32, F64
from cmdgpu.trajectory import Trajectory
from tests.baselines.cases import LAYERS, T, mean_squared, parameter_rows, rebuilt, store_of, values
from tests.harness import planted, walks


def sklearn_pca(W: F32, r: int) -> tuple[F64, F64]:
    """Explained shares and the reconstruction: rows are features, whose mean over time is taken off."""
    from sklearn.decomposition import PCA as Oracle

    oracle: Any = Oracle(n_components=r, svd_solver="full")
    scores = oracle.fit_transform(W.astype(np.float64).T)
    return oracle.explained_variance_ratio_, oracle.inverse_transform(scores).T


@pytest.mark.parametrize("r", [1, 3, T - 1])
def test_pca_is_that_of_scikit_learn(r: int, tmp_path: Path) -> None:
    pca = PCA(r).fit(store_of(tmp_path / "s.zarr"))
    W = values()[parameter_rows()]
    shares, expected = sklearn_pca(W, r)
    assert np.allclose(pca.explained_variance_ratio_, shares, rtol=1e-10)
    assert np.abs(rebuilt(pca) - expected).max() <= 2.0**-24 * np.abs(expected).max() * 1.01
    # float64 and rounded rows tell the same error, and it is that of the float64 definition
    error = float(np.square(expected - W).mean())
    assert pca.metrics_["weight_mse"] == pytest.approx(error, rel=1e-9, abs=1e-14)
    n = LAYERS.n_rows_of("parameter")
    assert pca.metrics_["result_bytes"] == 4 * (n * (r + 1) + T * r)
    assert np.allclose(pca.profiles_ @ pca.profiles_.T, np.eye(r), atol=1e-12)


@pytest.mark.parametrize("m", [1, 2, 5])
def test_nothing_of_the_same_rank_comes_closer_than_pca(m: int) -> None:
    """The bounds of theory: SSE_PCA(m) <= SSE_DMD(m), and SSE_PCA(M) <= SSE_CMD(M)."""
    traj = Trajectory.from_array(planted(4000, 30, 4, noise=0.4))
    pca, cmd = PCA(m), CMD(n_modes=m).fit(traj)
    dmds = [DMD(m), DMD(m, amplitudes="all")]
    Baseline.fit_together([pca, *dmds], traj)
    best = pca.metrics_["weight_mse"]
    assert 0 < best <= cmd.metrics_["weight_mse"]
    for dmd in dmds:
        assert best <= dmd.metrics_["weight_mse"]
    assert dmds[1].metrics_["weight_mse"] <= dmds[0].metrics_["weight_mse"] * (1 + 1e-9)
    # and all of them say the error of what they give back
    for baseline in (pca, *dmds):
        found = mean_squared(rebuilt(baseline), np.asarray(traj[:, :]))
        assert baseline.metrics_["weight_mse"] == pytest.approx(found, rel=1e-6)


def test_rows_that_never_move_come_back_as_they_are_and_those_with_nan_as_nan(tmp_path: Path) -> None:
    W = values()
    conv = LAYERS["conv.weight"].pieces[0]
    W[conv.row + 3] = 0.1
    W[conv.row + 7, 4] = np.nan
    W[conv.row + 9, 0] = np.inf
    for baseline in (PCA(3), RankOne(), DMD(3), DMD(3, groups="node")):
        baseline.fit(store_of(tmp_path / f"{type(baseline).__name__}{baseline.by}.zarr", W))
        with pytest.warns(CmdgpuWarning, match=r"non-finite rows are NaN in conv\.weight$"):
            state = baseline.state_dict(50)
        flat = state["conv.weight"].numpy().reshape(-1)
        assert np.flatnonzero(np.isnan(flat)).tolist() == [7, 9]
        assert baseline.metrics_["n_nonfinite"] == 2 and np.isfinite(baseline.metrics_["weight_mse"])
        if not isinstance(baseline, DMD):
            assert flat[3] == np.float32(0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            baseline.state_dict(50, params="^fc")  # says nothing of tensors that were not asked for


def test_a_spectrum_of_fewer_components_is_cut_and_said() -> None:
    """Two profiles of float32 rows that are exact: the third component would be made of rounding."""
    a, r = (
        np.random.default_rng(0).integers(-8, 8, (500, 2)),
        np.random.default_rng(1).integers(-8, 8, (2, 12)),
    )
    W = (a @ r).astype(np.float32)
    with pytest.warns(CmdgpuWarning, match=r"PCA\(5\): 2 components lie above the noise"):
        pca = PCA(5).fit(W)
    assert pca.rank_ == 2 == pca.metrics_["rank"]
    assert np.abs(rebuilt(pca) - W).max() <= 1e-5
    still = PCA(1)
    with pytest.warns(CmdgpuWarning, match="0 components"):
        still.fit(np.full((300, 4), 2.5, dtype=np.float32))
    assert (rebuilt(still) == 2.5).all() and np.isnan(still.metrics_["r2_energy"])


def test_a_rank_that_snapshots_cannot_have_is_refused() -> None:
    W = walks(50, 6)
    with pytest.raises(UsageError, match="PCA of rank 6, and 6 snapshots are selected; rank 5 is the most"):
        PCA(6).fit(W)
    with pytest.raises(UsageError, match="PCA of rank 0; it is at least 1"):
        PCA(0)
    with pytest.raises(UsageError, match="PCA needs 2 snapshots, 1 are selected"):
        PCA(1).fit(W[:, :1])
    with pytest.raises(UsageError, match="RankOne needs 2 snapshots, 1 are selected"):
        RankOne().fit(W[:, :1])


# ---- rank one -----------------------------------------------------------------------------------------


def test_rank_one_is_the_first_singular_pair_of_every_tensor(tmp_path: Path) -> None:
    one = RankOne().fit(store_of(tmp_path / "s.zarr"))
    W = values().astype(np.float64)
    found, error = rebuilt(one), 0.0
    rows = parameter_rows()
    for tensor in (t for t in LAYERS if t.kind == "parameter"):
        piece = tensor.pieces[0]
        w = W[piece.row : piece.stop]
        mean = w.mean(axis=1, keepdims=True)
        u, s, vt = np.linalg.svd(w - mean, full_matrices=False)
        expected = mean + s[0] * np.outer(u[:, 0], vt[0])
        mine = found[np.searchsorted(rows, piece.row) :][: tensor.n_rows]
        assert np.abs(mine - expected).max() <= 1e-6
        error += float(np.square(expected - w).sum())
    assert one.metrics_["weight_mse"] == pytest.approx(error / found.size, rel=1e-9)
    assert one.metrics_["result_bytes"] == 4 * (2 * len(rows) + 7 * T)


def test_a_straight_path_goes_on_straight_and_a_still_tensor_stays() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 400))
    steps = np.array([0, 1, 5, 10, 20])  # need not be even
    one = RankOne().fit(Trajectory.from_array((a[:, None] * steps + b[:, None]).astype(np.float32), steps))
    assert np.abs(one.state_dict(40)["W"].numpy() - (40 * a + b)).max() <= 1e-5
    still = RankOne().fit(np.full((300, 4), 2.5, dtype=np.float32))
    assert (still.state_dict(99)["W"].numpy() == 2.5).all()
