"""Exact dynamic mode decomposition of a Gram matrix, by the method of snapshots: nothing of N is held.

X are the snapshots but the last, Y those but the first; all that is asked of them are inner products.

    X^T X = V S^2 V^T  (r largest)         Atilde = S^-1 V^T (X^T Y) V S^-1        Atilde Q = Q Lambda
    E = V S^-1 Q       (T - 1, r)          Phi = Y E   (the modes, N x r: never formed)
    beta  "first": argmin |Phi beta - w_0|      "all": argmin sum_k |Phi (beta o lambda^k) - w_k|^2
    What_k = Re(Phi (beta o lambda^k)) = W f_k,   f_k = [0; Re(E (beta o lambda^k))]

Source: Tu et al., arXiv 1312.0041; amplitudes of all snapshots: Jovanovic et al., arXiv 1309.4165.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cmdgpu.baselines.spectrum import leading
from cmdgpu.errors import CmdgpuError
from cmdgpu.notation import F64

C128: TypeAlias = NDArray[np.complex128]
Amplitudes: TypeAlias = Literal["first", "all"]
_LARGEST_LOG: Final = float(np.log(np.finfo(np.float64).max)) - 60.0
"""Of a power that leaves room for what it is multiplied by."""


@dataclass(frozen=True)
class Dynamics:
    """How one group of rows moves on."""

    eigenvalues: C128
    """(r,) per snapshot."""
    amplitudes: C128
    """(r,)"""
    E: C128
    """(T - 1, r): modes as combinations of the snapshots but the first."""

    @property
    def rank(self) -> int:
        return len(self.eigenvalues)

    @property
    def largest(self) -> float:
        """|lambda| of the mode that grows most."""
        return float(np.abs(self.eigenvalues).max(initial=0.0))

    def reaches(self, position: int) -> bool:
        """Whether no mode has grown beyond float64 by then."""
        return self.largest <= 1.0 or position * np.log(self.largest) <= _LARGEST_LOG

    def filters(self, positions: NDArray[Any]) -> F64:
        """(T, len(positions)) weights of the snapshots for positions in time, beyond the last ones too.

        Raises CmdgpuError where a mode has grown beyond float64.
        """
        coefficients = self.amplitudes[:, None] * powers(self.eigenvalues, positions)
        with np.errstate(over="ignore", invalid="ignore"):
            moved = np.real(self.E @ coefficients)
        if not np.isfinite(moved).all():
            raise grown(self.largest, int(positions.max()))
        return np.concatenate([np.zeros((1, len(positions))), moved])


def decompose(gram: F64, rank: int, amplitudes: Amplitudes) -> Dynamics:
    """The dynamics of rows with the raw inner products ``gram``, (T, T), in at most ``rank`` modes.

    Singular values at the noise of float64 are cut off: ``Dynamics.rank`` may be less, and is 0 for rows that
    are all 0. Raises CmdgpuError where a mode has grown beyond float64 within the snapshots.
    """
    G_xx, G_xy, G_yy = gram[:-1, :-1], gram[:-1, 1:], gram[1:, 1:]
    spectrum = leading(G_xx, rank)
    if not spectrum.rank:
        return Dynamics(_none(0), _none(0), _none(len(G_xx), 0))
    scaled = spectrum.vectors / np.sqrt(spectrum.values)  # V S^-1
    eigenvalues, Q = np.linalg.eig(scaled.T @ G_xy @ scaled)
    eigenvalues, E = eigenvalues.astype(np.complex128), (scaled @ Q).astype(np.complex128)
    PhiPhi = E.conj().T @ G_yy @ E
    if amplitudes == "first":
        left, right = PhiPhi, E.conj().T @ gram[1:, 0]
    else:
        D = powers(eigenvalues, np.arange(len(gram)))
        left = PhiPhi * (D @ D.conj().T).conj()
        right = (D.conj() * (E.conj().T @ gram[1:, :])).sum(axis=1)
    return Dynamics(eigenvalues, _solved(left, right), E)


def _solved(left: C128, right: C128) -> C128:
    """Hermitian, and singular where modes vanish or coincide: the smallest solution then."""
    # scaled to a unit diagonal: powers of growing and of dying modes are far apart
    size = np.sqrt(np.maximum(np.real(np.diag(left)), np.finfo(np.float64).tiny))
    found, *_ = np.linalg.lstsq(left / np.outer(size, size), right / size, rcond=None)
    return found / size


def powers(eigenvalues: C128, positions: NDArray[Any]) -> C128:
    """(r, len(positions)) lambda^k. Raises CmdgpuError where one leaves float64, instead of infinity."""
    largest, last = float(np.abs(eigenvalues).max(initial=0.0)), int(positions.max(initial=0))
    if largest > 1.0 and last * np.log(largest) > _LARGEST_LOG:
        raise grown(largest, last)
    return eigenvalues[:, None] ** positions[None, :]


def grown(largest: float, position: int) -> CmdgpuError:
    return CmdgpuError(
        f"a mode with |lambda| = {largest:.4g} has grown beyond float64 at snapshot {position}",
        hint="take a smaller rank, or a step nearer to the last snapshot",
    )


def _none(*shape: int) -> C128:
    return np.zeros(shape, dtype=np.complex128)
