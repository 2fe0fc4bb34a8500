"""Names beside what they name: shortened, escaped, moved apart."""

# matplotlib ships its types with unannotated **kwargs.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes

_FONTS: Any = font_manager  # its paths have no type arguments


def spoken(name: str, limit: int = 40) -> str:
    """A name from a file or a user as text that can be drawn: one line, short, no formula, no missing glyph.

    Of a long one the middle is left out: where it lies and what it is stand at its ends. Characters that the
    font does not have are escaped, and a dollar sign does not begin a formula.
    """
    shown = "".join(c if _is_drawn(c) else c.encode("unicode_escape").decode() for c in name)
    if len(shown) > limit:
        head = (limit - 1) // 2
        shown = f"{shown[:head]}…{shown[head + 1 - limit :]}"
    return shown.replace("$", r"\$")


@cache
def _is_drawn(character: str) -> bool:
    if not character.isprintable():
        return False
    found = _FONTS.findfont(_FONTS.FontProperties(family="DejaVu Sans"))
    return _FONTS.get_font(found).get_char_index(ord(character)) != 0


def name_at_the_right(axes: Axes, ends: Mapping[str, float]) -> None:
    """Each curve's name beside its end, moved apart where they would overlap."""
    names = sorted(ends, key=lambda name: ends[name])
    _ = axes.get_ylim()  # limits are made when they are asked for
    of_axis, of_data = axes.transAxes.inverted(), axes.transData
    wanted = [float(of_axis.transform(of_data.transform((0.0, ends[name])))[1]) for name in names]
    colours = {line.get_label(): line.get_color() for line in axes.get_lines()}
    for name, end, at in zip(names, wanted, apart(wanted, 0.062), strict=True):
        axes.annotate(
            spoken(name),
            xy=(1.0, end),
            xytext=(1.04, at),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            color=colours[name],
            fontsize=8.5,
            arrowprops={
                "arrowstyle": "-",
                "color": colours[name],
                "linewidth": 0.6,
                "relpos": (0.0, 0.5),
                "shrinkA": 1,
                "shrinkB": 1,
            },
        )


def apart(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions ``gap`` or more apart, as near as can be to the ascending ones wanted, in 0..1 if they fit.

    Less their gaps, such positions need only ascend: isotonic regression, by pooling neighbours.
    """
    pools: list[tuple[float, int]] = []
    for i, position in enumerate(wanted):
        mean, count = position - gap * i, 1
        while pools and pools[-1][0] >= mean:
            before, n = pools.pop()
            mean, count = (before * n + mean * count) / (n + count), n + count
        pools.append((mean, count))
    bare = np.repeat([mean for mean, _ in pools], [count for _, count in pools])
    highest = max(0.0, 1.0 - gap * (len(wanted) - 1))
    return (np.clip(bare, 0.0, highest) + gap * np.arange(len(wanted))).tolist()
