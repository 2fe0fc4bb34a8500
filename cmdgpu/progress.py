"""How long work tells that it moves: a callback, never code in the hot loop."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told by the loops that take long; draws a bar, prints lines, or does nothing."""

    def begin(self, what: str, total_bytes: int) -> None:
        """Work named ``what`` starts; ``total_bytes`` lie before it."""
        ...

    def advance(self, done_bytes: int) -> None:
        """``done_bytes`` more are behind us."""
        ...

    def end(self) -> None:
        """The work begun last is over, finished or not."""
        ...


class Silent:
    """The default: says nothing."""

    def begin(self, what: str, total_bytes: int) -> None:
        del what, total_bytes

    def advance(self, done_bytes: int) -> None:
        del done_bytes

    def end(self) -> None:
        return
