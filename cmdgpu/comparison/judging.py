"""A model gets the weights of one step and is scored by a function of the user's."""

# torch leaves the types of many methods open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from cmdgpu.errors import CmdgpuError, CmdgpuWarning, UsageError, printable

Evaluation: TypeAlias = Callable[[nn.Module], Mapping[str, float]]
"""Takes a model in evaluation mode that it must not change; answers named scores."""

Load: TypeAlias = Callable[[nn.Module], None]
"""Gives a model the weights that are judged."""

BatchNorm: TypeAlias = Literal["kept", "reestimated", "both"]
Treatment: TypeAlias = Literal["none", "kept", "reestimated"]
"""Of BatchNorm statistics: the model has none; as they were recorded at the step; measured anew."""

_SEED = 0
"""Of the batches that statistics are measured on: the same ones for every method and step."""


@dataclass(frozen=True)
class Judged:
    """One step of one method."""

    treatment: Treatment
    scores: dict[str, float]
    rebuild_s: float


class Judge:
    """Loads, measures BatchNorm statistics anew where that is asked for, evaluates."""

    def __init__(
        self,
        model: nn.Module,
        evaluate: Evaluation,
        batch_norm: BatchNorm | None,
        loader: Iterable[Any] | None,
        needed: Sequence[str] = (),
    ) -> None:
        """``needed`` are names of scores without which the comparison is not what was asked for."""
        self._model = model
        self._needed = needed
        self._evaluate = evaluate
        self._loader = loader
        self._norms = [
            module
            for module in model.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)  # pyright: ignore[reportPrivateUsage]  # all of them
            and module.running_mean is not None
        ]
        # a trajectory without buffers leaves the model's own, which must not be those of the method before
        self._own = [(buffer, buffer.clone()) for module in self._norms for buffer in module.buffers()]
        self.treatments = self._treatments(batch_norm)
        self._names: list[str] | None = None
        self._told: set[str] = set()

    def _treatments(self, batch_norm: BatchNorm | None) -> tuple[Treatment, ...]:
        if batch_norm not in (None, "kept", "reestimated", "both"):
            raise UsageError(f"batch_norm cannot be {batch_norm!r}", hint="have: kept, reestimated, both")
        if not self._norms:
            return ("none",)
        if batch_norm == "kept" or (batch_norm is None and self._loader is None):
            return ("kept",)
        if self._loader is None:
            raise UsageError(
                "BatchNorm statistics are measured anew on batches, and there is no loader",
                hint="give a loader of training batches, or batch_norm='kept'",
            )
        if isinstance(self._loader, Iterator):
            raise UsageError(
                "the loader can be gone through only once", hint="give a DataLoader, or a list of batches"
            )
        return ("reestimated",) if batch_norm == "reestimated" else ("kept", "reestimated")

    def judge(self, load: Load, where: str) -> list[Judged]:
        """The scores of what ``load`` makes of the model, under every treatment; it is left with its weights.

        Gradients are off. Raises what ``load`` raises, and CmdgpuError that ends with ``where`` ("for swa at
        step 2") for what goes wrong in the function of the user.
        """
        started = time.perf_counter()
        self.load(load)
        return self.judge_loaded(where, time.perf_counter() - started)

    def judge_loaded(self, where: str, rebuild_s: float = math.nan) -> list[Judged]:
        """The same of the weights and, where they are kept, the statistics that the model has."""
        judged: list[Judged] = []
        was_training = self._model.training
        try:
            for treatment in self.treatments:
                if treatment == "reestimated":
                    self._measure(where)
                self._model.eval()
                judged.append(Judged(treatment, self._score(where), rebuild_s))
        finally:
            self._model.train(was_training)
        return judged

    def load(self, load: Load) -> None:
        """With the buffers of the snapshot; a warning that comes at every step is given once."""
        for buffer, own in self._own:
            buffer.copy_(own)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", CmdgpuWarning)
            load(self._model)
        for warning in caught:
            text = str(warning.message)
            # what becomes of these statistics is asked and told here
            if text not in self._told and "keeps running statistics" not in text:
                self._told.add(text)
                warnings.warn(text, warning.category, stacklevel=4)

    def _measure(self, where: str) -> None:
        assert self._loader is not None
        device = next(self._model.parameters()).device
        momenta = [module.momentum for module in self._norms]
        try:
            with _blamed("the loader, or the model on its batches,", where), _seeded(device):
                update_bn(self._loader, self._model, device)
        finally:  # it does not tidy up after an error
            for module, momentum in zip(self._norms, momenta, strict=True):
                module.momentum = momentum

    def _score(self, where: str) -> dict[str, float]:
        name = name_of(self._evaluate)
        with _blamed(name, where), torch.no_grad():
            found: object = self._evaluate(self._model)
        scores = _numbers(found)
        if scores is None:
            raise CmdgpuError(
                f"{name} answered {printable(repr(found), 60)} {where}",
                hint='it must answer named numbers, as in {"accuracy": 0.9}',
            )
        if self._names is None:
            if missing := [each for each in self._needed if each not in scores]:
                raise CmdgpuError(
                    f"no score {printable(missing[0])!r} to select by", hint=f"have: {', '.join(scores)}"
                )
            self._names = list(scores)
        elif set(self._names) != set(scores):
            raise CmdgpuError(
                f"{name} answered {', '.join(scores)} {where}, and {', '.join(self._names)} before",
                hint="it must answer the same names every time",
            )
        return {score: scores[score] for score in self._names}


def built(model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    """The network, made where a function was given that makes it. Raises UsageError for anything else."""
    found: object = model if isinstance(model, nn.Module) else cast(Callable[[], object], model)()
    if not isinstance(found, nn.Module):
        raise UsageError(
            f"the model is a {type(found).__name__}, not a torch.nn.Module", hint="give the network itself"
        )
    return found


def name_of(evaluate: Evaluation) -> str:
    """What messages call a function of the user."""
    return printable(getattr(evaluate, "__qualname__", type(evaluate).__name__))


def _numbers(found: object) -> dict[str, float] | None:
    """Names and numbers; None where it is anything else."""
    if not isinstance(found, Mapping):
        return None
    scores: dict[str, float] = {}
    for name, value in cast(Mapping[object, Any], found).items():
        if not isinstance(name, str):
            return None
        try:
            scores[name] = float(value.detach() if isinstance(value, Tensor) else value)
        except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several numbers
            return None
    return scores or None


@contextlib.contextmanager
def _blamed(who: str, where: str) -> Generator[None]:
    """Whatever is raised in it becomes one line that says where."""
    try:
        yield
    except Exception as error:
        said = printable(" ".join(str(error).split()), 240)
        what = f"{type(error).__name__}{f' ({said})' if said else ''}"
        raise CmdgpuError(f"{who} raised {what} {where}") from error


@contextlib.contextmanager
def _seeded(device: torch.device) -> Generator[None]:
    """The generators of the CPU and of one device at a fixed seed, and given back afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        # of these alone: torch.manual_seed would reseed the other devices, too
        torch.default_generator.manual_seed(_SEED)
        for each in devices:
            with torch.cuda.device(each):
                torch.cuda.manual_seed(_SEED)
        yield
