"""A transformer of any size and a training run of it, made a chunk at a time: never a column, never N x T."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from cmdgpu.notation import F32, F64, I64, AnyArray
from cmdgpu.sampling import candidate_rows
from cmdgpu.store import format as fmt
from cmdgpu.store.parameter_map import Kind, ParameterMap, whole

N_PLANTED: Final = 4
NOISE: Final = 0.05
"""Half of the range of a row's noise, in units of the RMS movement of a profile."""
_VOCABULARY: Final = 32_000
_ROWS_OF_A_BLOCK: Final = 12
"""Times the square of the width: four products of attention, two of four widths each behind it."""


def transformer(n_rows: int) -> ParameterMap:
    """Exactly ``n_rows`` parameters: a few hundred narrow blocks, so that there are thousands of tensors."""
    width = max(8, 1 << int(math.log2(max(n_rows / (_ROWS_OF_A_BLOCK * 250), 1)) / 2))
    vocabulary = min(_VOCABULARY, n_rows // (8 * width))
    tensors = [("embed.weight", (vocabulary, width))] if vocabulary else []
    left, number = n_rows - vocabulary * width, 0
    while left >= (block := _block(f"blocks.{number}", width))[0]:
        tensors += block[1]
        left -= block[0]
        number += 1
    tensors += [("head.weight", (left // width, width)), ("head.bias", (left % width,))]
    kind: Kind = "parameter"
    return ParameterMap(whole([(name, kind, "float32", shape) for name, shape in tensors]))


def _block(prefix: str, width: int) -> tuple[int, list[tuple[str, tuple[int, ...]]]]:
    """(rows, tensors) of one block."""
    shapes: dict[str, tuple[int, ...]] = {
        "norm1.weight": (width,), "norm1.bias": (width,),
        **{f"attention.{name}.weight": (width, width) for name in ("query", "key", "value", "out")},
        **{f"attention.{name}.bias": (width,) for name in ("query", "key", "value", "out")},
        "norm2.weight": (width,), "norm2.bias": (width,),
        "mlp.up.weight": (4 * width, width), "mlp.up.bias": (4 * width,),
        "mlp.down.weight": (width, 4 * width), "mlp.down.bias": (width,),
    }  # fmt: skip
    tensors = [(f"{prefix}.{name}", shape) for name, shape in shapes.items()]
    return sum(math.prod(shape) for _, shape in tensors), tensors


def planted_rows(
    rng: np.random.Generator, n_rows: int, n_snapshots: int, n_modes: int, noise: float
) -> tuple[F64, I64]:
    """Rows a r_m + b + noise in memory, (n, T) float64, and the mode of each.

    The profiles are random walks made orthogonal to each other and to a constant, of RMS 1; |a| is uniform in
    0.5 .. 1.5 with either sign, b in 0 .. 1, and the noise is white and normal, ``noise`` its RMS: a row of
    |a| = 1 correlates with its profile at 1 / sqrt(1 + noise^2). M < T.
    """
    walks = np.cumsum(rng.standard_normal((n_modes, n_snapshots)), axis=1)
    basis, _ = np.linalg.qr((walks - walks.mean(axis=1, keepdims=True)).T)
    mode_n = rng.integers(n_modes, size=n_rows)
    a_n = rng.uniform(0.5, 1.5, n_rows) * rng.choice([-1.0, 1.0], n_rows)
    rows = a_n[:, None] * (math.sqrt(n_snapshots) * basis.T)[mode_n] + rng.random((n_rows, 1))
    return rows + noise * rng.standard_normal((n_rows, n_snapshots)), mode_n


@dataclass(frozen=True)
class Rows:
    """What is planted in the rows of one chunk."""

    mode: I64
    """(rows,) below N_PLANTED."""
    values: F32
    """(rows,) at one snapshot."""


class Planted:
    """Rows a r_m + b + noise; the profiles are random walks made orthogonal, so that no two are alike."""

    def __init__(self, n_rows: int, n_snapshots: int) -> None:
        self.map = transformer(n_rows)
        self.n_snapshots = n_snapshots
        self.rows = fmt.default_rows_per_chunk(n_rows)
        self.n_chunks = -(-n_rows // self.rows)
        self.sketch_rows = candidate_rows(self.map)
        walks = np.random.default_rng(0).standard_normal((N_PLANTED, n_snapshots)).cumsum(axis=1)
        basis, _ = np.linalg.qr((walks - walks.mean(axis=1, keepdims=True)).T)
        profiles = (basis.T * math.sqrt(n_snapshots)).astype(np.float32)
        self._profiles = np.concatenate([profiles, -profiles])

    def chunk(self, i: int, t: int) -> Rows:
        """Rows of chunk i at snapshot t, those beyond the last one NaN."""
        own = np.random.Generator(np.random.SFC64([1, i]))
        signed = own.integers(2 * N_PLANTED, size=self.rows, dtype=np.uint8)
        values = own.random(self.rows, dtype=np.float32)
        values += np.float32(0.5)
        values *= np.take(self._profiles[:, t], signed)
        values += own.random(self.rows, dtype=np.float32)
        noise = np.random.Generator(np.random.SFC64([2, i, t])).random(self.rows, dtype=np.float32)
        noise -= np.float32(0.5)
        noise *= np.float32(2 * NOISE)
        values += noise
        values[self.map.n_rows - i * self.rows :] = np.nan
        return Rows((signed % N_PLANTED).astype(np.int64), values)


class PlantedColumn:
    """A snapshot for the journal; the candidates' values are kept as their chunks go by."""

    def __init__(self, planted: Planted, t: int) -> None:
        self._planted = planted
        self._t = t
        self._candidates = np.empty(len(planted.sketch_rows), dtype=np.float32)

    def chunk(self, i: int) -> AnyArray:
        values = self._planted.chunk(i, self._t).values
        rows, start = self._planted.sketch_rows, i * self._planted.rows
        first, last = np.searchsorted(rows, (start, start + self._planted.rows))
        self._candidates[first:last] = values[rows[first:last] - start]
        return values

    def sketch(self) -> AnyArray:
        return self._candidates

    def source(self) -> None:
        return None
