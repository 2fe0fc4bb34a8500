"""What a checkpoint format promises, and the list of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from cmdgpu.notation import AnyArray
from cmdgpu.registry import Registry


@dataclass(frozen=True)
class TensorInfo:
    """What the header of a checkpoint says of one tensor."""

    dtype: str
    """As torch names it, without ``torch.``: float32, bfloat16, int64, complex64, ..."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checksum:
    """The CRC-32 of some bytes of a file, as the file itself tells it (zlib.crc32 computes the same)."""

    name: str
    """Of these bytes, for the line that says they are damaged."""
    start: int
    stop: int
    crc32: int


class Checkpoint(Protocol):
    """One open checkpoint: its headers are read and checked, its tensors are not."""

    @property
    def path(self) -> Path:
        """What a person would name: the file, or the folder."""
        ...

    @property
    def format(self) -> str: ...

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that the tensors lie in, and the index that names them."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """By the names in the file, in its order; all of them, whatever their type."""
        ...

    @property
    def aliases(self) -> Mapping[str, str]:
        """Names that share another tensor's storage, to the name it is listed under."""
        ...

    @property
    def skipped(self) -> tuple[tuple[str, str], ...]:
        """(name, reason) of what is no tensor, or lies where no model weights are."""
        ...

    @property
    def models(self) -> tuple[str, ...]:
        """Entries of which each could be the model, where there are several; else empty.

        The tensors of each are then listed below its name and a dot, and a prefix has to choose.
        """
        ...

    @property
    def step(self) -> int | None:
        """The step that the file itself tells, e.g. Lightning's ``global_step``."""
        ...

    @property
    def checksums(self) -> Mapping[Path, tuple[Checksum, ...]]:
        """By file of ``files``, in ascending order, without overlap; what is not vouched for is absent.

        Not compared by ``open`` or ``read``: who streams the files through anyway feeds them to
        ``checksums.Check``, so that each byte is read once.
        """
        ...

    @property
    def read_bytes(self) -> int:
        """Memory that one ``read`` takes beside ``out``, at most."""
        ...

    @property
    def held_bytes(self) -> int:
        """Memory that it holds while it is open, beside a name and a header for every tensor."""
        ...

    def read(self, name: str, start: int, stop: int, out: AnyArray) -> None:
        """Elements [start, stop) of a tensor in C order into ``out`` (stop - start,), bits as stored.

        ``out`` has the tensor's type; bfloat16 lies in uint16. Safe from several threads at once.
        """
        ...

    def close(self) -> None: ...


class Format(Protocol):
    def claims(self, path: Path) -> bool:
        """Whether this is such a checkpoint, by its content; the path exists. Executes nothing."""
        ...

    def open(self, path: Path) -> Checkpoint:
        """Raises CheckpointError for what claims to be one and is not whole, or is not safe to read."""
        ...


FORMATS: Final[Registry[Format]] = Registry("checkpoint format")
