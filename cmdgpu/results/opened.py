"""Results on disk, read: finding them, opening them, describing them, their rows unit by unit."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np

from cmdgpu.errors import CmdgpuError, NotAStore
from cmdgpu.indexing import Index, positions
from cmdgpu.notation import AnyArray
from cmdgpu.results.contract import Frame, ModeSet, Result
from cmdgpu.results.head import read_head
from cmdgpu.results.ledger import UNIT_ARRAYS, Ledger, n_begun, plan_digest, unit_documents
from cmdgpu.results.modes import mode_documents, read_modes
from cmdgpu.statistics import Totals
from cmdgpu.store import durable, remote
from cmdgpu.store import format as fmt
from cmdgpu.store.ahead import in_order
from cmdgpu.store.chunks import announce
from cmdgpu.store.commit import require_store
from cmdgpu.store.places import Place, RemotePath

_PROVENANCE: Final = ("source", "config", "code", "origin", "params")


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


def require_result(out: Place) -> None:
    """Refuse a path where no result is; a fit that has not finished is named with how far it is."""
    if not isinstance(out, RemotePath) and not out.exists():
        for partial in partials_of(out):
            done, total = progress_of(partial)
            raise CmdgpuError(
                f"this fit is not finished: {done} of {total} units done",
                file=out,
                hint="run the same `cmdgpu fit` again, it goes on where it stopped",
            )
    require_store(out)


def progress_of(partial: Place) -> tuple[int, int]:
    """(units done, units in all) of an unfinished fit."""
    _, _, frame = read_head(partial)
    return n_begun(partial), len(frame.live_units)


def open_parts(path: Place, *, keeps: bool = False) -> tuple[Ledger, ModeSet, dict[str, Any]]:
    require_result(path)
    _, head, frame = read_head(path)
    modes = read_modes(path, head, frame.n_rows)
    ledger = Ledger(path, frame, modes.n_modes, head["fingerprint"], plan_digest(head), keeps=keeps)
    return ledger, modes, head


def open_result(path: Place) -> Result:
    """A complete result on disk. Raises NotAStore, StoreCorrupt, and CmdgpuError for an unfinished one."""
    ledger, modes, head = open_parts(path, keeps=True)
    if head["status"] != "complete":
        raise CmdgpuError(
            f"this fit is not finished: {n_begun(path)} of {len(ledger.frame.live_units)} units done",
            file=path,
            hint="run the same `cmdgpu fit` again, it goes on where it stopped",
        )
    return result_of(ledger, modes, head, ledger.totals(modes.n_modes))


def result_of(ledger: Ledger, modes: ModeSet, head: Mapping[str, Any], totals: Totals) -> Result:
    """A complete result whose parts are at hand."""
    return Result(
        frame=ledger.frame,
        modes=modes,
        mode=StoredRows(ledger, "mode"),
        a=StoredRows(ledger, "a"),
        b=StoredRows(ledger, "b"),
        correlation=StoredRows(ledger, "correlation"),
        totals=totals,
        provenance={part: head[part] for part in _PROVENANCE if part in head},
        n_bytes=_stored_bytes(ledger, modes, head),
        path=ledger.path,
        refinement=tuple(head.get("refinement", ())),
    )


def _stored_bytes(ledger: Ledger, modes: ModeSet, head: Mapping[str, Any]) -> int:
    """Of all files of a complete result: what was written has one size, and a server need not list."""
    documents = [*mode_documents(modes).values(), *unit_documents(ledger.frame, modes.n_modes).values()]
    documents.append({"zarr_format": 3, "node_type": "group", "attributes": {"cmdgpu": dict(head)}})
    sizes = [math.prod(array.shape) * array.dtype.itemsize for array in vars(modes).values()]
    small = sum(size + fmt.CRC_BYTES for size in sizes if size)
    units = sum(map(ledger.unit_bytes, ledger.frame.live_units))
    return sum(len(fmt.spell(document)) for document in documents) + small + units


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
        """The rows of a unit; where no tensor has one, nothing was written, and they are the fill value."""
        last = self._kept
        if last is None or last[0] != unit:
            last = (unit, self._read(unit))
            self._kept = last
        return last[1]

    def _read(self, unit: int) -> AnyArray:
        if not self._ledger.frame.is_live(unit):
            return self._ledger.empty(self._name)
        kept = self._ledger.crcs(unit)[UNIT_ARRAYS.index(self._name)]
        return self._ledger.read(self._name, unit, kept)

    def announce(self, unit: int) -> None:
        """A unit is read soon: the disk may begin."""
        announce(self._ledger.file(self._name, unit))

    def _range(self, start: int, stop: int) -> AnyArray:
        rows = self._ledger.frame.rows
        if start < stop and (start, stop) == self._ledger.frame.unit(start // rows):
            return self._read(start // rows)[: stop - start]  # a whole unit: as it came, and not kept
        out = np.empty(stop - start, dtype=self.dtype)

        def fill(unit: int) -> None:
            low, high = max(start, unit * rows), min(stop, (unit + 1) * rows)
            out[low - start : high - start] = self._unit(unit)[low - unit * rows : high - unit * rows]

        units = range(start // rows, -(-stop // rows))
        is_remote = isinstance(self._ledger.path, RemotePath)
        for _ in in_order(fill, units, remote.READS_IN_FLIGHT) if is_remote else map(fill, units):
            pass
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


def kind_of(path: Place) -> str:
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
    params: tuple[str, ...]
    """What chose the tensors; empty for a fit of all."""
    metrics: Mapping[str, Any] | None
    refinement: tuple[float, ...]
    """The objective before and after every finished round."""

    @property
    def rounds(self) -> int:
        """Rounds of refinement at most; 0 for a fit without."""
        return int(self.config.get("refine", 0))


def describe_result(path: Place) -> Description:
    ledger, modes, head = open_parts(path)
    return Description(
        status=head["status"],
        frame=ledger.frame,
        n_modes=modes.n_modes,
        units_done=len(ledger.frame.live_units) if head["status"] == "complete" else n_begun(path),
        fingerprint=head["fingerprint"],
        config=head["config"],
        source={key: value for key, value in head["source"].items() if key != "steps"},
        params=tuple(head.get("params", ())),
        metrics=head.get("metrics"),
        refinement=tuple(head.get("refinement", ())),
    )
