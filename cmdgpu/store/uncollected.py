"""Many objects at once, without the collector of cycles looking at all there are every few hundred."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Generator


@contextlib.contextmanager
def uncollected() -> Generator[None]:
    """For what makes no cycles: with torch imported, a layout of 46,000 tensors takes a third of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
