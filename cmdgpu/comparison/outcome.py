"""What a comparison found: rows of methods by steps, as a table, as JSON, as CSV, as a figure."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np

from cmdgpu.comparison.judging import Treatment
from cmdgpu.errors import UsageError
from cmdgpu.memory import show_bytes
from cmdgpu.notation import F64, I64

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SAID: Final[dict[Treatment, str]] = {"none": "", "kept": "kept", "reestimated": "re-estimated"}


@dataclass(frozen=True)
class Row:
    """One method at one step, under one treatment of BatchNorm."""

    method: str
    label: str
    """The method and its settings: what tables and figures call it."""
    config: dict[str, Any]
    step: int
    batch_norm: Treatment
    weight_mse: float
    """Mean of (what - w)^2 over the parameters that are finite at every snapshot."""
    relative_error: float
    """|what - w| / |w| over the same."""
    stored_bytes: int
    """What it takes to rebuild all fitted steps; of an average, one model."""
    fit_s: float
    rebuild_s: float
    """Seconds until the model had its weights; NaN where none was asked for."""
    scores: dict[str, float] = field(default_factory=dict[str, float])
    error: str | None = None
    """Why there are no scores where others have some: the weights are beyond all numbers."""

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is not finite is None."""
        return {key: _strict(value) for key, value in vars(self).items()}


@dataclass(frozen=True)
class Comparison:
    """Methods side by side; ``rows`` has every method at every step under every treatment of BatchNorm.

    What is selected is selected by validation scores and only reported on others: ``selected`` is the step
    where the first score of ``select`` is highest, among equals the next one, then the earliest step.
    """

    rows: tuple[Row, ...]
    source: str
    trajectory: str
    """Fingerprint of what was compared: where it lies is no part of it."""
    unit: str
    """What a step counts: step, epoch, ..."""
    n_rows: int
    """Parameters that are compared: those finite at every snapshot."""
    n_snapshots: int
    select: tuple[str, ...] = ()
    """Names of scores; ``min:loss`` where lower is better."""

    # ---- parts of it --------------------------------------------------------------------------------

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(row.label for row in self.rows))

    @property
    def steps(self) -> I64:
        """(S,) ascending."""
        return np.unique([row.step for row in self.rows])

    @property
    def treatments(self) -> tuple[Treatment, ...]:
        """Of BatchNorm: ("none",), or "kept" or "reestimated" or both."""
        return tuple(dict.fromkeys(row.batch_norm for row in self.rows))

    @property
    def scores(self) -> tuple[str, ...]:
        """Names of the scores."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row.scores))

    def of(self, label: str, batch_norm: Treatment | None = None) -> list[Row]:
        """The rows of one method by step; of several treatments the last, re-estimated statistics.

        Raises UsageError for a label or a treatment that is not there.
        """
        if label not in self.labels:
            raise UsageError(f"no method {label!r} was compared", hint=f"have: {', '.join(self.labels)}")
        wanted = self.treatments[-1] if batch_norm is None else batch_norm
        if wanted not in self.treatments:
            raise UsageError(
                f"no statistics of BatchNorm are {wanted!r}", hint=f"have: {', '.join(self.treatments)}"
            )
        return [row for row in self.rows if row.label == label and row.batch_norm == wanted]

    def curve(self, label: str, score: str, batch_norm: Treatment | None = None) -> F64:
        """(S,) a score, or ``weight_mse`` or ``relative_error``; NaN where there is none."""
        if score not in (*self.scores, "weight_mse", "relative_error"):
            have = ", ".join((*self.scores, "weight_mse", "relative_error"))
            raise UsageError(f"no score {score!r}", hint=f"have: {have}")
        rows = self.of(label, batch_norm)
        return np.array([{**vars(row), **row.scores}.get(score, np.nan) for row in rows], dtype=np.float64)

    def last(self, label: str, batch_norm: Treatment | None = None) -> Row:
        """The row of the last step."""
        return self.of(label, batch_norm)[-1]

    def selected(self, label: str, batch_norm: Treatment | None = None) -> Row | None:
        """The row that ``select`` chooses; None without one, or where every such score is NaN."""
        rows = self.of(label, batch_norm)
        keys: list[F64] = []
        for key in self.select:
            curve = self.curve(label, key.removeprefix("min:"), batch_norm)
            keys.append(curve if key.startswith("min:") else -curve)
        if not keys or np.isnan(keys[0]).all():
            return None
        return rows[int(np.lexsort(keys[::-1])[0])]

    # ---- as a table, JSON, CSV, a figure ------------------------------------------------------------

    def table(self) -> str:
        """Every method at the last step, and where there is one at the selected step, as text."""
        last, selected = self._last_and_selected()
        head, *lines = _aligned([self._head(), *map(self._cells, [*last, *selected])])
        text = [
            f"{self.source}  {self.n_rows} parameters x {self.n_snapshots} snapshots, "
            f"{len(self.steps)} of them compared",
            "",
            head,
            "-" * max(map(len, [head, *lines])),
            *lines[: len(last)],
        ]
        if selected:
            text += ["", f"where {', then '.join(self.select)} is best", *lines[len(last) :]]
        failed = [row for row in self.rows if row.error is not None]
        text += [f"no scores  {row.label} at {self.unit} {row.step}: {row.error}" for row in failed[:3]]
        return "\n".join(text)

    def _last_and_selected(self) -> tuple[list[Row], list[Row]]:
        """Of every method under every treatment."""
        sides = list(itertools.product(self.labels, self.treatments))
        chosen = (self.selected(*side) for side in sides)
        return [self.last(*side) for side in sides], [row for row in chosen if row is not None]

    def _head(self) -> list[str]:
        return [
            "method",
            *(["BatchNorm"] if self.treatments != ("none",) else []),
            *(self.unit, *self.scores, "weight MSE", "rel. error", "stored", "fit s"),
        ]

    def _cells(self, row: Row) -> list[str]:
        return [
            row.label,
            *([_SAID[row.batch_norm]] if self.treatments != ("none",) else []),
            str(row.step),
            *(f"{row.scores[name]:.4f}" if name in row.scores else "" for name in self.scores),
            f"{row.weight_mse:.3g}",
            f"{row.relative_error:.3g}",
            show_bytes(row.stored_bytes),
            "" if math.isnan(row.fit_s) else f"{row.fit_s:.2f}",
        ]

    def to_json(self) -> dict[str, Any]:
        """Plain values: ``methods`` has the rows, ``last`` and ``selected`` some of them; NaN is None."""
        last, selected = self._last_and_selected()
        return {
            "source": self.source,
            "trajectory": self.trajectory,
            "unit": self.unit,
            "n_parameters": self.n_rows,
            "n_snapshots": self.n_snapshots,
            "steps": self.steps.tolist(),
            "batch_norm": list(self.treatments),
            "scores": list(self.scores),
            "select": list(self.select),
            "methods": [row.to_json() for row in self.rows],
            "last": [row.to_json() for row in last],
            "selected": [row.to_json() for row in selected],
        }

    def write_csv(self, path: str | os.PathLike[str]) -> None:
        """A line for every row, a column for every score."""
        plain = [field.name for field in dataclasses.fields(Row) if field.name not in ("config", "scores")]
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*plain, *self.scores])
            for row in self.rows:
                scores = [row.scores.get(name, "") for name in self.scores]
                writer.writerow([*(getattr(row, name) for name in plain), *scores])

    def figure(self, score: str | None = None, batch_norm: Treatment | None = None) -> Figure:
        """A score and the relative error of the weights against the step, a line for every method.

        ``score`` is the first one by default; without scores the errors alone are drawn.
        """
        from cmdgpu.plot import methods_against_step

        score = next(iter(self.scores), None) if score is None else score
        selected: dict[str, int] = {}
        for label in self.labels:
            if score is not None and (row := self.selected(label, batch_norm)) is not None:
                selected[label] = row.step
        treatment = _SAID[self.treatments[-1] if batch_norm is None else batch_norm]
        return methods_against_step(
            self.steps,
            {label: self.curve(label, "relative_error", batch_norm) for label in self.labels},
            {} if score is None else {label: self.curve(label, score, batch_norm) for label in self.labels},
            selected=selected,
            unit=self.unit,
            quantity=score or "",
            title=f"N = {self.n_rows:,}, T = {self.n_snapshots}"
            + (f", BatchNorm statistics {treatment}" if treatment else ""),
        )


def _strict(value: Any) -> Any:
    """NaN and infinity as None, in one level of names, too."""
    if isinstance(value, dict):
        return {str(key): _strict(inner) for key, inner in cast(dict[Any, Any], value).items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns two spaces apart: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
