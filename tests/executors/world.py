"""A trajectory of twelve blocks, what a fit of it by one process leaves, and what workers are made to do.

The functions of the second half are sent to workers, or run in a process of their own.
"""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

from cmdgpu.decomposition import CMD
from cmdgpu.errors import CmdgpuError, StoreCorrupt
from cmdgpu.results import StoredWriter
from cmdgpu.trajectory import Trajectory
from tests.harness import Ticks, planted, write_store
from tests.verbs import tree_bytes

ROWS: Final = 256
UNITS: Final = 12


def digest(out: Path) -> str:
    """SHA-256 over every file of a result, names included."""
    return hashlib.sha256(repr(sorted(tree_bytes(out).items())).encode()).hexdigest()


def cmd(seed: int = 0) -> CMD:
    return CMD(n_modes=3, n_samples=60, random_state=seed, device="cpu")


@dataclass(frozen=True)
class World:
    folder: Path
    expected: str
    """Digest of the fit by one process."""

    @property
    def store(self) -> Path:
        return self.folder / "s.zarr"

    def out(self, folder: Path) -> Path:
        """A place for a fit, with the trajectory beside it: the way to it is in the result."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "s.zarr").symlink_to(self.store)
        return folder / "out.zarr"

    def fit(self, out: Path, executor: object = None, **options: Any) -> CMD:
        return cmd().fit(Trajectory.open(out.parent / "s.zarr"), out, executor=executor, **options)


def make_world(folder: Path) -> World:
    write_store(folder / "s.zarr", planted(ROWS * UNITS - 100, 6, 4, noise=0.3), rows=ROWS)
    cmd().fit(Trajectory.open(folder / "s.zarr"), folder / "alone.zarr")
    return World(folder, digest(folder / "alone.zarr"))


class Midway(Ticks):
    """Does something once, when so many blocks are done."""

    def __init__(self, blocks: int, do: Callable[[], object]) -> None:
        super().__init__()
        self._at, self._do = blocks, do
        self.left: int | None = None
        """What was still to come then."""

    def advance(self, done_bytes: int) -> None:
        super().advance(done_bytes)
        if done_bytes and self.advances == self._at:
            self.left = self.total - self.done
            self._do()


# ---- what workers are made to do ----------------------------------------------------------------------


def write_slowly(seconds: float) -> None:
    """Every unit takes so long, in this process, from now on; the real one when it is 0."""
    patch.stopall()
    if seconds:
        write = StoredWriter.write

        def late(writer: StoredWriter, *arguments: Any) -> None:
            time.sleep(seconds)
            write(writer, *arguments)

        patch.object(StoredWriter, "write", late).start()


def fall_asleep_at(unit: int) -> None:
    """Stop this process in the middle of the write of a unit, as if its machine slept."""
    write = StoredWriter.write

    def sleep(writer: StoredWriter, here: int, *arguments: Any) -> None:
        if here >= unit:
            patch.stopall()
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        write(writer, here, *arguments)

    patch.object(StoredWriter, "write", sleep).start()


def double(block: int) -> int:
    return 2 * block


def how_many_threads(block: int) -> int:
    import torch

    del block
    return torch.get_num_threads()


def die(block: object) -> None:
    del block
    os.kill(os.getpid(), signal.SIGKILL)


def sleep(block: float) -> float:
    time.sleep(block)
    return block


def fail(block: int) -> None:
    raise StoreCorrupt(f"block {block} is damaged", file="s.zarr/weights/c.1.2", tensor="fc.weight", step=7)


def fail_otherwise(block: int) -> None:
    raise ZeroDivisionError(f"block {block}")


def forget_cmdgpu() -> None:
    """As if the package were not installed on this worker."""
    import sys

    sys.modules["cmdgpu.streaming.jobs"] = None  # pyright: ignore[reportArgumentType]


def remember_cmdgpu() -> None:
    import sys

    sys.modules.pop("cmdgpu.streaming.jobs")


def line_of(error: CmdgpuError) -> str:
    assert "\n" not in str(error)
    return str(error)
