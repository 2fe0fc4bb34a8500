"""What can go wrong, as one tree. ``str(error)`` is the line a person reads.

Every error says what was asked, what was found and what would work, and carries the places it
speaks of as fields, so that ``--json`` can print them apart.
"""

from __future__ import annotations

from typing import Any, ClassVar


class CmdgpuError(Exception):
    """Root of the tree.

    The text reads ``<file>: tensor '<name>' at step <s>: <message>; <hint>``, absent parts left out.
    """

    remedy: ClassVar[str | None] = None
    """The hint of an error of this kind that has none of its own."""

    def __init__(
        self,
        message: str,
        *,
        file: object = None,
        tensor: str | None = None,
        step: int | None = None,
        hint: str | None = None,
    ) -> None:
        self.message = message
        self.file = None if file is None else str(file)
        self.tensor = tensor
        self.step = step
        self.hint = self.remedy if hint is None else hint
        super().__init__(self._line())

    def __reduce__(self) -> tuple[Any, ...]:
        fields = {"file": self.file, "tensor": self.tensor, "step": self.step, "hint": self.hint}
        return _rebuilt, (type(self), self.message, fields)

    def _line(self) -> str:
        where: list[str] = []
        if self.file is not None:
            where.append(self.file)
        if self.tensor is not None and self.step is not None:
            where.append(f"tensor '{printable(self.tensor)}' at step {self.step}")
        elif self.tensor is not None:
            where.append(f"tensor '{printable(self.tensor)}'")
        elif self.step is not None:
            where.append(f"step {self.step}")
        line = ": ".join([*where, self.message])
        return line if self.hint is None else f"{line}; {self.hint}"


def _rebuilt(kind: type[CmdgpuError], message: str, fields: dict[str, Any]) -> CmdgpuError:
    """An error that comes from another process."""
    return kind(message, **fields)


def printable(name: str, limit: int = 120) -> str:
    """A tensor name is data from a file: escape what a terminal would act on, cut what is absurd."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name[:limit])
    return shown if len(name) <= limit else f"{shown}… ({len(name)} characters)"


class UsageError(CmdgpuError):
    """The request contradicts itself or names what cannot exist; nothing was opened (exit code 2)."""


class NotAStore(CmdgpuError):
    """The path holds no store of ours, or one of another format version."""


class StoreCorrupt(CmdgpuError):
    """Bytes on disk are missing, cut, swapped, stale or flipped."""

    remedy = "`cmdgpu verify` lists all damage and says what to do"


class StoreExists(CmdgpuError):
    """Something is already there, and it is not what would be written."""


class StoreLocked(CmdgpuError):
    """Another writer holds the store."""


class StoreFenced(CmdgpuError):
    """Another writer committed to the store behind our back."""


class DurabilityUnknown(CmdgpuError):
    """The disk failed after the commit became visible: reopen to learn which snapshots exist."""


class RankLost(CmdgpuError):
    """A rank of a training job is gone or does not answer, while all of them record one snapshot."""


class WorkerLost(CmdgpuError):
    """Workers of a fit are gone, or nothing was done for longer than anybody waits."""


class RemoteFailed(CmdgpuError):
    """A server does not answer, or refuses: of the bytes that lie there it says nothing."""

    remedy = "check the URL, the credentials in the environment and the network, then run it again"


class WriteFailed(CmdgpuError):
    """The disk refused a write; what was visible before is visible still."""


class ModelMismatch(CmdgpuError):
    """The model and the store disagree on a tensor."""


class UnsupportedTensor(CmdgpuError):
    """A tensor of a kind that has no place in a trajectory."""


class CheckpointError(CmdgpuError):
    """A checkpoint is not whole, not what it claims to be, or cannot be read without executing it."""


class StepNotFound(CmdgpuError):
    """No snapshot of that step is recorded or selected."""


class MemoryLimitError(CmdgpuError):
    """The smallest plan needs more memory than the limit grants."""

    needed_bytes: int = 0
    """The least that would have done, where that is known."""


class KernelError(CmdgpuError):
    """No kernel accepts the problem; the text lists each one with its reasons."""


class CmdgpuWarning(UserWarning):
    """Something a person should know that does not stop the work."""
