"""What the tests of the baselines share: stores of models with layers, rows rebuilt one step at a time."""

# torch leaves the types of many methods open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from pathlib import Path

import numpy as np

from cmdgpu.baselines import Baseline
from cmdgpu.notation import F32, F64, I64
from cmdgpu.store.parameter_map import ParameterMap, whole
from cmdgpu.trajectory import Trajectory
from tests.harness import planted, write_store

LAYERS = ParameterMap(
    whole(
        [
            ("conv.weight", "parameter", "float32", (8, 3, 3, 3)),
            ("conv.bias", "parameter", "float32", (8,)),
            ("norm.weight", "parameter", "float32", (8,)),
            ("norm.bias", "parameter", "float32", (8,)),
            ("norm.running_mean", "buffer", "float32", (8,)),
            ("fc.weight", "parameter", "float32", (50, 60)),
            ("fc.bias", "parameter", "float32", (50,)),
            ("scale", "parameter", "float32", ()),
        ]
    )
)
N = LAYERS.n_rows
STEPS = range(0, 120, 10)
T = len(STEPS)


def values(seed: int = 0) -> F32:
    """(N, T) of the layers."""
    return planted(N, T, 3, noise=0.3, seed=seed)


def store_of(path: Path, W_nt: F32 | None = None, rows: int = 1024) -> Trajectory:
    W_nt = values() if W_nt is None else W_nt
    return write_store(path, W_nt, rows=rows, layout=LAYERS, steps=list(STEPS))


def rebuilt(baseline: Baseline, steps: I64 | None = None) -> F32:
    """(N, T) rows of the parameters as ``state_dict`` gives them, in row order."""
    columns: list[F32] = []
    for step in (baseline.steps_ if steps is None else steps).tolist():
        state = baseline.state_dict(step, buffers="skip")
        columns.append(np.concatenate([tensor.numpy().reshape(-1) for tensor in state.values()]))
    return np.stack(columns, axis=1)


def parameter_rows() -> I64:
    return np.concatenate(
        [np.arange(t.pieces[0].row, t.pieces[0].stop) for t in LAYERS if t.kind == "parameter"]
    )


def mean_squared(found: F32, W_nt: F32) -> float:
    error: F64 = found.astype(np.float64) - W_nt
    return float(np.square(error).mean())
