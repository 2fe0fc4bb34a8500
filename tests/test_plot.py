"""Laws of the figures: what is drawn is what was computed, whatever the caller's settings are."""

# matplotlib ships its types with unannotated **kwargs.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from cmdgpu.errors import CmdgpuError, UsageError
from cmdgpu.plot import (
    FIGURES,
    accuracy_against_step,
    correlation_histogram,
    correlation_matrix,
    error_against_modes,
    landscape,
    methods_against_step,
    modes_through_network,
    reference_profiles,
    sampled_weights,
    scalars_against_step,
    trajectory_plane,
)
from tests.small_fits import network_fit, planted_fit

SNAPSHOTS = 40
STEPS = np.arange(SNAPSHOTS)


def curves() -> dict[str, Any]:
    rise = 1 - 0.9 * np.exp(-STEPS / 4)
    return {"training": rise, "CMD, M = 1": rise - 0.001, "CMD, M = 2": rise, "CMD, M = 5": rise + 0.0005}


def methods() -> Figure:
    errors = {"recorded": 0 * STEPS, **{f"method {i}": (1 + i) / (1 + STEPS) for i in range(8)}}
    errors["method 7"] = np.where(STEPS > 5, np.inf, 1.0)
    scores = {name: 1 - 0.9 * np.exp(-STEPS / (4 + i)) for i, name in enumerate(errors)}
    scores["method 7"] = np.where(STEPS > 5, np.nan, 0.1)
    return methods_against_step(STEPS, errors, scores, selected={"recorded": 30, "method 1": 20})


def surface() -> Any:
    """A landscape of no model."""
    x = np.linspace(0, 2, 5)
    score_yx = np.add.outer((x - 1) ** 2, (x - 1) ** 2)
    return SimpleNamespace(
        modes=(0, 1), step=3, x=x, y=x, scores={"loss": score_yx}, trained={"loss": 0.0}, select=(), best=None
    )


DRAWN: dict[str, Callable[[], Figure]] = {
    "accuracy": lambda: accuracy_against_step(STEPS, curves(), unit="epoch", title="Accuracy"),
    "methods": methods,
    "profiles": lambda: reference_profiles(planted_fit()),
    "correlation": lambda: correlation_matrix(planted_fit()),
    "network": lambda: modes_through_network(network_fit()),
    "histogram": lambda: correlation_histogram(planted_fit(n_rows=150)),
    "weights": lambda: sampled_weights(planted_fit()),
    "scalars": lambda: scalars_against_step(planted_fit()),
    "fits": lambda: error_against_modes({"one": planted_fit(1), "four": planted_fit(4)}),
    "plane": lambda: trajectory_plane(planted_fit()),
    "landscape": lambda: landscape(surface()),
}


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def test_every_registered_figure_is_held_to_these_laws() -> None:
    assert set(FIGURES) == set(DRAWN)


@pytest.mark.parametrize("name", DRAWN)
def test_a_caller_s_settings_neither_change_a_figure_nor_are_changed(name: str) -> None:
    plain = png(DRAWN[name]())
    theirs: dict[Any, Any] = {
        "font.size": 20.0,
        "axes.facecolor": "pink",
        "xtick.labelsize": 25,
        "lines.linewidth": 9,
    }
    with mpl.rc_context(theirs):
        changed = png(DRAWN[name]())
        assert {key: mpl.rcParams[key] for key in theirs} == pytest.approx(theirs)
    assert changed == plain


def test_drawing_chooses_no_backend_and_loads_no_pyplot(tmp_path: Path) -> None:
    script = (
        "import sys, numpy as np; from cmdgpu.plot import accuracy_against_step as draw;"
        "draw(np.arange(9), {'training': np.linspace(0, 1, 9)}).savefig(sys.argv[1]);"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    target = tmp_path / "figure.png"
    subprocess.run([sys.executable, "-W", "error", "-c", script, str(target)], check=True)
    assert target.read_bytes().startswith(b"\x89PNG")


def test_accuracies_are_drawn_in_per_cent_against_their_steps() -> None:
    whole, enlarged = accuracy_against_step(STEPS * 10, curves()).axes
    drawn = {str(line.get_label()): line for line in enlarged.get_lines()}
    assert list(drawn) == list(curves())
    for line, (name, curve) in zip(whole.get_lines(), curves().items(), strict=True):
        assert np.allclose(np.asarray(line.get_ydata()), 100 * curve)
        assert np.array_equal(np.asarray(line.get_xdata()), STEPS * 10)
        late = len(np.asarray(drawn[name].get_ydata()))
        assert np.allclose(np.asarray(drawn[name].get_ydata()), 100 * curve[-late:])
        assert np.array_equal(np.asarray(drawn[name].get_xdata()), STEPS[-late:] * 10)
    low, high = enlarged.get_ylim()
    assert all(low < y < high for line in enlarged.get_lines() for y in np.asarray(line.get_ydata()))


@pytest.mark.parametrize("ends", [[0.9] * 5, [0.5, 0.9, 0.9001, 0.9002, 1.0], [1.0, 0.2, 0.2, 0.2, 0.2]])
def test_names_at_the_curves_ends_never_overlap_and_keep_their_order(ends: list[float]) -> None:
    given = {f"curve {i}": np.linspace(0.1, end, SNAPSHOTS) for i, end in enumerate(ends)}
    figure = accuracy_against_step(STEPS, given)
    figure.draw_without_rendering()
    named = [text for text in figure.axes[1].texts if isinstance(text, Annotation)]
    height = {text.get_text(): float(text.xyann[1]) for text in named}
    assert set(height) == set(given)
    order = sorted(given, key=lambda name: ends[int(name[-1])])
    assert np.all(np.diff([height[name] for name in order]) > 0)
    # Of the words alone, without the lines that tie them to their curves.
    boxes = sorted((Text.get_window_extent(text) for text in named), key=lambda box: box.y0)
    assert all(below.y1 <= above.y0 for below, above in pairwise(boxes))
    assert all(0 <= at <= 1 for at in height.values())


def test_a_curve_of_another_length_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"'CMD' has shape \(3,\), the steps \(40,\)"):
        accuracy_against_step(STEPS, {"training": STEPS / 40, "CMD": [0.1, 0.2, 0.3]})


def test_methods_are_drawn_where_their_numbers_are_and_told_apart_when_colours_are_used_up() -> None:
    errors, scores = methods().axes
    lines = [line for line in errors.get_lines() if len(np.asarray(line.get_xdata())) > 1]
    looks = {(line.get_color(), line.get_linestyle()) for line in lines}
    assert len(looks) == 8, "a method without errors has no line on a logarithmic axis"
    drawn = {str(line.get_label()): line for line in scores.get_lines()}
    assert np.array_equal(np.isnan(np.asarray(drawn["method 7"].get_ydata())), STEPS > 5)
    rings = [line for line in scores.get_lines() if line.get_fillstyle() == "none"]
    assert [float(np.asarray(ring.get_xdata())[0]) for ring in rings] == [30, 20]
    low, high = scores.get_ylim()
    late = np.concatenate([np.asarray(line.get_ydata())[SNAPSHOTS // 6 :] for line in drawn.values()])
    assert 0.2 < low < np.nanmin(late) and np.nanmax(late) < high, "the rise to it is cut off"
    only = methods_against_step(STEPS[:1], {"CMD": [0.5]})
    only.draw_without_rendering()
    assert len(only.axes) == 1


def test_a_name_is_claimed_once() -> None:
    with pytest.raises(CmdgpuError, match="'profiles' is registered twice"):
        FIGURES.add("profiles", reference_profiles)
