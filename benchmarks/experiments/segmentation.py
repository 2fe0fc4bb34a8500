"""A pyramid pooling network that segments images by colour from their grey values (after the paper's Fig. 8).

``python -m benchmarks.experiments.segmentation --seeds 0:3 --in DIR`` trains what is not trained yet.

A stand-in at reduced size: the paper trains PSPNet on PASCAL VOC 2012. Here the images are CIFAR-10's, and
the label of a pixel is its colour: chroma (R - Y, B - Y), Y = 0.299 R + 0.587 G + 0.114 B, belongs to one of
``classes`` clusters that k-means finds once among the training pixels. The network sees Y alone, so that a
label follows from what is around a pixel, not from the pixel.
"""

# torch and scipy leave the types of many functions open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.cluster.vq  # pyright: ignore[reportMissingTypeStubs]
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.experiments.analysis import Judging
from benchmarks.experiments.command import asked
from benchmarks.experiments.data import Images, augmented, cifar10
from benchmarks.experiments.reduced import falling, judged_on, methods
from cmdgpu.errors import UsageError
from cmdgpu.notation import F64

NAME = "segmentation"
CLUSTERED = 20_000
"""Pixels that k-means looks at."""
JUDGED_AT_ONCE = 250


@dataclass(frozen=True)
class Config:
    """SGD with momentum 0.9, weight decay 1e-4 and a poly rate from 1e-2, as in the paper; 100 epochs there.

    ``judged`` images validate and as many test; ``horizon`` is the number of epochs after which the rate
    would be 0.
    """

    epochs: int = 20
    images: int = 1500
    batch: int = 32
    rate: float = 1e-2
    horizon: int = 25
    width: int = 12
    classes: int = 4
    judged: int = 500
    judged_every: int = 10


# ---- labels ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Maps:
    """Images (n, h, w, 2) uint8: grey value, and label + 1; 0 is a pixel without one."""

    train: Tensor
    validation: Tensor
    test: Tensor
    centres: F64
    """(classes, 2) chroma of every class, the greyest first."""
    mean: float
    std: float
    """Of the training images' grey values."""

    def split(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Grey values for the network (n, 1, h, w), and labels (n, h, w), -1 where there is none."""
        return ((maps[..., 0].float() - self.mean) / self.std)[:, None], maps[..., 1].long() - 1


def luma_and_chroma(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., 3) uint8 -> Y (...), and (R - Y, B - Y) (..., 2), all in grey levels."""
    x = x.float()
    luma = x @ torch.tensor([0.299, 0.587, 0.114])
    return luma, torch.stack([x[..., 0] - luma, x[..., 2] - luma], dim=-1)


def colour_maps(images: Images, classes: int) -> Maps:
    """Labels of all images from clusters of the training pixels, the same ones for every seed.

    Raises UsageError where the training pixels have fewer colours than there are to be classes.
    """
    _, chroma = luma_and_chroma(images.train.x)
    rng = np.random.default_rng(0)
    pixels = rng.permutation(chroma.reshape(-1, 2).numpy().astype(np.float64))[:CLUSTERED]
    colours = np.unique(pixels, axis=0)
    if len(colours) < classes:
        raise UsageError(f"{len(colours)} colours for {classes} classes", hint="ask for fewer classes")
    start = rng.choice(colours, classes, replace=False)
    found: tuple[F64, Any] = scipy.cluster.vq.kmeans2(
        pixels, start, iter=100, minit="matrix", missing="raise"
    )
    centres = found[0][np.argsort(np.linalg.norm(found[0], axis=1))]
    nearest = torch.from_numpy(centres).float()

    def mapped(x: Tensor) -> Tensor:
        luma, chroma = luma_and_chroma(x)
        label = torch.cdist(chroma.flatten(1, 2), nearest).argmin(dim=2).view(luma.shape)
        return torch.stack([luma.round().clamp(0, 255), label.float() + 1], dim=-1).to(torch.uint8)

    train = mapped(images.train.x)
    grey = train[..., 0].double()
    return Maps(
        train,
        mapped(images.validation.x),
        mapped(images.test.x),
        centres,
        float(grey.mean()),
        float(grey.std()),
    )


# ---- network --------------------------------------------------------------------------------------------


def convolved(n_in: int, n_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU()
    )


class PyramidPooling(nn.Module):
    """Averages over 1x1, 2x2 and 4x4 regions beside the features themselves (Zhao et al., 1612.01105).

    Without BatchNorm: one average of one image has no variance.
    """

    def __init__(self, width: int, regions: Sequence[int] = (1, 2, 4)) -> None:
        super().__init__()
        share = max(width // len(regions), 1)
        self.levels = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(n), nn.Conv2d(width, share, 1), nn.ReLU()) for n in regions
        )
        self.width = width + share * len(regions)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        pooled = [
            functional.interpolate(level(x), size, mode="bilinear", align_corners=False)
            for level in self.levels
        ]
        return torch.cat([x, *pooled], dim=1)


class PyramidNet(nn.Module):
    """Features at a quarter of the resolution, pyramid pooling, labels enlarged to that of the image."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            convolved(1, width), convolved(width, 2 * width, 2), convolved(2 * width, 4 * width, 2)
        )
        self.pooling = PyramidPooling(4 * width)
        self.labels = nn.Sequential(
            convolved(self.pooling.width, 4 * width), nn.Conv2d(4 * width, classes, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(n, 1, h, w) -> logits (n, classes, h, w)."""
        small = self.labels(self.pooling(self.features(x)))
        return functional.interpolate(small, x.shape[-2:], mode="bilinear", align_corners=False)


# ---- training and judging -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Segmentation:
    """Cross-entropy of the pixels that have a label, images cropped and mirrored with their labels."""

    config: Config
    maps: Maps

    @property
    def epochs(self) -> int:
        return self.config.epochs

    def model(self) -> nn.Module:
        return PyramidNet(self.config.width, self.config.classes)

    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(model.parameters(), lr=self.config.rate, momentum=0.9, weight_decay=1e-4)]

    def train_epoch(
        self, model: nn.Module, optimizers: list[torch.optim.Optimizer], epoch: int
    ) -> Mapping[str, float]:
        (optimizer,) = optimizers
        for group in optimizer.param_groups:
            group["lr"] = falling(self.config.rate, epoch, self.config.horizon, power=0.9)
        model.train()
        train = self.maps.train
        total = 0.0
        for batch in torch.split(torch.randperm(len(train)), self.config.batch):
            x, label = self.maps.split(augmented(train[batch]))
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), label, ignore_index=-1)
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(batch)
        return {"train_loss": total / len(train)}

    def judge(self, model: nn.Module) -> Mapping[str, float]:
        return scores_of(model, self.maps, self.maps.validation, self.config.classes, "val")

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {
            **self.judge(model),
            **scores_of(model, self.maps, self.maps.test, self.config.classes, "test"),
        }


@torch.no_grad()
def scores_of(model: nn.Module, maps: Maps, judged: Tensor, classes: int, split: str) -> dict[str, float]:
    """Loss, pixel accuracy and mean IoU over (n, h, w, 2) maps whose pixels all have labels."""
    model.eval()
    loss = 0.0
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    for part in torch.split(judged, JUDGED_AT_ONCE):
        x, label = maps.split(part)
        logits: Tensor = model(x)
        loss += len(part) * float(functional.cross_entropy(logits, label))
        pairs = label * classes + logits.argmax(dim=1)
        confusion += torch.bincount(pairs.flatten(), minlength=classes * classes).view(classes, classes)
    return {
        f"{split}_loss": loss / len(judged),
        f"{split}_accuracy": float(confusion.diagonal().sum() / confusion.sum()),
        f"{split}_miou": mean_iou(confusion),
    }


def mean_iou(confusion: Tensor) -> float:
    """Of (true class, predicted class) counts: both / either, mean over the classes that either has."""
    both = confusion.diagonal().double()
    either = confusion.sum(dim=0) + confusion.sum(dim=1) - both
    return float((both / either)[either > 0].mean())


@dataclass(frozen=True)
class TrainingBatches:
    """The first 20 batches as they are trained on, for measuring BatchNorm statistics anew."""

    maps: Maps
    batch: int

    def __iter__(self) -> Iterator[Tensor]:
        for part in torch.split(self.maps.train, self.batch)[:20]:
            yield self.maps.split(augmented(part))[0]


def main(arguments: Sequence[str] | None = None) -> None:
    ask = asked(NAME, __doc__, Config, arguments)
    images = judged_on(cifar10(ask.config.images), ask.config.judged)
    mine = Segmentation(ask.config, colour_maps(images, ask.config.classes))
    judging = Judging(mine.model, mine.evaluate, TrainingBatches(mine.maps, ask.config.batch))
    ask.carry_out(mine, judging, methods, "Pyramid pooling, CIFAR-10 by colour")


if __name__ == "__main__":
    main()
