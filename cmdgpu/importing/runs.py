"""A run of elements in C order as boxes: what a tensor's rows are, seen from its axes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeAlias

Box: TypeAlias = tuple[slice, ...]


def boxes(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Boxes of elements [start, stop), in order: at most one that is whole and two that are cut per axis.

    A box has single indices on its first axes, a range on the next and all of the others, so that it is a run
    of elements of any contiguous box it is cut with, too. shape () has one element.
    """
    if start >= stop:
        return
    if not shape:
        yield ()
        return
    inner = math.prod(shape[1:])
    everything = tuple(slice(0, n) for n in shape[1:])
    while start < stop:
        row, offset = divmod(start, inner)
        if offset or stop - start < inner:
            end = min(stop, (row + 1) * inner)
            for box in boxes(shape[1:], offset, end - row * inner):
                yield (slice(row, row + 1), *box)
            start = end
        else:
            rows = (stop - start) // inner
            yield (slice(row, row + rows), *everything)
            start += rows * inner


def extent(box: Box) -> tuple[int, ...]:
    return tuple(s.stop - s.start for s in box)
