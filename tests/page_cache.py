"""What Linux holds of a file in memory."""

import ctypes
import mmap
import os
from pathlib import Path


def evict(file: Path) -> bool:
    """Whether the page cache let go of it, and would say so."""
    fd = os.open(file, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return not is_cached(file)
    finally:
        os.close(fd)


def is_cached(file: Path) -> bool:
    held = (ctypes.c_ubyte * 1)(2)
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as pages:
        address = ctypes.addressof(first := ctypes.c_char.from_buffer(pages))
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(1), held) == 0
        del first
    return bool(held[0] & 1)
