"""A training that is recorded epoch by epoch and can be killed at any time.

The trajectory holds the model. What it does not hold (optimizer, random numbers, integer buffers) lies beside
it, one file per epoch, written before the snapshot of that epoch and removed after the next one is durable:
there is always a state for the last recorded epoch. A run that goes on has the bits of one that never
stopped, on the same number of threads.
"""

# torch leaves the types of many methods open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from cmdgpu import Recorder, Trajectory


class Task(Protocol):
    """What is trained and how it is judged; random numbers come from torch's default generators alone."""

    @property
    def epochs(self) -> int: ...

    def model(self) -> nn.Module:
        """A fresh model on its device."""
        ...

    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]: ...

    def train_epoch(
        self, model: nn.Module, optimizers: list[torch.optim.Optimizer], epoch: int
    ) -> Mapping[str, float]:
        """One pass over the training data; scalars of the epoch. A learning rate follows from ``epoch``."""
        ...

    def judge(self, model: nn.Module) -> Mapping[str, float]:
        """Scalars of the model as it stands, from the validation images: ``val_loss``, ``val_accuracy``."""
        ...


def train(run: Path, task: Task, seed: int) -> None:
    """Record ``task.epochs`` + 1 snapshots at ``run``, from the last recorded one on."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = task.model()
        optimizers = task.optimizers(model)
        with Recorder(run, unit="epoch") as recorder:
            done = recorder.last_committed
            if done is not None:
                _go_back_to(run, done, model, optimizers)
            for epoch in range(0 if done is None else done + 1, task.epochs + 1):
                scalars = dict(task.train_epoch(model, optimizers, epoch)) if epoch > 0 else {}
                scalars.update(task.judge(model))
                _save(run, epoch, model, optimizers)
                recorder.record(model, epoch, **scalars)
                recorder.flush()
                for old in run.parent.glob(f"{run.name}.epoch-*.pt"):
                    if old != _state(run, epoch):
                        old.unlink()
                shown = "  ".join(f"{name} {value:.4f}" for name, value in scalars.items())
                print(f"{run.name}  epoch {epoch}/{task.epochs}  {shown}", flush=True)


def _state(run: Path, epoch: int) -> Path:
    return run.with_name(f"{run.name}.epoch-{epoch}.pt")


def _save(run: Path, epoch: int, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    state = {
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "integers": {n: b for n, b in model.named_buffers() if not b.is_floating_point()},
    }
    path = _state(run, epoch)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _go_back_to(run: Path, epoch: int, model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    state: dict[str, Any] = torch.load(_state(run, epoch), map_location="cpu", weights_only=True)
    Trajectory.open(run).load_into(model, epoch)
    buffers = dict(model.named_buffers())
    for name, value in state["integers"].items():
        buffers[name].copy_(value)
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    torch.set_rng_state(state["random"])
    if state["random_cuda"]:
        torch.cuda.set_rng_state_all(state["random_cuda"])
