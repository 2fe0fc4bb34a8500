"""Steps and other lists of numbers as a person writes them on a command line."""

from __future__ import annotations

import re

from cmdgpu.errors import UsageError


def parse_numbers(option: str, text: str) -> list[int]:
    """``"2,5,10"`` -> [2, 5, 10], ``"0:5"`` -> [0, 1, 2, 3, 4]. Raises UsageError naming the option."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?::(\d{1,9}))?\s*", part)
        if match is None or (match[2] and int(match[2]) <= int(match[1])):
            raise UsageError(f"{option} {text!r} is no list of numbers", hint="write 10, or 2,5,10, or 0:5")
        found.extend(range(int(match[1]), int(match[2]) if match[2] else int(match[1]) + 1))
    return found


def parse_steps(text: str | None) -> list[int] | None:
    """``"0,100,200"`` -> [0, 100, 200]. Raises UsageError naming what is no step."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--steps {text!r} is no list of steps", hint="write 0,100,200") from error
