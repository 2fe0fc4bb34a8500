"""Rows back into tensors: the parameter map walked the other way, a block of rows at a time."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from cmdgpu.boxes import is_sharded, local_boxes
from cmdgpu.errors import CmdgpuWarning, ModelMismatch, UsageError, printable
from cmdgpu.models import Patterns, compile_patterns, named_tensors, unwrap
from cmdgpu.notation import AnyArray
from cmdgpu.store import format as fmt
from cmdgpu.store.durable import bytes_of
from cmdgpu.store.parameter_map import ParameterMap, Piece, TensorEntry
from cmdgpu.store.units_ahead import THREADS, UnitsAhead, UnitSource, units_kept, units_of

BLOCK_ROWS: Final = 1 << 18
"""Rows handled at once when a tensor is rebuilt: what bounds the memory of load and export."""


class RowSource(Protocol):
    """One snapshot as numbers."""

    def read(self, start: int, stop: int) -> AnyArray:
        """Values of rows [start, stop), float32 or float16."""
        ...


Snapshot: TypeAlias = Callable[[TensorEntry], RowSource | None]
"""Where each tensor's numbers come from; None when it cannot be had."""

Buffers: TypeAlias = Literal["recorded", "rebuilt", "skip"]
"""What becomes of a model's buffers on the way back: verbatim from the recorded snapshot, as a * r + b like
the parameters (which can make a running variance negative), or left out."""


@contextlib.contextmanager
def reading_ahead(snapshot: Snapshot, entries: Sequence[TensorEntry]) -> Generator[Snapshot]:
    """The same snapshot for who will ask for all of ``entries`` in their order: threads make the next units.

    Tensors in several pieces are read to and fro, so nothing is read ahead where there is one.
    """
    asked: dict[int, tuple[RowSource, list[Piece]]] = {}
    if all(len(entry.pieces) < 2 for entry in entries):
        for entry in entries:
            if (source := snapshot(entry)) is not None:
                asked.setdefault(id(source), (source, []))[1].extend(entry.pieces)
    with ThreadPoolExecutor(THREADS, thread_name_prefix="cmdgpu-rebuild") as pool:
        ahead: dict[int, UnitsAhead] = {}
        for source, pieces in asked.values():
            if not isinstance(source, UnitSource):
                continue
            kept = units_kept(source.rows, len(asked))
            units = units_of(((piece.row, piece.stop) for piece in pieces), source.rows)
            if min(kept, len(units)) > 1:
                ahead[id(source)] = UnitsAhead(source, units, pool, kept)

        def source_of(entry: TensorEntry) -> RowSource | None:
            source = snapshot(entry)
            return ahead.get(id(source), source)

        try:
            yield source_of
        finally:
            pool.shutdown(cancel_futures=True)


def check_buffers(buffers: Buffers, may_be: tuple[Buffers, ...]) -> None:
    """Raises UsageError for another treatment of buffers than these."""
    if buffers not in may_be:
        raise UsageError(f"buffers cannot be {buffers!r} here", hint=f"have: {', '.join(may_be)}")


def torch_dtype(entry: TensorEntry) -> torch.dtype:
    return getattr(torch, entry.dtype)


def flat_blocks(entry: TensorEntry, source: RowSource) -> Iterator[Tensor]:
    """The tensor's elements in C order, in its own dtype, as 1-D blocks of BLOCK_ROWS at most.

    A tensor in several pieces comes in slabs along its first axis, at least one index of it at a time.
    """
    if len(entry.pieces) > 1:
        yield from _slabs(entry, source)
        return
    for piece in entry.pieces:
        for start, stop in _blocks(piece.row, piece.stop):
            yield _elements(source.read(start, stop), entry)


def _blocks(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Rows [start, stop) cut at multiples of BLOCK_ROWS: units end there, and what lies in one is no copy."""
    while start < stop:
        end = min((start // BLOCK_ROWS + 1) * BLOCK_ROWS, stop)
        yield start, end
        start = end


def _slabs(entry: TensorEntry, source: RowSource) -> Iterator[Tensor]:
    height = max(BLOCK_ROWS // max(math.prod(entry.shape[1:]), 1), 1)
    rest = (0,) * (len(entry.shape) - 1)
    for top in range(0, entry.shape[0], height):
        slab = torch.empty((min(height, entry.shape[0] - top), *entry.shape[1:]), dtype=torch_dtype(entry))
        fill_box(entry, source, (top, *rest), slab)
        yield slab.view(-1)


def fill_box(entry: TensorEntry, source: RowSource, offset: tuple[int, ...], box: Tensor) -> None:
    """Copy into ``box`` the part of the tensor that begins at ``offset``.

    Of every piece the slabs along its first axis are read in which the box lies: they are runs of its rows,
    whichever axes the tensor was cut along.
    """
    if not offset:
        offset, box = (0,), box.view(1)
    for piece in entry.pieces:
        origin, (n_first, *rest) = piece.offset or (0,), piece.size or (1,)
        low = [max(o, p) for o, p in zip(offset, origin, strict=True)]
        size = (n_first, *rest)
        high = [min(o + n, p + m) for o, n, p, m in zip(offset, box.shape, origin, size, strict=True)]
        if any(a >= b for a, b in zip(low, high, strict=True)):
            continue
        width = math.prod(rest)
        here = [slice(a - p, b - p) for a, b, p in zip(low, high, origin, strict=True)]
        there = [slice(a - o, b - o) for a, b, o in zip(low, high, offset, strict=True)]
        height = max(BLOCK_ROWS // width, 1)
        for top in range(low[0], high[0], height):
            bottom = min(top + height, high[0])
            start = piece.row + (top - origin[0]) * width
            run = read_elements(entry, source, start, start + (bottom - top) * width)
            part = box[(slice(top - offset[0], bottom - offset[0]), *there[1:])]
            part.copy_(run.view(bottom - top, *rest)[(slice(None), *here[1:])])


def read_elements(entry: TensorEntry, source: RowSource, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of a tensor, flat and in its own dtype."""
    if stop - start <= BLOCK_ROWS:
        return _elements(source.read(start, stop), entry)
    out = torch.empty(stop - start, dtype=torch_dtype(entry))
    raw = raw_bytes(out)
    for low, high in _blocks(start, stop):
        # copied as bytes: torch would wake its threads for every block, and wait for them on a busy machine
        part = slice((low - start) * out.itemsize, (high - start) * out.itemsize)
        raw[part] = raw_bytes(_elements(source.read(low, high), entry))
    return out


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
        for start, stop in _blocks(piece.row, piece.stop):
            flat[start - piece.row : stop - piece.row] = _elements(source.read(start, stop), entry)
        if not box.is_contiguous():
            box.copy_(flat.reshape(piece.size))
    return out


def matching(parameter_map: ParameterMap, params: Patterns) -> list[TensorEntry]:
    """Tensors one of whose names, aliases included, matches one of the regular expressions; all for None.

    Raises UsageError when none does, with the first names, and for what is no regular expression.
    """
    patterns = compile_patterns(params)
    if not patterns:
        return list(parameter_map)
    by_alias = {
        name for alias, name in parameter_map.aliases.items() if any(p.search(alias) for p in patterns)
    }
    chosen = [t for t in parameter_map if t.name in by_alias or any(p.search(t.name) for p in patterns)]
    if not chosen:
        have = [printable(t.name) for t in parameter_map.tensors[:5]]
        raise UsageError(
            f"no tensor matches {params!r}",
            hint=f"have: {', '.join(have)}{', ...' if len(have) < len(parameter_map) else ''}",
        )
    return chosen


def select(parameter_map: ParameterMap, params: Patterns, buffers: Buffers = "recorded") -> list[TensorEntry]:
    """The tensors that are ``matching``; ``buffers="skip"`` leaves the buffers out of them.

    Raises UsageError when nothing is left.
    """
    chosen = matching(parameter_map, params)
    if buffers == "skip":
        chosen = [t for t in chosen if t.kind != "buffer"]
        if not chosen:
            raise UsageError("only buffers match, and buffers are skipped", hint="leave buffers='skip' out")
    return chosen


def state_dict(
    parameter_map: ParameterMap,
    snapshot: Snapshot,
    params: Patterns = None,
    buffers: Buffers = "recorded",
) -> OrderedDict[str, Tensor]:
    """Every selected tensor by name; tied names share one tensor, as in the model."""
    found: OrderedDict[str, Tensor] = OrderedDict()
    chosen = select(parameter_map, params, buffers)
    with reading_ahead(snapshot, chosen) as ahead:
        for entry in chosen:
            if (source := ahead(entry)) is not None:
                found[entry.name] = build(entry, source)
    for alias, name in parameter_map.aliases.items():
        if name in found:
            found[alias] = found[name]
    return found


def load_into(model: nn.Module, parameter_map: ParameterMap, snapshot: Snapshot, path: Path | str) -> None:
    """Copy one snapshot into the model, in place, a block at a time.

    Every name and shape is checked before the first copy: a ModelMismatch leaves the model untouched.
    Tensors that the recording or a selection left out on purpose keep the model's own values. Of a sharded
    tensor this process reads the box that it holds.
    """
    targets = {name: tensor for name, _, tensor in named_tensors(model)}
    _require_match(targets, parameter_map, path)
    # of a sharded tensor only some units are asked for
    whole = () if any(map(is_sharded, targets.values())) else parameter_map.tensors
    with torch.no_grad(), reading_ahead(snapshot, whole) as ahead:
        for entry in parameter_map:
            source = ahead(entry)
            if source is None:
                continue
            target = targets[entry.name]
            if is_sharded(target):
                for (offset, _), values in local_boxes(entry.name, target):
                    fill_box(entry, source, offset, values)
                continue
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


_REACHED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""What ``update_bn`` measures anew; it passes by InstanceNorm."""


def warn_of_running_statistics(model: nn.Module) -> None:
    """Recorded running statistics belong to the trained weights, not to rebuilt ones: one warning says so."""
    tracking = [
        module
        for module in unwrap(model).modules()
        if getattr(module, "track_running_stats", False) and getattr(module, "running_mean", None) is not None
    ]
    if not tracking:
        return
    ways: list[str] = []
    if any(isinstance(module, _REACHED) for module in tracking):
        ways.append("run torch.optim.swa_utils.update_bn(loader, model)")
    if passed := [type(module).__name__ for module in tracking if not isinstance(module, _REACHED)]:
        ways.append(f"send batches through the model in train mode ({passed[0]} is not reached by update_bn)")
    warnings.warn(
        f"{type(tracking[0]).__name__} keeps running statistics of the trained weights; "
        f"{' and '.join(ways)} before judging rebuilt ones",
        CmdgpuWarning,
        stacklevel=3,
    )
