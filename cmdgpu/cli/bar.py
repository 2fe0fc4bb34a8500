"""Progress a person can read: a bar with throughput and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from cmdgpu.memory import show_bytes
from cmdgpu.progress import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


_QUIET_S = 1.0
"""Lines closer together than this help nobody: work of a moment prints its last line only."""


class LineProgress:
    """One line per 10 %: for logs and pipes."""

    def __init__(self, things: str | None = None) -> None:
        """``things`` are counted instead of bytes."""
        self._things = things
        self._what = ""
        self._total = self._done = self._shown = 0
        self._started = self._printed = 0.0

    def begin(self, what: str, total_bytes: int) -> None:
        self._what, self._total, self._done, self._shown = what, total_bytes, 0, 0
        self._started = self._printed = time.perf_counter()

    def advance(self, done_bytes: int) -> None:
        self._done += done_bytes
        tenth = 10 * self._done // self._total if self._total else 10
        now = time.perf_counter()
        if tenth <= self._shown or (tenth < 10 and now - self._printed < _QUIET_S):
            return
        self._shown, self._printed = tenth, now
        seconds = max(now - self._started, 1e-9)
        speed = self._done / seconds
        left = (self._total - self._done) / speed if speed else 0.0
        if self._things is None:
            amount = f"{show_bytes(self._done)} of {show_bytes(self._total)}  {speed / 1e9:.2f} GB/s"
        else:
            amount = f"{self._done} of {self._total} {self._things}  {speed:.3g} {self._things}/s"
        click.echo(f"{self._what}  {10 * tenth:3d} %  {amount}  {max(left, 0.0):.0f} s left", err=True)

    def end(self) -> None:
        return


class _Bar:
    """A rich bar, drawn on stderr."""

    def __init__(self, things: str | None = None) -> None:
        self._things = things
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def begin(self, what: str, total_bytes: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            ProgressColumn,
            Task,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as Bar
        from rich.text import Text

        things = self._things

        class Pace(ProgressColumn):
            """Things per second."""

            def render(self, task: Task) -> Text:
                return Text(f"{things}  {task.speed or 0.0:.3g} {things}/s")

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            *(
                (DownloadColumn(), TransferSpeedColumn())
                if things is None
                else (MofNCompleteColumn(), Pace())
            ),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task(what, total=total_bytes)
        self._bar.start()

    def advance(self, done_bytes: int) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, done_bytes)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def terminal_progress() -> Progress:
    return _Bar()


def counting(progress: Progress, things: str) -> Progress:
    """The same way of telling, for work that counts ``things`` and no bytes."""
    return type(progress)(things) if isinstance(progress, (LineProgress, _Bar)) else progress
