"""Laws of the null model: what independent random walks give through the whole pipeline."""

from __future__ import annotations

import numpy as np
import pytest

from cmdgpu.errors import UsageError
from cmdgpu.notation import F64
from cmdgpu.null_model import NullCorrelation, random_walk_correlation


def walks(rows: int, snapshots: int, *, seed: int = 1, scale: float = 1e-3) -> F64:
    rng = np.random.default_rng(seed)
    return scale * np.cumsum(rng.standard_normal((rows, snapshots)), axis=1)


def null_of(
    sample_kt: F64, *, n_modes: int = 5, n_rows: int = 500, seed: int = 0, repeats: int = 3
) -> NullCorrelation:
    return random_walk_correlation(
        sample_kt, n_modes, None, "abs-corr", n_rows=n_rows, seed=seed, repeats=repeats
    )


# Measured once through the pipeline of the paper, independently of this code.
@pytest.mark.parametrize(("snapshots", "published"), [(20, 0.78), (100, 0.77)])
def test_walks_of_the_paper_s_sizes_give_the_known_figure(snapshots: int, published: float) -> None:
    null = random_walk_correlation(walks(1000, snapshots), 10, None, "abs-corr", n_rows=4000, repeats=3)
    assert null.mean == pytest.approx(published, abs=0.03)
    assert null.low <= null.mean <= null.high
    assert null.high - null.low < 0.03


def test_the_band_depends_on_the_seed_alone() -> None:
    sample = walks(60, 12)
    assert null_of(sample) == null_of(sample)
    assert null_of(sample) != null_of(sample, seed=1)


def test_the_scale_of_the_weights_is_irrelevant() -> None:
    sample = walks(60, 12)
    assert null_of(sample * 2.0**-30) == null_of(sample)


def test_walks_like_the_largest_rows_there_may_be_are_not_too_large_themselves() -> None:
    sample = walks(60, 12)
    squares = np.var(sample, axis=1) * sample.shape[1]
    # Beyond the range of float32 the pass calls a row non-finite and gives it no correlation.
    sample *= np.sqrt(0.999 * np.finfo(np.float32).max / squares.max())
    assert null_of(sample, n_rows=4000).mean == pytest.approx(
        null_of(walks(60, 12), n_rows=4000).mean, abs=1e-5
    )


def test_a_walk_that_moves_only_once_is_a_step_and_matches_every_other_step() -> None:
    sample = np.zeros((40, 15))
    sample[:, 6:] = np.arange(1, 41)[:, None]
    null = null_of(sample, n_modes=1)
    assert null.low == pytest.approx(1.0, abs=1e-5)


def test_movement_late_in_training_shapes_the_walks() -> None:
    even = walks(80, 40)
    bursts = np.cumsum(np.diff(even, axis=1, prepend=0) * np.r_[np.full(5, 100.0), np.ones(35)], axis=1)
    assert null_of(bursts).mean > null_of(even).mean + 0.03


def test_rows_that_carry_no_movement_leave_the_null_alone() -> None:
    sample = walks(60, 12)
    idle = np.full((7, 12), 3.25)
    broken = walks(2, 12)
    broken[0, 3], broken[1, 5] = np.nan, np.inf
    assert null_of(np.concatenate([idle, sample, broken])) == null_of(sample)


def test_more_modes_never_make_the_match_worse() -> None:
    sample = walks(200, 30)
    means = [null_of(sample, n_modes=modes, n_rows=2000).mean for modes in (1, 2, 5, 20)]
    assert means == sorted(means)


def test_a_threshold_decides_in_place_of_the_number_of_modes() -> None:
    sample = walks(100, 20)
    fine = random_walk_correlation(sample, None, 0.05, "abs-corr", n_rows=500, repeats=2)
    coarse = random_walk_correlation(sample, None, 0.9, "abs-corr", n_rows=500, repeats=2)
    assert fine.mean > coarse.mean


@pytest.mark.parametrize("sample", [np.ones((5, 8)), np.ones((5, 1)), np.full((5, 8), np.nan)])
def test_without_movement_there_is_no_null(sample: F64) -> None:
    with pytest.raises(UsageError, match=r"no row of the sample moves: 5 rows"):
        null_of(sample)
