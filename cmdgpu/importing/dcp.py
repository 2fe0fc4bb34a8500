"""A folder of ``torch.distributed.checkpoint``: ``.metadata`` says in which file each box of a tensor lies.

torch unpickles ``.metadata`` with the plain ``pickle``, which runs whatever it says; here it is data
(``pickles``). A box is a whole archive of ``torch.save`` inside a file of many: its elements are read in
place, and no box is ever held whole.
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final, cast

import numpy as np

from cmdgpu.errors import CheckpointError
from cmdgpu.importing import pickles
from cmdgpu.importing.contract import Checkpoint, Checksum, TensorInfo
from cmdgpu.importing.elements import NUMPY, Elements, numpy_type
from cmdgpu.importing.files import Source, inside
from cmdgpu.importing.opened import Opened
from cmdgpu.importing.pickles import Call, Data, Global
from cmdgpu.importing.runs import Box, boxes, extent
from cmdgpu.importing.strided import c_strides
from cmdgpu.importing.torch_archive import Archive, View, open_archive, sizes_of
from cmdgpu.notation import AnyArray

NAME: Final = "dcp"

_METADATA: Final = ".metadata"
_WAY_OUT: Final = "load it where it was made and save its state_dict as safetensors"
_OPTIMIZER: Final = re.compile(r"(^|\.)optim", re.IGNORECASE)
"""Names of optimizer state: ``optim.state.…``, ``optimizer.…``, ``app.optimizer.…``."""
_STEPS: Final = ("global_step", "step", "steps", "iteration", "iter", "epoch")
_PIECE_BYTES: Final = 1 << 20
"""Of a box that lies across the rows of its tensor, read at once."""
_ITEM_BYTES: Final = 5 << 10
"""Memory of an item that was looked into (measured: 4.7 kB): its records, its pickle, its checksums."""
_MAX_AXES: Final = 64
_MAX_CELLS: Final = 1 << 22

_OF_METADATA: Final = "torch.distributed.checkpoint.metadata."
_CHUNK, _TENSOR = f"{_OF_METADATA}ChunkStorageMetadata", f"{_OF_METADATA}TensorStorageMetadata"
_PROPERTIES, _BYTES = f"{_OF_METADATA}TensorProperties", f"{_OF_METADATA}BytesStorageMetadata"
_DOCUMENT, _INDEX = f"{_OF_METADATA}Metadata", f"{_OF_METADATA}MetadataIndex"
_PLACE: Final = "torch.distributed.checkpoint.filesystem._StorageInfo"

_ADMITTED: Final = frozenset(
    [
        *(_CHUNK, _TENSOR, _PROPERTIES, _BYTES, _DOCUMENT, _INDEX, _PLACE),
        f"{_OF_METADATA}StorageMeta",
        f"{_OF_METADATA}_MEM_FORMAT_ENCODING",
        "torch.distributed.checkpoint.filesystem.SerializationFormat",
        *(f"torch.{dtype}" for dtype in NUMPY),
        "torch.Size",
        "torch.device",
        "torch.serialization._get_layout",
        "collections.OrderedDict",
        "collections.defaultdict",
        "builtins.set",
        "builtins.dict",
        *(f"pathlib.{name}" for name in ("Path", "PosixPath", "PurePath", "PurePosixPath", "WindowsPath")),
        *(f"pathlib._local.{name}" for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath")),
    ]
)


class DistributedCheckpoint:
    def claims(self, path: Path) -> bool:
        return path.is_dir() and (path / _METADATA).is_file()

    def open(self, path: Path) -> Checkpoint:
        """Raises CheckpointError for metadata that are not torch's, absent boxes, tensors with holes."""
        return _Folder(path).opened()


class _Item:
    """One archive among many: bytes [start, stop) of a file. Looked into when it is first needed."""

    def __init__(self, source: Source, start: int, stop: int) -> None:
        self.source, self.start, self.stop = source, start, stop
        self._archive: Archive | None = None

    def archive(self) -> Archive:
        """Two threads may open it twice, to the same end."""
        if (found := self._archive) is None:
            found = self._archive = open_archive(self.source, self.start, self.stop)
        return found

    def elements(self, info: TensorInfo) -> Elements:
        """Of the tensor that it has to be. Raises CheckpointError where it is another one."""
        archive = self.archive()
        view = archive.view(archive.root)
        if type(view) is not View or (view.dtype, view.shape) != (info.dtype, info.shape):
            held = f"{view.dtype} {list(view.shape)}" if type(view) is View else "no plain tensor"
            found = (
                f"holds {held} at byte {self.start}, where {_METADATA} says {info.dtype} {list(info.shape)}"
            )
            raise CheckpointError(found, file=self.source.path)
        return archive.elements(view)


@dataclass(frozen=True, slots=True)
class _Shard:
    """A box of a tensor, and where it lies."""

    offset: tuple[int, ...]
    info: TensorInfo
    item: _Item


@dataclass(frozen=True, slots=True)
class _Sharded:
    """A tensor in boxes that cover it once. A read takes ``_PIECE_BYTES`` beside ``out``, at most."""

    info: TensorInfo
    shards: tuple[_Shard, ...]

    def read(self, start: int, stop: int, out: AnyArray) -> None:
        """See ``Elements``."""
        done = 0
        for box in boxes(self.info.shape, start, stop):
            shape = extent(box)
            count = math.prod(shape)
            target = out[done : done + count].reshape(shape)
            for shard in self.shards:
                _copy_common(shard, box, target)
            done += count


def _copy_common(shard: _Shard, box: Box, target: AnyArray) -> None:
    """What a shard has of a box, into its place. It is one run of the shard's elements (see ``boxes``)."""
    if box and not box[0].start - shard.info.shape[0] < shard.offset[0] < box[0].stop:
        return  # by far the most shards of a thousand ranks
    common = tuple(
        slice(max(s.start, o), min(s.stop, o + n))
        for s, o, n in zip(box, shard.offset, shard.info.shape, strict=True)
    )
    if any(s.start >= s.stop for s in common):
        return
    first = sum(
        (s.start - o) * c for s, o, c in zip(common, shard.offset, c_strides(shard.info.shape), strict=True)
    )
    place = tuple(slice(s.start - b.start, s.stop - b.start) for s, b in zip(common, box, strict=True))
    part = target[(*place, ...)]
    elements = shard.item.elements(shard.info)
    if part.flags.c_contiguous:
        elements.read(first, first + part.size, part.reshape(-1))
        return
    piece = max(_PIECE_BYTES // part.itemsize, 1)
    for begin in range(0, part.size, piece):
        end = min(begin + piece, part.size)
        values: AnyArray = np.empty(end - begin, part.dtype)
        elements.read(first + begin, first + end, values)
        done = 0
        for inner in boxes(part.shape, begin, end):
            shape = extent(inner)
            part[inner] = values[done : done + math.prod(shape)].reshape(shape)
            done += math.prod(shape)


class _Folder:
    """From the metadata of a folder to its tensors."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._metadata = inside(path, _METADATA)
        self._files: dict[str, Source] = {}
        self._items: dict[tuple[str, int, int], _Item] = {}
        raw = self._metadata.read(0, min(self._metadata.size, pickles.MAX_BYTES + 1))
        document = _state(pickles.read(raw, path / _METADATA, _ADMITTED), _DOCUMENT)
        entries = (document or {}).get("state_dict_metadata")
        places = (document or {}).get("storage_data")
        if type(entries) is not dict or type(places) is not dict:
            raise self._refuse("is no metadata of torch.distributed.checkpoint")
        self._entries = cast(dict[Data, Data], entries)
        self._places = self._lookup(cast(dict[Data, Data], places))

    def _refuse(self, found: str, tensor: str | None = None) -> CheckpointError:
        return CheckpointError(found, file=self._path / _METADATA, tensor=tensor, hint=_WAY_OUT)

    def _lookup(self, places: dict[Data, Data]) -> dict[tuple[str, tuple[int, ...] | None], dict[str, Data]]:
        """(name, offset) -> the fields of its place; the offset is None for what is no tensor."""
        found: dict[tuple[str, tuple[int, ...] | None], dict[str, Data]] = {}
        for key, value in places.items():
            index, place = _state(key, _INDEX), _state(value, _PLACE)
            name = (index or {}).get("fqn")
            if index is None or place is None or type(name) is not str:
                raise self._refuse("says where something lies in a way that is unknown")
            offset = index.get("offset")
            found[name, None if offset is None else sizes_of(offset)] = place
        return found

    def opened(self) -> Opened:
        elements: dict[str, Elements] = {}
        aliases: dict[str, str] = {}
        skipped: list[tuple[str, str]] = []
        seen: dict[tuple[object, ...], str] = {}
        for name, entry in self._entries.items():
            if type(name) is not str:
                raise self._refuse("names a tensor by what is no text")
            if (tensor := _state(entry, _TENSOR)) is None:
                skipped.append((name, "no tensor"))
            elif _OPTIMIZER.search(name):
                skipped.append((name, "optimizer state"))
            else:
                found = self._tensor(name, tensor)
                key = (found.info, *((shard.offset, id(shard.item)) for shard in found.shards))
                if found.shards and key in seen:
                    aliases[name] = seen[key]
                else:
                    seen[key] = name
                    elements[name] = found
        return Opened(
            self._path,
            NAME,
            (self._path / _METADATA, *(source.path for source in self._files.values())),
            elements,
            aliases,
            tuple(skipped),
            self._step(elements),
            _PIECE_BYTES,
            _Checksums(self._items),
            held_bytes=_ITEM_BYTES * len(self._items),
        )

    # ---- one tensor -------------------------------------------------------------------------------------

    def _tensor(self, name: str, entry: Mapping[str, Data]) -> _Sharded:
        properties = entry.get("properties")
        state = properties.state if type(properties) is Call and properties.what == _PROPERTIES else None
        kind = cast(tuple[Data, ...], state)[0] if type(state) is tuple and state else None
        shape = sizes_of(entry.get("size"))
        chunks = entry.get("chunks")
        dtype = kind.name.removeprefix("torch.") if type(kind) is Global else ""
        if dtype not in NUMPY or shape is None or len(shape) > _MAX_AXES or type(chunks) is not list:
            raise self._refuse("is not described as a tensor is", name)
        shards: list[_Shard] = []
        for chunk in cast(list[Data], chunks):
            fields = _state(chunk, _CHUNK) or {}
            offset, size = sizes_of(fields.get("offsets")), sizes_of(fields.get("sizes"))
            if offset is None or size is None or not len(offset) == len(size) == len(shape):
                raise self._refuse("has a piece that is no box", name)
            if 0 not in size:
                shards.append(_Shard(offset, TensorInfo(dtype, size), self._item(name, offset)))
        info = TensorInfo(dtype, shape)
        self._require_covered(name, info, shards)
        return _Sharded(info, tuple(shards))

    def _item(self, name: str, offset: tuple[int, ...] | None) -> _Item:
        place = self._places.get((name, offset))
        if place is None:
            raise self._refuse(f"does not say where the piece at {list(offset or ())} lies", name)
        file, start, length = place.get("relative_path"), place.get("offset"), place.get("length")
        if place.get("transform_descriptors"):
            raise self._refuse("is stored through a transformation, compressed perhaps", name)
        if type(file) is not str or type(start) is not int or type(length) is not int:
            raise self._refuse("lies at a place that is none", name)
        if file not in self._files:
            self._files[file] = inside(self._path, file)
        source = self._files[file]
        if start < 0 or length < 0 or start + length > source.size:
            found = f"lies at bytes {start} to {start + length} of a file of {source.size}: cut short?"
            raise CheckpointError(found, file=source.path, tensor=name)
        return self._items.setdefault((file, start, start + length), _Item(source, start, start + length))

    def _require_covered(self, name: str, info: TensorInfo, shards: list[_Shard]) -> None:
        """Every element lies in one box: what no box holds would be read as whatever was in memory.

        The boxes cut each axis in places; of the cells between, each has to be covered once.
        """
        cuts = [
            sorted(
                {
                    0,
                    n,
                    *(s.offset[axis] for s in shards),
                    *(s.offset[axis] + s.info.shape[axis] for s in shards),
                }
            )
            for axis, n in enumerate(info.shape)
        ]
        if math.prod(info.shape) == 0 and not shards:
            return
        if any(axis[-1] > n for axis, n in zip(cuts, info.shape, strict=True)):
            raise self._refuse("has a piece that reaches beyond it", name)
        cells = tuple(len(axis) - 1 for axis in cuts)
        if math.prod(cells) > _MAX_CELLS:
            raise self._refuse(f"lies in {len(shards)} pieces, cut beyond all reason", name)
        covered = np.zeros(cells, np.uint32)
        for shard in shards:
            covered[
                tuple(
                    slice(bisect.bisect_left(axis, o), bisect.bisect_left(axis, o + n))
                    for axis, o, n in zip(cuts, shard.offset, shard.info.shape, strict=True)
                )
            ] += 1
        if not (covered == 1).all():
            raise self._refuse("lies in pieces that overlap, or leave holes", name)

    # ---- the step ---------------------------------------------------------------------------------------

    def _step(self, elements: Mapping[str, Elements]) -> int | None:
        """A whole number that somebody saved under the name of a step, pickled or as a tensor."""
        for label in _STEPS:
            for name in self._entries:
                if type(name) is not str or name.rpartition(".")[2] != label or _OPTIMIZER.search(name):
                    continue
                if name in elements and elements[name].info == TensorInfo("int64", ()):
                    out = np.empty(1, numpy_type("int64"))
                    elements[name].read(0, 1, out)
                    return int(out[0]) if out[0] >= 0 else None
                if (name, None) in self._places and name not in elements:
                    root = self._item(name, None).archive().root
                    if type(root) is int and 0 <= root < 1 << 63:
                        return root
        return None


class _Checksums(Mapping[Path, tuple[Checksum, ...]]):
    """Of every item's records. Collected when somebody asks: it means opening every item."""

    def __init__(self, items: Mapping[tuple[str, int, int], _Item]) -> None:
        self._by_file: dict[Path, list[_Item]] = {}
        for item in sorted(items.values(), key=lambda item: item.start):
            self._by_file.setdefault(item.source.path, []).append(item)
        for path, found in self._by_file.items():
            for one, following in pairwise(found):
                if one.stop > following.start:
                    raise CheckpointError(f"holds items that overlap at byte {following.start}", file=path)

    def __getitem__(self, path: Path) -> tuple[Checksum, ...]:
        return tuple(check for item in self._by_file[path] for check in item.archive().checksums)

    def __iter__(self) -> Iterator[Path]:
        return iter(self._by_file)

    def __len__(self) -> int:
        return len(self._by_file)


def _state(value: Data, kind: str) -> dict[str, Data] | None:
    """The fields of an object of that class, or None."""
    if type(value) is not Call or value.what != kind:
        return None
    state: object = value.state
    return cast(dict[str, Data], state) if type(state) is dict else None
