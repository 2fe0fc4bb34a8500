"""What the experiments at reduced size share: fewer methods, fewer images to judge on, a falling rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from benchmarks.experiments import analysis
from benchmarks.experiments.data import Images, Split
from cmdgpu.comparison.methods import Fittable

MODES = (1, 2, 5, 10)
COMPARED = ("GD", "CMD", "EMA", "SWA", "PCA")


def methods(n_snapshots: int, modes: Sequence[int] = MODES) -> dict[str, Fittable]:
    """Of the usual methods those that the paper and its rivals would choose here: no DMD, one of a kind."""
    usual = analysis.methods(n_snapshots, modes)
    return {label: method for label, method in usual.items() if label.split()[0] in COMPARED}


def judged_on(images: Images, n: int) -> Images:
    """The same training images; at most ``n`` for validation and ``n`` for the test, the first ones."""

    def first(split: Split) -> Split:
        return Split(split.x[:n], split.y[:n])

    return replace(images, validation=first(images.validation), test=first(images.test))


def falling(rate: float, epoch: int, horizon: int, power: float = 1.0) -> float:
    """rate (1 - (epoch - 1) / horizon)^power in epoch 1, 2, ..., and as in the last one after ``horizon``.

    The horizon is a setting of its own, not the number of epochs: a longer run continues a shorter one.
    """
    return rate * (1 - (min(epoch, horizon) - 1) / horizon) ** power
