"""One page that shows a fit, and opens anywhere: a file without a request to any other.

    cmdgpu.report("run.cmd.zarr", "report.html", baselines=["ema", "pca", "dmd"])

``gathering`` makes the numbers out of ``cmdgpu.views``, ``page`` the file around them.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cmdgpu.baselines import Baseline
from cmdgpu.comparison import Comparison, compare, split_methods
from cmdgpu.comparison.methods import Asked, method_of, parse_method
from cmdgpu.decomposition import CMD
from cmdgpu.errors import UsageError, printable
from cmdgpu.mode_space import Landscape
from cmdgpu.progress import Progress, Silent
from cmdgpu.reporting.gathering import Beside, Json, checked_methods, gather
from cmdgpu.reporting.page import render
from cmdgpu.store.durable import write_file
from cmdgpu.store.places import Named, local_path
from cmdgpu.views.fits import Fit
from cmdgpu.views.fits import fits as view_of_fits

__all__ = ["Report", "report"]

MOST_SCORES_BYTES: Final = 64 << 20


@dataclass(frozen=True)
class Report:
    """A page that was written."""

    path: Path
    n_bytes: int
    figures: tuple[str, ...]
    """Figures that have something to show."""
    tables: tuple[str, ...]
    warnings: tuple[str, ...]
    data: Json
    """The numbers that are embedded in it."""


def report(
    cmd: CMD | Named,
    path: Named,
    *,
    baselines: str | Sequence[Asked] = (),
    fits: Sequence[CMD | Named] | Mapping[str, CMD | Named] = (),
    scores: Comparison | Mapping[str, Any] | Named | None = None,
    landscape: Landscape | Named | None = None,
    title: str | None = None,
    memory_limit: int | str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write one self-contained HTML file about a fit: figures, tables, the verdict, where it comes from.

    cmd        a fitted CMD, or the folder or URL of a result
    path       the file; one that is there is replaced
    baselines  methods fitted for the page and drawn beside the modes, as ``compare`` names them:
               "ema,pca:components=10,dmd:rank=10". They read the trajectory, the rest of the page does not
    fits       other fits of the same trajectory: error against M is drawn over them and this one
    scores     a ``Comparison``, or a file that ``cmdgpu compare --json`` wrote: accuracy and loss by step
    landscape  a ``Landscape``, or the file that ``cmdgpu landscape`` wrote

    Of a stored result its references, sample and totals are read, and the units of some sampled rows: seconds
    whatever N. Raises UsageError for what belongs to another trajectory, CmdgpuError for an unfinished fit.
    """
    target = local_path(path, "a report")
    tell = progress or Silent()
    cmd = cmd if isinstance(cmd, CMD) else CMD.load(cmd)
    result = cmd.result
    # what may be refused comes before the baselines, which read the trajectory
    scored = None if scores is None else _scores(scores, cmd)
    others = _fits(cmd, fits)
    plane = None if landscape is None else _landscape(landscape, cmd)
    methods, fitted = _baselines(cmd, baselines, memory_limit, tell)
    labels = () if methods is None else dict.fromkeys(row["label"] for row in methods["last"][2:])
    name = "in memory" if result.path is None else result.path.name
    beside = Beside(methods=scored or methods, baselines=fitted, fits=others, landscape=plane)
    asked = {
        "--baselines": [",".join(labels)] if labels else [],
        "--fits": [_file_name(one) for one in (fits.values() if isinstance(fits, Mapping) else fits)],
        "--scores": [None if isinstance(scores, Comparison | Mapping) else _file_name(scores)],
        "--landscape": [None if isinstance(landscape, Landscape) else _file_name(landscape)],
        "--title": [title or None],
    }
    data = gather(
        cmd,
        beside,
        title=title or f"Training decomposed: {printable(name)}",
        command=_command(cmd, target, asked),
    )
    page = render(data).encode()
    write_file(target.parent, target.name, [page])
    return Report(target, len(page), figures_of(data), tables_of(data), tuple(data["warnings"]), data)


_FIGURES: Final = (
    "scalars", "correlation", "profiles", "network", "histogram", "weights", "methods", "fits", "plane",
    "landscape",
)  # fmt: skip


def figures_of(data: Json) -> tuple[str, ...]:
    """The parts of the page that have something to draw."""
    moves = data["n"]["modes"] > 0
    return tuple(
        name for name in _FIGURES if data[name] and (moves or name in ("scalars", "methods", "fits"))
    )


def tables_of(data: Json) -> tuple[str, ...]:
    """The tables of the page."""
    return tuple(
        name
        for name, there in {
            "modes": data["n"]["modes"] > 0,
            "tensors": bool(data["network"]["tensors"]),
            "methods": bool(data["methods"]),
            "fits": bool(data["fits"]),
            "costs": True,
            "provenance": True,
        }.items()
        if there
    )


def _baselines(
    cmd: CMD, asked: str | Sequence[Asked], memory_limit: int | str | None, progress: Progress
) -> tuple[Json | None, dict[str, Baseline]]:
    """Weight errors of the methods, and those of them that are filters of single rows, by label."""
    each: list[Asked] = list(asked)
    if isinstance(asked, str):
        each = [*split_methods(asked)] if asked.strip() else []
    if not each:
        return None, {}
    if cmd.trajectory is None:
        raise UsageError(
            "baselines are fitted on the trajectory, and it is out of reach",
            file=cmd.result.path,
            hint="say where it is: CMD.load(path, trajectory=...), or leave them out",
        )
    named: dict[str, Asked] = {"recorded": "recorded", method_of(cmd).label: cmd}
    for one in each:
        method = parse_method(one, cmd) if isinstance(one, str) else method_of(one)
        # a filter is kept hold of, for the rows it rebuilds; what carries on the modes is made of its name
        named[method.label] = method.fittable if isinstance(method.fittable, Baseline) else one
    comparison = compare(cmd, named, memory_limit=memory_limit, progress=progress)
    filters = {label: made for label, made in named.items() if isinstance(made, Baseline)}
    return checked_methods(comparison.to_json(), cmd), filters


def _scores(scores: Comparison | Mapping[str, Any] | Named, cmd: CMD) -> Json:
    if isinstance(scores, Comparison):
        return checked_methods(scores.to_json(), cmd)
    if isinstance(scores, Mapping):
        return checked_methods(scores, cmd)
    return checked_methods(_json_of(scores), cmd, file=scores)


def _json_of(place: Named) -> object:
    """A JSON document of at most MOST_SCORES_BYTES."""
    file = local_path(place, "the scores")
    try:
        with file.open("rb") as opened:
            text = opened.read(MOST_SCORES_BYTES + 1)
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", file=file) from error
    if len(text) > MOST_SCORES_BYTES:
        raise UsageError("is no JSON of a comparison: it has more than 64 MiB", file=file)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            "is no JSON", file=file, hint="write it with: cmdgpu compare ... --json > scores.json"
        ) from error


def _fits(cmd: CMD, others: Sequence[CMD | Named] | Mapping[str, CMD | Named]) -> list[tuple[Fit, bool]]:
    """This fit and the others, by their modes; nothing without others."""
    named = others if isinstance(others, Mapping) else {_name_of(one, i): one for i, one in enumerate(others)}
    opened = {name: one if isinstance(one, CMD) else CMD.load(one) for name, one in named.items()}
    mine = {name for name, one in opened.items() if _is_same(one, cmd)}
    if opened and not mine:
        opened, mine = {_name_of(cmd, -1): cmd, **opened}, {_name_of(cmd, -1)}
    return [(fit, fit.name in mine) for fit in view_of_fits(opened)]


def _is_same(one: CMD, other: CMD) -> bool:
    return one is other or (one.result.path is not None and one.result.path == other.result.path)


def _file_name(one: CMD | Named | None) -> str | None:
    """The last part of a place; nothing of what is only in memory."""
    place = one.result.path if isinstance(one, CMD) else one
    return None if place is None else str(place).rstrip("/").rsplit("/", 1)[-1]


def _name_of(one: CMD | Named, order: int) -> str:
    if isinstance(one, CMD) and one.result.path is None:
        return f"M = {one.n_modes_}" + (f", fit {order + 1}" if order >= 0 else "")
    return printable(str(_file_name(one)))


def _landscape(landscape: Landscape | Named, cmd: CMD) -> Json:
    found = landscape if isinstance(landscape, Landscape) else Landscape.load(landscape)
    if found.result != cmd.result.fingerprint:
        raise UsageError(
            "is the landscape of another fit",
            file=None if isinstance(landscape, Landscape) else str(landscape),
            hint="make one of this: cmdgpu landscape",
        )
    return found.to_json()


def _command(cmd: CMD, target: Path, asked: Mapping[str, Sequence[str | None]]) -> str:
    """The commands that make this fit and this page again; files by their names, wherever they lie."""
    found = cmd.result.provenance
    config: Mapping[str, Any] = found["config"]
    spelled = {
        "n_modes": "--modes", "threshold": "--threshold", "n_samples": "--samples", "sampling": "--sampling",
        "affinity": "--affinity", "random_state": "--seed", "references": "--references",
        "refine": "--refine", "objective": "--objective",
    }  # fmt: skip
    options = [
        f"{option} {shlex.quote(str(config[key]))}"
        for key, option in spelled.items()
        if config.get(key) is not None
    ]
    params = [f"--params {shlex.quote(pattern)}" for pattern in found.get("params", ())]
    beside = [
        f"{option} {shlex.quote(value)}" for option, values in asked.items() for value in values if value
    ]
    result = "fit.cmd.zarr" if cmd.result.path is None else cmd.result.path.name
    origin = str(found.get("origin") or "run.zarr")
    return "\n".join(
        [
            " ".join(["cmdgpu fit", shlex.quote(origin), "-o", shlex.quote(result), *options, *params]),
            " ".join(["cmdgpu report", shlex.quote(result), "-o", shlex.quote(target.name), *beside]),
        ]
    )
