"""The folder of a demo: what it holds, whose it is, and the task that it was about."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from torch import nn

from cmdgpu.comparison import Evaluation
from cmdgpu.demo.digits import evaluation, initial_model, load_digits, split_digits
from cmdgpu.errors import StoreExists, UsageError
from cmdgpu.ops import resolve_device
from cmdgpu.store import durable

MODES: Final = (1, 2, 5, 10)
MARKER: Final = "demo.json"
KIND: Final = "cmdgpu demo"
RUN: Final = "run.zarr"
ACCURACY: Final = "accuracy.png"
PROFILES: Final = "modes.png"
CORRELATION: Final = "correlation.png"
PAGE: Final = "report.html"


@dataclass(frozen=True)
class Task:
    """What a finished demo trained, to compare methods by; see ``cmdgpu.compare``."""

    place: Path
    """The trajectory, or a result of it."""
    model: nn.Module
    evaluate: Evaluation


def task_of(place: Path | str) -> Task:
    """The task of the demo in a folder, or of a trajectory or a result in it.

    Raises UsageError where no demo lies, or none was finished.
    """
    place = Path(place)
    directory = place if _is_demo(place) else place.parent
    if not _is_demo(directory):
        raise UsageError(
            "is nothing that `cmdgpu demo` made", file=place, hint="give its folder, or a store in it"
        )
    made = json.loads((directory / MARKER).read_text(encoding="utf-8"))
    if "seed" not in made:
        raise UsageError("this demo was not finished", file=directory, hint="run `cmdgpu demo` again")
    device = resolve_device(made["device"])
    images = split_digits(load_digits(), made["seed"], device)
    return Task(
        directory / RUN if place == directory else place,
        initial_model(made["seed"], device),
        evaluation(images),
    )


def claim(directory: Path) -> None:
    """Make the directory ours, or refuse before anything in it is touched."""
    if directory.exists() and not directory.is_dir():
        raise StoreExists("is not a directory", file=directory, hint="choose another path")
    if directory.is_dir() and any(directory.iterdir()):
        if not _is_demo(directory):
            found = "already holds a demo" if (directory / RUN).exists() else "holds files that no demo wrote"
            raise StoreExists(found, file=directory, hint="choose another directory or remove it")
        # The marker goes last and is at once written anew: a demo killed here can still be repeated.
        for path in _our_files(directory):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    durable.make_directory(directory)
    write_marker(directory, {"kind": KIND})


def _is_demo(directory: Path) -> bool:
    try:
        marker: object = json.loads((directory / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(marker, dict) and cast(dict[str, object], marker).get("kind") == KIND


def _our_files(directory: Path) -> list[Path]:
    """What a demo leaves behind, finished or killed, apart from the marker."""
    names = [RUN, *(result_name(n_modes) for n_modes in MODES), ACCURACY, PROFILES, CORRELATION, PAGE]
    found = [directory / name for name in names if os.path.lexists(directory / name)]
    for name in [*names, MARKER]:
        found.extend(directory.glob(f"{name}.*{durable.PARTIAL}"))
    return found


def result_name(n_modes: int) -> str:
    return f"modes-{n_modes}.cmd.zarr"


def write_marker(directory: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    durable.write_file(directory, MARKER, [text.encode()])
