"""A decomposition, in memory or on disk: references, four numbers per row, statistics; units, their ledger.

On disk a running fit lives under ``<out>.<fingerprint>.partial`` and gets its name when it is complete. A
unit's chunks are made durable first, then its done record, which binds them to the run: a killed fit goes on
where it stopped, and a unit done twice, or late by a zombie, writes the same bytes.
"""

from __future__ import annotations

from cmdgpu.results.beginning import begin_result, is_taken, join_result
from cmdgpu.results.contract import (
    Frame,
    ModeSet,
    Provenance,
    Refine,
    Refined,
    Result,
    ResultWriter,
    RowArray,
    UnitRows,
    result_bytes,
    spoken,
)
from cmdgpu.results.in_memory import MemoryWriter
from cmdgpu.results.ledger import statistics_bytes
from cmdgpu.results.opened import (
    Description,
    StoredRows,
    describe_result,
    kind_of,
    open_result,
    partial_path,
    partials_of,
    progress_of,
    require_result,
)
from cmdgpu.results.stored import StoredWriter
from cmdgpu.results.verification import verify_result

__all__ = [
    "Description",
    "Frame",
    "MemoryWriter",
    "ModeSet",
    "Provenance",
    "Refine",
    "Refined",
    "Result",
    "ResultWriter",
    "RowArray",
    "StoredRows",
    "StoredWriter",
    "UnitRows",
    "begin_result",
    "describe_result",
    "is_taken",
    "join_result",
    "kind_of",
    "open_result",
    "partial_path",
    "partials_of",
    "progress_of",
    "require_result",
    "result_bytes",
    "spoken",
    "statistics_bytes",
    "verify_result",
]
