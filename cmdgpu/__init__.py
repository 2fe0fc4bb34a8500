"""cmdgpu: record, decompose and rebuild the training trajectory of any PyTorch model, bigger than memory.

Names resolve when they are first used, so that ``import cmdgpu`` does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from cmdgpu.version import __version__

if TYPE_CHECKING:
    from cmdgpu import baselines as baselines
    from cmdgpu import hf as hf
    from cmdgpu import lightning as lightning
    from cmdgpu import plot as plot
    from cmdgpu.comparison import Comparison as Comparison
    from cmdgpu.comparison import compare as compare
    from cmdgpu.decomposition import CMD as CMD
    from cmdgpu.errors import CmdgpuError as CmdgpuError
    from cmdgpu.errors import CmdgpuWarning as CmdgpuWarning
    from cmdgpu.mode_space import Landscape as Landscape
    from cmdgpu.mode_space import landscape as landscape
    from cmdgpu.recording import Recorder as Recorder
    from cmdgpu.reporting import Report as Report
    from cmdgpu.reporting import report as report
    from cmdgpu.trajectory import Trajectory as Trajectory

_HOMES: Final = {
    "Recorder": "cmdgpu.recording",
    "Trajectory": "cmdgpu.trajectory",
    "CMD": "cmdgpu.decomposition",
    "Comparison": "cmdgpu.comparison",
    "compare": "cmdgpu.comparison",
    "Landscape": "cmdgpu.mode_space",
    "landscape": "cmdgpu.mode_space",
    "Report": "cmdgpu.reporting",
    "report": "cmdgpu.reporting",
    "CmdgpuError": "cmdgpu.errors",
    "CmdgpuWarning": "cmdgpu.errors",
}

_MODULES: Final = ("plot", "baselines", "lightning", "hf")
"""The last two are not among the names of ``*``: importing them needs the framework they are for."""

__all__ = [
    "CMD",
    "CmdgpuError",
    "CmdgpuWarning",
    "Comparison",
    "Landscape",
    "Recorder",
    "Report",
    "Trajectory",
    "__version__",
    "baselines",
    "compare",
    "landscape",
    "plot",
    "report",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"cmdgpu.{name}")
    raise AttributeError(f"module 'cmdgpu' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
