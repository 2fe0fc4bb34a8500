"""A Vision Transformer from scratch on CIFAR-10 (the paper's Fig. 16; its Figs. 7b and 15 fine-tune one).

``python -m benchmarks.experiments.vit --seeds 0:3 --in DIR`` trains what is not trained yet. The network of
the paper, ViT-B/16, is ``--patch 16 --size 224 --width 768 --depth 12 --heads 12 --images 45000
--judged 10000 --epochs 150 --horizon 150 --batch 75 --rate 5e-5 --device cuda``.
"""

# torch leaves the types of many methods open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.experiments.classification import Classification, judging
from benchmarks.experiments.command import asked
from benchmarks.experiments.data import Images, cifar10
from benchmarks.experiments.reduced import falling, judged_on, methods
from benchmarks.experiments.transformer import Block, require_heads
from cmdgpu.errors import UsageError

NAME = "vit"
MODES = (2, 5, 10, 20)
"""The paper's are 2, 4, 8, 16, 32."""


@dataclass(frozen=True)
class Config:
    """Reduced to what a processor trains in minutes; Adam, its rate falling linearly, as in the paper.

    ``size`` is what the images are enlarged to, ``judged`` how many of them validate and how many test,
    ``horizon`` the epochs after which the rate would be 0.
    """

    epochs: int = 20
    images: int = 1500
    batch: int = 32
    rate: float = 1e-3
    horizon: int = 25
    patch: int = 4
    size: int = 32
    width: int = 48
    depth: int = 3
    heads: int = 4
    judged: int = 500
    device: str = "cpu"
    judged_every: int = 10


class VisionTransformer(nn.Module):
    """Patches as tokens behind one of the class, which the head reads (Dosovitskiy et al., 2010.11929)."""

    def __init__(
        self, *, size: int, patch: int, width: int, depth: int, heads: int, classes: int = 10
    ) -> None:
        super().__init__()
        require_heads(width, heads)
        if patch < 1 or size % patch:
            raise UsageError(
                f"patches of {patch} for images of {size}", hint="the patch must divide the size"
            )
        self.size = size
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, h, w) -> logits (n, classes)."""
        if x.shape[-1] != self.size:
            x = functional.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False)
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], dim=1) + self.position
        return self.head(self.norm(self.blocks(tokens)[:, 0]))


def task(config: Config, images: Images) -> Classification:
    def build() -> nn.Module:
        return VisionTransformer(
            size=config.size, patch=config.patch, width=config.width, depth=config.depth, heads=config.heads
        )

    return Classification(
        images.to(torch.device(config.device)),
        build=build,
        build_optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=config.rate),
        epochs=config.epochs,
        batch=config.batch,
        rate=lambda epoch: falling(config.rate, epoch, config.horizon),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    ask = asked(NAME, __doc__, Config, arguments)
    mine = task(ask.config, judged_on(cifar10(ask.config.images), ask.config.judged))
    ask.carry_out(mine, judging(mine), lambda n: methods(n, MODES), "Vision Transformer, CIFAR-10")


if __name__ == "__main__":
    main()
