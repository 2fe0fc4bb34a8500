"""|corr| between the sampled rows, before and after they are ordered by mode."""

# matplotlib ships its types with unannotated **kwargs.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cmdgpu.errors import UsageError
from cmdgpu.plot.style import StyledFigure, entitle, figure, sizes_of
from cmdgpu.views.correlation import Correlations, correlations

if TYPE_CHECKING:
    from cmdgpu.decomposition import CMD

_MOST_LINES: Final = 60
"""Boundaries drawn; of more blocks the lines would hide what lies between them."""


@figure("correlation")
def correlation_matrix(cmd: CMD, *, at_most: int = 1000) -> Figure:
    """|corr| between all pairs of sampled rows: in the order of the rows, then ordered by mode.

    Within a mode the rows stand by falling sum of |corr| to their own mode, so its reference comes first.
    Constant and non-finite rows have no correlation and are left out; of more than ``at_most`` others some.
    Raises UsageError where nothing moves.
    """
    view = correlations(cmd, at_most)
    if not len(view.order):
        raise UsageError("no sampled row moves: there is no correlation to draw")
    fig = StyledFigure(figsize=(8.4, 4.1), layout="constrained")
    before, after = fig.subplots(1, 2, gridspec_kw={"wspace": 0.06})
    drawn = None
    for axes, matrix, heading in (
        (before, view.corr_kk, "rows in the order of the model"),
        (after, view.ordered_kk, "rows ordered by mode"),
    ):
        drawn = axes.imshow(matrix, vmin=0, vmax=1, cmap="magma", interpolation_stage="data")
        axes.set_title(heading, loc="left")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    if len(view.edges) <= _MOST_LINES:
        for edge in view.edges[1:-1]:
            after.axhline(edge - 0.5, color="white", linewidth=0.7)
            after.axvline(edge - 0.5, color="white", linewidth=0.7)
    _mode_ticks(after, view)
    assert drawn is not None
    bar = fig.colorbar(drawn, ax=[before, after], shrink=0.86, aspect=28, pad=0.015)
    bar.set_label("|correlation|")
    bar.outline.set_visible(False)
    sizes_line = sizes_of(cmd)
    if len(view.order) < view.n_moving:
        sizes_line += f", {len(view.order):,} of them shown"
    entitle(fig, "|corr| of the sampled rows over time", sizes_line)
    return fig


def _mode_ticks(axes: Axes, view: Correlations) -> None:
    """Mode numbers in the middle of their blocks, where a block is tall enough to carry one."""
    n = int(view.edges[-1])
    blocks = [
        ((a + b - 1) / 2, str(mode))
        for (a, b), mode in zip(pairwise(view.edges.tolist()), view.block_modes.tolist(), strict=True)
        if b - a > 0.03 * n
    ]
    axes.set_yticks([at for at, _ in blocks], [mode for _, mode in blocks])
    axes.tick_params(axis="y", length=0, pad=3)
    axes.set_ylabel("mode" if blocks else f"{len(view.block_modes)} modes")
