"""Steps as a person writes them on a command line."""

from __future__ import annotations

from cmdgpu.errors import UsageError


def parse_steps(text: str | None) -> list[int] | None:
    """``"0,100,200"`` -> [0, 100, 200]. Raises UsageError naming what is no step."""
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--steps {text!r} is no list of steps", hint="write 0,100,200") from error
