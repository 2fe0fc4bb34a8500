"""Figures of a machine's results: time along every axis, and rate against M under what memory allows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a server has no display

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

from benchmarks.scaling import AXES, Curve, curves

_MARKERS = "osD^vPX*h<>p"
_LINE = {"markersize": 4.5, "linewidth": 1.2}


def draw(records: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """``scaling.png`` and ``rates.png``, as far as the records hold any curve."""
    found = curves(records)
    drawn: list[Path] = []
    if found:
        drawn.append(_scaling(found, folder / "scaling.png"))
    if any(curve.axis == "modes" for curve in found):
        drawn.append(_rates([c for c in found if c.axis == "modes"], folder / "rates.png"))
    return drawn


def _styles(found: Sequence[Curve]) -> dict[str, dict[str, Any]]:
    """The same colour and marker for a provider in every panel; the product's own choice stands out."""
    names = list(dict.fromkeys(curve.provider for curve in found))
    chosen = {curve.provider for curve in found if curve.chosen}
    colours: Any = plt.get_cmap("tab20")
    return {
        name: {
            **_LINE,
            "color": "black" if name in chosen else colours(i % 20),
            "marker": _MARKERS[i % len(_MARKERS)],
            "linewidth": 2.2 if name in chosen else 1.2,
            "zorder": 3 if name in chosen else 2,
        }
        for i, name in enumerate(names)
    }


def _scaling(found: Sequence[Curve], path: Path) -> Path:
    """Time against each axis; the exponent beyond the memory-bound region stands at the end of its curve."""
    axes = [axis for axis in AXES if any(curve.axis == axis for curve in found)]
    styles = _styles(found)
    figure: Any
    panels: Any
    figure, panels = plt.subplots(
        1, len(axes), figsize=(4.0 * len(axes), 4.6), squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes, panels[0], strict=True):
        mine = [curve for curve in found if curve.axis == axis]
        for curve in mine:
            panel.loglog(curve.x, curve.ms, **styles[curve.provider])
        _name_ends(panel, mine, styles)
        ticks = sorted({x for curve in mine for x in curve.x})
        panel.set_xticks(ticks, [f"{x:.4g}".replace("e+0", "e") for x in ticks], rotation=45)
        panel.minorticks_off()
        panel.set_xlabel(AXES[axis])
        panel.set_title(mine[0].fixed, fontsize=9)
        panel.grid(alpha=0.25)
        panel.margins(x=0.16)
    panels[0][0].set_ylabel("ms for all rows")
    handles = [Line2D([], [], label=name, **style) for name, style in styles.items()]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(6, 2 * len(axes)), fontsize=8, frameon=False
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _name_ends(panel: Any, mine: Sequence[Curve], styles: dict[str, dict[str, Any]]) -> None:
    """Exponents beside the last points, moved apart where curves end together."""
    low, high = panel.get_ylim()
    least = (high / low) ** 0.042
    at = 0.0
    for curve in sorted(mine, key=lambda curve: curve.ms[-1]):
        if curve.exponent is None:
            continue
        at = max(curve.ms[-1], at * least)
        panel.annotate(
            f"{curve.exponent:.2f}",
            (curve.x[-1], at),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            color=styles[curve.provider]["color"],
        )


def _rates(found: Sequence[Curve], path: Path) -> Path:
    styles = _styles(found)
    figure: Any
    panel: Any
    figure, panel = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
    longest = max(found, key=lambda curve: len(curve.x))
    panel.loglog(
        longest.x, longest.ceiling_gb_per_s, color="tab:red", linestyle="--", label="reading memory, same run"
    )
    for curve in found:
        panel.loglog(curve.x, curve.gb_per_s, label=curve.provider, **styles[curve.provider])
    panel.set_xticks(longest.x, [f"{x:.0f}" for x in longest.x])
    panel.minorticks_off()
    panel.set_xlabel("M")
    panel.set_ylabel("GB/s of W")
    panel.set_title(found[0].fixed, fontsize=9)
    panel.grid(alpha=0.25)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
