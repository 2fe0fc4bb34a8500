"""Tensors <-> rows: which tensor, or piece of a tensor, lies in which rows of the trajectory.

A *piece* is an n-dimensional box of a tensor, laid out in C order from its first row. An ordinary tensor is
one piece, an empty one has none. Tied weights are recorded once; their other names are *aliases*. *Holes* are
row ranges that belong to no tensor. Names are labels: no path is ever built from one.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, Literal, NamedTuple, TypeAlias, cast

import numpy as np

from cmdgpu.errors import CmdgpuError, ModelMismatch, StoreCorrupt, UnsupportedTensor, UsageError, printable
from cmdgpu.notation import I64, BoolArray
from cmdgpu.store.places import Place
from cmdgpu.store.uncollected import uncollected

Kind: TypeAlias = Literal["parameter", "buffer"]

FLOAT_DTYPES: Final = ("float32", "float16", "bfloat16", "float64")
"""Element types of tensors that have rows. float64 is rounded to the store's type."""
MAX_AXES: Final = 64
"""Axes a tensor of PyTorch can have."""
_MAX_CUT_AXES: Final = 8
"""Axes along which a tensor may be cut: what shards one is cut along two or three."""
_SHOWN: Final = 3
"""Tensors that a map shows of itself: it may have 50,000."""


@dataclass(frozen=True)
class Piece:
    offset: tuple[int, ...]
    size: tuple[int, ...]
    row: int
    """First row of the piece."""

    @property
    def n_rows(self) -> int:
        return math.prod(self.size)

    @property
    def stop(self) -> int:
        return self.row + self.n_rows


@dataclass(frozen=True)
class TensorEntry:
    name: str
    kind: Kind
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def n_rows(self) -> int:
        return math.prod(self.shape)

    @property
    def signature(self) -> str:
        return f"{self.kind} {self.dtype} {list(self.shape)}"


class Segment(NamedTuple):
    """A run of consecutive rows of one tensor inside one unit."""

    tensor: int
    """Index into ``ParameterMap.tensors``."""
    start: int
    stop: int
    """Row numbers of the trajectory."""


@dataclass(frozen=True, repr=False)
class ParameterMap:
    """The layout of a trajectory. Iterates over its tensors, in row order of their first piece."""

    tensors: tuple[TensorEntry, ...]
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    """Other name -> recorded name, for tied weights."""
    holes: tuple[tuple[int, int], ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    """(name, reason) of what the model holds and the trajectory does not."""

    def __iter__(self) -> Iterator[TensorEntry]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        first = [f"{printable(t.name)} {list(t.shape)}" for t in self.tensors[:_SHOWN]]
        more = [f"{len(self) - _SHOWN} more"] if len(self) > _SHOWN else []
        listed = ", ".join(first + more)
        return f"ParameterMap({self.n_live} of {self.n_rows} rows in {len(self)} tensors: {listed})"

    def __getitem__(self, name: str) -> TensorEntry:
        return self.tensors[self._index[self.aliases.get(name, name)]]

    def __contains__(self, name: object) -> bool:
        return name in self._index or name in self.aliases

    @cached_property
    def _index(self) -> dict[str, int]:
        return {tensor.name: i for i, tensor in enumerate(self.tensors)}

    @cached_property
    def spans(self) -> tuple[tuple[int, int, int], ...]:
        """(start, stop, tensor index) of every piece, by row."""
        return tuple(
            sorted(
                (piece.row, piece.stop, i)
                for i, tensor in enumerate(self.tensors)
                for piece in tensor.pieces
                if piece.n_rows
            )
        )

    @cached_property
    def _starts(self) -> list[int]:
        return [start for start, _, _ in self.spans]

    @cached_property
    def _gaps(self) -> tuple[list[int], list[int]]:
        """Starts and stops of the holes, by row, in one piece where they touch."""
        gaps = _merged(self.holes)
        return [start for start, _ in gaps], [stop for _, stop in gaps]

    @cached_property
    def n_rows(self) -> int:
        """N: rows of the trajectory, holes included."""
        stops = [stop for _, stop, _ in self.spans] + [stop for _, stop in self.holes]
        return max(stops, default=0)

    @cached_property
    def n_live(self) -> int:
        """Rows that belong to a tensor: N without the holes."""
        return sum(stop - start for start, stop, _ in self.spans)

    def n_rows_of(self, kind: Kind) -> int:
        return self._rows_by_kind[kind]

    @cached_property
    def _rows_by_kind(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        for tensor in self.tensors:
            counts[tensor.kind] += tensor.n_rows
        return counts

    # ---- some of it ---------------------------------------------------------------------------------

    def only(self, names: Collection[str], reason: str = "not selected") -> ParameterMap:
        """The same rows with holes where all other tensors lie; those are ``skipped`` for that reason.

        ``names`` are recorded ones: an alias goes with its tensor, and is skipped with it too. The map
        itself when nothing is left out. Raises KeyError for a name that is not there.
        """
        kept = set(names)
        if strangers := kept.difference(self._index):
            raise KeyError(sorted(strangers)[0])
        if len(kept) == len(self):
            return self
        gone = [tensor for tensor in self.tensors if tensor.name not in kept]
        rows = ((piece.row, piece.stop) for tensor in gone for piece in tensor.pieces if piece.n_rows)
        others = (alias for alias, name in self.aliases.items() if name not in kept)
        return ParameterMap(
            tuple(tensor for tensor in self.tensors if tensor.name in kept),
            {alias: name for alias, name in self.aliases.items() if name in kept},
            tuple(_merged(itertools.chain(self.holes, rows))),
            (*self.skipped, *((name, reason) for name in (*(t.name for t in gone), *others))),
        )

    def without(self, kind: Kind) -> ParameterMap:
        """The same rows with holes where tensors of a kind lie."""
        return self.only([t.name for t in self.tensors if t.kind != kind], f"a {kind}, left out")

    def modules(self, depth: int = 1) -> list[str]:
        """The first ``depth`` components of the names, in row order: a model's networks, its layers.

        A tensor whose name has no more components than that stands for itself, so that every tensor is in
        exactly one: ``^name(\\.|$)`` finds the tensors of ``re.escape(name)``. Aliases do not count. Raises
        UsageError for a depth below 1.
        """
        if depth < 1:
            raise UsageError(f"modules at a depth of {depth}", hint="it is at least 1")
        return list(dict.fromkeys(".".join(t.name.split(".")[:depth]) for t in self.tensors))

    # ---- rows ---------------------------------------------------------------------------------------

    def segments(self, start: int, stop: int) -> list[Segment]:
        """The runs of tensors in rows [start, stop), by row; holes leave gaps."""
        return [Segment(i, max(low, start), min(high, stop)) for low, high, i in self._spans_in(start, stop)]

    def _spans_in(self, start: int, stop: int) -> Sequence[tuple[int, int, int]]:
        """The spans that have a row in [start, stop)."""
        if start >= stop:
            return ()
        last = bisect.bisect_left(self._starts, stop)
        first = bisect.bisect_right(self._starts, start) - 1
        if first < 0 or self.spans[first][1] <= start:
            first += 1
        return self.spans[first:last]

    def holes_in(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The parts of rows [start, stop) that belong to no tensor, by row, as [start, stop) each."""
        if start >= stop:
            return []
        starts, stops = self._gaps
        first, last = bisect.bisect_right(stops, start), bisect.bisect_left(starts, stop)
        return [(max(starts[i], start), min(stops[i], stop)) for i in range(first, last)]

    def are_live(self, rows: I64) -> BoolArray:
        """(len(rows),) whether a row belongs to a tensor."""
        starts, stops = (np.array(ends, dtype=np.int64) for ends in self._gaps)
        return np.searchsorted(starts, rows, side="right") == np.searchsorted(stops, rows, side="right")

    def name_rows(self, start: int, stop: int) -> str:
        """``layer1.weight +3``: the first tensor in those rows and how many more there are."""
        found = list(dict.fromkeys(i for _, _, i in self._spans_in(start, stop)))
        if not found:
            return "no tensor"
        first = printable(self.tensors[found[0]].name)
        return first if len(found) == 1 else f"{first} +{len(found) - 1}"

    def locate(self, row: int) -> str:
        """``layer1.weight[3, 0, 1]``: the scalar parameter behind a row."""
        tensor, index = self.place_of(row)
        return f"{printable(tensor.name)}{list(index) if index else ''}"

    def place_of(self, row: int) -> tuple[TensorEntry, tuple[int, ...]]:
        """The tensor that a row belongs to, and the index of its element. Raises CmdgpuError for a hole."""
        for start, _, i in self._spans_in(row, row + 1):
            tensor = self.tensors[i]
            piece = next(p for p in tensor.pieces if p.row == start and p.n_rows)
            index: list[int] = []
            rest = row - piece.row
            for size in reversed(piece.size):
                rest, at = divmod(rest, size)
                index.append(at)
            return tensor, tuple(at + off for at, off in zip(reversed(index), piece.offset, strict=True))
        raise CmdgpuError(f"row {row} belongs to no tensor")

    # ---- as JSON ------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        return {
            "rows": self.n_rows,
            "tensors": [
                {
                    "name": t.name,
                    "kind": t.kind,
                    "dtype": t.dtype,
                    "shape": list(t.shape),
                    "pieces": [
                        {"offset": list(p.offset), "size": list(p.size), "row": p.row} for p in t.pieces
                    ],
                }
                for t in self.tensors
            ],
            "aliases": dict(self.aliases),
            "holes": [list(hole) for hole in self.holes],
            "skipped": [{"name": name, "reason": reason} for name, reason in self.skipped],
        }

    @staticmethod
    def from_json(layout: object, path: Place) -> ParameterMap:
        """Read a layout back, refusing one whose rows are not covered exactly once."""
        try:
            fields = cast(dict[str, Any], layout)
            with uncollected():
                parsed = ParameterMap(
                    tensors=tuple(_tensor(entry) for entry in fields["tensors"]),
                    aliases={_text(k): _text(v) for k, v in fields["aliases"].items()},
                    holes=tuple((_count(a), _count(b)) for a, b in fields["holes"]),
                    skipped=tuple((_text(s["name"]), _line(s["reason"])) for s in fields["skipped"]),
                )
            rows = _count(fields["rows"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreCorrupt(
                f"its layout cannot be read: {printable(str(error), 240)}", file=path
            ) from error
        if problem := parsed._problem(rows):
            raise StoreCorrupt(f"its layout is inconsistent: {problem}", file=path)
        return parsed

    def _problem(self, rows: int) -> str | None:
        names = [t.name for t in self.tensors] + list(self.aliases)
        if len(set(names)) != len(names):
            return "a name appears twice"
        if missing := [name for name in self.aliases.values() if name not in self._index]:
            return f"alias of {printable(missing[0])}, which is not there"
        for tensor in self.tensors:
            if sum(piece.n_rows for piece in tensor.pieces) != tensor.n_rows:
                return f"the pieces of {printable(tensor.name)} are not the tensor"
            if not tile(tensor.pieces, tensor.shape):
                return f"the pieces of {printable(tensor.name)} overlap, or lie outside of it"
        reached = 0
        for start, stop in sorted([(a, b) for a, b, _ in self.spans] + list(self.holes)):
            if start != reached or stop < start:
                return f"rows {reached} to {start} are covered twice or not at all"
            reached = stop
        return None if reached == rows else f"{reached} rows are covered, {rows} declared"

    # ---- against another one ------------------------------------------------------------------------

    def require(self, model: ParameterMap, path: Place | str) -> None:
        """Raise ModelMismatch, naming the first tensor on which this map and ``model`` disagree."""
        hint = "give the model that was recorded here, or another path"
        for mine, other in zip(self.tensors, model.tensors, strict=False):
            if mine.name != other.name:
                raise ModelMismatch(
                    f"the store has it where the model has '{printable(other.name)}'",
                    file=path,
                    tensor=mine.name,
                    hint=hint,
                )
            if mine.signature != other.signature:
                raise ModelMismatch(
                    f"the store holds {mine.signature}, the model {other.signature}",
                    file=path,
                    tensor=mine.name,
                    hint=hint,
                )
        if len(self) != len(model):
            short, long, which = (self, model, "store") if len(self) < len(model) else (model, self, "model")
            raise ModelMismatch(
                f"the {which} lacks it", file=path, tensor=long.tensors[len(short)].name, hint=hint
            )
        if dict(self.aliases) != dict(model.aliases):
            name = sorted(set(self.aliases.items()) ^ set(model.aliases.items()))[0][0]
            raise ModelMismatch("tied in one and not in the other", file=path, tensor=name, hint=hint)

    def require_whole(self, path: Place | str) -> None:
        """Raise UnsupportedTensor, naming the first tensor that lies in shards: for who writes whole ones."""
        for entry in self.tensors:
            if len(entry.pieces) > 1 or any(piece.size != entry.shape for piece in entry.pieces):
                raise UnsupportedTensor(
                    "is stored in shards, and whole tensors cannot follow",
                    file=path,
                    tensor=entry.name,
                    hint="take another path",
                )


def whole(names: Sequence[tuple[str, Kind, str, tuple[int, ...]]]) -> tuple[TensorEntry, ...]:
    """Unsharded tensors, one after the other: each is a single piece, an empty one has none."""
    entries: list[TensorEntry] = []
    row = 0
    for name, kind, dtype, shape in names:
        n = math.prod(shape)
        pieces = (Piece((0,) * len(shape), shape, row),) if n else ()
        entries.append(TensorEntry(name, kind, dtype, shape, pieces))
        row += n
    return tuple(entries)


def _merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Row ranges by row: one where they touch, none where they are empty."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if merged and start == merged[-1][1]:
            merged[-1] = (merged[-1][0], stop)
        elif start < stop:
            merged.append((start, stop))
    return merged


def tile(pieces: Sequence[Piece], shape: tuple[int, ...]) -> bool:
    """Whether the boxes cover a tensor of that shape, every element once.

    Only then do their corners, signed as in the mixed derivative of what they cover, leave those of the
    tensor alone: linear in the number of pieces. Axes that no piece is cut along do not matter.
    """
    if len(pieces) == 1 and pieces[0].size == shape and not any(pieces[0].offset):
        return True  # as almost every tensor is: its corners would cost more than all the rest of a layout
    boxes = [(p.offset, p.size) for p in pieces if p.n_rows]
    origin = (0,) * len(shape)
    cut = [k for k in range(len(shape)) if any(o[k] or s[k] != shape[k] for o, s in boxes)]
    if not boxes or len(cut) > _MAX_CUT_AXES:
        return not boxes and math.prod(shape) == 0
    corners: Counter[tuple[int, ...]] = Counter()
    for sign, offset, size in [(1, *box) for box in boxes] + [(-1, origin, shape)]:
        for far in itertools.product((0, 1), repeat=len(cut)):
            corner = tuple(offset[k] + far[i] * size[k] for i, k in enumerate(cut))
            corners[corner] += -sign if sum(far) % 2 else sign
    return not any(corners.values())


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(f"{printable(repr(value))} is no count")
    return value


def _counts(values: Iterable[object]) -> tuple[int, ...]:
    return tuple([_count(value) for value in values])


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{printable(repr(value))} is no text")
    value.encode()  # half a surrogate is a ValueError: no other format can hold such a name
    return value


def _line(value: object) -> str:
    """A text of ours, unlike a name: nothing a terminal would act on."""
    text = _text(value)
    if not text.isprintable() or len(text) > 240:
        raise ValueError("a reason that is no line")
    return text


def _tensor(entry: dict[str, Any]) -> TensorEntry:
    kind, dtype = _text(entry["kind"]), _text(entry["dtype"])
    if kind not in ("parameter", "buffer") or dtype not in FLOAT_DTYPES:
        raise ValueError(f"a {printable(kind)} of {printable(dtype)}")
    shape = _counts(entry["shape"])
    if len(shape) > MAX_AXES or math.prod([n or 1 for n in shape]) >= 1 << 62:
        raise ValueError(f"no tensor has the {len(shape)} axes {printable(repr(shape))}")
    pieces: list[Piece] = []
    for p in entry["pieces"]:
        piece = Piece(_counts(p["offset"]), _counts(p["size"]), _count(p["row"]))
        if not len(piece.offset) == len(piece.size) == len(shape):
            raise ValueError(f"a piece of {printable(_text(entry['name']))} has another number of dimensions")
        pieces.append(piece)
    return TensorEntry(_text(entry["name"]), kind, dtype, shape, tuple(pieces))
