"""Every output is written, in one way; references beyond one product; rows that Hypothesis thinks of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cmdgpu_kernels import IMPLEMENTATIONS, RowFit, assign_and_fit_reference
from cmdgpu_kernels.assignment.torch_impl import GROUP
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from torch import Tensor

from tests.kernels.where import FITTING, assign_and_fit

NAMES = list(FITTING)
TOLERANCE = {i.name: i.tolerance["float32"] for i in IMPLEMENTATIONS}
POISON = 77.0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 511, 512, 1100])
def test_no_output_keeps_what_was_in_its_memory(
    name: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = RowFit.empty

    def poisoned(rows: int, device: torch.device, *, margin: bool) -> RowFit:
        outputs = honest(rows, device, margin=margin)
        for output in vars(outputs).values():
            output.fill_(POISON)
        return outputs

    monkeypatch.setattr(RowFit, "empty", poisoned)
    rng = np.random.default_rng(rows)
    W = torch.tensor(np.cumsum(rng.standard_normal((20, rows)), axis=0), dtype=torch.float32)
    W[:, rows // 2] = 3.0
    fit = assign_and_fit(W, rng.standard_normal((3, 20)), implementation=name, margin=True)
    for field, output in vars(fit).items():
        assert not (output == POISON).any(), field


@pytest.mark.parametrize("name", NAMES)
def test_what_is_undefined_is_one_quiet_nan(name: str) -> None:
    W = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    W[3, 0], W[4, 1], W[0, 2] = torch.nan, torch.inf, -torch.inf
    W[5, 3] = torch.tensor(-0x400000, dtype=torch.int32).view(torch.float32)  # a negative NaN
    with np.errstate(all="ignore"):  # the interpreter computes in NumPy, which warns of inf - inf
        fit = assign_and_fit(W, np.arange(30.0)[None], implementation=name)
    for output in (fit.b, fit.ss):
        assert (output[:4].view(torch.int32) == 0x7FC00000).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("modes", [6, 11, 16])
def test_more_references_than_one_sweep_takes_keep_their_numbers(name: str, modes: int) -> None:
    """Sixteen-bit rows: their sweeps hold the fewest references, and the last one is padded."""
    R = np.cumsum(np.random.default_rng(modes).standard_normal((modes, 70)), axis=1)
    W = torch.tensor(np.hstack([-R.T, 3 * R.T + 1]), dtype=torch.bfloat16)
    fit = assign_and_fit(W, R, implementation=name, margin=True)
    want = assign_and_fit_reference(numbers(W), R)
    assert fit.mode.numpy().tolist() == want.mode.tolist() == list(range(modes)) * 2
    assert fit.margin is not None and np.abs(numbers(fit.margin) - want.margin).max() <= 1e-5


@pytest.mark.parametrize("name", [name for name in NAMES if name != "triton-interpreted"])
@pytest.mark.parametrize("snapshots", [40, 150])
@pytest.mark.parametrize("modes", [GROUP - 1, GROUP, GROUP + 1, 2 * GROUP + 44])
def test_more_references_than_one_product_takes_are_no_less_exact(
    name: str, snapshots: int, modes: int
) -> None:
    rng = np.random.default_rng(modes)
    R = rng.standard_normal((modes, snapshots))
    followed = np.arange(400) * modes // 400
    x = R[followed].T * rng.uniform(-5, 5, 400) + rng.standard_normal((snapshots, 400))
    x[: snapshots // 9] += 6  # so that the pivot has somewhere to move
    W = torch.tensor(x + np.linspace(30, -30, 400), dtype=torch.float32)
    fit = assign_and_fit(W, R, implementation=name, margin=True)
    want = assign_and_fit_reference(W.double().numpy(), R)
    sure = want.margin > 1e-5
    assert np.array_equal(fit.mode.numpy()[sure], want.mode[sure]) and sure.mean() > 0.9
    assert np.abs(fit.correlation.numpy() - want.correlation)[sure].max() <= TOLERANCE["torch"]
    assert fit.margin is not None and np.abs(fit.margin.numpy() - want.margin).max() <= 1e-5
    assert want.mode.min() < 10 and want.mode.max() > modes - 10


def test_a_tie_between_references_of_two_products_is_won_by_the_lower() -> None:
    """Reference k moves at snapshots 2k and 2k + 1 only, so every product is exact."""
    pairs = GROUP + 4
    R = np.kron(np.eye(pairs), [[1.0, -1.0]])
    W = torch.tensor(2.0 * R[3] - 2.0 * R[GROUP + 2], dtype=torch.float32)[:, None]
    fit = assign_and_fit(W, R, implementation="torch", margin=True)
    assert fit.mode.numpy().tolist() == [3] and fit.margin is not None and float(fit.margin) == 0.0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_row_that_never_moves_returns_its_value_exactly(name: str, dtype: torch.dtype) -> None:
    """The mean of 8 equal floats misses 44 of 100 of them, and such a row would seem to move."""
    values = torch.randn(500, generator=torch.Generator().manual_seed(0)).to(dtype)
    fit = assign_and_fit(values.expand(70, 500), np.arange(70.0)[None], implementation=name)
    assert (fit.mode == -1).all() and torch.equal(fit.b, values.float())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("snapshots", [200, 3000])
def test_one_far_snapshot_costs_no_digit_of_the_others(name: str, snapshots: int) -> None:
    """The pivot follows the row: behind the first one, an eighth of the way out, digits would be lost."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((snapshots, 64))
    x[np.arange(64) % 8 * snapshots // 8, np.arange(64)] += 10 ** rng.uniform(2, 5, 64)
    W = torch.tensor(x, dtype=torch.float32)
    R = np.cumsum(rng.standard_normal((2, snapshots)), axis=1)
    fit = assign_and_fit(W, R, implementation=name)
    want = assign_and_fit_reference(numbers(W), R)
    sure = want.margin > 1e-5
    assert np.array_equal(fit.mode.numpy()[sure], want.mode[sure])
    assert np.abs(numbers(fit.correlation) - want.correlation)[sure].max() <= TOLERANCE[name]
    assert np.abs(numbers(fit.ss) / want.ss - 1).max() <= 2 * TOLERANCE[name]
    mean = want.b + want.a * R.mean(axis=1)[want.mode]
    carried = numbers(fit.a) * R.mean(axis=1)[want.mode]
    allowed = 8 * 2.0**-23 * (np.abs(mean) + np.abs(carried) + np.sqrt(want.ss / snapshots))
    assert (np.abs(numbers(fit.b) + carried - mean)[sure] <= allowed[sure]).all()


FLOATS = st.floats(-1e6, 1e6, width=32)
ROWS: st.SearchStrategy[NDArray[np.float32]] = st.tuples(
    st.integers(1, 9), st.sampled_from([3, 8, 65, 130])
).flatmap(lambda shape: arrays.arrays(np.float32, shape, elements=FLOATS, fill=st.just(0.5)))


@given(rows=ROWS, scale=st.sampled_from([1e-12, 1.0, 1e9]), seed=st.integers(0, 5))
def test_a_row_of_any_shape_is_fitted_as_well_as_its_float32_values_allow(
    rows: Any, scale: float, seed: int
) -> None:
    """Not only walks: spikes, plateaus, repeated values, one huge value among small ones."""
    W = torch.tensor((rows * np.float32(scale)).T.copy())
    R = np.random.default_rng(seed).standard_normal((4, len(W)))
    fit = assign_and_fit(W, R, implementation="torch")
    want = assign_and_fit_reference(W.double().numpy(), R)
    assert np.array_equal(fit.mode.numpy() < 0, want.mode < 0)
    live = (want.mode >= 0) & (want.margin > 1e-5)
    assert np.array_equal(fit.mode.numpy()[live], want.mode[live])
    assert (np.abs(fit.correlation.numpy() - want.correlation)[live] <= TOLERANCE["torch"]).all()
    moved = want.mode >= 0
    assert (np.abs(numbers(fit.ss) - want.ss)[moved] <= 2 * TOLERANCE["torch"] * want.ss[moved]).all()


def numbers(values: Tensor) -> NDArray[np.float64]:
    return values.double().numpy()
