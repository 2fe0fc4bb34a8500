"""A folder of torch.distributed.checkpoint: one file of items, and ``.metadata`` that says where they lie.

torch's ``FileSystemWriter`` holds every tensor of a file until the file is complete. So the items are laid
out here, one at a time: a box of a tensor as ``torch.save`` writes it.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from cmdgpu.exporting.contract import Export, sources
from cmdgpu.exporting.folder import new_folder
from cmdgpu.store import durable
from cmdgpu.store.parameter_map import ParameterMap, Piece, TensorEntry
from cmdgpu.tensors import RowSource, Snapshot, read_elements, torch_dtype

if TYPE_CHECKING:
    from cmdgpu.exporting.dcp_catalogue import Catalogue

ITEM_BYTES: Final = 8 << 20
"""Elements of an item at most: who writes or loads the checkpoint holds a few items and no whole tensor."""

_DATA: Final = "__0_0.distcp"
_METADATA: Final = ".metadata"


def write(path: Path, parameter_map: ParameterMap, snapshot: Snapshot) -> Export:
    """Every tensor under every name; tied names point to the same items. Pieces of a tensor stay apart."""
    from cmdgpu.exporting.dcp_catalogue import Catalogue

    available, left_out = sources(parameter_map, snapshot)
    catalogue = Catalogue(_DATA)
    with new_folder(path) as folder:
        durable.write_file(folder, _DATA, _items(available, catalogue))
        for alias, name in parameter_map.aliases.items():
            catalogue.repeat(alias, name)
        metadata = catalogue.pickled()
        durable.write_file(folder, _METADATA, [metadata])
    return Export(path, "dcp", len(available), catalogue.end + len(metadata), left_out)


def _items(
    available: Sequence[tuple[TensorEntry, RowSource]], catalogue: Catalogue
) -> Iterator[durable.Buffer]:
    file = io.BytesIO()  # one for all items: new pages for each would take longer than its bytes
    for entry, source in available:
        for box in _boxes(entry):
            file.seek(0)
            torch.save(read_elements(entry, source, box.row, box.stop).view(box.size), file)
            n_bytes = file.tell()
            catalogue.add(entry, box, n_bytes)
            with file.getbuffer()[:n_bytes] as item:
                yield item


def _boxes(entry: TensorEntry) -> Iterator[Piece]:
    """The tensor as boxes of ITEM_BYTES at most, each a run of rows; an empty tensor is one empty box."""
    if not entry.n_rows:
        yield Piece((0,) * len(entry.shape), entry.shape, 0)
    for piece in entry.pieces:
        if piece.n_rows:
            yield from _cut(piece, max(ITEM_BYTES // torch_dtype(entry).itemsize, 1))


def _cut(piece: Piece, limit: int) -> Iterator[Piece]:
    """Along the first axis that has ``limit`` elements or fewer behind an index, at each index before it."""
    if piece.n_rows <= limit:
        yield piece
        return
    axis = next(k for k in range(len(piece.size)) if math.prod(piece.size[k + 1 :]) <= limit)
    behind = piece.size[axis + 1 :]
    height = limit // math.prod(behind)
    row = piece.row
    for before in np.ndindex(piece.size[:axis]):
        for low in range(0, piece.size[axis], height):
            size = (*(1,) * axis, min(height, piece.size[axis] - low), *behind)
            start = (*before, low, *(0,) * len(behind))
            box = Piece(tuple(o + s for o, s in zip(piece.offset, start, strict=True)), size, row)
            yield box
            row = box.stop
