"""CIFAR-10 in memory: from the folder ``CMDGPU_DATA`` (``cifar10.npz``), or through torchvision."""

# torch leaves the types of many methods open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmdgpu.errors import UsageError

PADDING = 4


@dataclass(frozen=True)
class Split:
    """Images (n, height, width, 3) uint8 and labels (n,) int64."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Images:
    """Three splits; mean and standard deviation of the training pixels, per channel."""

    train: Split
    validation: Split
    test: Split
    mean_c: Tensor
    std_c: Tensor

    def normalised(self, x: Tensor) -> Tensor:
        """(n, h, w, 3) uint8 -> (n, 3, h, w) float32 in channels_last memory."""
        return ((x.float() - self.mean_c) / self.std_c).permute(0, 3, 1, 2)

    def to(self, device: torch.device) -> Images:
        def moved(split: Split) -> Split:
            return Split(split.x.to(device), split.y.to(device))

        return Images(
            moved(self.train),
            moved(self.validation),
            moved(self.test),
            self.mean_c.to(device),
            self.std_c.to(device),
        )


def cifar10(n_train: int | None = None, classes: tuple[int, ...] | None = None) -> Images:
    """The whole set, or the first ``n_train`` training images; of ``classes`` alone, labelled 0, 1, ...

    Every tenth of the 50,000 is for validation, always the same ones, whatever is left out of the others.
    Raises UsageError where no images are found, or fewer than asked.
    """
    arrays = _read()
    x, y = arrays["x_train"], arrays["y_train"]
    order = np.random.default_rng(0).permutation(len(y))
    train, validation = np.split(order, [len(y) - len(y) // 10])
    chosen = [
        _of_classes(x[train], y[train], classes),
        _of_classes(x[validation], y[validation], classes),
        _of_classes(arrays["x_test"], arrays["y_test"], classes),
    ]
    if n_train is not None:
        if not 1 <= n_train <= len(chosen[0]):
            raise UsageError(f"{n_train} training images of {len(chosen[0])}", hint="ask for fewer")
        chosen[0] = Split(chosen[0].x[:n_train], chosen[0].y[:n_train])
    pixels = chosen[0].x.numpy().reshape(-1, 3)
    mean_c = torch.from_numpy(pixels.mean(axis=0, dtype=np.float64).astype(np.float32))
    std_c = torch.from_numpy(pixels.std(axis=0, dtype=np.float64).astype(np.float32))
    return Images(*chosen, mean_c=mean_c, std_c=std_c)


def augmented(x: Tensor) -> Tensor:
    """Each image padded by 4, cropped at random to its size, and mirrored with probability 1/2.

    (n, h, w, 3) uint8 -> the same. Draws from torch's default generator on the CPU.
    """
    n, height, width, _ = x.shape
    padded = torch.nn.functional.pad(x, (0, 0, PADDING, PADDING, PADDING, PADDING))
    corner = torch.randint(0, 2 * PADDING + 1, (2, n, 1)).to(x.device)
    mirrored = torch.randint(0, 2, (n, 1)).to(x.device) == 1
    rows = corner[0] + torch.arange(height, device=x.device)
    columns = torch.arange(width, device=x.device).expand(n, width)
    columns = corner[1] + torch.where(mirrored, width - 1 - columns, columns)
    which = torch.arange(n, device=x.device)
    return padded[which[:, None, None], rows[:, :, None], columns[:, None, :]]


def _of_classes(x: Any, y: Any, classes: tuple[int, ...] | None) -> Split:
    if classes is None:
        return Split(torch.from_numpy(x.copy()), torch.from_numpy(y.astype(np.int64)))
    kept = np.isin(y, classes)
    labels = np.asarray(np.searchsorted(classes, y[kept]), dtype=np.int64)  # pyright: ignore[reportUnknownArgumentType]
    return Split(torch.from_numpy(x[kept]), torch.from_numpy(labels))


def _read() -> dict[str, Any]:
    """x_train, y_train, x_test, y_test."""
    folder = os.environ.get("CMDGPU_DATA")
    if folder is not None and (Path(folder) / "cifar10.npz").exists():
        with np.load(Path(folder) / "cifar10.npz") as archive:
            return {name: archive[name] for name in ("x_train", "y_train", "x_test", "y_test")}
    try:
        datasets: Any = importlib.import_module("torchvision.datasets")
    except ImportError as error:
        raise UsageError(
            f"no CIFAR-10: CMDGPU_DATA={folder or ''} has no cifar10.npz, and torchvision is not installed",
            hint="a folder with cifar10.npz (x_train, y_train, x_test, y_test), or pip install torchvision",
        ) from error
    parts: list[Any] = [
        datasets.CIFAR10(folder or "data", train=train, download=True) for train in (True, False)
    ]
    names = (("x_train", "y_train"), ("x_test", "y_test"))
    return {
        name: array
        for (x, y), part in zip(names, parts, strict=True)
        for name, array in ((x, np.asarray(part.data)), (y, np.asarray(part.targets)))
    }
