"""Keras: ``.h5``, ``.weights.h5`` and ``.keras`` (a zip around the second), through h5py.

HDF5 can link to other files, take its elements from them, and load filters as plug-ins. None of that is used
here: only hard links are followed, and only elements that lie in the file itself, behind the filters that
HDF5 brings along. Where a dataset lies in one run, its bytes are read past the library.
"""

from __future__ import annotations

import contextlib
import io
import math
import threading
from collections.abc import Generator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from cmdgpu.errors import CheckpointError, printable
from cmdgpu.importing.contract import Checkpoint, Checksum, TensorInfo
from cmdgpu.importing.elements import NUMPY, Elements
from cmdgpu.importing.files import Source
from cmdgpu.importing.opened import Opened
from cmdgpu.importing.runs import boxes, extent
from cmdgpu.importing.strided import Strided, c_strides
from cmdgpu.importing.torch_archive import checksums_of
from cmdgpu.importing.zip_records import MAGIC, first_name, read_records
from cmdgpu.notation import AnyArray

NAME: Final = "keras"

_HDF5: Final = b"\x89HDF\r\n\x1a\n"
_WEIGHTS: Final = "model.weights.h5"
_FIRST_RECORDS: Final = ("metadata.json", "config.json", _WEIGHTS)
_SAFE_FILTERS: Final = {1: "gzip", 2: "shuffle", 3: "fletcher32"}
_OPTIMIZERS: Final = ("optimizer", "optimizer_weights")
_MODEL: Final = "model_weights"
"""The group of the model in a whole model of Keras 2."""
_MAX_CHUNK_BYTES: Final = 64 << 20
_CACHE_BYTES: Final = 1 << 20
"""Of chunks, that HDF5 keeps of an open dataset."""
_MAX_OBJECTS: Final = 1 << 20
_MAX_DEPTH: Final = 32
_NAMES: Final = {
    dtype.str[1:]: name for name, dtype in NUMPY.items() if not name.startswith(("bf", "float", "complex32"))
} | {f"f{size}": f"float{8 * size}" for size in (2, 4, 8)}


class Keras:
    def claims(self, path: Path) -> bool:
        if not path.is_file():
            return False
        source = Source(path)
        head = source.read(0, min(source.size, 1024))
        return head.startswith(_HDF5) or (head.startswith(MAGIC) and first_name(head) in _FIRST_RECORDS)

    def open(self, path: Path) -> Checkpoint:
        """Raises CheckpointError without h5py, for what HDF5 cannot read, for elements elsewhere."""
        source = Source(path)
        if source.read(0, min(source.size, len(_HDF5))) == _HDF5:
            return _open(path, _Place(source, 0, source.size), {})
        records = read_records(source)
        record = records.get(_WEIGHTS)
        if record is None or record.deflated:
            found = f"holds no {_WEIGHTS}" if record is None else f"holds a compressed {_WEIGHTS}"
            raise CheckpointError(found, file=path, hint=f"unzip it and import its {_WEIGHTS}")
        return _open(path, _Place(source, record.start, record.stop), {path: checksums_of(records)})


@dataclass(frozen=True, slots=True)
class _Place:
    """An HDF5 file: bytes [start, stop) of a file."""

    source: Source
    start: int
    stop: int

    @contextlib.contextmanager
    def opened(self) -> Generator[Any]:
        """The h5py.File. What the library finds wrong with it comes out as CheckpointError."""
        h5py = _h5py(self.source.path)
        try:
            with h5py.File(_Bytes(self), "r") as file:
                yield file
        except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
            found = f"cannot be read by HDF5: {printable(str(error), 200)}"
            raise CheckpointError(found, file=self.source.path) from error


def _h5py(path: Path) -> Any:
    try:
        return import_module("h5py")
    except ImportError as error:
        if error.name != "h5py":
            raise
        found = "is an HDF5 file, which needs the package h5py"
        raise CheckpointError(found, file=path, hint="pip install 'cmdgpu[h5]'") from error


class _Bytes(io.RawIOBase):
    """The file as HDF5 sees it."""

    def __init__(self, place: _Place) -> None:
        self._place, self._at = place, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._place.stop - self._place.start}
        self._at = base[whence] + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        start = self._place.start + self._at
        size = max(min(len(view), self._place.stop - start), 0)
        self._place.source.read_into(start, view[:size])
        self._at += size
        return size


def _open(path: Path, place: _Place, checksums: dict[Path, tuple[Checksum, ...]]) -> Opened:
    with place.opened() as file:
        walk = _Walk(path, place)
        root = file
        if _MODEL in file and file.get(_MODEL, getlink=True).__class__.__name__ == "HardLink":
            walk.skipped += [(name, "beside the model") for name in file if name != _MODEL]
            root = file[_MODEL]
        walk.group(root, "", 0)
    return Opened(
        path,
        NAME,
        (path,),
        walk.elements,
        walk.aliases,
        tuple(walk.skipped),
        None,
        2 * walk.largest_chunk + _CACHE_BYTES,
        checksums,
    )


class _Walk:
    """Through the groups of a file, along hard links only, each object once."""

    def __init__(self, path: Path, place: _Place) -> None:
        self._path, self._place = path, place
        self._seen: dict[Any, str] = {}
        self._lock = threading.Lock()
        self.elements: dict[str, Elements] = {}
        self.aliases: dict[str, str] = {}
        self.skipped: list[tuple[str, str]] = []
        self.largest_chunk = 0

    def group(self, group: Any, prefix: str, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise CheckpointError(f"holds groups more than {_MAX_DEPTH} levels deep", file=self._path)
        for label in group:
            name = prefix + label
            if len(self.elements) + len(self.skipped) + len(self.aliases) > _MAX_OBJECTS:
                raise CheckpointError(f"holds more than {_MAX_OBJECTS} objects", file=self._path)
            link = group.get(label, getlink=True).__class__.__name__
            if link != "HardLink":
                kind = "an external" if link == "ExternalLink" else "a soft"
                raise CheckpointError(f"is {kind} link, which is not followed", file=self._path, tensor=name)
            if not prefix and label in _OPTIMIZERS:
                self.skipped.append((name, "optimizer state"))
            else:
                self._object(group[label], name, depth)

    def _object(self, found: Any, name: str, depth: int) -> None:
        place = _h5py(self._path).h5o.get_info(found.id).addr
        kind = found.__class__.__name__
        if place in self._seen and kind == "Dataset":
            self.aliases[name] = self._seen[place]
        elif kind == "Group" and place not in self._seen:
            self._seen[place] = name
            self.group(found, f"{name}/", depth + 1)
        elif kind == "Dataset":
            elements = self._dataset(found, name)
            if isinstance(elements, str):
                self.skipped.append((name, elements))
            else:
                self._seen[place] = name
                self.elements[name] = elements
        else:
            self.skipped.append((name, "no array, or a group that is there already"))

    def _dataset(self, dataset: Any, name: str) -> Elements | str:
        """Who reads a dataset, or why it holds no tensor."""
        dtype, shape = dataset.dtype, dataset.shape
        if shape is None or dtype.str[1:] not in _NAMES:
            return "an empty dataset" if shape is None else f"a dataset of {printable(str(dtype))}"
        info = TensorInfo(_NAMES[dtype.str[1:]], tuple(int(n) for n in shape))
        size = math.prod(info.shape) * dtype.itemsize
        if dataset.external or dataset.is_virtual:
            raise self._refuse("has its elements in another file", name)
        filters = [dataset.id.get_create_plist().get_filter(i)[0] for i in range(_filters(dataset))]
        if unknown := [number for number in filters if number not in _SAFE_FILTERS]:
            raise self._refuse(f"needs filter {unknown[0]} of HDF5, a plug-in perhaps", name)
        chunks = dataset.chunks
        if chunks is not None:
            n_bytes = math.prod(chunks) * dtype.itemsize
            if n_bytes > _MAX_CHUNK_BYTES:
                raise self._refuse(f"has chunks of {n_bytes} bytes, more than {_MAX_CHUNK_BYTES}", name)
            self.largest_chunk = max(self.largest_chunk, n_bytes)
            if dataset.id.get_num_chunks() != math.prod(
                -(-n // c) for n, c in zip(shape, chunks, strict=True)
            ):
                raise self._refuse("has chunks that were never written", name)
        elif size and dataset.id.get_storage_size() != size:
            raise self._refuse("was never written", name)
        offset = dataset.id.get_offset()
        if chunks is None and offset is not None and size:
            begin = self._place.start + int(offset)
            if begin + size > self._place.stop:
                raise self._refuse(f"lies beyond the file, at byte {begin}: cut short?", name)
            return Strided(self._place.source, info, begin, c_strides(info.shape), dtype.byteorder == ">")
        return _Chunked(self._place, dataset.name, info, self._lock)

    def _refuse(self, found: str, name: str) -> CheckpointError:
        return CheckpointError(found, file=self._path, tensor=name)


def _filters(dataset: Any) -> int:
    return int(dataset.id.get_create_plist().get_nfilters())


@dataclass(frozen=True, slots=True)
class _Chunked:
    """A dataset that only the library can read, a thread at a time."""

    place: _Place
    name: str
    info: TensorInfo
    lock: threading.Lock

    def read(self, start: int, stop: int, out: AnyArray) -> None:
        """See ``Elements``."""
        if start >= stop:
            return
        done = 0
        with self.lock, self.place.opened() as file:
            dataset = file[self.name]
            for box in boxes(self.info.shape, start, stop):
                shape = extent(box)
                count = math.prod(shape)
                target = out[done : done + count].reshape(shape)
                if shape == ():
                    target[()] = dataset[()]
                else:
                    dataset.read_direct(target, source_sel=box)
                done += count
