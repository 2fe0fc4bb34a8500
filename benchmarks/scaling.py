"""How time grows along one axis: families of cases that differ in nothing else, and their exponents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

AXES = {"modes": "M", "rows": "N", "snapshots": "T", "threads": "threads"}
_FIXED = ("snapshots", "rows", "modes", "dtype", "threads")


@dataclass(frozen=True)
class Curve:
    """One provider's times along one axis."""

    axis: str
    provider: str
    chosen: bool
    fixed: str
    """What all points share, in words."""
    x: tuple[float, ...]
    ms: tuple[float, ...]
    """Of all rows: a run on fewer of them is scaled up, the work is linear in rows."""
    gb_per_s: tuple[float, ...]
    ceiling_gb_per_s: tuple[float, ...]

    @property
    def exponent(self) -> float | None:
        """p of time ~ x^p, or None where fewer than two points are left to fit it."""
        x, ms = self.beyond_memory()
        return slope(x, ms) if len(x) > 1 else None

    def beyond_memory(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The points beyond the memory-bound region.

        More modes are free while reading W takes longer than multiplying it. They have begun to cost where
        the time is twice that of the fewest. N and T carry bytes and work alike: all points count.
        """
        if self.axis != "modes":
            return self.x, self.ms
        kept = [(x, ms) for x, ms in zip(self.x, self.ms, strict=True) if ms >= 2 * self.ms[0]]
        return tuple(x for x, _ in kept), tuple(ms for _, ms in kept)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least squares through the logarithms."""
    log_x, log_y = np.log(np.asarray(x)), np.log(np.asarray(y))
    log_x -= log_x.mean()
    return float((log_x * (log_y - log_y.mean())).sum() / (log_x * log_x).sum())


def curves(records: Sequence[dict[str, Any]]) -> list[Curve]:
    """The longest family of every axis, a curve per provider."""
    timed = [r for r in records if r["operation"] == "assign_and_fit" and r["median_ms"] is not None]
    found: list[Curve] = []
    for axis in AXES:
        families: dict[tuple[Any, ...], set[float]] = {}
        for r in timed:
            families.setdefault(_others(r, axis), set()).add(r[axis])
        if not families:
            continue
        best = max(families, key=lambda family: len(families[family]))
        if len(families[best]) < 2:
            continue
        members = [r for r in timed if _others(r, axis) == best]
        found += [_curve(axis, name, members) for name in dict.fromkeys(r["provider"] for r in members)]
    return found


def _others(r: dict[str, Any], axis: str) -> tuple[Any, ...]:
    return tuple(r[name] for name in _FIXED if name != axis)


def _curve(axis: str, provider: str, members: Sequence[dict[str, Any]]) -> Curve:
    points = sorted((r for r in members if r["provider"] == provider), key=lambda r: r[axis])
    return Curve(
        axis=axis,
        provider=provider,
        chosen=any(r["chosen"] for r in points),
        fixed=" ".join(_said(name, points[0][name]) for name in _FIXED if name != axis),
        x=tuple(float(r[axis]) for r in points),
        ms=tuple(r["median_ms"] * r["rows"] / r["rows_run"] for r in points),
        gb_per_s=tuple(r["gb_per_s"] for r in points),
        ceiling_gb_per_s=tuple(r["ceiling_gb_per_s"] for r in points),
    )


def _said(name: str, value: Any) -> str:
    return f"{AXES[name]}={value}" if name in AXES else str(value)
