"""Who is measured. Each provider prepares its own favourite layout outside the clock, then runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import cmdgpu_kernels as kernels
import numpy as np
import torch
from torch import Tensor

Labels: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.int64]]
Prepared: TypeAlias = Callable[[], Labels]
"""Runs once and answers the label of every row, so that a rival that computes something else is caught."""


@dataclass(frozen=True)
class Provider:
    name: str
    prepare: Callable[[Tensor, Tensor], Prepared]


def _ours(W_tb: Tensor, R_mt: Tensor) -> Prepared:
    references = kernels.prepare_references(R_mt)

    def run() -> Labels:
        fit = kernels.assign_and_fit(W_tb, references, implementation="torch")
        return fit.mode.numpy().astype(np.int64)

    return run


def _plain_torch(W_tb: Tensor, R_mt: Tensor) -> Prepared:
    """Whole matrix, row-major: centre, one product, norms, argmax, fit. What one writes in five lines."""
    W_nt = W_tb.T.to(torch.float32).contiguous()
    rmean = R_mt.mean(dim=1)
    centred = R_mt - rmean[:, None]
    rnorm = centred.square().sum(dim=1).sqrt()
    z_mt = centred / rnorm[:, None]

    def run() -> Labels:
        mean = W_nt.mean(dim=1, keepdim=True)
        x = W_nt - mean
        d = x @ z_mt.T
        mode = d.abs().max(dim=1).indices
        best = d.gather(1, mode[:, None])[:, 0]
        a = best / rnorm[mode]
        _ = mean[:, 0] - a * rmean[mode], best / x.square().sum(dim=1).sqrt()
        return mode.numpy()

    return run


def _plain_numpy(W_tb: Tensor, R_mt: Tensor) -> Prepared:
    """The same five lines in NumPy."""
    W_nt = np.ascontiguousarray(W_tb.to(torch.float32).numpy().T)
    R = R_mt.numpy()
    rmean = R.mean(axis=1)
    centred = R - rmean[:, None]
    rnorm = np.sqrt((centred**2).sum(axis=1))
    z_mt = centred / rnorm[:, None]

    def run() -> Labels:
        mean = W_nt.mean(axis=1, keepdims=True)
        x = W_nt - mean
        d = x @ z_mt.T
        mode = np.abs(d).argmax(axis=1)
        best = np.take_along_axis(d, mode[:, None], axis=1)[:, 0]
        a = best / rnorm[mode]
        _ = mean[:, 0] - a * rmean[mode], best / np.sqrt(np.einsum("nt,nt->n", x, x))
        return mode

    return run


PROVIDERS = (
    Provider("cmdgpu torch", _ours),
    Provider("plain torch", _plain_torch),
    Provider("plain numpy", _plain_numpy),
)
