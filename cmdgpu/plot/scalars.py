"""What was recorded beside the weights, against the step."""

# matplotlib ships its types with unannotated **kwargs.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from matplotlib.figure import Figure

from cmdgpu.errors import UsageError
from cmdgpu.plot.labels import spoken
from cmdgpu.plot.style import BLUE, INK, StyledFigure, figure
from cmdgpu.views.scalars import scalars

if TYPE_CHECKING:
    from cmdgpu.decomposition import CMD

MAX_SCALARS: Final = 12
"""Series drawn, the first ones."""


@figure("scalars")
def scalars_against_step(cmd: CMD, *, unit: str | None = None) -> Figure:
    """Loss, accuracy and whatever else was recorded at the fitted steps, a panel for every series.

    Raises UsageError where nothing was recorded, or the trajectory is out of reach.
    """
    series = {name: curve_t for name, curve_t in scalars(cmd).items() if np.isfinite(curve_t).any()}
    if cmd.trajectory is None:
        raise UsageError("the trajectory is out of reach: its scalars are not known", hint="put it back")
    if not series:
        raise UsageError("no scalar was recorded", hint="give recorder.record(step, loss=...)")
    shown = list(series.items())[:MAX_SCALARS]
    columns = min(len(shown), 3)
    lines = -(-len(shown) // columns)
    fig = StyledFigure(figsize=(max(2.75 * columns, 4.2), 1.9 * lines + 0.75), layout="constrained")
    grid = fig.subplots(lines, columns, sharex=True, squeeze=False)
    marker = "o" if len(cmd.steps_) < 30 else ""
    for axes, (name, curve_t) in zip(grid.flat, shown, strict=False):
        finite = np.isfinite(curve_t)
        axes.plot(
            cmd.steps_[finite], curve_t[finite], marker=marker, markersize=2.5, color=BLUE, linewidth=1.3
        )
        axes.set_title(spoken(name, 26), loc="left")
        axes.grid(axis="y")
        axes.margins(x=0.01)
        axes.ticklabel_format(axis="y", scilimits=(-4, 5), useMathText=True)
    for axes in grid.flat[len(shown) :]:
        axes.set_axis_off()
    fig.supxlabel(unit or cmd.trajectory.unit, fontsize=9, color=INK)
    kept = f", the first {len(shown)} of {len(series)}" if len(shown) < len(series) else ""
    fig.suptitle(f"Recorded beside the weights{kept}", x=0.01, ha="left")
    return fig
