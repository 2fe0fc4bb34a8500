"""The attributes of a result's group document: believed once every field has the type it was written with."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from cmdgpu.errors import StoreCorrupt
from cmdgpu.profiles import MAX_ROUNDS, OBJECTIVES, REFERENCES
from cmdgpu.results.contract import MOST_PATTERNS, Frame
from cmdgpu.results.modes import MODE_ARRAYS, REFINING
from cmdgpu.store import format as fmt
from cmdgpu.store.parameter_map import ParameterMap
from cmdgpu.store.places import Place

_CONFIG: Final[dict[str, tuple[type, ...]]] = {
    "n_modes": (int, type(None)),
    "threshold": (int, float, type(None)),
    "n_samples": (int,),
    "sampling": (str,),
    "affinity": (str,),
    "random_state": (int,),
}
_SAID: Final[dict[str, Sequence[Any]]] = {
    "buffers": ("skip",),
    "references": REFERENCES[1:],
    "refine": range(1, MAX_ROUNDS + 1),
    "objective": OBJECTIVES,
}
"""Settings that are said where they are not the usual ones."""
_MAX_UNITS: Final = 1 << 22
"""More units than any fit has at its default size: 10^12 rows."""
_MAX_PATTERN: Final = 4096
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_HEX = re.compile(r"[0-9a-f]{64}")


def read_head(path: Place) -> tuple[fmt.Json, dict[str, Any], Frame]:
    """(document, its ``cmdgpu`` attribute, the frame) of a result. Raises NotAStore, StoreCorrupt."""
    file = path / fmt.DOCUMENT
    document, _ = fmt.read_document(file, "group", "result")
    head: dict[str, Any] = document["attributes"]["cmdgpu"]

    def require(condition: bool, what: str) -> None:
        if not condition:
            raise StoreCorrupt(f"unexpected metadata of a result: {what}", file=file)

    require(head.get("status") in ("incomplete", "complete"), "status")
    require(_is_hex(head.get("fingerprint")), "fingerprint")
    digests = fmt.as_dict(head.get("digests")) or {}
    require(set(digests) == set(MODE_ARRAYS) and all(map(_is_hex, digests.values())), "digests")
    steps = fmt.as_list(head.get("steps"))
    require(
        steps is not None
        and all(type(step) is int and 0 <= step < 1 << 63 for step in steps)
        and all(a < b for a, b in itertools.pairwise(steps)),
        "steps",
    )
    units = fmt.as_dict(head.get("units")) or {}
    rows = units.get("rows")
    rows = rows if type(rows) is int else 0
    require(0 < rows <= fmt.MAX_CHUNK_BYTES // 4, "rows of a unit")
    frame = Frame(ParameterMap.from_json(head.get("layout"), file), np.array(steps, dtype=np.int64), rows)
    require(units.get("count") == frame.n_units <= _MAX_UNITS, "number of units")
    source = fmt.as_dict(head.get("source")) or {}
    require(source.get("dtype") in tuple(fmt.STORAGES) and source.get("steps") == steps, "source")
    params = fmt.as_list(head.get("params", []))
    require(
        params is not None
        and len(params) <= MOST_PATTERNS
        and all(isinstance(p, str) and p.isprintable() and len(p) <= _MAX_PATTERN for p in params)
        and bool(params) == ("tensors" in source)  # said only of a fit of some tensors
        and _is_hex(source.get("tensors", "0" * 64)),
        "params",
    )
    require("origin" in head, "origin")
    origin = head["origin"]
    require(origin is None or (isinstance(origin, str) and len(origin) <= 4096), "origin")
    config = fmt.as_dict(head.get("config")) or {}
    require(
        set(config) - set(_SAID) == set(_CONFIG)
        and all(type(config[key]) in kinds for key, kinds in _CONFIG.items())
        and all(_is_one_of(config[key], known) for key, known in _SAID.items() if key in config)
        and ("objective" in config) == bool({"references", "refine"} & set(config))
        and all(_NAME.fullmatch(value) for value in config.values() if isinstance(value, str)),
        "config",
    )
    require(_is_refinement(head, config.get("refine", 0)), "refinement")
    code = fmt.as_dict(head.get("code")) or {}
    require(bool(code) and all(isinstance(value, str | None) for value in code.values()), "code")
    metrics = fmt.as_dict(head.get("metrics"))
    require((metrics is not None) == (head["status"] == "complete") and _are_numbers(metrics), "metrics")
    return document, head, frame


def _is_one_of(value: object, known: Sequence[Any]) -> bool:
    return type(value) is type(known[0]) and value in known


def _is_refinement(head: Mapping[str, Any], rounds: int) -> bool:
    """What is said of rounds of refinement: where there are any, and more of them only before the units."""
    values = fmt.as_list(head.get("refinement", []))
    return (
        values is not None
        and ("refinement" in head) == bool(rounds)
        and all(type(value) is float for value in values)
        and len(values) <= rounds + 1
        and all(a <= b for a, b in itertools.pairwise(values))
        and (REFINING not in head or (head["status"] == "incomplete" and _is_hex(head[REFINING])))
    )


def _are_numbers(value: object) -> bool:
    """Numbers and nothing, in objects and lists of them: nothing a terminal would act on."""
    if (inner := fmt.as_dict(value)) is not None:
        return all(_NAME.fullmatch(key) and _are_numbers(part) for key, part in inner.items())
    if (parts := fmt.as_list(value)) is not None:
        return all(map(_are_numbers, parts))
    return value is None or type(value) in (int, float)


def _is_hex(value: object) -> bool:
    return isinstance(value, str) and _HEX.fullmatch(value) is not None
