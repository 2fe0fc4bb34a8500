"""Results of an experiment over its seeds: one JSON, and the figures drawn from it."""

# matplotlib ships its types with unannotated **kwargs.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure

from benchmarks.machine import machine
from cmdgpu.notation import F64
from cmdgpu.plot import INK, STYLE, StyledFigure, methods_against_step
from cmdgpu.store import durable

DRAWN = (
    "GD",
    "CMD M=10",
    "EMA 0.9",
    "SWA last quarter",
    "PCA r=10",
    *(f"node DMD r={r}" for r in (10, 50, 90)),
)
"""Methods of the figure against the step."""
PNG_DPI = 100


def write(folder: Path, name: str, command: str, results: Mapping[str, Any]) -> Path:
    """``name.json``: what ran, where and how, and the results; lists are over the seeds."""
    content = {"experiment": name, "command": command, "machine": machine(), **results}
    folder.mkdir(parents=True, exist_ok=True)
    durable.write_file(folder, f"{name}.json", [_text(content).encode(), b"\n"])
    return folder / f"{name}.json"


def _text(value: Any, indent: str = "\n") -> str:
    """JSON, a line for every value of an object and for every record; other lists take one together."""
    items: list[str] = []
    ends, deeper = "{}", f"{indent} "
    if isinstance(value, Mapping):
        named = cast(Mapping[str, Any], value)
        items = [f"{json.dumps(key)}: {_text(each, deeper)}" for key, each in named.items()]
    elif isinstance(value, list | tuple):
        listed = cast(Sequence[Any], value)
        if any(isinstance(each, Mapping) for each in listed):
            ends, items = "[]", [_text(each, deeper) for each in listed]
    if not items:
        return json.dumps(value, allow_nan=False)
    return f"{ends[0]}{deeper}{f',{deeper}'.join(items)}{indent}{ends[1]}"


def numbers(leaf: Sequence[Any]) -> F64:
    """What seeds have to say, None as NaN; a list of curves is (seeds, steps)."""
    return np.array(leaf, dtype=np.float64)


def along_steps(methods: Mapping[str, Any], steps: Sequence[int], score: str, title: str) -> Figure:
    """Relative error of the weights and a score against the epoch, means over the seeds."""
    shown = [label for label in DRAWN if label in methods]
    errors = {label: numbers(methods[label]["relative_error_along"]).mean(axis=0) for label in shown}
    scores = {label: numbers(treated(methods[label])["along"][score]).mean(axis=0) for label in shown}
    return methods_against_step(
        steps, errors, scores, unit="epoch", quantity=score.replace("_", " "), title=title
    )


def treated(method: Mapping[str, Any]) -> Any:
    """The scores of a method; with BatchNorm those with statistics measured anew, which come last."""
    *_, scores = method["scores"].values()
    return scores


def against(
    x: Sequence[float], panels: Mapping[str, tuple[F64, F64 | None]], name_of_x: str, title: str
) -> Figure:
    """A panel for every quantity: (seeds, x) as mean and range, and the level of plain training, if given."""
    with style.context(STYLE, after_reset=True):
        figure = StyledFigure(figsize=(3.6 * len(panels), 3.0), layout="constrained")
        for axes, (quantity, (values, level)) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
        ):
            axes.fill_between(x, values.min(axis=0), values.max(axis=0), alpha=0.25, linewidth=0)
            axes.plot(x, values.mean(axis=0), "o-", markersize=3)
            if level is not None:
                axes.axhline(float(level.mean()), color=INK, linewidth=0.8)
                axes.annotate("GD", (x[-1], float(level.mean())), va="bottom", ha="right")
            axes.set_xscale("log")
            axes.set_xticks(x, [f"{each:g}" for each in x])
            axes.minorticks_off()
            axes.set_title(quantity, loc="left")
            axes.set_xlabel(name_of_x)
            axes.grid(axis="y")
        figure.suptitle(title, x=0.01, ha="left")
    return figure


def draw(folder: Path, name: str, found: Mapping[str, Any], score: str, title: str) -> None:
    """``name.png``: methods against the step; ``name-modes.png``: CMD against M, where there are several."""
    methods, steps = found["methods"], found["steps"][0]
    if len(steps) > 1:
        save(along_steps(methods, steps, score, title), folder / f"{name}.png")
    modes = {
        int(label.removeprefix("CMD M=")): m for label, m in methods.items() if label.startswith("CMD M=")
    }
    if len(modes) > 1:
        save(against_modes(modes, methods["GD"], score, title), folder / f"{name}-modes.png")


def against_modes(modes: Mapping[int, Any], plain: Any, score: str, title: str) -> Figure:
    """A score at the last step, error and R^2 by energy against M (the paper's Fig. 6)."""

    def stacked(of: Callable[[Any], F64]) -> F64:
        return np.stack([of(method) for method in modes.values()], axis=1)

    def at_the_end(method: Any) -> F64:
        return numbers(treated(method)["last"][score])

    panels = {
        f"{score.replace('_', ' ')} at the end": (stacked(at_the_end), at_the_end(plain)),
        "weight MSE": (stacked(lambda method: numbers(method["fit"]["weight_mse"])), None),
        "R² by energy": (stacked(lambda method: numbers(method["fit"]["r2_energy"])), None),
    }
    return against(list(modes), panels, "M", title)


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=PNG_DPI)
