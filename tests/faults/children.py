"""A child process that is talked to line by line: told to go, listened to, stopped, killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parent.parent.parent


class Child:
    """``python -m <module> <arguments>``; killed at the end of the ``with``, whatever state it is in.

    What it writes to stderr comes between its lines, so that a traceback shows where a test looks.
    """

    def __init__(self, module: str, *arguments: str | Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        self.said: list[str] = []

    @property
    def pid(self) -> int:
        return self._process.pid

    def hear(self) -> str:
        """The next line; empty when there will be none."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            self.said.append(line.strip())
        return line.strip()

    def hear_until(self, word: str) -> str:
        """Listen up to the first line that begins with ``word``."""
        while line := self.hear():
            if line.startswith(word):
                return line
        raise AssertionError(f"never said {word}: {self.said}")

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def wait_until_stopped(self) -> None:
        """By its own hand: a child of a test sends SIGSTOP to itself where the test wants it."""
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            self._process.returncode = os.waitstatus_to_exitcode(status)
            self.end()
            raise AssertionError(f"ended instead of stopping: {self.said}")

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> int:
        """Listen to the end; the exit code."""
        while self.hear():
            pass
        code = self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            if not stream.closed:
                stream.close()
        return code

    def numbers(self, word: str) -> list[int]:
        """The numbers of all lines ``<word> <number>`` so far."""
        found = (re.fullmatch(rf"{word} (\d+)", line) for line in self.said)
        return [int(match[1]) for match in found if match]

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.stdout is not None and not self._process.stdout.closed:
            self.kill()
            self.end()
