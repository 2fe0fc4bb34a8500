"""Fit some snapshots, judge on the others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from cmdgpu.miniature import Rule, follow, references_of
from cmdgpu.notation import F64, I64, BoolArray

SPLITS: Final = ("every second", "every fifth", "last tenth")


@dataclass(frozen=True)
class HeldOut:
    """Modes of some snapshots judged on the others, as errors relative to the movement.

        error = sum over rows, held-out t of (w - a r - b)^2 / sum of (w - mean of the kept snapshots)^2

    The whole pipeline sees the kept snapshots alone; the references' values at the others are then read, as a
    result may at any recorded step. A mode model that does not beat its rival is a smoother. NaN where
    nothing moves at the held-out snapshots.
    """

    which: str
    """One of SPLITS."""
    n_snapshots: int
    """Held out."""
    error: float
    rival: str
    """What a row's own kept snapshots give: linear interpolation between neighbours, or the last value."""
    rival_error: float


@dataclass(frozen=True)
class HeldOutRows:
    """The same, row by row."""

    summary: HeldOut
    error_n: F64
    """(n,) sum over held-out t of (w - a r - b)^2."""
    movement_n: F64
    """(n,) sum over held-out t of (w - mean of the kept snapshots)^2."""


def held_out(which: str, n_snapshots: int) -> BoolArray:
    """(T,) True where a snapshot is held out; the ends are kept where others are interpolated.

    "every second": 1, 3, 5, ...; "every fifth": 2, 7, 12, ...; "last tenth": the last T / 10, rounded up.
    """
    position_t = np.arange(n_snapshots)
    match which:
        case "every second":
            return (position_t % 2 == 1) & (position_t < n_snapshots - 1)
        case "every fifth":
            return (position_t % 5 == 2) & (position_t < n_snapshots - 1)
        case _:
            return position_t >= n_snapshots - math.ceil(n_snapshots / 10)


def judge_held_out(which: str, steps_t: I64, sample_kt: F64, W_nt: F64, rule: Rule) -> HeldOutRows:
    """Cluster the (K, T) sample on the kept snapshots, fit the (n, T) rows there, predict the others."""
    out_t = held_out(which, len(steps_t))
    kept_t = ~out_t
    R_mt = references_of(sample_kt, rule, W_nt, kept_t)
    fit = follow(W_nt[:, kept_t], R_mt[:, kept_t])
    actual_nh = W_nt[:, out_t]
    modelled_nh = fit.b[:, None] + (fit.a[:, None] * R_mt[fit.mode][:, out_t] if len(R_mt) else 0.0)
    if which == "last tenth":
        rival, guess_nh = "the last value", W_nt[:, kept_t][:, -1:]
    else:
        rival, guess_nh = "linear interpolation", _interpolated(steps_t, W_nt, out_t)
    movement_n = _squares(actual_nh - W_nt[:, kept_t].mean(axis=1, keepdims=True))
    error_n, total = _squares(actual_nh - modelled_nh), float(movement_n.sum())
    summary = HeldOut(
        which=which,
        n_snapshots=int(np.count_nonzero(out_t)),
        error=float(error_n.sum()) / total if total else math.nan,
        rival=rival,
        rival_error=float(_squares(actual_nh - guess_nh).sum()) / total if total else math.nan,
    )
    return HeldOutRows(summary, error_n, movement_n)


def _interpolated(steps_t: I64, W_nt: F64, out_t: BoolArray) -> F64:
    """Held-out values on the line between the kept neighbours, by step."""
    kept, out = np.flatnonzero(~out_t), np.flatnonzero(out_t)
    right = np.searchsorted(kept, out)
    before, after = kept[right - 1], kept[right]
    weight = (steps_t[out] - steps_t[before]) / (steps_t[after] - steps_t[before])
    return W_nt[:, before] * (1.0 - weight) + W_nt[:, after] * weight


def _squares(rows_nh: F64) -> F64:
    return np.einsum("nh,nh->n", rows_nh, rows_nh)
