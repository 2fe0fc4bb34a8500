"""A tensor that lies in a file as elements with strides: read without holding it."""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from typing import Any

import numpy as np

from cmdgpu.errors import CheckpointError
from cmdgpu.importing.contract import TensorInfo
from cmdgpu.importing.elements import numpy_type
from cmdgpu.importing.files import Source
from cmdgpu.importing.runs import boxes, extent
from cmdgpu.notation import AnyArray
from cmdgpu.store.durable import bytes_of


@dataclass(frozen=True, slots=True)
class Strided:
    """Element (i, j, ...) lies at byte ``offset + itemsize * (i * strides[0] + j * strides[1] + ...)``.

    Whoever makes one has checked that all of them lie in the file, with its size when it was opened.
    """

    source: Source
    info: TensorInfo
    offset: int
    strides: tuple[int, ...]
    swapped: bool = False
    """Big-endian."""

    def read(self, start: int, stop: int, out: AnyArray) -> None:
        """See ``Elements``.

        In C order the bytes go from the file into ``out``. Otherwise (channels last, a transposed view) the
        file is mapped and the elements are collected from its pages, which the kernel takes back when it
        needs them.
        """
        if start >= stop:
            return
        if is_c_order(self.info.shape, self.strides):
            size = numpy_type(self.info.dtype).itemsize
            self.source.read_into(self.offset + start * size, bytes_of(out))
            if self.swapped:
                out.byteswap(inplace=True)
        else:
            self._collect(start, stop, out)

    def _collect(self, start: int, stop: int, out: AnyArray) -> None:
        dtype = numpy_type(self.info.dtype)
        reach = sum((n - 1) * s for n, s in zip(self.info.shape, self.strides, strict=True)) + 1
        begin = self.offset - self.offset % mmap.ALLOCATIONGRANULARITY
        length = self.offset + reach * dtype.itemsize - begin
        with self.source.descriptor() as fd:
            try:
                mapped = mmap.mmap(fd, length, prot=mmap.PROT_READ, offset=begin)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"cannot be mapped: {error}", file=self.source.path) from error
        with mapped:
            self._copy(mapped, self.offset - begin, dtype, (start, stop), out)

    def _copy(
        self, mapped: mmap.mmap, offset: int, dtype: np.dtype[Any], span: tuple[int, int], out: AnyArray
    ) -> None:
        """In a function of its own: a mapping cannot be closed while an array looks at it."""
        view: AnyArray = np.ndarray(
            self.info.shape,
            dtype.newbyteorder(">") if self.swapped else dtype,
            buffer=mapped,
            offset=offset,
            strides=tuple(s * dtype.itemsize for s in self.strides),
        )
        done = 0
        for box in boxes(self.info.shape, *span):
            shape = extent(box)
            count = math.prod(shape)
            np.copyto(out[done : done + count].reshape(shape), view[box])
            done += count


def is_c_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the elements lie one after the other as C counts them; an axis of one has any stride."""
    expected = 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1 and stride != expected:
            return False
        expected *= n
    return True


def c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
