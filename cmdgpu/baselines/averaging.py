"""Averages of snapshots: EMA, SWA, LAWA. Nothing is read to fit them."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from cmdgpu.baselines.contract import Baseline
from cmdgpu.baselines.filters import Filter
from cmdgpu.baselines.found import NOTHING
from cmdgpu.errors import UsageError
from cmdgpu.notation import F64, I64
from cmdgpu.trajectory import Trajectory

if TYPE_CHECKING:
    from cmdgpu.baselines.gram import Grams
    from cmdgpu.tensors import Buffers


class Average(Baseline):
    """Weights of the snapshots up to a step that add up to one; the same for all rows.

    NaN and infinities of the snapshots that are weighed come through, as in any average. Its error is known
    when it is fitted together with a baseline that reads for all parameters (``Baseline.fit_together``).
    """

    buffer_ways: ClassVar[tuple[Buffers, ...]] = ("recorded", "rebuilt", "skip")

    @abstractmethod
    def _weights(self, traj: Trajectory, k: int) -> F64:
        """(k + 1,) weights of the selected snapshots 0..k."""

    def _check(self, traj: Trajectory) -> None:
        del traj

    def _learn(self, traj: Trajectory, grams: Grams | None) -> tuple[float, float]:
        if grams is None:
            return NOTHING, NOTHING
        F = np.concatenate([self._filter(traj, step).weights for step in traj.steps.tolist()]).T
        return grams[0].residual(F), grams[0].energy

    def _filter(self, traj: Trajectory, step: int) -> Filter:
        k = int(np.flatnonzero(traj.steps == step)[0])
        weights = np.zeros((1, len(traj.columns)))
        weights[0, : k + 1] = self._weights(traj, k)
        return Filter(weights)

    def _size(self) -> dict[str, Any]:
        return {"rank": None, "result_bytes": 4 * self.trajectory.parameters.n_rows_of("parameter")}


class EMA(Average):
    """Exponential moving average: e_0 = w_0, e_k = decay e_(k-1) + (1 - decay) w_k.

    decay  per *snapshot*, 0 <= decay <= 1: a decay d per optimiser step, recorded every n steps, is d^n
    unit   steps that ``decay`` is for, where snapshots are not evenly spaced: the decay of a snapshot is
           then decay^((s_k - s_(k-1)) / unit)

    ``AveragedModel`` of torch with ``get_ema_multi_avg_fn(decay)`` is this, rounded at every snapshot.
    """

    def __init__(self, decay: float, unit: float | None = None) -> None:
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise UsageError(f"a decay of {decay}", hint="it is from 0 to 1")
        if unit is not None and not unit > 0:
            raise UsageError(f"a unit of {unit} steps", hint="it is more than 0")
        self.decay = decay
        self.unit = unit

    def _weights(self, traj: Trajectory, k: int) -> F64:
        gaps = np.ones(k) if self.unit is None else np.diff(traj.steps[: k + 1]) / self.unit
        decays = np.float64(self.decay) ** gaps
        # of what a snapshot brings, the decays after it are left
        left = np.append(np.cumprod(decays[::-1])[::-1], 1.0)
        return left * np.append(1.0, 1.0 - decays)

    def __repr__(self) -> str:
        unit = "" if self.unit is None else f", unit={self.unit}"
        return f"EMA(decay={self.decay}{unit})"


class SWA(Average):
    """Stochastic weight averaging: the mean of w(start), w(start + cycle), ... up to the step.

    start  position of the first snapshot that counts; before it a step is its own snapshot
    cycle  every so many snapshots count

    ``torch.optim.swa_utils.update_bn`` is due afterwards, where the model has BatchNorm.
    """

    def __init__(self, start: int = 0, cycle: int = 1) -> None:
        super().__init__()
        if start < 0 or cycle < 1:
            raise UsageError(f"start={start}, cycle={cycle}", hint="start is at least 0, cycle at least 1")
        self.start = start
        self.cycle = cycle

    def _weights(self, traj: Trajectory, k: int) -> F64:
        if k < self.start:
            return _mean_of(np.array([k]), k)
        return _mean_of(np.arange(self.start, k + 1, self.cycle), k)

    def __repr__(self) -> str:
        return f"SWA(start={self.start}, cycle={self.cycle})"


class LAWA(Average):
    """Latest weight averaging: the mean of w(k), w(k - spacing), ..., k of them, fewer at the beginning.

    Source: arXiv 2306.03241, where widely spaced checkpoints are the point.
    """

    def __init__(self, k: int, spacing: int = 1) -> None:
        super().__init__()
        if k < 1 or spacing < 1:
            raise UsageError(f"k={k}, spacing={spacing}", hint="both are at least 1")
        self.k = k
        self.spacing = spacing

    def _weights(self, traj: Trajectory, k: int) -> F64:
        return _mean_of(np.arange(k, -1, -self.spacing)[: self.k], k)

    def __repr__(self) -> str:
        return f"LAWA(k={self.k}, spacing={self.spacing})"


def _mean_of(positions: I64, k: int) -> F64:
    weights = np.zeros(k + 1)
    weights[positions] = 1.0 / len(positions)
    return weights
