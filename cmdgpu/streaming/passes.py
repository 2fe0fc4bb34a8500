"""What is done to a unit, and what its statistics are.

A pass is a value with two functions: ``compute`` runs on the device over one unit's time-major block and
answers device tensors; ``conclude`` takes them on the host and answers what is kept. Both are pure functions
of the unit, so that a unit may run twice, late or elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from cmdgpu import ops
from cmdgpu.notation import F32, F64, UNWRITTEN
from cmdgpu.results import Frame, UnitRows
from cmdgpu.statistics import UnitStatistics, unit_statistics
from cmdgpu.version import __version__

_EPSILON: Final = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


@dataclass(frozen=True)
class AssignAndFit:
    """Mode, a, b and correlation of every row against the references (Eq. 10 in closed form)."""

    frame: Frame
    dtype: str
    references: ops.References
    reference_means: F64
    """(M,)"""

    @staticmethod
    def of(frame: Frame, dtype: str, R_mt: F32) -> AssignAndFit:
        means = R_mt.astype(np.float64).mean(axis=1) if len(R_mt) else np.empty(0)
        return AssignAndFit(frame, dtype, ops.prepare_references(R_mt), means)

    def compute(self, W_tb: Tensor) -> tuple[Tensor, ...]:
        """(T, rows) on any device -> mode, a, b, correlation, ss there."""
        fit = ops.assign_and_fit(W_tb, self.references)
        return fit.mode, fit.a, fit.b, fit.correlation, fit.ss

    def conclude(self, unit: int, outputs: tuple[Tensor, ...]) -> tuple[UnitRows, UnitStatistics]:
        """The rows that exist (a last unit is padded) and their sums; holes stay as if never written."""
        start, stop = self.frame.unit(unit)
        mode, a, b, correlation, ss = (output[: stop - start].numpy() for output in outputs)
        statistics = unit_statistics(
            self.frame.map,
            start,
            mode=mode,
            a=a,
            b=b,
            correlation=correlation,
            ss=ss,
            reference_means=self.reference_means,
            n_snapshots=len(self.frame.steps),
            epsilon=_EPSILON[self.dtype],
        )
        for low, high in self.frame.map.holes_in(start, stop):
            hole = slice(low - start, high - start)
            mode[hole] = UNWRITTEN
            a[hole] = b[hole] = correlation[hole] = np.nan
        return UnitRows(mode, a, b, correlation), statistics


def code_identity(devices: Sequence[torch.device]) -> dict[str, str | None]:
    """What the bits of a fit depend on besides its input: versions, and the class of the devices."""
    return {
        "cmdgpu": __version__,
        "operation": "assign_and_fit",
        "torch": torch.__version__,
        "triton": ops.triton_version(),
        "numpy": np.__version__,
        "device_class": ops.device_class(devices[0]),
    }


def workspace_bytes(dtype: str, n_snapshots: int, n_modes: int, device: torch.device) -> int:
    """Host memory of the kernel beside slots and outputs."""
    return ops.workspace_bytes(dtype, n_snapshots, n_modes, device, torch.get_num_threads())
