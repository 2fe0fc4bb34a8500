"""ResNet-18 on CIFAR-10 (the paper's Figs. 6, 7, 9-14, 22 and 25).

``python -m benchmarks.experiments.resnet --seeds 0:3 --in DIR`` trains what is not trained yet. "The same
experiment" as SimpleNet, says the paper: Adam with a constant rate, crops and mirrors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.experiments.analysis import methods
from benchmarks.experiments.classification import Classification, judging
from benchmarks.experiments.command import asked
from benchmarks.experiments.data import Images, cifar10
from benchmarks.experiments.sweeps import sweeps

NAME = "resnet"


@dataclass(frozen=True)
class Config:
    """Reduced to what a processor trains in minutes; ``--width 64 --images 45000`` is the paper's network."""

    epochs: int = 100
    images: int = 5760
    batch: int = 128
    rate: float = 1e-3
    width: int = 8
    augment: bool = True
    judged_every: int = 20


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm around a shortcut (He et al., arXiv 1512.03385)."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(n_out),
            nn.ReLU(),
            nn.Conv2d(n_out, n_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(n_out),
        )
        same = stride == 1 and n_in == n_out
        self.shortcut: nn.Module = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))
        )

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.relu(self.residual(x) + self.shortcut(x))


def resnet18(width: int = 64, classes: int = 10) -> nn.Sequential:
    """The form for 32x32 images: a 3x3 stem and no pooling after it; 11,173,962 parameters at width 64."""
    stem = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    blocks: list[nn.Module] = []
    n_in = width
    for stage in range(4):
        n_out = width << stage
        blocks += [Block(n_in, n_out, 1 if stage == 0 else 2), Block(n_out, n_out, 1)]
        n_in = n_out
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, classes))


def task(config: Config, images: Images) -> Classification:
    return Classification(
        images,
        build=lambda: resnet18(config.width),
        build_optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=config.rate),
        epochs=config.epochs,
        batch=config.batch,
        augment=config.augment,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    ask = asked(NAME, __doc__, Config, arguments)
    mine = task(ask.config, cifar10(ask.config.images))
    judge, briefly = judging(mine, batch_norm=True), judging(mine, batch_norm=True, briefly=True)
    ask.carry_out(mine, judge, methods, "ResNet-18, CIFAR-10", lambda traj: {"sweeps": sweeps(traj, briefly)})


if __name__ == "__main__":
    main()
