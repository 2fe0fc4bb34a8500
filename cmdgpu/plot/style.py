"""The house style, and the registry of figures."""

# matplotlib ships its types with unannotated **kwargs.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, Final, ParamSpec

import numpy as np
from matplotlib import style
from matplotlib.backend_bases import RendererBase
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from cmdgpu.registry import Registry

if TYPE_CHECKING:
    from cmdgpu.decomposition import CMD

FIGURES: Final[Registry[Callable[..., Figure]]] = Registry("figure")

INK: Final = "#222222"
FAINT: Final = "#8a8a8a"
BLUE: Final = "#0072b2"
# Okabe and Ito's palette, chosen to stay apart for every common form of colour vision.
COLOURS: Final = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MODE_COLOURS: Final = (*COLOURS, "#f3c4a5", "#9cc3dd", "#99d4c2", "#ebcbdd")
"""Of surfaces that touch: the palette, then paler ones of the same hues."""
DASHES: Final = ("-", (0, (4, 1.5)), (0, (1, 1)))
"""When the colours are used up."""
STYLE: Final[dict[str, Any]] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.0,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "figure.titlesize": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
    "figure.dpi": 150.0,
    "savefig.dpi": "figure",
    "figure.facecolor": "white",
    "axes.facecolor": "white",
}

_CHARACTER_INCHES: Final = 0.08
"""Of a heading, on average."""

P = ParamSpec("P")


class StyledFigure(Figure):
    """A Figure that is also drawn in the house style: ticks are made, and counted, on every draw."""

    def draw(self, renderer: RendererBase) -> None:
        with style.context(STYLE, after_reset=True):
            super().draw(renderer)


def figure(name: str) -> Callable[[Callable[P, Figure]], Callable[P, Figure]]:
    """Register a figure and build it in the house style, whatever the caller's rcParams are."""

    def decorate(draw: Callable[P, Figure]) -> Callable[P, Figure]:
        @wraps(draw)
        def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
            with style.context(STYLE, after_reset=True):
                return draw(*args, **kwargs)

        FIGURES.add(name, styled)
        return styled

    return decorate


def curve_look(order: int) -> dict[str, Any]:
    if order == 0:
        return {"color": "#444444", "linewidth": 0.9, "zorder": 2}
    times, colour = divmod(order - 1, len(COLOURS))
    dashes = DASHES[times % len(DASHES)]
    return {"color": COLOURS[colour], "linestyle": dashes, "linewidth": 1.5, "zorder": 3}


def sizes_of(cmd: CMD) -> str:
    """What a figure is of: N rows of parameters, T snapshots, M modes, K sampled rows that move."""
    n_rows, n_sampled = cmd.result.metrics["n_rows"], np.count_nonzero(cmd.sample_labels_ >= 0)
    return f"N = {n_rows:,}, T = {len(cmd.steps_):,}, M = {cmd.n_modes_}, K = {n_sampled:,}"


def entitle(fig: Figure, what: str, sizes: str) -> None:
    """The heading: what is drawn, and of what; in two lines where the figure is too narrow for one."""
    one_line = _CHARACTER_INCHES * (len(what) + len(sizes) + 5) < fig.get_figwidth()
    fig.suptitle(f"{what}{'   ' if one_line else chr(10)}({sizes})", x=0.01, ha="left")


def largest_modes(sizes_m: ArrayLike, most: int) -> list[int]:
    """At most so many modes, those with the most rows, by number; the sample numbered them."""
    return np.sort(np.argsort(-np.asarray(sizes_m), kind="stable")[:most]).tolist()
