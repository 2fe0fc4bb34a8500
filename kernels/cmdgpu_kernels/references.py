"""Reference profiles, centred and normalised once in float64 and used for every block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from cmdgpu_kernels.limits import MAX_MODES, PARTIAL, SMALLEST_SS, too_large

__all__ = ["References", "prepare_references"]

Prepared = TypeVar("Prepared")


@dataclass(frozen=True, eq=False)
class References:
    """M centred, unit-norm reference profiles of T snapshots, on the host.

        z_m = (r_m - mean(r_m)) / |r_m - mean(r_m)|

    ``M = 0`` is legal: no row then belongs to a mode.
    """

    z_mt: NDArray[np.float32]
    """(M, T), computed in float64 and rounded once."""
    tail_mc: NDArray[np.float32]
    """(M, partials): sum of z_m from the first snapshot of partial c to the last one.

    A row is summed behind a pivot that moves from partial to partial. A pivot that moves by ``step`` before
    partial c leaves ``step * tail_mc[m, c]`` out of ``<w, z_m>``. Also from float64, rounded once.
    """
    mean_m: NDArray[np.float64]
    rnorm_m: NDArray[np.float64]
    """|r_m - mean(r_m)|."""
    rnorm_inv_m: NDArray[np.float64]
    distinct: NDArray[np.int64]
    """Ascending indices of the references that can win.

    One whose rounded profile equals an earlier one, or its negation, ties with it on every row and loses:
    the lowest index wins. It is left out of the product, because a matrix product gives equal references
    unequal last digits. With T = 2 every centred profile is the same up to sign, so only 0 is left.
    """
    _cache: dict[Any, Any] = field(default_factory=dict[Any, Any], repr=False)

    @property
    def modes(self) -> int:
        return self.z_mt.shape[0]

    @property
    def snapshots(self) -> int:
        return self.z_mt.shape[1]

    def cached(self, key: object, build: Callable[[], Prepared]) -> Prepared:
        """What ``build`` returns, built once per key: an upload per block would wait for the device."""
        if key not in self._cache:
            self._cache[key] = build()
        return self._cache[key]


def prepare_references(R_mt: ArrayLike | Tensor) -> References:
    """Centre and normalise raw reference profiles, (M, T).

    Raises ValueError for a reference that never moves or is not finite within the range of float32, with its
    index, and for more references than an int16 mode can name.
    """
    raw_mt = R_mt.detach().to("cpu", torch.float64).numpy() if isinstance(R_mt, Tensor) else R_mt
    R = np.asarray(raw_mt, dtype=np.float64)
    if R.ndim != 2:
        raise ValueError(f"references must be (M, T), found shape {R.shape}")
    if len(R) > MAX_MODES:
        raise ValueError(f"{len(R)} references; a mode is an int16, so at most {MAX_MODES}")
    finite = np.isfinite(R).all(axis=1)
    if not finite.all():
        raise ValueError(f"reference {int(np.argmin(finite))} holds NaN or inf")

    # Centred twice: the first value takes away what is common, the mean of the rest then rounds at its size.
    start_m = R[:, 0] if R.shape[1] else np.zeros(len(R))
    from_start = R - start_m[:, None]
    shift_m = from_start.mean(axis=1) if R.size else np.zeros(len(R))
    centred = from_start - shift_m[:, None]
    with np.errstate(over="ignore"):
        ss_m = np.square(centred).sum(axis=1)
    if (still := ss_m < SMALLEST_SS).any():
        raise ValueError(f"reference {int(np.argmax(still))} is constant over its {R.shape[1]} snapshots")
    if (wild := too_large(ss_m)).any():
        raise ValueError(f"reference {int(np.argmax(wild))} moves further than float32 can square")
    rnorm_m = np.sqrt(ss_m)
    unit = centred / rnorm_m[:, None]
    z_mt = np.ascontiguousarray(unit.astype(np.float32))
    from_here_on = np.cumsum(unit[:, ::-1], axis=1)[:, ::-1]
    return References(
        z_mt=z_mt,
        tail_mc=np.ascontiguousarray(from_here_on[:, ::PARTIAL].astype(np.float32)),
        mean_m=start_m + shift_m,
        rnorm_m=rnorm_m,
        rnorm_inv_m=1.0 / rnorm_m,
        distinct=_distinct(z_mt),
    )


def _distinct(z_mt: NDArray[np.float32]) -> NDArray[np.int64]:
    """Indices of the profiles that differ from every earlier one and from its negation."""
    first: dict[bytes, int] = {}
    for m, z in enumerate(z_mt):
        # Adding zero turns -0 into +0, which compares equal but has other bytes.
        upright = z * np.sign(z[np.argmax(z != 0)]) + np.float32(0)
        first.setdefault(upright.tobytes(), m)
    return np.array(sorted(first.values()), dtype=np.int64)
