"""Laws of DMD: the oracle of PyDMD, groups by hand, planted dynamics, what it refuses and what it says."""

# PyDMD has no types; torch leaves those of many methods open.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmdgpu.baselines import DMD, ReferenceDMD
from cmdgpu.baselines.dynamics import Amplitudes, decompose
from cmdgpu.decomposition import CMD
from cmdgpu.errors import CmdgpuError, CmdgpuWarning, StepNotFound, UsageError
from cmdgpu.notation import F32, F64
from cmdgpu.trajectory import Trajectory
from tests.baselines.cases import LAYERS, parameter_rows, rebuilt, store_of, values
from tests.harness import planted, walks


def oracle(W: F64, r: int, amplitudes: Amplitudes) -> tuple[F64, F64]:
    """|eigenvalues|, descending, and the reconstruction, by the SVD of PyDMD."""
    from pydmd import DMD as PyDMD

    found: Any = PyDMD(svd_rank=r, exact=True, opt=amplitudes == "all")
    found.fit(W)
    return found.eigs, found.reconstructed_data.real


def vibrating(n: int, t: int) -> F32:
    """Four modes: two that turn, one that decays, one that stays."""
    rng = np.random.default_rng(5)
    lam = np.array([0.97 * np.exp(0.4j), 0.97 * np.exp(-0.4j), 0.9, 1.0])
    turning, decaying, staying = rng.standard_normal((3, n)), rng.standard_normal(n), rng.standard_normal(n)
    phi = np.stack([turning[0] + 1j * turning[1], turning[0] - 1j * turning[1], decaying, staying], axis=1)
    return np.real(phi @ lam[:, None] ** np.arange(t)).astype(np.float32)


CASES = {
    "modes that turn and decay": (vibrating(500, 30), 4),
    "planted profiles": (planted(2000, 40, 3, noise=0.2), 5),
    "walks": (walks(1000, 25), 10),
}


@pytest.mark.filterwarnings("ignore:Input data condition number")
@pytest.mark.parametrize("amplitudes", ["first", "all"])
@pytest.mark.parametrize("case", CASES)
def test_dmd_is_that_of_pydmd(case: str, amplitudes: Amplitudes) -> None:
    W, r = CASES[case]
    dmd = DMD(r, amplitudes=amplitudes).fit(W)
    eigenvalues, expected = oracle(W.astype(np.float64), r, amplitudes)
    for mine in dmd.eigenvalues_[0]:
        assert np.abs(eigenvalues - mine).min() <= 1e-6
    found, scale = rebuilt(dmd), np.abs(expected).max()
    # PyDMD's first column is the mode sum too
    assert np.abs(found - expected)[:, 1:].max() <= 1e-6 * scale
    if case.startswith("modes"):
        assert dmd.metrics_["weight_mse"] <= 1e-12, "four modes are all there is"


@pytest.mark.parametrize("groups", ["layer", "node"])
def test_groups_move_by_themselves(groups: Any, tmp_path: Path) -> None:
    """The same as DMD of the rows of each group alone, at the rank that it can have."""
    dmd = DMD(2, groups=groups).fit(store_of(tmp_path / "s.zarr"))
    W = values().astype(np.float64)
    found = np.full(W.shape, np.nan)
    found[parameter_rows()] = rebuilt(dmd)
    conv, bias = LAYERS["conv.weight"].pieces[0], LAYERS["conv.bias"].pieces[0]
    if groups == "layer":
        rows = np.arange(conv.row, bias.stop)
        group = 0
    else:
        rows = np.append(np.arange(conv.row + 5 * 27, conv.row + 6 * 27), bias.row + 5)
        group = 5
        scale = LAYERS["scale"].pieces[0].row
        assert dmd.ranks_[-1] == 1, "one row has one mode"
        assert np.isfinite(found[scale]).all()
        assert len(dmd.ranks_) == 60
    eigenvalues, expected = oracle(W[rows], 2, "first")
    assert np.abs(np.sort_complex(dmd.eigenvalues_[group]) - np.sort_complex(eigenvalues)).max() <= 1e-8
    assert np.abs(found[rows] - expected)[:, 1:].max() <= 1e-6
    alive = np.isfinite(found).all(axis=1)
    error = np.square(found[alive] - W[alive]).mean()
    assert dmd.metrics_["weight_mse"] == pytest.approx(error, rel=1e-6)
    sizes = [27 + 1] * 8 + [16] + [61] * 50 + [1] if groups == "node" else [224, 16, 3050, 1]
    numbers = sum((n + 2) * r for n, r in zip(sizes, dmd.ranks_.tolist(), strict=True))
    assert dmd.metrics_["result_bytes"] == 8 * numbers
    assert f"of {len(sizes)} groups by {groups}" in dmd.summary()


def test_planted_dynamics_are_forecast_on_their_grid() -> None:
    W = vibrating(500, 60)
    steps = np.arange(100, 500, 10)
    dmd = DMD(4).fit(Trajectory.from_array(W[:, :40], steps))
    for k in (39, 40, 59):
        assert np.abs(dmd.state_dict(100 + 10 * k)["W"].numpy() - W[:, k]).max() <= 1e-5
    with pytest.raises(StepNotFound, match="step 505: is not on the grid of every 10 steps; the last is 490"):
        dmd.state_dict(505)
    with pytest.raises(StepNotFound, match="step 95"):
        dmd.state_dict(95)


def test_growth_is_said_and_overflow_is_no_number() -> None:
    """One row that doubles: infinite beyond float32 with a warning, an error beyond float64."""
    W = (2.0 ** np.arange(20)[None, :] * np.arange(1, 40)[:, None]).astype(np.float32)
    dmd = DMD(1).fit(W)
    assert dmd.growth_ == pytest.approx(2.0**19) and "largest |lambda| 2.0000" in dmd.summary()
    assert np.array_equal(dmd.state_dict(30)["W"].numpy(), (2.0**30 * np.arange(1, 40)).astype(np.float32))
    with pytest.warns(CmdgpuWarning, match=r"DMD\(1.*left values beyond float32: they are infinite"):
        assert np.isinf(dmd.state_dict(200)["W"].numpy()).all()
    with pytest.raises(CmdgpuError, match=r"\|lambda\| = 2 has grown beyond float64 at snapshot 2000"):
        dmd.state_dict(2000)


def test_growth_beyond_float64_within_the_snapshots_is_said_by_the_fit() -> None:
    """A row that stays and jumps at the end: the map that comes nearest multiplies by 1e36."""
    W = np.ones((1, 100), dtype=np.float32)
    W[0, -1] = 1e38
    with pytest.warns(CmdgpuWarning, match="a mode of the network grows beyond float64 within the snapsh"):
        dmd = DMD(1).fit(W)
    assert dmd.metrics_["weight_mse"] == np.inf and dmd.growth_ == np.inf


def test_singular_values_of_noise_are_cut_and_said() -> None:
    a = np.random.default_rng(0).integers(1, 9, 300)
    W = np.outer(a, np.arange(1, 13)).astype(np.float32)
    with pytest.warns(CmdgpuWarning, match="1 singular values lie above the noise, the others are left out"):
        dmd = DMD(5).fit(W)
    assert dmd.ranks_.tolist() == [1]
    zero = decompose(np.zeros((6, 6)), 3, "first")
    assert zero.rank == 0 and not zero.filters(np.arange(9)).any()


def test_dmd_refuses_what_has_no_dynamics() -> None:
    W = walks(60, 6)
    with pytest.raises(UsageError, match="DMD of rank 6, and 6 snapshots are selected; rank 5 is the most"):
        DMD(6).fit(W)
    with pytest.raises(
        UsageError, match="dynamics need even steps: 2 at first, 3 from 4 to 7; select evenly spaced"
    ):
        DMD(1).fit(Trajectory.from_array(W, [0, 2, 4, 7, 9, 11]))
    with pytest.raises(UsageError, match="amplitudes cannot be 'last'; have: first, all"):
        DMD(1, amplitudes="last")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="groups cannot be 'tensor'; have: network, layer, node"):
        DMD(1, groups="tensor")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="DMD needs 2 snapshots, 1 are selected"):
        DMD(1).fit(W[:, :1])


# ---- of the references of a CMD -------------------------------------------------------------------------


def test_references_carried_on_carry_every_weight() -> None:
    """Profiles that turn and decay, M of them, rows a r + b: forecast with the ones row or with delays."""
    k = np.arange(60)
    r = np.stack([0.98**k * np.cos(0.3 * k), 0.95**k])
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 600))
    W = (a[:, None] * r[rng.integers(2, size=600)] + b[:, None]).astype(np.float32)
    cmd = CMD(n_modes=2).fit(Trajectory.from_array(W[:, :40], 5 * np.arange(40)))
    carried = ReferenceDMD(4, delays=3).fit(cmd)
    assert carried.metrics_["reference_r2"] > 1 - 1e-8
    assert np.abs(carried.references_ - cmd.references_).max() <= 1e-4
    for step in (35, 45, 55):
        assert np.abs(carried.state_dict(5 * step)["W"].numpy() - W[:, step]).max() <= 1e-3
    few = ReferenceDMD(3).fit(cmd)
    assert few.metrics_["reference_r2"] < carried.metrics_["reference_r2"], "two profiles are no oscillator"
    assert len(few.eigenvalues_) == 3, "two profiles and the row of ones, which carries b"
    assert "R^2 of the references" in carried.summary()
    with pytest.raises(StepNotFound, match="step 7: is not on the grid of every 5 steps"):
        carried.state_dict(7)


def test_what_references_cannot_carry_is_refused() -> None:
    cmd = CMD(n_modes=2).fit(planted(500, 8, 2))
    with pytest.raises(UsageError, match="rank 3 is the most they can have"):
        ReferenceDMD(4).fit(cmd)
    with pytest.raises(UsageError, match="take fewer delays"):
        ReferenceDMD(1, delays=8).fit(cmd)
    with pytest.raises(UsageError, match="both are at least 1"):
        ReferenceDMD(0)
    with pytest.raises(UsageError, match="is not fitted"):
        ReferenceDMD(1).state_dict(0)
    uneven = CMD(n_modes=2).fit(Trajectory.from_array(planted(500, 4, 2), [0, 1, 2, 4]))
    with pytest.raises(UsageError, match="1 at first, 2 from 2 to 4"):
        ReferenceDMD(1).fit(uneven)
