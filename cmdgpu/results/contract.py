"""What a fit decides, what it leaves, and where it leaves it: the words of a result, without a disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Protocol, TypeAlias, cast

import numpy as np

from cmdgpu.errors import printable
from cmdgpu.notation import F32, F64, I16, I64, AnyArray
from cmdgpu.statistics import Totals, UnitStatistics, summarise
from cmdgpu.store import format as fmt
from cmdgpu.store.parameter_map import ParameterMap
from cmdgpu.store.places import Place
from cmdgpu.store.units_ahead import units_of

MOST_PATTERNS: Final = 64
"""Selections of selections that a result tells of."""
_PATTERN_SHOWN: Final = 240


@dataclass(frozen=True)
class ModeSet:
    """What a fit decides before the pass: the sample, its clustering, the references."""

    references: F32
    """R_mt (M, T)"""
    reference_row: I64
    """(M,); -1 for a reference that is no row"""
    sample_row: I64
    """(K,) ascending"""
    sample_mode: I16
    """(K,) mode of each, -1 constant, -2 non-finite"""
    sample: RowArray
    """(K, T) float32: of a result on disk it is read when it is asked for"""
    linkage: F64
    """(K' - 1, 4)"""

    @property
    def n_modes(self) -> int:
        return len(self.references)

    def digests(self) -> dict[str, str]:
        return {
            field.name: fmt.sha256(np.ascontiguousarray(getattr(self, field.name)).tobytes())
            for field in dataclasses.fields(self)
        }


@dataclass(frozen=True)
class Refined:
    """References between two rounds of refinement."""

    references: F32
    """(M, T)"""
    values: tuple[float, ...] = ()
    """The objective at the start and after every round; nothing before the first."""


Refine: TypeAlias = Callable[[Refined], Iterator[Refined]]
"""What every further round leaves, until nothing is left to do."""


@dataclass(frozen=True)
class Provenance:
    """Everything the numbers depend on; two fits of one fingerprint write the same bytes."""

    source: Mapping[str, Any]
    config: Mapping[str, Any]
    code: Mapping[str, Any]
    origin: str | None = None
    """Where the trajectory lies, seen from the result's parent: a hint, and no part of the fingerprint."""
    params: tuple[str, ...] = ()
    """What chose the tensors: no part of the fingerprint, for which ``source`` has a digest of the choice."""

    @property
    def fingerprint(self) -> str:
        return fmt.sha256(fmt.canonical({"format": fmt.FORMAT, **self._settings()}))

    def _settings(self) -> dict[str, Any]:
        return {"source": dict(self.source), "config": dict(self.config), "code": dict(self.code)}

    def to_json(self) -> dict[str, Any]:
        said = [printable(pattern, _PATTERN_SHOWN) for pattern in self.params[:MOST_PATTERNS]]
        return {**self._settings(), "origin": self.origin, **({"params": said} if said else {})}

    def difference(self, other: Mapping[str, Any]) -> str:
        """The first setting that differs, as text: ``config n_modes: 10 there, 5 asked``."""
        for part, mine in self._settings().items():
            theirs = cast(Mapping[str, Any], other.get(part, {}))
            for key in sorted({*mine, *theirs}):
                if mine.get(key) == theirs.get(key):
                    continue
                if key == "tensors":
                    there, asked = spoken(other.get("params", [])), spoken(self.params)
                    return f"params: {_short(there)} there, {_short(asked)} asked"
                return f"{part} {key}: {_short(theirs.get(key))} there, {_short(mine.get(key))} asked"
        return "the format"


def spoken(params: Sequence[str]) -> str:
    """The patterns of selections that narrow one another, as text."""
    return " and ".join(params) or "all tensors"


def _short(value: object) -> str:
    text = printable(str(value))
    return text if len(text) <= 48 else f"{text[:45]}..."


@dataclass(frozen=True)
class UnitRows:
    """The fits of one unit's rows, (n,) each."""

    mode: I16
    a: F32
    b: F32
    correlation: F32


@dataclass(frozen=True)
class Frame:
    """The shape of a result: whose rows, at which steps, in which units."""

    map: ParameterMap
    steps: I64
    rows: int
    """Rows per unit."""

    @property
    def n_rows(self) -> int:
        return self.map.n_rows

    @property
    def n_units(self) -> int:
        return -(-self.n_rows // self.rows)

    @cached_property
    def live_units(self) -> tuple[int, ...]:
        """The units that hold a row of a tensor, ascending; of the others nothing is read or written."""
        return tuple(units_of(((start, stop) for start, stop, _ in self.map.spans), self.rows))

    def is_live(self, unit: int) -> bool:
        return bool(self.map.segments(*self.unit(unit)))

    def unit(self, i: int) -> tuple[int, int]:
        """[start, stop) of the rows of unit i."""
        return i * self.rows, min((i + 1) * self.rows, self.n_rows)

    @cached_property
    def segment_counts(self) -> I64:
        """(live units,) runs of tensors in every live unit: as many as ``map.segments`` finds there."""
        starts, stops = np.array([span[:2] for span in self.map.spans], dtype=np.int64).reshape(-1, 2).T
        first = np.array(self.live_units, dtype=np.int64) * self.rows
        return np.searchsorted(starts, first + self.rows) - np.searchsorted(stops, first, side="right")


@dataclass(frozen=True)
class Result:
    """A complete decomposition."""

    frame: Frame
    modes: ModeSet
    mode: RowArray
    a: RowArray
    b: RowArray
    correlation: RowArray
    totals: Totals
    provenance: Mapping[str, Any]
    """source, config, code, origin"""
    n_bytes: int
    """Bytes of everything needed to rebuild: references and four numbers per row."""
    path: Place | None = None
    refinement: tuple[float, ...] = ()
    """The objective before and after every round; of references that were not refined nothing."""

    @property
    def fingerprint(self) -> str:
        """Of everything the numbers depend on: two fits of one fingerprint have the same bytes."""
        found = self.provenance
        return Provenance(found["source"], found["config"], found["code"]).fingerprint

    @property
    def fitted_on(self) -> str:
        """Fingerprint of the trajectory it was fitted on."""
        source = {key: value for key, value in self.provenance["source"].items() if key != "token"}
        return fmt.sha256(fmt.canonical(source))

    @property
    def metrics(self) -> dict[str, Any]:
        return summarise(self.totals, self.frame.map, len(self.frame.steps))


class RowArray(Protocol):
    """(N,), or (K, T), array-like: a NumPy array, or chunks on disk."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...

    def __array__(self, *args: Any, **kwargs: Any) -> AnyArray: ...


class ResultWriter(Protocol):
    """Where the pass leaves its units."""

    @property
    def modes(self) -> ModeSet: ...

    def is_done(self, unit: int) -> bool: ...

    def write(self, unit: int, rows: UnitRows, statistics: UnitStatistics) -> None:
        """Keep one unit; whole and durable when this returns. Units may come in any order."""
        ...

    def finish(self) -> Result: ...


def result_bytes(n_rows: int, n_modes: int, n_snapshots: int) -> int:
    """mode 2 + a 4 + b 4 + correlation 4 bytes a row, and the references."""
    return 14 * n_rows + 4 * n_modes * n_snapshots
