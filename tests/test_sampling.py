"""Laws of the sample: live rows, each once, shared fairly among the tensors, the same for ever."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmdgpu.errors import UsageError
from cmdgpu.notation import I64
from cmdgpu.sampling import N_CANDIDATES, SAMPLINGS, candidate_rows, draw_sample
from cmdgpu.store.journal import Journal
from cmdgpu.store.parameter_map import Kind, ParameterMap, Piece, TensorEntry, whole
from cmdgpu.trajectory import Trajectory
from tests.strategies import layouts
from tests.verbs import LAYOUT, N

RULES = list(SAMPLINGS)


def live_rows(layout: ParameterMap) -> I64:
    """By the definition: rows of parameters, in row order."""
    rows = [np.arange(piece.row, piece.stop) for t in layout if t.kind == "parameter" for piece in t.pieces]
    return np.sort(np.concatenate([np.empty(0, np.int64), *rows]))


def rows_of(layout: ParameterMap, i: int) -> I64:
    return np.concatenate([np.arange(p.row, p.stop) for p in layout.tensors[i].pieces])


def wide(*sizes: int, buffers: tuple[int, ...] = ()) -> ParameterMap:
    """Parameters of these sizes, followed by buffers."""
    kinds: list[tuple[Kind, tuple[int, ...]]] = [("parameter", sizes), ("buffer", buffers)]
    return ParameterMap(
        whole([(f"{kind[0]}{i}", kind, "float32", (n,)) for kind, ns in kinds for i, n in enumerate(ns)])
    )


LARGE = wide(9, 60_000, 500, 0, 8_000, 3, buffers=(4_000,))
LARGE_N = 68_512


# ---- which rows -----------------------------------------------------------------------------------------


@given(layout=layouts(), k=st.integers(1, 60), rule=st.sampled_from(RULES), seed=st.integers(0, 2**32))
def test_a_sample_is_distinct_live_rows_in_order(layout: ParameterMap, k: int, rule: str, seed: int) -> None:
    live = live_rows(layout)
    rows = draw_sample(layout, k, rule, seed).rows
    assert rows.dtype == np.int64
    assert len(rows) == min(k, len(live))
    assert (np.diff(rows) > 0).all()
    assert np.isin(rows, live).all(), "a buffer, a hole or nothing was drawn"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("k", [1, 7, 1000, 4096, 4097, 20_000])
def test_the_same_law_for_layouts_larger_than_the_candidates(rule: str, k: int) -> None:
    rows = draw_sample(LARGE, k, rule, 3).rows
    assert len(rows) == k
    assert (np.diff(rows) > 0).all()
    assert rows[-1] < LARGE_N


@pytest.mark.parametrize("rule", RULES)
def test_a_sample_larger_than_the_model_is_the_model(rule: str) -> None:
    for layout in (LAYOUT, LARGE):
        live = live_rows(layout)
        for k in (len(live), len(live) + 1, 10**12):
            assert np.array_equal(draw_sample(layout, k, rule, 0).rows, live)


def test_a_model_without_parameters_has_no_sample() -> None:
    assert draw_sample(wide(buffers=(10,)), 5, "layer-balanced", 0).rows.tolist() == []
    assert candidate_rows(wide(buffers=(10,))).tolist() == []


@pytest.mark.parametrize("k", [20, 100, 1000, 4096, 5000, 20_000])
@pytest.mark.parametrize("layout", [LAYOUT, LARGE], ids=["small", "large"])
def test_every_tensor_has_its_share_of_half_the_sample(layout: ParameterMap, k: int) -> None:
    eligible = [i for i, t in enumerate(layout) if t.kind == "parameter" and t.n_rows]
    share = k // (2 * len(eligible))
    assert share >= 1
    for seed in range(5):
        rows = draw_sample(layout, k, "layer-balanced", seed).rows
        for i in eligible:
            found = int(np.isin(rows_of(layout, i), rows).sum())
            assert found >= min(share, layout.tensors[i].n_rows), f"{layout.tensors[i].name} has {found}"


def test_what_is_left_is_drawn_from_all_of_the_model() -> None:
    """Half of 1000 in equal shares of 5 tensors, the rest in proportion to their sizes: 60,000 of 68,512."""
    rows = draw_sample(LARGE, 1000, "layer-balanced", 0).rows
    largest = int(((rows >= 9) & (rows < 60_009)).sum())
    expected = 100 + (1000 - 100 - 100 - 100 - 9 - 3) * 60_000 / LARGE_N
    assert abs(largest - expected) < 45


@given(layout=layouts(), seed=st.integers(0, 1000), data=st.data())
def test_at_two_rows_per_tensor_or_fewer_the_sample_is_uniform(
    layout: ParameterMap, seed: int, data: st.DataObject
) -> None:
    n_tensors = sum(t.kind == "parameter" and t.n_rows > 0 for t in layout)
    k = data.draw(st.integers(1, max(2 * n_tensors, 1)))
    balanced = draw_sample(layout, k, "layer-balanced", seed)
    assert np.array_equal(balanced.rows, draw_sample(layout, k, "uniform", seed).rows)
    assert "uniform" in balanced.rule or balanced.rule == "every row"


def test_a_tied_tensor_counts_once() -> None:
    tied = ParameterMap(LAYOUT.tensors, {f"alias{i}": "fc.bias" for i in range(50)})
    for k in (6, 7, 100):
        a, b = draw_sample(tied, k, "layer-balanced", 1), draw_sample(LAYOUT, k, "layer-balanced", 1)
        assert np.array_equal(a.rows, b.rows)
        assert a.rule == b.rule


def test_where_the_rows_lie_does_not_matter_only_which_tensor_they_are_of() -> None:
    """Pieces and holes move rows about; the sample moves with them."""
    pieces = (Piece((0,), (30,), 20), Piece((30,), (70,), 200))
    moved = ParameterMap(
        (
            TensorEntry("p0", "parameter", "float32", (10,), (Piece((0,), (10,), 3),)),
            TensorEntry("p1", "parameter", "float32", (100,), pieces),
        ),
        holes=((0, 3), (13, 20), (50, 200)),
    )
    place = np.concatenate([np.arange(3, 13), np.arange(20, 50), np.arange(200, 270)])
    for k in (1, 4, 5, 40):
        plain = draw_sample(wide(10, 100), k, "layer-balanced", 5).rows
        assert np.array_equal(draw_sample(moved, k, "layer-balanced", 5).rows, place[plain])


def test_a_uniform_sample_does_not_ask_where_tensors_end() -> None:
    """The same numbers as a model's store and as a plain array give the same uniform sample."""
    for k in (50, 4000, 6000):
        apart = draw_sample(wide(3_000, 1, 6_999, buffers=(5,)), k, "uniform", 9).rows
        assert np.array_equal(apart, draw_sample(wide(10_000), k, "uniform", 9).rows)


# ---- candidates -----------------------------------------------------------------------------------------


def test_candidates_are_s_rows_half_of_them_uniform_the_rest_in_shares() -> None:
    rows = candidate_rows(LARGE)
    assert len(rows) == N_CANDIDATES
    assert (np.diff(rows) > 0).all()
    assert rows[-1] < LARGE_N
    share = N_CANDIDATES // 10
    for i in (0, 1, 2, 4, 5):
        found = int(np.isin(rows_of(LARGE, i), rows).sum())
        assert found >= min(share, LARGE.tensors[i].n_rows)
    assert np.array_equal(rows, candidate_rows(LARGE)), "they are drawn once"


@pytest.mark.parametrize("n", [N_CANDIDATES - 1, N_CANDIDATES, N_CANDIDATES + 1])
def test_a_small_model_is_its_own_candidates(n: int) -> None:
    rows = candidate_rows(wide(100, n - 100, buffers=(50,)))
    assert len(rows) == min(n, N_CANDIDATES)
    if n <= N_CANDIDATES:
        assert rows.tolist() == list(range(n))


@pytest.mark.parametrize("rule", RULES)
def test_every_sample_of_up_to_half_as_many_is_drawn_from_the_candidates(rule: str) -> None:
    candidates = candidate_rows(LARGE)
    for k in (1, 1000, N_CANDIDATES // 2):
        for seed in range(3):
            sample = draw_sample(LARGE, k, rule, seed)
            assert sample.from_candidates
            assert np.isin(sample.rows, candidates).all()
    sample = draw_sample(LARGE, N_CANDIDATES // 2 + 1, rule, 0)
    assert not sample.from_candidates
    assert not np.isin(sample.rows, candidates).all()


def test_uniform_samples_come_from_the_half_that_was_drawn_uniformly() -> None:
    """Were they drawn from all candidates, small tensors would be over-represented."""
    union = set[int]()
    for seed in range(60):
        union |= set(draw_sample(LARGE, N_CANDIDATES // 2, "uniform", seed).rows.tolist())
    assert len(union) == N_CANDIDATES // 2
    in_small = sum(row >= 60_009 for row in union) / len(union)
    assert abs(in_small - 8_503 / LARGE_N) < 0.02


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("k", [50, 1000, 5000])
def test_a_store_its_sketch_and_an_array_give_the_same_sample(tmp_path: Path, rule: str, k: int) -> None:
    W_nt = np.random.default_rng(0).standard_normal((10_000, 2)).astype(np.float32)
    array = Trajectory.from_array(W_nt)
    sketched = Trajectory.from_array(W_nt, out=tmp_path / "sketched.zarr")
    column = np.zeros(10_240, np.float32)
    journal = Journal.create(
        tmp_path / "bare.zarr", array.parameters, dtype="float32", rows=10_240, unit="step", sketch_rows=None
    )
    for t in range(2):
        column[:10_000] = W_nt[:, t]
        journal.append(column, t, {}, None)
    journal.close()
    bare = Trajectory.open(tmp_path / "bare.zarr")
    samples = [draw_sample(traj.parameters, k, rule, 7).rows for traj in (array, sketched, bare)]
    assert np.array_equal(samples[0], samples[1])
    assert np.array_equal(samples[0], samples[2])
    for traj in (array, sketched, bare):
        assert np.array_equal(traj.read_rows(samples[0]), W_nt[samples[0]])


def test_a_sketch_spares_the_chunks(tmp_path: Path) -> None:
    """A sample from the candidates is read though every row chunk is unreadable."""
    W_nt = np.random.default_rng(0).standard_normal((10_000, 2)).astype(np.float32)
    traj = Trajectory.from_array(W_nt, out=tmp_path / "run.zarr")
    for t in range(2):
        file = tmp_path / "run.zarr" / "weights" / f"c.0.{t}"
        raw = bytearray(file.read_bytes())
        raw[:-4] = bytes(len(raw) - 4)
        file.write_bytes(raw)
    rows = draw_sample(traj.parameters, 1000, "layer-balanced", 0).rows
    assert np.array_equal(traj.read_rows(rows), W_nt[rows])


# ---- chance ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_the_seed_decides_and_nothing_else(rule: str) -> None:
    np.random.seed(0)  # noqa: NPY002  the global state must not matter
    a = draw_sample(LARGE, 1000, rule, 11).rows
    np.random.seed(1)  # noqa: NPY002
    assert np.array_equal(a, draw_sample(LARGE, 1000, rule, 11).rows)
    others = [draw_sample(LARGE, 1000, rule, seed).rows for seed in range(5)]
    for i, one in enumerate(others):
        for other in others[:i]:
            assert len(np.intersect1d(one, other)) < 900


def test_the_rows_of_a_seed_never_change() -> None:
    """Frozen: a result of last year says which rows it sampled."""
    assert draw_sample(LAYOUT, 6, "uniform", 0).rows.tolist() == FROZEN_UNIFORM
    assert draw_sample(LAYOUT, 8, "layer-balanced", 42).rows.tolist() == FROZEN_BALANCED
    assert candidate_rows(LARGE)[::1024].tolist() == FROZEN_CANDIDATES


FROZEN_UNIFORM = [9, 24, 158, 373, 480, 540]
FROZEN_BALANCED = [55, 247, 408, 432, 449, 464, 574, 589]
FROZEN_CANDIDATES = [0, 9673, 19754, 29792, 39656, 49756, 59386, 63012]


def test_every_row_is_as_likely_as_any_other() -> None:
    layout = wide(7, 30, 13, buffers=(9,))
    counts = np.zeros(50)
    draws = 3000
    for seed in range(draws):
        counts[draw_sample(layout, 6, "uniform", seed).rows] += 1
    expected = draws * 6 / 50
    chi2 = float(((counts - expected) ** 2).sum() / (expected * (1 - 6 / 50)))
    assert chi2 < 49 + 5 * math.sqrt(2 * 49), f"chi-squared {chi2:.0f} on 49 degrees of freedom"


def test_every_row_of_a_tensor_is_as_likely_as_any_other_in_it() -> None:
    layout = wide(20, 20)
    counts = np.zeros(40)
    draws = 2000
    for seed in range(draws):
        counts[draw_sample(layout, 8, "layer-balanced", seed).rows] += 1
    expected = draws * 8 / 40
    assert np.abs(counts - expected).max() < 5.5 * math.sqrt(expected)


def test_pairs_are_drawn_independently() -> None:
    together = np.zeros((10, 10))
    draws = 4000
    for seed in range(draws):
        rows = draw_sample(wide(10), 3, "uniform", seed).rows
        together[np.ix_(rows, rows)] += 1
    expected = draws * 3 * 2 / (10 * 9)
    off = together[~np.eye(10, dtype=bool)]
    assert np.abs(off - expected).max() < 5.5 * math.sqrt(expected)


def test_rows_beyond_what_float32_and_int32_can_count() -> None:
    huge = wide(1 << 33, 1000, 1 << 34)
    for k in (100, 1000, 10_000):
        rows = draw_sample(huge, k, "layer-balanced", 0).rows
        assert len(np.unique(rows)) == k
        assert rows.max() > 1 << 34
        assert np.isin(rows[(rows >= 1 << 33) & (rows < (1 << 33) + 1000)] - (1 << 33), np.arange(1000)).all()
        assert int(((rows >= 1 << 33) & (rows < (1 << 33) + 1000)).sum()) >= min(k // 6, 1000)
        low_bits = rows & 1
        assert 0.35 < low_bits.mean() < 0.65, "rows lost their last digits"


# ---- refusals -------------------------------------------------------------------------------------------


def test_a_sample_that_cannot_be_is_refused_in_words() -> None:
    for k in (0, -1):
        with pytest.raises(UsageError, match="at least 1"):
            draw_sample(LAYOUT, k, "uniform", 0)
    with pytest.raises(UsageError, match=r"no sampling named 'unifrom'; have: layer-balanced, uniform"):
        draw_sample(LAYOUT, 5, "unifrom", 0)
    with pytest.raises(UsageError, match="random_state"):
        draw_sample(LAYOUT, 5, "uniform", -1)


def test_the_rule_is_told_in_words() -> None:
    assert draw_sample(LAYOUT, 60, "layer-balanced", 0).rule == "layer-balanced, 10 per tensor of 3"
    assert draw_sample(LAYOUT, 6, "layer-balanced", 0).rule.startswith("uniform, for 6 rows")
    assert draw_sample(LAYOUT, 60, "uniform", 0).rule == "uniform"
    assert draw_sample(LAYOUT, N, "uniform", 0).rule == "every row"
