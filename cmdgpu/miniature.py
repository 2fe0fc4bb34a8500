"""A decomposition of a few thousand rows in memory, in float64: what chance and quality are measured with.

The definitions of the pass, without its blocks: the same modes, the same lines, no tile and no device.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

from cmdgpu.clustering import Clustering, cluster_sample, moving_rows
from cmdgpu.errors import CmdgpuWarning
from cmdgpu.notation import CONSTANT, F64, I64, BoolArray
from cmdgpu.profiles import Objective, ProfileAt, References, sample_components, sample_fits


@dataclass(frozen=True)
class Rule:
    """How a sample becomes references; see ``CMD``."""

    n_modes: int | None
    threshold: float | None
    affinity: str
    references: References = "row"
    refine: int = 0
    objective: Objective = "energy"


def references_of(
    sample_kt: F64, rule: Rule, others_nt: F64 | None = None, kept_t: BoolArray | None = None
) -> F64:
    """(M, T) references of the (K, T) sample; none where nothing moves.

    Found at the snapshots ``kept_t`` (all of them when None), given at all. Refinement is of the sample and
    of the ``others_nt`` (n, T) together. Fewer distinct rows give fewer modes, and nobody is warned: this is
    not the fit that was asked for.
    """
    kept = np.ones(sample_kt.shape[1], dtype=np.bool_) if kept_t is None else kept_t
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CmdgpuWarning)
        found = cluster_sample(
            sample_kt[:, kept], n_modes=rule.n_modes, threshold=rule.threshold, affinity=rule.affinity
        )
    R_mt = sample_kt[found.references]
    if (rule.references == "row" and not rule.refine) or not found.n_modes:
        return R_mt
    return _profiles(sample_kt, others_nt, found, rule, kept)


def _profiles(sample_kt: F64, others_nt: F64 | None, found: Clustering, rule: Rule, kept_t: BoolArray) -> F64:
    """First principal components in place of rows, and where they lie at the snapshots that were not kept."""
    rows_nt, labels_n = sample_kt, found.labels
    kept_nt = rows_nt[:, kept_t].astype(np.float32)
    R_mt = kept_nt[found.references]
    if rule.references == "component":
        R_mt = sample_components(kept_nt, labels_n, found.references, rule.objective)
    if rule.refine and others_nt is not None:
        rows_nt = np.concatenate([sample_kt, others_nt])
        kept_nt = rows_nt[:, kept_t].astype(np.float32)
    for _ in range(rule.refine):
        nearest = follow(rows_nt[:, kept_t], R_mt.astype(np.float64))
        labels_n = np.where(nearest.correlation != 0.0, nearest.mode, CONSTANT).astype(np.int16)
        R_mt = sample_components(kept_nt, labels_n, found.references, rule.objective)
    at_all = np.empty((len(R_mt), len(kept_t)))
    at_all[:, kept_t] = R_mt
    fits = sample_fits(kept_nt, labels_n, R_mt)
    for t in np.flatnonzero(~kept_t).tolist():
        profile = ProfileAt(len(R_mt), rule.objective)
        profile.add(labels_n, *fits, rows_nt[:, t])
        at_all[:, t] = profile.values()
    return at_all


@dataclass(frozen=True)
class Followed:
    """Rows and the lines w ~ a r + b on the references they follow."""

    mode: I64
    """(n,) argmax of |corr|, the lowest on ties; 0 for a row that does not move."""
    correlation: F64
    """(n,) signed; 0 for a row that does not move."""
    a: F64
    b: F64
    energy: F64
    """(n,) sum over t of (w - mean w)^2."""

    @property
    def residual(self) -> F64:
        """(n,) sum over t of (w - a r - b)^2."""
        return self.energy * (1.0 - self.correlation**2)


def follow(W_nt: F64, R_mt: F64) -> Followed:
    """The reference that each row follows best and the least-squares line on it (Algorithm 1, 5; Eq. 10).

    W_nt is (n, T) and finite, R_mt (M, T). Without references every row is its own mean. Summed by einsum,
    whose bits do not depend on threads.
    """
    z_nt, _ = moving_rows(W_nt)
    mean_n, energy_n = _moments(W_nt)
    if not len(R_mt):
        nothing = np.zeros(len(W_nt))
        return Followed(nothing.astype(np.int64), nothing, nothing, mean_n, energy_n)
    z_mt, _ = moving_rows(R_mt)
    mean_m, energy_m = _moments(R_mt)
    corr_nm = np.einsum("nt,mt->nm", z_nt, z_mt)
    mode_n = np.argmax(np.abs(corr_nm), axis=1)
    correlation_n = np.clip(corr_nm[np.arange(len(W_nt)), mode_n], -1.0, 1.0)
    norm_m = np.sqrt(energy_m)[mode_n]
    a_n = np.divide(correlation_n * np.sqrt(energy_n), norm_m, out=np.zeros(len(W_nt)), where=norm_m > 0)
    return Followed(mode_n, correlation_n, a_n, mean_n - a_n * mean_m[mode_n], energy_n)


def _moments(W_nt: F64) -> tuple[F64, F64]:
    """Mean and sum of squared deviations of each row, behind its first value."""
    moved_nt = W_nt - W_nt[:, :1]
    mean_n = moved_nt.mean(axis=1)
    moved_nt -= mean_n[:, None]
    return W_nt[:, 0] + mean_n, np.einsum("nt,nt->n", moved_nt, moved_nt)
