"""What the demo found: a score of every method, as a table and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from cmdgpu.comparison import Comparison
from cmdgpu.demo.digits import SPLIT
from cmdgpu.demo.folder import KIND
from cmdgpu.notation import F64, I64
from cmdgpu.null_model import NullCorrelation

LATE: Final = 10
"""Snapshots at the end over which accuracy is also averaged: one snapshot alone is noisy."""


@dataclass(frozen=True)
class Score:
    """How well the snapshots of one method classify; accuracies are fractions of 1."""

    last_validation: float
    last_test: float
    late_test: float
    """Mean over the last ``LATE`` snapshots."""
    selected_epoch: int
    """Highest validation accuracy; among equals the lowest validation loss, then the earliest."""
    selected_validation: float
    selected_test: float


@dataclass(frozen=True)
class FitReport:
    """One decomposition beside the training it describes."""

    n_modes_asked: int
    n_modes: int
    score: Score
    weight_mse: float
    """Mean over all rows and snapshots of (w - a r - b)^2."""
    r2_energy: float
    mean_abs_correlation: float
    null: NullCorrelation
    """Mean |corr| of independent random walks of the same T, K and number of modes."""
    result: Path
    result_bytes: int
    bytes_per_s: float
    """Of the pass over the trajectory; a trajectory this small says little about the hardware."""
    fit_s: float

    @property
    def above_null(self) -> bool:
        """Whether the rows follow their references more closely than random walks follow theirs."""
        return self.mean_abs_correlation > self.null.high


@dataclass(frozen=True)
class DemoReport:
    """What the demo found, ready for a table or for JSON."""

    directory: Path
    seed: int
    epochs: int
    device: str
    n_parameters: int
    n_snapshots: int
    n_samples: int
    """Moving rows that were clustered."""
    trajectory: Path
    trajectory_bytes: int
    training: Score
    fits: tuple[FitReport, ...]
    figures: tuple[Path, ...]
    page: Path
    """All of it to look at."""
    elapsed_s: float

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        fits: dict[str, Any] = {}
        for fit in self.fits:
            fits[str(fit.n_modes_asked)] = {
                **asdict(fit),
                "result": str(fit.result),
                "above_null": fit.above_null,
            }
        train, validation, test = SPLIT
        return {
            "kind": KIND,
            "dir": str(self.directory),
            "trajectory": str(self.trajectory),
            "figures": [str(figure) for figure in self.figures],
            "report": str(self.page),
            "seed": self.seed,
            "epochs": self.epochs,
            "device": self.device,
            "images": {"train": train, "validation": validation, "test": test},
            "n_parameters": self.n_parameters,
            "n_snapshots": self.n_snapshots,
            "n_samples": self.n_samples,
            "trajectory_bytes": self.trajectory_bytes,
            "training": asdict(self.training),
            "fit": fits,
            "elapsed_s": self.elapsed_s,
        }

    def table(self) -> str:
        """The report as text of at most 110 columns."""
        head = [
            ["", "test accuracy", "", "", "weight", "|corr|", "random walks", "stored", "pass"],
            ["method", "last", f"last {LATE}", "selected", "MSE", "mean", "5-95 %", "bytes", "GB/s"],
        ]
        rows = [
            ["training", *_accuracies(self.training), "", "", "", _megabytes(self.trajectory_bytes), ""],
            *(
                [
                    f"CMD, M = {fit.n_modes_asked}",
                    *_accuracies(fit.score),
                    f"{fit.weight_mse:.2e}",
                    f"{fit.mean_abs_correlation:.3f}",
                    f"{fit.null.low:.3f}-{fit.null.high:.3f}",
                    _megabytes(fit.result_bytes),
                    f"{fit.bytes_per_s / 1e9:.2f}",
                ]
                for fit in self.fits
            ),
        ]
        train, validation, test = SPLIT
        typical = max(min(self.training.late_test, 1 - 1 / test), 1 / test)
        error = (typical * (1 - typical) / test) ** 0.5
        below = [str(fit.n_modes_asked) for fit in self.fits if not fit.above_null]
        return "\n".join(
            [
                f"data      UCI handwritten digits, {train} to train, {validation} to select, {test} to test",
                f"model     small CNN, {self.n_parameters} parameters x {self.n_snapshots} snapshots, "
                f"{self.epochs} epochs of Adam, seed {self.seed}, {self.device}",
                "",
                *_aligned(head, rows),
                "",
                "selected  the epoch (in brackets) of best validation accuracy; test images select nothing",
                f"noise     one test image is {100 / test:.1f} points, the standard error of an accuracy "
                f"about {100 * error:.1f}",
                *(
                    [f"null      |corr| is not above that of random walks: M = {', '.join(below)}"]
                    if below
                    else []
                ),
                f"wrote     {self.trajectory}, {', '.join(fit.result.name for fit in self.fits)}",
                f"figures   {', '.join(str(figure) for figure in self.figures)}",
                f"look at   {self.page}",
                f"time      {self.elapsed_s:.1f} s",
            ]
        )


@dataclass(frozen=True)
class Curve:
    """Verdicts on all T snapshots."""

    validation_t: F64
    validation_loss_t: F64
    test_t: F64


def curve_of(comparison: Comparison, label: str) -> Curve:
    return Curve(
        validation_t=comparison.curve(label, "validation_accuracy"),
        validation_loss_t=comparison.curve(label, "validation_loss"),
        test_t=comparison.curve(label, "test_accuracy"),
    )


def score_of(steps: I64, curve: Curve) -> Score:
    """What is reported of a curve; ``Score`` says how the selected snapshot is chosen."""
    best = int(np.lexsort((steps, curve.validation_loss_t, -curve.validation_t))[0])
    return Score(
        last_validation=float(curve.validation_t[-1]),
        last_test=float(curve.test_t[-1]),
        late_test=float(curve.test_t[-LATE:].mean()),
        selected_epoch=int(steps[best]),
        selected_validation=float(curve.validation_t[best]),
        selected_test=float(curve.test_t[best]),
    )


# --- the table -------------------------------------------------------------------------------------


def _accuracies(score: Score) -> tuple[str, str, str]:
    return (
        f"{100 * score.last_test:.1f} %",
        f"{100 * score.late_test:.1f} %",
        f"{100 * score.selected_test:.1f} % ({score.selected_epoch})",
    )


def _megabytes(n: int) -> str:
    return f"{n / 1e6:.1f} MB"


def _aligned(head: list[list[str]], rows: list[list[str]]) -> list[str]:
    """Columns two spaces apart: the first to the left, the others to the right, a rule under the head."""
    widths = [max(len(row[i]) for row in [*head, *rows]) for i in range(len(head[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [*head, *rows]
    ]
    rule = "-" * max(map(len, lines))
    return [line.rstrip() for line in [*lines[: len(head)], rule, *lines[len(head) :]]]
