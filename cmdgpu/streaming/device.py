"""Host -> device -> host. On the CPU there is nothing to carry; on CUDA copies and kernels overlap."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Generator
from typing import Any, Protocol, Self, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from cmdgpu import ops
from cmdgpu.errors import CmdgpuError, MemoryLimitError
from cmdgpu.memory import show_bytes
from cmdgpu.notation import AnyArray
from cmdgpu.store import format as fmt
from cmdgpu.streaming.plan import SLOT_PADDING
from cmdgpu.streaming.reader import Block

Compute: TypeAlias = Callable[[int, Tensor], list[tuple[Tensor, ...]]]
"""A unit and its (T, rows) block -> the outputs of every fit that lacks it, on the same device."""
Outputs: TypeAlias = list[list[tuple[Tensor, ...]]]
"""Of every unit of a block, on the host."""


class Pending(Protocol):
    """A block under way."""

    def outputs(self) -> Outputs:
        """Wait for it. The host slot is free afterwards."""
        ...


class Device(Protocol):
    ahead: int
    """Blocks that may be under way while another is submitted."""

    def host_slot(self, n_snapshots: int, width: int, dtype: str) -> AnyArray:
        """(T, width) view of host memory blocks are read into; rows are padded apart."""
        ...

    def submit(self, block: Block, rows: int, dtype: str, compute: Compute) -> Pending: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None:
        """Wait for what is under way and let go of the slots."""
        ...


class _Finished:
    def __init__(self, outputs: Outputs) -> None:
        self._outputs = outputs

    def outputs(self) -> Outputs:
        return self._outputs


class CpuDevice:
    """Computes in the host slot itself."""

    ahead = 0

    def host_slot(self, n_snapshots: int, width: int, dtype: str) -> AnyArray:
        return np.empty((n_snapshots, width + SLOT_PADDING), dtype=fmt.storage(dtype).numpy)[:, :width]

    def submit(self, block: Block, rows: int, dtype: str, compute: Compute) -> Pending:
        W_tb = ops.as_tensor(block.W_tb, dtype)
        units = range(block.first, block.stop)
        return _Finished([compute(u, W_tb[:, i * rows : (i + 1) * rows]) for i, u in enumerate(units)])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class CudaDevice:
    """Pinned host slots, two device slots, a copy stream and a compute stream, ordered by events alone."""

    ahead = 1

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copy = torch.cuda.Stream(device)
        self._compute = torch.cuda.Stream(device)
        self._slots: list[Tensor | None] = [None, None]
        self._computed: list[Any] = [None, None]
        self._turn = 0
        self._pinned: dict[int, tuple[Tensor, _PinnedMemory]] = {}

    def host_slot(self, n_snapshots: int, width: int, dtype: str) -> AnyArray:
        stored = fmt.storage(dtype).numpy
        shape = (n_snapshots, width + SLOT_PADDING)
        with torch.cuda.device(self._device):  # a lane's thread begins at the first device
            memory = _PinnedMemory(n_snapshots * shape[1] * stored.itemsize)
        whole = np.frombuffer(memory.pages, dtype=stored, count=shape[0] * shape[1]).reshape(shape)
        self._pinned[whole.ctypes.data] = ops.as_tensor(whole, dtype), memory
        return whole[:, :width]

    def submit(self, block: Block, rows: int, dtype: str, compute: Compute) -> Pending:
        turn, self._turn = self._turn, 1 - self._turn
        host, _ = self._pinned[block.W_tb.ctypes.data]
        target = self._slots[turn]
        if target is None:
            self._require_room(host)
            target = torch.empty(host.shape, dtype=host.dtype, device=self._device)
            self._slots[turn] = target
        n_snapshots, width = block.W_tb.shape
        with torch.cuda.stream(self._copy):
            if (before := self._computed[turn]) is not None:
                self._copy.wait_event(before)
            if width + SLOT_PADDING == host.shape[1]:
                # The whole slot, its padding with it: one transfer.
                target.copy_(host, non_blocking=True)
            else:
                for t in range(n_snapshots):  # contiguous: a strided copy would turn synchronous
                    target[t, :width].copy_(host[t, :width], non_blocking=True)
            copied = self._copy.record_event()
        with torch.cuda.stream(self._compute):
            self._compute.wait_event(copied)
            units = range(block.first, block.stop)
            with in_room(self._device):
                on_device = [compute(u, target[:, i * rows : (i + 1) * rows]) for i, u in enumerate(units)]
            self._computed[turn] = self._compute.record_event()
            on_host = [
                [
                    tuple(_pinned_like(output).copy_(output, non_blocking=True) for output in outputs)
                    for outputs in fits
                ]
                for fits in on_device
            ]
            arrived = self._compute.record_event()
        return _OnItsWay(on_host, on_device, arrived)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        torch.cuda.synchronize(self._device)  # an error may leave copies from the slots under way
        self._slots = [None, None]
        for _, memory in self._pinned.values():
            memory.unpin()
        self._pinned.clear()

    def _require_room(self, host: Tensor) -> None:
        """A device slot may take a third of what is free: there are two, and the kernel's outputs."""
        needed = host.numel() * host.element_size()
        free, _ = torch.cuda.mem_get_info(self._device)
        if 3 * needed > free:
            raise MemoryLimitError(
                f"a block needs {show_bytes(3 * needed)} on {self._device}, {show_bytes(free)} are free",
                hint="give a smaller memory limit, free the device, or use --device cpu",
            )


@contextlib.contextmanager
def in_room(device: torch.device) -> Generator[None]:
    """What of a block does not fit on the device beside its slots, outputs of many fits first of all, as
    MemoryLimitError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryLimitError(
            f"the outputs of a block do not fit on {device} beside it",
            hint="give a smaller memory limit, free the device, or fit fewer at once",
        ) from error


class _PinnedMemory:
    """Pages the device copies from by itself: exactly as many as are asked for.

    torch's own pinned memory comes in powers of two, up to twice of what the plan counts.
    """

    def __init__(self, n_bytes: int) -> None:
        self.pages = mmap.mmap(-1, max(n_bytes, 1))
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self.pages.madvise(mmap.MADV_HUGEPAGE)
        self._address = np.frombuffer(self.pages, dtype=np.uint8).ctypes.data
        code = int(_cudart().cudaHostRegister(self._address, len(self.pages), 0))
        if code != 0:
            raise CmdgpuError(
                f"the driver refuses to pin {show_bytes(n_bytes)} of host memory (CUDA error {code})",
                hint="give a smaller memory limit, or use --device cpu",
            )

    def unpin(self) -> None:
        _cudart().cudaHostUnregister(self._address)


def _cudart() -> Any:
    return cast(Any, torch.cuda).cudart()


class _OnItsWay:
    def __init__(self, on_host: Outputs, on_device: Outputs, arrived: Any) -> None:
        self._on_host = on_host
        self._on_device = on_device  # alive until the copies are through
        self._arrived = arrived

    def outputs(self) -> Outputs:
        self._arrived.synchronize()
        return self._on_host


def _pinned_like(output: Tensor) -> Tensor:
    return torch.empty(output.shape, dtype=output.dtype, pin_memory=True)


def blocks_under_way(device: torch.device) -> int:
    """How many blocks have outputs on the host at a time."""
    return 1 + (CudaDevice if device.type == "cuda" else CpuDevice).ahead


def make_device(device: torch.device) -> Device:
    return CudaDevice(device) if device.type == "cuda" else CpuDevice()
