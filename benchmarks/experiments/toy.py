"""The paper's toy: linear regression with and without augmentation (section 2.2, Eqs. 3-5).

    l(w) = 1/2 ||y - w x||_F^2                          (3)
    w^{k+1} = w^k + eta (y   - w^k x  ) x^T             (4)
    w^{k+1} = w^k + eta (y^k - w^k x^k) (x^k)^T         (5)

``python -m benchmarks.experiments.toy``. Columns of x are signals; an augmented x^k holds each of them
shifted in a circle by at most ``shift`` samples, in every epoch anew, and y^k = y: what cropping does to
images.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure

from benchmarks.experiments.analysis import RANKS, merged, plain
from benchmarks.experiments.report import numbers, save, write
from benchmarks.machine import RESULTS
from cmdgpu import CMD, Trajectory
from cmdgpu.baselines import DMD, PCA, Baseline
from cmdgpu.errors import CmdgpuWarning
from cmdgpu.notation import F64
from cmdgpu.plot import STYLE, StyledFigure

NAME = "toy"
MODES = 10


@dataclass(frozen=True)
class Config:
    outputs: int = 20
    """d"""
    inputs: int = 50
    """m: N = d m weights."""
    signals: int = 200
    """n"""
    epochs: int = 100
    shift: int = 1
    seeds: int = 3


def trajectory(config: Config, seed: int, *, augment: bool) -> tuple[F64, F64]:
    """(N, T) weights w^0 ... w^epochs, and (T,) the loss of each on the signals as they are.

    Signals are noise averaged over three neighbours, and y = w* x. eta = 1 / (2 ||x||_2^2): twice that would
    end the fastest component in one step, and no linear map has it both there at first and gone ever after.
    """
    rng = np.random.default_rng(seed)
    d, m, n = config.outputs, config.inputs, config.signals
    noise = rng.standard_normal((m, n))
    x = (np.roll(noise, 1, axis=0) + noise + np.roll(noise, -1, axis=0)) / 3
    y = rng.standard_normal((d, m)) @ x
    w = rng.standard_normal((d, m)) / np.sqrt(m)
    eta = 0.5 / np.linalg.norm(x, 2) ** 2
    W, losses = [w.ravel()], [_loss(w, x, y)]
    for _ in range(config.epochs):
        x_k = _shifted(x, rng, config.shift) if augment else x
        w = w + eta * (y - w @ x_k) @ x_k.T
        W.append(w.ravel())
        losses.append(_loss(w, x, y))
    return np.stack(W, axis=1), np.array(losses)


def _loss(w: F64, x: F64, y: F64) -> float:
    return 0.5 * float(np.sum((y - w @ x) ** 2))


def _shifted(x: F64, rng: np.random.Generator, most: int) -> F64:
    by = rng.integers(-most, most + 1, size=x.shape[1])  # pyright: ignore[reportUnknownVariableType]
    return x[(np.arange(len(x))[:, None] - by) % len(x), np.arange(x.shape[1])]


def relative_errors(W: F64) -> dict[str, tuple[float, F64]]:
    """Of every method: ||What - W|| / ||W - mean|| over all snapshots, and What (N, T)."""
    traj = Trajectory.from_array(W.astype(np.float32))
    ranks = [rank for rank in RANKS if rank < W.shape[1]]
    filters: dict[str, Baseline] = {
        **{f"DMD r={rank}": DMD(rank) for rank in ranks},
        **{f"DMD r={rank}, all snapshots": DMD(rank, amplitudes="all") for rank in ranks},
        "PCA r=1": PCA(1),
    }
    with warnings.catch_warnings():
        # plain descent has fewer exponentials than asked for: DMD says so at every rank
        warnings.filterwarnings(
            "ignore", message=".*singular values lie above the noise", category=CmdgpuWarning
        )
        Baseline.fit_together(list(filters.values()), traj)
    cmd = CMD(MODES).fit(traj)
    rebuilt = {
        label: W @ np.stack([baseline.filter_at(k)[0] for k in range(W.shape[1])], axis=1)
        for label, baseline in filters.items()
    }
    a, b, mode = (np.asarray(rows, dtype=np.float64) for rows in (cmd.a_, cmd.b_, cmd.labels_))
    rebuilt[f"CMD M={MODES}"] = a[:, None] * cmd.references_[mode.astype(int)] + b[:, None]
    moved = float(np.linalg.norm(W - W.mean(axis=1, keepdims=True)))
    return {label: (float(np.linalg.norm(What - W)) / moved, What) for label, What in rebuilt.items()}


def of_seed(config: Config, seed: int) -> dict[str, Any]:
    """Per case and method: relative error over the run, and that of every snapshot."""
    found: dict[str, Any] = {}
    for case, augment in (("plain", False), ("augmented", True)):
        W, losses = trajectory(config, seed, augment=augment)
        moved_t = np.linalg.norm(W - W.mean(axis=1, keepdims=True)) / np.sqrt(W.shape[1])
        found[case] = {
            "loss_along": plain(losses.tolist()),
            "methods": {
                label: {
                    "relative_error": plain(error),
                    "relative_error_along": plain((np.linalg.norm(What - W, axis=0) / moved_t).tolist()),
                }
                for label, (error, What) in relative_errors(W).items()
            },
        }
    return found


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=Config.seeds)
    parser.add_argument("--epochs", type=int, default=Config.epochs)
    parser.add_argument("--out", type=Path, default=RESULTS / "experiments")
    options = parser.parse_args(arguments)
    config = Config(seeds=options.seeds, epochs=options.epochs)
    results = merged([of_seed(config, seed) for seed in range(config.seeds)])
    written = write(
        options.out,
        NAME,
        "python -m benchmarks.experiments.toy",
        {"config": asdict(config), "seeds": list(range(config.seeds)), "cases": results},
    )
    save(_figure(results, config.epochs + 1), options.out / f"{NAME}.png")
    return written


def _figure(results: dict[str, Any], n_snapshots: int) -> Figure:
    with style.context(STYLE, after_reset=True):
        figure = StyledFigure(figsize=(7.6, 3.2), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (case, found) in zip(panels, results.items(), strict=True):
            for label, method in found["methods"].items():
                curve = np.nanmean(numbers(method["relative_error_along"]), axis=0)
                axes.semilogy(np.arange(n_snapshots), curve, label=label, linewidth=1.2)
            axes.set_title(f"{case} gradient descent", loc="left")
            axes.set_xlabel("epoch")
            axes.grid(axis="y")
        panels[0].set_ylabel("relative error")
        panels[1].legend(frameon=False, fontsize=7)
    return figure


if __name__ == "__main__":
    main()
