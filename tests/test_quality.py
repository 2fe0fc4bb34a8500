"""Laws of the quality of modes: what is unrelated is not called better than chance, what is planted is."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score  # pyright: ignore

from cmdgpu import CMD, Trajectory
from cmdgpu.errors import CmdgpuWarning
from cmdgpu.miniature import Rule, follow, references_of
from cmdgpu.notation import F32, F64, I64, BoolArray
from cmdgpu.null_model import NULL_MODELS, NullCorrelation, step_scale
from cmdgpu.quality import AtHand, Quality, Sampled, View, adjusted_rand, assess, rows_at_hand
from cmdgpu.quality.held_out import SPLITS, held_out, judge_held_out
from cmdgpu.quality.verdict import ABOVE, AGREE, CLEAR, decide
from cmdgpu.sampling import candidate_rows, draw_sample
from cmdgpu.sources import StoreSource
from cmdgpu.statistics import LIMITS, fraction_below
from cmdgpu.store.parameter_map import ParameterMap, whole
from cmdgpu.store.view import StoreView
from tests.harness import planted as planted_rows
from tests.harness import write_store


def walks(n_rows: int, n_snapshots: int, seed: int = 0) -> F32:
    rng = np.random.default_rng(seed)
    return np.cumsum(rng.standard_normal((n_rows, n_snapshots)), axis=1).astype(np.float32)


def unrelated(kind: str, n_rows: int, n_snapshots: int, n_modes: int, seed: int) -> F32:
    """Planted rows, of which a null model leaves what is each row's own."""
    rows = planted(n_rows, n_snapshots, n_modes, seed=seed).astype(np.float64)
    return NULL_MODELS[kind](np.random.default_rng(seed), rows, step_scale(rows)).astype(np.float32)


def planted(n_rows: int, n_snapshots: int, n_modes: int, noise: float = 0.2, seed: int = 0) -> F32:
    return planted_rows(n_rows, n_snapshots, n_modes, noise=noise, seed=seed)


def judged(W_nt: F32, n_modes: int, n_samples: int) -> Quality:
    """By the rows behind the first K, which are clustered."""
    W = W_nt.astype(np.float64)
    rule = Rule(n_modes, None, "abs-corr")
    R_mt = references_of(W[:n_samples], rule)
    columns: I64 = np.arange(W.shape[1], dtype=np.int64)
    at_hand = AtHand(columns, W[:n_samples], W[n_samples:], (), "")
    return assess(at_hand, columns, R_mt, Rule(len(R_mt), None, "abs-corr"))


# ---- the verdict ----------------------------------------------------------------------------------------

SIZES = [(8, 60, 4), (20, 60, 2), (30, 80, 10)]
"""T, K, M."""


@pytest.mark.slow
@pytest.mark.parametrize(("n_snapshots", "n_samples", "n_modes"), SIZES)
@pytest.mark.parametrize("kind", list(NULL_MODELS))
def test_rows_that_share_nothing_are_never_better_than_chance(
    kind: str, n_snapshots: int, n_samples: int, n_modes: int
) -> None:
    for seed in range(20):
        rows = unrelated(kind, n_samples + 110, n_snapshots, n_modes, seed)
        assert judged(rows, n_modes, n_samples).verdict == "no better than chance", seed


@pytest.mark.slow
@pytest.mark.parametrize(("n_snapshots", "n_samples", "n_modes"), SIZES)
def test_planted_modes_are_always_better_than_chance(n_snapshots: int, n_samples: int, n_modes: int) -> None:
    for seed in range(20):
        rows = planted(n_samples + 110, n_snapshots, n_modes, seed=seed)
        quality = judged(rows, n_modes, n_samples)
        assert quality.verdict == "better than chance", seed
        assert quality.words.startswith("these modes are better than chance (110 rows that were not clust")


def test_a_smooth_profile_under_noise_is_found_though_its_increments_are_noise() -> None:
    rng = np.random.default_rng(0)
    curve = np.sin(np.linspace(0, 5, 60))
    rows = rng.uniform(-2, 2, (300, 1)) * curve + 0.1 * rng.standard_normal((300, 60))
    quality = judged(rows.astype(np.float32), 1, 100)
    assert quality.increment_correlation is not None and quality.increment_correlation.measured < 0.5
    assert quality.verdict == "better than chance"


def test_a_drift_of_its_own_needs_no_relatives() -> None:
    """Walks that drift, each at its own speed: |corr| is far above that of walks, and means nothing."""
    rng = np.random.default_rng(0)
    steps = rng.standard_normal((400, 59)) + rng.standard_normal((400, 1))
    quality = judged(np.cumsum(steps, axis=1).astype(np.float32), 5, 150)
    levels = quality.levels
    assert levels is not None and levels.measured > levels.chance["random walks"].mean + 0.15
    assert quality.verdict == "no better than chance"


def test_rows_of_every_pace_resemble_each_other_for_nothing() -> None:
    """Walks that slow down, each after a time of its own: one step size for all is not what they are."""
    rng = np.random.default_rng(0)
    time = 20 * 10 ** rng.uniform(-1.5, 0.5, (500, 1))
    rows = np.cumsum(rng.standard_normal((500, 19)) * np.exp(-np.arange(19) / time), axis=1)
    quality = judged(np.concatenate([np.zeros((500, 1)), rows], axis=1).astype(np.float32), 10, 200)
    levels = quality.levels
    assert levels is not None and levels.measured > levels.chance["random walks"].high + 0.02
    assert quality.verdict == "no better than chance"


def view(excess: float, chance: float = 0.6) -> View:
    return View(chance + excess * (1 - chance), {"x": NullCorrelation(chance, chance, chance)})


@pytest.mark.parametrize(
    ("levels", "increments", "expected"),
    [
        (CLEAR + 0.01, -1.0, "better than chance"),
        (CLEAR - 0.01, AGREE + 0.01, "better than chance"),
        (ABOVE + 0.01, AGREE + 0.01, "better than chance"),
        (CLEAR - 0.01, AGREE - 0.01, "cannot tell"),
        (ABOVE + 0.01, -1.0, "cannot tell"),
        (ABOVE - 0.01, 0.9, "no better than chance"),
        (-0.5, 0.9, "no better than chance"),
    ],
)
def test_the_rule(levels: float, increments: float, expected: str) -> None:
    assert decide(view(levels), view(increments)) == expected


def test_the_hardest_null_model_counts() -> None:
    nulls = {"easy": NullCorrelation(0.2, 0.2, 0.2), "hard": NullCorrelation(0.8, 0.8, 0.8)}
    assert View(0.9, nulls).excess == pytest.approx(0.5)
    assert View(1.0, {"all": NullCorrelation(1.0, 1.0, 1.0)}).excess == 0.0, "no room, no excess"


# ---- where there is nothing to judge ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "n_modes", "why"),
    [
        (walks(300, 2), 3, "2 snapshots let any two rows resemble each other"),
        (walks(300, 1), 3, "there is no mode, for no sampled row moves"),
        (np.full((300, 12), 0.1, np.float32), 3, "there is no mode"),
        (walks(300, 7), 3, "7 snapshots let"),
        (walks(99, 12), 3, "99 moving rows are too few"),
        (walks(5, 12), 30, "5 moving rows are too few"),
    ],
)
def test_what_cannot_be_judged_says_why(rows: F32, n_modes: int, why: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CmdgpuWarning)
        cmd = CMD(n_modes=n_modes).fit(rows)
        quality = cmd.quality()
    assert quality.verdict == "cannot tell"
    assert quality.words.startswith(f"cannot tell: {why}")
    assert cmd.summary().endswith(quality.words)
    json.dumps(quality.to_dict(), allow_nan=False)


def test_constant_and_broken_rows_are_not_judged() -> None:
    rows = planted(900, 20, 3)
    rows[::3] = 0.25
    rows[1, 4] = np.nan
    cmd = CMD(n_modes=3, n_samples=200).fit(rows)
    moving = np.setdiff1d(np.flatnonzero(np.arange(900) % 3), [1])
    assert cmd.quality().verdict == "better than chance"
    assert cmd.quality().n_rows == len(np.setdiff1d(moving, cmd.sample_rows_))


def test_more_modes_than_rows_leave_nothing_above_chance() -> None:
    rows = planted(150, 12, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CmdgpuWarning)
        quality = CMD(n_modes=200, n_samples=150).fit(rows).quality()
    assert quality.sampled and quality.levels is not None
    assert quality.levels.measured == pytest.approx(1.0)
    assert quality.verdict == "no better than chance", "every row is its own reference, by chance as well"


# ---- the measures -----------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_the_fit() -> None:
    """All rows that are not clustered are judged: what is said of them can be computed from the result."""
    W = planted(1500, 30, 4, noise=0.4)
    cmd = CMD(n_modes=4, n_samples=200).fit(W)
    quality = cmd.quality()
    others = np.setdiff1d(np.arange(1500), cmd.sample_rows_)
    corr = np.asarray(cmd.correlation_)[others].astype(np.float64)
    x = W[others] - W[others].mean(axis=1, keepdims=True, dtype=np.float64)
    ss = (x**2).sum(axis=1)
    assert quality.n_rows == 1300 and not quality.sampled and quality.levels is not None
    assert quality.levels.measured == pytest.approx(np.abs(corr).mean(), abs=1e-6)
    assert quality.r2 == pytest.approx((corr**2).mean(), abs=1e-6)
    assert quality.r2_energy == pytest.approx(1 - (ss * (1 - corr**2)).sum() / ss.sum(), abs=1e-6)
    for limit, share in quality.fraction_below.items():
        assert share == pytest.approx((np.abs(corr) < limit).mean(), abs=1e-3)
    # the increments of a row with those of the reference that it follows
    dw, dr = np.diff(W[others].astype(np.float64)), np.diff(cmd.references_.astype(np.float64))
    mode = np.asarray(cmd.labels_)[others]
    together = [float(np.corrcoef(w, dr[m])[0, 1]) for w, m in zip(dw, mode, strict=True)]
    expected = float(np.mean(np.array(together) * np.sign(corr)))
    assert quality.increment_correlation is not None
    assert quality.increment_correlation.measured == pytest.approx(expected, abs=1e-6)


def test_the_fraction_of_all_rows_below_is_that_of_the_histogram() -> None:
    cmd = CMD(n_modes=4, n_samples=200).fit(planted(3000, 15, 4, noise=0.7))
    corr = np.abs(np.asarray(cmd.correlation_))
    below = cmd.metrics_["fraction_below"]
    assert below == fraction_below(cmd.result.totals) and list(below) == ["0.5", "0.8", "0.95"]
    for limit in LIMITS:
        assert below[str(limit)] == pytest.approx((corr < limit).mean(), abs=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CmdgpuWarning)
        nothing = CMD(n_modes=2).fit(np.zeros((50, 4), np.float32)).metrics_["fraction_below"]
    assert all(math.isnan(value) for value in nothing.values())


def test_errors_grow_as_the_correlation_falls() -> None:
    rng = np.random.default_rng(0)
    noise = rng.uniform(0.05, 2, (2000, 1)) * rng.standard_normal((2000, 40))
    quality = CMD(n_modes=3, n_samples=300).fit((planted(2000, 40, 3) + noise).astype(np.float32)).quality()
    bins = quality.degradation
    assert [(one.low, one.high) for one in bins] == [(0, 0.5), (0.5, 0.8), (0.8, 0.95), (0.95, 1)]
    assert sum(one.share for one in bins) == pytest.approx(1)
    assert sum(one.energy_share for one in bins) == pytest.approx(1)
    explained = 1 - sum(one.energy_share * one.error for one in bins)
    assert explained == pytest.approx(quality.r2_energy)
    for one in bins:
        assert 1 - one.high**2 <= one.error <= 1 - one.low**2
    held = [one.held_out_error for one in bins]
    assert held == sorted(held, reverse=True)


def test_bins_without_rows_have_no_error() -> None:
    quality = judged(planted(300, 20, 2, noise=0.01), 2, 100)
    assert quality.degradation[0].share == 0
    assert math.isnan(quality.degradation[0].error) and math.isnan(quality.degradation[0].held_out_error)
    assert quality.to_dict()["degradation"][0]["error"] is None


# ---- held-out snapshots -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_snapshots", [8, 9, 30, 101])
def test_which_snapshots_are_held_out(n_snapshots: int) -> None:
    last = n_snapshots - 1
    every = {which: set(np.flatnonzero(held_out(which, n_snapshots)).tolist()) for which in SPLITS}
    assert every["every second"] == set(range(1, last, 2))
    assert every["every fifth"] == set(range(2, last, 5))
    assert every["last tenth"] == set(range(n_snapshots - math.ceil(n_snapshots / 10), n_snapshots))


interpolate: Any = np.interp  # NumPy ships no types of it that pyright could use


def line(r: F64, w: F64) -> tuple[float, float]:
    """a and b of the least-squares fit w ~ a r + b."""
    solved: Any = np.linalg.lstsq(np.stack([r, np.ones_like(r)], axis=1), w, rcond=None)
    return float(solved[0][0]), float(solved[0][1])


def by_hand(W: F64, sample: F64, steps: I64, out: BoolArray, rule: Rule, linear: bool) -> tuple[float, float]:
    """Fit by least squares on the kept snapshots, predict the others; and what the rival does."""
    R, kept = references_of(sample, rule, None, ~out), ~out
    model = rival = movement = 0.0
    for w in W:
        tried: list[tuple[float, float]] = []
        for r in R:
            a, b = line(r[kept], w[kept])
            errors: F64 = (a * r + b - w) ** 2
            tried.append((float(errors[kept].sum()), float(errors[out].sum())))
        model += min(tried)[1]
        guess: Any = w[kept][-1]
        if linear:
            guess = interpolate(steps[out], steps[kept], w[kept])
        rival += float(np.sum(np.asarray(guess - w[out], np.float64) ** 2))
        movement += float(np.sum((w[kept].mean() - w[out]) ** 2))
    return model / movement, rival / movement


@pytest.mark.parametrize("which", SPLITS)
def test_held_out_errors_equal_a_least_squares_fit(which: str) -> None:
    steps = np.array([0, 1, 2, 4, 8, 16, 32, 40, 41, 50, 60, 80])
    W = walks(90, 12).astype(np.float64)
    rule = Rule(4, None, "abs-corr")
    found = judge_held_out(which, steps, W[:50], W[50:], rule)
    out = held_out(which, 12)
    model, rival = by_hand(W[50:], W[:50], steps, out, rule, which != "last tenth")
    assert found.summary.error == pytest.approx(model, rel=1e-9)
    assert found.summary.rival_error == pytest.approx(rival, rel=1e-9)
    assert found.summary.n_snapshots == int(out.sum())
    assert found.error_n.sum() / found.movement_n.sum() == pytest.approx(model, rel=1e-12)


def test_modes_without_noise_beat_their_rivals_and_walks_do_not() -> None:
    exact, chance = judged(planted(300, 30, 3, noise=0.0), 3, 100), judged(walks(300, 30), 3, 100)
    assert all(one.error < 1e-9 < one.rival_error for one in exact.held_out)
    assert all(one.error > one.rival_error for one in chance.held_out)
    assert "smoother" not in exact.words and "a smoother, not a model" in chance.words


# ---- stability --------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(-2, 4), st.integers(-2, 3)), min_size=2, max_size=60),
)
def test_the_adjusted_rand_index_is_that_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    u, v = np.array(pairs, dtype=np.int16).T
    known = (u >= 0) & (v >= 0)
    expected = float(adjusted_rand_score(u[known], v[known])) if known.sum() > 1 else 1.0
    assert adjusted_rand(u, v) == pytest.approx(expected, abs=1e-12)
    assert adjusted_rand(u, v) == adjusted_rand(v, u) == adjusted_rand(u, (v + 7) * (v >= 0) - (v < 0))


def test_labels_are_of_the_same_rows() -> None:
    with pytest.raises(ValueError, match="3 labels beside 4"):
        adjusted_rand(np.zeros(3), np.zeros(4))


def test_other_samples_are_those_of_the_next_seeds_and_their_labels_are_compared() -> None:
    W = planted(3000, 20, 5, noise=0.3)
    cmd = CMD(n_modes=8, n_samples=150, random_state=3).fit(W)
    quality = cmd.quality()
    traj = Trajectory.from_array(W)
    judges = np.setdiff1d(np.arange(3000), cmd.sample_rows_)
    judges = judges[np.round(np.linspace(0, len(judges) - 1, 2048)).astype(int)]
    expected: list[float] = []
    for seed in range(4, 9):
        other = W[draw_sample(traj.parameters, 150, "layer-balanced", seed).rows].astype(np.float64)
        R_mt = references_of(other, Rule(8, None, "abs-corr"))
        mode = follow(W[judges].astype(np.float64), R_mt).mode
        expected.append(adjusted_rand(mode, np.asarray(cmd.labels_)[judges]))
    assert list(quality.stability) == pytest.approx(expected, abs=1e-12)
    assert all(0 < ari < 1 for ari in expected)
    assert f"{np.mean(expected):.2f}" in quality.words


# ---- which rows -------------------------------------------------------------------------------------------

LAYOUT = ParameterMap(
    whole(
        [
            ("a.weight", "parameter", "float32", (40, 100)),
            ("a.running_mean", "buffer", "float32", (2000,)),
            ("b.weight", "parameter", "float32", (150, 40)),
            ("b.bias", "parameter", "float32", (120,)),
        ]
    )
)
N = LAYOUT.n_rows


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    """10,120 parameters, more than the sketch holds, and buffers that follow one profile exactly."""
    rows = walks(N, 12)
    rows[4000:6000] = np.arange(12) * np.linspace(1, 2, 2000)[:, None]
    where = tmp_path_factory.mktemp("quality") / "run.zarr"
    return write_store(where, rows, rows=1024, layout=LAYOUT)


def drawn(cmd: CMD) -> Sampled:
    return Sampled(cmd.sample_rows_, cmd.sample_, cmd.n_samples, cmd.sampling, cmd.random_state)


def test_a_store_is_judged_by_its_sketch_alone(recorded: Trajectory, monkeypatch: pytest.MonkeyPatch) -> None:
    cmd = CMD(n_modes=3, n_samples=100).fit(recorded)

    def refuse(*_: Any) -> None:
        raise AssertionError("a chunk is read")

    monkeypatch.setattr(StoreView, "read_chunk", refuse)
    monkeypatch.setattr(StoreView, "read_chunks", refuse)
    at_hand = rows_at_hand(drawn(cmd), recorded)
    assert at_hand.rows_nt is not None and at_hand.rows_nt.shape == (2048, 12)
    assert len(at_hand.resampled) == 5 and not at_hand.note
    assert cmd.quality().verdict == "no better than chance", "buffers are not judged"
    assert cmd.quality() is cmd.quality()


def test_judges_are_parameters_that_were_not_clustered(recorded: Trajectory) -> None:
    cmd = CMD(n_modes=3, n_samples=100).fit(recorded)
    at_hand = rows_at_hand(drawn(cmd), recorded)
    assert at_hand.rows_nt is not None
    where = {row.tobytes(): n for n, row in enumerate(recorded[:, :].astype(np.float64))}
    judges = [where[row.tobytes()] for row in at_hand.rows_nt]
    assert not any(4000 <= row < 6000 for row in judges)
    assert not set(judges) & set(cmd.sample_rows_.tolist())
    assert set(judges) <= set(candidate_rows(LAYOUT).tolist())


def test_judges_are_uniform_over_rows_and_not_balanced_over_tensors(tmp_path: Path) -> None:
    """Of 28,000 and 2,000 rows: the candidates are balanced, a fifth of them are of the small tensor."""
    sizes = (("large", 28_000), ("small", 2000))
    layout = ParameterMap(whole([(name, "parameter", "float32", (n,)) for name, n in sizes]))
    rows = np.repeat(np.arange(30_000, dtype=np.float32)[:, None], 8, axis=1)
    traj = write_store(tmp_path / "s.zarr", rows, rows=16_384, layout=layout)
    sample = draw_sample(layout, 100, "layer-balanced", 0).rows
    at_hand = rows_at_hand(Sampled(sample, rows[sample], 100, "layer-balanced", 0), traj)
    assert at_hand.rows_nt is not None
    assert np.count_nonzero(candidate_rows(layout) >= 28_000) > 0.2 * 8192
    assert np.count_nonzero(at_hand.rows_nt[:, 0] >= 28_000) == pytest.approx(2048 / 15, abs=40)


def test_a_store_and_an_array_of_its_rows_are_judged_alike(tmp_path: Path) -> None:
    rows = planted(2500, 14, 3)
    stored = CMD(n_modes=3, n_samples=80).fit(write_store(tmp_path / "s.zarr", rows)).quality()
    assert stored == CMD(n_modes=3, n_samples=80).fit(rows).quality()


def test_a_selection_is_judged_by_what_is_selected(recorded: Trajectory) -> None:
    part = recorded.sel(start=2, params=r"^b\.")
    cmd = CMD(n_modes=3, n_samples=100).fit(part)
    at_hand = rows_at_hand(drawn(cmd), part)
    assert at_hand.rows_nt is not None and not at_hand.note, "little enough to be read"
    known = {row.tobytes() for row in recorded[6000:, 2:].astype(np.float64)}
    assert all(row.tobytes() in known for row in at_hand.rows_nt)
    assert cmd.quality().n_snapshots == 10


def test_of_a_large_selection_rows_of_the_sketch_serve(
    recorded: Trajectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cmdgpu.quality.at_hand.MOST_READ_BYTES", 1000)
    part = recorded.sel(params=r"^b\.weight")
    cmd = CMD(n_modes=3, n_samples=100).fit(part)
    at_hand = rows_at_hand(drawn(cmd), part)
    assert isinstance(part.source, StoreSource) and part.source.view.sketch_rows is not None
    known = {row.tobytes() for row in recorded.read_rows(part.source.view.sketch_rows).astype(np.float64)}
    mine = {row.tobytes() for row in recorded[6000:12000, :].astype(np.float64)}
    assert at_hand.rows_nt is not None and len(at_hand.rows_nt) > 1000 and at_hand.resampled == ()
    assert all(row.tobytes() in known & mine for row in at_hand.rows_nt)
    assert "the candidates are not in the sketch" in cmd.quality().words.splitlines()[-1]


def test_without_a_sketch_much_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traj = write_store(tmp_path / "s.zarr", planted(3000, 12, 3), sketch=False)
    cmd = CMD(n_modes=3, n_samples=150).fit(traj)
    read = cmd.quality()
    assert not read.sampled and read.n_rows == 2048
    monkeypatch.setattr("cmdgpu.quality.at_hand.MOST_READ_BYTES", 1000)
    alone = CMD(n_modes=3, n_samples=150).fit(traj).quality()
    assert alone.sampled and alone.n_rows == 150 and alone.verdict == read.verdict == "better than chance"
    assert "the candidates are not in the sketch, and reading them would take 147 kB" in alone.words


def test_an_array_elsewhere_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Remote:
        """Something (N, T) that is no array in memory."""

        def __init__(self, values: F32) -> None:
            self._values, self.shape, self.dtype = values, values.shape, values.dtype

        def __getitem__(self, index: Any) -> F32:
            return self._values[index]

    monkeypatch.setattr("cmdgpu.quality.at_hand.MOST_READ_BYTES", 1000)
    quality = CMD(n_modes=3, n_samples=150).fit(Remote(planted(2000, 12, 3))).quality()
    assert quality.sampled and "reading them would take" in quality.words


def test_a_result_without_its_trajectory_is_judged_by_its_sample(tmp_path: Path) -> None:
    traj = write_store(tmp_path / "s.zarr", planted(3000, 12, 3))
    CMD(n_modes=3, n_samples=150).fit(traj, out=tmp_path / "s.cmd.zarr")
    assert not CMD.load(tmp_path / "s.cmd.zarr").quality().sampled
    (tmp_path / "s.zarr").rename(tmp_path / "elsewhere.zarr")
    alone = CMD.load(tmp_path / "s.cmd.zarr").quality()
    assert alone.sampled and alone.n_rows == 150 and alone.stability == ()
    assert alone.verdict == "better than chance"
    assert alone.words.endswith("the trajectory is out of reach")
    assert "clustered rows themselves" in alone.words


def test_a_trajectory_that_was_damaged_meanwhile_is_named(tmp_path: Path) -> None:
    traj = write_store(tmp_path / "s.zarr", planted(3000, 12, 3))
    cmd = CMD(n_modes=3, n_samples=150).fit(traj)
    for chunk in (tmp_path / "s.zarr" / "sketch").glob("c*"):
        chunk.write_bytes(chunk.read_bytes()[:-3])
    quality = cmd.quality()
    assert quality.sampled and "the trajectory cannot be read (" in quality.words
    assert "sketch" in quality.words


def test_long_trajectories_are_judged_at_some_of_their_snapshots() -> None:
    W = planted(400, 700, 2)
    cmd = CMD(n_modes=2, n_samples=100).fit(W)
    at_hand = rows_at_hand(drawn(cmd), Trajectory.from_array(W))
    assert len(at_hand.columns) == 256 and (at_hand.columns[0], at_hand.columns[-1]) == (0, 699)
    assert np.array_equal(at_hand.sample_kt, W[cmd.sample_rows_][:, at_hand.columns])
    quality = cmd.quality()
    assert quality.n_snapshots == 256 and quality.verdict == "better than chance"


def test_samples_beyond_the_candidates_have_no_others_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cmdgpu.quality.at_hand.MOST_SAMPLED", 60)
    W = planted(9000, 10, 2)
    traj = Trajectory.from_array(W)
    rows = draw_sample(traj.parameters, 4500, "uniform", 0).rows
    at_hand = rows_at_hand(Sampled(rows, W[rows], 4500, "uniform", 0), traj)
    assert at_hand.sample_kt.shape == (60, 10) and at_hand.resampled == ()


def test_a_fit_of_the_same_object_forgets_the_last_quality() -> None:
    cmd = CMD(n_modes=3, n_samples=100).fit(planted(400, 12, 3))
    first = cmd.quality()
    assert cmd.fit(walks(400, 12)).quality().verdict == "no better than chance" != first.verdict


# ---- other references, other rules ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"references": "component"},
        {"refine": 2},
        {"references": "component", "refine": 1, "objective": "correlation"},
        {"affinity": "corr-profile"},
        {"threshold": 0.3},
    ],
    ids=repr,
)
def test_chance_goes_through_the_same_pipeline(settings: dict[str, Any]) -> None:
    better = CMD(n_modes=3, n_samples=100, **settings).fit(planted(900, 16, 3)).quality()
    usual = CMD(n_modes=3, n_samples=100, **settings).fit(walks(900, 16)).quality()
    assert better.verdict == "better than chance" and usual.verdict == "no better than chance"
    assert usual.levels is not None
    for null, held in itertools.product(usual.levels.chance.values(), better.held_out):
        assert usual.levels.measured == pytest.approx(null.mean, abs=0.06)
        assert held.error < held.rival_error


# ---- what it says -----------------------------------------------------------------------------------------


def test_the_same_numbers_every_time_and_strict_json() -> None:
    W = planted(700, 15, 3, noise=0.5)
    first, again = (CMD(n_modes=3, n_samples=100).fit(W).quality() for _ in range(2))
    assert first == again
    told = json.loads(json.dumps(first.to_dict(), allow_nan=False))
    assert told["verdict"] == first.verdict and told["words"] == first.words
    assert first.levels is not None and told["levels"]["excess"] == first.levels.excess
    assert set(told["levels"]["chance"]) == set(NULL_MODELS)
    assert set(told["levels"]["chance"]["random walks"]) == {"mean", "low", "high"}
    assert told["fraction_below"].keys() == {"0.5", "0.8", "0.95"}
    assert [one["which"] for one in told["held_out"]] == list(SPLITS)


def test_the_words_carry_the_numbers() -> None:
    quality = judged(walks(400, 20), 5, 150)
    assert quality.levels is not None
    null = quality.levels.chance["random walks"]
    assert f"mean |corr| {quality.levels.measured:.3f}; unrelated rows" in quality.words
    assert f"{null.mean:.3f} ({null.low:.3f}-{null.high:.3f}, random walks)" in quality.words
    assert quality.words.splitlines()[0] == (
        "these modes are no better than chance (250 rows that were not clustered, 20 snapshots)"
    )
