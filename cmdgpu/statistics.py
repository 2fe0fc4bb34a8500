"""What the pass learns about all rows besides their fits: sums that merge.

A unit's statistics are float64 sums over its rows, kept apart by tensor and by class (non-finite, constant,
mode 0, 1, ...), and a histogram of |corr| per mode over its parameter rows. They are added in unit order, so
that block size, executor and resume leave the bits alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from cmdgpu.notation import F32, F64, I16, I64, BoolArray
from cmdgpu.store.parameter_map import ParameterMap

FIELDS: Final = ("count", "ss", "rss", "abs_corr", "corr2", "below_quantisation")
N_BINS: Final = 256
QUANTILES: Final = (0.05, 0.25, 0.5, 0.75, 0.95)
LIMITS: Final = (0.5, 0.8, 0.95)
"""|corr| below which a row is counted as poorly followed."""
_FIRST_MODE: Final = 2
"""Classes: 0 non-finite, 1 constant, then the modes."""


@dataclass(frozen=True)
class UnitStatistics:
    segments: F64
    """(segments of the unit, len(FIELDS), 2 + M)"""
    histogram: I64
    """(M, N_BINS) of |corr|, parameter rows only."""


def unit_statistics(
    parameter_map: ParameterMap,
    first_row: int,
    *,
    mode: I16,
    a: F32,
    b: F32,
    correlation: F32,
    ss: F32,
    reference_means: F64,
    n_snapshots: int,
    epsilon: float,
) -> UnitStatistics:
    """Statistics of the rows [first_row, first_row + len(mode)): ``class_sums`` of every segment.

    ``epsilon`` is that of the stored type: below it a row's correlation is rounding noise.
    """
    from cmdgpu import ops  # brings torch, which who only reads results does without

    n_modes = len(reference_means)
    segments = parameter_map.segments(first_row, first_row + len(mode))
    sums = np.zeros((len(segments), len(FIELDS), _FIRST_MODE + n_modes))
    histogram = np.zeros((n_modes, N_BINS), dtype=np.int64)
    for s, segment in enumerate(segments):
        rows = slice(segment.start - first_row, segment.stop - first_row)
        is_parameter = parameter_map.tensors[segment.tensor].kind == "parameter"
        ops.class_sums(
            mode[rows],
            a[rows],
            b[rows],
            correlation[rows],
            ss[rows],
            reference_means=reference_means,
            n_snapshots=n_snapshots,
            epsilon=epsilon,
            sums=sums[s],
            histogram=histogram if is_parameter else None,
        )
    return UnitStatistics(sums, histogram)


@dataclass(frozen=True)
class Totals:
    """Statistics of the whole trajectory."""

    tensors: F64
    """(L, len(FIELDS), 2 + M) per tensor of the parameter map"""
    histogram: I64
    """(M, N_BINS)"""

    @staticmethod
    def zero(parameter_map: ParameterMap, n_modes: int) -> Totals:
        return Totals(
            np.zeros((len(parameter_map), len(FIELDS), _FIRST_MODE + n_modes)),
            np.zeros((n_modes, N_BINS), dtype=np.int64),
        )

    def add(self, parameter_map: ParameterMap, first_row: int, n_rows: int, unit: UnitStatistics) -> None:
        """Merge one unit; units come in order."""
        segments = parameter_map.segments(first_row, first_row + n_rows)
        for segment, sums in zip(segments, unit.segments, strict=True):
            self.tensors[segment.tensor] += sums
        self.histogram[...] += unit.histogram

    def of(self, chosen: BoolArray) -> F64:
        """(len(FIELDS), 2 + M) of some tensors together, added one after the other; nothing is copied."""
        return np.add.reduce(self.tensors, axis=0, where=chosen[:, None, None])


def totals_bytes(parameter_map: ParameterMap, n_modes: int) -> int:
    """Of ``Totals`` of that many tensors and modes."""
    return 8 * (len(parameter_map) * len(FIELDS) * (_FIRST_MODE + n_modes) + n_modes * N_BINS)


def summarise(totals: Totals, parameter_map: ParameterMap, n_snapshots: int) -> dict[str, Any]:
    """The numbers of ``metrics_``; buffers stand apart, so that "parameters" means parameters."""
    is_parameter = _is_parameter(parameter_map)
    parameters, buffers = totals.of(is_parameter), totals.of(~is_parameter)
    return {
        "n_rows": int(parameters[0].sum()),
        "n_buffer_rows": int(buffers[0].sum()),
        **fit_of(parameters, n_snapshots),
        "mode_quantiles": [_quantiles(row) for row in totals.histogram],
    }


def summarise_buffers(totals: Totals, parameter_map: ParameterMap, n_snapshots: int) -> dict[str, Any]:
    """The same of buffers alone, but for the quantiles: their |corr| is in no histogram."""
    sums = totals.of(~_is_parameter(parameter_map))
    return {"n_rows": int(sums[0].sum()), **fit_of(sums, n_snapshots)}


def _is_parameter(parameter_map: ParameterMap) -> BoolArray:
    return np.array([tensor.kind == "parameter" for tensor in parameter_map], dtype=bool)


def fit_of(sums: F64, n_snapshots: int) -> dict[str, Any]:
    """The metrics of any sums (len(FIELDS), 2 + M); NaN for a mean over no row."""
    count, ss, rss, abs_corr, corr2, below = sums
    moving = float(count[_FIRST_MODE:].sum())
    finite = float(count[1:].sum())
    energy, residual = float(ss[1:].sum()), float(rss[1:].sum())
    nothing = float("nan")
    return {
        "n_constant": int(count[1]),
        "n_nonfinite": int(count[0]),
        "n_below_quantisation": int(below.sum()),
        "mode_sizes": count[_FIRST_MODE:].astype(np.int64).tolist(),
        "mean_abs_correlation": float(abs_corr[_FIRST_MODE:].sum()) / moving if moving else nothing,
        "r2": float(corr2[_FIRST_MODE:].sum()) / moving if moving else nothing,
        "r2_energy": 1.0 - residual / energy if energy else nothing,
        "weight_mse": residual / (finite * n_snapshots) if finite else nothing,
    }


def tensor_shares(totals: Totals, parameter_map: ParameterMap) -> dict[str, list[int]]:
    """Rows of every tensor in [non-finite, constant, mode 0, mode 1, ...]."""
    counts = totals.tensors[:, 0].astype(np.int64)
    return {tensor.name: counts[i].tolist() for i, tensor in enumerate(parameter_map)}


BIN_EDGES: Final = 1.0 - (1.0 - np.arange(N_BINS + 1) / N_BINS) ** 2
"""|corr| crowds below 1, so the bins are even in sqrt(1 - |corr|): 1.5e-5 wide there, 8e-3 at 0."""


def _quantiles(histogram: I64) -> list[float]:
    """|corr| at QUANTILES, linear inside a bin; NaN for an empty mode."""
    if not histogram.any():
        return [float("nan")] * len(QUANTILES)
    reached = share_below(histogram)
    return [float(np.interp(q, reached, BIN_EDGES)) for q in QUANTILES]


def fraction_below(totals: Totals) -> dict[str, float]:
    """Share of the moving parameter rows whose |corr| is below each of LIMITS, linear inside a bin; NaN
    where no row moves.
    """
    histogram: I64 = totals.histogram.sum(axis=0)
    if not histogram.any():
        return dict.fromkeys(map(str, LIMITS), float("nan"))
    reached = share_below(histogram)
    return {str(limit): float(np.interp(limit, BIN_EDGES, reached)) for limit in LIMITS}


def share_below(histogram: I64) -> F64:
    """(N_BINS + 1,) share of the rows, of which there must be one, below each of BIN_EDGES."""
    return np.concatenate([[0.0], np.cumsum(histogram)]) / int(histogram.sum())
