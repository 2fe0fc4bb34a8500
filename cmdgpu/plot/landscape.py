"""A score over the plane of two modes."""

# matplotlib ships its types with unannotated **kwargs.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, Protocol

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from cmdgpu.errors import UsageError, printable
from cmdgpu.notation import F64
from cmdgpu.plot.labels import spoken
from cmdgpu.plot.style import BLUE, INK, StyledFigure, figure

_WIDE: Final = 100.0
"""Largest over smallest from which a positive score is drawn on a logarithmic scale."""
_N_LINES: Final = 9


class Chosen(Protocol):
    """A point with its scores."""

    @property
    def at(self) -> tuple[float, float]: ...

    @property
    def scores(self) -> Mapping[str, float]: ...


class Surface(Protocol):
    """What the figure reads of a ``Landscape``."""

    @property
    def modes(self) -> Sequence[int]: ...

    @property
    def step(self) -> int: ...

    @property
    def x(self) -> F64:
        """(X,) factors of the first mode."""
        ...

    @property
    def y(self) -> F64:
        """(Y,) factors of the second one."""
        ...

    @property
    def scores(self) -> Mapping[str, F64]:
        """(Y, X) by name."""
        ...

    @property
    def trained(self) -> Mapping[str, float]: ...

    @property
    def select(self) -> Sequence[str]: ...

    @property
    def best(self) -> Chosen | None: ...


@figure("landscape")
def landscape(surface: Surface, score: str | None = None) -> Figure:
    """A score, the first by default, over the factors of two references' values; over one of them, as a line.

    A cell for every point, in its colour, with lines of equal height; the trained point and, where there is
    one, the best point are marked, with their scores. Points without a number are left grey. The scale is
    logarithmic where a positive score spans two decades. Raises UsageError for a score that is not there.
    """
    name = next(iter(surface.scores)) if score is None else score
    if name not in surface.scores:
        raise UsageError(
            f"no score {printable(name)!r} in this landscape", hint=f"have: {', '.join(surface.scores)}"
        )
    values_yx = np.ma.masked_invalid(surface.scores[name])
    norm = _norm_of(values_yx)
    plane = len(surface.modes) == 2
    fig = StyledFigure(figsize=(5.4, 4.6) if plane else (5.4, 3.6), layout="constrained")
    axes = fig.subplots()
    axes.set_xlabel(_axis(surface.modes[0]))
    marks = [("trained", (1.0, 1.0), surface.trained[name], "o", 7.0)]
    if (best := surface.best) is not None:
        marks.append((f"best by {spoken(surface.select[0])}", best.at, best.scores[name], "*", 13.0))
    if plane:
        _draw_plane(axes, surface, values_yx, norm, spoken(name))
    else:
        axes.plot(surface.x, values_yx[0], color=BLUE, linewidth=1.5)
        axes.set(ylabel=spoken(name), yscale="log" if isinstance(norm, LogNorm) else "linear")
        axes.grid()
    for what, (x, y), value, marker, size in marks:
        axes.plot(
            [x], [y if plane else value], marker, markersize=size, markerfacecolor="white",
            markeredgecolor=INK, markeredgewidth=1.1, label=f"{what}: {value:.4g}", clip_on=False, zorder=5,
            linestyle="none",
        )  # fmt: skip
    fig.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=8)
    where = " and ".join(map(str, surface.modes))
    fig.suptitle(
        f"{spoken(name)} over mode{'s' * plane} {where}   (step {surface.step:,})", x=0.01, ha="left"
    )
    return fig


def _draw_plane(axes: Axes, surface: Surface, values_yx: F64, norm: Normalize, name: str) -> None:
    colours = colormaps["viridis"].with_extremes(bad="#dddddd")
    mesh = axes.pcolormesh(surface.x, surface.y, values_yx, shading="nearest", cmap=colours, norm=norm)
    if norm.vmin is not None and norm.vmax is not None and norm.vmin < norm.vmax:
        between = np.linspace(0.0, 1.0, _N_LINES + 2)[1:-1]
        levels = np.asarray(norm.inverse(between))
        axes.contour(
            surface.x, surface.y, values_yx, levels=levels, colors="white", linewidths=0.6, alpha=0.7
        )
    bar = axes.figure.colorbar(mesh, ax=axes, aspect=28, pad=0.02)
    bar.set_label(name)
    bar.outline.set_visible(False)
    axes.set_ylabel(_axis(surface.modes[1]))
    axes.spines[:].set_visible(False)


def _axis(mode: int) -> str:
    return f"value of reference {mode} (× trained)"


def _norm_of(values: F64) -> Normalize:
    found = np.ma.compressed(values)
    if not len(found):
        return Normalize(0.0, 0.0)
    low, high = float(found.min()), float(found.max())
    return LogNorm(low, high) if 0.0 < low * _WIDE <= high else Normalize(low, high)
