"""The libraries the build hook left: which there are, which this CPU runs, and why not the others.

One per instruction set, each an implementation of its own, so that any of them can be asked for by name on a
machine that has a better one. A call by ctypes lets go of the interpreter's lock.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import platform
from pathlib import Path
from typing import Any, Final

import torch

from cmdgpu_kernels.dispatch import Problem

__all__ = ["LINE", "PATHS", "aligned", "load", "reads_files", "refusals"]

LIBRARIES: Final = Path(__file__).with_name("lib")
SOURCE: Final = Path(__file__).with_name("native.cpp")

PATHS: Final = {
    # What the psABI level of the library may use and the kernels profit from; all of a level come together.
    "avx512": frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx2", "fma", "bmi2"}),
    "avx2": frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "movbe"}),
    "baseline": frozenset[str](),
}
"""Libraries, best first, and the features of a CPU each needs."""

LINE: Final = 64
"""Bytes of a cache line."""


def refusals(path: str, problem: Problem) -> tuple[str, ...]:
    """Every reason why the library for ``path`` cannot serve the problem, element types aside."""
    reasons: list[str] = []
    if problem.device != "cpu":
        reasons.append(f"needs the CPU, got {problem.device!r}")
    if absent := _absent(path):
        reasons.append(absent)
    return tuple(reasons)


@functools.cache
def _absent(path: str) -> str | None:
    """Why the library cannot be used on this machine, or None."""
    report = LIBRARIES / "report.txt"
    library = LIBRARIES / f"{path}.so"
    if not library.exists():
        if not report.exists():
            return "this installation was built without compiled kernels"
        lines = report.read_text().splitlines()
        return next((line for line in lines if line.startswith(f"{path}: ")), lines[0])
    if missing := sorted(PATHS[path] - _features()):
        return f"this CPU lacks {', '.join(missing)}"
    try:
        found = load(path)
    except OSError as error:
        return f"{library.name} cannot be loaded: {error}"
    found.cmdgpu_source.restype = ctypes.c_char_p
    if found.cmdgpu_source().decode() != hashlib.sha256(SOURCE.read_bytes()).hexdigest():
        return f"{library.name} was built from another native.cpp: install cmdgpu again"
    return None


@functools.cache
def _features() -> frozenset[str]:
    """Flags of the CPU; none where they cannot be learnt."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            name, _, flags = line.partition(":")
            if name.strip() == "flags":
                return frozenset(flags.split())
    if platform.machine().lower() in ("x86_64", "amd64"):
        # Torch names what it found in the same steps; asked only where the system is not Linux.
        capability = torch.backends.cpu.get_cpu_capability()
        return frozenset[str]().union(*(PATHS[path] for path in PATHS if path.upper() == capability))
    return frozenset()


@functools.cache
def load(path: str) -> Any:
    """The library for ``path``. Raises OSError."""
    return ctypes.CDLL(str(LIBRARIES / f"{path}.so"))


def reads_files(path: str) -> bool:
    """Whether that library's instruction set has the CRC of files."""
    library = load(path)
    library.cmdgpu_can_read.restype = ctypes.c_int64
    return bool(library.cmdgpu_can_read())


def aligned(address: int) -> int:
    """The first cache line that begins at ``address`` or after it."""
    return -(-address // LINE) * LINE
