"""The one door to the kernels: devices, element types, arrays <-> tensors, refusals as errors of ours."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from typing import Any, Protocol

import cmdgpu_kernels as kernels
import numpy as np
import torch
from cmdgpu_kernels import References, RowFit, class_sums
from cmdgpu_kernels.native import files
from cmdgpu_kernels.workers import run_in_workers
from torch import Tensor

from cmdgpu.errors import CmdgpuError, KernelError, UsageError
from cmdgpu.notation import AnyArray

__all__ = [
    "References",
    "RowFit",
    "as_tensor",
    "assign_and_fit",
    "can_fit_files",
    "choose",
    "class_sums",
    "device_class",
    "files",
    "files_workspace_bytes",
    "fit_files",
    "prepare_references",
    "resolve_device",
    "resolve_devices",
    "run_in_workers",
    "triton_version",
    "workspace_bytes",
]


class ChunkFiles(Protocol):
    """Files of one size in one directory, and the CRC-32C that each must carry and have."""

    @property
    def directory(self) -> str: ...
    @property
    def names(self) -> Sequence[str]: ...
    @property
    def n_bytes(self) -> int: ...
    @property
    def kept(self) -> Sequence[bytes]: ...


def resolve_device(name: str) -> torch.device:
    """``auto`` is the first CUDA device, else the CPU.

    Raises UsageError for a name that is no device, CmdgpuError for a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"no device named {name!r}", hint="have: auto, cpu, cuda, cuda:0, ...") from error
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise UsageError(f"a pass cannot run on {name!r}", hint="have: auto, cpu, cuda, cuda:0, ...")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device.index or 0
    if index >= count:
        raise CmdgpuError(f"asked for {name}, found {count} CUDA devices", hint="use --device cpu")
    return torch.device("cuda", index)


def resolve_devices(names: str) -> list[torch.device]:
    """``cuda`` is every CUDA device, ``cuda:0,cuda:1`` these; any other name is the one device it names.

    Raises UsageError for a device that is named twice, CmdgpuError for one that is not there and for devices
    of several classes, which would not leave the same bits.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if names == "cuda" and count:
        names = ",".join(f"cuda:{i}" for i in range(count))
    devices = [resolve_device(name.strip()) for name in names.split(",")]
    if len(set(devices)) < len(devices):
        raise UsageError(f"{names!r} names a device twice", hint="name each once: cuda:0,cuda:1")
    classes = {device_class(device) for device in devices} if len(devices) > 1 else set[str]()
    if len(classes) > 1:
        raise CmdgpuError(
            f"{names} are devices of several classes ({', '.join(sorted(classes))})",
            hint="their bits differ: choose devices of one class",
        )
    return devices


def device_class(device: torch.device) -> str:
    """Devices of one class give the same bits; part of a result's fingerprint."""
    if device.type == "cuda":
        return f"cuda {torch.cuda.get_device_name(device)}"
    kernel, _ = choose("float32", 16, 2, device)
    return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()} {kernel}"


def triton_version() -> str | None:
    """Version of triton, or None where it is not installed: it decides which kernel runs."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def as_tensor(values: AnyArray, dtype: str) -> Tensor:
    """Stored elements as a tensor over the same memory; bfloat16 patterns become bfloat16."""
    tensor = torch.as_tensor(values)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def choose(
    dtype: str, n_snapshots: int, n_modes: int, device: torch.device
) -> tuple[str, dict[str, tuple[str, ...]]]:
    """Name of the implementation that will run, and the reasons of those that refused before it."""
    try:
        implementation, refusals = kernels.choose(_problem(dtype, n_snapshots, n_modes, device))
    except kernels.NoKernelError as error:
        raise KernelError(str(error)) from error
    return implementation.name, dict(refusals)


def workspace_bytes(dtype: str, n_snapshots: int, n_modes: int, device: torch.device, threads: int) -> int:
    """Host memory the implementation that will run needs beside its input and outputs."""
    return kernels.workspace_bytes(_problem(dtype, n_snapshots, n_modes, device), threads)


def can_fit_files(dtype: str, n_snapshots: int, n_modes: int) -> bool:
    """Whether the CPU's implementation takes a block straight from its files."""
    return kernels.can_fit_files(choose(dtype, n_snapshots, n_modes, torch.device("cpu"))[0])


def fit_files(
    dtype: str,
    references: Sequence[References],
    chunks: ChunkFiles,
    rows: int,
    coming: Sequence[str] | None,
    *,
    past_cache: bool,
) -> list[RowFit] | None:
    """``assign_and_fit`` of the first rows of files, one per snapshot, against some sets of references.

    The files are read once. The fits of one set each, in that order, with the bits they have alone and one
    tensor ``ss`` for all; None when a file is not what it must be. ``coming`` names the files that this
    thread will ask for next; ``past_cache`` leaves the page cache to others.
    """
    modes = sum(one.modes for one in references)
    name, _ = choose(dtype, references[0].snapshots, modes, torch.device("cpu"))
    return kernels.fit_files(
        name,
        dtype,
        references,
        chunks.directory,
        chunks.names,
        chunks.n_bytes,
        chunks.kept,
        rows,
        coming,
        past_cache=past_cache,
    )


def files_workspace_bytes(
    dtype: str, n_snapshots: int, modes: Sequence[int], threads: int, *, past_cache: bool = False
) -> int:
    """Memory of ``threads`` calls of ``fit_files`` beside their outputs; ``modes`` of every set."""
    problem = _problem(dtype, n_snapshots, sum(modes), torch.device("cpu"))
    files = kernels.files_workspace_bytes(problem, threads, past_cache=past_cache)
    return files + kernels.workspace_bytes(problem, threads)


def _problem(dtype: str, n_snapshots: int, n_modes: int, device: torch.device) -> kernels.Problem:
    return kernels.Problem(dtype=dtype, snapshots=n_snapshots, modes=n_modes, device=device.type)


def prepare_references(R_mt: AnyArray) -> References:
    """Centre and normalise the reference profiles once, in float64; every block uses the same ones."""
    try:
        return kernels.prepare_references(np.asarray(R_mt))
    except ValueError as error:
        raise UsageError(str(error)) from error


def assign_and_fit(
    W: Tensor | AnyArray,
    references: References | AnyArray,
    *,
    time_major: bool = True,
    device: str | torch.device | None = None,
    implementation: str | None = None,
) -> RowFit:
    """Mode, a, b, correlation and ss of every row of a block in memory; see ``cmdgpu_kernels``.

    W is (T, B) when ``time_major``, else (B, T); it is moved to ``device`` when one is given, and the answer
    comes back to the CPU then. Raises KernelError with every candidate's reasons when none accepts W,
    UsageError for shapes that disagree, references that never move, an unknown implementation.
    """
    tensor: Any = torch.as_tensor(W)
    if device is not None:
        tensor = tensor.to(device)
    try:
        fit = kernels.assign_and_fit(tensor, references, time_major=time_major, implementation=implementation)
    except kernels.NoKernelError as error:
        raise KernelError(str(error)) from error
    except ValueError as error:
        raise UsageError(str(error)) from error
    if device is None:
        return fit
    return RowFit(fit.mode.cpu(), fit.a.cpu(), fit.b.cpu(), fit.correlation.cpu(), fit.ss.cpu(), None)
