"""The numbers of a page: views of a fit as plain values of strict JSON, small enough to be embedded."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias, cast

import numpy as np
from matplotlib import colormaps
from numpy.typing import ArrayLike
from PIL import Image

from cmdgpu.baselines import Baseline
from cmdgpu.decomposition import CMD
from cmdgpu.errors import UsageError, printable
from cmdgpu.indexing import evenly
from cmdgpu.memory import show_bytes
from cmdgpu.notation import F64, I64
from cmdgpu.version import __version__
from cmdgpu.views.correlation import correlations
from cmdgpu.views.fits import Fit
from cmdgpu.views.histogram import Band, histograms
from cmdgpu.views.network import TensorShare, network
from cmdgpu.views.plane import plane
from cmdgpu.views.profiles import profiles
from cmdgpu.views.scalars import scalars, unit_of
from cmdgpu.views.weights import rebuilt_by, weights

Json: TypeAlias = dict[str, Any]

MOST_POINTS: Final = 25_600
"""Modes x snapshots of one drawn family of profiles; more snapshots are thinned evenly, and that is said."""
MOST_SNAPSHOTS: Final = 256
FEWEST_SNAPSHOTS: Final = 32
MOST_WEIGHT_POINTS: Final = 24_000
"""Sampled weights x snapshots."""
MOST_TENSORS: Final = 1000
"""Rows of the table of tensors, the largest first; and of layers and blocks."""
MOST_PIXELS: Final = 400
"""Of a side of the matrix of |corr|: beyond, cells are averaged."""
MOST_BLOCKS: Final = 100
"""Modes between which mean |corr| is told pair by pair; of more it is told within each."""
DIGITS: Final = 6
EXACT_DIGITS: Final = 12
"""Of factors: a · reference + b of large values that hardly move keeps its digits."""


@dataclass(frozen=True)
class Beside:
    """What stands beside the fit on its page."""

    methods: Json | None = None
    """A comparison, as ``Comparison.to_json`` has it."""
    baselines: Mapping[str, Baseline] = field(default_factory=dict[str, Baseline])
    """Baselines whose rebuilt weights are drawn, by label."""
    fits: Sequence[tuple[Fit, bool]] = ()
    """Fits of the trajectory by their modes, and which of them the page is about."""
    landscape: Json | None = None


def gather(cmd: CMD, beside: Beside, *, title: str, command: str) -> Json:
    """Everything the page shows. Of N-long arrays only what lies at sampled rows is read.

    A part that cannot be had is None or empty, and ``warnings`` says why where that is no fault of the run.
    """
    drawn = drawn_snapshots(len(cmd.steps_), cmd.n_modes_)
    metrics = cmd.metrics_
    quality = cmd.quality()
    summary = cmd.summary(quality=False).splitlines()
    return {
        "schema": 1,
        "title": title,
        "unit": unit_of(cmd),
        "made": {"cmdgpu": __version__},
        "n": {
            "rows": metrics["n_rows"],
            "buffers": metrics["n_buffer_rows"],
            "snapshots": len(cmd.steps_),
            "modes": cmd.n_modes_,
            "samples": len(cmd.sample_rows_),
            "tensors": len(cmd.result.frame.map),
        },
        "steps": cmd.steps_[drawn].tolist(),
        "words": {
            "summary": summary,
            "verdict": quality.verdict,
            "quality": quality.words.splitlines(),
        },
        "profiles": _profiles(cmd, drawn),
        "correlation": _correlation(cmd),
        "network": _network(cmd),
        "histogram": _histogram(cmd),
        "weights": _weights(cmd, drawn, beside.baselines),
        "scalars": {name: numbers(values[drawn]) for name, values in scalars(cmd).items()},
        "methods": beside.methods,
        "fits": [_fit(one, this) for one, this in beside.fits],
        "plane": _plane(cmd, drawn),
        "landscape": beside.landscape,
        "quality": quality.to_dict(),
        "costs": _costs(cmd, metrics),
        "provenance": _provenance(cmd),
        "command": command,
        "warnings": _warnings(cmd, drawn, metrics),
    }


def drawn_snapshots(n_snapshots: int, n_modes: int) -> I64:
    """(T',) positions of the snapshots on the page: all where they fit, otherwise evenly spread."""
    most = min(MOST_SNAPSHOTS, max(FEWEST_SNAPSHOTS, MOST_POINTS // max(n_modes, 1)))
    return evenly(n_snapshots, most)


def numbers(values: ArrayLike) -> list[Any]:
    """An array as nested lists of DIGITS significant digits; what is not finite is None."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim > 1:
        return [numbers(row) for row in array]
    return [number(value) for value in array.tolist()]


def number(value: float, digits: int = DIGITS) -> float | None:
    """A float of so many significant digits, or None."""
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None


def movements(rows: ArrayLike) -> list[list[float | None]]:
    """(n, T) curves with DIGITS digits of what each moves: a large value that hardly moves is no stairs."""
    told: list[list[float | None]] = []
    for row in np.asarray(rows, dtype=np.float64):
        finite = row[np.isfinite(row)]
        moved = float(finite.max() - finite.min()) if len(finite) else 0.0
        if not 0.0 < moved < math.inf:
            told.append(numbers(row))
            continue
        size = max(float(np.abs(finite).max()), moved)
        digits = DIGITS + max(0, math.ceil(math.log10(size / moved)))
        told.append([number(value, min(digits, 17)) for value in row.tolist()])
    return told


# ---- the figures ------------------------------------------------------------------------------------------


def _profiles(cmd: CMD, drawn: I64) -> Json:
    shown = profiles(cmd)
    return {
        "z": numbers(shown.z_mt[:, drawn]),
        "low": numbers(shown.low_mt[:, drawn]),
        "high": numbers(shown.high_mt[:, drawn]),
        "raw": movements(shown.raw_mt[:, drawn]),
        "sampled": shown.sampled_m.tolist(),
        "size": shown.size_m.tolist(),
        "share": numbers(shown.share_m),
        "quantiles": numbers(shown.quantiles_m5),
        "where": list(shown.where_m),
    }


def _correlation(cmd: CMD) -> Json | None:
    shown = correlations(cmd)
    if not shown.n_moving:
        return None
    ordered_kk, edges = shown.ordered_kk, shown.edges
    means = _block_means(ordered_kk, edges)
    return {
        "ordered": matrix_png(ordered_kk),
        "unordered": matrix_png(shown.corr_kk),
        "rows": shown.n_moving,
        "shown": len(shown.order),
        "edges": edges.tolist(),
        "modes": shown.block_modes.tolist(),
        "within": numbers(np.diagonal(means)),
        "between": numbers(means) if len(means) <= MOST_BLOCKS else None,
    }


def matrix_png(corr_kk: F64) -> str:
    """A ``data:`` URL of (K', K') values in 0..1 in 64 colours; averaged down to MOST_PIXELS a side."""
    side = min(len(corr_kk), MOST_PIXELS)
    edges = np.linspace(0, len(corr_kk), side + 1).round().astype(np.int64)
    means = _block_means(corr_kk, edges)
    image = Image.fromarray((np.clip(means, 0, 1) * 63).round().astype(np.uint8), mode="P")
    image.putpalette(
        (colormaps["magma"](np.linspace(0, 1, 64))[:, :3] * 255).round().astype(np.uint8).tobytes()
    )
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _block_means(corr_kk: F64, edges: I64) -> F64:
    """(n, n) mean of every block between n + 1 edges, in rows and columns alike."""
    starts, size = edges[:-1], np.diff(edges)
    sums = np.add.reduceat(np.add.reduceat(corr_kk, starts, axis=0), starts, axis=1)
    return sums / np.outer(size, size)


def _network(cmd: CMD) -> Json:
    shown = network(cmd)
    tensors, tensors_left = _largest(shown.tensors)
    layers, layers_left = _largest(shown.groups("layer"))
    blocks, blocks_left = _largest(shown.groups("block"))
    return {
        "tensors": [_share(one) for one in tensors],
        "layers": [_share(one) for one in layers],
        "blocks": [_share(one) for one in blocks],
        "tensors_left_out": tensors_left,
        "layers_left_out": layers_left,
        "blocks_left_out": blocks_left,
    }


def _largest(shares: Sequence[TensorShare]) -> tuple[list[TensorShare], int]:
    """At most MOST_TENSORS in the order of the model, and how many are left out."""
    if len(shares) <= MOST_TENSORS:
        return list(shares), 0
    by_size = np.argsort([-one.rows for one in shares], kind="stable")[:MOST_TENSORS]
    return [shares[i] for i in sorted(by_size.tolist())], len(shares) - MOST_TENSORS


def _share(one: TensorShare) -> Json:
    counts: Iterable[Any] = one.counts.tolist()
    if len(one.counts) > 20:
        counts = [[int(mode), int(one.counts[mode])] for mode in np.flatnonzero(one.counts)]
    return {
        "name": one.name,
        "shape": list(one.shape),
        "kind": one.kind,
        "layer": one.layer,
        "block": one.block,
        "rows": one.rows,
        "constant": one.n_constant,
        "nonfinite": one.n_nonfinite,
        "counts": counts,
        "mean_abs_correlation": number(one.mean_abs_correlation),
        "r2": number(one.r2),
        "r2_energy": number(one.r2_energy),
        "weight_mse": number(one.weight_mse),
    }


def _histogram(cmd: CMD) -> Json | None:
    if not cmd.n_modes_:
        return None
    shown = histograms(cmd)

    def band(one: Band) -> Json:
        return {
            quantity: {edge: numbers(getattr(one, f"{quantity}_{edge}")) for edge in ("low", "mean", "high")}
            for quantity in ("abs_correlation", "r2")
        }

    return {
        "edges": numbers(shown.edges),
        "abs_correlation": numbers(shown.abs_correlation),
        "r2": numbers(shown.r2),
        "per_mode": numbers(shown.per_mode),
        "chance": {name: band(one) for name, one in shown.chance.items()},
    }


def _weights(cmd: CMD, drawn: I64, baselines: Mapping[str, Baseline]) -> list[Json]:
    shown = weights(cmd, at_most=max(24, min(240, MOST_WEIGHT_POINTS // max(len(drawn), 1))))
    recorded = movements(shown.recorded[:, drawn])
    rebuilt = {
        label: movements(rebuilt_by(baseline, shown)[:, drawn]) for label, baseline in baselines.items()
    }
    return [
        {
            "tensor": shown.tensor[i],
            "index": list(shown.index[i]),
            "row": int(shown.row[i]),
            "mode": int(shown.mode[i]),
            "a": number(float(shown.a[i]), EXACT_DIGITS),
            "b": number(float(shown.b[i]), EXACT_DIGITS),
            "correlation": number(float(shown.correlation[i])),
            "recorded": recorded[i],
            "rebuilt": {label: rows[i] for label, rows in rebuilt.items()},
        }
        for i in range(len(shown.row))
    ]


def _fit(one: Fit, this: bool) -> Json:
    return {
        "name": one.name,
        "n_modes": one.n_modes,
        "n_samples": one.n_samples,
        "weight_mse": number(one.weight_mse),
        "r2": number(one.r2),
        "r2_energy": number(one.r2_energy),
        "mean_abs_correlation": number(one.mean_abs_correlation),
        "result_bytes": one.result_bytes,
        "this": this,
    }


def _plane(cmd: CMD, drawn: I64) -> Json | None:
    shown = plane(cmd)
    if not shown.explained.any():
        return None
    return {
        "recorded": numbers(shown.recorded[:, drawn]),
        "rebuilt": numbers(shown.rebuilt[:, drawn]),
        "explained": numbers(shown.explained),
    }


# ---- words ------------------------------------------------------------------------------------------------


def _costs(cmd: CMD, metrics: Mapping[str, Any]) -> list[list[str]]:
    stored, original = metrics["result_bytes"], metrics["trajectory_bytes"]
    costs = [
        ["trajectory", show_bytes(original)],
        ["result: mode, a, b, |corr| of every row, and the references", show_bytes(stored)],
        ["trajectory by result", f"{original / stored:.1f}" if stored else "-"],
    ]
    if (stages := metrics.get("stage_s")) and metrics.get("bytes_per_s"):
        costs += [[f"seconds: {name}", f"{seconds:.2f}"] for name, seconds in stages.items()]
        costs.append(["the pass", f"{metrics['bytes_per_s'] / 1e9:.2f} GB/s"])
        costs.append(["computed by", f"{metrics['implementation']} on {metrics['device']}"])
    return costs


_DIGESTS: Final = (("layout", "tensors"), ("digest", "weights"))


def _provenance(cmd: CMD) -> list[list[str]]:
    found = cmd.result.provenance
    source, config, code = found["source"], found["config"], found["code"]
    steps = source["steps"]
    told = [
        ["result", "in memory" if cmd.result.path is None else cmd.result.path.name],
        ["fingerprint", cmd.result.fingerprint],
        ["trajectory", printable(str(found.get("origin") or "in memory"))],
        ["snapshots", f"{len(steps)}, {steps[0]} to {steps[-1]}" if steps else "0"],
        ["stored as", source["dtype"]],
        *([f"digest of the {what}", source[key]] for key, what in _DIGESTS if key in source),
        *([["tensors", " and ".join(found["params"])]] if found.get("params") else []),
        *([key, str(value)] for key, value in config.items() if value is not None),
        *([f"fitted with {key}", str(value)] for key, value in code.items()),
        ["page made by cmdgpu", __version__],
    ]
    return [[str(what), printable(str(value), 400)] for what, value in told]


def _warnings(cmd: CMD, drawn: I64, metrics: Mapping[str, Any]) -> list[str]:
    told: list[str] = []
    if not cmd.n_modes_:
        told.append("no sampled row moves: there is no mode, and nothing of modes to draw")
    if metrics["n_nonfinite"]:
        told.append(f"{metrics['n_nonfinite']:,} rows have a NaN or an infinity: they are in no mode")
    if len(cmd.steps_) < 3:
        told.append("fewer than three snapshots: every |corr| is 1 or undefined and means nothing")
    if len(drawn) < len(cmd.steps_):
        told.append(
            f"of {len(cmd.steps_):,} snapshots {len(drawn)}, evenly spread, are drawn; all are counted"
        )
    if cmd.trajectory is None and cmd.result.path is not None:
        told.append("the trajectory is out of reach: neither its scalars nor baselines can be shown")
    return told


# ---- scores of a file -------------------------------------------------------------------------------------


def checked_methods(found: object, cmd: CMD, file: object = None) -> Json:
    """What the page needs of the JSON of a comparison, checked: it may come from a file.

    Raises UsageError where it is none, or is of another trajectory than the fit.
    """
    hint = "write it with: cmdgpu compare ... --json > scores.json"
    where = None if file is None else str(file)
    try:
        told = cast(Mapping[str, Any], found)
        rows = [_checked_row(row) for row in told["methods"]]
        methods: Json = {
            "source": str(told["source"]).rstrip("/").rsplit("/", 1)[-1],
            "trajectory": str(told["trajectory"]),
            "unit": str(told["unit"]),
            "n_parameters": int(told["n_parameters"]),
            "steps": [int(step) for step in told["steps"]],
            "batch_norm": [str(one) for one in told["batch_norm"]],
            "scores": [str(name) for name in told["scores"]],
            "select": [str(name) for name in told["select"]],
            "methods": rows,
            "last": [_checked_row(row) for row in told["last"]],
            "selected": [_checked_row(row) for row in told["selected"]],
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError("holds no comparison", file=where, hint=hint) from error
    n_rows = cmd.result.metrics["n_rows"]
    if methods["n_parameters"] != n_rows:
        raise UsageError(
            f"compares {methods['n_parameters']:,} weights, and this fit has {n_rows:,}",
            file=where,
            hint="compare this fit: cmdgpu compare RESULT",
        )
    if strangers := sorted(set(methods["steps"]) - set(cmd.steps_.tolist())):
        raise UsageError(
            f"compares step {strangers[0]}, which this fit does not know",
            file=where,
            hint=f"it has {int(cmd.steps_[0])} to {int(cmd.steps_[-1])}: compare the same trajectory",
        )
    if methods["trajectory"] != cmd.result.fitted_on:
        raise UsageError(
            "compares what was recorded in another run, or other snapshots of this one",
            file=where,
            hint="compare this fit: cmdgpu compare RESULT",
        )
    return methods


def _checked_row(row: Any) -> Json:
    def finite(value: Any) -> float | None:
        return None if value is None else number(float(value))

    return {
        "method": str(row["method"]),
        "label": str(row["label"]),
        "step": int(row["step"]),
        "batch_norm": str(row["batch_norm"]),
        "weight_mse": finite(row["weight_mse"]),
        "relative_error": finite(row["relative_error"]),
        "stored_bytes": int(row["stored_bytes"]),
        "fit_s": None if str(row["method"]) == "recorded" else finite(row["fit_s"]),
        "scores": {str(name): finite(value) for name, value in row["scores"].items()},
        "error": None if row.get("error") is None else str(row["error"]),
    }
