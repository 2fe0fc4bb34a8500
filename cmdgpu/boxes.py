"""What this process holds of a tensor: all of it, or the boxes of a sharded one."""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple, TypeAlias, cast

from torch import Tensor

from cmdgpu.errors import UnsupportedTensor

Box: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""(offset, size) along every axis."""


class LocalBox(NamedTuple):
    box: Box
    values: Tensor
    """The memory itself, of the box's size: what is written here is in the model."""


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor; that module takes a second to import, and a DTensor has imported it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_boxes(name: str, tensor: Tensor) -> list[LocalBox]:
    """Every box this process holds; empty ones are left out.

    Raises UnsupportedTensor for a tensor that is not one plain box here: partial sums, padded shards.
    """
    if not is_sharded(tensor):
        whole: Box = ((0,) * tensor.dim(), tuple(tensor.shape))
        return [LocalBox(whole, tensor.detach())] if tensor.numel() else []
    sharded = cast(Any, tensor.detach())
    local: Tensor = sharded.to_local()
    if not local.numel():
        return []
    try:
        chunks: list[Any] = sharded.__create_chunk_list__()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise _unsupported(name, sharded) from error
    boxes: list[Box] = [(tuple(map(int, c.offsets)), tuple(map(int, c.sizes))) for c in chunks]
    if len(boxes) != 1 or boxes[0][1] != tuple(local.shape) or not math.prod(boxes[0][1]):
        raise _unsupported(name, sharded)
    return [LocalBox(boxes[0], local)]


def _unsupported(name: str, tensor: Any) -> UnsupportedTensor:
    return UnsupportedTensor(
        f"is distributed as {tensor.placements}, which is not one box on each rank",
        tensor=name,
        hint="shard it along its axes (Shard, Replicate), or leave it out with exclude=",
    )
