"""A folder of Hugging Face: one file of weights, or an index that says which file holds which tensor."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from cmdgpu.errors import CheckpointError, printable
from cmdgpu.importing import documents
from cmdgpu.importing.contract import Checkpoint, Checksum
from cmdgpu.importing.elements import Elements
from cmdgpu.importing.files import inside
from cmdgpu.importing.opened import Opened
from cmdgpu.importing.safetensors import looks_like_safetensors, open_safetensors
from cmdgpu.importing.torch_file import open_torch
from cmdgpu.store import durable
from cmdgpu.store import format as fmt

NAME: Final = "huggingface"

_SINGLE: Final = ("model.safetensors", "diffusion_pytorch_model.safetensors", "adapter_model.safetensors")
_SINGLE_TORCH: Final = ("pytorch_model.bin", "diffusion_pytorch_model.bin", "adapter_model.bin")
_INDEX: Final = re.compile(r"[A-Za-z0-9_.-]+\.safetensors\.index\.json")
_TORCH_INDEX: Final = re.compile(r"[A-Za-z0-9_.-]+\.bin\.index\.json")
_STATE: Final = "trainer_state.json"
_MAX_JSON_BYTES: Final = 64 << 20


class HuggingFace:
    """Nothing but the weights, their index and the state of the trainer is ever opened."""

    def claims(self, path: Path) -> bool:
        return path.is_dir() and _main_file(path) is not None

    def open(self, path: Path) -> Checkpoint:
        """Raises CheckpointError for an index that names what is not there, or lies outside the folder."""
        main = _main_file(path)
        if main is None:
            raise CheckpointError("holds no weights of Hugging Face", file=path)
        if main.endswith(".index.json"):
            return _open_sharded(path, main)
        shard = _open_shard(path, main)
        return Opened(
            path,
            NAME,
            shard.files,
            shard.elements,
            shard.aliases,
            shard.skipped,
            _step(path, shard.step),
            shard.read_bytes,
            shard.checksums,
        )


def _main_file(folder: Path) -> str | None:
    """As transformers chooses: safetensors before pickles, one file before an index of several.

    Raises CheckpointError for two indexes of one kind.
    """
    names = {entry.name for entry in durable.entries(folder)}
    choices: list[Callable[[], list[str]]] = [
        lambda: [name for name in _SINGLE if name in names],
        lambda: sorted(name for name in names if _INDEX.fullmatch(name)),
        lambda: [name for name in _SINGLE_TORCH if name in names],
        lambda: sorted(name for name in names if _TORCH_INDEX.fullmatch(name)),
    ]
    for choice in choices:
        if len(found := choice()) > 1:
            raise CheckpointError(f"holds more than one model: {', '.join(found)}", file=folder)
        if found:
            return found[0]
    return None


def _open_shard(folder: Path, name: str) -> Opened:
    """By its content, whatever its suffix says."""
    source = inside(folder, name)
    path = folder / name
    return open_safetensors(path, source) if looks_like_safetensors(source) else open_torch(path, source)


def _open_sharded(folder: Path, index: str) -> Opened:
    weight_map = _weight_map(folder, index)
    shards = {name: _open_shard(folder, name) for name in dict.fromkeys(weight_map.values())}
    elements: dict[str, Elements] = {}
    aliases: dict[str, str] = {}
    for name, file in weight_map.items():
        shard = shards[file]
        if name in shard.elements:
            elements[name] = shard.elements[name]
        elif name in shard.aliases:
            aliases[name] = shard.aliases[name]
        else:
            found = f"is in {printable(index)}, and not in the file it names, {printable(file)}"
            raise CheckpointError(found, file=folder, tensor=name)
    skipped: list[tuple[str, str]] = []
    checksums: dict[Path, tuple[Checksum, ...]] = {}
    for file, shard in shards.items():
        skipped += shard.skipped
        checksums.update(shard.checksums)
        for alias, name in shard.aliases.items():
            aliases.setdefault(alias, name)
        skipped += [
            (name, f"is in {printable(file)}, and not in the index")
            for name in shard.elements
            if weight_map.get(name) != file and name not in aliases.values()
        ]
    return Opened(
        folder,
        NAME,
        (folder / index, *(folder / file for file in shards)),
        elements,
        {alias: name for alias, name in aliases.items() if alias not in elements},
        tuple(skipped),
        _step(folder, None),
        max(shard.read_bytes for shard in shards.values()),
        checksums,
    )


def _weight_map(folder: Path, index: str) -> Mapping[str, str]:
    source = inside(folder, index)
    found = fmt.as_dict(documents.read(source, _MAX_JSON_BYTES).get("weight_map"))
    if not found or not all(isinstance(name, str) for name in found.values()):
        raise CheckpointError("holds no weight_map of file names", file=folder / index)
    return found


def _step(folder: Path, told: int | None) -> int | None:
    """The trainer's own count comes before what a file of weights says."""
    if not (folder / _STATE).exists():
        return told
    state = documents.read(inside(folder, _STATE), _MAX_JSON_BYTES)
    step = documents.as_whole_number(state.get("global_step"))
    return told if step is None else step
