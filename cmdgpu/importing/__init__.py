"""Checkpoints of any trainer: one file per format, and the list of them in the order they are asked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from cmdgpu.importing.contract import FORMATS, Checkpoint, Checksum, Format, TensorInfo
from cmdgpu.importing.dcp import DistributedCheckpoint
from cmdgpu.importing.discovery import Paths
from cmdgpu.importing.huggingface import HuggingFace
from cmdgpu.importing.keras import Keras
from cmdgpu.importing.looking import Look, look
from cmdgpu.importing.naming import KeyMap, Rules
from cmdgpu.importing.npz import Npz
from cmdgpu.importing.planning import ImportPlan, plan_import
from cmdgpu.importing.safetensors import Safetensors
from cmdgpu.importing.torch_file import TorchFile
from cmdgpu.importing.writing import ImportReport, carry_out
from cmdgpu.memory import default_limit, parse_bytes
from cmdgpu.models import Patterns
from cmdgpu.store.places import local_path

FORMATS.add("safetensors", Safetensors())
FORMATS.add("pt", TorchFile())
FORMATS.add("huggingface", HuggingFace())
FORMATS.add("dcp", DistributedCheckpoint())
FORMATS.add("npz", Npz())
FORMATS.add("keras", Keras())

__all__ = [
    "FORMATS",
    "Checkpoint",
    "Checksum",
    "Format",
    "ImportPlan",
    "ImportReport",
    "Look",
    "TensorInfo",
    "carry_out",
    "look",
    "plan_checkpoints",
]


def plan_checkpoints(
    paths: Paths,
    out: str | os.PathLike[str],
    steps: Sequence[int] | None = None,
    prefix: str = "",
    include: Patterns = None,
    exclude: Patterns = None,
    key_map: KeyMap | str | Path = None,
    resume: bool = True,
    *,
    dtype: str | None = None,
    memory_limit: int | str | None = None,
    rows_per_chunk: int | None = None,
    zstd: bool = False,
    unit: str = "step",
) -> ImportPlan:
    """What ``carry_out`` will do, from headers alone; arguments as of ``Trajectory.from_checkpoints``."""
    return plan_import(
        paths,
        local_path(out, "an import"),
        rules=Rules.of(prefix, include, exclude, key_map),
        steps=steps,
        resume=resume,
        dtype=dtype,
        limit_bytes=default_limit() if memory_limit is None else parse_bytes(memory_limit),
        rows_per_chunk=rows_per_chunk,
        compressed=zstd,
        unit=unit,
    )
