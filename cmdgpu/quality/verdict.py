"""The verdict: what is measured beside what chance gives, a rule, and the words for it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

import numpy as np

from cmdgpu.clustering import moving_rows
from cmdgpu.miniature import Followed, Rule, follow, references_of
from cmdgpu.notation import F64, I64
from cmdgpu.null_model import NULL_MODELS, NullCorrelation, Views, look, null_views
from cmdgpu.quality.at_hand import AtHand
from cmdgpu.quality.held_out import SPLITS, HeldOut, HeldOutRows, judge_held_out
from cmdgpu.quality.partitions import adjusted_rand
from cmdgpu.statistics import LIMITS

Verdict: TypeAlias = Literal["better than chance", "no better than chance", "cannot tell"]

CLEAR: Final = 0.35
"""Excess on levels that is believed alone."""
ABOVE: Final = 0.2
"""Excess on levels that is believed when the increments agree; less is nothing."""
AGREE: Final = 0.1
"""Excess of the increment correlation that agrees."""
FEWEST_ROWS: Final = 100
FEWEST_SNAPSHOTS: Final = 8
REPEATS: Final = 5
"""Of every null model."""


@dataclass(frozen=True)
class View:
    """One mean correlation of the rows, and what every null model gives in its place."""

    measured: float
    chance: Mapping[str, NullCorrelation]

    @property
    def excess(self) -> float:
        """Share of the way from chance to 1, over the null model that leaves the least.

        (measured - mean) / (1 - mean); 0 where chance leaves no room.
        """
        return min(
            (self.measured - null.mean) / (1.0 - null.mean) if null.mean < 1.0 else 0.0
            for null in self.chance.values()
        )


@dataclass(frozen=True)
class ChanceShares:
    """Histograms of unrelated rows between ``null_model.SHARE_EDGES``, one for every repeat."""

    abs_correlation: F64
    """(REPEATS, 50) shares of the rows by |corr|."""
    r2: F64
    """(REPEATS, 50) by corr^2."""


@dataclass(frozen=True)
class CorrelationBin:
    """Rows whose |corr| lies in [low, high), the last bin closed."""

    low: float
    high: float
    share: float
    """Of the rows."""
    energy_share: float
    """Of the movement, sum (w - mean w)^2."""
    error: float
    """sum (w - a r - b)^2 / sum (w - mean w)^2 of these rows; NaN without rows."""
    held_out_error: float
    """The same on every fifth snapshot, held out: see ``HeldOut``; NaN without rows."""


@dataclass(frozen=True)
class Quality:
    """What the modes are worth, measured on some rows of the trajectory; ``assess`` says how."""

    verdict: Verdict
    words: str
    """The verdict and its numbers in plain sentences, one a line."""
    n_rows: int
    sampled: bool
    """True where the judged rows are the clustered ones themselves, for want of others."""
    n_snapshots: int
    levels: View | None = None
    """Mean |corr| of the rows with their references."""
    increments: View | None = None
    """Mean |corr| where the steps w(t + 1) - w(t) are decomposed in place of the rows."""
    increment_correlation: View | None = None
    """Mean correlation of a row's steps with those of its reference, the modes being those of the levels."""
    r2: float = math.nan
    """Mean corr^2."""
    r2_energy: float = math.nan
    """1 - sum (w - a r - b)^2 / sum (w - mean w)^2."""
    fraction_below: Mapping[float, float] = dataclasses.field(default_factory=dict[float, float])
    """Share of the rows whose |corr| is below."""
    held_out: tuple[HeldOut, ...] = ()
    stability: tuple[float, ...] = ()
    """Adjusted Rand index of the labels with those of other samples, one each; empty where not measured."""
    degradation: tuple[CorrelationBin, ...] = ()
    chance_shares: Mapping[str, ChanceShares] = dataclasses.field(
        default_factory=dict[str, ChanceShares], compare=False, repr=False
    )
    """By null model, of the same repeats as the views."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values of strict JSON: what is not a number is None; without the histograms."""
        plain = _plain(dataclasses.asdict(dataclasses.replace(self, chance_shares={})))
        del plain["chance_shares"]
        for name in ("levels", "increments", "increment_correlation"):
            view: View | None = getattr(self, name)
            if view is not None:
                plain[name]["excess"] = view.excess
        return plain


def _plain(value: Any) -> Any:
    match value:
        case dict():
            return {str(key): _plain(item) for key, item in value.items()}  # pyright: ignore
        case tuple():
            return [_plain(item) for item in value]  # pyright: ignore
        case float():
            return value if math.isfinite(value) else None
        case _:
            return value


def assess(at_hand: AtHand, steps_t: I64, R_mt: F64, rule: Rule) -> Quality:
    """Judge M references, (M, T), found at ``steps_t``, by rows that did not choose them.

    Every null model of ``cmdgpu.null_model`` turns the sample and the rows into rows that share nothing, and
    the whole pipeline sees them, REPEATS times. The *excess* of a view is the share of the way from the mean
    of a null model to 1, over the null model that leaves the least of it. The rule:

        better than chance     excess on levels >= CLEAR,
                               or >= ABOVE while that of the increment correlation is >= AGREE
        no better than chance  excess on levels < ABOVE
        cannot tell            between; and where there is nothing to judge: no mode, fewer than
                               FEWEST_SNAPSHOTS snapshots or FEWEST_ROWS moving rows

    Increments alone decide nothing: noise that is white in the levels hides a smooth profile in them.

    How often it errs, in 2,160 trials at T = 8 .. 100, K = 60, 150 and M = 2, 10: of 1,200 fits of unrelated
    rows (planted rows torn apart by each null model, walks that persist, walks that slow down each at a pace
    of its own) none was better than chance, the largest excess was 0.18; of 480 of planted modes with noise
    up to 0.3 of their RMS none was missed, the smallest was 0.33; at noise of 0.5 one of 240 was. Rows that
    slow down each at its own pace *and* persist for longer than they move are nearly c (1 - exp(-t / tau)):
    few shapes describe them all, half of them are called better than chance, and no null model here says
    otherwise. ``benchmarks/experiments/chance.py`` repeats the trials.
    """
    columns = at_hand.columns
    sample_kt, rows_nt = _moving(at_hand.sample_kt), None
    if at_hand.rows_nt is not None and len(others_nt := _moving(at_hand.rows_nt)) >= FEWEST_ROWS:
        rows_nt = others_nt
    judged_nt = sample_kt if rows_nt is None else rows_nt
    n_rows, n_snapshots = len(judged_nt), len(columns)
    if why := _nothing_to_judge(n_rows, n_snapshots, len(R_mt)):
        return Quality("cannot tell", f"cannot tell: {why}", n_rows, rows_nt is None, n_snapshots)
    R_mt = R_mt[:, columns]
    measured = look(sample_kt, judged_nt, rule, R_mt)
    chance = {
        name: null_views(name, sample_kt, rows_nt, rule, seed=number, repeats=REPEATS)
        for number, name in enumerate(NULL_MODELS)
    }
    levels, increments, increment_correlation = (
        _view(field, measured, chance) for field in ("levels", "increments", "increment_correlation")
    )
    followed = follow(judged_nt, R_mt)
    apart = {which: judge_held_out(which, steps_t[columns], sample_kt, judged_nt, rule) for which in SPLITS}
    quality = Quality(
        verdict=decide(levels, increment_correlation),
        words="",
        n_rows=n_rows,
        sampled=rows_nt is None,
        n_snapshots=n_snapshots,
        levels=levels,
        increments=increments,
        increment_correlation=increment_correlation,
        r2=float(np.mean(followed.correlation**2)),
        r2_energy=1.0 - float(followed.residual.sum() / followed.energy.sum()),
        fraction_below={limit: float(np.mean(np.abs(followed.correlation) < limit)) for limit in LIMITS},
        held_out=tuple(apart[which].summary for which in SPLITS),
        stability=tuple(
            adjusted_rand(followed.mode, _labels(judged_nt, _moving(other_kt), rule))
            for other_kt in at_hand.resampled
        ),
        degradation=_degradation(followed, apart["every fifth"]),
        chance_shares={
            name: ChanceShares(
                np.array([views.abs_correlation for views in repeats]),
                np.array([views.r2 for views in repeats]),
            )
            for name, repeats in chance.items()
        },
    )
    return dataclasses.replace(quality, words=_in_words(quality, at_hand.note))


def _moving(rows_nt: F64) -> F64:
    return rows_nt[moving_rows(rows_nt)[1] == 0]


def _nothing_to_judge(n_rows: int, n_snapshots: int, n_modes: int) -> str | None:
    if not n_modes:
        return "there is no mode, for no sampled row moves"
    if n_snapshots < FEWEST_SNAPSHOTS:
        return (
            f"{n_snapshots} snapshots let any two rows resemble each other; "
            f"{FEWEST_SNAPSHOTS} or more can be judged"
        )
    if n_rows < FEWEST_ROWS:
        return f"{n_rows} moving rows are too few; {FEWEST_ROWS} or more can be judged"
    return None


def _view(field: str, measured: Views, chance: Mapping[str, list[Views]]) -> View:
    return View(
        getattr(measured, field),
        {
            name: NullCorrelation.of([getattr(views, field) for views in repeats])
            for name, repeats in chance.items()
        },
    )


def decide(levels: View, increment_correlation: View) -> Verdict:
    """The rule of ``assess``."""
    if levels.excess >= CLEAR or (levels.excess >= ABOVE and increment_correlation.excess >= AGREE):
        return "better than chance"
    return "no better than chance" if levels.excess < ABOVE else "cannot tell"


def _labels(rows_nt: F64, sample_kt: F64, rule: Rule) -> I64:
    return follow(rows_nt, references_of(sample_kt, rule, rows_nt)).mode


def _degradation(followed: Followed, apart: HeldOutRows) -> tuple[CorrelationBin, ...]:
    correlation_n = np.abs(followed.correlation)
    edges = (0.0, *LIMITS, 1.0)
    bins: list[CorrelationBin] = []
    for low, high in itertools.pairwise(edges):
        inside = (correlation_n >= low) & ((correlation_n < high) | (high == 1.0))
        energy, movement = float(followed.energy[inside].sum()), float(apart.movement_n[inside].sum())
        bins.append(
            CorrelationBin(
                low=low,
                high=high,
                share=float(np.mean(inside)),
                energy_share=energy / float(followed.energy.sum()),
                error=float(followed.residual[inside].sum()) / energy if energy else math.nan,
                held_out_error=float(apart.error_n[inside].sum()) / movement if movement else math.nan,
            )
        )
    return tuple(bins)


# ---- words ------------------------------------------------------------------------------------------------


def _in_words(quality: Quality, note: str) -> str:
    levels, increments, together = quality.levels, quality.increments, quality.increment_correlation
    assert levels is not None and increments is not None and together is not None
    which = "clustered rows themselves" if quality.sampled else "rows that were not clustered"
    verdict = {
        "better than chance": "these modes are better than chance",
        "no better than chance": "these modes are no better than chance",
        "cannot tell": "whether these modes are better than chance cannot be told: their levels are, but not "
        "by much, and their increments are not",
    }[quality.verdict]
    lines = [
        f"{verdict} ({quality.n_rows} {which}, {quality.n_snapshots} snapshots)",
        f"levels: mean |corr| {levels.measured:.3f}; unrelated rows of the same T, K and M would give "
        f"{_chance(levels)}: {_how_far(levels)}",
        f"increments: correlation with those of the reference {together.measured:.3f}, by chance "
        f"{_chance(together)}: {_how_far(together)}",
        f"increments decomposed in place of levels: mean |corr| {increments.measured:.3f}, by chance "
        f"{_chance(increments)}",
        _held_out_in_words(quality.held_out),
        "|corr| is below "
        + ", ".join(f"{limit} in {100 * share:.1f} %" for limit, share in quality.fraction_below.items())
        + " of the rows",
    ]
    if quality.stability:
        lines.append(
            f"other samples give the same modes with an adjusted Rand index of "
            f"{np.mean(quality.stability):.2f} ({min(quality.stability):.2f}-{max(quality.stability):.2f})"
        )
    return "\n".join([*lines, note] if note else lines)


def _chance(view: View) -> str:
    return ", ".join(
        f"{null.mean:.3f} ({null.low:.3f}-{null.high:.3f}, {name})" for name, null in view.chance.items()
    )


def _how_far(view: View) -> str:
    if view.excess <= 0:
        return "no better than chance"
    return f"{100 * view.excess:.0f} % of the way from chance to 1"


def _held_out_in_words(held_out: tuple[HeldOut, ...]) -> str:
    """Errors as shares of the movement there."""
    told = "; ".join(f"{one.which} {one.error:.3f}, {one.rival} {one.rival_error:.3f}" for one in held_out)
    lost = [one.which for one in held_out if not one.error < one.rival_error]
    return f"held-out snapshots, squared error by movement: {told}" + (
        f": {'a smoother' if len(lost) == len(held_out) else 'in part a smoother'}, not a model"
        if lost
        else ""
    )
