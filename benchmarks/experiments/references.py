"""What better references gain at the same bytes: the paper's rows, components, refined ones.

    python -m benchmarks.experiments.references --in run-0.zarr run-1.zarr run-2.zarr

writes ``results/experiments/references.json`` and ``references.png``: a list over the runs at every leaf. Run
i is sampled with seed i. Refined references begin with components of the same objective. PCA, beside them,
keeps r numbers and a mean for every row: at r = 1 as many as CMD, whose label comes on top.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Final, cast

import numpy as np

from benchmarks.experiments.report import write
from benchmarks.machine import RESULTS
from cmdgpu import CMD, Trajectory
from cmdgpu.baselines import PCA
from cmdgpu.plot import STYLE, StyledFigure
from cmdgpu.profiles import OBJECTIVES, Objective, References

NAME = "references"
MODES: Final = (2, 5, 10, 20)
ROUNDS: Final = (1, 5, 15)
MEASURED: Final = ("r2_energy", "r2", "mean_abs_correlation")
PCA_RANKS: Final = (1, 2)
ROW: Final = "row (paper)"


@dataclass(frozen=True)
class Choice:
    references: References = "row"
    refine: int = 0
    objective: Objective = "energy"

    @property
    def label(self) -> str:
        if self.references == "row":
            return ROW
        what = f"{self.refine} round{'s' * (self.refine > 1)}" if self.refine else "component"
        return f"{what}, {self.objective}"


CHOICES: Final = (
    Choice(),
    *(Choice("component", n, objective) for objective in OBJECTIVES for n in (0, *ROUNDS)),
)


BEST: Final = Choice("component", ROUNDS[-1])


def measure(traj: Trajectory, modes: Sequence[int], n_samples: int, seed: int) -> dict[str, Any]:
    """Per M and choice: what its fit says of itself, seconds, the objective by round."""
    found: dict[str, Any] = {}
    for n_modes in modes:
        for choice in CHOICES:
            cmd = CMD(
                n_modes,
                n_samples=n_samples,
                random_state=seed,
                references=choice.references,
                refine=choice.refine,
                objective=choice.objective,
            ).fit(traj, buffers="skip")
            metrics = cmd.metrics_
            found.setdefault(f"M={n_modes}", {})[choice.label] = {
                **{key: metrics[key] for key in MEASURED},
                "seconds": sum(metrics["stage_s"].values()),
                "by_round": metrics.get("refinement", []),
            }
    for rank in PCA_RANKS:
        explained = PCA(rank).fit(traj).explained_variance_ratio_.sum()
        found.setdefault("PCA", {})[f"r={rank}"] = {"r2_energy": float(explained)}
    return found


def together(runs: Sequence[Any]) -> Any:
    """A list over the runs at every leaf."""
    if not isinstance(runs[0], dict):
        return list(runs)
    return {key: together([run[key] for run in runs]) for key in cast(dict[str, Any], runs[0])}


def rows(found: dict[str, Any]) -> list[list[str]]:
    """Of ``references.json``: M, references, R^2 by energy, R^2, mean |corr|, seconds, as mean and spread."""
    return [
        [name, label, *(_mean_and_spread(one[key]) for key in (*MEASURED, "seconds") if key in one)]
        for name, choices in found["results"].items()
        for label, one in choices.items()
    ]


def _mean_and_spread(values: Sequence[float]) -> str:
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread}"


def gain(found: dict[str, Any], n_modes: int = 10) -> float:
    """Least R^2 by energy, over the runs, that 15 rounds add to the paper's references."""
    choices = found["results"][f"M={n_modes}"]
    best: list[float] = choices[BEST.label]["r2_energy"]
    paper: list[float] = choices[ROW]["r2_energy"]
    return min(after - before for after, before in zip(best, paper, strict=True))


def draw(found: dict[str, Any], path: Path) -> None:
    """Left: R^2 by energy of every choice against M. Right: by round. Means over the runs."""
    from matplotlib import style

    results: dict[str, Any] = found["results"]
    modes = [int(name.removeprefix("M=")) for name in results if name.startswith("M=")]
    with style.context(STYLE, after_reset=True):
        figure = StyledFigure(figsize=(8.6, 3.8), layout="constrained")
        left, right = figure.subplots(1, 2)
        shown = (CHOICES[0], *(c for c in CHOICES[1:] if c.objective == "energy"))
        for order, choice in enumerate(shown):
            values: list[float] = [fmean(results[f"M={m}"][choice.label]["r2_energy"]) for m in modes]
            left.plot(modes, values, marker="o", markersize=3, label=choice.label, color=f"C{order}")
        for rank, line in zip(PCA_RANKS, (":", "-."), strict=True):
            level = fmean(results["PCA"][f"r={rank}"]["r2_energy"])
            left.axhline(level, linestyle=line, linewidth=0.9, color="grey", label=f"PCA r = {rank}")
        left.set(xlabel="modes M", ylabel="R² by energy", xscale="log", xticks=modes, xticklabels=modes)
        left.minorticks_off()
        left.legend(frameon=False, fontsize=7, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        for order, m in enumerate(modes):
            curves: list[Sequence[float]] = results[f"M={m}"][BEST.label]["by_round"]
            length = max(map(len, curves))
            held = [[*curve, *[curve[-1]] * (length - len(curve))] for curve in curves]  # ended early
            right.plot(np.mean(held, axis=0), marker="o", markersize=3, label=f"M = {m}", color=f"C{order}")
        right.set(xlabel="rounds of refinement", ylabel="R² by energy")
        right.legend(frameon=False, fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
        cast(Any, figure).savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--in", dest="stores", nargs="+", required=True, metavar="STORE")
    parser.add_argument("--modes", type=int, nargs="+", default=list(MODES))
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=RESULTS / "experiments")
    asked = parser.parse_args()
    trajs = [Trajectory.open(store) for store in asked.stores]
    runs = [measure(traj, asked.modes, asked.samples, seed) for seed, traj in enumerate(trajs)]
    names = [Path(store).name for store in asked.stores]
    found = {
        "config": {
            "runs": names,
            "shapes": [list(traj.shape) for traj in trajs],
            "modes": asked.modes,
            "n_samples": asked.samples,
        },
        "results": together(runs),
    }
    write(asked.out, NAME, f"python -m benchmarks.experiments.{NAME} --in {' '.join(names)}", found)
    draw(found, asked.out / f"{NAME}.png")
    for row in rows(found):
        print("  ".join(row))
    if 10 in asked.modes:
        print(f"15 rounds add {gain(found):.3f} to the R^2 by energy of the paper's references at M = 10")


if __name__ == "__main__":
    main()
