"""Handwritten digits, a small network, and its training: the run that the demo records."""

# torch leaves the types of many methods open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import importlib.resources
from collections import OrderedDict
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cmdgpu.comparison import Evaluation
from cmdgpu.notation import U8
from cmdgpu.progress import Progress
from cmdgpu.recording import Recorder

SPLIT: Final = (1000, 297, 500)
"""Images for training, validation and test."""
BATCH: Final = 50
LEARNING_RATE: Final = 1e-3
"""Batch and rate are common defaults: they were not tuned on what the table shows."""
SELECT: Final = ("validation_accuracy", "min:validation_loss")
"""The scores that choose a snapshot of every method."""


@dataclass(frozen=True)
class Digits:
    """Scans of handwritten digits: see ``cmdgpu/data/README.md`` for their source and licence."""

    images: U8
    """(n, 8, 8), ink from 0 to 16."""
    labels: U8
    """(n,), 0 to 9."""


def load_digits() -> Digits:
    """The 1,797 images of the UCI optical digits test set that ship with the package."""
    source = importlib.resources.files("cmdgpu").joinpath("data").joinpath("digits.npz")
    with source.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return Digits(images=arrays["images"], labels=arrays["labels"])


def digit_classifier() -> nn.Sequential:
    """(n, 1, 8, 8) images to (n, 10) logits; 101,626 parameters in eight tensors.

    Without BatchNorm: the weights alone are the model, nothing is re-estimated after rebuilding them.
    """
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            conv1=nn.Conv2d(1, 32, kernel_size=3, padding=1),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(32, 64, kernel_size=3, stride=2, padding=1),
            relu2=nn.ReLU(),
            flatten=nn.Flatten(),
            hidden=nn.Linear(64 * 4 * 4, 80),
            relu3=nn.ReLU(),
            output=nn.Linear(80, 10),
        )
    )


# --- the same numbers every time -------------------------------------------------------------------


@contextmanager
def reproducible() -> Generator[None]:
    """One thread on the CPU and deterministic cuDNN, given back at the end.

    The order in which oneDNN sums a convolution depends on the number of threads; at this size one
    thread costs no time.
    """
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            yield
    finally:
        torch.set_num_threads(threads)


# --- training --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """Images (n, 1, 8, 8) float32 in 0..1 and labels (n,) int64 of the three splits."""

    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    """Validation images first, then the test images: one forward pass judges both."""
    held_out_labels: Tensor


def split_digits(digits: Digits, seed: int, device: torch.device) -> Images:
    """Shuffle by the seed, then cut by ``SPLIT``; ink 0..16 becomes 0..1."""
    order = np.random.default_rng(seed).permutation(len(digits.labels))
    x = torch.from_numpy(digits.images[order].astype(np.float32) / 16)[:, None].to(device)
    y = torch.from_numpy(digits.labels[order].astype(np.int64)).to(device)
    n = SPLIT[0]
    return Images(train=x[:n], train_labels=y[:n], held_out=x[n:], held_out_labels=y[n:])


def initial_model(seed: int, device: torch.device) -> nn.Sequential:
    """The classifier with weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        # Of the default generator alone: torch.manual_seed would reseed the caller's CUDA devices too.
        torch.default_generator.manual_seed(seed)
        return digit_classifier().to(device)


def shifted(images: Tensor, rng: torch.Generator) -> Tensor:
    """Each image moved by -1, 0 or 1 pixel in both directions, empty pixels coming in."""
    padded = functional.pad(images[:, 0], (1, 1, 1, 1))
    corner = torch.randint(0, 3, (2, len(images), 1), generator=rng).to(images.device)
    pixel = torch.arange(images.shape[-1], device=images.device)
    y, x = corner[0] + pixel, corner[1] + pixel
    which = torch.arange(len(images), device=images.device)
    return padded[which[:, None, None], y[:, :, None], x[:, None, :]][:, None]


@reproducible()
def train(model: nn.Module, images: Images, run: Path, *, seed: int, epochs: int, progress: Progress) -> None:
    """Adam on shuffled, shifted mini-batches; the initial state and every epoch are recorded."""
    rng = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    snapshot_bytes = sum(4 * p.numel() for p in model.parameters())
    with (
        _announced(progress, "training", (epochs + 1) * snapshot_bytes),
        Recorder(run, every=1, dtype="float32", unit="epoch") as recorder,
    ):
        for epoch in range(epochs + 1):
            if epoch > 0:
                order = torch.randperm(len(images.train), generator=rng).to(images.train.device)
                for batch in torch.split(order, BATCH):
                    optimizer.zero_grad()
                    logits = model(shifted(images.train[batch], rng))
                    functional.cross_entropy(logits, images.train_labels[batch]).backward()
                    optimizer.step()
            recorder.record(
                model,
                epoch,
                train_loss=_train_loss(model, images),
                validation_accuracy=judge(model, images).validation,
            )
            progress.advance(snapshot_bytes)


@contextmanager
def _announced(progress: Progress, what: str, total_bytes: int) -> Generator[None]:
    progress.begin(what, total_bytes)
    try:
        yield
    finally:
        progress.end()


@torch.no_grad()
def _train_loss(model: nn.Module, images: Images) -> float:
    return float(functional.cross_entropy(model(images.train), images.train_labels))


# --- evaluation ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """One snapshot on the held-out images."""

    validation: float
    validation_loss: float
    test: float


@torch.no_grad()
def judge(model: nn.Module, images: Images) -> Verdict:
    """Accuracies on the held-out images, and the validation loss, in one forward pass."""
    logits: Tensor = model(images.held_out)
    right = logits.argmax(dim=1) == images.held_out_labels
    n = SPLIT[1]
    return Verdict(
        validation=int(right[:n].sum()) / n,
        validation_loss=float(functional.cross_entropy(logits[:n], images.held_out_labels[:n])),
        test=int(right[n:].sum()) / len(right[n:]),
    )


def evaluation(images: Images) -> Evaluation:
    """``judge`` with names for its numbers, the same on any number of threads."""

    @reproducible()
    def evaluate(model: nn.Module) -> dict[str, float]:
        verdict = judge(model, images)
        return {
            "test_accuracy": verdict.test,
            "validation_accuracy": verdict.validation,
            "validation_loss": verdict.validation_loss,
        }

    return evaluate
