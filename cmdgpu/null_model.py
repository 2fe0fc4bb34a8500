"""What the correlations would be if no two weights had anything to do with each other.

Independent random walks already correlate with their best reference at about 0.77 (10 modes, 1,000
sampled rows, any T from 20 to 150), so a mean |corr| of 0.8 says little until this number stands
beside it. There is more than one way to be unrelated: a null model makes rows that share nothing with each
other and keep something of their own, and what they give goes through the whole pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np

from cmdgpu.clustering import moving_rows
from cmdgpu.errors import UsageError
from cmdgpu.miniature import Rule, follow, references_of
from cmdgpu.notation import F32, F64
from cmdgpu.registry import Registry

BLOCK_BYTES: Final = 1 << 26
"""Walks are drawn and assigned in blocks of about this size, so that a long T needs no long memory."""


SHARE_EDGES: Final[F64] = np.linspace(0.0, 1.0, 51)
"""Between which |corr| and corr^2 of unrelated rows are counted."""


@dataclass(frozen=True)
class NullCorrelation:
    """A mean correlation of unrelated rows, over repeats of the whole pipeline."""

    mean: float
    low: float
    """5 % quantile over the repeats."""
    high: float
    """95 % quantile over the repeats."""

    @staticmethod
    def of(means: Sequence[float]) -> NullCorrelation:
        low, high = np.quantile(means, (0.05, 0.95))
        return NullCorrelation(mean=float(np.mean(means)), low=float(low), high=float(high))


# ---- rows that share nothing ------------------------------------------------------------------------------

_NullModel: TypeAlias = Callable[[np.random.Generator, F64, F64], F64]
"""(rng, rows (n, T), RMS step of the sample (T - 1,)) -> n unrelated rows (n, T), beginning at 0."""
NULL_MODELS: Final[Registry[_NullModel]] = Registry("null model")


def random_walks(rng: np.random.Generator, W_nt: F64, scale_t: F64) -> F64:
    """Walks whose step at t is s(t) times a standard normal; of the rows only their number counts."""
    return _walks(rng, len(W_nt), scale_t)


def signed_steps(rng: np.random.Generator, W_nt: F64, scale_t: F64) -> F64:
    """Walks that take each row's own steps, every step with a sign of its own.

    A row keeps when and how far it moves: rows of different pace, which one s(t) does not describe, have
    larger |corr| with each other than walks of one pace.
    """
    steps_nt = np.diff(W_nt, axis=1)
    signs_nt = rng.integers(0, 2, steps_nt.shape, dtype=np.int8) * 2 - 1
    return _summed(steps_nt * signs_nt)


def phase_shuffled(rng: np.random.Generator, W_nt: F64, scale_t: F64) -> F64:
    """Rows whose steps have the spectrum of their own steps and random phases (Theiler et al., 1992).

        x(t) = (w(t + 1) - w(t)) / s(t),   X = DFT of x and its mirror image,
        v(t + 1) = v(t) + s(t) y(t),       y = first half of DFT^-1(|X_k| exp(i phi_k)),  phi_0 = that of X_0

    A row keeps how long its movement persists and, on average, its mean step in units of s: a drift needs no
    relative. Steps are shuffled and not levels, because a level ends elsewhere than it began, and that jump
    would be spread over all frequencies; the mirror image closes what is left of it in the steps, at the
    price of movement a little longer than the row's (walks then give 0.79 and not 0.77). They are divided by
    s(t) before and multiplied after, because a spectrum knows no time: it would spread the fast beginning of
    a training evenly. Snapshots at which nobody moves, s(t) = 0, stay so.
    """
    moved_t = scale_t > 0
    x_nt = np.diff(W_nt, axis=1)[:, moved_t] / scale_t[moved_t]
    n_steps = x_nt.shape[1]
    spectrum_nk = np.abs(np.fft.rfft(np.concatenate([x_nt, x_nt[:, ::-1]], axis=1), axis=1))
    phase_nk = 2.0 * np.pi * rng.random(spectrum_nk.shape)
    # the two real components: the mean step as it is, the highest frequency with either sign
    phase_nk[:, 0] = np.where(x_nt.sum(axis=1) < 0, np.pi, 0.0)
    phase_nk[:, -1] = np.where(phase_nk[:, -1] < np.pi, 0.0, np.pi)
    steps_nt = np.zeros((len(W_nt), len(scale_t)))
    y_nt = np.fft.irfft(spectrum_nk * np.exp(1j * phase_nk), n=2 * n_steps, axis=1)[:, :n_steps]
    steps_nt[:, moved_t] = y_nt * scale_t[moved_t]
    return _summed(steps_nt)


NULL_MODELS.add("random walks", random_walks)
NULL_MODELS.add("signed steps", signed_steps)
NULL_MODELS.add("phase-shuffled", phase_shuffled)


def _walks(rng: np.random.Generator, n: int, scale_t: F64) -> F64:
    steps_tn = rng.standard_normal((len(scale_t), n))
    steps_tn *= scale_t[:, None]
    return _summed(steps_tn.T)


def _summed(steps_nt: F64) -> F64:
    rows_nt = np.zeros((len(steps_nt), steps_nt.shape[1] + 1))
    np.cumsum(steps_nt, axis=1, out=rows_nt[:, 1:])
    return rows_nt


def step_scale(sample_kt: F64) -> F64:
    """(T - 1,) RMS step of the moving finite rows at each t, up to a factor: the largest step is 1.

    Raises UsageError where no row of the (K, T) sample moves (T < 2 included).
    """
    _, why = moving_rows(sample_kt)
    moving_kt = sample_kt[why == 0]
    if len(moving_kt) == 0:
        raise UsageError(f"no row of the sample moves: {len(sample_kt)} rows, T = {sample_kt.shape[1]}")
    steps_kt = np.diff(moving_kt, axis=1)
    # Only the shape of s(t) over time matters to a correlation; scaled, its squares stay in range.
    steps_kt /= np.abs(steps_kt).max()
    return np.sqrt(np.mean(steps_kt**2, axis=0))


# ---- what they give ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Views:
    """How closely rows follow the references of a sample, looked at in three ways."""

    levels: float
    """Mean |corr| of the rows with their references."""
    increments: float
    """The same when the steps w(t + 1) - w(t) are decomposed in place of the rows."""
    increment_correlation: float
    """Mean correlation of the steps of a row with those of the reference that its level follows, times the
    sign of the level's: the measure least inflated by a drift."""
    abs_correlation: tuple[float, ...]
    """Shares of the rows by the |corr| of their levels, between SHARE_EDGES."""
    r2: tuple[float, ...]
    """The same by its square."""


def look(sample_kt: F64, W_nt: F64, rule: Rule, R_mt: F64 | None = None) -> Views:
    """Decompose the sample and follow the rows: levels, increments, and the increments of the levels' modes.

    ``R_mt`` are references found elsewhere. Rows (n, T) and (K, T); rows without movement count 0.
    """
    if R_mt is None:
        R_mt = references_of(sample_kt, rule, W_nt)
    levels = follow(W_nt, R_mt)
    steps_kt, steps_nt = np.diff(sample_kt, axis=1), np.diff(W_nt, axis=1)
    increments = follow(steps_nt, references_of(steps_kt, rule, steps_nt))
    correlation_n = np.abs(levels.correlation)
    shared_n: F64 = np.zeros(len(W_nt))
    if len(R_mt):
        row_nt, _ = moving_rows(steps_nt)
        reference_mt, _ = moving_rows(np.diff(R_mt, axis=1))
        shared_n = np.einsum("nt,nt->n", row_nt, reference_mt[levels.mode]) * np.sign(levels.correlation)
    return Views(
        levels=float(np.mean(correlation_n)),
        increments=float(np.mean(np.abs(increments.correlation))),
        increment_correlation=float(np.mean(shared_n)),
        abs_correlation=_shares(correlation_n),
        r2=_shares(correlation_n**2),
    )


def _shares(values_n: F64) -> tuple[float, ...]:
    return tuple((np.histogram(values_n, SHARE_EDGES)[0] / len(values_n)).tolist())


def null_views(
    name: str, sample_kt: F64, W_nt: F64 | None, rule: Rule, *, seed: int = 0, repeats: int = 5
) -> list[Views]:
    """``look`` at what a null model makes of the (K, T) sample and the (n, T) rows, once per repeat.

    Without rows the sample is looked at by its own references, as the real one then is. All rows move.
    Raises UsageError for an unknown null model, and where no row of the sample moves.
    """
    make, scale_t = NULL_MODELS[name], step_scale(sample_kt)
    # a correlation knows no amplitude, and rows of one norm stay in range whatever is drawn
    unit_kt, _ = moving_rows(sample_kt)
    unit_nt = None if W_nt is None else moving_rows(W_nt)[0]
    views: list[Views] = []
    for child in np.random.SeedSequence(seed).spawn(repeats):
        rng = np.random.default_rng(child)
        null_kt = make(rng, unit_kt, scale_t)
        views.append(look(null_kt, null_kt if unit_nt is None else make(rng, unit_nt, scale_t), rule))
    return views


def random_walk_correlation(
    sample_kt: F64 | F32,
    n_modes: int | None,
    threshold: float | None,
    affinity: str,
    *,
    n_rows: int = 8192,
    seed: int = 0,
    repeats: int = 20,
) -> NullCorrelation:
    """Mean best |corr| of independent random walks that move as the sample moves.

    sample_kt is (K, T). With s(t) = RMS over its moving finite rows of w(t + 1) - w(t), a walk is

        v(0) = 0,    v(t + 1) = v(t) + s(t) * g(t),    g independent standard normal

    and one repeat is the pipeline of the fit: cluster as many walks as the sample has moving rows by
    the same rule (``n_modes``, or ``threshold`` when it is given) and affinity, then assign ``n_rows``
    other walks to the references found. The seed fixes the walks.

    T = 2 gives 1: two points always lie on a line. A sample in which no row moves (or T < 2) has no
    increments to imitate: UsageError.
    """
    if n_rows < 1 or repeats < 1:
        raise UsageError(f"the null model needs n_rows >= 1 and repeats >= 1, got {n_rows} and {repeats}")
    values_kt = np.asarray(sample_kt, dtype=np.float64)
    scale_t = step_scale(values_kt)
    n_walks = int(np.count_nonzero(moving_rows(values_kt)[1] == 0))
    rule = Rule(n_modes, threshold, affinity)
    block = max(1, BLOCK_BYTES // (8 * (len(scale_t) + 1)))
    means: list[float] = []
    for child in np.random.SeedSequence(seed).spawn(repeats):
        rng = np.random.default_rng(child)
        walks_kt = _walks(rng, n_walks, scale_t)
        R_mt = references_of(walks_kt, rule)
        total = 0.0
        for start in range(0, n_rows, block):
            walks_nt = _walks(rng, min(block, n_rows - start), scale_t)
            total += float(np.abs(follow(walks_nt, R_mt).correlation).sum())
        means.append(total / n_rows)
    return NullCorrelation.of(means)
