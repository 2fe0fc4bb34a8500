"""One recorded run taken apart: every method fitted on it, its models judged, the numbers of a seed kept."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from torch import Tensor, nn

import cmdgpu
from cmdgpu import CMD, Trajectory
from cmdgpu.baselines import DMD, EMA, LAWA, PCA, SWA, RankOne
from cmdgpu.comparison.methods import Fittable, Recorded
from cmdgpu.notation import F32
from cmdgpu.store import durable

MODES = (1, 2, 5, 10, 12, 20)
RANKS = (10, 50, 90)
"""Of the DMD, in the paper."""
DOUBTED = (3, 10)
"""Numbers of modes that are held against chance."""
FITTED = ("n_modes", "mean_abs_correlation", "r2", "r2_energy", "weight_mse")

Evaluation = Callable[[nn.Module], Mapping[str, float]]


def methods(n_snapshots: int, modes: Sequence[int] = MODES) -> dict[str, Fittable]:
    """All that is compared, by the names that tables and figures use.

    SWA averages the last quarter and LAWA six snapshots, as in their papers; the EMA forgets a tenth per
    snapshot. PCA with one component stores what a CMD stores but for the label.
    """
    found: dict[str, Fittable] = {"GD": Recorded()}
    found |= {f"CMD M={m}": CMD(m) for m in modes}
    found |= {
        "EMA 0.9": EMA(0.9),
        "SWA last quarter": SWA(start=3 * (n_snapshots - 1) // 4),
        "LAWA 6": LAWA(6),
        "rank one per tensor": RankOne(),
    }
    found |= {f"PCA r={rank}": PCA(rank) for rank in (1, 10) if rank < n_snapshots}
    ranks = [rank for rank in RANKS if rank < n_snapshots]
    found |= {f"DMD r={rank}": DMD(rank) for rank in ranks}
    found |= {f"node DMD r={rank}": DMD(rank, groups="node") for rank in ranks}
    return found


@dataclass(frozen=True)
class Judging:
    """How the models of a run are judged."""

    build: Callable[[], nn.Module]
    evaluate: Evaluation
    loader: Iterable[Tensor] | None = None
    """Batches that BatchNorm statistics are measured on anew; None for a network without."""
    batch_norm: Literal["both", "reestimated"] = "both"
    select: tuple[str, ...] = ("val_accuracy", "min:val_loss")
    score: str = "test_accuracy"
    """What figures and tables show."""

    def of(
        self, traj: Trajectory, asked: Mapping[str, Fittable], steps: str, *, quality: bool = False
    ) -> dict[str, Any]:
        """Per method: what it stores, how well it fits, and for every treatment of BatchNorm its scores at
        the last step, at the one that validation selects, and along the steps. None is what is not finite.
        With ``quality``, of some numbers of modes also whether they are better than chance.
        """
        with tempfile.TemporaryDirectory() as together:
            found = cmdgpu.compare(
                traj,
                asked,
                self.evaluate,
                model=self.build,
                loader=self.loader,
                batch_norm=None if self.loader is None else self.batch_norm,
                steps=steps,
                select=self.select,
                out=together,
            )
            fits = {label: _fit_of(method, quality) for label, method in asked.items()}

        def judged(label: str, treatment: Any) -> dict[str, Any]:
            last, selected = found.last(label, treatment), found.selected(label, treatment)
            return {
                "last": plain(last.scores),
                "selected": None if selected is None else plain({"step": selected.step, **selected.scores}),
                "along": {s: plain(found.curve(label, s, treatment).tolist()) for s in found.scores},
            }

        def described(label: str) -> dict[str, Any]:
            return {
                "stored_bytes": found.last(label).stored_bytes,
                "fit": plain(fits[label]),
                "weight_mse_along": plain(found.curve(label, "weight_mse").tolist()),
                "relative_error_along": plain(found.curve(label, "relative_error").tolist()),
                "scores": {treatment: judged(label, treatment) for treatment in found.treatments},
            }

        return {
            "n_parameters": found.n_rows,
            "n_snapshots": found.n_snapshots,
            "steps": found.steps.tolist(),
            "methods": {label: described(label) for label in asked},
        }


def _fit_of(method: Fittable, quality: bool) -> dict[str, Any]:
    """What its metrics say of the fit to all snapshots; of a CMD also of each mode, and of two references."""
    metrics = method.metrics_
    found = {key: metrics[key] for key in FITTED if key in metrics}
    if isinstance(method, CMD) and method.n_modes_ <= 5:
        found["median_abs_correlation"] = [quantiles[2] for quantiles in metrics["mode_quantiles"]]
        if method.n_modes_ == 2:
            found["references_correlation"] = _correlation(*method.references_)
    if isinstance(method, CMD) and quality and method.n_modes in DOUBTED:
        judged = method.quality()
        found["verdict"] = judged.verdict
        if judged.levels is not None and judged.increment_correlation is not None:
            found["levels"] = judged.levels.measured
            found["chance"] = max(null.mean for null in judged.levels.chance.values())
            found["excess"] = judged.levels.excess
            found["increments_excess"] = judged.increment_correlation.excess
    return found


def _correlation(u_t: F32, v_t: F32) -> float:
    u, v = u_t - u_t.mean(dtype=np.float64), v_t - v_t.mean(dtype=np.float64)
    return float(u @ v / np.sqrt((u @ u) * (v @ v)))


def kept(path: Path, settings: Mapping[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The answer of ``work``, from ``path`` where it was done with the same settings before."""
    asked = json.loads(json.dumps(settings))
    if path.exists():
        found = json.loads(path.read_text())
        if found["settings"] == asked:
            return found["answer"]
    answer = work()
    text = json.dumps({"settings": asked, "answer": answer}, allow_nan=False)
    durable.write_file(path.parent, path.name, [text.encode()])
    return json.loads(text)["answer"]


def merged(parts: Sequence[Any]) -> Any:
    """The same tree once, every leaf the list of what it is in each part; None where a part lacks it."""
    if all(isinstance(part, dict) for part in parts):
        return {
            key: merged([part.get(key) for part in parts])
            for key in dict.fromkeys(k for p in parts for k in p)
        }
    return list(parts)


def at_the_end(method: Mapping[str, Any]) -> dict[str, Any]:
    """Of what ``Judging.of`` says of a method: its fit, and the scores at the last step."""
    return {"fit": method["fit"], "last": {t: scores["last"] for t, scores in method["scores"].items()}}


def plain(value: Any) -> Any:
    """Five digits that count, None for what is not finite; whole numbers as they are."""
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in cast(Mapping[str, Any], value).items()}
    if isinstance(value, list):
        return [plain(each) for each in cast(list[Any], value)]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value
