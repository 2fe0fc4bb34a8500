"""Laws of the null models: what rows that share nothing give through the whole pipeline."""

from __future__ import annotations

import numpy as np
import pytest
from cmdgpu_kernels.assignment.reference import assign_and_fit_reference

from cmdgpu.errors import UsageError
from cmdgpu.miniature import Rule, follow, references_of
from cmdgpu.notation import F64
from cmdgpu.null_model import (
    NULL_MODELS,
    NullCorrelation,
    look,
    null_views,
    phase_shuffled,
    random_walk_correlation,
    random_walks,
    signed_steps,
    step_scale,
)


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


# ---- rows that share nothing ------------------------------------------------------------------------------


def rng_of(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def step_correlation(rows_nt: F64, lag: int) -> float:
    """Mean over rows and t of x(t) x(t + lag), x the steps."""
    steps = np.diff(rows_nt, axis=1)
    return float(np.mean(steps[:, : steps.shape[1] - lag] * steps[:, lag:]))


@pytest.mark.parametrize("name", list(NULL_MODELS))
def test_rows_of_a_null_model_share_nothing(name: str) -> None:
    """Whatever the rows shared: here all are one row, and then none resembles its neighbour."""
    row = walks(1, 40)
    rows = np.repeat(row, 400, axis=0)
    made = NULL_MODELS[name](rng_of(), rows, step_scale(row))
    assert made.shape == rows.shape and (made[:, 0] == 0).all()
    steps = np.diff(made, axis=1)
    steps -= steps.mean(axis=0)
    unit: F64 = steps / np.linalg.norm(steps, axis=1, keepdims=True)
    neighbours: F64 = np.einsum("nt,nt->n", unit[:-1], unit[1:])
    assert abs(float(np.mean(neighbours))) < 0.05
    assert np.array_equal(made, NULL_MODELS[name](rng_of(), rows, step_scale(row))), "the seed fixes them"


def test_walks_have_the_step_sizes_of_the_sample() -> None:
    scale = np.array([1.0, 0.5, 0.0, 0.25])
    made = random_walks(rng_of(), np.empty((20_000, 5)), scale)
    assert np.sqrt((np.diff(made, axis=1) ** 2).mean(axis=0)) == pytest.approx(scale, rel=0.02)


def test_signed_steps_are_the_steps_of_the_row_itself() -> None:
    rows = walks(50, 15)
    made = np.diff(signed_steps(rng_of(), rows, step_scale(rows)), axis=1)
    steps = np.diff(rows, axis=1)
    assert np.allclose(np.abs(made), np.abs(steps), atol=1e-15)
    assert 0.4 < np.count_nonzero(np.sign(made) != np.sign(steps)) / steps.size < 0.6


@pytest.mark.parametrize("n_snapshots", [7, 30, 31])
def test_shuffled_phases_keep_how_long_movement_persists(n_snapshots: int) -> None:
    steps = rng_of().standard_normal((6000, n_snapshots - 1))
    for t in range(1, n_snapshots - 1):
        steps[:, t] += 0.8 * steps[:, t - 1]
    rows = np.concatenate([np.zeros((6000, 1)), np.cumsum(steps, axis=1)], axis=1)
    made = phase_shuffled(rng_of(1), rows, np.ones(n_snapshots - 1))
    size = step_correlation(rows, 0)
    assert step_correlation(made, 0) == pytest.approx(size, rel=0.05)
    assert step_correlation(made, 1) == pytest.approx(step_correlation(rows, 1), abs=0.2 * size)
    assert step_correlation(made, 1) > 0.5 * size, "walks of signed steps have none of it"


def test_shuffled_phases_keep_a_drift_and_the_slowing_down_of_all() -> None:
    """A row that moves at the common pace has one component, the constant, and comes back as it was."""
    scale = np.array([1.0, 0.5, 0.25, 0.125, 0.0, 0.5])
    rows = np.concatenate([[0.0], np.cumsum(scale)]) * np.array([[2.0], [-3.0]])
    assert phase_shuffled(rng_of(), rows, scale) == pytest.approx(rows, abs=1e-12)
    moving = walks(300, 7)
    assert (np.diff(phase_shuffled(rng_of(), moving, scale), axis=1)[:, 4] == 0).all()


# ---- the pipeline in memory -------------------------------------------------------------------------------


def test_following_is_the_definition_of_the_pass() -> None:
    rows, R_mt = walks(300, 14) + 5.0, walks(6, 14, seed=2)
    rows[7] = 5.0
    found, expected = follow(rows, R_mt), assign_and_fit_reference(rows, R_mt, time_major=False)
    moving = np.arange(300) != 7
    assert np.array_equal(found.mode[moving], expected.mode[moving])
    for name in ("a", "b", "correlation"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-12)
    assert found.energy == pytest.approx(expected.ss, rel=1e-9, abs=1e-15)
    direct = ((rows - found.a[:, None] * R_mt[found.mode] - found.b[:, None]) ** 2).sum(axis=1)
    assert found.residual == pytest.approx(direct, abs=1e-15)


def test_without_references_every_row_is_its_mean() -> None:
    rows = walks(20, 9)
    found = follow(rows, np.empty((0, 9)))
    assert (found.correlation == 0).all() and (found.a == 0).all()
    assert found.b == pytest.approx(rows.mean(axis=1))


def test_references_of_some_snapshots_are_given_at_all_of_them() -> None:
    sample, kept = walks(60, 20), np.arange(20) % 3 != 1
    rows = references_of(sample, Rule(4, None, "abs-corr"), None, kept)
    assert all(any(np.array_equal(r, w) for w in sample) for r in rows)
    # where the rows of a mode are images of one curve, so is their component, at every snapshot
    curve = walks(1, 20)[0]
    images: F64 = np.linspace(1, 3, 30)[:, None] * curve + np.linspace(-5, 5, 30)[:, None]
    for rule in (Rule(1, None, "abs-corr", "component"), Rule(1, None, "abs-corr", refine=2)):
        (profile,) = references_of(images, rule, images, kept)
        assert abs(np.corrcoef(profile, curve)[0, 1]) == pytest.approx(1, abs=1e-6)


def test_references_are_refined_by_all_rows_and_not_by_the_sample_alone() -> None:
    rows, rule = walks(400, 12), Rule(3, None, "abs-corr", refine=3)
    alone, together = references_of(rows[:50], rule), references_of(rows[:50], rule, rows[50:])
    reached = [float(np.mean(follow(rows, R_mt).correlation ** 2)) for R_mt in (alone, together)]
    assert reached[1] > reached[0] + 0.01


def test_increments_are_looked_at_in_two_ways() -> None:
    """Walks: 0.19 when increments find references of their own at T = 100 and M = 10, next to nothing with
    those of the levels.
    """
    rows = walks(3000, 100)
    seen = look(rows[:1000], rows[1000:], Rule(10, None, "abs-corr"))
    assert seen.levels == pytest.approx(0.77, abs=0.03)
    assert seen.increments == pytest.approx(0.19, abs=0.01)
    assert seen.increment_correlation == pytest.approx(0.04, abs=0.02)


@pytest.mark.parametrize("name", list(NULL_MODELS))
def test_the_null_models_give_of_walks_what_walks_give(name: str) -> None:
    rows, rule = walks(1000, 50), Rule(5, None, "abs-corr")
    real = look(rows[:300], rows[300:], rule)
    views = null_views(name, rows[:300], rows[300:], rule, seed=4, repeats=3)
    assert len(views) == 3 and views[0] != views[1]
    # phases are shuffled with a mirror image, which lengthens movement
    more = 0.02 if name == "phase-shuffled" else 0.0
    levels = NullCorrelation.of([v.levels for v in views]).mean
    assert levels == pytest.approx(real.levels + more, abs=0.03)
    assert NullCorrelation.of([v.increments for v in views]).mean == pytest.approx(real.increments, abs=0.02)
    assert views == null_views(name, rows[:300], rows[300:], rule, seed=4, repeats=3)
    # of a sample that judges itself, too
    alone = NullCorrelation.of([v.levels for v in null_views(name, rows[:300], None, rule, repeats=3)]).mean
    assert alone == pytest.approx(look(rows[:300], rows[:300], rule).levels + more, abs=0.03)


def test_a_null_model_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="no null model named 'coins'; have: phase-shuffled, random walks"):
        null_views("coins", walks(5, 9), None, Rule(1, None, "abs-corr"))
