"""``.npz``: a zip of arrays. Pickled objects are never read, compressed arrays inflated piece by piece."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any, Final, cast

import numpy as np

from cmdgpu.errors import CheckpointError, printable
from cmdgpu.importing.contract import Checkpoint, TensorInfo
from cmdgpu.importing.elements import NUMPY, Elements, numpy_type
from cmdgpu.importing.files import Source
from cmdgpu.importing.inflating import READ_BYTES, Inflated, Member, Shelf
from cmdgpu.importing.opened import Opened
from cmdgpu.importing.strided import Strided, c_strides
from cmdgpu.importing.torch_archive import checksums_of
from cmdgpu.importing.zip_records import MAGIC, Record, first_name, read_records

NAME: Final = "npz"

_SUFFIX: Final = ".npy"
_MAGIC: Final = b"\x93NUMPY"
_MAX_HEADER_BYTES: Final = 1 << 16
_STEPS: Final = ("global_step", "step", "iteration", "epoch")
_NAMES: Final = {
    dtype.str[1:]: name for name, dtype in NUMPY.items() if not name.startswith(("bf", "float8", "complex32"))
}


class Npz:
    def claims(self, path: Path) -> bool:
        if not path.is_file():
            return False
        source = Source(path)
        head = source.read(0, min(source.size, 1024))
        return head.startswith(MAGIC) and (first_name(head) or "").endswith(_SUFFIX)

    def open(self, path: Path) -> Checkpoint:
        """Raises CheckpointError for members that are no arrays, or no whole ones."""
        source = Source(path)
        records, shelf = read_records(source), Shelf()
        elements: dict[str, Elements] = {}
        skipped: list[tuple[str, str]] = []
        for record in records.values():
            name = record.name.removesuffix(_SUFFIX)
            if name == record.name:
                skipped.append((name, "no array"))
                continue
            found = _elements(source, record, shelf)
            if isinstance(found, str):
                skipped.append((name, found))
            else:
                elements[name] = found
        return Opened(
            path,
            NAME,
            (path,),
            elements,
            {},
            tuple(skipped),
            _step(elements),
            0 if not any(record.deflated for record in records.values()) else READ_BYTES,
            {path: checksums_of(records)},
        )


def _elements(source: Source, record: Record, shelf: Shelf) -> Elements | str:
    """The array that a member holds, or why it is none of ours."""
    member = Member(source, record)
    length, (descr, is_fortran, shape) = _header(member)
    try:
        dtype = np.dtype(descr)
    except (TypeError, ValueError, SyntaxError):
        return "an array of a type of its own"
    if dtype.hasobject:
        return "pickled objects, which are never read"
    if dtype.str[1:] not in _NAMES or dtype.shape:
        return f"an array of {printable(str(dtype))}"
    info = TensorInfo(_NAMES[dtype.str[1:]], shape)
    if length + math.prod(shape) * dtype.itemsize != record.size:
        found = (
            f"{printable(record.name)!r} holds {record.size} bytes, which a {dtype} of {list(shape)} does not"
        )
        raise CheckpointError(found, file=source.path)
    strides = c_strides(shape[::-1])[::-1] if is_fortran else c_strides(shape)
    swapped = dtype.byteorder == ">"
    if not record.deflated:
        return Strided(source, info, record.start + length, strides, swapped)
    if strides != c_strides(shape) and math.prod(shape) > 1:
        return "compressed in Fortran order; save it with np.savez"
    return Inflated(shelf, member, info, length, swapped=swapped)


def _header(member: Member) -> tuple[int, tuple[Any, bool, tuple[int, ...]]]:
    """(bytes before the elements, (type, whether in Fortran order, shape)) of an array"""
    head = member.first(12)
    wide = head[6:7] in (b"\x02", b"\x03")
    begin = 12 if wide else 10
    length = int.from_bytes(head[8:begin], "little")
    if head[:6] != _MAGIC or head[6] not in (1, 2, 3) or length > _MAX_HEADER_BYTES:
        raise member.refuse("does not begin as an array does")
    try:
        found = ast.literal_eval(member.first(begin + length)[begin:].decode("utf-8").strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise member.refuse("has a header that is none") from error
    entry = cast(dict[str, Any], found) if isinstance(found, dict) else {}
    shape = entry.get("shape")
    if entry.keys() != {"descr", "fortran_order", "shape"} or type(shape) is not tuple:
        raise member.refuse("has a header that is none")
    sizes = cast(tuple[Any, ...], shape)
    if len(sizes) > 64 or not all(type(n) is int and n >= 0 for n in sizes):
        raise member.refuse("has a shape that is none")
    if math.prod(max(n, 1) for n in sizes) >= 1 << 62:
        raise member.refuse("has a shape beyond all reason")
    return begin + length, (entry["descr"], bool(entry["fortran_order"]), sizes)


def _step(elements: dict[str, Elements]) -> int | None:
    """An array of one whole number under the name of a step."""
    for name in _STEPS:
        found = elements.get(name)
        if found is not None and found.info.dtype in ("int64", "int32") and math.prod(found.info.shape) == 1:
            out = np.empty(1, numpy_type(found.info.dtype))
            found.read(0, 1, out)
            return int(out[0]) if out[0] >= 0 else None
    return None
