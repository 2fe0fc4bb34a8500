"""What more modes buy."""

# matplotlib ships its types with unannotated **kwargs.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from cmdgpu.errors import UsageError
from cmdgpu.plot.labels import name_at_the_right
from cmdgpu.plot.style import BLUE, COLOURS, StyledFigure, entitle, figure
from cmdgpu.views.fits import fits

if TYPE_CHECKING:
    from cmdgpu.decomposition import CMD


@figure("fits")
def error_against_modes(cmds: Mapping[str, CMD]) -> Figure:
    """Mean squared error of the weights, R^2 and |corr| against the number of modes: the paper's Fig. 6(b).

    A point per fit of one trajectory; those of equal M stand above each other. The error has a logarithmic
    axis, on which a fit without any has no point. Raises UsageError for no fit, for fits of different
    trajectories, and where nothing moves.
    """
    if not cmds:
        raise UsageError("no fit to draw", hint="give one for every number of modes")
    points = fits(cmds)
    if all(np.isnan(point.r2) for point in points):
        raise UsageError("no row moves: there is no error to draw")
    modes = np.array([point.n_modes for point in points])
    fig = StyledFigure(figsize=(8.2, 3.2), layout="constrained")
    error, shares = fig.subplots(1, 2)
    mse = np.array([point.weight_mse for point in points])
    if (mse > 0).any():
        error.set_yscale("log")
        mse = np.where(mse > 0, mse, np.nan)
    error.plot(modes, mse, "o-", color=BLUE, markersize=4, linewidth=1.3)
    error.grid(axis="y", which="minor")
    error.set_title("mean squared error of the weights", loc="left")
    curves = {
        "R² by energy": [point.r2_energy for point in points],
        "R²": [point.r2 for point in points],
        "|corr|": [point.mean_abs_correlation for point in points],
    }
    for (name, values), colour in zip(curves.items(), (COLOURS[1], COLOURS[0], COLOURS[2]), strict=True):
        shares.plot(modes, values, "o-", color=colour, markersize=4, linewidth=1.3, label=name)
    shares.set_title("means over the rows", loc="left")
    for axes in (error, shares):
        _mode_axis(axes, modes.min(), modes.max())
    name_at_the_right(shares, {name: values[-1] for name, values in curves.items()})
    first = next(iter(cmds.values()))
    n_rows, n_snapshots = first.result.metrics["n_rows"], len(first.steps_)
    entitle(fig, "More modes", f"N = {n_rows:,}, T = {n_snapshots:,}")
    return fig


def _mode_axis(axes: Axes, least: int, most: int) -> None:
    """Whole numbers of modes; logarithmic where they span more than a factor of ten."""
    if least == most:
        axes.set_xlim(least - 1, most + 1)
    if most > 10 * least > 0:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("modes")
    axes.grid(axis="y")
