"""One function per figure, registered in ``FIGURES`` under its name.

Each returns a ``matplotlib.figure.Figure`` of its own: no pyplot, no backend chosen, no global settings
changed. ``figure.savefig(path)`` writes it.
"""

# matplotlib ships its types with unannotated **kwargs.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from itertools import pairwise
from typing import Any, Final, ParamSpec, Protocol

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike

from cmdgpu.errors import UsageError
from cmdgpu.notation import F64, I64
from cmdgpu.registry import Registry

FIGURES: Final[Registry[Callable[..., Figure]]] = Registry("figure")

MAX_PANELS: Final = 12
"""Profiles drawn; a decomposition with more modes shows its largest ones and says so."""

INK: Final = "#222222"
FAINT: Final = "#8a8a8a"
BLUE: Final = "#0072b2"
# Okabe and Ito's palette, chosen to stay apart for every common form of colour vision.
COLOURS: Final = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
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
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
    "figure.dpi": 150.0,
    "savefig.dpi": "figure",
    "figure.facecolor": "white",
    "axes.facecolor": "white",
}

P = ParamSpec("P")


class Decomposed(Protocol):
    """What the figures read of a fitted ``CMD``."""

    @property
    def references_(self) -> ArrayLike:
        """(M, T)."""
        ...

    @property
    def steps_(self) -> ArrayLike:
        """(T,)."""
        ...

    @property
    def sample_(self) -> ArrayLike:
        """(K, T)."""
        ...

    @property
    def sample_labels_(self) -> ArrayLike:
        """(K,): the mode of each sampled row, -1 constant, -2 non-finite."""
        ...

    @property
    def metrics_(self) -> Mapping[str, Any]:
        """At least ``mode_sizes``, ``n_constant`` and ``n_nonfinite``."""
        ...


class StyledFigure(Figure):
    """A Figure that is also drawn in the house style: ticks are made, and counted, on every draw."""

    def draw(self, renderer: RendererBase) -> None:
        with style.context(STYLE, after_reset=True):
            super().draw(renderer)


def _figure(name: str) -> Callable[[Callable[P, Figure]], Callable[P, Figure]]:
    """Register a figure and build it in the house style, whatever the caller's rcParams are."""

    def decorate(draw: Callable[P, Figure]) -> Callable[P, Figure]:
        @wraps(draw)
        def styled(*args: P.args, **kwargs: P.kwargs) -> Figure:
            with style.context(STYLE, after_reset=True):
                return draw(*args, **kwargs)

        FIGURES.add(name, styled)
        return styled

    return decorate


@_figure("accuracy")
def accuracy_against_step(
    steps: ArrayLike,
    curves: Mapping[str, ArrayLike],
    *,
    unit: str = "step",
    title: str = "Accuracy against step",
    quantity: str = "test accuracy (%)",
) -> Figure:
    """Accuracy of every snapshot: the training itself first, then its rebuilt versions.

    steps is (T,); each curve is (T,) with values in 0..1, drawn in per cent. The first curve is the thin
    dark one, the others are coloured, each named at its right end. Left all of it; right, enlarged, what
    follows the first sixth of the training.
    """
    steps_t = np.asarray(steps, dtype=np.float64)
    values = {name: 100 * np.asarray(curve, dtype=np.float64) for name, curve in curves.items()}
    for name, curve_t in values.items():
        if curve_t.shape != steps_t.shape or len(steps_t) < 2:
            raise UsageError(
                f"curve {name!r} has shape {curve_t.shape}, the steps {steps_t.shape}; two or more each"
            )
    if not values:
        raise UsageError("no curve to draw")
    late = len(steps_t) // 6
    low, high = _range_of([curve_t[late:] for curve_t in values.values()])

    figure = StyledFigure(figsize=(8.2, 3.6), layout="constrained")
    whole, settled = figure.subplots(1, 2, width_ratios=(1, 2.1))
    for order, (name, curve_t) in enumerate(values.items()):
        look = _curve_look(order)
        whole.plot(steps_t, curve_t, **{**look, "linewidth": 0.8 * look["linewidth"]})
        settled.plot(steps_t[late:], curve_t[late:], label=name, **look)
    for axes in (whole, settled):
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.set_xlabel(unit)
        axes.margins(x=0)
    whole.set_ylim(0, 101)
    whole.set_ylabel(quantity)
    whole.set_title("all of it", loc="left")
    whole.add_patch(
        Rectangle(
            (steps_t[late], low),
            steps_t[-1] - steps_t[late],
            high - low,
            facecolor="none",
            edgecolor=FAINT,
            linewidth=0.7,
            linestyle=(0, (3, 2)),
            zorder=4,
        )
    )
    settled.set_ylim(low, high)
    settled.set_title("enlarged", loc="left")
    _name_at_the_right(settled, {name: float(curve_t[-1]) for name, curve_t in values.items()})
    figure.suptitle(title, x=0.01, ha="left")
    return figure


@_figure("profiles")
def reference_profiles(cmd: Decomposed, *, unit: str = "step") -> Figure:
    """The reference profile of each mode, with how the sampled rows of that mode spread about it.

    Per mode one panel: the reference, centred and scaled to unit norm, and the band that holds 90 % of
    the sampled rows of the mode, treated alike and turned to the reference's sign. All panels share their
    axes. The heading says which share of all moving rows the mode holds. At most ``MAX_PANELS`` panels.
    """
    R_mt = np.asarray(cmd.references_, dtype=np.float64)
    modes = len(R_mt)
    if modes == 0:
        raise UsageError("no row moves: there is no mode to draw")
    steps_t = np.asarray(cmd.steps_, dtype=np.float64)
    z_mt = _profiles(R_mt)
    sizes = np.asarray(cmd.metrics_["mode_sizes"], dtype=np.int64)
    sample_kt = np.asarray(cmd.sample_, dtype=np.float64)
    label_k = np.asarray(cmd.sample_labels_, dtype=np.int64)
    shown = min(modes, MAX_PANELS)
    columns = min(shown, 5 if shown > 4 else 4)
    lines = -(-shown // columns)

    figure = StyledFigure(figsize=(max(1.95 * columns + 0.5, 4.6), 1.62 * lines + 0.95), layout="constrained")
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for panel, mode in zip(grid.flat, range(shown), strict=False):
        x_kt = _profiles(sample_kt[label_k == mode])
        x_kt *= np.where(x_kt @ z_mt[mode] < 0, -1.0, 1.0)[:, None]
        if len(x_kt) > 1:
            low_t, high_t = np.quantile(x_kt, (0.05, 0.95), axis=0)
            panel.fill_between(steps_t, low_t, high_t, color=BLUE, alpha=0.22, linewidth=0)
        panel.axhline(0, color="#d0d0d0", linewidth=0.6, zorder=0)
        panel.plot(steps_t, z_mt[mode], color=BLUE, linewidth=1.4)
        share = sizes[mode] / max(int(sizes.sum()), 1)
        panel.set_title(
            f"mode {mode}   {100 * share:.1f} %\n{sizes[mode]:,} rows", loc="left", linespacing=1.25
        )
        panel.margins(x=0)
    for panel in grid.flat[shown:]:
        panel.set_axis_off()
    figure.supxlabel(unit, fontsize=9, color=INK)
    figure.supylabel("centred, unit norm", fontsize=9, color=INK)
    sizes_line = _sizes_line(cmd, R_mt, label_k)
    if shown < modes:
        sizes_line += f", the {shown} largest of {modes} modes"
    figure.suptitle(
        f"Reference profiles; the bands hold 90 % of the sampled rows   ({sizes_line})",
        x=0.01,
        ha="left",
    )
    return figure


@_figure("correlation")
def correlation_matrix(cmd: Decomposed) -> Figure:
    """|corr| between all pairs of sampled rows: in the order of the rows, then ordered by mode.

    Within a mode the rows stand by falling sum of |corr| to their own mode, so its reference comes first.
    Constant and non-finite rows have no correlation and are left out.
    """
    label_k = np.asarray(cmd.sample_labels_, dtype=np.int64)
    moving = label_k >= 0
    if not moving.any():
        raise UsageError("no sampled row moves: there is no correlation to draw")
    z_kt = _profiles(np.asarray(cmd.sample_, dtype=np.float64)[moving])
    label_k = label_k[moving]
    corr_kk = np.clip(np.abs(z_kt @ z_kt.T), 0, 1)
    within_k = (corr_kk * (label_k[:, None] == label_k[None, :])).sum(axis=1)
    order = np.lexsort((-within_k, label_k))
    edges = np.flatnonzero(np.diff(label_k[order])) + 1

    figure = StyledFigure(figsize=(8.4, 4.1), layout="constrained")
    before, after = figure.subplots(1, 2, gridspec_kw={"wspace": 0.06})
    drawn = None
    for axes, matrix, heading in (
        (before, corr_kk, "rows in the order of the model"),
        (after, corr_kk[np.ix_(order, order)], "rows ordered by mode"),
    ):
        drawn = axes.imshow(matrix, vmin=0, vmax=1, cmap="magma", interpolation_stage="data")
        axes.set_title(heading, loc="left")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    for edge in edges:
        after.axhline(edge - 0.5, color="white", linewidth=0.7)
        after.axvline(edge - 0.5, color="white", linewidth=0.7)
    _mode_ticks(after, np.concatenate([[0], edges, [len(order)]]), label_k[order])
    if drawn is not None:
        bar = figure.colorbar(drawn, ax=[before, after], shrink=0.86, aspect=28, pad=0.015)
        bar.set_label("|correlation|")
        bar.outline.set_visible(False)
    R_mt = np.asarray(cmd.references_, dtype=np.float64)
    figure.suptitle(
        f"|corr| of the sampled rows over time   ({_sizes_line(cmd, R_mt, label_k)})", x=0.01, ha="left"
    )
    return figure


@_figure("methods")
def methods_against_step(
    steps: ArrayLike,
    errors: Mapping[str, ArrayLike],
    scores: Mapping[str, ArrayLike] | None = None,
    *,
    selected: Mapping[str, int] | None = None,
    unit: str = "step",
    quantity: str = "score",
    title: str = "",
) -> Figure:
    """How far the weights of several methods are from the recorded ones, and a score, against the step.

    steps is (S,), every curve (S,), under the same names in both panels; the first name has the thin dark
    line. A dot marks the last step, a ring the step that was ``selected``. Errors have a logarithmic axis, so
    a method without any, as the recorded snapshots, has no line there; nor has what is not finite.
    """
    steps_t = np.asarray(steps, dtype=np.float64)
    looks = {name: _curve_look(order) for order, name in enumerate(errors)}
    panels: list[tuple[str, dict[str, F64]]] = [
        ("relative error of the weights", {name: _shown(curve, above=0.0) for name, curve in errors.items()})
    ]
    if scores:
        panels.append((quantity, {name: _shown(curve) for name, curve in scores.items()}))

    room = 0.4 + 0.075 * max(map(len, errors))  # for the names
    height = max(3.8, 0.6 + 0.2 * len(errors))
    figure = StyledFigure(figsize=(4.0 * len(panels) + room, height), layout="constrained")
    drawn = figure.subplots(1, len(panels), squeeze=False)[0]
    drawn[0].set_yscale("log")
    for axes, (heading, curves) in zip(drawn, panels, strict=True):
        for name, curve_t in curves.items():
            if np.isfinite(curve_t).any():
                axes.plot(steps_t, curve_t, label=name, **looks[name])
                axes.plot(steps_t[-1:], curve_t[-1:], "o", color=looks[name]["color"], markersize=3)
        axes.set_title(heading, loc="left")
        axes.set_xlabel(unit)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.margins(x=0.02)
    last, (_, curves) = drawn[-1], panels[-1]
    if scores:  # what follows the first sixth decides how much is shown: the rise to it is the same for all
        late = np.concatenate([curve_t[len(steps_t) // 6 :] for curve_t in curves.values()])
        low, high = np.nanmin(late, initial=np.inf), np.nanmax(late, initial=-np.inf)
        if low < high:
            last.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    for name, step in (selected or {}).items():
        at = steps_t == step
        ring = {"color": looks[name]["color"], "markersize": 7, "fillstyle": "none", "zorder": 5}
        last.plot(steps_t[at], curves[name][at], "o", **ring)
    ends = {name: curve_t[np.isfinite(curve_t)] for name, curve_t in curves.items()}
    _name_at_the_right(last, {name: float(known[-1]) for name, known in ends.items() if len(known)})
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def _shown(curve: ArrayLike, above: float = -np.inf) -> F64:
    """What of a curve can be drawn; NaN elsewhere."""
    values = np.asarray(curve, dtype=np.float64)
    return np.where(np.isfinite(values) & (values > above), values, np.nan)


def _profiles(W_nt: F64) -> F64:
    """Centred rows of unit norm; a row that never moves stays zero."""
    x_nt = W_nt - W_nt.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(x_nt, axis=1, keepdims=True)
    return x_nt / np.where(norm > 0, norm, 1.0)


def _sizes_line(cmd: Decomposed, R_mt: F64, label_k: I64) -> str:
    metrics = cmd.metrics_
    n = int(np.sum(metrics["mode_sizes"])) + int(metrics["n_constant"]) + int(metrics["n_nonfinite"])
    k = int(np.count_nonzero(label_k >= 0))
    return f"N = {n:,}, T = {R_mt.shape[1]:,}, M = {R_mt.shape[0]}, K = {k:,}"


def _curve_look(order: int) -> dict[str, Any]:
    if order == 0:
        return {"color": "#444444", "linewidth": 0.9, "zorder": 2}
    times, colour = divmod(order - 1, len(COLOURS))
    dashes = DASHES[times % len(DASHES)]
    return {"color": COLOURS[colour], "linestyle": dashes, "linewidth": 1.5, "zorder": 3}


def _range_of(curves: Sequence[F64]) -> tuple[float, float]:
    """Axis limits, in per cent, that leave a little air around all the curves."""
    low, high = min(float(np.nanmin(c)) for c in curves), max(float(np.nanmax(c)) for c in curves)
    air = max(0.06 * (high - low), 0.2)
    return low - air, high + air


def _name_at_the_right(axes: Axes, ends: Mapping[str, float]) -> None:
    """Each curve's name beside its end, moved apart where they would overlap."""
    names = sorted(ends, key=lambda name: ends[name])
    _ = axes.get_ylim()  # limits are made when they are asked for
    of_axis, of_data = axes.transAxes.inverted(), axes.transData
    wanted = [float(of_axis.transform(of_data.transform((0.0, ends[name])))[1]) for name in names]
    colours = {line.get_label(): line.get_color() for line in axes.get_lines()}
    for name, end, at in zip(names, wanted, _apart(wanted, 0.062), strict=True):
        axes.annotate(
            name,
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


def _apart(wanted: Sequence[float], gap: float) -> list[float]:
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


def _mode_ticks(axes: Axes, edges: I64, label_k: I64) -> None:
    """Mode numbers in the middle of their blocks, where a block is tall enough to carry one."""
    blocks = [(a, b) for a, b in pairwise(edges.tolist()) if b - a > 0.03 * int(edges[-1])]
    axes.set_yticks([(a + b - 1) / 2 for a, b in blocks], [str(label_k[a]) for a, _ in blocks])
    axes.tick_params(axis="y", length=0, pad=3)
    axes.set_ylabel("mode")
