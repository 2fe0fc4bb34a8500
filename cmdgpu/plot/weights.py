"""Single weights, recorded against rebuilt."""

# matplotlib ships its types with unannotated **kwargs.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import numpy as np
from matplotlib.figure import Figure

from cmdgpu.errors import UsageError
from cmdgpu.plot.labels import spoken
from cmdgpu.plot.style import StyledFigure, curve_look, figure, largest_modes
from cmdgpu.views.weights import rebuilt_by, weights

if TYPE_CHECKING:
    from cmdgpu.baselines import Baseline
    from cmdgpu.decomposition import CMD

PER_MODE: Final = 3
"""As in the paper's Fig. 23."""
MAX_MODES_SHOWN: Final = 10


@figure("weights")
def sampled_weights(
    cmd: CMD, baselines: Mapping[str, Baseline] | None = None, *, unit: str | None = None
) -> Figure:
    """Three sampled weights of each mode, recorded and rebuilt, as in the paper's Figs. 1 and 23.

    A line of panels per mode: its reference first, then the row in the middle and the one that follows it
    worst. Fitted ``baselines``, by name, are drawn as well. At most ten modes. Raises UsageError where
    nothing moves, and for a baseline of another trajectory.
    """
    view = weights(cmd, per_mode=PER_MODE, at_most=PER_MODE * cmd.n_modes_)
    if not len(view.row):
        raise UsageError("no sampled row moves: there is no weight to draw")
    rebuilt = {"CMD": view.rebuilt}
    rebuilt |= {name: rebuilt_by(baseline, view) for name, baseline in (baselines or {}).items()}
    largest = largest_modes(cmd.result.metrics["mode_sizes"], MAX_MODES_SHOWN)
    shown = [m for m in largest if m in view.mode]
    fig = StyledFigure(figsize=(8.2, 1.5 * len(shown) + 0.8), layout="constrained")
    grid = fig.subplots(len(shown), PER_MODE, sharex=True, squeeze=False)
    for line, m in zip(grid, shown, strict=True):
        mine = np.flatnonzero(view.mode == m).tolist()
        for axes, i in zip(line, mine, strict=False):
            axes.plot(view.steps, view.recorded[i], **curve_look(0))
            for order, rows_nt in enumerate(rebuilt.values(), start=1):
                axes.plot(view.steps, rows_nt[i], **curve_look(order))
            index = str(list(view.index[i]) or "")
            place = spoken(view.tensor[i], max(9, 29 - len(index))) + index
            axes.set_title(f"{place}   r = {view.correlation[i]:.2f}", loc="left", fontsize=7)
            axes.margins(x=0)
            axes.tick_params(labelsize=7)
        for axes in line[len(mine) :]:
            axes.set_axis_off()
        line[0].set_ylabel(f"mode {m}")
    for axes in grid[-1]:
        axes.set_xlabel(unit or view.unit)
    kept = f", {len(shown)} of {cmd.n_modes_} modes" if len(shown) < cmd.n_modes_ else ""
    fig.suptitle(f"Sampled weights, recorded and rebuilt{kept}", x=0.01, ha="left")
    lines, names = grid[0, 0].get_lines(), ["recorded", *(spoken(name, 30) for name in rebuilt)]
    columns = min(len(names), 110 // (max(map(len, names)) + 6))
    fig.legend(lines, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=8)
    return fig
