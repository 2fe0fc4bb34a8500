"""Laws of the figures: what is drawn is what was computed, whatever the caller's settings are."""

# matplotlib ships its types with unannotated **kwargs.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from cmdgpu.errors import CmdgpuError, UsageError
from cmdgpu.notation import F32, I16, I64
from cmdgpu.plot import (
    FIGURES,
    MAX_PANELS,
    accuracy_against_step,
    correlation_matrix,
    methods_against_step,
    reference_profiles,
)

SNAPSHOTS = 40
STEPS = np.arange(SNAPSHOTS)


@dataclass
class Planted:
    """Rows a r + b + noise of known modes, in an order that hides the modes."""

    references_: F32
    sample_: F32
    sample_labels_: I16
    metrics_: dict[str, Any]
    steps_: I64 = field(default_factory=lambda: 5 * np.arange(SNAPSHOTS))


def planted(modes: int = 4, rows: int = 60, *, noise: float = 0.05, seed: int = 0) -> Planted:
    rng = np.random.default_rng(seed)
    R_mt = np.cumsum(rng.standard_normal((modes, SNAPSHOTS)), axis=1)
    label_k = np.sort(np.arange(rows) % modes)
    rng.shuffle(label_k)
    a_k, b_k = rng.choice([-2.0, 0.5, 3.0], rows), rng.normal(5, 2, rows)
    sample_kt = a_k[:, None] * R_mt[label_k] + b_k[:, None] + noise * rng.standard_normal((rows, SNAPSHOTS))
    for mode in range(modes):
        sample_kt[np.flatnonzero(label_k == mode)[0]] = R_mt[mode]
    sizes = [1000 * (modes - mode) for mode in range(modes)]
    return Planted(
        references_=R_mt.astype(np.float32),
        sample_=sample_kt.astype(np.float32),
        sample_labels_=label_k.astype(np.int16),
        metrics_={"mode_sizes": sizes, "n_constant": 2500, "n_nonfinite": 2},
    )


def curves() -> dict[str, Any]:
    rise = 1 - 0.9 * np.exp(-STEPS / 4)
    return {"training": rise, "CMD, M = 1": rise - 0.001, "CMD, M = 2": rise, "CMD, M = 5": rise + 0.0005}


def methods() -> Figure:
    errors = {"recorded": 0 * STEPS, **{f"method {i}": (1 + i) / (1 + STEPS) for i in range(8)}}
    errors["method 7"] = np.where(STEPS > 5, np.inf, 1.0)
    scores = {name: 1 - 0.9 * np.exp(-STEPS / (4 + i)) for i, name in enumerate(errors)}
    scores["method 7"] = np.where(STEPS > 5, np.nan, 0.1)
    return methods_against_step(STEPS, errors, scores, selected={"recorded": 30, "method 1": 20})


DRAWN: dict[str, Callable[[], Figure]] = {
    "accuracy": lambda: accuracy_against_step(STEPS, curves(), unit="epoch", title="Accuracy"),
    "methods": methods,
    "profiles": lambda: reference_profiles(planted(), unit="epoch"),
    "correlation": lambda: correlation_matrix(planted()),
}


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def texts(figure: Figure) -> str:
    """Every heading of the figure."""
    return "\n".join([figure.get_suptitle(), *(axes.get_title(loc="left") for axes in figure.axes)])


def image(axes: Axes) -> Any:
    return np.asarray(axes.get_images()[0].get_array())


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


def test_profiles_are_drawn_centred_and_of_unit_norm() -> None:
    cmd = planted()
    figure = reference_profiles(cmd)
    for panel, reference in zip(figure.axes, cmd.references_, strict=True):
        line = panel.get_lines()[-1]
        y = np.asarray(line.get_ydata(), dtype=np.float64)
        assert abs(y.mean()) < 1e-12
        assert np.linalg.norm(y) == pytest.approx(1)
        assert np.corrcoef(y, reference)[0, 1] == pytest.approx(1)
        assert np.array_equal(np.asarray(line.get_xdata()), cmd.steps_)


def test_bands_follow_the_reference_though_half_of_the_rows_move_against_it() -> None:
    figure = reference_profiles(planted(noise=1e-3))
    for panel in figure.axes:
        y = np.asarray(panel.get_lines()[-1].get_ydata(), dtype=np.float64)
        band = np.asarray(panel.collections[0].get_paths()[0].vertices)
        assert band[:, 1].max() - y.max() < 0.05
        assert y.min() - band[:, 1].min() < 0.05


def test_headings_say_each_mode_s_share_of_the_moving_rows_and_the_sizes() -> None:
    figure = reference_profiles(planted())
    said = texts(figure)
    assert "mode 0   40.0 %\n4,000 rows" in said
    assert "mode 3   10.0 %\n1,000 rows" in said
    assert "N = 12,502, T = 40, M = 4, K = 60" in said


def test_only_the_largest_of_very_many_modes_are_drawn_and_the_heading_says_so() -> None:
    figure = reference_profiles(planted(modes=30))
    assert sum(axes.axison for axes in figure.axes) == MAX_PANELS
    assert f"the {MAX_PANELS} largest of 30 modes" in texts(figure)


def test_a_mode_with_one_sampled_row_has_a_profile_and_no_band() -> None:
    figure = reference_profiles(planted(modes=3, rows=3))
    assert [len(panel.collections) for panel in figure.axes] == [0, 0, 0]
    assert [len(panel.get_lines()) for panel in figure.axes] == [2, 2, 2]


def test_the_matrix_is_the_correlation_of_the_sample_before_and_its_permutation_after() -> None:
    cmd = planted()
    before, after, _ = correlation_matrix(cmd).axes
    expected = np.abs(np.corrcoef(cmd.sample_.astype(np.float64)))
    assert np.allclose(image(before), expected, atol=1e-12)
    order = np.argsort(cmd.sample_labels_, kind="stable")
    assert np.allclose(np.sort(image(after), axis=None), np.sort(expected[np.ix_(order, order)], axis=None))
    assert np.allclose(np.diag(image(after)), 1)
    assert before.get_images()[0].get_clim() == after.get_images()[0].get_clim() == (0, 1)


def test_after_ordering_each_mode_is_one_block_and_boundaries_stand_between_blocks() -> None:
    cmd = planted(noise=1e-4)
    _, after, _ = correlation_matrix(cmd).axes
    ends = [np.asarray(line.get_xydata()) for line in after.get_lines()]
    assert sorted(xy[0, 1] for xy in ends if xy[0, 1] == xy[1, 1]) == [14.5, 29.5, 44.5]
    assert sorted(xy[0, 0] for xy in ends if xy[0, 0] == xy[1, 0]) == [14.5, 29.5, 44.5]
    for mode in range(4):
        block = slice(15 * mode, 15 * mode + 15)
        assert image(after)[block, block].min() > 0.999
    assert [label.get_text() for label in after.get_yticklabels()] == ["0", "1", "2", "3"]


def test_sampled_rows_without_a_mode_are_left_out_of_the_matrix() -> None:
    cmd = planted()
    cmd.sample_[3] = 1.5
    cmd.sample_[4, 7] = np.nan
    cmd.sample_labels_[3:5] = [-1, -2]
    figure = correlation_matrix(cmd)
    assert image(figure.axes[0]).shape == (58, 58)
    assert "K = 58" in texts(figure)


@pytest.mark.parametrize("draw", [reference_profiles, correlation_matrix])
def test_without_a_moving_row_there_is_nothing_to_draw(draw: Callable[[Planted], Figure]) -> None:
    cmd = planted()
    cmd.references_ = cmd.references_[:0]
    cmd.sample_labels_[:] = -1
    cmd.metrics_["mode_sizes"] = []
    with pytest.raises(UsageError, match="moves"):
        draw(cmd)


def test_a_name_is_claimed_once() -> None:
    with pytest.raises(CmdgpuError, match="'profiles' is registered twice"):
        FIGURES.add("profiles", reference_profiles)
