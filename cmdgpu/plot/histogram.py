"""How closely the rows follow their modes, beside what chance would give."""

# matplotlib ships its types with unannotated **kwargs.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cmdgpu.errors import UsageError
from cmdgpu.notation import F64
from cmdgpu.plot.style import BLUE, COLOURS, StyledFigure, entitle, figure, sizes_of
from cmdgpu.views.histogram import histograms

if TYPE_CHECKING:
    from cmdgpu.decomposition import CMD

_CHANCE_COLOURS = tuple(colour for colour in COLOURS if colour != BLUE)


@figure("histogram")
def correlation_histogram(cmd: CMD) -> Figure:
    """|corr| and R^2 of all moving rows of parameters, and those of unrelated rows of the same T, K and M.

    Bars are shares of the rows in 50 bins. A line is the mean of a null model, its band the 5 to 95 % of the
    repeats: see ``CMD.quality()``, which takes a second or two the first time; where it has nothing to judge
    there is no line. Raises UsageError where nothing moves.
    """
    if not cmd.result.totals.histogram.any():
        raise UsageError("no row moves: there is no correlation to draw")
    view = histograms(cmd)
    fig = StyledFigure(figsize=(8.2, 3.3), layout="constrained")
    left, right = fig.subplots(1, 2)
    _panel(left, view.edges, view.abs_correlation, "|corr| with the mode's reference")
    _panel(right, view.edges, view.r2, "R²")
    for (name, band), colour in zip(view.chance.items(), _CHANCE_COLOURS, strict=False):
        for axes, low, mean, high in (
            (left, band.abs_correlation_low, band.abs_correlation_mean, band.abs_correlation_high),
            (right, band.r2_low, band.r2_mean, band.r2_high),
        ):
            axes.stairs(100 * high, view.edges, baseline=100 * low, fill=True, color=colour, alpha=0.25)
            axes.stairs(
                100 * mean, view.edges, color=colour, linewidth=1.1, label=f"chance: {name}", baseline=None
            )
    left.set_ylabel("share of the rows (%)")
    left.legend(loc="upper left", frameon=False, fontsize=8)
    entitle(fig, "How closely rows follow their mode", sizes_of(cmd))
    return fig


def _panel(axes: Axes, edges: F64, shares: F64, what: str) -> None:
    axes.stairs(100 * shares, edges, fill=True, color=BLUE, alpha=0.75, label="these modes")
    axes.set_xlabel(what)
    axes.set_xlim(0, 1)
    axes.grid(axis="y")
