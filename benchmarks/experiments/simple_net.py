"""SimpleNet on CIFAR-10 with augmentation (the paper's Figs. 1-5).

``python -m benchmarks.experiments.simple_net --seeds 0:3 --in DIR`` trains what is not trained yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.experiments.analysis import methods
from benchmarks.experiments.classification import Classification, judging
from benchmarks.experiments.command import asked
from benchmarks.experiments.data import Images, cifar10

NAME = "simple_net"


@dataclass(frozen=True)
class Config:
    """As in the paper: Adam, 100 epochs; 45,000 images are trained on, 5,000 validate."""

    epochs: int = 100
    images: int | None = None
    batch: int = 128
    rate: float = 1e-3
    width: int = 16
    judged_every: int = 5


def simple_net(width: int = 16, classes: int = 10) -> nn.Sequential:
    """Three 3x3 convolutions, each halved by a pooling, and two full layers: 93,974 parameters (Fig. 4)."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(2 * width, 4 * width, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * width, 68),
        nn.ReLU(),
        nn.Linear(68, classes),
    )


def task(config: Config, images: Images) -> Classification:
    return Classification(
        images,
        build=lambda: simple_net(config.width),
        build_optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=config.rate),
        epochs=config.epochs,
        batch=config.batch,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    ask = asked(NAME, __doc__, Config, arguments)
    mine = task(ask.config, cifar10(ask.config.images))
    ask.carry_out(mine, judging(mine), methods, "SimpleNet, CIFAR-10")


if __name__ == "__main__":
    main()
