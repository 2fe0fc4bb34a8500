"""Laws of ``gram_matrix``, for every implementation that runs here, against the definition in float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from cmdgpu_kernels import Gram, NoKernelError, gram_matrix_reference
from cmdgpu_kernels.gram import GRANULE, IMPLEMENTATIONS, triton_impl
from cmdgpu_kernels.gram.sums import LARGEST_SIZE
from numpy.typing import NDArray
from torch import Tensor

from tests.kernels.where import SUMMING, gram_matrix

F64 = NDArray[np.float64]
NAMES = list(SUMMING)
TOLERANCE = {i.name: i.tolerance for i in IMPLEMENTATIONS}


def walks(snapshots: int, rows: int, level: float = 1.0, seed: int = 0) -> Tensor:
    """W_tb of random walks whose mean is ``level`` times their movement."""
    rng = np.random.default_rng(seed)
    x = np.cumsum(rng.standard_normal((snapshots, rows)), axis=0)
    if snapshots > 1:
        x /= np.maximum(x.std(axis=0), 1e-9)
    return torch.tensor(x + level * rng.choice([-1.0, 1.0], rows), dtype=torch.float32)


def numbers(values: Tensor) -> F64:
    return values.double().numpy()


def check(W_tb: Tensor, got: Gram, tolerance: float) -> None:
    want = gram_matrix_reference(numbers(W_tb))
    scale = np.sqrt(np.outer(np.diag(want.G), np.diag(want.G)))
    assert (np.abs(got.G - want.G) <= tolerance * scale).all()
    assert (np.abs(got.q - want.q) <= tolerance * np.sqrt(want.sum_pp * np.diag(want.G))).all()
    assert abs(got.sum_pp - want.sum_pp) <= tolerance * want.sum_pp
    assert got.left_out == want.left_out
    assert np.array_equal(got.G, got.G.T) and not got.G[0].any() and got.q[0] == 0


def scales(rows: int) -> Tensor:
    """A factor for every row, so far apart from granule to granule that float64 rounds their sum."""
    return torch.tensor([1e4, 3e-4, 1.0, 7e-3])[torch.arange(rows) // GRANULE % 4]


def same(one: Gram, other: Gram) -> None:
    assert np.array_equal(one.G, other.G) and np.array_equal(one.q, other.q)
    assert (one.sum_pp, one.left_out) == (other.sum_pp, other.left_out)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("snapshots", [1, 2, 64, 65, 100, 128, 130, 200])
def test_any_number_of_snapshots_equals_the_definition(name: str, snapshots: int) -> None:
    W = walks(snapshots, 300, seed=snapshots)
    check(W, gram_matrix(W, implementation=name), TOLERANCE[name]["float32"])
    rows = W.T.contiguous()
    check(W, gram_matrix(rows, time_major=False, implementation=name), TOLERANCE[name]["float32"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("level", [0.0, 10.0, 100.0, 1000.0])
def test_a_mean_far_above_the_movement_costs_no_digit(name: str, level: float) -> None:
    W = walks(100, 700, level)
    got = gram_matrix(W, implementation=name)
    check(W, got, TOLERANCE[name]["float32"])
    # What PCA makes of it: rows centred, J G J with J = I - 11^T / T.
    centred = numbers(W) - numbers(W).mean(axis=0)
    J = np.eye(100) - 1 / 100
    want = centred @ centred.T
    assert np.abs(J @ got.G @ J - want).max() <= 3e-6 * np.abs(want).max()
    raw = got.G + got.q[:, None] + got.q[None, :] + got.sum_pp
    want = numbers(W) @ numbers(W).T
    assert np.abs(raw - want).max() <= 3e-6 * np.abs(want).max()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("time_major", [True, False])
def test_rounding_by_storage_is_no_error_of_ours(name: str, dtype: torch.dtype, time_major: bool) -> None:
    W = walks(50, 200, 3.0).to(dtype)
    block = W if time_major else W.T.contiguous()
    got = gram_matrix(block, time_major=time_major, implementation=name)
    check(W, got, TOLERANCE[name][str(dtype).removeprefix("torch.")])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("snapshots", [40, 150])
def test_a_row_that_is_not_finite_is_counted_and_spreads_nowhere(name: str, snapshots: int) -> None:
    W = walks(snapshots, 70)
    for row, (t, value) in enumerate([(3, np.nan), (0, np.inf), (snapshots - 1, -np.inf), (5, 1e19)]):
        W[t, 20 * row] = value
    with np.errstate(all="ignore"):  # the interpreter computes in NumPy, which warns of inf - inf
        got = gram_matrix(W, implementation=name)
    assert got.left_out == 4 and np.isfinite(got.G).all()
    check(W, got, TOLERANCE[name]["float32"])


@pytest.mark.parametrize("name", NAMES)
def test_blocks_cut_at_granules_and_added_give_the_bits_of_one_call(name: str) -> None:
    W = walks(5, 2 * GRANULE + 77) * scales(2 * GRANULE + 77)
    W[2, GRANULE + 5] = torch.nan
    with np.errstate(all="ignore"):
        whole = gram_matrix(W, implementation=name)
        granules = [
            gram_matrix(W[:, first : first + GRANULE], implementation=name)
            for first in range(0, W.shape[1], GRANULE)
        ]
    same(whole, granules[0] + granules[1] + granules[2])
    same(whole, granules[0] + (granules[1] + granules[2]))
    assert whole.left_out == 1
    check(W, whole, TOLERANCE[name]["float32"])


LARGEST = LARGEST_SIZE**0.5
ONE_VALUE = {"nan": np.nan, "inf": -np.inf, "1e34": 1e34, "3e38": 3e38, "too-large": 1.01 * LARGEST}


def _one(value: float) -> Callable[[Tensor], None]:
    def spoil(W_tb: Tensor) -> None:
        W_tb[2, 500] = value

    return spoil


def _large_trace(W_tb: Tensor) -> None:
    W_tb[:, 100:300] *= 0.1 * LARGEST


def _scaled(first: float, rest: float) -> Callable[[Tensor], None]:
    def spoil(W_tb: Tensor) -> None:
        W_tb[:, :128] *= first
        W_tb[:, 128:] *= rest

    return spoil


def _starts_still(W_tb: Tensor) -> None:
    W_tb[3, :128] = W_tb[0, :128]


# What float16 does not hold, or rows that may not count.
TO_BE_CAREFUL: dict[str, Callable[[Tensor], None]] = {
    **{name: _one(value) for name, value in ONE_VALUE.items()},
    "large-trace": _large_trace,
    "large-from-the-start": _scaled(0.3 * LARGEST, 0.3 * LARGEST),
    "tiny-then-large": _scaled(2.0**-30, 1.0),
    "starts-still": _starts_still,
}


def _still(W_tb: Tensor) -> None:
    W_tb[3] = W_tb[0]


def _zeros(W_tb: Tensor) -> None:
    W_tb[0] = 0.0


def _apart(W_tb: Tensor) -> None:
    W_tb[0] = 1e-14
    W_tb *= torch.tensor([1.0, 1e9, 1e-12, 1e3, 1e-6])[:, None]


def _repeated(W_tb: Tensor) -> None:
    W_tb[:] = W_tb[:, :1].clone()


TO_BE_FAST: dict[str, Callable[[Tensor], None]] = {
    "large-then-tiny": _scaled(1.0, 2.0**-30),
    "still": _still,
    "zeros": _zeros,
    "apart": _apart,
    "repeated": _repeated,
    "1e16": _scaled(1e13, 1e13),
    "1e-15": _scaled(1e-15, 1e-15),
}


@pytest.fixture
def careful(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The granules that Triton computed with care, in turn."""
    found: list[int] = []
    multiply = triton_impl._multiply_carefully  # pyright: ignore[reportPrivateUsage]

    def recorded(W_tb: Tensor, launch: triton_impl.GramLaunch, S_gtt: Tensor, which_k: Tensor) -> int:
        found.extend(int(granule) for granule in which_k)
        return multiply(W_tb, launch, S_gtt, which_k)

    monkeypatch.setattr(triton_impl, "_multiply_carefully", recorded)
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("snapshots", [5, 130])
@pytest.mark.parametrize("case", TO_BE_CAREFUL)
def test_rows_that_a_fast_product_does_not_hold_are_multiplied_with_care(
    name: str, snapshots: int, case: str, careful: list[int]
) -> None:
    # The interpreter is slow: several tiles are seen on one granule that is not full.
    rows, spoilt = (2 * GRANULE + 40, slice(GRANULE, 2 * GRANULE)) if snapshots == 5 else (700, slice(None))
    W = walks(snapshots, rows)
    TO_BE_CAREFUL[case](W[:, spoilt])
    with np.errstate(all="ignore"):
        got = gram_matrix(W, implementation=name)
    check(W, got, TOLERANCE[name]["float32"])
    if name.startswith("triton"):
        assert careful == [1 if snapshots == 5 else 0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", TO_BE_FAST)
def test_rows_that_a_fast_product_holds_are_multiplied_fast(name: str, case: str, careful: list[int]) -> None:
    # No more rows: what float32 loses of thousands of equal ones is no matter of the product.
    W = walks(5, 500)
    TO_BE_FAST[case](W)
    check(W, gram_matrix(W, implementation=name), TOLERANCE[name]["float32"])
    assert careful == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("value", "found"), [(1.0, [0]), (1.5, [])])
def test_so_few_squares_that_float16_may_not_resolve_them_are_computed_with_care(
    name: str, value: float, found: list[int], careful: list[int]
) -> None:
    W = torch.tensor([[value], [value * 2]])
    check(W, gram_matrix(W, implementation=name), TOLERANCE[name]["float32"])
    assert careful == (found if name.startswith("triton") else [])


@pytest.mark.parametrize("name", NAMES)
def test_care_for_some_granules_leaves_the_bits_of_every_cut(name: str) -> None:
    W = walks(4, 2 * GRANULE + 900) * scales(2 * GRANULE + 900)
    TO_BE_CAREFUL["tiny-then-large"](W[:, GRANULE : 2 * GRANULE])
    W[2, 2 * GRANULE + 7] = torch.nan
    with np.errstate(all="ignore"):
        whole = gram_matrix(W, implementation=name)
        for cuts in ([0, 1, 2, 3], [0, 2, 3], [0, 1, 3]):
            ends = [min(cut * GRANULE, W.shape[1]) for cut in cuts]
            first, *others = [gram_matrix(W[:, a:b], implementation=name) for a, b in pairwise(ends)]
            same(whole, sum(others, first))
    check(W, whole, TOLERANCE[name]["float32"])
    assert whole.left_out == 1


def test_no_number_of_threads_changes_a_bit() -> None:
    W = walks(30, 9 * GRANULE + 5) * scales(9 * GRANULE + 5)
    one = gram_matrix(W, implementation="torch", threads=1)
    for threads in (2, 3):
        same(one, gram_matrix(W, implementation="torch", threads=threads))
    cuts = [0, 2 * GRANULE, 3 * GRANULE, 8 * GRANULE, W.shape[1]]
    first, *others = [gram_matrix(W[:, a:b], implementation="torch") for a, b in pairwise(cuts)]
    same(one, sum(others, first))


def test_what_no_kernel_takes_is_refused_with_every_reason() -> None:
    with pytest.raises(NoKernelError, match="float64"):
        gram_matrix(torch.zeros(3, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="named 'abacus'"):
        gram_matrix(torch.zeros(3, 4), implementation="abacus")
    with pytest.raises(ValueError, match="no snapshots"):
        gram_matrix(torch.zeros(0, 4))
    assert gram_matrix(torch.zeros(3, 0)).G.shape == (3, 3)
