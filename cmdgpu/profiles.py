"""Profiles that are no rows: the first principal component of the rows of a mode.

With the labels fixed, no profile explains the rows of a mode better than the eigenvector z of the largest
eigenvalue of

    G_m = sum_{i in m} v_i x_i x_i^T,     x_i = w_i - mean(w_i)

with v_i = 1 for the least squared error of all rows together (``energy``: rows that move far count most), and
v_i = 1 / ||x_i||^2 for the largest mean corr^2 (``correlation``: every row counts alike).

Such a reference is ``size * z``: centred, so that b is the mean of the row, and of the size ||x|| of the row
the paper would have chosen, so that a means what it means there. Its sign is that of its correlation with
that row.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, Literal, TypeAlias

import numpy as np

from cmdgpu.errors import UsageError
from cmdgpu.notation import F32, F64, I16, I64

References: TypeAlias = Literal["row", "component"]
Objective: TypeAlias = Literal["energy", "correlation"]
REFERENCES: Final[tuple[References, ...]] = ("row", "component")
OBJECTIVES: Final[tuple[Objective, ...]] = ("energy", "correlation")
MAX_ROUNDS: Final = 1000
"""Of refinement: each is a pass."""
_SIZES: Final = (2.0**-62, 2.0**62)
"""Sizes whose square float32 holds, with room for rounding; of rows beyond them the scale of a is another."""


def check_references(references: str, refine: int, objective: str) -> None:
    """Raises UsageError for what no reference can be made by."""
    for what, name, known in (
        ("references", references, REFERENCES),
        ("an objective", objective, OBJECTIVES),
    ):
        if name not in known:
            raise UsageError(f"{what} cannot be {name!r}", hint=f"have: {', '.join(known)}")
    if not 0 <= refine <= MAX_ROUNDS:
        raise UsageError(f"{refine} rounds of refinement", hint=f"each is a pass: give 0 to {MAX_ROUNDS}")


def centred(w_kt: F64) -> F64:
    """Rows (K, T) less their means, shifted by their first values first: small moves keep their digits."""
    shifted = w_kt - w_kt[:, :1]
    return shifted - shifted.mean(axis=1, keepdims=True)


def first_components(G_mtt: F64, like_mt: F32) -> tuple[F64, F32]:
    """Largest eigenvalues (M,), and references (M, T) along their eigenvectors.

    The size and the sign of a reference are those of ``like_mt``, which stays where no row was added up.
    Each eigenproblem is one thread's: LAPACK's last bits depend on how many there are.
    """
    import torch

    from cmdgpu import ops

    linalg: Any = torch.linalg
    values, R_mt = np.zeros(len(G_mtt)), like_mt.copy()

    def solve(modes: Iterable[int]) -> None:
        for m in modes:
            found, vectors = linalg.eigh(ops.as_tensor(G_mtt[m], "float64"))
            values[m] = found[-1]
            R_mt[m] = _reference(vectors[:, -1].numpy(), like_mt[m].astype(np.float64))

    moved = np.flatnonzero(np.einsum("mtt->m", G_mtt) > 0).tolist()
    ops.run_in_workers(solve, moved, torch.get_num_threads())
    return values, R_mt


def _reference(z_t: F64, like_t: F64) -> F32:
    like = centred(like_t[None])[0]
    same = float(np.einsum("t,t->", z_t, like)) or float(z_t[np.argmax(np.abs(z_t))])
    size = float(np.clip(np.sqrt(np.einsum("t,t->", like, like)), *_SIZES))
    return (np.copysign(size, same) * z_t).astype(np.float32)


def explained(G_mtt: F64, R_mt: F32) -> float:
    """sum_m z_m^T G_m z_m: what of the trace of all G_m lies along the references."""
    r = centred(R_mt.astype(np.float64))
    along = np.einsum("mt,mts,ms->m", r, G_mtt, r) / np.einsum("mt,mt->m", r, r)
    return float(along.sum())


def sample_components(sample_kt: F32, labels: I16, medoids: I64, objective: Objective) -> F32:
    """(M, T) first principal component of the sampled rows of every mode, labels (K,) as they were clustered.

    ``medoids`` (M,) are the positions of the rows that the paper takes.
    """
    x = centred(sample_kt[labels >= 0].astype(np.float64))
    if objective == "correlation":
        x /= np.sqrt(np.einsum("kt,kt->k", x, x))[:, None]
    mine = labels[labels >= 0]
    n_snapshots = sample_kt.shape[1]
    G_mtt = np.empty((len(medoids), n_snapshots, n_snapshots))
    for m in range(len(medoids)):
        rows = x[mine == m]
        G_mtt[m] = np.einsum("kt,ks->ts", rows, rows)  # and not BLAS, whose bits depend on threads
    return first_components(G_mtt, np.ascontiguousarray(sample_kt[medoids]))[1]


# ---- at other snapshots ---------------------------------------------------------------------------------


class ProfileAt:
    """The value of every profile at one more snapshot: what explains the rows of its mode best there.

        r_m = sum_{i in m} v_i a_i (w_i - b_i) / sum_{i in m} v_i a_i^2

    a least squares line through the rows instead of one through the snapshots. For the rows that a profile
    is the first component of it gives, at the snapshots that were fitted, the profile itself. Rows may come
    in any parts; those without a mode, or without a finite value at this snapshot, are left out.
    """

    def __init__(self, n_modes: int, objective: str) -> None:
        self._objective = objective
        self._above, self._below = np.zeros(n_modes), np.zeros(n_modes)

    def add(self, mode: Any, a: Any, b: Any, correlation: Any, w: Any) -> None:
        """Rows: their modes and fits, and their values w at the snapshot, (n,) each."""
        known = (np.asarray(mode) >= 0) & np.isfinite(w) & (np.asarray(a) != 0)
        mode = np.asarray(mode)[known]
        a, b, correlation, w = (np.asarray(part, np.float64)[known] for part in (a, b, correlation, w))
        weight = a if self._objective == "energy" else correlation**2 / a  # v a: ||x|| is a ||r|| / corr
        self._above += np.bincount(mode, weight * (w - b), len(self._above))
        self._below += np.bincount(mode, weight * a, len(self._below))

    def values(self) -> F64:
        """(M,) values; 0 for a mode without rows, which nothing is rebuilt from."""
        return np.divide(self._above, self._below, out=np.zeros_like(self._above), where=self._below > 0)


def sample_fits(sample_kt: F32, labels: I16, R_mt: F32) -> tuple[F64, F64, F64]:
    """a, b and correlation (K,) of sampled rows on the reference of the mode they were clustered in."""
    known = labels >= 0
    w, r = np.where(known[:, None], sample_kt.astype(np.float64), 0.0), R_mt.astype(np.float64)
    x, z, mine = centred(w), centred(r), np.where(known, labels, 0)
    d = np.einsum("kt,kt->k", x, z[mine])
    ss_r = np.einsum("mt,mt->m", z, z)[mine]
    ss_x = np.where(known, np.einsum("kt,kt->k", x, x), 1.0)
    a = d / ss_r
    return a, w.mean(axis=1) - a * r.mean(axis=1)[mine], d / np.sqrt(ss_r * ss_x)
