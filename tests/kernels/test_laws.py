"""Laws of ``assign_and_fit``, for every implementation that runs here, against the definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cmdgpu_kernels import (
    IMPLEMENTATIONS,
    NoKernelError,
    Problem,
    ReferenceFit,
    RowFit,
    assign_and_fit_reference,
    choose,
    prepare_references,
)
from cmdgpu_kernels.assignment.torch_impl import TILE
from numpy.typing import NDArray
from torch import Tensor

from tests.kernels.where import FITTING, assign_and_fit

F64 = NDArray[np.float64]
NAMES = list(FITTING)
COMPILED = [name for name in NAMES if name != "triton-interpreted"]
ON_CPU = [name for name in COMPILED if FITTING[name] == "cpu"]
TOLERANCE = {i.name: i.tolerance for i in IMPLEMENTATIONS}
EPS32 = float(np.finfo(np.float32).eps)


def walks(snapshots: int, rows: int, modes: int, level: float = 1.0, seed: int = 0) -> tuple[Tensor, F64]:
    """W_tb of random walks whose mean is ``level`` times their movement, and R_mt of walks."""
    rng = np.random.default_rng(seed)
    x = np.cumsum(rng.standard_normal((snapshots, rows)), axis=0)
    if snapshots > 1:
        x /= np.maximum(x.std(axis=0), 1e-9)
    W = torch.tensor(x + level * rng.choice([-1.0, 1.0], rows), dtype=torch.float32)
    return W, np.cumsum(rng.standard_normal((modes, snapshots)), axis=1)


def numbers(values: Tensor) -> F64:
    return values.double().numpy()


def check(W_tb: Tensor, R_mt: F64, fit: RowFit, tolerance: float) -> ReferenceFit:
    """The rules by which a fit equals the definition."""
    want = assign_and_fit_reference(numbers(W_tb), R_mt)
    mode = fit.mode.numpy()
    assert np.array_equal(mode < 0, want.mode < 0) and np.array_equal(
        mode[mode < 0], want.mode[want.mode < 0]
    )
    sure = (want.margin > 1e-5) | (want.mode < 0)
    assert np.array_equal(mode[sure], want.mode[sure])
    live = mode >= 0
    if not live.any():
        return want
    w_tb, mode = numbers(W_tb)[:, live], mode[live]
    a, b, c = numbers(fit.a)[live], numbers(fit.b)[live], numbers(fit.correlation)[live]
    r = R_mt - R_mt.mean(axis=1, keepdims=True)
    x = w_tb - w_tb[0]
    mean = w_tb[0] + x.mean(axis=0)
    x = x - x.mean(axis=0)
    norm = np.sqrt((x**2).sum(axis=0))
    rnorm = np.sqrt((r**2).sum(axis=1))[mode]
    dot = (r[mode].T * x).sum(axis=0)
    assert np.abs(c - dot / rnorm / norm).max() <= tolerance
    assert (np.abs(a - dot / rnorm**2) * rnorm <= tolerance * norm).all()
    carried = np.abs(a * R_mt.mean(axis=1)[mode])
    allowed = 8 * EPS32 * (np.abs(mean) + carried + norm / np.sqrt(len(w_tb)))
    assert (np.abs(b + a * R_mt.mean(axis=1)[mode] - mean) <= allowed).all()
    ss = numbers(fit.ss)[live]
    assert (np.abs(ss - norm**2) <= 2 * tolerance * norm**2).all()
    return want


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("snapshots", [2, 3, 7, 8, 9, 63, 64, 65, 100, 128, 200])
@pytest.mark.parametrize("modes", [1, 5])
def test_any_number_of_snapshots_equals_the_definition(name: str, snapshots: int, modes: int) -> None:
    W, R = walks(snapshots, 67, modes, seed=snapshots)
    check(W, R, assign_and_fit(W, R, implementation=name), TOLERANCE[name]["float32"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("level", [0.0, 1e2, 1e3, 1e4, 1e6])
def test_drift_far_below_the_mean_costs_no_digit(name: str, level: float) -> None:
    W, R = walks(100, 300, 5, level, seed=3)
    check(W, R, assign_and_fit(W, R, implementation=name), TOLERANCE[name]["float32"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("start", [30.0, 500.0, 5000.0])
def test_ten_thousand_snapshots_of_rows_that_settle_far_from_their_start(name: str, start: float) -> None:
    rng = np.random.default_rng(1)
    t = np.arange(10_000)[:, None]
    W = torch.tensor(
        start * np.exp(-t / rng.uniform(20, 60, 40)) + 0.1 * np.cumsum(rng.standard_normal((10_000, 40)), 0),
        dtype=torch.float32,
    )
    R = np.cumsum(rng.standard_normal((3, 10_000)), axis=1)
    check(W, R, assign_and_fit(W, R, implementation=name), 1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_by_storage_is_no_error_of_ours(name: str, dtype: torch.dtype) -> None:
    exact, R = walks(100, 1500, 4, 3.0)
    W = exact.to(dtype)
    tolerance = TOLERANCE[name][str(dtype).removeprefix("torch.")]
    check(W, R, assign_and_fit(W, R, implementation=name), tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_both_layouts_and_any_padding_give_the_same_bits(name: str) -> None:
    W, R = walks(70, 600, 3)
    row_major = W.T.contiguous()
    if name.startswith("triton"):
        # Each layout has a kernel of its own, and within it bits of its own.
        rows_padded = torch.full((600, 91), 7.0)[:, :70].copy_(W.T)
        blocks = [(True, W), (True, padded_columns(W)), (False, row_major), (False, rows_padded)]
    else:
        blocks = [(True, W), (True, padded_columns(W)), (False, row_major), (False, W[:, ::1].T)]
    fits = [
        assign_and_fit(block, R, time_major=time_major, implementation=name, margin=True)
        for time_major, block in blocks
    ]
    same(fits[0], fits[1], 600)
    same(fits[2], fits[3], 600)
    if name.startswith("triton"):
        check(W, R, fits[2], TOLERANCE[name]["float32"])
    else:
        same(fits[0], fits[2], 600)


def padded_columns(W_tb: Tensor) -> Tensor:
    return torch.full((len(W_tb), W_tb.shape[1] + 160), 7.0)[:, : W_tb.shape[1]].copy_(W_tb)


def same(one: RowFit, other: RowFit, rows: int) -> None:
    for field in ("mode", "a", "b", "correlation", "ss", "margin"):
        left, right = getattr(one, field), getattr(other, field)
        if left is not None:
            assert np.array_equal(left[:rows].numpy(), right.numpy(), equal_nan=True), field


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("rows", [1, 3, 7, 31, 256, 1000, 20_000])
def test_a_row_has_the_same_bits_in_a_block_of_any_size(name: str, rows: int) -> None:
    W, R = walks(40, 20_000, 6)
    whole = assign_and_fit(W, R, implementation=name, margin=True)
    same(whole, assign_and_fit(W[:, :rows], R, implementation=name, margin=True), rows)


@pytest.mark.parametrize("rows", [1, 3, 31, 513])
def test_an_interpreted_row_has_the_same_bits_in_a_block_of_any_size(rows: int) -> None:
    W, R = walks(40, 1100, 6)
    name = "triton-interpreted" if "triton-interpreted" in NAMES else NAMES[0]
    whole = assign_and_fit(W, R, implementation=name, margin=True)
    same(whole, assign_and_fit(W[:, :rows], R, implementation=name, margin=True), rows)


@pytest.mark.parametrize("name", COMPILED)
def test_blocks_cut_at_tiles_give_the_bits_of_the_whole(name: str) -> None:
    W, R = walks(20, 2 * TILE + 77, 4)
    whole = assign_and_fit(W, R, implementation=name)
    for start, stop in ((0, TILE), (TILE, 2 * TILE), (2 * TILE, 2 * TILE + 77), (TILE, 2 * TILE + 77)):
        part = assign_and_fit(W[:, start:stop], R, implementation=name)
        for field in ("mode", "a", "b", "correlation", "ss"):
            assert torch.equal(getattr(whole, field)[start:stop], getattr(part, field)), field


@pytest.mark.parametrize("name", ON_CPU)
def test_no_number_of_threads_changes_a_bit_or_the_callers_threads(name: str) -> None:
    W, R = walks(100, 3 * TILE + 5, 10)
    before = torch.get_num_threads()
    one = assign_and_fit(W, R, implementation=name, threads=1)
    for threads in (2, 3):
        other = assign_and_fit(W, R, implementation=name, threads=threads)
        same(one, other, W.shape[1])
        assert torch.get_num_threads() == before
    torch.set_num_threads(1)
    same(one, assign_and_fit(W, R, implementation=name), W.shape[1])
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_a_users_faster_products_are_neither_used_nor_lost(precision: str) -> None:
    W, R = walks(100, 500, 10)
    plain = assign_and_fit(W, R, implementation="torch")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        same(plain, assign_and_fit(W, R, implementation="torch"), 500)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


# ---- what the numbers mean ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_twice_the_reference_plus_three(name: str) -> None:
    _, R = walks(50, 1, 2)
    W = torch.tensor(np.stack([2 * R[0] + 3, -0.5 * R[1], R[1]], axis=1), dtype=torch.float32)
    fit = assign_and_fit(W, R, implementation=name)
    assert fit.mode.numpy().tolist() == [0, 1, 1]
    assert np.allclose(numbers(fit.a), [2, -0.5, 1], atol=2e-6)
    assert np.allclose(numbers(fit.b), [3, 0, 0], atol=2e-5)
    assert np.allclose(numbers(fit.correlation), [1, -1, 1], atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_the_label_is_the_reference_with_the_smallest_squared_error(name: str) -> None:
    W, R = walks(30, 200, 6)
    fit = assign_and_fit(W, R, implementation=name)
    errors = np.empty((6, 200))
    lines = np.empty((6, 2, 200))
    for m in range(6):
        design = np.stack([R[m], np.ones(30)], axis=1)
        lines[m], errors[m], _, _ = np.linalg.lstsq(design, numbers(W), rcond=None)
    assert np.array_equal(fit.mode.numpy(), errors.argmin(axis=0))
    best = lines[fit.mode.numpy(), :, np.arange(200)]
    assert np.allclose(numbers(fit.a), best[:, 0], rtol=1e-4, atol=1e-6)
    assert np.allclose(numbers(fit.b), best[:, 1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_scaling_and_shifting_a_row_scales_and_shifts_its_line(name: str) -> None:
    W, R = walks(64, 100, 4)
    one = assign_and_fit(W, R, implementation=name)
    two = assign_and_fit(-4 * W + 8, R, implementation=name)  # exact in float32 but for the shift
    assert torch.equal(one.mode, two.mode)
    assert np.allclose(numbers(two.a), -4 * numbers(one.a), rtol=1e-5)
    assert np.allclose(numbers(two.b), -4 * numbers(one.b) + 8, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_snapshots_means_nothing(name: str) -> None:
    W, R = walks(90, 100, 4)
    order = np.random.default_rng(0).permutation(90)
    one = assign_and_fit(W, R, implementation=name)
    two = assign_and_fit(W[torch.tensor(order)], R[:, order], implementation=name)
    assert np.allclose(numbers(one.correlation), numbers(two.correlation), atol=1e-5)
    assert np.allclose(numbers(one.a), numbers(two.a), rtol=1e-4, atol=1e-6)


# ---- ties and degenerate rows -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_equal_and_negated_references_give_the_lowest_index(name: str) -> None:
    W, R = walks(37, 64, 1)
    same_ten = np.repeat(R, 10, axis=0) * np.where(np.arange(10) % 2, -1.0, 1.0)[:, None]
    fit = assign_and_fit(W, same_ten, implementation=name)
    assert (fit.mode == 0).all()
    check(W, R, fit, TOLERANCE[name]["float32"])


@pytest.mark.parametrize("name", NAMES)
def test_a_row_halfway_between_two_references_takes_the_lower(name: str) -> None:
    R = np.array([[0, 0, 0, 0, 1.0, -1.0], [1.0, -1.0, 0, 0, 0, 0], [0, 0, 1.0, -1.0, 0, 0]])
    W = torch.tensor([[2.0, -2.0, 2.0, -2.0, 0, 0], [3.0, -3.0, -3.0, 3.0, 1, -1]]).T
    assert assign_and_fit(W, R, implementation=name).mode.numpy().tolist() == [1, 1]


def test_only_the_first_of_equal_and_negated_references_can_win() -> None:
    _, R = walks(37, 1, 3)
    copies = np.stack([R[0], -R[0], R[1], R[0] * 4 + 1, R[2], -R[1]])
    assert prepare_references(copies).distinct.tolist() == [0, 2, 4]


@pytest.mark.parametrize("name", NAMES)
def test_a_later_copy_does_not_shift_the_numbers_of_the_others(name: str) -> None:
    W, R = walks(37, 300, 3)
    fit = assign_and_fit(W, R[[0, 0, 1, 2, 1]], implementation=name)
    want = np.array([0, 2, 3])[assign_and_fit_reference(numbers(W), R).mode]
    sure = assign_and_fit_reference(numbers(W), R).margin > 1e-5
    assert np.array_equal(fit.mode.numpy()[sure], want[sure])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("snapshots", [3, 12, 70])
def test_degenerate_rows_have_their_defined_results(name: str, snapshots: int) -> None:
    W, R = walks(snapshots, 12, 2)
    W[:, 0] = 0.1
    W[:, 1] = 1e8
    W[:, 2] = 0.0
    W[1, 3] = torch.nan
    W[-1, 4] = torch.inf
    W[0, 5] = -torch.inf
    W[:, 6] = torch.tensor(np.linspace(-2e19, 2e19, snapshots), dtype=torch.float32)
    W[:, 7] = 1e-30 * torch.arange(snapshots)
    W[:, 8] = -0.0
    with np.errstate(all="ignore"):  # the interpreter computes in NumPy, which warns of inf - inf
        fit = assign_and_fit(W, R, implementation=name, margin=True)
    assert fit.mode.numpy().tolist()[:9] == [-1, -1, -1, -2, -2, -2, -2, -1, -1]
    assert fit.a.numpy().tolist()[:9] == [0.0] * 9
    assert fit.correlation.numpy().tolist()[:9] == [0.0] * 9
    exact = torch.tensor([0.1, 1e8, 0.0])
    assert torch.equal(fit.b[:3], exact) and fit.b[8] == 0
    assert torch.isnan(fit.b[3:7]).all() and torch.isnan(fit.ss[3:7]).all()
    assert fit.ss.numpy().tolist()[:3] == [0.0] * 3 and fit.ss[7] == 0
    assert (fit.mode[9:] >= 0).all() and torch.isfinite(fit.correlation[9:]).all()
    check(W[:, 9:], R, assign_and_fit(W[:, 9:], R, implementation=name), TOLERANCE[name]["float32"])


@pytest.mark.parametrize("name", NAMES)
def test_two_snapshots_put_every_moving_row_in_mode_zero(name: str) -> None:
    W, R = walks(2, 50, 4)
    W[:, 7] = 5.0
    fit = assign_and_fit(W, R, implementation=name)
    moving = torch.arange(50) != 7
    assert (fit.mode[moving] == 0).all() and fit.mode[7] == -1
    assert (fit.correlation[moving].abs() == 1).all()
    rebuilt = numbers(fit.a) * R[0][:, None] + numbers(fit.b)
    assert np.allclose(rebuilt, numbers(W), atol=1e-5)


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("snapshots", [1, 2, 40])
def test_without_references_every_finite_row_is_its_mean(name: str, snapshots: int) -> None:
    W, _ = walks(snapshots, 20, 1)
    W[0, 3] = torch.nan
    fit = assign_and_fit(W, np.empty((0, snapshots)), implementation=name, margin=True)
    assert fit.mode.numpy().tolist() == [-2 if i == 3 else -1 for i in range(20)]
    keep = np.arange(20) != 3
    assert np.allclose(numbers(fit.b)[keep], numbers(W).mean(axis=0)[keep], atol=1e-6)
    assert (fit.a == 0).all() and (fit.correlation == 0).all() and torch.isnan(fit.b[3])
    x = numbers(W)[:, keep] - numbers(W)[:, keep].mean(axis=0)
    assert np.allclose(numbers(fit.ss)[keep], np.square(x).sum(axis=0), rtol=1e-5, atol=1e-12)
    assert fit.margin is not None and (fit.margin == 0).all()


@pytest.mark.parametrize("name", COMPILED)
def test_three_hundred_modes_keep_their_numbers(name: str) -> None:
    _, R = walks(60, 1, 300)
    fit = assign_and_fit(torch.tensor(R.T, dtype=torch.float32), R, implementation=name)
    assert fit.mode.numpy().tolist() == list(range(300))
    assert np.allclose(numbers(fit.a), 1, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_margins_say_how_safe_a_label_is(name: str) -> None:
    W, R = walks(30, 100, 4)
    want = assign_and_fit_reference(numbers(W), R)
    fit = assign_and_fit(W, R, implementation=name, margin=True)
    assert fit.margin is not None
    assert np.allclose(numbers(fit.margin), want.margin, atol=1e-5)


# ---- tiles: more references than one thread multiplies by -------------------------------------------------

TILED = [name for name in NAMES if name.startswith("triton")]


@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize("time_major", [True, False], ids=["time-major", "row-major"])
@pytest.mark.parametrize("modes", [17, 33, 64, 65, 100])
def test_tiles_of_any_number_of_references_equal_the_definition(
    name: str, time_major: bool, modes: int
) -> None:
    W, R = walks(100, 70, modes, level=100.0, seed=modes)
    block = W if time_major else W.T.contiguous()
    fit = assign_and_fit(block, R, time_major=time_major, implementation=name, margin=True)
    want = check(W, R, fit, TOLERANCE[name]["float32"])
    assert fit.margin is not None and np.abs(numbers(fit.margin) - want.margin).max() <= 1e-5
    assert len(np.unique(fit.mode.numpy())) > modes // 8


@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize("snapshots", [2, 3, 63, 64, 65, 128, 200])
@pytest.mark.parametrize("modes", [1, 20])
def test_tiles_of_any_number_of_snapshots_equal_the_definition(name: str, snapshots: int, modes: int) -> None:
    W, R = walks(snapshots, 20, modes, seed=snapshots)
    fit = assign_and_fit(W.T.contiguous(), R, time_major=False, implementation=name)
    check(W, R, fit, TOLERANCE[name]["float32"])


@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize("level", [0.0, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tiles_hold_their_digits_at_any_mean_and_in_any_storage(
    name: str, level: float, dtype: torch.dtype
) -> None:
    exact, R = walks(100, 60, 40, min(level, 1e4) if dtype == torch.float16 else level, seed=4)
    W = exact.to(dtype)
    # The rows that 16 bits cannot tell from their mean move in a step or two: they are fitted like any other.
    for block, time_major in ((W, True), (W.T.contiguous(), False)):
        fit = assign_and_fit(block, R, time_major=time_major, implementation=name)
        check(W, R, fit, TOLERANCE[name][str(dtype).removeprefix("torch.")])


@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize("start", [30.0, 5000.0])
def test_tiles_follow_rows_that_settle_far_from_their_start(name: str, start: float) -> None:
    rng = np.random.default_rng(1)
    t = np.arange(10_000)[:, None]
    W = torch.tensor(
        start * np.exp(-t / rng.uniform(20, 60, 20)) + 0.1 * np.cumsum(rng.standard_normal((10_000, 20)), 0),
        dtype=torch.float32,
    )
    R = np.cumsum(rng.standard_normal((40, 10_000)), axis=1)
    check(W, R, assign_and_fit(W, R, implementation=name), TOLERANCE[name]["float32"])


@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize("time_major", [True, False], ids=["time-major", "row-major"])
def test_a_row_on_tiles_has_the_same_bits_in_any_block_and_at_any_place(name: str, time_major: bool) -> None:
    """Neighbours that are not finite, blocks that end within a tile or begin off 16 bytes, padded rows."""
    W, R = walks(40, 150, 40)
    W[3, 70] = torch.nan
    W[5, 90] = torch.inf

    def fit(part: Tensor) -> RowFit:
        block = part if time_major else part.T
        with np.errstate(all="ignore"):  # the interpreter computes in NumPy, which warns of inf - inf
            return assign_and_fit(block, R, time_major=time_major, implementation=name, margin=True)

    block_tb = W if time_major else W.T.contiguous().T
    whole = fit(block_tb)
    for rows in (1, 65):
        same(whole, fit(block_tb[:, :rows]), rows)
    for first in (1, 64, 101):
        part = fit(block_tb[:, first:])
        for field in ("mode", "a", "b", "correlation", "ss", "margin"):
            left, right = getattr(whole, field)[first:], getattr(part, field)
            assert np.array_equal(left.numpy(), right.numpy(), equal_nan=True), (first, field)


@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize("snapshots", [12, 70])
def test_degenerate_rows_on_tiles_have_their_defined_results(name: str, snapshots: int) -> None:
    W, R = walks(snapshots, 12, 40)
    W[:, 0] = 0.1
    W[:, 1] = 1e8
    W[:, 2] = 0.0
    W[1, 3] = torch.nan
    W[-1, 4] = torch.inf
    W[0, 5] = -torch.inf
    W[:, 6] = torch.tensor(np.linspace(-2e19, 2e19, snapshots), dtype=torch.float32)
    W[:, 7] = 1e-30 * torch.arange(snapshots)
    with np.errstate(all="ignore"):
        fit = assign_and_fit(W, R, implementation=name, margin=True)
    assert fit.mode.numpy().tolist()[:8] == [-1, -1, -1, -2, -2, -2, -2, -1]
    assert fit.a.numpy().tolist()[:8] == fit.correlation.numpy().tolist()[:8] == [0.0] * 8
    assert torch.equal(fit.b[:3], torch.tensor([0.1, 1e8, 0.0]))
    assert (fit.b[3:7].view(torch.int32) == 0x7FC00000).all() and torch.isnan(fit.ss[3:7]).all()
    check(W[:, 8:], R, assign_and_fit(W[:, 8:], R, implementation=name), TOLERANCE[name]["float32"])


@pytest.mark.parametrize("name", TILED)
def test_tiles_give_a_tie_to_the_lower_reference_within_a_sweep_and_across(name: str) -> None:
    """Reference k moves at snapshots 2k and 2k + 1 only, so every product is exact."""
    R = np.kron(np.eye(70), [[1.0, -1.0]])
    pairs = [(3, 9), (9, 3), (3, 69), (40, 69)]
    W = torch.tensor(np.stack([2.0 * R[i] - 2.0 * R[j] for i, j in pairs], axis=1), dtype=torch.float32)
    fit = assign_and_fit(W, R, implementation=name, margin=True)
    assert fit.mode.numpy().tolist() == [min(pair) for pair in pairs]
    assert fit.margin is not None and (fit.margin == 0).all()


# ---- refusals ---------------------------------------------------------------------------------------------


def test_what_no_kernel_takes_is_refused_with_every_reason() -> None:
    W, R = walks(10, 5, 2)
    with pytest.raises(NoKernelError) as refused:
        assign_and_fit(W.double(), R)
    text = str(refused.value)
    assert "float64" in text
    for implementation in IMPLEMENTATIONS:
        assert f"{implementation.name}:" in text


def test_the_choice_names_the_reasons_of_who_came_before() -> None:
    chosen, refused = choose(Problem("float32", 100, 10, "cpu"))
    assert chosen.name == ON_CPU[0] and set(refused) == {i.name for i in IMPLEMENTATIONS[: len(refused)]}
    assert any("CUDA" in reason for reason in refused["triton"])
    with pytest.raises(NoKernelError, match="no reference"):
        assign_and_fit(walks(30, 5, 1)[0], np.empty((0, 30)), implementation="triton-interpreted")


@pytest.mark.parametrize(
    ("R", "says"),
    [
        (np.array([[1.0, 2.0, 4.0], [3.0, 3.0, 3.0]]), "reference 1 is constant"),
        (np.array([[1.0, np.nan, 4.0]]), "reference 0 holds NaN"),
        (np.zeros(4), r"\(M, T\)"),
    ],
)
def test_references_that_no_row_can_follow_are_named(R: F64, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        prepare_references(R)


def test_blocks_and_references_that_disagree_show_both_shapes() -> None:
    W, _ = walks(10, 5, 2)
    _, R = walks(11, 5, 2)
    with pytest.raises(ValueError, match=r"10 snapshots.*\(10, 5\).*11.*\(2, 11\)"):
        assign_and_fit(W, R)
    assert len(assign_and_fit(W[:, :0], walks(10, 5, 2)[1]).mode) == 0
