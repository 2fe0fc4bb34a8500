"""|corr| between the sampled rows, and the order in which the modes are blocks of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cmdgpu.clustering import moving_rows
from cmdgpu.indexing import evenly
from cmdgpu.notation import F64, I64

if TYPE_CHECKING:
    from cmdgpu.decomposition import CMD


@dataclass(frozen=True)
class Correlations:
    """K' sampled rows that move, or those of them that are shown; none where nothing moves."""

    n_moving: int
    """Sampled rows that move, shown or not."""
    corr_kk: F64
    """(K', K') |corr|, symmetric, in the order of the rows of the model."""
    order: I64
    """(K',) positions in it by mode, within a mode by falling sum of |corr| to the rows of the mode."""
    mode_k: I64
    """(K',) their modes, in that order: ascending."""
    edges: I64
    """(M' + 1,) where the blocks of the M' modes that are shown begin, and K'; of no row only 0."""

    @property
    def ordered_kk(self) -> F64:
        """(K', K') |corr| in the order of the modes: blocks along the diagonal."""
        return self.corr_kk[np.ix_(self.order, self.order)]

    @property
    def block_modes(self) -> I64:
        """(M',) the mode of each block."""
        return self.mode_k[self.edges[:-1]]


def correlations(cmd: CMD, at_most: int = 1000) -> Correlations:
    """|corr| over time of the moving sampled rows of a fitted CMD.

    Of more than ``at_most`` rows so many are shown, evenly spread over the sample. Constant and non-finite
    rows have no correlation and are left out.
    """
    labels_k = cmd.sample_labels_
    moving = np.flatnonzero(labels_k >= 0)
    shown = moving[evenly(len(moving), at_most)]
    z_kt, _ = moving_rows(cmd.sample_[shown].astype(np.float64))
    label_k = labels_k[shown].astype(np.int64)
    corr_kk = np.minimum(np.abs(z_kt @ z_kt.T), 1.0)
    within_k = (corr_kk * (label_k[:, None] == label_k[None, :])).sum(axis=1)
    order = np.lexsort((-within_k, label_k))
    mode_k = label_k[order]
    return Correlations(
        n_moving=len(moving),
        corr_kk=corr_kk,
        order=order,
        mode_k=mode_k,
        edges=np.append(np.flatnonzero(np.diff(mode_k, prepend=-1)), len(mode_k)),
    )
