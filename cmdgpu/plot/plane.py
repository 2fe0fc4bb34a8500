"""The path of the training in a plane."""

# matplotlib ships its types with unannotated **kwargs.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cmdgpu.errors import UsageError
from cmdgpu.notation import F64
from cmdgpu.plot.style import BLUE, COLOURS, INK, StyledFigure, entitle, figure, sizes_of
from cmdgpu.views.plane import plane
from cmdgpu.views.profiles import profiles

if TYPE_CHECKING:
    from cmdgpu.decomposition import CMD


@figure("plane")
def trajectory_plane(cmd: CMD, *, modes: tuple[int, int] | None = None) -> Figure:
    """The snapshots as points of a plane, joined in the order of the training, from ring to disc.

    The plane is that of the first two principal components of the sampled rows, with the recorded path and
    the one that the modes give. With ``modes=(i, j)`` it is that of two reference profiles, centred and of
    unit norm, one path. Raises UsageError where nothing moves, and for a mode that is not there.
    """
    fig = StyledFigure(figsize=(5.6, 4.4), layout="constrained")
    axes = fig.subplots()
    if modes is None:
        view = plane(cmd)
        if not view.explained.any():
            raise UsageError("no sampled row moves: there is no path to draw")
        _path(axes, view.recorded, "recorded", INK)
        _path(axes, view.rebuilt, "rebuilt from the modes", COLOURS[0])
        first, second = (f"{100 * share:.1f} % of the movement" for share in view.explained.tolist())
        axes.set_xlabel(f"first principal component, {first}")
        axes.set_ylabel(f"second principal component, {second}")
        axes.legend(frameon=False, fontsize=8, loc="best")
    else:
        z_mt = profiles(cmd).z_mt
        for mode in modes:
            if not 0 <= mode < len(z_mt):
                raise UsageError(f"there is no mode {mode}", hint=f"have: {len(z_mt)}, the first is 0")
        _path(axes, z_mt[list(modes)], "reference profiles", BLUE)
        axes.set(xlabel=f"profile of mode {modes[0]}", ylabel=f"profile of mode {modes[1]}")
    axes.grid()
    entitle(fig, "From the ring to the disc", sizes_of(cmd))
    return fig


def _path(axes: Axes, at_2t: F64, label: str, colour: str) -> None:
    """A line through all snapshots, dots where they are few, a ring on the first, a disc on the last."""
    few = "." if at_2t.shape[1] <= 200 else ""
    axes.plot(*at_2t, marker=few, markersize=3, color=colour, linewidth=0.9, label=label, alpha=0.85)
    axes.plot(*at_2t[:, :1], "o", color=colour, markersize=6, fillstyle="none")
    axes.plot(*at_2t[:, -1:], "o", color=colour, markersize=6)
