"""Eigenvalues of a Gram matrix above its noise, largest first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cmdgpu.notation import F64


@dataclass(frozen=True)
class Spectrum:
    values: F64
    """(r,) descending, all above the noise floor; the squares of singular values."""
    vectors: F64
    """(T, r) orthonormal."""
    rest: float
    """Sum of all other eigenvalues: what a projection on the vectors leaves."""

    @property
    def rank(self) -> int:
        return len(self.values)


def leading(G: F64, most: int) -> Spectrum:
    """At most so many eigenpairs of a symmetric positive semidefinite (T, T) matrix.

    Eigenvalues under T times the rounding of the largest are noise, whose inverse would be made of nothing:
    singular values under about 1.5e-8 of the first for a Gram matrix in float64.
    """
    values, vectors = np.linalg.eigh(G)
    values, vectors = values[::-1], vectors[:, ::-1]
    floor = len(G) * np.finfo(np.float64).eps * max(float(values[0]), 0.0)
    rank = min(most, int((values > floor).sum()))
    return Spectrum(values[:rank], vectors[:, :rank], float(np.maximum(values[rank:], 0.0).sum()))
