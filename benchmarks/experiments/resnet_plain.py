"""ResNet-18 without augmentation, on which node-wise DMD breaks down (the paper's section 8.6, Fig. 22).

``python -m benchmarks.experiments.resnet_plain --seeds 0:3 --in DIR`` trains what is not trained yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.experiments import resnet
from benchmarks.experiments.analysis import methods
from benchmarks.experiments.classification import judging
from benchmarks.experiments.command import asked
from benchmarks.experiments.data import cifar10

NAME = "resnet_plain"


@dataclass(frozen=True)
class Config(resnet.Config):
    augment: bool = False


def main(arguments: Sequence[str] | None = None) -> None:
    ask = asked(NAME, __doc__, Config, arguments)
    mine = resnet.task(ask.config, cifar10(ask.config.images))
    judge = judging(mine, batch_norm=True)
    ask.carry_out(mine, judge, methods, "ResNet-18 without augmentation, CIFAR-10")


if __name__ == "__main__":
    main()
