"""|corr| of the sampled rows -> complete linkage -> modes -> a reference row per mode (Algorithm 1, 1-4)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, cast

import numpy as np

from cmdgpu.errors import CmdgpuWarning, UsageError
from cmdgpu.notation import CONSTANT, F64, I16, I64, MAX_MODES, NON_FINITE, BoolArray
from cmdgpu.profiles import centred
from cmdgpu.registry import Registry

_FLOAT32 = np.finfo(np.float32)
_SAME: Final = 1e-12
"""Distances below are rounding: rows that are affine images of each other."""


@dataclass(frozen=True)
class Clustering:
    labels: I16
    """(K,) mode of every sampled row; -1 constant, -2 non-finite: left out of the clustering."""
    references: I64
    """(M,) position in the sample of each mode's reference row. M = 0 when no sampled row moves."""
    linkage: F64
    """(K' - 1, 4) SciPy linkage of the K' moving rows, in sample order."""

    @property
    def n_modes(self) -> int:
        return len(self.references)


def moving_rows(sample_kt: F64) -> tuple[F64, I16]:
    """Centred unit-norm rows (K, T), and why a row has none: 0 moving, -1 constant, -2 non-finite.

    The limits of float32 apply, so that a row is constant here exactly when it is in the pass.
    """
    finite = cast(BoolArray, np.all(np.isfinite(sample_kt), axis=1))[:, None]
    x = centred(np.where(finite, sample_kt, 0.0))
    ss = np.einsum("kt,kt->k", x, x)
    why = np.zeros(len(sample_kt), dtype=np.int16)
    why[ss < float(_FLOAT32.tiny)] = CONSTANT
    why[~finite[:, 0] | (ss > float(_FLOAT32.max))] = NON_FINITE
    norm = np.sqrt(np.where(why == 0, ss, 1.0))
    return np.where((why == 0)[:, None], x / norm[:, None], 0.0), why


def absolute_correlation(sample_kt: F64) -> F64:
    """|corr| between rows, (K, K), exactly symmetric, diagonal exactly 1; 0 for rows that do not move.

    Summed by einsum and not by BLAS, whose bits depend on the number of threads: a near-tie between two
    possible references must not.
    """
    z_kt, why = moving_rows(sample_kt)
    corr = np.clip(np.abs(np.einsum("kt,jt->kj", z_kt, z_kt)), 0.0, 1.0)
    np.fill_diagonal(corr, np.where(why == 0, 1.0, 0.0))
    return corr


# ---- affinities -----------------------------------------------------------------------------------------

_Distance: TypeAlias = Callable[[F64], F64]
AFFINITIES: Final[Registry[_Distance]] = Registry("affinity")


def _abs_corr(corr: F64) -> F64:
    """1 - |corr|: a cut at t makes |corr| >= 1 - t for every pair inside a cluster, Eq. 6 on the sample."""
    return 1.0 - corr


def _corr_profile(corr: F64) -> F64:
    """Euclidean distance between rows of the |corr| matrix, by one product and not K^2 differences."""
    gram = np.einsum("ik,jk->ij", corr, corr) if len(corr) <= 2048 else corr @ corr.T
    both = np.diag(gram)[:, None] + np.diag(gram)[None, :]
    # in place from here: beside |corr| two matrices are held, as ``clustering_bytes`` says
    gram *= -2.0
    gram += both
    # what cancels leaves up to 4 eps of the terms (measured, K to 2500): equal profiles must have distance 0
    both *= 64 * np.finfo(np.float64).eps
    gram[gram <= both] = 0.0
    return np.sqrt(gram, out=gram)


AFFINITIES.add("abs-corr", _abs_corr)
AFFINITIES.add("corr-profile", _corr_profile)


# ---- modes ----------------------------------------------------------------------------------------------


def check_stopping_rule(n_modes: int | None, threshold: float | None) -> None:
    """Raises UsageError for an M or a t that cuts nothing."""
    if threshold is not None:
        if not threshold >= 0 or not np.isfinite(threshold):
            raise UsageError(
                f"a threshold of {threshold}", hint="it is a distance: 0 or more; 0.05 is strict"
            )
    elif n_modes is None or not 1 <= n_modes <= MAX_MODES:
        raise UsageError(f"{n_modes} modes", hint=f"give 1 to {MAX_MODES}, or a threshold")


def cluster_sample(
    sample_kt: F64, *, n_modes: int | None, threshold: float | None, affinity: str
) -> Clustering:
    """Modes of the sampled rows by complete linkage.

    sample_kt  (K, T) float64 values
    n_modes    cut where no more than this many clusters form; ignored when a threshold is given
    threshold  cut at this cophenetic distance

    Modes are numbered by falling size, ties by the earlier reference. A mode's reference is the row with the
    largest sum of |corr| inside the mode (Algorithm 1, line 4), ties by the earlier row. Fewer distinct
    profiles than ``n_modes`` give fewer modes and a warning; no moving row gives M = 0 and a warning.
    """
    return grow_tree(sample_kt, affinity).cut(n_modes=n_modes, threshold=threshold)


def grow_tree(sample_kt: F64, affinity: str) -> Tree:
    """The linkage of the (K, T) sampled rows: what clusterings of any number of modes have in common."""
    distance_of = AFFINITIES[affinity]
    _, why = moving_rows(sample_kt)
    moving = np.flatnonzero(why == 0)
    corr: F64 = np.empty((0, 0))
    linkage: F64 = np.empty((0, 4))
    if len(moving):
        corr = absolute_correlation(sample_kt[moving])
    if len(moving) > 1:
        distance = distance_of(corr)
        distance[distance < _SAME] = 0.0
        np.fill_diagonal(distance, 0.0)
        linkage = _complete_linkage(distance)
    return Tree(why, moving, corr, linkage)


@dataclass(frozen=True)
class Tree:
    """A sample's linkage, to be cut as often as one likes."""

    why: I16
    """(K,) 0 for a row that moves, else -1 constant, -2 non-finite."""
    moving: I64
    """(K',) positions of the rows that move."""
    corr: F64
    """(K', K') |corr| of them."""
    linkage: F64
    """(K' - 1, 4)"""

    def cut(self, *, n_modes: int | None, threshold: float | None) -> Clustering:
        """As ``cluster_sample`` cuts."""
        check_stopping_rule(n_modes, threshold)
        labels = self.why.copy()
        if not len(self.moving):
            warnings.warn(
                f"none of the {len(labels)} sampled rows moves: no modes, every row is its own mean",
                CmdgpuWarning,
                stacklevel=2,
            )
            return Clustering(labels, np.empty(0, np.int64), self.linkage)
        clusters = np.ones(len(self.moving), dtype=np.int64)
        if len(self.moving) > 1:
            rule, cut = ("maxclust", n_modes) if threshold is None else ("distance", threshold)
            clusters = np.asarray(_hierarchy().fcluster(self.linkage, cut, criterion=rule), dtype=np.int64)
        modes = [np.flatnonzero(clusters == c) for c in np.unique(clusters)]
        references = [int(members[_central(self.corr, members)]) for members in modes]
        order = sorted(range(len(modes)), key=lambda m: (-len(modes[m]), references[m]))
        if len(order) > MAX_MODES:
            raise UsageError(f"a threshold of {threshold} leaves {len(order)} modes", hint="raise it")
        for number, m in enumerate(order):
            labels[self.moving[modes[m]]] = number
        if threshold is None and n_modes is not None and len(order) < n_modes:
            warnings.warn(
                f"the sample has {len(order)} distinct profiles, fewer than the {n_modes} modes asked for",
                CmdgpuWarning,
                stacklevel=2,
            )
        return Clustering(labels, self.moving[[references[m] for m in order]], self.linkage)


def _complete_linkage(distance_kk: F64) -> F64:
    from scipy.spatial.distance import squareform  # pyright: ignore[reportMissingTypeStubs]

    return np.asarray(_hierarchy().linkage(squareform(distance_kk, checks=False), method="complete"))


def _hierarchy() -> Any:
    """SciPy's, without types: a third of a second to import, which who only reads results does without."""
    import scipy.cluster.hierarchy  # pyright: ignore[reportMissingTypeStubs]

    return scipy.cluster.hierarchy


def _central(corr: F64, members: I64) -> int:
    """Position, among the members, of the row closest to all; sums that differ by rounding are a tie."""
    sums = cast(F64, corr[np.ix_(members, members)].sum(axis=1))
    return int(np.argmax(np.round(sums, 10)))


def clustering_bytes(n_samples: int, n_snapshots: int = 0) -> int:
    """Peak memory of clustering in float64.

    |corr|, distances, their condensed form and SciPy's copy, masks; the sample, shifted, centred and scaled.
    """
    return 27 * n_samples * n_samples + 76 * n_samples * n_snapshots
