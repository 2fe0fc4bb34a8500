"""Byte counts: parse what a person writes, show what a machine counts, measure what a process holds."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from types import TracebackType

import psutil

from cmdgpu.errors import UsageError

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[f"{_letter}B"] = 1000**_power
    _UNITS[f"{_letter}IB"] = 1024**_power
    _UNITS[_letter] = 1000**_power


def parse_bytes(text: int | str) -> int:
    """``"4GiB"``, ``"256 MB"`` or a plain number of bytes.

    Raises UsageError for anything else, zero and negative numbers included.
    """
    if isinstance(text, int):
        number = text
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
        if match is None or match[2].upper() not in _UNITS:
            raise UsageError(f"{text!r} is no number of bytes", hint="write 512MiB, 4GiB or 4000000000")
        number = int(float(match[1]) * _UNITS[match[2].upper()])
    if number <= 0:
        raise UsageError(f"a size of {text} leaves nothing", hint="write 512MiB, 4GiB or more")
    return number


def show_bytes(number: float) -> str:
    """Decimal units, three digits: ``1.23 GB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(number) < 999.5 or unit == "TB":
            return f"{number:.0f} B" if unit == "B" else f"{number:.3g} {unit}"
        number /= 1000
    raise AssertionError("unreachable")


def default_limit() -> int:
    """A quarter of the memory that is free now, at least 256 MiB: training may go on beside the pass."""
    return max(psutil.virtual_memory().available // 4, 256 << 20)


def anonymous_bytes() -> int:
    """Anonymous and shared memory of this process: what a memory limit is about.

    File pages are left out: the kernel takes them back whenever it needs them. Off Linux, where the
    difference is not told, the whole resident set.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return int(psutil.Process().memory_info().rss)
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem") if name in fields) * 1024


class MemoryMeter:
    """Context manager that samples ``anonymous_bytes`` and keeps the peak above where it began."""

    def __init__(self, every_s: float = 0.005) -> None:
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="cmdgpu-memory-meter", daemon=True)
        self.start_bytes = 0
        self.peak_bytes = 0

    @property
    def above_start_bytes(self) -> int:
        return max(self.peak_bytes - self.start_bytes, 0)

    def _sample(self) -> None:
        self.peak_bytes = max(self.peak_bytes, anonymous_bytes())

    def _watch(self) -> None:
        while not self._stop.wait(self._every_s):
            self._sample()

    def __enter__(self) -> MemoryMeter:
        self.start_bytes = self.peak_bytes = anonymous_bytes()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()
