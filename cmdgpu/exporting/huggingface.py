"""A folder of safetensors shards and their index, as ``save_pretrained`` writes the weights of a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final, TypeAlias

from cmdgpu.exporting.contract import Export, Writer, sources
from cmdgpu.exporting.folder import new_folder
from cmdgpu.exporting.safetensors import require_names, tensor_bytes, write_file
from cmdgpu.store import durable
from cmdgpu.store.parameter_map import ParameterMap, TensorEntry
from cmdgpu.tensors import RowSource, Snapshot

MAX_SHARD_BYTES: Final = 5_000_000_000
"""The 5GB that the Hub's own tools cut at."""

_INDEX: Final = "model.safetensors.index.json"
_Shard: TypeAlias = list[tuple[TensorEntry, RowSource]]


def in_shards(max_shard_bytes: int) -> Writer:
    """The writer of shards whose tensors are ``max_shard_bytes`` at most; a larger tensor is a shard alone.

    One shard is ``model.safetensors``, without an index. Tied weights are written once, as in a single file.
    """

    def write(path: Path, parameter_map: ParameterMap, snapshot: Snapshot) -> Export:
        available, left_out = sources(parameter_map, snapshot)
        require_names([entry for entry, _ in available])
        shards = _cut(available, max_shard_bytes)
        total = sum(tensor_bytes(entry) for entry, _ in available)
        n_bytes, file_of = 0, dict[str, str]()
        with new_folder(path) as folder:
            for i, shard in enumerate(shards, start=1):
                name = "model.safetensors"
                if len(shards) > 1:
                    name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
                names = {entry.name for entry, _ in shard}
                aliases = {alias: to for alias, to in parameter_map.aliases.items() if to in names}
                n_bytes += write_file(folder, name, shard, aliases)
                file_of |= dict.fromkeys((entry.name for entry, _ in shard), name)
            if len(shards) > 1:
                index = {"metadata": {"total_size": total}, "weight_map": file_of}
                text = json.dumps(index, indent=2).encode()
                durable.write_file(folder, _INDEX, [text])
                n_bytes += len(text)
        return Export(path, "huggingface", len(available), n_bytes, left_out)

    return write


def _cut(available: Sequence[tuple[TensorEntry, RowSource]], max_shard_bytes: int) -> list[_Shard]:
    """The tensors in their order, as many to a shard as fit; one shard at least."""
    shards: list[_Shard] = [[]]
    room = max_shard_bytes
    for entry, source in available:
        n_bytes = tensor_bytes(entry)
        if shards[-1] and n_bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append((entry, source))
        room -= n_bytes
    return shards
