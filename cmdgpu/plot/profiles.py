"""The reference profile of every mode, with how its sampled rows spread about it."""

# matplotlib ships its types with unannotated **kwargs.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from matplotlib.figure import Figure

from cmdgpu.errors import UsageError
from cmdgpu.plot.style import BLUE, INK, StyledFigure, entitle, figure, largest_modes, sizes_of
from cmdgpu.views.profiles import profiles

if TYPE_CHECKING:
    from cmdgpu.decomposition import CMD

MAX_PANELS: Final = 12
"""Profiles drawn; a decomposition with more modes shows its largest ones and says so."""


@figure("profiles")
def reference_profiles(cmd: CMD, *, unit: str | None = None) -> Figure:
    """The reference profile of each mode, with how the sampled rows of that mode spread about it.

    Per mode one panel: the reference, centred and scaled to unit norm, and the band that holds 95 % of
    the sampled rows of the mode, treated alike and turned to the reference's sign, as in the paper's Fig. 3.
    All panels share their axes. The heading says which share of all moving rows the mode holds. At most
    ``MAX_PANELS`` panels. ``unit`` is the trajectory's by default. Raises UsageError where nothing moves.
    """
    view = profiles(cmd)
    modes = len(view.z_mt)
    if modes == 0:
        raise UsageError("no row moves: there is no mode to draw")
    shown = largest_modes(view.size_m, MAX_PANELS)
    columns = min(len(shown), 5 if len(shown) > 4 else 4)
    lines = -(-len(shown) // columns)

    fig = StyledFigure(figsize=(max(1.95 * columns + 0.5, 5.4), 1.62 * lines + 0.95), layout="constrained")
    grid = fig.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for panel, m in zip(grid.flat, shown, strict=False):
        panel.fill_between(view.steps, view.low_mt[m], view.high_mt[m], color=BLUE, alpha=0.22, linewidth=0)
        panel.axhline(0, color="#d0d0d0", linewidth=0.6, zorder=0)
        panel.plot(view.steps, view.z_mt[m], color=BLUE, linewidth=1.4)
        heading = f"mode {m}   {100 * view.share_m[m]:.1f} %\n{view.size_m[m]:,} rows"
        panel.set_title(heading, loc="left", linespacing=1.25)
        panel.margins(x=0)
    for panel in grid.flat[len(shown) :]:
        panel.set_axis_off()
    fig.supxlabel(unit or view.unit, fontsize=9, color=INK)
    fig.supylabel("centred, unit norm", fontsize=9, color=INK)
    sizes_line = sizes_of(cmd)
    if len(shown) < modes:
        sizes_line += f", the {len(shown)} largest of {modes} modes"
    entitle(fig, "Reference profiles; the bands hold 95 % of the sampled rows", sizes_line)
    return fig
