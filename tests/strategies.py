"""Hypothesis strategies: layouts with all that a layout can hold, and indices of one axis."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import strategies as st

from cmdgpu.store.parameter_map import FLOAT_DTYPES, Kind, ParameterMap, Piece, TensorEntry

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@st.composite
def layouts(draw: st.DrawFn, max_tensors: int = 6) -> ParameterMap:
    """Parameters and buffers, empty, 0-dim and split tensors, holes between them, aliases, skipped names."""
    row = 0
    tensors: list[TensorEntry] = []
    holes: list[tuple[int, int]] = []
    for i in range(draw(st.integers(0, max_tensors))):
        shape = draw(SHAPES)
        pieces: list[Piece] = []
        for offset, size in draw(_boxes(shape)):
            if draw(st.booleans()) and draw(st.booleans()):
                holes.append((row, row + draw(st.integers(1, 7))))
                row = holes[-1][1]
            pieces.append(Piece(offset, size, row))
            row += math.prod(size)
        kind: Kind = draw(st.sampled_from(["parameter", "buffer"]))
        tensors.append(
            TensorEntry(f"t{i}.{kind}", kind, draw(st.sampled_from(FLOAT_DTYPES)), shape, tuple(pieces))
        )
    aliases = {f"alias{i}": t.name for i, t in enumerate(tensors) if draw(st.booleans())}
    skipped = (("counter", "int64 has no rows"),) if draw(st.booleans()) else ()
    return ParameterMap(tuple(tensors), aliases, tuple(holes), skipped)


@st.composite
def _boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The tensor as one box, or cut in two along an axis; none for an empty one."""
    if not math.prod(shape):
        return []
    origin: tuple[int, ...] = (0,) * len(shape)
    axes = [axis for axis, size in enumerate(shape) if size > 1]
    if not axes or draw(st.booleans()):
        return [(origin, shape)]
    axis = draw(st.sampled_from(axes))
    cut = draw(st.integers(1, shape[axis] - 1))
    low, high = list(shape), list(shape)
    low[axis], high[axis] = cut, shape[axis] - cut
    start = [0] * len(shape)
    start[axis] = cut
    return [(origin, tuple(low)), (tuple(start), tuple(high))]


def indices(size: int) -> st.SearchStrategy[Any]:
    """What NumPy takes on one axis of this size: slices, integers, lists, arrays, masks."""
    ends = st.none() | st.integers(-size - 3, size + 3)
    strides = st.none() | st.sampled_from([-3, -2, -1, 1, 2, 3, size + 1])
    inside = st.integers(-size, size - 1) if size else st.nothing()
    lists = st.lists(inside, max_size=6) if size else st.just([])
    return st.one_of(
        st.builds(slice, ends, ends, strides),
        *([inside, inside.map(np.int32)] if size else []),
        lists,
        lists.map(lambda found: np.array(found, dtype=np.int64)),
        st.lists(st.booleans(), min_size=size, max_size=size).map(lambda mask: np.array(mask, dtype=bool)),
    )
