"""What a landscape found: scores over a plane of the mode space, as JSON, as text, as a figure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast

import numpy as np

from cmdgpu.comparison.judging import Treatment
from cmdgpu.errors import NotAStore, UsageError, printable
from cmdgpu.notation import F64
from cmdgpu.store import durable
from cmdgpu.store.places import Named, local_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

At: TypeAlias = tuple[float, float]
"""A point: the factor of the first reference's value, and of the second one's."""
Scores: TypeAlias = dict[str, float]
"""Of one point, by name; NaN for what is no finite number."""

TRAINED: Final[At] = (1.0, 1.0)
KIND: Final = "cmdgpu landscape"
_SETTINGS: Final = ("modes", "span", "points", "step", "reference", "batch_norm", "evaluate", "result")


@dataclass(frozen=True)
class Best:
    """The point that ``select`` chooses."""

    at: At
    scores: Scores


@dataclass(frozen=True)
class Landscape:
    """Scores of the model whose weights are a_i f_m(i) r_m(i) + b_i, over factors f of one or two modes.

    All other modes have factor 1. ``best`` is chosen by the scores of ``select``: name one of validation
    data, then the others are only reported of it. The follow-up paper searched for it on the test set.
    """

    modes: tuple[int, ...]
    """The two modes, or the one of a line."""
    span: float
    """Factors go from 1 - span to 1 + span."""
    points: int
    """Factors of a mode."""
    step: int
    reference: tuple[float, ...]
    """The value of each of their references at the step, as stored: what the factors multiply."""
    batch_norm: Treatment
    evaluate: str
    """Name of the function that answered the scores."""
    result: str
    """Fingerprint of the decomposition."""
    select: tuple[str, ...] = ()
    """Names of scores; ``min:loss`` where lower is better."""
    evaluated: Mapping[At, Scores] = field(default_factory=dict[At, Scores], repr=False)
    """Scores of every point, once it is finished."""

    @property
    def x(self) -> F64:
        """(points,) factors of the first mode; the middle one of an odd number is 1."""
        return 1.0 + self.span * (np.arange(1 - self.points, self.points, 2) / (self.points - 1))

    @property
    def y(self) -> F64:
        """(points,) factors of the second mode; (1,), a 1 that multiplies nothing, where there is none."""
        return self.x if len(self.modes) == 2 else np.ones(1)

    @property
    def grid(self) -> list[At]:
        """Every point, row after row of ``x``; before them the trained one, which an even number lacks."""
        rows = ((x, y) for y in self.y.tolist() for x in self.x.tolist())
        return list(dict.fromkeys([TRAINED, *rows]))

    @property
    def trained(self) -> Scores:
        """Scores where both factors are 1."""
        return self.evaluated[TRAINED]

    @property
    def scores(self) -> dict[str, F64]:
        """Of every name (len(y), len(x)); NaN for what is no finite number."""
        return {
            name: np.array([[self.evaluated[x, y][name] for x in self.x.tolist()] for y in self.y.tolist()])
            for name in self.trained
        }

    @property
    def best(self) -> Best | None:
        """Where the first score of ``select`` is best; of equals the next, then nearest to the trained point.

        None without ``select``, and where that score is a number nowhere. The trained point is a candidate.
        Raises UsageError for a name that is no score.
        """
        if not self.select:
            return None
        grid = self.grid
        keys: list[list[float]] = []
        for key in self.select:
            name, sign = key.removeprefix("min:"), 1.0 if key.startswith("min:") else -1.0
            if name not in self.trained:
                raise UsageError(
                    f"no score {printable(name)!r} to select by", hint=f"have: {', '.join(self.trained)}"
                )
            keys.append([sign * self.evaluated[at][name] for at in grid])
        if np.isnan(keys[0]).all():
            return None
        keys.append([math.dist(at, TRAINED) for at in grid])
        at = grid[int(np.lexsort(keys[::-1])[0])]
        return Best(at, self.evaluated[at])

    @property
    def settings(self) -> dict[str, Any]:
        """What the scores depend on, as plain values: a landscape is only ever resumed with the same."""
        said = {name: getattr(self, name) for name in _SETTINGS}
        return {**said, "modes": list(self.modes), "reference": list(self.reference)}

    # ---- as text, JSON, a figure --------------------------------------------------------------------

    def table(self) -> str:
        """The trained point, the best one and the range of every score, as text."""
        spoken = " and ".join(map(str, self.modes))
        values = " and ".join(f"{value:.4g}" for value in self.reference)
        size = " x ".join([str(len(self.x))] * len(self.modes))
        low, high = (f"{factor:g}" for factor in self.x[[0, -1]].tolist())
        lines = [
            f"mode{'s' * (len(self.modes) > 1)} {spoken} at step {self.step}: "
            f"references of {values}, times {low} to {high}, {size} points",
            self._line("trained", TRAINED, self.trained),
        ]
        if (best := self.best) is not None:
            lines.append(self._line("best", best.at, best.scores))
            lines.append(f"best by {', then '.join(self.select)}: its other scores were not searched for")
        for name, values_yx in self.scores.items():
            finite = values_yx[np.isfinite(values_yx)]
            lost = values_yx.size - finite.size
            within = f"{finite.min():.4f} to {finite.max():.4f}" if finite.size else "no number"
            lines.append(f"{name}  {within}" + (f", no number at {lost} points" if lost else ""))
        return "\n".join(lines)

    def _line(self, what: str, at: At, scores: Scores) -> str:
        factors = " ".join(f"x {factor:.3f}" for factor in at[: len(self.modes)])
        return f"{what:<8} {factors}   " + "   ".join(f"{name} {value:.4f}" for name, value in scores.items())

    def to_json(self) -> dict[str, Any]:
        """Plain values; ``scores`` has rows by ``y`` and columns by ``x``, None where there is no number."""
        best = self.best
        return {
            "kind": KIND,
            **self.settings,
            "x": self.x.tolist(),
            "y": self.y.tolist(),
            "scores": {
                name: [[_plain(value) for value in row] for row in values.tolist()]
                for name, values in self.scores.items()
            },
            "trained": list(TRAINED),
            "trained_scores": plain(self.trained),
            "select": list(self.select),
            "best": best and {"x": best.at[0], "y": best.at[1], "scores": plain(best.scores)},
        }

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> Landscape:
        """What ``to_json`` gave. Raises NotAStore for anything else."""
        try:
            if len(found["x"]) < 2 or not math.isfinite(found["span"]):
                raise ValueError(KIND)
            unfilled = Landscape(
                modes=tuple(map(int, found["modes"])),
                span=float(found["span"]),
                points=len(found["x"]),
                step=int(found["step"]),
                reference=tuple(map(float, found["reference"])),
                batch_norm=found["batch_norm"],
                evaluate=str(found["evaluate"]),
                result=str(found["result"]),
                select=tuple(map(str, found["select"])),
            )
            axes = unfilled.x.tolist(), unfilled.y.tolist(), unfilled.points
            if found["kind"] != KIND or axes != (found["x"], found["y"], found["points"]):
                raise ValueError(KIND)
            evaluated = {TRAINED: numbers(found["trained_scores"])}
            for row, y in enumerate(unfilled.y.tolist()):
                for column, x in enumerate(unfilled.x.tolist()):
                    evaluated[x, y] = numbers({n: rows[row][column] for n, rows in found["scores"].items()})
            return replace(unfilled, evaluated=evaluated)
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise NotAStore("is no landscape", hint="`cmdgpu landscape` writes one") from error

    @staticmethod
    def load(path: Named) -> Landscape:
        """A finished landscape from its file. Raises NotAStore for another file, or an unfinished one."""
        path = local_path(path, "a landscape")
        try:
            found: object = json.loads(path.read_bytes())
            return Landscape.from_json(cast(Mapping[str, Any], found))
        except FileNotFoundError as error:
            unfinished = path.with_name(path.name + durable.PARTIAL).exists()
            what = "is not finished" if unfinished else "is not there"
            raise NotAStore(what, file=path, hint="run `cmdgpu landscape` with the same settings") from error
        except (NotAStore, ValueError, OSError) as error:
            raise NotAStore("is no landscape", file=path, hint="`cmdgpu landscape` writes one") from error

    def write(self, path: Path) -> None:
        """Whole or not at all; strict JSON. Raises WriteFailed naming the file."""
        text = json.dumps(self.to_json(), allow_nan=False) + "\n"
        durable.write_file(path.parent, path.name, [text.encode()])
        durable.make_name_last(path)

    def figure(self, score: str | None = None) -> Figure:
        """A score over the plane, the first one by default; see ``cmdgpu.plot.landscape``."""
        from cmdgpu.plot import landscape

        return landscape(self, score)


def plain(scores: Mapping[str, float]) -> dict[str, float | None]:
    """NaN as None."""
    return {name: _plain(value) for name, value in scores.items()}


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def numbers(scores: Mapping[str, float | None]) -> Scores:
    """None, and what is infinite, as NaN: a landscape is the same before and after it lay in a file."""
    return {
        str(name): math.nan if value is None or not math.isfinite(value) else float(value)
        for name, value in scores.items()
    }
