"""Rows back into tensors: the parameter map walked the other way, a block of rows at a time."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from cmdgpu.errors import CmdgpuWarning, ModelMismatch, UsageError, printable
from cmdgpu.models import Patterns, compile_patterns, named_tensors, unwrap
from cmdgpu.notation import AnyArray
from cmdgpu.store import format as fmt
from cmdgpu.store.durable import bytes_of
from cmdgpu.store.parameter_map import ParameterMap, TensorEntry

BLOCK_ROWS: Final = 1 << 18
"""Rows handled at once when a tensor is rebuilt: what bounds the memory of load and export."""


class RowSource(Protocol):
    """One snapshot as numbers."""

    def read(self, start: int, stop: int) -> AnyArray:
        """Values of rows [start, stop), float32 or float16."""
        ...


Snapshot: TypeAlias = Callable[[TensorEntry], RowSource | None]
"""Where each tensor's numbers come from; None when it cannot be had."""


def torch_dtype(entry: TensorEntry) -> torch.dtype:
    return getattr(torch, entry.dtype)


def flat_blocks(entry: TensorEntry, source: RowSource) -> Iterator[Tensor]:
    """The tensor's elements in C order, in its own dtype, as 1-D blocks.

    A tensor of one piece streams; a sharded one is assembled first.
    """
    if len(entry.pieces) > 1:
        yield build(entry, source).reshape(-1)
        return
    for piece in entry.pieces:
        for start in range(piece.row, piece.stop, BLOCK_ROWS):
            values = source.read(start, min(start + BLOCK_ROWS, piece.stop))
            yield _elements(values, entry)


def _elements(values: AnyArray, entry: TensorEntry) -> Tensor:
    """Numbers as elements of the tensor. A bfloat16 NaN keeps its bits; torch would make all NaNs one."""
    if entry.dtype == "bfloat16":
        return torch.as_tensor(fmt.narrow(values, "bfloat16")).view(torch.bfloat16)
    return torch.as_tensor(values).to(torch_dtype(entry))


def raw_bytes(block: Tensor) -> memoryview:
    """The elements of a 1-D tensor as they lie in memory, little-endian."""
    return bytes_of(block.contiguous().view(torch.uint8).numpy())


def build(entry: TensorEntry, source: RowSource) -> Tensor:
    """The whole tensor, in its own dtype and shape."""
    out = torch.empty(entry.shape, dtype=torch_dtype(entry))
    for piece in entry.pieces:
        box = out[tuple(slice(o, o + s) for o, s in zip(piece.offset, piece.size, strict=True))]
        flat = box.reshape(-1) if box.is_contiguous() else torch.empty(piece.n_rows, dtype=out.dtype)
        for start in range(piece.row, piece.stop, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, piece.stop)
            flat[start - piece.row : stop - piece.row] = _elements(source.read(start, stop), entry)
        if not box.is_contiguous():
            box.copy_(flat.reshape(piece.size))
    return out


def select(parameter_map: ParameterMap, params: Patterns) -> list[TensorEntry]:
    """Tensors one of whose names matches one of the regular expressions; all of them for None."""
    patterns = compile_patterns(params)
    names = {t.name: [t.name] for t in parameter_map}
    for alias, name in parameter_map.aliases.items():
        names[name].append(alias)
    chosen = [
        t for t in parameter_map if not patterns or any(p.search(n) for p in patterns for n in names[t.name])
    ]
    if not chosen:
        have = ", ".join(t.name for t in parameter_map.tensors[:5])
        raise UsageError(f"no tensor matches {params!r}", hint=f"have: {have}, ...")
    return chosen


def state_dict(
    parameter_map: ParameterMap, snapshot: Snapshot, params: Patterns = None
) -> OrderedDict[str, Tensor]:
    """Every selected tensor by name; tied names share one tensor, as in the model."""
    found: OrderedDict[str, Tensor] = OrderedDict()
    for entry in select(parameter_map, params):
        if (source := snapshot(entry)) is not None:
            found[entry.name] = build(entry, source)
    for alias, name in parameter_map.aliases.items():
        if name in found:
            found[alias] = found[name]
    return found


def load_into(model: nn.Module, parameter_map: ParameterMap, snapshot: Snapshot, path: Path | str) -> None:
    """Copy one snapshot into the model, in place, a block at a time.

    Every name and shape is checked before the first copy: a ModelMismatch leaves the model untouched.
    Tensors the recording left out on purpose keep the model's own values.
    """
    targets = {name: tensor for name, _, tensor in named_tensors(model)}
    _require_match(targets, parameter_map, path)
    with torch.no_grad():
        for entry in parameter_map:
            source = snapshot(entry)
            if source is None:
                continue
            target = targets[entry.name]
            if not target.is_contiguous():
                target.copy_(build(entry, source))
                continue
            flat, at = target.view(-1), 0
            for block in flat_blocks(entry, source):
                flat[at : at + len(block)].copy_(block)
                at += len(block)


def _require_match(targets: dict[str, Tensor], parameter_map: ParameterMap, path: Path | str) -> None:
    hint = "build the model that was recorded"
    for entry in parameter_map:
        if entry.name not in targets:
            raise ModelMismatch("the model lacks it", file=path, tensor=entry.name, hint=hint)
        found = targets[entry.name]
        if tuple(found.shape) != entry.shape:
            raise ModelMismatch(
                f"recorded with shape {list(entry.shape)}, the model has {list(found.shape)}",
                file=path,
                tensor=entry.name,
                hint=hint,
            )
    for alias, name in parameter_map.aliases.items():
        if targets.get(alias) is not targets[name]:
            raise ModelMismatch(
                f"recorded as another name of '{printable(name)}', in the model it is not",
                file=path,
                tensor=alias,
                hint=hint,
            )
    seen: dict[int, str] = {}
    for entry in parameter_map:
        if (first := seen.setdefault(id(targets[entry.name]), entry.name)) != entry.name:
            raise ModelMismatch(
                f"recorded apart from '{printable(first)}', in the model they are tied",
                file=path,
                tensor=entry.name,
                hint=hint,
            )
    known = {*(t.name for t in parameter_map), *parameter_map.aliases, *(n for n, _ in parameter_map.skipped)}
    for name in targets:
        if name not in known:
            raise ModelMismatch("the model has it, the recording lacks it", file=path, tensor=name, hint=hint)


def warn_of_running_statistics(model: nn.Module) -> None:
    """Recorded BatchNorm statistics belong to the trained weights, not to rebuilt ones."""
    for module in unwrap(model).modules():
        if getattr(module, "running_mean", None) is not None:
            warnings.warn(
                f"{type(module).__name__} keeps running statistics of the trained weights; run "
                "torch.optim.swa_utils.update_bn(loader, model) before judging rebuilt ones",
                CmdgpuWarning,
                stacklevel=3,
            )
            return
