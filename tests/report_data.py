"""The numbers of a report page, planted: a valid dict of ``reporting.gathering`` for any M and T.

Rows are a · reference + b of smooth references with noise, so every part of the page agrees with every other
one, as it does for a fit.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from matplotlib import colormaps
from PIL import Image

from cmdgpu.notation import F64

HOSTILE: Final = (
    "<script>alert(1)</script>",
    '</script><img src=x onerror="alert(2)">',
    "\"'`&amp;&lt;{{ 7 * 7 }}${7*7}",
    "weight." + "very_long_name." * 66 + "end",
    "right\u202eto left שלום مرحبا",
    "nul\x00 bell\x07 escape\x1b[31m newline\n return\r tab\t",
    "half \ud800 a character, line\u2028separator",
    '=HYPERLINK("https://example.invalid")',
)
"""Names of tensors, scalars, methods, fits that a page must show as text and as nothing else."""

VERDICTS: Final = {
    "better than chance": "these modes are better than chance",
    "no better than chance": "these modes are no better than chance",
    "cannot tell": "whether these modes are better than chance cannot be told",
}

Json = dict[str, Any]


def page_data(
    *,
    modes: int = 10,
    snapshots: int = 61,
    names: Sequence[str] = (),
    title: str = "Training decomposed: run.cmd.zarr",
    verdict: str = "better than chance",
    batch_norm: Sequence[str] = ("none",),
    landscape: int = 2,
    n_tensors: int = 62,
    seed: int = 0,
) -> Json:
    """A page with every part. ``names`` replace the first names of tensors, scalars, methods and fits.

    ``landscape`` is the number of references that are varied.
    """
    rng = np.random.default_rng(seed)
    planted = _Planted(rng, modes, snapshots)
    network = _network(rng, modes, list(names), n_tensors)
    size = np.sort(rng.pareto(1.3, modes) + 0.05)[::-1]
    size_m = np.maximum((size / size.sum() * 1e6).astype(int), 1)
    methods = ["recorded", f"cmd(modes={modes})", "ema(decay=0.9)", "pca(components=10)", "dmd(rank=10)"]
    methods = [methods[0], methods[1], *names, *methods[2:]]
    steps = (10 * np.arange(snapshots)).tolist()
    return {
        "schema": 1,
        "title": title,
        "unit": names[1] if len(names) > 1 else "epoch",
        "made": {"cmdgpu": "0.0.0"},
        "n": {
            "rows": int(size_m.sum()) + 4427,
            "buffers": 512,
            "snapshots": snapshots,
            "modes": modes,
            "samples": 1000,
            "tensors": n_tensors,
        },
        "steps": steps,
        "words": {
            "summary": [
                f"CMD  {modes} modes",
                *(f"  {m}  {n} rows" for m, n in enumerate(size_m[:12].tolist())),
            ],
            "verdict": verdict,
            "quality": [
                f"{VERDICTS[verdict]} (1965 rows that were not clustered, {snapshots} snapshots)",
                "levels: mean |corr| 0.898; unrelated rows of the same T, K and M would give 0.755 "
                "(0.747-0.760, random walks), 0.802 (0.796-0.809, signed steps), 0.840 (0.835-0.847, "
                "phase-shuffled): 36 % of the way from chance to 1",
                "|corr| is below 0.5 in 0.7 %, 0.8 in 12.1 %, 0.95 in 77.5 % of the rows",
                "other samples give the same modes with an adjusted Rand index of 0.65 (0.57-0.71)",
            ],
        },
        "profiles": {
            "z": numbers(planted.z_mt),
            "low": numbers(planted.z_mt - planted.width_mt),
            "high": numbers(planted.z_mt + planted.width_mt),
            "raw": numbers(planted.raw_mt),
            "sampled": rng.integers(0, 200, modes).tolist(),
            "size": size_m.tolist(),
            "share": numbers(size_m / size_m.sum()),
            "quantiles": numbers(np.sort(rng.beta(8, 1.5, (modes, 5)), axis=1)),
            "where": [
                None if m == modes - 1 and m else f"{network['tensors'][m % n_tensors]['name']}[{m}, 3]"
                for m in range(modes)
            ],
        },
        "correlation": _correlation(planted, modes),
        "network": network,
        "histogram": _histogram(rng, modes),
        "weights": _weights(rng, planted, modes, network, methods[2:]),
        "scalars": {
            **{name: numbers(rng.random(snapshots)) for name in names},
            "loss": numbers(2 * np.exp(-np.linspace(0, 4, snapshots)) + 0.05 * rng.random(snapshots)),
            "learning rate": numbers(1e-3 * np.linspace(1, 0, snapshots)),
            "validation accuracy": [
                None if t % 3 else float(f"{0.97 - 0.8 * np.exp(-t / 6):.6g}") for t in range(snapshots)
            ],
        },
        "methods": _methods(rng, methods, steps, batch_norm),
        "fits": [
            {
                "name": name,
                "n_modes": m,
                "n_samples": 1000,
                "weight_mse": float(f"{6e-5 / (1 + m):.6g}"),
                "r2": 1 - 0.4 / m,
                "r2_energy": 1 - 0.2 / m,
                "mean_abs_correlation": 1 - 0.3 / m,
                "result_bytes": 1_721_581 + 300 * m,
                "this": m == 10,
            }
            for m, name in zip((1, 2, 5, 10), [*names, "m-1", "m-2", "m-5", "m-10"], strict=False)
        ],
        "plane": {
            "recorded": numbers(planted.path_2t),
            "rebuilt": numbers(planted.path_2t + 0.02 * rng.standard_normal((2, snapshots))),
            "explained": [0.913, 0.055],
        },
        "landscape": _landscape(landscape),
        "quality": _quality(verdict, names),
        "costs": [["trajectory", "24.8 MB"], ["result: mode, a, b, |corr| of every row", "1.75 MB"]],
        "provenance": [
            ["result", "run.cmd.zarr"],
            ["fingerprint", "sha256:" + "0123456789abcdef" * 4],
            *(["name", name] for name in names),
        ],
        "command": "cmdgpu fit run.zarr -o run.cmd.zarr\ncmdgpu report run.cmd.zarr -o report.html",
        "warnings": list(names),
    }


def bare(data: Json) -> Json:
    """The same page where everything that may be missing is missing."""
    return {
        **data,
        "correlation": None,
        "histogram": None,
        "weights": [],
        "scalars": {},
        "methods": None,
        "fits": [],
        "plane": None,
        "landscape": None,
        "costs": [],
        "provenance": [],
        "words": {**data["words"], "verdict": "cannot tell", "quality": [], "summary": []},
        "quality": {
            "verdict": "cannot tell",
            "levels": None,
            "increments": None,
            "increment_correlation": None,
        },
    }


def motionless(data: Json) -> Json:
    """A run in which no sampled weight moves: no mode."""
    empty: Json = {name: [] for name in data["profiles"]}
    still: Json = {"counts": [], "mean_abs_correlation": None, "r2": None, "r2_energy": None}
    network: Json = {
        level: [{**share, **still, "constant": share["rows"]} for share in data["network"][level]]
        for level in ("tensors", "layers", "blocks")
    }
    return {
        **bare(data),
        "n": {**data["n"], "modes": 0},
        "profiles": empty,
        "network": {**data["network"], **network},
    }


def numbers(values: F64) -> list[Any]:
    """Nested lists of six significant digits; what is not finite is None."""
    if values.ndim > 1:
        return [numbers(row) for row in values]
    return [float(f"{value:.6g}") if np.isfinite(value) else None for value in values.tolist()]


class _Planted:
    """References that are smooth in time, (M, T), and the path of the whole in a plane."""

    def __init__(self, rng: np.random.Generator, modes: int, snapshots: int) -> None:
        t = np.linspace(0, 1, snapshots)
        pace = rng.uniform(0.5, 9, (modes, 1))
        turn = rng.uniform(0.3, 2.2, (modes, 1))
        raw = np.exp(-pace * t) * np.cos(3 * turn * t + turn) + 0.02 * rng.standard_normal((modes, snapshots))
        raw += 0.05 * rng.standard_normal((modes, snapshots)).cumsum(axis=1) / np.sqrt(snapshots)
        self.raw_mt: F64 = raw * rng.uniform(0.01, 0.4, (modes, 1))
        centred = self.raw_mt - self.raw_mt.mean(axis=1, keepdims=True)
        self.z_mt = centred / np.linalg.norm(centred, axis=1, keepdims=True)
        self.width_mt = rng.uniform(0.02, 0.12, (modes, 1)) * (0.6 + np.abs(np.sin(5 * t)))
        if modes > 3:
            self.width_mt[3] = np.nan
        self.path_2t = np.stack([4 * np.exp(-3 * t), 1.2 * np.sin(4 * t) * np.exp(-t)])


def _correlation(planted: _Planted, modes: int) -> Json:
    per_mode = max(1, 200 // modes)
    mode_k = np.repeat(np.arange(modes), per_mode)
    rng = np.random.default_rng(1)
    noise = 0.06 * rng.standard_normal((len(mode_k), planted.z_mt.shape[1]))
    corr_kk = np.abs(np.corrcoef(planted.z_mt[mode_k] + noise))
    shuffled = rng.permutation(len(mode_k))
    means = corr_kk.reshape(modes, per_mode, modes, per_mode).mean(axis=(1, 3))
    return {
        "ordered": _png(corr_kk),
        "unordered": _png(corr_kk[np.ix_(shuffled, shuffled)]),
        "rows": len(mode_k),
        "shown": len(mode_k),
        "edges": [per_mode * m for m in range(modes + 1)],
        "modes": list(range(modes)),
        "within": numbers(np.diagonal(means)),
        "between": numbers(means) if modes <= 100 else None,
    }


def _png(corr_kk: F64) -> str:
    palette = (colormaps["magma"](np.linspace(0, 1, 64))[:, :3] * 255).round().astype(np.uint8)
    image = Image.fromarray((np.clip(corr_kk, 0, 1) * 63).astype(np.uint8), mode="P")
    image.putpalette(palette.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _network(rng: np.random.Generator, modes: int, names: list[str], n_tensors: int) -> Json:
    all_names = ["conv1.weight", "bn1.weight", "bn1.bias"]
    parts = ("conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight", "bn2.weight", "bn2.bias")
    all_names += [
        f"layer{block}.{half}.{part}" for block in range(1, 5) for half in range(2) for part in parts
    ]
    all_names += ["fc.weight", "fc.bias"]
    all_names += [f"more.{i}.weight" for i in range(max(0, n_tensors - len(all_names)))]
    all_names = [*names, *all_names][: max(n_tensors, len(names))]
    concentration = 0.25 + np.linspace(1, 0, modes)

    def share(name: str, *, layer: str = "", block: str = "") -> Json:
        shape = [64, 64, 3, 3] if "conv" in name else [10, 512] if "fc.w" in name else [64]
        rows = int(np.prod(shape))
        constant = rows // 20 if "bn" in name else 0
        counts = rng.multinomial(rows - constant, rng.dirichlet(concentration)).tolist()
        sparse = [[m, n] for m, n in enumerate(counts) if n]
        corr = float(f"{rng.beta(9, 1.4):.6g}")
        return {
            "name": name,
            "shape": shape,
            "kind": "buffer" if name.endswith("running_mean") else "parameter",
            "layer": layer,
            "block": block,
            "rows": rows,
            "constant": constant,
            "nonfinite": 0,
            "counts": sparse if modes > 20 else counts,
            "mean_abs_correlation": corr,
            "r2": float(f"{corr**2:.6g}"),
            "r2_energy": float(f"{corr**1.5:.6g}"),
            "weight_mse": float(f"{1e-5 * rng.random():.6g}"),
        }

    layers = list(dict.fromkeys(name.rpartition(".")[0] or name for name in all_names))
    blocks = list(
        dict.fromkeys(".".join(name.split(".")[: 2 if "layer" in name[:5] else 1]) for name in all_names)
    )
    return {
        "tensors": [
            share(name, layer=name.rpartition(".")[0], block=name.split(".")[0]) for name in all_names
        ],
        "layers": [share(name) for name in layers],
        "blocks": [share(name) for name in blocks],
        "tensors_left_out": 0,
        "layers_left_out": 0,
        "blocks_left_out": 0,
    }


def _histogram(rng: np.random.Generator, modes: int) -> Json:
    edges = np.linspace(0, 1, 51)

    def shares(a: float, b: float) -> F64:
        return np.histogram(rng.beta(a, b, 4000), edges)[0] / 4000

    def band(a: float, b: float) -> Json:
        mean = shares(a, b)
        return {"low": numbers(0.85 * mean), "mean": numbers(mean), "high": numbers(1.15 * mean)}

    def null(a: float, b: float) -> Json:
        return {"abs_correlation": band(a, b), "r2": band(a / 2, b)}

    return {
        "edges": numbers(edges),
        "abs_correlation": numbers(shares(14, 1.4)),
        "r2": numbers(shares(8, 1.6)),
        "per_mode": [numbers(shares(6 + 10 * rng.random(), 1.4)) for _ in range(modes)],
        "chance": {
            "random walks": null(7, 2.4),
            "signed steps": null(9, 2.3),
            "phase-shuffled": null(11, 2.2),
        },
    }


def _weights(
    rng: np.random.Generator, planted: _Planted, modes: int, network: Json, labels: Sequence[str]
) -> list[Json]:
    weights: list[Json] = []
    snapshots = len(planted.raw_mt[0])
    per_mode = max(1, min(12, 240 // modes))
    for mode in range(min(modes, 240)):
        for i in range(per_mode):
            a, b = float(rng.normal()), float(0.1 * rng.normal())
            line = a * planted.raw_mt[mode] + b
            steps: F64 = np.asarray(rng.standard_normal(snapshots), dtype=np.float64)
            walk = np.cumsum(steps) / np.sqrt(snapshots)
            noise = 0.004 * (i + 1) * walk
            tensor = network["tensors"][int(rng.integers(len(network["tensors"])))]["name"]
            weights.append(
                {
                    "tensor": tensor,
                    "index": [int(rng.integers(64)), 3],
                    "row": 1000 * mode + i,
                    "mode": mode,
                    "a": float(f"{a:.6g}"),
                    "b": float(f"{b:.6g}"),
                    "correlation": float(f"{1 - 0.03 * i:.6g}") * (-1) ** i,
                    "recorded": numbers(line + noise),
                    "rebuilt": {
                        label: numbers(line + (0.3 + 0.2 * k) * noise) for k, label in enumerate(labels[:6])
                    },
                }
            )
    return weights


def _methods(
    rng: np.random.Generator, labels: Sequence[str], steps: Sequence[int], batch_norm: Sequence[str]
) -> Json:
    rows: list[Json] = []
    for k, label in enumerate(labels):
        for treatment in batch_norm:
            for t, step in enumerate(steps):
                accuracy = 0.97 - 0.8 * np.exp(-t / 6) + 0.004 * k + 0.004 * rng.standard_normal()
                rows.append(
                    {
                        "method": label.partition("(")[0],
                        "label": label,
                        "step": step,
                        "batch_norm": treatment,
                        "weight_mse": 0.0 if not k else float(f"{1e-5 * k * (1 + t / 30):.6g}"),
                        "relative_error": 0.0 if not k else float(f"{0.02 * k * (1 + t / 30):.6g}"),
                        "stored_bytes": 1_000_000 * (k + 1),
                        "fit_s": None if not k else 0.5 * k,
                        "scores": {
                            "accuracy": float(f"{accuracy:.6g}"),
                            "loss": float(f"{1.2 - accuracy:.6g}"),
                        },
                        "error": None,
                    }
                )
    last = [row for row in rows if row["step"] == steps[-1]]
    middle = steps[2 * len(steps) // 3]
    return {
        "source": "run.zarr",
        "unit": "epoch",
        "n_parameters": 101_626,
        "n_snapshots": len(steps),
        "steps": list(steps),
        "batch_norm": list(batch_norm),
        "scores": ["accuracy", "loss"],
        "select": ["accuracy"],
        "methods": rows,
        "last": last,
        "selected": [row for row in rows if row["step"] == middle],
    }


def _landscape(varied: int) -> Json | None:
    if not varied:
        return None
    x = np.linspace(0.5, 1.5, 21)
    loss = (x[None, :] - 1.06) ** 2 + 2 * (x[:, None] - 0.97) ** 2 + 0.3 * (x[None, :] - 1) * (x[:, None] - 1)
    loss[0, 0] = np.nan
    if varied == 1:
        loss = loss[10:11]
    return {
        "modes": list(range(varied)),
        "span": 0.5,
        "step": 600,
        "x": numbers(x),
        "y": numbers(x) if varied > 1 else [1.0],
        "scores": {"loss": numbers(loss), "accuracy": numbers(np.exp(-loss))},
        "trained": [1.0, 1.0],
        "select": ["min:loss"],
        "best": {"x": 1.05, "y": 0.95 if varied > 1 else 1.0, "scores": {"loss": 0.01}},
    }


def _quality(verdict: str, names: Sequence[str]) -> Json:
    def view(measured: float, *means: float) -> Json:
        models = ("random walks", "signed steps", "phase-shuffled", *names)
        chance = {
            model: {"mean": mean, "low": mean - 0.01, "high": mean + 0.01}
            for model, mean in zip(models, [*means, *([0.4] * len(names))], strict=True)
        }
        return {"measured": measured, "chance": chance, "excess": 0.36}

    return {
        "verdict": verdict,
        "levels": view(0.898, 0.755, 0.802, 0.84),
        "increments": view(0.683, 0.473, 0.62, 0.496),
        "increment_correlation": view(0.461, 0.15, 0.376, 0.191),
    }
