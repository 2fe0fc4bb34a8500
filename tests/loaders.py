"""What was exported, read back by those whose formats they are: safetensors, torch, torch.distributed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def load_safetensors(path: Path) -> dict[str, Tensor]:
    with cast(Any, safe_open)(path, framework="pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        aliases = json.loads(file.metadata()["aliases"])
    return found | {alias: found[name] for alias, name in aliases.items()}


def load_pt(path: Path) -> dict[str, Tensor]:
    return cast(Any, torch).load(path, weights_only=True)


def load_dcp(path: Path) -> dict[str, Tensor]:
    """Everything that is there, as torch.distributed.checkpoint loads it into tensors of ones."""
    saved = FileSystemReader(path).read_metadata().state_dict_metadata
    found: dict[str, Any] = {}
    for name, entry in saved.items():
        assert isinstance(entry, TensorStorageMetadata)
        found[name] = torch.ones(entry.size, dtype=entry.properties.dtype)
    load_in_one_process(found, path)
    return found


def load_in_one_process(state: dict[str, Any], path: Path, **options: Any) -> None:
    with warnings.catch_warnings():
        # torch says so whether or not no_dist asks for it
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        cast(Any, dcp).load(state, checkpoint_id=path, no_dist=True, **options)


def load_huggingface(path: Path) -> dict[str, Tensor]:
    """By the index where there is one; every file of the folder is named there."""
    files = {file.name for file in path.iterdir()}
    if files == {"model.safetensors"}:
        return load_safetensors(path / "model.safetensors")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert files == {"model.safetensors.index.json", *index["weight_map"].values()}
    found: dict[str, Tensor] = {}
    for name in sorted(set(index["weight_map"].values())):
        shard = load_safetensors(path / name)
        here = {tensor for tensor, file in index["weight_map"].items() if file == name}
        assert here <= set(shard) and not set(found) & set(shard)
        found |= shard
    return found


LOADERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    "safetensors": load_safetensors,
    "pt": load_pt,
    "dcp": load_dcp,
    "huggingface": load_huggingface,
}
