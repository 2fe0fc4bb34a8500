"""What a fit says of itself: in words for a terminal, as a table for a notebook."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from itertools import islice
from typing import Any, Final

import numpy as np

from cmdgpu.indexing import evenly
from cmdgpu.memory import show_bytes
from cmdgpu.notation import F32, F64, I64, NO_ROW
from cmdgpu.quality import Quality
from cmdgpu.results import Result

_GAINS_SHOWN: Final = 5
"""Rounds of refinement whose gain is told."""
_MODES_SHOWN: Final = 12
"""Rows of the table: modes come by falling size."""
_WIDTH: Final = 120
_HEIGHT: Final = 20
"""Of a profile in the table, in pixels."""
_MEANS_NOTHING: Final = "fewer than three snapshots: every |corr| is 1 or undefined and means nothing"


@dataclass(frozen=True)
class _Mode:
    """A line of either table."""

    number: int
    rows: int
    share: str
    low: float
    """|corr| of its rows at 5, 50 and 95 %; NaN of a mode without rows."""
    median: float
    high: float
    reference: str
    """Where it lies."""


def _modes(result: Result, metrics: Mapping[str, Any]) -> Iterator[_Mode]:
    n_rows = max(int(metrics["n_rows"]), 1)
    sizes: list[int] = metrics["mode_sizes"]
    for m, (rows, row) in enumerate(zip(sizes, result.modes.reference_row.tolist(), strict=True)):
        low, _, median, _, high = metrics["mode_quantiles"][m]
        where = result.frame.map.locate(row) if row != NO_ROW else "no row"
        yield _Mode(m, rows, f"{100 * rows / n_rows:.2f} %", low, median, high, where)


def _shape(result: Result, metrics: Mapping[str, Any]) -> str:
    return (
        f"{metrics['n_modes']} modes, {metrics['n_rows']} parameters x {len(result.frame.steps)} snapshots, "
        f"{metrics['n_samples']} rows sampled"
    )


def _sizes(metrics: Mapping[str, Any]) -> str:
    stored, original = show_bytes(metrics["result_bytes"]), show_bytes(metrics["trajectory_bytes"])
    return f"{stored} for a trajectory of {original}"


# ---- words ----------------------------------------------------------------------------------------------


def in_words(result: Result, metrics: Mapping[str, Any]) -> str:
    """Modes, sizes, |corr|, R^2, error, bytes, seconds, a line each; ``metrics`` are those of ``CMD``."""
    lines = [
        f"CMD  {_shape(result, metrics)}",
        " mode        rows    share   |corr| median       5-95 %    reference",
        *(
            f"{mode.number:5d}  {mode.rows:10d}  {mode.share:>8}   {mode.median:13.4f}  "
            f"{mode.low:.4f}-{mode.high:.4f}   {mode.reference}"
            for mode in _modes(result, metrics)
        ),
        f"mean |corr| {metrics['mean_abs_correlation']:.4f}   R^2 {metrics['r2']:.4f} "
        f"(by energy {metrics['r2_energy']:.4f})   mean squared error {metrics['weight_mse']:.3g}",
        f"constant {metrics['n_constant']} rows   non-finite {metrics['n_nonfinite']}   "
        f"below quantisation {metrics['n_below_quantisation']}   "
        f"buffers apart {metrics['n_buffer_rows']} rows",
    ]
    if values := metrics.get("refinement"):
        what = {"energy": "R^2 by energy", "correlation": "R^2"}[result.provenance["config"]["objective"]]
        gains = " ".join(f"{gain:+.4f}" for gain in np.diff(values)[:_GAINS_SHOWN])
        more = " ..." if len(values) - 1 > _GAINS_SHOWN else ""
        lines.append(
            f"references refined in {len(values) - 1} rounds, {what} {values[0]:.4f} -> {values[-1]:.4f} "
            f"({gains}{more})"
        )
    lines.append(_sizes(metrics))
    stages = metrics.get("stage_s")  # of a fit by this process; nothing where it was complete already
    if stages:
        lines.append(
            f"pass {stages['pass']:.2f} s, {metrics['bytes_per_s'] / 1e9:.2f} GB/s, "
            f"{metrics['implementation']} on {metrics['device']}"
        )
    elif stages is not None:
        lines.append("this fit was complete already: nothing was read")
    if len(result.frame.steps) < 3:
        lines.append(_MEANS_NOTHING)
    return "\n".join(lines)


# ---- a notebook -----------------------------------------------------------------------------------------


def in_html(result: Result, metrics: Mapping[str, Any], quality: Quality | None) -> str:
    """The largest modes with the profiles of their references, what they follow, bytes; the verdict if known.

    Without colours of its own, so that it is read on light and on dark. Names are escaped.
    """
    if result.modes.n_modes:
        table = _table(result, metrics)
        follows = (
            f"mean |corr| {_digits(metrics['mean_abs_correlation'])}, R² {_digits(metrics['r2'])} "
            f"(by energy {_digits(metrics['r2_energy'])})"
        )
    else:
        table, follows = "", "none of the sampled rows moves: there are no modes"
    notes = [f"{follows}; {_sizes(metrics)}"]
    if len(result.frame.steps) < 3:
        notes.append(_MEANS_NOTHING)
    if quality is not None:
        notes.append(quality.words.splitlines()[0])
    paragraphs = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f"<div><p><b>CMD</b> {_shape(result, metrics)}</p>{table}{paragraphs}</div>"


_NUMBER: Final = "padding:2px 8px;text-align:right;white-space:nowrap"
_NAME: Final = "padding:2px 8px;text-align:left;overflow-wrap:anywhere"
_COLUMNS: Final = {
    "mode": _NUMBER,
    "share": _NUMBER,
    "|corr| median": _NUMBER,
    "5-95 %": _NUMBER,
    "profile": "padding:2px 8px;text-align:center",
    "reference": _NAME,
}
"""And their style."""


def _table(result: Result, metrics: Mapping[str, Any]) -> str:
    rows: list[str] = []
    for mode in islice(_modes(result, metrics), _MODES_SHOWN):
        spread = "-" if math.isnan(mode.low) else f"{mode.low:.4f}-{mode.high:.4f}"
        profile = _sparkline(mode.number, result.frame.steps, result.modes.references[mode.number])
        cells = (f"{mode.number}", mode.share, _digits(mode.median), spread, profile, escape(mode.reference))
        rows.append(_row("td", cells))
    if (more := result.modes.n_modes - _MODES_SHOWN) > 0:
        rows.append(f'<tr><td colspan="{len(_COLUMNS)}" style="{_NAME}">and {more} more</td></tr>')
    return f"<table><thead>{_row('th', _COLUMNS)}</thead><tbody>{''.join(rows)}</tbody></table>"


def _row(tag: str, cells: Iterable[str]) -> str:
    styled = zip(cells, _COLUMNS.values(), strict=True)
    shown = [f'<{tag} style="{style}">{cell}</{tag}>' for cell, style in styled]
    return f"<tr>{''.join(shown)}</tr>"


def _digits(number: float) -> str:
    return "-" if math.isnan(number) else f"{number:.4f}"


def _sparkline(mode: int, steps_t: I64, reference_t: F32) -> str:
    """A reference against the step, as inline SVG: a point per pixel at most, in the colour of the text."""
    at = evenly(len(steps_t), _WIDTH)
    x, y = _WIDTH * _from_0_to_1(steps_t[at]), _HEIGHT * (1.0 - _from_0_to_1(reference_t[at]))
    points = " ".join(f"{each_x:.1f},{each_y:.1f}" for each_x, each_y in zip(x, y, strict=True))
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" viewBox="-1 -1 {_WIDTH + 2} {_HEIGHT + 2}" role="img" '
        f'aria-label="profile of mode {mode}"><polyline points="{points}" fill="none" stroke="currentColor"/>'
        "</svg>"
    )


def _from_0_to_1(values: I64 | F32) -> F64:
    """Straightened into [0, 1]; one half where nothing differs, or where something is not finite."""
    exact = values.astype(np.float64)
    low, high = exact.min(), exact.max()
    if not np.isfinite([low, high]).all() or low == high:
        return np.full(len(exact), 0.5)
    return (exact - low) / (high - low)
