"""Laws of the clustering: Eq. 6 on the sample, modes by size, references closest to all, odd rows apart."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.cluster import hierarchy as _hierarchy  # pyright: ignore[reportMissingTypeStubs]
from scipy.spatial import distance as _distance  # pyright: ignore[reportMissingTypeStubs]

from cmdgpu.clustering import (
    AFFINITIES,
    Clustering,
    absolute_correlation,
    check_stopping_rule,
    cluster_sample,
    clustering_bytes,
    moving_rows,
)
from cmdgpu.errors import CmdgpuWarning, UsageError
from cmdgpu.notation import F64

BOTH = list(AFFINITIES)
hierarchy: Any = _hierarchy  # SciPy ships no types
distance: Any = _distance


def cluster(
    sample_kt: F64, n_modes: int | None = None, threshold: float | None = None, affinity: str = "abs-corr"
) -> Clustering:
    return cluster_sample(sample_kt, n_modes=n_modes, threshold=threshold, affinity=affinity)


def naive_correlation(sample_kt: F64) -> F64:
    """|corr| by the textbook, in float64."""
    centred = sample_kt - sample_kt.mean(axis=1, keepdims=True)
    unit = centred / np.linalg.norm(centred, axis=1, keepdims=True)
    return np.abs(unit @ unit.T)


def naive_complete_linkage(distance: F64, threshold: float) -> list[list[int]]:
    """Merge the two closest clusters, farthest members counting, while they are within the threshold."""
    clusters = [[i] for i in range(len(distance))]
    while len(clusters) > 1:
        pairs = [
            (max(distance[i, j] for i in a for j in b), x, y)
            for x, a in enumerate(clusters)
            for y, b in enumerate(clusters)
            if x < y
        ]
        height, x, y = min(pairs)
        if height > threshold:
            break
        clusters[x] += clusters.pop(y)
    return clusters


def partition(labels: Any) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(labels == m).tolist()) for m in np.unique(labels) if m >= 0}


def planted(sizes: list[int], n_snapshots: int, noise: float, seed: int = 0) -> tuple[F64, Any]:
    """Rows a r_m + b + noise in random order, signs and scales mixed; and the mode each was planted in."""
    random = np.random.default_rng(seed)
    profiles = np.linalg.qr(random.standard_normal((n_snapshots, len(sizes) + 1)))[0].T
    profiles = profiles[1:] - profiles[1:].mean(axis=1, keepdims=True)
    mode_k = random.permutation(np.repeat(np.arange(len(sizes)), sizes))
    rows = profiles[mode_k] + noise * random.standard_normal((len(mode_k), n_snapshots)) / n_snapshots**0.5
    a, b = random.uniform(0.5, 4, len(mode_k)), random.uniform(-9, 9, len(mode_k))
    return (a * random.choice([-1, 1], len(mode_k)))[:, None] * rows + b[:, None], mode_k


# ---- which rows belong together ---------------------------------------------------------------------------


@pytest.mark.parametrize("affinity", BOTH)
@pytest.mark.parametrize("rule", ["n_modes", "threshold"])
def test_planted_modes_are_found(affinity: str, rule: str) -> None:
    sample, mode_k = planted([40, 25, 12, 5], 30, 0.05)
    cut: dict[str, Any] = (
        {"n_modes": 4} if rule == "n_modes" else {"threshold": 0.3 if affinity == "abs-corr" else 1.2}
    )
    found = cluster(sample, **cut, affinity=affinity)
    assert found.n_modes == 4
    assert partition(found.labels) == partition(mode_k)


@pytest.mark.parametrize("threshold", [0.01, 0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_every_pair_of_a_cluster_is_within_the_threshold(threshold: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    sample = np.cumsum(random.standard_normal((120, 12)), axis=1)
    found = cluster(sample, threshold=threshold)
    corr = naive_correlation(sample)
    for m in range(found.n_modes):
        members = np.flatnonzero(found.labels == m)
        assert corr[np.ix_(members, members)].min() >= 1 - threshold - 1e-12
    assert (found.labels >= 0).all()


@pytest.mark.parametrize("affinity", BOTH)
@pytest.mark.parametrize("seed", range(4))
def test_clusters_are_those_of_complete_linkage(affinity: str, seed: int) -> None:
    sample = np.cumsum(np.random.default_rng(seed).standard_normal((24, 9)), axis=1)
    corr = naive_correlation(sample)
    distance = 1 - corr
    if affinity == "corr-profile":
        distance = np.linalg.norm(corr[:, None] - corr[None], axis=2)
    height = 0.0
    for threshold in np.quantile(distance[np.triu_indices(24, 1)], [0.02, 0.2, 0.6]):
        expected = naive_complete_linkage(distance, float(threshold))
        found = cluster(sample, threshold=float(threshold), affinity=affinity)
        assert partition(found.labels) == {frozenset(members) for members in expected}
        by_number = cluster(sample, n_modes=len(expected), affinity=affinity)
        assert partition(by_number.labels) == partition(found.labels)
        assert found.linkage.shape == (23, 4)
        height = float(found.linkage[-1, 2])
    assert height == pytest.approx(float(distance.max()), abs=1e-9), "the largest distance of all"


@given(seed=st.integers(0, 10**6), n_modes=st.integers(1, 30))
def test_no_more_modes_than_asked_for(seed: int, n_modes: int) -> None:
    sample = np.random.default_rng(seed).standard_normal((20, 5))
    if n_modes > 20:
        with pytest.warns(CmdgpuWarning, match="20 distinct profiles, fewer than"):
            assert cluster(sample, n_modes).n_modes == 20
    else:
        assert cluster(sample, n_modes).n_modes == n_modes


@pytest.mark.parametrize("affinity", BOTH)
def test_a_threshold_decides_alone(affinity: str) -> None:
    sample, _ = planted([10, 10, 10], 20, 0.02)
    with_both = cluster(sample, n_modes=1, threshold=0.3, affinity=affinity)
    assert np.array_equal(with_both.labels, cluster(sample, threshold=0.3, affinity=affinity).labels)
    assert with_both.n_modes == 3


@pytest.mark.parametrize("affinity", BOTH)
@pytest.mark.parametrize("cut", [{"n_modes": 10}, {"threshold": 0.0}], ids=repr)
def test_affine_images_of_one_profile_are_one_mode(affinity: str, cut: dict[str, Any]) -> None:
    """Duplicated, negated, scaled and shifted rows have distance 0 and merge first."""
    random = np.random.default_rng(1)
    profiles = random.standard_normal((4, 16))
    which = random.permutation(np.repeat(np.arange(4), [9, 7, 5, 2]))
    a, b = random.choice([-3.0, -1.0, 1.0, 0.7], 23), random.choice([0.0, 5.0, -0.3], 23)
    sample = a[:, None] * profiles[which] + b[:, None]
    if "n_modes" in cut:
        with pytest.warns(CmdgpuWarning, match="4 distinct profiles, fewer than the 10 modes"):
            found = cluster(sample, **cut, affinity=affinity)
    else:
        found = cluster(sample, **cut, affinity=affinity)
    assert found.n_modes == 4
    assert partition(found.labels) == partition(which)


def test_equidistant_rows_cannot_be_told_apart() -> None:
    """Ten rows of which every two are as far: four clusters cannot form, fewer do."""
    sample = np.zeros((10, 16))
    sample[np.arange(10), np.arange(10)] = 1.0
    with pytest.warns(CmdgpuWarning, match="1 distinct profiles, fewer than the 4"):
        found = cluster(sample, n_modes=4)
    assert found.n_modes == 1


@pytest.mark.parametrize("affinity", BOTH)
@given(seed=st.integers(0, 10**6))
def test_scale_shift_sign_and_order_of_snapshots_change_nothing(affinity: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    sample = np.cumsum(random.standard_normal((30, 8)), axis=1)
    base = cluster(sample, n_modes=5, affinity=affinity)
    a = random.choice([-2.0, 0.25, 1.0, -8.0], 30)
    for other in (
        a[:, None] * sample,
        sample + random.integers(-4, 4, 30)[:, None],
        sample[:, random.permutation(8)],
    ):
        found = cluster(other, n_modes=5, affinity=affinity)
        assert np.array_equal(found.labels, base.labels)
        assert np.array_equal(found.references, base.references)


def test_rows_whose_mean_is_a_million_times_their_movement() -> None:
    sample, mode_k = planted([20, 15, 10], 40, 0.02)
    movement = sample.std(axis=1, keepdims=True)
    shifted = sample / movement + 1e6
    found = cluster(shifted, n_modes=3)
    assert partition(found.labels) == partition(mode_k)
    assert np.array_equal(found.labels, cluster(sample, n_modes=3).labels)


def research_code(sample_kt: F64, n_modes: int) -> tuple[Any, list[int]]:
    """The published research code's clustering, restated: Euclidean distance between rows of |corr|, complete
    linkage, maxclust; modes by falling size; the row with the largest mean |corr| of each.
    """
    corr = np.abs(np.corrcoef(sample_kt))
    tree = hierarchy.linkage(distance.pdist(corr), method="complete")
    cluster_k = hierarchy.fcluster(tree, n_modes, criterion="maxclust")
    modes = [np.flatnonzero(cluster_k == c) for c in np.unique(cluster_k)]
    references = [int(m[np.argmax(corr[np.ix_(m, m)].mean(axis=1).round(9))]) for m in modes]
    order = sorted(range(len(modes)), key=lambda i: (-len(modes[i]), references[i]))
    label_k = np.empty(len(corr), dtype=int)
    for number, i in enumerate(order):
        label_k[modes[i]] = number
    return label_k, [references[i] for i in order]


@pytest.mark.parametrize("n_modes", [1, 2, 5, 10])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["walks", "planted"])
def test_profile_distance_clusters_as_the_research_code_does(kind: str, seed: int, n_modes: int) -> None:
    sample = np.cumsum(np.random.default_rng(seed).standard_normal((300, 25)), axis=1)
    if kind == "planted":
        sample, _ = planted([150, 80, 40, 20, 10], 25, 0.6, seed)
    found = cluster(sample, n_modes, affinity="corr-profile")
    label_k, references = research_code(sample, n_modes)
    assert found.labels.tolist() == label_k.tolist()
    assert found.references.tolist() == references


# ---- numbers and references -------------------------------------------------------------------------------


@pytest.mark.parametrize("affinity", BOTH)
@pytest.mark.parametrize("seed", range(5))
def test_modes_are_numbered_by_size_ties_by_the_earlier_reference(affinity: str, seed: int) -> None:
    sample, _ = planted([6, 6, 3, 3, 3, 1], 25, 0.05, seed)
    found = cluster(sample, n_modes=6, affinity=affinity)
    sizes = [int((found.labels == m).sum()) for m in range(6)]
    assert sizes == [6, 6, 3, 3, 3, 1]
    order = [(-size, int(row)) for size, row in zip(sizes, found.references, strict=True)]
    assert order == sorted(order)
    assert found.labels.dtype == np.int16
    assert found.references.dtype == np.int64


@pytest.mark.parametrize("affinity", BOTH)
@pytest.mark.parametrize("seed", range(5))
def test_a_reference_is_the_member_with_the_largest_sum_of_correlations(affinity: str, seed: int) -> None:
    sample = np.cumsum(np.random.default_rng(seed).standard_normal((80, 10)), axis=1)
    found = cluster(sample, n_modes=6, affinity=affinity)
    corr = naive_correlation(sample)
    for m, reference in enumerate(found.references.tolist()):
        members = np.flatnonzero(found.labels == m)
        sums = corr[np.ix_(members, members)].sum(axis=1)
        assert reference == members[int(sums.round(9).argmax())]


def test_members_that_are_equally_central_give_the_earliest() -> None:
    profile = np.random.default_rng(0).standard_normal(12)
    other = np.random.default_rng(1).standard_normal(12)
    sample = np.stack([other, 2 * profile + 1, profile, -profile, 3 * other])
    found = cluster(sample, n_modes=2)
    assert found.labels.tolist() == [1, 0, 0, 0, 1]
    assert found.references.tolist() == [1, 0], "of two rows, the first; of three images of one, the first"


# ---- odd rows -------------------------------------------------------------------------------------------


def test_rows_that_do_not_move_or_are_not_finite_stay_out() -> None:
    sample, mode_k = planted([10, 6], 15, 0.02)
    odd = np.full((5, 15), 0.1)
    odd[1, 3] = np.nan
    odd[2, 0] = np.inf
    odd[3] = -np.inf
    odd[4] = 0.0
    mixed = np.concatenate([odd[:2], sample[:8], odd[2:], sample[8:]])
    found = cluster(mixed, n_modes=2)
    assert found.labels[[0, 1, 10, 11, 12]].tolist() == [-1, -2, -2, -2, -1]
    at = np.r_[2:10, 13:21]
    plain = cluster(sample, n_modes=2)
    assert np.array_equal(found.labels[at], plain.labels)
    assert np.array_equal(found.references, at[plain.references]), "references count in the whole sample"
    assert found.linkage.shape == (15, 4)
    assert partition(plain.labels) == partition(mode_k)


def test_a_row_of_one_tenth_is_constant_though_its_sum_of_squares_rounds() -> None:
    rows = np.full((3, 1000), np.float64(np.float32(0.1)))
    rows[2, 5] = np.nextafter(np.float32(0.1), np.float32(1))
    assert moving_rows(rows)[1].tolist() == [-1, -1, 0]


def test_the_limits_of_float32_decide_what_moves() -> None:
    line = np.array([-1.0, 0.0, 1.0, 0.0])
    rows = np.stack([1e-20 * line, 1e-18 * line, line, 1e18 * line, 1e20 * line])
    assert moving_rows(rows)[1].tolist() == [-1, 0, 0, 0, -2]


@pytest.mark.parametrize("cut", [{"n_modes": 3}, {"threshold": 0.1}], ids=repr)
@pytest.mark.parametrize(
    "rows",
    [np.full((4, 6), 0.1), np.arange(5.0).reshape(5, 1), np.full((2, 3), np.nan), np.empty((0, 4))],
    ids=["constant", "one snapshot", "not finite", "none"],
)
def test_where_nothing_moves_there_is_no_mode(rows: F64, cut: dict[str, Any]) -> None:
    with pytest.warns(CmdgpuWarning, match=f"none of the {len(rows)} sampled rows moves") as caught:
        found = cluster(rows, **cut)
    assert len(caught) == 1
    assert (found.n_modes, found.references.shape, found.linkage.shape) == (0, (0,), (0, 4))
    assert (found.labels < 0).all()


@pytest.mark.parametrize("affinity", BOTH)
def test_one_moving_row_is_one_mode(affinity: str) -> None:
    rows = np.array([[5.0, 5.0, 5.0], [1.0, 2.0, 4.0]])
    found = cluster(rows, threshold=0.1, affinity=affinity)
    assert (found.labels.tolist(), found.references.tolist()) == ([-1, 0], [1])
    with pytest.warns(CmdgpuWarning, match="1 distinct profiles"):
        assert cluster(rows, n_modes=2, affinity=affinity).n_modes == 1
    assert cluster(rows, n_modes=1, affinity=affinity).n_modes == 1


def test_with_two_snapshots_all_that_moves_is_one_profile() -> None:
    rows = np.random.default_rng(0).standard_normal((20, 2))
    with pytest.warns(CmdgpuWarning, match="1 distinct profiles"):
        found = cluster(rows, n_modes=5)
    assert found.labels.tolist() == [0] * 20
    assert found.references.tolist() == [0]


# ---- numbers --------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10**6), offset=st.sampled_from([0.0, 1.0, 1e3, 1e6]))
def test_absolute_correlation_is_symmetric_within_one_and_right(seed: int, offset: float) -> None:
    sample = np.random.default_rng(seed).standard_normal((15, 20)) + offset
    sample[3] = offset
    corr = absolute_correlation(sample)
    assert np.array_equal(corr, corr.T)
    assert (np.diag(corr) == [1, 1, 1, 0, *[1] * 11]).all()
    assert (corr[3] == 0).all()
    assert corr.max() <= 1
    keep = np.delete(np.arange(15), 3)
    expected = np.abs(np.corrcoef((sample - offset)[keep]))
    assert np.abs(corr[np.ix_(keep, keep)] - expected).max() < 1e-9


def test_distances_are_the_ones_the_affinities_name() -> None:
    corr = naive_correlation(np.random.default_rng(0).standard_normal((30, 6)))
    assert np.allclose(AFFINITIES["abs-corr"](corr), 1 - corr, atol=1e-15)
    direct = np.linalg.norm(corr[:, None] - corr[None], axis=2)
    assert np.allclose(AFFINITIES["corr-profile"](corr), direct, atol=1e-6)


# ---- refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_modes", "threshold"),
    [(0, None), (-3, None), (None, None), (32768, None), (5, -0.1), (5, float("nan")), (5, float("inf"))],
)
def test_a_rule_that_cuts_nothing_is_refused(n_modes: int | None, threshold: float | None) -> None:
    with pytest.raises(UsageError):
        check_stopping_rule(n_modes, threshold)
    with pytest.raises(UsageError):
        cluster(np.random.default_rng(0).standard_normal((5, 5)), n_modes, threshold)


def test_rules_that_cut_something_are_taken() -> None:
    for n_modes, threshold in ((1, None), (32767, None), (None, 0.0), (0, 0.5)):
        check_stopping_rule(n_modes, threshold)


def test_an_unknown_affinity_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"no affinity named 'corr'; have: abs-corr, corr-profile"):
        cluster(np.zeros((2, 2)), 1, affinity="corr")


@pytest.mark.parametrize("affinity", BOTH)
def test_the_memory_of_clustering_is_told_beforehand(affinity: str) -> None:
    sample = np.random.default_rng(0).standard_normal((600, 10))
    cluster(sample[:50], 3, affinity=affinity)
    tracemalloc.start()
    cluster(sample, 5, affinity=affinity)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= clustering_bytes(600), f"{peak / 600**2 / 8:.2f} matrices"
