"""Whether Triton runs here, compiled or interpreted, and what its launchers share. Imports without triton."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from cmdgpu_kernels.dispatch import Problem
from cmdgpu_kernels.tuning import architecture

__all__ = ["TritonModule", "architecture_of", "current", "triton_module"]


@dataclass(frozen=True)
class TritonModule:
    """A module of kernels, or why there is none."""

    kernels: Any
    absent: str | None

    @property
    def interpreted(self) -> bool:
        """TRITON_INTERPRET was set when the kernels were decorated."""
        return self.absent is None and bool(self.kernels.INTERPRETED)

    def refusals(self, problem: Problem) -> list[str]:
        """Every reason why the compiled kernels cannot run."""
        reasons = [f"needs a CUDA device, got {problem.device!r}"] if problem.device != "cuda" else []
        if self.interpreted:
            reasons.append("TRITON_INTERPRET was set when the kernels were imported")
        return reasons if self.absent is None else [*reasons, self.absent]

    def refusals_interpreted(self, problem: Problem) -> list[str]:
        """Every reason why Triton's interpreter cannot run them."""
        reasons = [f"needs the CPU, got {problem.device!r}"] if problem.device != "cpu" else []
        if self.absent is None and not self.interpreted:
            reasons.append("TRITON_INTERPRET=1 was not set before the kernels were imported")
        return reasons if self.absent is None else [*reasons, self.absent]


def triton_module(name: str, *, optional: bool = False) -> TritonModule:
    """Import ``cmdgpu_kernels.<name>`` where triton is. A triton that is there but broken is not hidden.

    An ``optional`` module asks for parts of triton that not every version has.
    """
    try:
        import triton  # noqa: F401  # pyright: ignore[reportMissingTypeStubs, reportUnusedImport]
    except ImportError as error:
        return TritonModule(None, f"triton cannot be imported: {error}")
    try:
        return TritonModule(import_module(f"cmdgpu_kernels.{name}"), None)
    except (ImportError, AttributeError) as error:
        if not optional:
            raise
        return TritonModule(None, f"this triton lacks something: {error}")


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device of the process."""
    return torch.cuda.device(device) if device.type == "cuda" else torch.no_grad()


def architecture_of(device: torch.device, interpreted: tuple[int, int]) -> int:
    """Of the launch tables; the interpreter takes the one for the capability it is given."""
    return architecture(torch.cuda.get_device_capability(device) if device.type == "cuda" else interpreted)
