"""A state dict as ``torch.save`` writes it, without ever holding it in memory.

``torch.save`` wants tensors; these lie in a temporary file that is mapped into memory, so their pages belong
to the page cache and not to the process.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cmdgpu.errors import WriteFailed
from cmdgpu.exporting.contract import Export, sources
from cmdgpu.store import durable
from cmdgpu.store.parameter_map import ParameterMap, TensorEntry
from cmdgpu.tensors import Snapshot, flat_blocks, raw_bytes, torch_dtype

_ALIGNMENT = 64


def write(path: Path, parameter_map: ParameterMap, snapshot: Snapshot) -> Export:
    """An OrderedDict of every tensor under every name; tied names share one storage, as torch expects."""
    durable.make_directory(path.parent)
    scratch = path.parent / durable.partial_name(path.name)
    temporary = path.parent / durable.partial_name(path.name)
    available, left_out = sources(parameter_map, snapshot)
    try:
        places: list[tuple[TensorEntry, int, int]] = []
        with scratch.open("xb") as file:
            for entry, source in available:
                file.write(b"\0" * (-file.tell() % _ALIGNMENT))
                start = file.tell()
                for block in flat_blocks(entry, source):
                    file.write(raw_bytes(block))
                places.append((entry, start, file.tell()))
            file.write(b"\0")  # an empty file cannot be mapped
        mapped = np.memmap(scratch, dtype=np.uint8, mode="r+")
        tensors: OrderedDict[str, Tensor] = OrderedDict()
        for entry, start, stop in places:
            if start == stop:  # its view would begin where the next tensor does: torch refuses that
                tensors[entry.name] = torch.empty(entry.shape, dtype=torch_dtype(entry))
                continue
            raw = torch.as_tensor(mapped[start:stop])
            tensors[entry.name] = raw.view(torch_dtype(entry)).view(entry.shape)
        for alias, name in parameter_map.aliases.items():
            if name in tensors:
                tensors[alias] = tensors[name]
        with temporary.open("xb") as file:
            torch.save(tensors, file)
            file.flush()
            durable.flush_file(file.fileno())
        durable.rename(temporary, path)
    except OSError as error:
        found = f"cannot write: {durable.reason_of(error)}"
        raise WriteFailed(found, file=path, hint="free some space") from error
    finally:
        for leftover in (scratch, temporary):
            with contextlib.suppress(OSError):
                leftover.unlink()
    durable.make_name_last(path)
    return Export(path, "pt", len(available), path.stat().st_size, left_out)
