"""Accuracy of every snapshot, rebuilt ones beside the training."""

# matplotlib ships its types with unannotated **kwargs.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike

from cmdgpu.errors import UsageError
from cmdgpu.notation import F64
from cmdgpu.plot.labels import name_at_the_right
from cmdgpu.plot.style import FAINT, StyledFigure, curve_look, figure


@figure("accuracy")
def accuracy_against_step(
    steps: ArrayLike,
    curves: Mapping[str, ArrayLike],
    *,
    unit: str = "step",
    title: str = "Accuracy against step",
    quantity: str = "test accuracy (%)",
) -> Figure:
    """Accuracy of every snapshot: the training itself first, then its rebuilt versions.

    steps is (T,); each curve is (T,) with values in 0..1, drawn in per cent. The first curve is the thin
    dark one, the others are coloured, each named at its right end. Left all of it; right, enlarged, what
    follows the first sixth of the training.
    """
    steps_t = np.asarray(steps, dtype=np.float64)
    values = {name: 100 * np.asarray(curve, dtype=np.float64) for name, curve in curves.items()}
    for name, curve_t in values.items():
        if curve_t.shape != steps_t.shape or len(steps_t) < 2:
            raise UsageError(
                f"curve {name!r} has shape {curve_t.shape}, the steps {steps_t.shape}; two or more each"
            )
    if not values:
        raise UsageError("no curve to draw")
    late = len(steps_t) // 6
    low, high = _range_of([curve_t[late:] for curve_t in values.values()])

    fig = StyledFigure(figsize=(8.2, 3.6), layout="constrained")
    whole, settled = fig.subplots(1, 2, width_ratios=(1, 2.1))
    for order, (name, curve_t) in enumerate(values.items()):
        look = curve_look(order)
        whole.plot(steps_t, curve_t, **{**look, "linewidth": 0.8 * look["linewidth"]})
        settled.plot(steps_t[late:], curve_t[late:], label=name, **look)
    for axes in (whole, settled):
        axes.grid(axis="y")
        axes.set_xlabel(unit)
        axes.margins(x=0)
    whole.set_ylim(0, 101)
    whole.set_ylabel(quantity)
    whole.set_title("all of it", loc="left")
    whole.add_patch(
        Rectangle(
            (steps_t[late], low),
            steps_t[-1] - steps_t[late],
            high - low,
            facecolor="none",
            edgecolor=FAINT,
            linewidth=0.7,
            linestyle=(0, (3, 2)),
            zorder=4,
        )
    )
    settled.set_ylim(low, high)
    settled.set_title("enlarged", loc="left")
    name_at_the_right(settled, {name: float(curve_t[-1]) for name, curve_t in values.items()})
    fig.suptitle(title, x=0.01, ha="left")
    return fig


def _range_of(curves: Sequence[F64]) -> tuple[float, float]:
    """Axis limits, in per cent, that leave a little air around all the curves."""
    low, high = min(float(np.nanmin(c)) for c in curves), max(float(np.nanmax(c)) for c in curves)
    air = max(0.06 * (high - low), 0.2)
    return low - air, high + air
