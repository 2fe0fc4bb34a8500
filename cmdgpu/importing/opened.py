"""An open checkpoint, as every format leaves it: what the contract asks for, and who reads each tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cmdgpu.errors import CheckpointError, printable
from cmdgpu.importing.contract import Checksum, TensorInfo
from cmdgpu.importing.elements import Elements
from cmdgpu.notation import AnyArray

_MAX_NAME: Final = 4096


@dataclass(frozen=True)
class Opened:
    """Raises CheckpointError for names that no file of ours could hold, and for an alias of nothing."""

    path: Path
    format: str
    files: tuple[Path, ...]
    elements: Mapping[str, Elements]
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    skipped: tuple[tuple[str, str], ...] = ()
    step: int | None = None
    read_bytes: int = 0
    checksums: Mapping[Path, tuple[Checksum, ...]] = field(default_factory=dict[Path, tuple[Checksum, ...]])
    models: tuple[str, ...] = ()
    held_bytes: int = 0
    tensors: Mapping[str, TensorInfo] = field(init=False)

    def __post_init__(self) -> None:
        for name in [*self.elements, *self.aliases]:
            self._check_name(name)
        for alias, name in self.aliases.items():
            if alias in self.elements or name not in self.elements:
                found = f"is said to be another name of {printable(name)!r}, which it cannot be"
                raise CheckpointError(found, file=self.path, tensor=alias)
        object.__setattr__(self, "tensors", {name: e.info for name, e in self.elements.items()})

    def _check_name(self, name: str) -> None:
        if not name or len(name) > _MAX_NAME:
            found = f"a name of {len(name)} characters cannot be kept, 1 to {_MAX_NAME} can"
            raise CheckpointError(found, file=self.path, tensor=name)
        if name.encode(errors="ignore").decode() != name:
            raise CheckpointError("half a surrogate in a name cannot be kept", file=self.path, tensor=name)

    def read(self, name: str, start: int, stop: int, out: AnyArray) -> None:
        self.elements[name].read(start, stop, out)

    def close(self) -> None:
        """Nothing is held open between two reads."""
