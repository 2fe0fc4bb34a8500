"""Groups of rows that share a filter: the network, a layer, a tensor, a node."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal, NamedTuple, TypeAlias

import numpy as np

from cmdgpu.errors import UsageError
from cmdgpu.notation import I64
from cmdgpu.store.parameter_map import ParameterMap, TensorEntry

By: TypeAlias = Literal["network", "layer", "tensor", "node"]
KINDS: Final[tuple[By, ...]] = ("network", "layer", "tensor", "node")
RUN_BYTES: Final = 24
"""What one run of rows takes in memory."""


class Run(NamedTuple):
    """Consecutive rows of one group."""

    group: int
    start: int
    stop: int


@dataclass(frozen=True)
class Bundle:
    """Tensors whose rows make one group, or one group for every index of their first axis."""

    name: str
    tensors: tuple[TensorEntry, ...]
    nodes: int | None = None

    @property
    def n_groups(self) -> int:
        return 1 if self.nodes is None else self.nodes

    @property
    def n_runs(self) -> int:
        pieces = [piece for tensor in self.tensors for piece in tensor.pieces]
        return len(pieces) if self.nodes is None else sum(piece.size[0] for piece in pieces)


@dataclass(frozen=True)
class Grouping:
    """Every row of a parameter is in exactly one group; buffers and holes are in none.

    network  one group
    layer    the tensors of one module, which is a name without its last component
    tensor   one tensor
    node     what a unit of a module receives: ``weight[o, ...]`` and ``bias[o]``. Tensors of a module with as
             many indices on their first axis go together when one of them has a second axis; the others, as
             in a norm layer, are one group
    """

    by: By
    bundles: tuple[Bundle, ...]

    @staticmethod
    def of(parameter_map: ParameterMap, by: By) -> Grouping:
        """Raises UsageError for another kind of group."""
        if by not in KINDS:
            raise UsageError(f"groups cannot be {by!r}", hint=f"have: {', '.join(KINDS)}")
        tensors = [t for t in parameter_map if t.kind == "parameter" and t.n_rows]
        if by == "network":
            return Grouping(by, (Bundle("the network", tuple(tensors)),) if tensors else ())
        if by == "tensor":
            return Grouping(by, tuple(Bundle(t.name, (t,)) for t in tensors))
        modules: dict[str, list[TensorEntry]] = {}
        for tensor in tensors:
            modules.setdefault(_module(tensor), []).append(tensor)
        if by == "layer":
            return Grouping(by, tuple(Bundle(name, tuple(mine)) for name, mine in modules.items()))
        nodes = (_nodes(name, mine) for name, mine in modules.items())
        return Grouping(by, tuple(itertools.chain.from_iterable(nodes)))

    @property
    def n_groups(self) -> int:
        return sum(bundle.n_groups for bundle in self.bundles)

    @property
    def n_bytes(self) -> int:
        """Memory of the runs, four times over while they are made."""
        return 4 * RUN_BYTES * sum(bundle.n_runs for bundle in self.bundles)

    def name(self, group: int) -> str:
        """``layer1.conv[3]``, as a person says it; not yet printable."""
        for bundle in self.bundles:
            if group < bundle.n_groups:
                return bundle.name if bundle.nodes is None else f"{bundle.name}[{group}]"
            group -= bundle.n_groups
        raise IndexError(group)

    # ---- its rows -----------------------------------------------------------------------------------

    @cached_property
    def runs(self) -> tuple[I64, I64, I64]:
        """(group, start, stop) of every run, by row; runs of one group that touch are one."""
        parts: list[I64] = []
        first = 0
        for bundle in self.bundles:
            for piece in (piece for tensor in bundle.tensors for piece in tensor.pieces):
                if bundle.nodes is None:
                    parts.append(np.array([[first, piece.row, piece.stop]], dtype=np.int64))
                    continue
                index = np.arange(piece.size[0], dtype=np.int64)
                width = math.prod(piece.size[1:])
                start = piece.row + index * width
                parts.append(np.stack([first + piece.offset[0] + index, start, start + width], axis=1))
            first += bundle.n_groups
        runs = np.concatenate([np.empty((0, 3), dtype=np.int64), *parts])
        runs = runs[np.argsort(runs[:, 1], kind="stable")]
        begins = np.ones(len(runs), dtype=bool)
        begins[1:] = (runs[1:, 0] != runs[:-1, 0]) | (runs[1:, 1] != runs[:-1, 2])
        ends = np.append(np.flatnonzero(begins)[1:], len(runs)) - 1 if len(runs) else np.empty(0, np.int64)
        return runs[begins, 0], runs[begins, 1], runs[ends, 2]

    def runs_in(self, start: int, stop: int) -> list[Run]:
        """The runs in rows [start, stop), cut at its ends, by row."""
        group, low, high = self.runs
        first, last = np.searchsorted(high, start, side="right"), np.searchsorted(low, stop, side="left")
        here = slice(int(first), int(last))
        clipped = zip(
            group[here].tolist(),
            np.maximum(low[here], start).tolist(),
            np.minimum(high[here], stop).tolist(),
            strict=True,
        )
        return [Run(*run) for run in clipped]

    def n_rows(self) -> I64:
        """(G,) rows of every group."""
        group, start, stop = self.runs
        rows = np.zeros(self.n_groups, dtype=np.int64)
        np.add.at(rows, group, stop - start)
        return rows


def _module(tensor: TensorEntry) -> str:
    return tensor.name.rpartition(".")[0] or tensor.name


def _nodes(module: str, tensors: Sequence[TensorEntry]) -> list[Bundle]:
    """The nodes of a module, and what of it belongs to no node."""
    cut = list(dict.fromkeys(t.shape[0] for t in tensors if len(t.shape) > 1))
    bundles = [
        Bundle(module, tuple(t for t in tensors if t.shape and t.shape[0] == nodes), nodes) for nodes in cut
    ]
    rest = tuple(t for t in tensors if not t.shape or t.shape[0] not in cut)
    return [*bundles, Bundle(module, rest)] if rest else bundles
