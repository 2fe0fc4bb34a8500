"""What CMD's settings do to one run (the paper's Figs. 6 and 9-14): M, K, sample, history, sub-sampling.

Every model is judged at the last step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.experiments.analysis import Judging, at_the_end, merged
from cmdgpu import CMD, Trajectory
from cmdgpu.comparison.methods import Recorded

MODES = (*range(1, 10), *range(10, 101, 10))
SAMPLES = (50, 125, 250, 500, 1000, 2000)
RESAMPLED = 5
"""Samples per K; twice as many at K = 1000."""
HISTORIES = (100, 90, 80, 70, 60, 50)
"""Shares of the snapshots in percent, the last ones, that are looked at."""
STRIDES = (1, 2, 3, 4)
M = 10


def sweeps(traj: Trajectory, judging: Judging) -> dict[str, Any]:
    """Per sweep and setting the fit and the scores; over the samples of a K, lists of them."""
    steps = traj.steps
    lengths = {share: -(-share * len(steps) // 100) for share in HISTORIES}
    return {
        "modes": of_modes(traj, judging),
        "samples": of_samples(traj, judging),
        "history": {
            str(share): _of_selection(traj.sel(start=len(steps) - n), judging) for share, n in lengths.items()
        },
        "stride": {
            str(k): _of_selection(traj.sel(steps=steps[::-1][::k][::-1]), judging)
            for k in STRIDES
            if len(steps) > 2 * k
        },
    }


def of_modes(traj: Trajectory, judging: Judging) -> dict[str, Any]:
    asked = {str(m): CMD(m) for m in MODES} | {"GD": Recorded()}
    return _ends(judging.of(traj, asked, "last"))


def of_samples(traj: Trajectory, judging: Judging) -> dict[str, Any]:
    seeds = {k: range(RESAMPLED * (2 if k == 1000 else 1)) for k in SAMPLES}
    asked = {f"{k} {seed}": CMD(M, n_samples=k, random_state=seed) for k in SAMPLES for seed in seeds[k]}
    found = _ends(judging.of(traj, asked, "last"))
    return {str(k): merged([found[f"{k} {seed}"] for seed in seeds[k]]) for k in SAMPLES}


def _of_selection(traj: Trajectory, judging: Judging) -> dict[str, Any]:
    return _ends(judging.of(traj, {"cmd": CMD(M)}, "last"))["cmd"]


def _ends(found: Mapping[str, Any]) -> dict[str, Any]:
    return {label: at_the_end(method) for label, method in found["methods"].items()}
