"""``.safetensors``: a JSON header, checked before it is believed, then raw bytes, read in place."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final, cast

from cmdgpu.errors import CheckpointError, printable
from cmdgpu.importing import documents
from cmdgpu.importing.contract import Checkpoint, TensorInfo
from cmdgpu.importing.documents import Json
from cmdgpu.importing.elements import Elements, numpy_type
from cmdgpu.importing.files import Source
from cmdgpu.importing.opened import Opened
from cmdgpu.importing.strided import Strided, c_strides
from cmdgpu.store import format as fmt

NAME: Final = "safetensors"

_MAX_HEADER_BYTES: Final = 100_000_000
"""What the library takes, too."""
_METADATA: Final = "__metadata__"
_TYPES: Final = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}
_PACKED: Final = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
"""Bits of elements that share bytes: torch has no such tensors."""
_STEPS: Final = ("global_step", "step", "iteration", "epoch")


class Safetensors:
    def claims(self, path: Path) -> bool:
        return path.is_file() and looks_like_safetensors(Source(path))

    def open(self, path: Path) -> Checkpoint:
        """Raises CheckpointError for a header that is no header, or does not cover the file byte for byte."""
        return open_safetensors(path, Source(path))


def looks_like_safetensors(source: Source) -> bool:
    if source.size < 10:
        return False
    head = source.read(0, 10)
    return int.from_bytes(head[:8], "little") <= _MAX_HEADER_BYTES and head[8:9] == b"{"


def open_safetensors(path: Path, source: Source) -> Opened:
    """``path`` is what a person calls it; the bytes are read through ``source``."""
    header, begin = _header(source)
    metadata = header.pop(_METADATA, None)
    elements: dict[str, Elements] = {}
    skipped: list[tuple[str, str]] = []
    end = 0
    for name, entry in sorted(_entries(header, source).items(), key=lambda item: item[1][2:]):
        kind, shape, start, stop = entry
        if start != end:
            what = "overlaps" if start < end else "leaves a hole after"
            raise _wrong(source, f"{what} the tensor before it", name)
        end = stop
        if kind in _PACKED:
            skipped.append((name, f"elements of type {kind} share bytes"))
        else:
            info = TensorInfo(_TYPES[kind], shape)
            elements[name] = Strided(source, info, begin + start, c_strides(shape))
    if begin + end != source.size:
        found = f"its tensors end at byte {begin + end}, the file at {source.size}: cut short?"
        raise CheckpointError(found, file=source.path)
    in_order = {name: elements[name] for name in header if name in elements}
    aliases, step = _metadata(metadata, source)
    return Opened(path, NAME, (path,), in_order, aliases, tuple(skipped), step)


def _header(source: Source) -> tuple[Json, int]:
    """The header, and where the bytes behind it begin."""
    if source.size < 8:
        raise CheckpointError(f"holds {source.size} bytes, no header of safetensors", file=source.path)
    length = int.from_bytes(source.read(0, 8), "little")
    if length > _MAX_HEADER_BYTES or 8 + length > source.size:
        found = f"says its header has {length} bytes, and the file has {source.size}: cut short?"
        raise CheckpointError(found, file=source.path)
    return documents.parse(source.read(8, length), source.path), 8 + length


def _entries(header: Json, source: Source) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
    """(type, shape, start, stop) of every tensor, sizes agreeing with offsets."""
    found: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    for name, value in header.items():
        entry = fmt.as_dict(value) or {}
        kind, shape = entry.get("dtype"), documents.as_sizes(entry.get("shape"))
        offsets = documents.as_sizes(entry.get("data_offsets"))
        if entry.keys() != {"dtype", "shape", "data_offsets"} or shape is None or len(shape) > 64:
            raise _wrong(source, "is not described as a tensor is", name)
        if not isinstance(kind, str) or kind not in (*_TYPES, *_PACKED):
            raise _wrong(source, f"has the type {printable(str(kind))}, which is none we know", name)
        if offsets is None or len(offsets) != 2 or offsets[1] > source.size:
            raise _wrong(source, "lies beyond the file", name)
        start, stop = offsets
        bits = _PACKED[kind] if kind in _PACKED else 8 * numpy_type(_TYPES[kind]).itemsize
        if math.prod(max(n, 1) for n in shape) >= 1 << 62 or math.prod(shape) * bits != 8 * (stop - start):
            raise _wrong(source, f"has {stop - start} bytes, which a {kind} of {list(shape)} has not", name)
        found[name] = (kind, shape, start, stop)
    return found


def _metadata(value: object, source: Source) -> tuple[dict[str, str], int | None]:
    """(other names that our own export wrote down, the step) as far as the metadata tells them."""
    metadata = fmt.as_dict(value)
    are_texts = all(isinstance(text, str) for text in (metadata or {}).values())
    if (metadata is None) != (value is None) or not are_texts:
        raise CheckpointError("holds metadata that are not all texts", file=source.path)
    told = cast(dict[str, str], metadata or {})
    step = next((told[key] for key in _STEPS if key in told), "")
    return _aliases(told.get("aliases"), source), int(step) if step.isdecimal() and len(step) < 19 else None


def _aliases(text: str | None, source: Source) -> dict[str, str]:
    """Another program may mean something else by that word: only an object of texts counts."""
    if text is None or not text.startswith("{"):
        return {}
    found = documents.parse(text.encode("utf-8", "surrogatepass"), source.path)
    return {alias: name for alias, name in found.items() if isinstance(name, str)}


def _wrong(source: Source, found: str, name: str) -> CheckpointError:
    return CheckpointError(found, file=source.path, tensor=name)
