"""Methods beside each other, against the step."""

# matplotlib ships its types with unannotated **kwargs.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from cmdgpu.notation import F64
from cmdgpu.plot.labels import name_at_the_right, spoken
from cmdgpu.plot.style import StyledFigure, curve_look, figure


@figure("methods")
def methods_against_step(
    steps: ArrayLike,
    errors: Mapping[str, ArrayLike],
    scores: Mapping[str, ArrayLike] | None = None,
    *,
    selected: Mapping[str, int] | None = None,
    unit: str = "step",
    quantity: str = "score",
    title: str = "",
) -> Figure:
    """How far the weights of several methods are from the recorded ones, and a score, against the step.

    steps is (S,), every curve (S,), under the same names in both panels; the first name has the thin dark
    line. A dot marks the last step, a ring the step that was ``selected``. Errors have a logarithmic axis, so
    a method without any, as the recorded snapshots, has no line there; nor has what is not finite.
    """
    steps_t = np.asarray(steps, dtype=np.float64)
    looks = {name: curve_look(order) for order, name in enumerate(errors)}
    panels: list[tuple[str, dict[str, F64]]] = [
        ("relative error of the weights", {name: _shown(curve, above=0.0) for name, curve in errors.items()})
    ]
    if scores:
        panels.append((quantity, {name: _shown(curve) for name, curve in scores.items()}))

    room = 0.4 + 0.075 * max(len(spoken(name)) for name in errors)  # for the names
    height = max(3.8, 0.6 + 0.2 * len(errors))
    fig = StyledFigure(figsize=(4.0 * len(panels) + room, height), layout="constrained")
    drawn = fig.subplots(1, len(panels), squeeze=False)[0]
    drawn[0].set_yscale("log")
    for axes, (heading, curves) in zip(drawn, panels, strict=True):
        for name, curve_t in curves.items():
            if np.isfinite(curve_t).any():
                axes.plot(steps_t, curve_t, label=name, **looks[name])
                axes.plot(steps_t[-1:], curve_t[-1:], "o", color=looks[name]["color"], markersize=3)
        axes.set_title(heading, loc="left")
        axes.set_xlabel(unit)
        axes.grid(axis="y")
        axes.margins(x=0.02)
    last, (_, curves) = drawn[-1], panels[-1]
    if scores:  # what follows the first sixth decides how much is shown: the rise to it is the same for all
        late = np.concatenate([curve_t[len(steps_t) // 6 :] for curve_t in curves.values()])
        low, high = np.nanmin(late, initial=np.inf), np.nanmax(late, initial=-np.inf)
        if low < high:
            last.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    for name, step in (selected or {}).items():
        at = steps_t == step
        ring = {"color": looks[name]["color"], "markersize": 7, "fillstyle": "none", "zorder": 5}
        last.plot(steps_t[at], curves[name][at], "o", **ring)
    ends = {name: curve_t[np.isfinite(curve_t)] for name, curve_t in curves.items()}
    name_at_the_right(last, {name: float(known[-1]) for name, known in ends.items() if len(known)})
    fig.suptitle(title, x=0.01, ha="left")
    return fig


def _shown(curve: ArrayLike, above: float = -np.inf) -> F64:
    """What of a curve can be drawn; NaN elsewhere."""
    values = np.asarray(curve, dtype=np.float64)
    return np.where(np.isfinite(values) & (values > above), values, np.nan)
