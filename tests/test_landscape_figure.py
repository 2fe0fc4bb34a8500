"""The figure of a landscape draws its numbers, and marks what it says it marks."""

# matplotlib ships its types with unannotated **kwargs.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure

from cmdgpu.errors import UsageError
from cmdgpu.mode_space import Landscape
from cmdgpu.notation import F64
from cmdgpu.plot import FIGURES

P = 5


def surface(values_yx: F64, modes: tuple[int, ...] = (3, 1), **more: Any) -> Landscape:
    """A landscape of these losses; ``late`` counts its points."""
    empty = Landscape(
        modes=modes, span=0.5, points=P, step=40, reference=(0.5,) * len(modes), batch_norm="none",
        evaluate="t:e", result="0", select=("min:loss",),
    )  # fmt: skip
    places = [(x, y) for y in empty.y.tolist() for x in empty.x.tolist()]
    scores = {
        at: {"loss": value, "late": float(i)}
        for i, (at, value) in enumerate(zip(places, values_yx.ravel().tolist(), strict=True))
    }
    return dataclasses.replace(empty, evaluated=scores, **more)


def bowl() -> F64:
    y, x = np.mgrid[0:P, 0:P]
    return np.square(x - 1.0) + np.square(y - 3.0) + 0.5


def between(low: float, high: float) -> F64:
    return np.linspace(low, high, 11, dtype=np.float64)[1:-1]


def drawn(figure: Figure, path: Path) -> dict[str, Any]:
    figure.savefig(path / "f.png")
    assert (path / "f.png").stat().st_size > 5000
    axes = figure.axes[0]
    meshes = [each for each in axes.collections if isinstance(each, QuadMesh)]
    marks: dict[str, Any] = {
        str(line.get_label()): line for line in axes.get_lines() if line.get_marker() in ("o", "*")
    }
    return {
        "axes": axes,
        "mesh": meshes[0] if meshes else None,
        "contours": [each for each in axes.collections if isinstance(each, QuadContourSet)],
        "marks": {name: (line.get_xdata()[0], line.get_ydata()[0]) for name, line in marks.items()},
    }


def test_cells_are_the_scores_and_marks_lie_where_they_belong(tmp_path: Path) -> None:
    found = surface(bowl())
    seen = drawn(found.figure(), tmp_path)
    mesh: QuadMesh = seen["mesh"]
    values = mesh.get_array()
    assert values is not None and np.array_equal(np.asarray(values).reshape(P, P), bowl())
    corners = np.asarray(mesh.get_coordinates())
    centres = (corners[:-1, :-1] + corners[1:, 1:]) / 2
    assert np.allclose(centres[0, :, 0], found.x) and np.allclose(centres[:, 0, 1], found.y)
    assert seen["marks"] == {"trained: 2.5": (1.0, 1.0), "best by min:loss: 0.5": (0.75, 1.25)}
    axes = seen["axes"]
    assert axes.get_xlabel() == "value of reference 3 (× trained)"
    assert axes.get_ylabel() == "value of reference 1 (× trained)"
    (lines,) = seen["contours"]
    assert np.allclose(lines.levels, between(0.5, float(bowl().max())))
    assert "loss over modes 3 and 1   (step 40)" in str(found.figure().get_suptitle())


def test_another_score_has_its_own_numbers_at_the_same_marks(tmp_path: Path) -> None:
    seen = drawn(surface(bowl()).figure("late"), tmp_path)
    assert np.array_equal(np.asarray(seen["mesh"].get_array()).ravel(), np.arange(25.0))
    assert seen["marks"] == {"trained: 12": (1.0, 1.0), "best by min:loss: 16": (0.75, 1.25)}
    with pytest.raises(UsageError, match="no score 'f1' in this landscape; have: loss, late"):
        surface(bowl()).figure("f1")


def test_one_mode_is_a_line_through_its_scores(tmp_path: Path) -> None:
    found = surface(bowl()[:1], modes=(2,))
    seen = drawn(found.figure(), tmp_path)
    curve = seen["axes"].get_lines()[0]
    assert np.array_equal(curve.get_xdata(), found.x) and np.array_equal(curve.get_ydata(), bowl()[0])
    assert seen["marks"] == {"trained: 10.5": (1.0, 10.5), "best by min:loss: 9.5": (0.75, 9.5)}
    assert seen["mesh"] is None and seen["axes"].get_ylabel() == "loss"


def test_a_score_over_decades_is_drawn_on_a_logarithmic_scale(tmp_path: Path) -> None:
    seen = drawn(surface(10.0 ** bowl()).figure(), tmp_path)
    assert isinstance(seen["mesh"].norm, LogNorm)
    assert np.allclose(np.log10(seen["contours"][0].levels), between(0.5, float(bowl().max())))
    assert not isinstance(drawn(surface(bowl()).figure(), tmp_path)["mesh"].norm, LogNorm)
    assert drawn(surface(10.0 ** bowl()[:1], modes=(2,)).figure(), tmp_path)["axes"].get_yscale() == "log"


@pytest.mark.parametrize(
    "values",
    [
        pytest.param(np.full((P, P), np.nan), id="no number"),
        pytest.param(np.full((P, P), 0.5), id="constant"),
        pytest.param(np.zeros((P, P)), id="zero"),
        pytest.param(np.where(np.eye(P) > 0, np.nan, bowl()), id="holes"),
        pytest.param(np.where(np.eye(P) > 0, bowl(), np.nan), id="few"),
        pytest.param(-bowl(), id="negative"),
    ],
)
def test_what_has_no_number_or_no_slope_is_drawn_all_the_same(tmp_path: Path, values: F64) -> None:
    seen = drawn(surface(values).figure(), tmp_path)
    shown = np.ma.filled(np.ma.asarray(seen["mesh"].get_array()).astype(float), np.nan).reshape(P, P)
    assert np.array_equal(shown, values, equal_nan=True)
    assert bool(seen["contours"]) == (len(np.unique(values[np.isfinite(values)])) > 1)
    line = surface(values[:1], modes=(0,)).figure()
    drawn(line, tmp_path)


def test_hostile_names_are_drawn_as_text(tmp_path: Path) -> None:
    name = "$\\frac{<script>" + "x" * 1000
    empty = surface(bowl())
    scores = {at: {name: values["loss"]} for at, values in empty.evaluated.items()}
    found = dataclasses.replace(empty, evaluated=scores, select=(name,))
    drawn(found.figure(), tmp_path)
    assert FIGURES["landscape"](found, name) is not None
