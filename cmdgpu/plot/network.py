"""How the modes are spread through the network."""

# matplotlib ships its types with unannotated **kwargs.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal

import numpy as np
from matplotlib.figure import Figure

from cmdgpu.errors import UsageError
from cmdgpu.plot.labels import spoken
from cmdgpu.plot.style import MODE_COLOURS, StyledFigure, entitle, figure, largest_modes, sizes_of
from cmdgpu.views.network import network

if TYPE_CHECKING:
    from cmdgpu.decomposition import CMD

By = Literal["layer", "block", "tensor"]
MAX_BARS: Final = 64
"""Of more layers the ones with the most rows are drawn, in the order of the network."""
_STILL: Final = "#e3e3e3"
_OTHERS: Final = "#9a9a9a"


@figure("network")
def modes_through_network(cmd: CMD, *, by: By = "layer") -> Figure:
    """Which share of the rows of every layer follows which mode, as in the paper's Fig. 4(b).

    A bar per layer, block or tensor of parameters, the first one on top, filled by the shares of its rows in
    each mode; what does not move, or is not finite, is pale. The ten largest modes have a colour, the others
    share a grey. Raises UsageError for another ``by``, and where there is no parameter.
    """
    if by not in ("layer", "block", "tensor"):
        raise UsageError(f"bars by {by!r}", hint="have: layer, block, tensor")
    view = network(cmd)
    parameters = [tensor for tensor in view.tensors if tensor.kind == "parameter"]
    groups = [group for group in (parameters if by == "tensor" else view.groups(by)) if group.rows]
    if not groups:
        raise UsageError("no parameter was fitted: there is no bar to draw")
    largest = sorted(range(len(groups)), key=lambda i: -groups[i].rows)[:MAX_BARS]
    bars = [groups[i] for i in sorted(largest)]
    count_gm = np.array([bar.counts for bar in bars], dtype=np.float64)
    rows_g = np.array([bar.rows for bar in bars], dtype=np.float64)
    own = largest_modes(count_gm.sum(axis=0), len(MODE_COLOURS))
    parts = [(f"mode {m}", colour, count_gm[:, m]) for m, colour in zip(own, MODE_COLOURS, strict=False)]
    if rest := view.n_modes - len(own):
        others_g = np.delete(count_gm, own, axis=1).sum(axis=1)
        parts.append((f"{rest} more mode{'s' if rest > 1 else ''}", _OTHERS, others_g))
    still_g = np.array([bar.n_constant + bar.n_nonfinite for bar in bars], dtype=np.float64)
    if still_g.any():
        parts.append(("not moving", _STILL, still_g))

    names = [spoken(bar.name, 34) for bar in bars]
    height = max(0.19 * len(bars), 0.17 * len(parts)) + 1.1
    fig = StyledFigure(figsize=(8.2, height), layout="constrained")
    axes = fig.subplots()
    at, left_g = np.arange(len(bars)), np.zeros(len(bars))
    for label, colour, part_g in parts:
        share_g = 100 * part_g / rows_g
        axes.barh(
            at, share_g, left=left_g, height=0.82, color=colour, edgecolor="white", linewidth=0.3, label=label
        )
        left_g += share_g
    axes.set_yticks(at, names)
    axes.tick_params(axis="y", length=0, labelsize=8 if len(bars) <= 30 else 7)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of its rows (%)")
    axes.spines["left"].set_visible(False)
    for bar_at, bar in zip(at, bars, strict=True):
        axes.annotate(
            f"{bar.rows:,}", (1.01, bar_at), xycoords=("axes fraction", "data"), va="center", fontsize=7
        )
    fig.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    kept = f", the {len(bars)} largest of {len(groups):,}" if len(bars) < len(groups) else ""
    entitle(fig, f"Modes through the network, by {by}{kept}", sizes_of(cmd))
    return fig
