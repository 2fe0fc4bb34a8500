"""What a trainer logged, as the scalars of a snapshot."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Final, cast

import numpy as np
from torch import Tensor

from cmdgpu.store import format as fmt

_LONGEST: Final = 64


def scalars(logged: Mapping[str, object]) -> dict[str, float]:
    """The numbers of a log, under names that a series can have; what is no number is left out.

    ``train/loss`` becomes ``train_loss``: a character that no name may hold is an underscore. A name that is
    reserved gets one at its end, and of names that become the same the later ones get a number.
    """
    found: dict[str, float] = {}
    for name, value in logged.items():
        if (number := _number(value)) is not None:
            found[_free_name(name, found)] = number
    return found


def _number(value: object) -> float | None:
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        array = cast(Any, value)
        value = array.item() if math.prod(array.shape) == 1 else None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _free_name(name: str, taken: Mapping[str, float]) -> str:
    plain = re.sub(r"[^A-Za-z0-9_]", "_", name)[:_LONGEST] or "_"
    if plain[0].isdigit():
        plain = f"_{plain}"[:_LONGEST]
    if plain in fmt.RESERVED:
        plain += "_"
    free, count = plain, 1
    while free in taken:
        count += 1
        free = f"{plain[: _LONGEST - 4]}_{count}"
    return free
