"""Results on disk, read: finding them, opening them, describing them, their rows unit by unit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

import numpy as np

from cmdgpu.errors import CmdgpuError, NotAStore
from cmdgpu.indexing import Index, positions
from cmdgpu.notation import AnyArray
from cmdgpu.results.contract import Frame, ModeSet, Result
from cmdgpu.results.head import read_head
from cmdgpu.results.ledger import DONE, UNIT_ARRAYS, Ledger, plan_digest
from cmdgpu.results.modes import read_modes
from cmdgpu.store import durable
from cmdgpu.store import format as fmt
from cmdgpu.store.commit import require_store


def partial_path(out: Path, fingerprint: str) -> Path:
    return out.parent / f"{out.name}.{fingerprint[:16]}{durable.PARTIAL}"


def partials_of(out: Path) -> list[Path]:
    """Unfinished fits that would become ``out``."""
    pattern = re.compile(re.escape(out.name) + r"\.[0-9a-f]{16}\.partial")
    if not out.parent.is_dir():
        return []
    return sorted(
        path for path in durable.entries(out.parent) if pattern.fullmatch(path.name) and path.is_dir()
    )


def require_result(out: Path) -> None:
    """Refuse a path where no result is; a fit that has not finished is named with how far it is."""
    if not out.exists():
        for partial in partials_of(out):
            done, total = progress_of(partial)
            raise CmdgpuError(
                f"this fit is not finished: {done} of {total} units done",
                file=out,
                hint="run the same `cmdgpu fit` again, it goes on where it stopped",
            )
    require_store(out)


def progress_of(partial: Path) -> tuple[int, int]:
    """(units done, units in all) of an unfinished fit."""
    _, _, frame = read_head(partial)
    done = sum(fnmatch(file.name, "c.*.0") for file in durable.entries(partial / DONE))
    return done, frame.n_units


def open_parts(path: Path) -> tuple[Ledger, ModeSet, dict[str, Any]]:
    require_result(path)
    _, head, frame = read_head(path)
    modes = read_modes(path, head, frame.n_rows)
    ledger = Ledger(path, frame, modes.n_modes, head["fingerprint"], plan_digest(head))
    return ledger, modes, head


def open_result(path: Path) -> Result:
    """A complete result on disk. Raises NotAStore, StoreCorrupt, and CmdgpuError for an unfinished one."""
    ledger, modes, head = open_parts(path)
    if head["status"] != "complete":
        done, total = progress_of(path)
        raise CmdgpuError(
            f"this fit is not finished: {done} of {total} units done",
            file=path,
            hint="run the same `cmdgpu fit` again, it goes on where it stopped",
        )
    return Result(
        frame=ledger.frame,
        modes=modes,
        mode=StoredRows(ledger, "mode"),
        a=StoredRows(ledger, "a"),
        b=StoredRows(ledger, "b"),
        correlation=StoredRows(ledger, "correlation"),
        totals=ledger.totals(modes.n_modes),
        provenance={part: head[part] for part in ("source", "config", "code", "origin")},
        n_bytes=_stored_bytes(path),
        path=path,
    )


def _stored_bytes(path: Path) -> int:
    """Of all files of a result: the group document and those of its arrays."""
    here = durable.entries(path)
    files = [*here, *(file for array in here if array.is_dir() for file in durable.entries(array))]
    return sum(file.lstat().st_size for file in files if file.is_file())


class StoredRows:
    """One of mode, a, b, correlation on disk: (N,), read unit by unit, checked, the last unit kept."""

    def __init__(self, ledger: Ledger, name: str) -> None:
        self._ledger = ledger
        self._name = name
        self._kept: tuple[int, AnyArray] | None = None

    @property
    def shape(self) -> tuple[int]:
        return (self._ledger.frame.n_rows,)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(fmt.RESULT_ROWS[self._name][0])

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"StoredRows({self._name}, {self.shape[0]} rows, {self.dtype})"

    def _unit(self, unit: int) -> AnyArray:
        if self._kept is None or self._kept[0] != unit:
            kept = self._ledger.crcs(unit)[UNIT_ARRAYS.index(self._name)]
            self._kept = (unit, self._ledger.read(self._name, unit, kept))
        return self._kept[1]

    def _range(self, start: int, stop: int) -> AnyArray:
        out = np.empty(stop - start, dtype=self.dtype)
        rows = self._ledger.frame.rows
        for unit in range(start // rows, -(-stop // rows)):
            low, high = max(start, unit * rows), min(stop, (unit + 1) * rows)
            out[low - start : high - start] = self._unit(unit)[low - unit * rows : high - unit * rows]
        return out

    def __getitem__(self, index: Any, /) -> Any:
        """NumPy's semantics; only the units that are touched are read."""
        if isinstance(index, slice):
            start, stop, stride = cast(slice, index).indices(len(self))
            if stride == 1:
                return self._range(start, max(stop, start))
        wanted, single = positions(cast(Index, index), len(self))
        rows = self._ledger.frame.rows
        out = np.empty(wanted.shape, dtype=self.dtype)
        for unit in np.unique(wanted // rows).tolist():
            here = wanted // rows == unit
            out[here] = self._unit(unit)[wanted[here] - unit * rows]
        return out[0] if single else out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> AnyArray:
        if copy is False:
            raise ValueError("rows on disk cannot be had without a copy")
        whole = self._range(0, len(self))
        return whole if dtype is None else whole.astype(dtype)


def kind_of(path: Path) -> str:
    """ "trajectory" or "result", told by the group document. Raises UsageError, NotAStore, StoreCorrupt."""
    require_result(path)
    document = fmt.parse(fmt.read_bytes(path / fmt.DOCUMENT), path / fmt.DOCUMENT)
    attributes = document.get("attributes")
    mine = cast(Any, attributes).get("cmdgpu") if isinstance(attributes, dict) else None
    kind = cast(Any, mine).get("kind") if isinstance(mine, dict) else None
    if kind not in ("trajectory", "result"):
        raise NotAStore("is no store of cmdgpu", file=path, hint="expected a folder made by Recorder or fit")
    return str(kind)


@dataclass(frozen=True)
class Description:
    """What a result says of itself, finished or not, without reading its rows."""

    status: str
    frame: Frame
    n_modes: int
    units_done: int
    fingerprint: str
    config: Mapping[str, Any]
    source: Mapping[str, Any]
    metrics: Mapping[str, Any] | None


def describe_result(path: Path) -> Description:
    ledger, modes, head = open_parts(path)
    return Description(
        status=head["status"],
        frame=ledger.frame,
        n_modes=modes.n_modes,
        units_done=progress_of(path)[0],
        fingerprint=head["fingerprint"],
        config=head["config"],
        source={key: value for key, value in head["source"].items() if key != "steps"},
        metrics=head.get("metrics"),
    )
