"""The Chromium of this machine, for the README's picture of a report and for the tests of the page."""

from __future__ import annotations

import os
import shutil
from typing import Final

NAMES: Final = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS: Final = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
)
"""Of a browser that runs as root in a container and asks nobody for anything."""


def chromium_path() -> str | None:
    """Its path: what CMDGPU_CHROMIUM says, else the first of NAMES that is installed."""
    return os.environ.get("CMDGPU_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
