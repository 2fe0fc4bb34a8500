"""Run an implementation where it runs: a CUDA device's own on that device, with the answer back on the CPU.

The laws of the kernels then hold on every device of the machine that runs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cmdgpu_kernels as kernels
import torch
from cmdgpu_kernels import Gram, Problem, RowFit
from cmdgpu_kernels.gram import IMPLEMENTATIONS as GRAM_IMPLEMENTATIONS
from torch import Tensor

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def device_of(implementations: Sequence[Any], modes: int) -> dict[str, str]:
    """Every implementation that runs here, and the device that it runs on; the CPU when it can."""
    accepted = {
        i.name: device
        for device in reversed(DEVICES)
        for i in implementations
        if not i.refusals(Problem("float32", 9, modes, device))
    }
    return {i.name: accepted[i.name] for i in implementations if i.name in accepted}


FITTING = device_of(kernels.IMPLEMENTATIONS, 2)
SUMMING = device_of(GRAM_IMPLEMENTATIONS, 0)


def moved(block: Tensor, device: str) -> Tensor:
    """The same block there: strides, and how far off a wide load it begins, included."""
    if device == "cpu" or not block.numel():
        return block.to(device)
    first = block.storage_offset() % 64
    last = sum((size - 1) * stride for size, stride in zip(block.shape, block.stride(), strict=True))
    flat = block.as_strided((first + last + 1,), (1,), block.storage_offset() - first).to(device)
    return flat.as_strided(block.shape, block.stride(), first)


def assign_and_fit(W: Tensor, R_mt: Any, *, implementation: str | None = None, **options: Any) -> RowFit:
    """``cmdgpu_kernels.assign_and_fit`` of a block on the CPU."""
    there = moved(W, FITTING.get(implementation or "", "cpu"))
    fit = kernels.assign_and_fit(there, R_mt, implementation=implementation, **options)
    margin = None if fit.margin is None else fit.margin.cpu()
    return RowFit(fit.mode.cpu(), fit.a.cpu(), fit.b.cpu(), fit.correlation.cpu(), fit.ss.cpu(), margin)


def gram_matrix(W: Tensor, *, implementation: str | None = None, **options: Any) -> Gram:
    """``cmdgpu_kernels.gram_matrix`` of a block on the CPU."""
    there = moved(W, SUMMING.get(implementation or "", "cpu"))
    return kernels.gram_matrix(there, implementation=implementation, **options)
