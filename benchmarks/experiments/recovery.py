"""How much noise planted modes survive: adjusted Rand index against the labels that are known.

    python -m benchmarks.experiments.recovery

writes ``results/experiments/recovery.json`` and ``recovery.png``. Minutes on a laptop.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a server has no display

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.experiments.report import write
from benchmarks.machine import RESULTS
from benchmarks.planted import planted_rows
from cmdgpu import CMD
from cmdgpu.notation import F64
from cmdgpu.quality import adjusted_rand

NAME = "recovery"
HOLDS = 0.99
"""Adjusted Rand index from which modes count as found again."""
_AFFINITIES = ("abs-corr", "corr-profile")


@dataclass(frozen=True)
class Config:
    """What is planted, and how it is looked for; noise is an RMS where that of a profile is 1."""

    modes: tuple[int, ...] = (2, 5, 10)
    snapshots: tuple[int, ...] = (20, 100)
    noise: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.4, 2.0)
    seeds: int = 5
    rows: int = 20_000
    samples: int = 1000


def curves(config: Config) -> Iterator[dict[str, Any]]:
    """One record per affinity, T, M and noise: ARI, modes found and mean |corr|, a value per seed."""
    for n_snapshots, n_modes, noise in itertools.product(config.snapshots, config.modes, config.noise):
        found: dict[str, list[dict[str, float]]] = {affinity: [] for affinity in _AFFINITIES}
        for seed in range(config.seeds):
            rng = np.random.default_rng([seed, n_snapshots, n_modes, int(1000 * noise)])
            W_nt, mode_n = planted_rows(rng, config.rows, n_snapshots, n_modes, noise)
            for affinity in _AFFINITIES:
                cmd = CMD(n_modes=n_modes, n_samples=config.samples, affinity=affinity, random_state=seed)
                cmd.fit(W_nt.astype(np.float32))
                found[affinity].append(
                    {
                        "ari": adjusted_rand(np.asarray(cmd.labels_), mode_n),
                        "n_modes_found": cmd.n_modes_,
                        "mean_abs_correlation": cmd.metrics_["mean_abs_correlation"],
                    }
                )
        for affinity, seeds in found.items():
            yield {
                "affinity": affinity,
                "n_snapshots": n_snapshots,
                "n_modes": n_modes,
                "noise": noise,
                **{key: [one[key] for one in seeds] for key in seeds[0]},
            }


def rows(found: dict[str, Any]) -> list[list[str]]:
    """Of ``recovery.json``: affinity, T, M, the largest noise up to which every seed has ARI >= HOLDS, ARI at
    each noise as mean and standard deviation.
    """
    table: list[list[str]] = []
    for curve in _grouped(found["curves"]):
        holds = list(itertools.takewhile(lambda one: min(one["ari"]) >= HOLDS, curve))
        table.append(
            [
                curve[0]["affinity"],
                str(curve[0]["n_snapshots"]),
                str(curve[0]["n_modes"]),
                f"{holds[-1]['noise']:g}" if holds else "-",
                *(f"{np.mean(one['ari']):.3f} ± {_spread(one['ari']):.3f}" for one in curve),
            ]
        )
    return table


def _grouped(records: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for one in records:
        groups.setdefault((one["affinity"], one["n_snapshots"], one["n_modes"]), []).append(one)
    return [groups[key] for key in sorted(groups)]


def _spread(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def draw(found: dict[str, Any], path: Path) -> None:
    """ARI against noise: a panel per T, a colour per M, affinities solid and dashed, bars of one sigma."""
    groups = _grouped(found["curves"])
    times = sorted({curve[0]["n_snapshots"] for curve in groups})
    counts = sorted({curve[0]["n_modes"] for curve in groups})
    colours: Any = plt.get_cmap("tab10")
    figure: Any
    panels: Any
    figure, panels = plt.subplots(
        1, len(times), figsize=(4.6 * len(times), 3.8), squeeze=False, sharey=True, layout="constrained"
    )
    for curve in groups:
        panel = panels[0][times.index(curve[0]["n_snapshots"])]
        ari: list[F64] = [np.asarray(one["ari"]) for one in curve]
        dashed = curve[0]["affinity"] != _AFFINITIES[0]
        panel.errorbar(
            [one["noise"] for one in curve],
            [values.mean() for values in ari],
            yerr=[_spread(values.tolist()) for values in ari],
            color=colours(counts.index(curve[0]["n_modes"])),
            linestyle="--" if dashed else "-",
            marker="o",
            markersize=3,
            linewidth=1.2,
            capsize=2,
            label=f"M = {curve[0]['n_modes']}, {curve[0]['affinity']}",
        )
    for panel, n_snapshots in zip(panels[0], times, strict=True):
        panel.axhline(HOLDS, color="grey", linewidth=0.8, linestyle=":")
        panel.set(
            xscale="log", xlabel="noise / RMS of a profile", title=f"T = {n_snapshots}", ylim=(-0.03, 1.03)
        )
    panels[0][0].set_ylabel("adjusted Rand index against planted labels")
    panels[0][-1].legend(fontsize=7, frameon=False, loc="lower left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=Config.seeds)
    parser.add_argument("--rows", type=int, default=Config.rows)
    parser.add_argument("--out", type=Path, default=RESULTS / "experiments")
    asked = parser.parse_args()
    config = Config(seeds=asked.seeds, rows=asked.rows)
    found = {"config": asdict(config), "curves": list(curves(config))}
    flags = f"--seeds {asked.seeds} --rows {asked.rows}"
    write(asked.out, NAME, f"python -m benchmarks.experiments.{NAME} {flags}", found)
    draw(found, asked.out / f"{NAME}.png")
    for row in rows(found):
        print("  ".join(row[:4]))


if __name__ == "__main__":
    main()
