"""The rows of one mode in a model: moved to another value of their reference, and nothing else touched."""

# torch leaves the types of many methods open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from cmdgpu.boxes import is_sharded
from cmdgpu.decomposition import CMD
from cmdgpu.errors import UsageError
from cmdgpu.models import named_tensors
from cmdgpu.notation import F32, I64
from cmdgpu.store.parameter_map import Piece
from cmdgpu.tensors import BLOCK_ROWS, torch_dtype


@dataclass(frozen=True)
class _Part:
    """Those of at most BLOCK_ROWS successive rows of a tensor that belong to the mode."""

    storage: Tensor
    """The memory of the tensor, flat: a view."""
    dtype: torch.dtype
    """Of the recorded tensor, which the model's need not have."""
    at: Tensor
    """(n,) places in it, int32 where they fit."""
    a: Tensor
    """(n,) float32, as ``b``"""
    b: Tensor


class ModeRows:
    """The rows of one mode in a model: 12 bytes for each, on the device of its tensor.

    So a value is set by one sum over them, without the result being read again.
    """

    def __init__(self, parts: Sequence[_Part]) -> None:
        self._parts = parts

    @torch.no_grad()
    def set(self, value: float) -> None:
        """w = a * value + b in float64, rounded as ``load_into`` rounds: the same bits at the same value."""
        for part in self._parts:
            w = part.a.double()
            w *= value
            w += part.b.double()
            rounded = w.float().to(part.dtype).to(part.storage.dtype)
            part.storage.index_copy_(0, part.at.long(), rounded)


def rows_of(cmd: CMD, model: nn.Module, modes: Sequence[int]) -> list[ModeRows]:
    """The rows of each of these modes in a model that fits the result, parameters alone.

    Read a block of rows at a time, a and b of blocks alone that have one. The model must have been loaded.
    Raises UsageError for a sharded model.
    """
    result = cmd.result
    targets = {name: tensor for name, _, tensor in named_tensors(model)}
    parts: list[list[_Part]] = [[] for _ in modes]
    for entry in result.frame.map:
        if entry.kind != "parameter":
            continue
        target = targets[entry.name]
        if is_sharded(target):
            raise UsageError(
                "the model is sharded, and a landscape moves rows of whole tensors",
                hint="give the model that one process holds",
            )
        for piece in entry.pieces:
            for start in range(piece.row, piece.stop, BLOCK_ROWS):
                rows = slice(start, min(start + BLOCK_ROWS, piece.stop))
                label = np.asarray(result.mode[rows])
                mine = [np.flatnonzero(label == mode) for mode in modes]
                if not any(map(len, mine)):
                    continue
                a, b = np.asarray(result.a[rows]), np.asarray(result.b[rows])
                for found, within in zip(parts, mine, strict=True):
                    if len(within):
                        at = _places(start - piece.row + within, piece, target)
                        found.append(_part(target, torch_dtype(entry), at, a[within], b[within]))
    return [ModeRows(found) for found in parts]


def _places(within: I64, piece: Piece, target: Tensor) -> I64:
    """(n,) where elements of a piece lie in the memory of the tensor, whatever its strides."""
    where = np.unravel_index(within, piece.size or (1,))
    strides = target.stride() or (1,)
    places = np.zeros(len(within), dtype=np.int64)
    for index, offset, stride in zip(where, piece.offset or (0,), strides, strict=True):
        places += (index + offset) * stride
    return places


def _part(target: Tensor, dtype: torch.dtype, at: I64, a: F32, b: F32) -> _Part:
    span = 1 + sum((size - 1) * stride for size, stride in zip(target.shape, target.stride(), strict=True))
    narrow = at.astype(np.int32) if span <= np.iinfo(np.int32).max else at
    at_, a_, b_ = (torch.from_numpy(array).to(target.device) for array in (narrow, a, b))
    return _Part(target.detach().as_strided((span,), (1,)), dtype, at_, a_, b_)
