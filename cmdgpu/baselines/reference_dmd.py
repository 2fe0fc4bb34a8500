"""DMD of the references of a CMD: M profiles are carried on, and with them all N weights."""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import numpy as np

from cmdgpu.baselines.dynamics import C128, Dynamics, decompose
from cmdgpu.baselines.evenness import gap, require_even
from cmdgpu.baselines.found import NOTHING
from cmdgpu.decomposition import CMD
from cmdgpu.errors import StepNotFound, UsageError
from cmdgpu.memory import show_bytes
from cmdgpu.notation import F64, I64
from cmdgpu.store.journal import nearest_steps

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cmdgpu.exporting import Export
    from cmdgpu.models import Patterns
    from cmdgpu.tensors import Buffers


class ReferenceDMD:
    """A fitted CMD whose references come from dynamics, within the snapshots and beyond them.

        w_i(s) ~ a_i rhat_m(i)(s) + b_i,   rhat: exact DMD of the references and a row of ones

    rank    r, at most T - delays, and at most M * delays + 1
    delays  copies of the references, each a snapshot later, that are stacked (Hankel): M profiles are few
            observables for T snapshots

    Everything is in memory: the CMD read the trajectory. Steps must be even; those beyond the last one, on
    the same grid, are forecasts. After ``fit``: ``references_`` (M, T), ``eigenvalues_``, ``metrics_``.
    """

    def __init__(self, rank: int, delays: int = 1) -> None:
        if rank < 1 or delays < 1:
            raise UsageError(f"rank={rank}, delays={delays}", hint="both are at least 1")
        self.rank = rank
        self.delays = delays
        self._forecast: _Forecast | None = None

    def fit(self, cmd: CMD) -> ReferenceDMD:
        """Learn how its references move.

        Raises UsageError for a CMD without modes or with uneven steps, for a rank or delays that its
        snapshots cannot have.
        """
        require_even(cmd.steps_, cmd.result.path)
        n_snapshots, n_modes = len(cmd.steps_), cmd.n_modes_
        if not n_modes:
            raise UsageError("no row moves: there are no references", hint="there is nothing to carry on")
        most = min(n_snapshots - self.delays, n_modes * self.delays + 1)
        if self.rank > most:
            raise UsageError(
                f"{self!r} of {n_modes} references at {n_snapshots} snapshots",
                hint=f"rank {most} is the most they can have" if most > 0 else "take fewer delays",
            )
        self._forecast = _Forecast(cmd, self.rank, self.delays)
        return self

    # ---- what was found -----------------------------------------------------------------------------

    @property
    def forecast(self) -> CMD:
        """The CMD that was fitted, with carried references. Raises UsageError before ``fit``."""
        return self._fitted

    @property
    def _fitted(self) -> _Forecast:
        if self._forecast is None:
            raise UsageError("this ReferenceDMD is not fitted", hint="call fit(cmd) with a fitted CMD")
        return self._forecast

    @property
    def eigenvalues_(self) -> C128:
        """(r,): what a mode of the references is multiplied with from snapshot to snapshot."""
        return self._fitted.dynamics.eigenvalues

    @property
    def references_(self) -> F64:
        """(M, T) the references as the dynamics have them."""
        return self._fitted.carried(np.arange(len(self.steps_)))

    @property
    def steps_(self) -> I64:
        """(T,) steps of the fitted snapshots."""
        return self._fitted.steps_

    @property
    def metrics_(self) -> dict[str, Any]:
        """Bytes by the keys of ``CMD.metrics_``, and ``reference_r2``: how well the references are carried.

        The error over all rows would take a pass, and is NaN.
        """
        forecast = self._fitted
        metrics = forecast.metrics_
        true = forecast.references_.astype(np.float64)
        moved = np.square(true - true.mean(axis=1, keepdims=True)).sum()
        missed = np.square(true - self.references_).sum()
        # mode, a, b of every row; the first references and the dynamics instead of all references
        rows = forecast.result.frame.map.n_live
        stacked = forecast.n_modes_ * self.delays + 1
        return {
            "n_rows": metrics["n_rows"],
            "n_nonfinite": metrics["n_nonfinite"],
            "n_modes": forecast.n_modes_,
            "rank": len(self.eigenvalues_),
            "r2": NOTHING,
            "r2_energy": NOTHING,
            "weight_mse": NOTHING,
            "reference_r2": float(1.0 - missed / moved),
            "result_bytes": 10 * rows + 8 * len(self.eigenvalues_) * (stacked + 2),
            "trajectory_bytes": metrics["trajectory_bytes"],
            "bytes_read": 0,
        }

    def summary(self) -> str:
        """The fit in words."""
        metrics = self.metrics_
        stored, original = show_bytes(metrics["result_bytes"]), show_bytes(metrics["trajectory_bytes"])
        return "\n".join(
            [
                f"{self!r}  {metrics['n_modes']} references x {len(self.steps_)} snapshots, "
                f"{metrics['n_rows']} parameters follow them",
                f"rank {metrics['rank']}   R^2 of the references {metrics['reference_r2']:.4f}   "
                f"largest |lambda| {self._fitted.dynamics.largest:.4f}",
                f"{stored} to rebuild it, for a trajectory of {original}",
            ]
        )

    # ---- rebuilding ---------------------------------------------------------------------------------

    def state_dict(
        self, step: int, params: Patterns = None, *, buffers: Buffers = "recorded"
    ) -> OrderedDict[str, Tensor]:
        """Every tensor at a fitted step (negative counts from the end) or beyond; see ``CMD.state_dict``."""
        return self._fitted.state_dict(step, params, buffers=buffers)

    def load_into(self, model: nn.Module, step: int, *, buffers: Buffers = "recorded") -> None:
        """Copy the parameters of one step into the model, in place; see ``CMD.load_into``."""
        self._fitted.load_into(model, step, buffers=buffers)

    def export(
        self,
        path: str | os.PathLike[str],
        step: int = -1,
        format: str | None = None,
        *,
        params: Patterns = None,
        buffers: Buffers = "recorded",
        max_shard_size: int | str | None = None,
    ) -> Export:
        """Write one step as a file or folder; see ``CMD.export``."""
        return self._fitted.export(
            path, step, format, params=params, buffers=buffers, max_shard_size=max_shard_size
        )

    def __repr__(self) -> str:
        return f"ReferenceDMD({self.rank}, delays={self.delays})"


class _Forecast(CMD):
    """A CMD whose references at a step are where their dynamics have carried them."""

    def __init__(self, cmd: CMD, rank: int, delays: int) -> None:
        super().__init__(
            cmd.n_modes,
            cmd.threshold,
            cmd.n_samples,
            cmd.sampling,
            cmd.affinity,
            cmd.random_state,
            cmd.device,
        )
        self._result, self._trajectory = cmd.result, cmd.trajectory
        R_mt = cmd.references_.astype(np.float64)
        self._delays = delays
        self._n_stacked = R_mt.shape[1] - delays + 1
        stacked = [R_mt[:, d : d + self._n_stacked] for d in range(delays)]
        H = np.concatenate([*stacked, np.ones((1, self._n_stacked))])
        self._first, self._last = stacked[0], stacked[-1]
        self.dynamics: Dynamics = decompose(H.T @ H, rank, "first")

    def carried(self, positions: I64) -> F64:
        """(M, len(positions)) the references at positions in time, beyond the last one too.

        Of the stacked copies the latest is read; the first ones, which it lacks, come from the earliest.
        """
        late = positions >= self._delays - 1
        filters = self.dynamics.filters(np.where(late, positions - (self._delays - 1), positions))
        return np.where(late, self._last @ filters, self._first @ filters)

    def _label(self, step: int) -> int:
        steps, h = self.steps_, gap(self.steps_)
        if -len(steps) <= step < 0:
            return int(steps[step])
        if step in steps or (step > steps[-1] and (step - int(steps[-1])) % h == 0):
            return step
        raise StepNotFound(
            f"is not on the grid of every {h} steps", step=step, hint=f"nearest: {nearest_steps(steps, step)}"
        )

    def _references_at(self, label: int) -> F64:
        steps = self.steps_
        return self.carried(np.array([(label - steps[0]) // gap(steps)], dtype=np.int64))[:, 0]
