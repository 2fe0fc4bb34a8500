"""What ``.metadata`` of a torch.distributed.checkpoint folder says, in torch's own terms.

Apart from ``dcp``, because torch.distributed takes most of a second to import.
"""

from __future__ import annotations

import pickle
from typing import Any

import torch

# the place of an item has no public name; readers of the format know it by this one
from torch.distributed.checkpoint.filesystem import _StorageInfo  # pyright: ignore[reportPrivateUsage]
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from cmdgpu.store.parameter_map import Piece, TensorEntry
from cmdgpu.tensors import torch_dtype


class Catalogue:
    """The items of one file, in the order in which they lie there."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self.end = 0
        """Bytes of the file so far."""

    def add(self, entry: TensorEntry, box: Piece, n_bytes: int) -> None:
        """The next item: a box of a tensor, ``n_bytes`` long."""
        if entry.name not in self._tensors:
            properties = TensorProperties(dtype=torch_dtype(entry))
            self._tensors[entry.name] = TensorStorageMetadata(properties, torch.Size(entry.shape), [])
        chunks = self._tensors[entry.name].chunks
        index = MetadataIndex(entry.name, box.offset, len(chunks))
        self._places[index] = _StorageInfo(self._file, self.end, n_bytes)
        chunks.append(ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.size)))
        self.end += n_bytes

    def repeat(self, alias: str, name: str) -> None:
        """Another name for the items of a tensor, where it is there at all."""
        if name not in self._tensors:
            return
        self._tensors[alias] = self._tensors[name]
        for i, chunk in enumerate(self._tensors[name].chunks):
            place = self._places[MetadataIndex(name, chunk.offsets)]
            self._places[MetadataIndex(alias, chunk.offsets, i)] = place

    def pickled(self) -> bytes:
        paths: dict[str, Any] = {name: (name,) for name in self._tensors}  # where each lies in a state dict
        return pickle.dumps(Metadata({**self._tensors}, paths, self._places, StorageMeta()))
