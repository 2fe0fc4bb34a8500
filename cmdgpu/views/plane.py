"""The path of the training, recorded and rebuilt, in the plane in which the sampled rows move most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from cmdgpu.miniature import follow
from cmdgpu.notation import F64
from cmdgpu.profiles import centred

if TYPE_CHECKING:
    from cmdgpu.decomposition import CMD

_NOTHING: Final = 1e-14
"""Share of the movement below which a component is rounding."""


@dataclass(frozen=True)
class Plane:
    """Two principal components u of the moving sampled rows, and the snapshots along them."""

    recorded: F64
    """(2, T) u . (w(t) - mean w)"""
    rebuilt: F64
    """(2, T) the same of the rows that the modes give, a r(t) + b."""
    explained: F64
    """(2,) shares of the movement sum (w - mean w)^2 of these rows along each; 0 where nothing moves."""


def plane(cmd: CMD) -> Plane:
    """Principal components over time of the sampled rows of a fitted CMD.

        X = w - mean w  (K', T),   X = U S V^T,   recorded = U_2^T X,   rebuilt = U_2^T a (r - mean r)

    Signs are such that a path ends to the right of, and above, where it began. A component that is not there
    (two snapshots, one row, nothing moves) is 0 throughout.
    """
    w_kt = cmd.sample_[cmd.sample_labels_ >= 0].astype(np.float64)
    R_mt = cmd.references_.astype(np.float64)
    recorded, rebuilt, explained = np.zeros((2, len(cmd.steps_))), np.zeros((2, len(cmd.steps_))), np.zeros(2)
    if len(w_kt):
        x_kt, fits = centred(w_kt), follow(w_kt, R_mt)
        u_kc, share_c = _components(x_kt)
        along = u_kc.T @ x_kt
        turn = np.where(along[:, -1] < along[:, 0], -1.0, 1.0)[:, None]
        found = len(share_c)
        recorded[:found] = turn * along
        rebuilt[:found] = turn * (u_kc.T @ (fits.a[:, None] * centred(R_mt)[fits.mode]))
        explained[:found] = share_c
    return Plane(recorded, rebuilt, explained)


def _components(x_kt: F64) -> tuple[F64, F64]:
    """At most two first left singular vectors (K', 2), and their shares of the sum of squares (2,).

    From the Gram matrix of the shorter side, which is small where a singular value decomposition is not.
    """
    tall = x_kt.shape[0] > x_kt.shape[1]
    value_c, vector_c = np.linalg.eigh(x_kt.T @ x_kt if tall else x_kt @ x_kt.T)
    value_c, vector_c = value_c[:-3:-1], vector_c[:, :-3:-1]
    there = value_c > _NOTHING * value_c[0]
    value_c, vector_c = value_c[there], vector_c[:, there]
    u_kc = x_kt @ vector_c / np.sqrt(value_c) if tall else vector_c
    return u_kc, value_c / float(np.einsum("kt,kt->", x_kt, x_kt))
