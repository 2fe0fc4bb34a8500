"""How often the verdict errs: unrelated rows called better than chance, planted modes called no better.

    python -m benchmarks.experiments.chance

writes ``results/experiments/chance.json``. Minutes on two cores.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from benchmarks.experiments.report import write
from benchmarks.machine import RESULTS
from benchmarks.planted import planted_rows
from cmdgpu import CMD
from cmdgpu.notation import F64
from cmdgpu.null_model import NULL_MODELS, step_scale

NAME = "chance"
Make: TypeAlias = Callable[[np.random.Generator, int, int, int], F64]
"""(rng, n, T, M) -> rows (n, T)."""


@dataclass(frozen=True)
class Config:
    snapshots: tuple[int, ...] = (8, 20, 100)
    samples: tuple[int, ...] = (60, 150)
    modes: tuple[int, ...] = (2, 10)
    seeds: int = 20
    rows: int = 500


def _planted(noise: float) -> Make:
    def make(rng: np.random.Generator, n: int, n_snapshots: int, n_modes: int) -> F64:
        return planted_rows(rng, n, n_snapshots, min(n_modes, n_snapshots - 1), noise)[0]

    return make


def _torn_apart(null_model: str) -> Make:
    """Planted rows, of which a null model leaves what is each row's own."""

    def make(rng: np.random.Generator, n: int, n_snapshots: int, n_modes: int) -> F64:
        rows = _planted(0.1)(rng, n, n_snapshots, n_modes)
        return NULL_MODELS[null_model](rng, rows, step_scale(rows))

    return make


def _persistent(rng: np.random.Generator, n: int, n_snapshots: int, n_modes: int) -> F64:
    """Walks whose steps remember the last one, as momentum makes them: correlation 0.9."""
    del n_modes
    steps = rng.standard_normal((n, n_snapshots - 1))
    for t in range(1, n_snapshots - 1):
        steps[:, t] = 0.9 * steps[:, t - 1] + np.sqrt(1 - 0.9**2) * steps[:, t]
    return _walks(steps)


def _of_every_pace(rng: np.random.Generator, n: int, n_snapshots: int, n_modes: int) -> F64:
    """Walks that slow down, each with a time constant of its own, T / 30 to 3 T."""
    del n_modes
    time = n_snapshots * 10 ** rng.uniform(-1.5, 0.5, (n, 1))
    steps = rng.standard_normal((n, n_snapshots - 1))
    return _walks(steps * np.exp(-np.arange(n_snapshots - 1) / time))


def _of_every_pace_and_persistent(rng: np.random.Generator, n: int, n_snapshots: int, n_modes: int) -> F64:
    """Both at once: where a row's movement persists for longer than it lasts, rows are c (1 - exp(-t / tau))
    with noise, and few shapes do describe them all.
    """
    steps = np.diff(_persistent(rng, n, n_snapshots, n_modes), axis=1)
    time = n_snapshots * 10 ** rng.uniform(-1.5, 0.5, (n, 1))
    return _walks(steps * np.exp(-np.arange(n_snapshots - 1) / time))


def _walks(steps: F64) -> F64:
    return np.concatenate([np.zeros((len(steps), 1)), np.cumsum(steps, axis=1)], axis=1)


UNRELATED: dict[str, Make] = {
    **{name: _torn_apart(name) for name in NULL_MODELS},
    "persistent walks": _persistent,
    "walks of every pace": _of_every_pace,
}
BETWEEN: dict[str, Make] = {"persistent walks of every pace": _of_every_pace_and_persistent}
PLANTED: dict[str, Make] = {f"planted, noise {noise}": _planted(noise) for noise in (0.1, 0.3, 0.5)}


def trials(config: Config) -> Iterator[dict[str, Any]]:
    """One record per family, T, K and M: verdicts, and the excesses they come from, a value per seed."""
    for n_snapshots, n_samples, n_modes in itertools.product(config.snapshots, config.samples, config.modes):
        for family, make in {**UNRELATED, **BETWEEN, **PLANTED}.items():
            verdicts: list[str] = []
            levels: list[float] = []
            increments: list[float] = []
            for seed in range(config.seeds):
                rng = np.random.default_rng([seed, n_snapshots, n_samples, n_modes])
                rows_nt = make(rng, config.rows, n_snapshots, n_modes).astype(np.float32)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # fewer distinct profiles than modes
                    quality = CMD(n_modes, n_samples=n_samples, random_state=seed).fit(rows_nt).quality()
                assert quality.levels is not None and quality.increment_correlation is not None
                verdicts.append(quality.verdict)
                levels.append(quality.levels.excess)
                increments.append(quality.increment_correlation.excess)
            yield {
                "family": family,
                "unrelated": family in UNRELATED,
                "n_snapshots": n_snapshots,
                "n_samples": n_samples,
                "n_modes": n_modes,
                "verdicts": dict(Counter(verdicts)),
                "levels": levels,
                "increment_correlation": increments,
            }


def rows(found: dict[str, Any]) -> list[list[str]]:
    """Of ``chance.json``: family, trials, better, cannot tell, no better, smallest and largest excess."""
    table: list[list[str]] = []
    for family in dict.fromkeys(one["family"] for one in found["trials"]):
        mine = [one for one in found["trials"] if one["family"] == family]
        verdicts = Counter[str]()
        for one in mine:
            verdicts.update(one["verdicts"])
        levels = [value for one in mine for value in one["levels"]]
        table.append(
            [
                family,
                str(len(levels)),
                *(
                    str(verdicts[name])
                    for name in ("better than chance", "cannot tell", "no better than chance")
                ),
                f"{min(levels):.2f} .. {max(levels):.2f}",
            ]
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=Config.seeds)
    parser.add_argument("--out", type=Path, default=RESULTS / "experiments")
    asked = parser.parse_args()
    config = Config(seeds=asked.seeds)
    found = {"config": asdict(config), "trials": list(trials(config))}
    write(asked.out, NAME, f"python -m benchmarks.experiments.{NAME} --seeds {asked.seeds}", found)
    for row in rows(found):
        print("  ".join(row))


if __name__ == "__main__":
    main()
