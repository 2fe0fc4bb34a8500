"""How far two ways of putting the same rows into classes agree."""

from __future__ import annotations

import numpy as np

from cmdgpu.notation import AnyArray


def adjusted_rand(labels_n: AnyArray, others_n: AnyArray) -> float:
    """Adjusted Rand index of two (n,) integer labellings: 1 for one partition, 0 on average for chance.

        n_uv = rows with label u here and v there,  E = sum C(n_u.) sum C(n_.v) / C(n),  C(n) = n (n - 1) / 2
        ARI  = (sum C(n_uv) - E) / ((sum C(n_u.) + sum C(n_.v)) / 2 - E)

    Rows with a negative label on either side are left out. Names of labels do not matter. Where the
    denominator is 0 (one class on both sides, n classes on both, fewer than two rows) the partitions are
    equal: 1. Counted in Python's integers: C(n) leaves int64 at n = 4.3e9.
    Raises ValueError for labellings of different length.
    """
    if len(labels_n) != len(others_n):
        raise ValueError(f"{len(labels_n)} labels beside {len(others_n)}")
    known = (labels_n >= 0) & (others_n >= 0)
    _, u_n = np.unique(labels_n[known], return_inverse=True)
    _, v_n = np.unique(others_n[known], return_inverse=True)
    n_v = int(v_n.max()) + 1 if len(v_n) else 1
    together = _pairs(np.unique(u_n.astype(np.int64) * n_v + v_n, return_counts=True)[1])
    here, there = (_pairs(np.unique(side, return_counts=True)[1]) for side in (u_n, v_n))
    n = len(u_n)
    every = n * (n - 1) // 2
    # multiplied by 2 C(n), so that both sides stay whole numbers
    numerator = 2 * (together * every - here * there)
    denominator = (here + there) * every - 2 * here * there
    return numerator / denominator if denominator else 1.0


def _pairs(counts: AnyArray) -> int:
    return sum(count * (count - 1) // 2 for count in counts.tolist())
