"""A result in plain arrays, 14 bytes per row."""

from __future__ import annotations

import numpy as np

from cmdgpu.results.contract import Frame, ModeSet, Provenance, Result, UnitRows, result_bytes
from cmdgpu.statistics import Totals, UnitStatistics
from cmdgpu.store import format as fmt


class MemoryWriter:
    """Units into arrays; nothing survives the process."""

    def __init__(
        self, frame: Frame, modes: ModeSet, provenance: Provenance, refinement: tuple[float, ...] = ()
    ) -> None:
        self.modes = modes
        self.frame = frame
        self._provenance = provenance
        self._refinement = refinement
        self._arrays = {
            name: np.full(frame.n_rows, fill, dtype=kind) for name, (kind, fill) in fmt.RESULT_ROWS.items()
        }
        self._statistics: dict[int, UnitStatistics] = {}

    def is_done(self, unit: int) -> bool:
        return unit in self._statistics

    def write(self, unit: int, rows: UnitRows, statistics: UnitStatistics) -> None:
        start, stop = self.frame.unit(unit)
        for name, values in self._arrays.items():
            values[start:stop] = getattr(rows, name)
        self._statistics[unit] = statistics

    def finish(self) -> Result:
        totals = Totals.zero(self.frame.map, self.modes.n_modes)
        for unit in self.frame.live_units:
            start, stop = self.frame.unit(unit)
            totals.add(self.frame.map, start, stop - start, self._statistics[unit])
        n_rows, n_snapshots = self.frame.n_rows, len(self.frame.steps)
        return Result(
            frame=self.frame,
            modes=self.modes,
            mode=self._arrays["mode"],
            a=self._arrays["a"],
            b=self._arrays["b"],
            correlation=self._arrays["correlation"],
            totals=totals,
            provenance=self._provenance.to_json(),
            n_bytes=result_bytes(n_rows, self.modes.n_modes, n_snapshots),
            refinement=self._refinement,
        )
