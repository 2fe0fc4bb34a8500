"""The paper's two algorithms as a script: everything in RAM, plain NumPy (arXiv 2212.09040).

What a reader of the paper writes: the whole matrix, its centred copy, the whole N x M matrix of
correlations, then one least-squares problem per mode. Row-major float32, float64 for the sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.cluster.hierarchy  # pyright: ignore[reportMissingTypeStubs]
import scipy.spatial.distance  # pyright: ignore[reportMissingTypeStubs]
from numpy.typing import NDArray

hierarchy: Any = scipy.cluster.hierarchy  # SciPy ships no types
squareform: Any = scipy.spatial.distance.squareform

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Decomposition:
    mode: I64
    a: F32
    b: F32
    references: F32


def find_references(W_nt: F32, n_samples: int, n_modes: int, seed: int) -> F32:
    """Algorithm 1, lines 2 to 4: sample, cluster by |correlation|, the row closest to all of its mode."""
    rows = np.random.default_rng(seed).choice(len(W_nt), min(n_samples, len(W_nt)), replace=False)
    sample = W_nt[np.sort(rows)].astype(np.float64)
    sample = sample[sample.std(axis=1) > 0]
    corr = np.abs(np.corrcoef(sample))
    distance = 1.0 - np.clip((corr + corr.T) / 2, 0.0, 1.0)
    np.fill_diagonal(distance, 0.0)
    tree = hierarchy.linkage(squareform(distance, checks=False), method="complete")
    cluster: I64 = hierarchy.fcluster(tree, n_modes, criterion="maxclust").astype(np.int64)
    references: list[int] = []
    for c in np.unique(cluster):
        members = np.flatnonzero(cluster == c)
        closeness = corr[np.ix_(members, members)].sum(axis=1)
        references.append(int(members[np.argmax(closeness)]))
    return sample[references].astype(np.float32)


def assign(W_nt: F32, R_mt: F32) -> I64:
    """Line 5: every row joins the reference it correlates with most, by magnitude."""
    centred = W_nt - W_nt.mean(axis=1, keepdims=True)
    centred /= np.maximum(np.sqrt(np.einsum("nt,nt->n", centred, centred)), np.float32(1e-30))[:, None]
    z_mt = R_mt - R_mt.mean(axis=1, keepdims=True)
    z_mt /= np.linalg.norm(z_mt, axis=1, keepdims=True)
    return np.abs(centred @ z_mt.T).argmax(axis=1)


def fit(W_nt: F32, R_mt: F32, mode: I64) -> tuple[F32, F32]:
    """Eq. 10, mode by mode: [A B] = W_m w^T (w w^T)^-1 with w = [reference; 1]."""
    lines = np.empty((len(W_nt), 2), dtype=np.float32)
    for m, reference in enumerate(R_mt.astype(np.float64)):
        members = np.flatnonzero(mode == m)
        w = np.stack([reference, np.ones_like(reference)])
        solve = w.T @ np.linalg.inv(w @ w.T)
        lines[members] = W_nt[members] @ solve.astype(np.float32)
    return lines[:, 0], lines[:, 1]


def decompose(W_nt: F32, n_samples: int, n_modes: int, seed: int = 0) -> Decomposition:
    """Algorithm 2."""
    R_mt = find_references(W_nt, n_samples, n_modes, seed)
    mode = assign(W_nt, R_mt)
    a, b = fit(W_nt, R_mt, mode)
    return Decomposition(mode, a, b, R_mt)
