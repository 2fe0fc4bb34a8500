"""Where a trajectory's numbers come from: a store on disk, or an array somebody already has.

A source is cut into *units* of ``rows`` consecutive rows. It hands a run of whole units over as independent
``fill_tasks``, each of which writes its own part of a time-major slot, so that whoever reads decides how many
run at once.
"""

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Protocol, TypeAlias

import numpy as np

from cmdgpu.errors import CmdgpuWarning, UsageError
from cmdgpu.notation import I64, AnyArray
from cmdgpu.store import format as fmt
from cmdgpu.store import remote, zstd
from cmdgpu.store.ahead import in_order
from cmdgpu.store.parameter_map import ParameterMap, whole
from cmdgpu.store.places import RemotePath
from cmdgpu.store.view import StoreView

FillTask: TypeAlias = Callable[[], int]
"""Fills its part of a slot and answers how many bytes of elements it read."""

READS_IN_FLIGHT: Final = 8
"""Cold 1 MiB chunks: 0.75 GB/s with one read in flight, 1.44 with eight, on an SSD-backed volume."""
_CHUNKS_OF_A_TASK: Final = 8
"""Chunks read by one call: Python between two calls then hardly shows."""
ARRAY_UNIT_ROWS: Final = 1 << 18
_SLAB_ROWS: Final = 1 << 14


class Source(Protocol):
    @property
    def map(self) -> ParameterMap: ...

    @property
    def n_snapshots(self) -> int: ...

    @property
    def dtype(self) -> str:
        """float32, float16 or bfloat16."""
        ...

    @property
    def rows(self) -> int:
        """Rows per unit."""
        ...

    def fill_tasks(self, unit: int, stop: int, columns: I64, W_tb: AnyArray) -> Iterator[FillTask]:
        """Work that fills ``W_tb`` (len(columns), >= (stop - unit) * rows), of the stored type."""
        ...

    @property
    def reads_in_flight(self) -> int:
        """How many tasks, or reads of a chunk, are best run at once."""
        ...

    def fill_bytes(self, n_columns: int) -> int:
        """Memory that ``reads_in_flight`` tasks need beside the slot."""
        ...

    def require(self, columns: I64) -> None:
        """Raises StoreCorrupt unless everything of these snapshots is there, in its size.

        To be asked before memory is taken by the numbers of a source that is a file.
        """
        ...

    def read_rows(self, rows: I64, columns: I64) -> AnyArray:
        """(len(rows), len(columns)) stored values of any rows."""
        ...


class StoreSource:
    """Chunk files of a store, straight into their places in the slot, a few by one task."""

    def __init__(self, view: StoreView) -> None:
        self.view = view
        self.reads_in_flight = READS_IN_FLIGHT if view.is_local else remote.READS_IN_FLIGHT
        # of a server every chunk is a request of its own, and all of them are to be under way
        self._chunks_of_a_task = _CHUNKS_OF_A_TASK if view.is_local else 1

    @property
    def map(self) -> ParameterMap:
        return self.view.map

    @property
    def n_snapshots(self) -> int:
        return len(self.view.steps)

    @property
    def dtype(self) -> str:
        return self.view.dtype

    @property
    def rows(self) -> int:
        return self.view.rows

    def fill_tasks(self, unit: int, stop: int, columns: I64, W_tb: AnyArray) -> Iterator[FillTask]:
        rows = self.rows

        def task(i: int, first: int) -> FillTask:
            def run() -> int:
                times = columns[first : first + self._chunks_of_a_task].tolist()
                here = W_tb[first : first + len(times), (i - unit) * rows : (i - unit + 1) * rows]
                self.view.read_chunks(i, times, list(here))
                return here.nbytes

            return run

        for i in range(unit, stop):
            for first in range(0, len(columns), self._chunks_of_a_task):
                yield task(i, first)

    def fill_bytes(self, n_columns: int) -> int:
        """What is on its way to its place for every read in flight: a frame, the pieces of an object.

        Nothing of a file that is not compressed.
        """
        del n_columns
        n_bytes = self.rows * self.view.storage.numpy.itemsize
        each = 0
        if self.view.is_compressed:
            each = n_bytes = zstd.bound(n_bytes) + fmt.CRC_BYTES
            each += zstd.DECODER_BYTES
        if isinstance(self.view.path, RemotePath):
            each += self.view.path.client.held_bytes(n_bytes)
        return self.reads_in_flight * each

    def require(self, columns: I64) -> None:
        self.view.require(columns.tolist())

    def read_rows(self, rows: I64, columns: I64) -> AnyArray:
        """From the sketch when it holds them all, otherwise from every chunk that holds one of them."""
        self.require(columns)
        out = np.empty((len(rows), len(columns)), dtype=self.view.storage.numpy)
        if self.in_sketch(rows):
            assert self.view.sketch_rows is not None
            order = np.argsort(self.view.sketch_rows, kind="stable")
            at = order[np.searchsorted(self.view.sketch_rows, rows, sorter=order)]
            times = columns.tolist()
            sketch_of = self.view.read_sketch
            sketches = map(sketch_of, times)
            if not self.view.is_local:
                sketches = in_order(sketch_of, times, self.reads_in_flight)
            for j, sketch in enumerate(sketches):
                out[:, j] = sketch[at]
            return out
        scratch = threading.local()

        def read(i: int, j: int) -> None:
            if not hasattr(scratch, "chunk"):
                scratch.chunk = np.empty(self.rows, dtype=self.view.storage.numpy)
            self.view.read_chunk(i, int(columns[j]), scratch.chunk)
            wanted = rows // self.rows == i
            out[wanted, j] = scratch.chunk[rows[wanted] - i * self.rows]

        units = np.unique(rows // self.rows).tolist()
        with ThreadPoolExecutor(self.reads_in_flight, thread_name_prefix="cmdgpu-read") as pool:
            for batch in _batches(itertools.product(units, range(len(columns))), 64):
                for done in [pool.submit(read, i, j) for i, j in batch]:
                    done.result()
        return out

    def in_sketch(self, rows: I64) -> bool:
        sketch = self.view.sketch_rows
        return sketch is not None and bool(np.isin(rows, sketch).all())


def _batches(items: Iterator[tuple[int, int]], size: int) -> Iterator[list[tuple[int, int]]]:
    while batch := list(itertools.islice(items, size)):
        yield batch


class ArraySource:
    """Anything with a shape that can be sliced: NumPy, memmap, torch, zarr, dask; (N, T), row-major."""

    reads_in_flight = READS_IN_FLIGHT

    def __init__(self, W_nt: Any) -> None:
        shape = tuple(int(size) for size in getattr(W_nt, "shape", ()))
        if len(shape) != 2:
            raise UsageError(
                f"an array of shape {list(shape)} is no trajectory", hint="give (N, T): rows, snapshots"
            )
        kind = str(getattr(W_nt, "dtype", None)).removeprefix("torch.")
        if kind not in ("float32", "float16", "bfloat16", "float64"):
            raise UsageError(
                f"an array of {kind} is no trajectory", hint="give float32, float16, bfloat16 or float64"
            )
        if kind == "float64":
            warnings.warn("float64 rows are rounded to float32", CmdgpuWarning, stacklevel=3)
        self._W_nt = W_nt
        self._shape = shape
        self.dtype = "float32" if kind == "float64" else kind
        self.map = ParameterMap(whole([("W", "parameter", self.dtype, (shape[0],))]))
        self.rows = min(ARRAY_UNIT_ROWS, max(fmt.round_up(shape[0], fmt.ROW_QUANTUM), fmt.ROW_QUANTUM))

    @property
    def n_snapshots(self) -> int:
        return self._shape[1]

    @property
    def is_in_memory(self) -> bool:
        """Whether a few of its rows cost no more than these: so for NumPy (a memmap included) and torch."""
        return type(self._W_nt).__module__.partition(".")[0] in ("numpy", "torch")

    def _slab(self, start: int, stop: int) -> AnyArray:
        """Rows [start, stop) of all snapshots, in the stored type."""
        slab = self._W_nt[start:stop]
        if type(slab).__module__.partition(".")[0] == "torch":
            slab = slab.detach().cpu()
            slab = slab.view(dtype=_torch_uint16()) if self.dtype == "bfloat16" else slab
            slab = slab.numpy()
        slab = np.asarray(slab)
        return slab if slab.dtype == fmt.storage(self.dtype).numpy else fmt.narrow(slab, self.dtype)

    def fill_tasks(self, unit: int, stop: int, columns: I64, W_tb: AnyArray) -> Iterator[FillTask]:
        first, last = unit * self.rows, min(stop * self.rows, self._shape[0])
        W_tb[:, last - first :] = 0  # the rows a last unit lacks
        chosen = _as_slice(columns)

        def task(start: int) -> FillTask:
            def run() -> int:
                end = min(start + _SLAB_ROWS, last)
                W_tb[:, start - first : end - first] = self._slab(start, end)[:, chosen].T
                return (end - start) * len(columns) * W_tb.itemsize

            return run

        for start in range(first, last, _SLAB_ROWS):
            yield task(start)

    def fill_bytes(self, n_columns: int) -> int:
        """A slab as it comes and one as it is chosen; views of a plain array cost nothing."""
        stored = fmt.storage(self.dtype).numpy
        plain = type(self._W_nt).__module__ == "numpy" and self._W_nt.dtype == stored
        slab = 0 if plain else self._shape[1] * 8
        rows = min(_SLAB_ROWS, self.rows)
        return READS_IN_FLIGHT * rows * (slab + n_columns * stored.itemsize)

    def require(self, columns: I64) -> None:
        del columns

    def read_rows(self, rows: I64, columns: I64) -> AnyArray:
        out = np.empty((len(rows), len(columns)), dtype=fmt.storage(self.dtype).numpy)
        for start in (np.unique(rows // _SLAB_ROWS) * _SLAB_ROWS).tolist():
            wanted = (rows >= start) & (rows < start + _SLAB_ROWS)
            slab = self._slab(start, min(start + _SLAB_ROWS, self._shape[0]))
            out[wanted] = slab[rows[wanted] - start][:, columns]
        return out


def _as_slice(columns: I64) -> slice | I64:
    """A regular selection as a slice: NumPy then makes a view, not a copy."""
    strides = np.unique(np.diff(columns))
    if len(columns) == 1:
        return slice(int(columns[0]), int(columns[0]) + 1)
    if len(strides) == 1 and strides[0] > 0:
        return slice(int(columns[0]), int(columns[-1]) + 1, int(strides[0]))
    return columns


def _torch_uint16() -> Any:
    import torch

    return torch.uint16
