"""What the tests of views and figures look at: small fits of known rows, and fits of nothing much."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from cmdgpu.decomposition import CMD
from cmdgpu.errors import CmdgpuWarning
from cmdgpu.notation import F32, F64
from cmdgpu.sources import ArraySource
from cmdgpu.store.parameter_map import ParameterMap, whole
from cmdgpu.trajectory import Trajectory
from tests.harness import planted, walks, write_store

SNAPSHOTS: Final = 30
STEPS: Final = (5 * np.arange(SNAPSHOTS)).tolist()
SHAPES: Final[dict[str, tuple[int, ...]]] = {
    "conv1.weight": (8, 3, 3, 3),
    "conv1.bias": (8,),
    "layer1.0.conv.weight": (8, 8, 3, 3),
    "layer1.0.bn.weight": (8,),
    "layer1.0.bn.running_mean": (8,),
    "layer1.1.conv.weight": (8, 8, 3, 3),
    "layer1.1.bn.weight": (8,),
    "layer1.1.bn.running_mean": (8,),
    "scale": (),
    "fc.weight": (10, 40),
}


def layout(shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> ParameterMap:
    """One tensor after the other; running means are buffers."""
    return ParameterMap(
        whole(
            [
                (name, "buffer" if name.endswith("running_mean") else "parameter", "float32", shape)
                for name, shape in shapes.items()
            ]
        )
    )


def network_rows(*, noise: float = 0.2, seed: int = 0) -> F32:
    """(N, T) of four modes, some rows constant and some with NaN, in the tensors of SHAPES."""
    n_rows = layout().n_rows
    W_nt = planted(n_rows, SNAPSHOTS, 4, noise=noise, seed=seed)
    W_nt[5:40:7] = 0.25
    W_nt[1500:1510, 3] = np.nan
    return W_nt


def in_memory(
    W_nt: Any,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    *,
    unit: str = "epoch",
    scalars: dict[str, F64] | None = None,
) -> Trajectory:
    """A trajectory of an array, in tensors and with scalars as a recorded one has them."""
    source = ArraySource(np.asarray(W_nt, dtype=np.float32))
    if shapes is not None:
        source.map = layout(shapes)
    n_snapshots = source.n_snapshots
    return Trajectory(
        source, 5 * np.arange(n_snapshots), np.arange(n_snapshots), unit=unit, scalars=scalars or {}
    )


def stored(path: Path) -> Trajectory:
    """``network_rows`` as a store."""
    return write_store(path, network_rows(), layout=layout(), steps=STEPS)


def fit(W_nt: Any, n_modes: int = 3, **settings: Any) -> CMD:
    """A fit in memory, without its warnings; every row is sampled where there are up to a thousand."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CmdgpuWarning)
        return CMD(n_modes, **settings).fit(W_nt if isinstance(W_nt, Trajectory) else in_memory(W_nt))


@cache
def planted_fit(n_modes: int = 4, n_rows: int = 60, noise: float = 0.05) -> CMD:
    """Of rows of as many known modes, and five that do not move; with two scalars."""
    still = np.full((5, SNAPSHOTS), 1.5)
    still[3:] = np.nan
    x = np.linspace(0, 3, SNAPSHOTS)
    W_nt = np.concatenate([planted(n_rows, SNAPSHOTS, n_modes, noise=noise), still])
    return fit(in_memory(W_nt, scalars={"loss": np.exp(-x), "accuracy": 1 - np.exp(-x)}), n_modes)


@cache
def network_fit() -> CMD:
    """Of ``network_rows``, in memory."""
    return fit(in_memory(network_rows(), SHAPES), 4, n_samples=200)


DEGENERATE: Final[dict[str, Callable[[], CMD]]] = {
    "one mode": lambda: fit(walks(60, 12), 1),
    "two snapshots": lambda: fit(walks(60, 2)),
    "one snapshot": lambda: fit(walks(60, 1)),
    "nothing moves": lambda: fit(np.ones((60, 12))),
    "everything is NaN": lambda: fit(np.full((60, 12), np.nan)),
    "one row": lambda: fit(walks(1, 12), 1),
    "rows with NaN": lambda: fit(np.where(np.arange(60)[:, None] % 3 == 0, np.nan, walks(60, 12))),
    "rows that are equal": lambda: fit(np.repeat(walks(2, 12), 30, axis=0), 2),
    "components": lambda: fit(walks(60, 12), references="component"),
    "refined": lambda: fit(walks(60, 12), refine=2),
    "the sample stands still": lambda: fit(_still_sample(), 2, n_samples=20),
    "as many modes as rows": lambda: fit(walks(60, 12), 60),
}


def _still_sample() -> F32:
    """Rows of which only ones that are not sampled move."""
    W_nt = np.ones((400, 12), dtype=np.float32)
    sampled = CMD(2, n_samples=20).fit(in_memory(walks(400, 12))).sample_rows_
    moving = np.setdiff1d(np.arange(400), sampled)[:5]
    W_nt[moving] = walks(5, 12)
    return W_nt
