"""Images into classes: the task that SimpleNet and ResNet-18 share."""

# torch leaves the types of many methods open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.experiments.analysis import Judging
from benchmarks.experiments.data import Images, Split, augmented

AT_ONCE, JUDGED_AT_ONCE = 128, 250
"""Images whose activations a processor's cache holds: the gradient of a larger batch is summed from such."""


@dataclass(frozen=True)
class Classification:
    """Mini-batches in random order, cross-entropy; ``images`` lie on the device the model is to be on."""

    images: Images
    build: Callable[[], nn.Module]
    build_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    epochs: int
    batch: int
    augment: bool = True
    passes: int = 1
    """Over the training images, in an epoch: many where a step takes them all."""
    rate: Callable[[int], float] | None = None
    """Epoch 1, 2, ... -> learning rate; None leaves the optimizer's."""

    def model(self) -> nn.Module:
        model: Any = self.build()
        return model.to(self.images.mean_c.device, memory_format=torch.channels_last)

    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        return [self.build_optimizer(model)]

    def train_epoch(
        self, model: nn.Module, optimizers: list[torch.optim.Optimizer], epoch: int
    ) -> Mapping[str, float]:
        (optimizer,) = optimizers
        if self.rate is not None:
            for group in optimizer.param_groups:
                group["lr"] = self.rate(epoch)
        train = self.images.train
        total = torch.zeros((), device=train.y.device)
        model.train()
        for _ in range(self.passes):
            for batch in torch.split(torch.randperm(len(train)).to(train.y.device), self.batch):
                optimizer.zero_grad()
                for piece in torch.split(batch, AT_ONCE):
                    x = train.x[piece]
                    x = self.images.normalised(augmented(x) if self.augment else x)
                    loss = loss_of(model(x), train.y[piece]) * (len(piece) / len(batch))
                    loss.backward()
                    total += loss.detach() * len(batch)
                optimizer.step()
        return {"train_loss": float(total) / (self.passes * len(train))}

    def judge(self, model: nn.Module) -> Mapping[str, float]:
        loss, accuracy = loss_and_accuracy(model, self.images, self.images.validation)
        return {"val_loss": loss, "val_accuracy": accuracy}


def loss_of(logits: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of (n, classes), or of (n, 1): the logit of class 1."""
    if logits.shape[1] == 1:
        return functional.binary_cross_entropy_with_logits(logits[:, 0], y.float())
    return functional.cross_entropy(logits, y)


@torch.no_grad()
def loss_and_accuracy(model: nn.Module, images: Images, split: Split) -> tuple[float, float]:
    """Mean cross-entropy and share of right answers, in evaluation mode."""
    model.eval()
    loss, right = 0.0, 0
    for x, y in zip(torch.split(split.x, JUDGED_AT_ONCE), torch.split(split.y, JUDGED_AT_ONCE), strict=True):
        logits: Tensor = model(images.normalised(x))
        loss += len(y) * float(loss_of(logits, y))
        chosen = logits.argmax(dim=1) if logits.shape[1] > 1 else (logits[:, 0] > 0).long()
        right += int((chosen == y).sum())
    return loss / len(split), right / len(split)


@dataclass(frozen=True)
class TrainingBatches:
    """Batches of training images as they are trained on, for measuring BatchNorm statistics anew."""

    images: Images
    batch: int
    n_batches: int
    augment: bool

    def __iter__(self) -> Iterator[Tensor]:
        for x in torch.split(self.images.train.x, self.batch)[: self.n_batches]:
            yield self.images.normalised(augmented(x) if self.augment else x)


def judging(task: Classification, *, batch_norm: bool = False, briefly: bool = False) -> Judging:
    """Loss and accuracy on validation and test images; BatchNorm statistics kept, and anew from 20 batches.

    ``briefly`` leaves out what only a selection needs, the validation images, and the kept statistics.
    """
    loader = TrainingBatches(task.images, task.batch, 20, task.augment) if batch_norm else None

    def evaluate(model: nn.Module) -> dict[str, float]:
        loss, accuracy = loss_and_accuracy(model, task.images, task.images.test)
        scores = {"test_loss": loss, "test_accuracy": accuracy}
        if not briefly:
            loss, accuracy = loss_and_accuracy(model, task.images, task.images.validation)
            scores |= {"val_loss": loss, "val_accuracy": accuracy}
        return scores

    if briefly:
        return Judging(task.model, evaluate, loader, select=(), batch_norm="reestimated")
    return Judging(task.model, evaluate, loader)
