"""A small ext4 file system in a file, whose power can be cut.

A cut is the shutdown that ext4 itself offers for such tests: from then on nothing reaches the disk any more,
neither data nor the journal's log. What is there after the next mount is what had been made durable.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Final

_SHUTDOWN: Final = 0x8004587D
"""EXT4_IOC_SHUTDOWN"""
_NO_LOG_FLUSH: Final = 2
_TOOLS: Final = ("mkfs.ext4", "mount", "umount")
_GUARD: Final = 'read -r _; umount -l "$1" 2>/dev/null'
"""Waits for the end of its standard input: of us, however we end."""
COMMIT_S: Final = 5.0
"""How often ext4 commits its journal by itself."""


class Ext4:
    """Mounted at ``root`` for the length of a ``with``; nothing of it is left behind."""

    def __init__(self, folder: Path, size_bytes: int = 64 << 20) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.root = folder / "disk"
        self._image = folder / "disk.img"
        self._size_bytes = size_bytes
        self._guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Ext4:
        with self._image.open("wb") as image:
            image.truncate(self._size_bytes)
        _run("mkfs.ext4", "-q", "-F", self._image)
        self.root.mkdir()
        self._guard = subprocess.Popen(
            ["sh", "-c", _GUARD, "sh", str(self.root)], stdin=subprocess.PIPE, start_new_session=True
        )
        self._mount()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._unmount()
        finally:
            assert self._guard is not None and self._guard.stdin is not None
            self._guard.stdin.close()
            self._guard.wait()
            self._image.unlink()

    def cut_power(self) -> None:
        fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        finally:
            os.close(fd)

    def start_again(self) -> None:
        """Mount what is on the disk, replaying the journal. Whoever had files open must be gone."""
        self._unmount()
        self._mount()

    def _mount(self) -> None:
        # the loop device frees itself when its file system is unmounted
        _run("mount", "-t", "ext4", "-o", "loop", self._image, self.root)

    def _unmount(self) -> None:
        for attempt in range(200):
            if not os.path.ismount(self.root):
                return
            try:
                _run("umount", self.root)
            except OSError:
                if attempt > 100:
                    _run("umount", "-l", self.root)
                time.sleep(0.02)


def why_not() -> str | None:
    """What a power cut needs and is not here; None when all is."""
    if os.geteuid() != 0:
        return "mounting needs root"
    if missing := [tool for tool in _TOOLS if shutil.which(tool) is None]:
        return f"{', '.join(missing)} not found"
    if not Path("/dev/loop-control").exists():
        return "no loop devices"
    return None


def _run(*command: str | Path) -> None:
    """Raises OSError with what the command said."""
    ended = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if ended.returncode:
        raise OSError(f"{command[0]}: {ended.stderr.strip()}")
