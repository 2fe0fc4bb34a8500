"""One snapshot's rows in host memory: the copy off the device is all that training waits for."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cmdgpu.errors import CmdgpuWarning
from cmdgpu.notation import AnyArray
from cmdgpu.store import format as fmt


class Part(NamedTuple):
    """A tensor, or a piece of one, and where it goes."""

    name: str
    row: int
    """Of the column: its first element, in C order."""
    tensor: Tensor

    def of(self, column: Tensor) -> Tensor:
        return column[self.row : self.row + self.tensor.numel()].view(self.tensor.shape)


class HostColumn:
    """Memory for (n_rows,) elements of the stored type, taken once; rows of no tensor stay the fill value."""

    def __init__(self, n_rows: int, storage: fmt.Storage) -> None:
        self._n_rows = n_rows
        self._storage = storage
        self._column: Tensor | None = None
        self._warned: set[str] = set()

    def take(self, parts: Sequence[Part]) -> AnyArray:
        """Copy the tensors to their rows; the answer is good until the next call.

        Warns once of float64 that is rounded, and of every tensor with values beyond float16.
        """
        cards = {part.tensor.device for part in parts if part.tensor.is_cuda}
        column = self._memory(pinned=bool(cards))
        for part in parts:
            part.of(column).copy_(part.tensor.detach(), non_blocking=bool(cards))
            self._warn_of_rounding(part)
        for card in cards:  # a model may lie on several, and each has copies of its own under way
            torch.cuda.synchronize(card)
        if self._storage.name == "float16":
            self._warn_of_overflow(parts, column)
        return (column.view(torch.uint16) if self._storage.name == "bfloat16" else column).numpy()

    def _memory(self, pinned: bool) -> Tensor:
        if self._column is None:
            dtype: torch.dtype = getattr(torch, self._storage.name)
            self._column = torch.full((self._n_rows,), float("nan"), dtype=dtype, pin_memory=pinned)
        return self._column

    def _warn_of_rounding(self, part: Part) -> None:
        if part.tensor.dtype == torch.float64 and "float64" not in self._warned:
            self._warned.add("float64")
            warnings.warn(f"float64 tensors ('{part.name}' first) are rounded", CmdgpuWarning, stacklevel=4)

    def _warn_of_overflow(self, parts: Sequence[Part], column: Tensor) -> None:
        """A weight beyond 65504 becomes infinite in float16, and its row non-finite in every fit."""
        for part in parts:
            lost = torch.isinf(part.of(column)) & torch.isfinite(part.tensor.detach()).cpu()
            if part.name not in self._warned and bool(lost.any()):
                self._warned.add(part.name)
                warnings.warn(
                    f"'{part.name}' holds {int(lost.sum())} values beyond float16; they are stored as "
                    "infinite; record in bfloat16 or float32",
                    CmdgpuWarning,
                    stacklevel=4,
                )
