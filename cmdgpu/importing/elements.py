"""Element types: as torch names them, as they lie in memory, and what of them one ``read`` fills."""

from __future__ import annotations

from typing import Any, Final, Protocol

import numpy as np

from cmdgpu.importing.contract import TensorInfo
from cmdgpu.notation import AnyArray

NUMPY: Final = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "float8_e4m3fn": np.dtype("u1"),
    "float8_e5m2": np.dtype("u1"),
    "float8_e4m3fnuz": np.dtype("u1"),
    "float8_e5m2fnuz": np.dtype("u1"),
    "float8_e8m0fnu": np.dtype("u1"),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("i1"),
    "uint64": np.dtype("<u8"),
    "uint32": np.dtype("<u4"),
    "uint16": np.dtype("<u2"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype("?"),
    "complex32": np.dtype("<u4"),
    "complex64": np.dtype("<c8"),
    "complex128": np.dtype("<c16"),
}
"""The type of ``out``: where numpy has none of that name, an unsigned integer holds the bits."""


def numpy_type(dtype: str) -> np.dtype[Any]:
    return NUMPY[dtype]


class Elements(Protocol):
    """The elements of one tensor, wherever they lie."""

    @property
    def info(self) -> TensorInfo: ...

    def read(self, start: int, stop: int, out: AnyArray) -> None:
        """Elements [start, stop) in C order into ``out`` (stop - start,), of type ``numpy_type(info.dtype)``.

        Safe from several threads at once. Raises CheckpointError naming the file.
        """
        ...
