"""Laws of the figures of a fit: what is drawn is the view, whatever the fit and its names are."""

# matplotlib ships its types with unannotated **kwargs.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from matplotlib.transforms import Bbox

from cmdgpu.baselines import EMA, PCA
from cmdgpu.decomposition import CMD
from cmdgpu.errors import UsageError
from cmdgpu.plot import (
    MAX_PANELS,
    accuracy_against_step,
    correlation_histogram,
    correlation_matrix,
    error_against_modes,
    methods_against_step,
    modes_through_network,
    reference_profiles,
    sampled_weights,
    scalars_against_step,
    trajectory_plane,
)
from cmdgpu.plot.labels import spoken
from cmdgpu.views.correlation import correlations
from cmdgpu.views.fits import fits
from cmdgpu.views.histogram import histograms
from cmdgpu.views.network import network
from cmdgpu.views.plane import plane
from cmdgpu.views.profiles import profiles
from cmdgpu.views.weights import rebuilt_by, weights
from tests.harness import walks
from tests.small_fits import DEGENERATE, STEPS, fit, in_memory, network_fit, planted_fit


def texts(figure: Figure) -> str:
    """Every heading of the figure."""
    return "\n".join([figure.get_suptitle(), *(axes.get_title(loc="left") for axes in figure.axes)])


def image(axes: Axes) -> Any:
    return np.asarray(axes.get_images()[0].get_array())


def heading_of(figure: Figure) -> Bbox:
    """Where the heading lies, once the figure is drawn."""
    return next(text for text in figure.texts if text.get_text() == figure.get_suptitle()).get_window_extent()


def stairs(axes: Axes) -> list[Any]:
    """Values, edges and baseline of every histogram."""
    return [patch.get_data() for patch in axes.patches if isinstance(patch, StepPatch)]


def y_of(line: Any) -> Any:
    return np.asarray(line.get_ydata(), dtype=np.float64)


def x_of(line: Any) -> Any:
    return np.asarray(line.get_xdata(), dtype=np.float64)


# ---- what is drawn is the view ------------------------------------------------------------------------


def test_profiles_and_their_bands_are_those_of_the_view() -> None:
    cmd = planted_fit()
    view = profiles(cmd)
    figure = reference_profiles(cmd)
    assert len(figure.axes) == 4
    for m, panel in enumerate(figure.axes):
        line = panel.get_lines()[-1]
        assert np.array_equal(y_of(line), view.z_mt[m]) and np.array_equal(x_of(line), cmd.steps_)
        band = np.asarray(panel.collections[0].get_paths()[0].vertices)
        for t, step in enumerate(cmd.steps_.tolist()):
            at = band[band[:, 0] == step, 1]
            assert (at.min(), at.max()) == pytest.approx((view.low_mt[m, t], view.high_mt[m, t]))
    assert figure.get_supxlabel() == "epoch"
    assert reference_profiles(cmd, unit="pass").get_supxlabel() == "pass"


def test_headings_say_each_mode_s_share_of_the_moving_rows_and_the_sizes() -> None:
    cmd = planted_fit(n_rows=63)
    said = texts(reference_profiles(cmd))
    for m, size in enumerate(cmd.metrics_["mode_sizes"]):
        assert f"mode {m}   {100 * size / 63:.1f} %\n{size:,} rows" in said
    assert "N = 68, T = 30, M = 4, K = 63" in said and "hold 95 %" in said


def test_of_very_many_modes_the_largest_of_the_model_are_drawn_and_the_heading_says_so() -> None:
    cmd = fit(in_memory(walks(400, 20)), 30, n_samples=60)
    sizes = np.array(cmd.metrics_["mode_sizes"])
    largest = set(np.argsort(-sizes, kind="stable")[:MAX_PANELS].tolist())
    assert largest != set(range(MAX_PANELS)), "the case does not tell the model from the sample"
    figure = reference_profiles(cmd)
    drawn = [axes.get_title(loc="left").split()[1] for axes in figure.axes if axes.axison]
    assert set(map(int, drawn)) == largest
    assert f"the {MAX_PANELS} largest of 30 modes" in texts(figure)


def test_a_mode_with_one_sampled_row_has_a_profile_and_no_band() -> None:
    figure = reference_profiles(fit(walks(3, 12)))
    for panel in figure.axes:
        assert not [path for path in panel.collections[0].get_paths() if np.size(path.vertices)]
        assert len(panel.get_lines()) == 2


def test_the_matrix_is_the_view_before_and_its_permutation_after() -> None:
    cmd = planted_fit()
    view = correlations(cmd)
    before, after, _ = correlation_matrix(cmd).axes
    assert np.array_equal(image(before), view.corr_kk) and np.array_equal(image(after), view.ordered_kk)
    assert before.get_images()[0].get_clim() == after.get_images()[0].get_clim() == (0, 1)


def test_after_ordering_each_mode_is_one_block_and_boundaries_stand_between_blocks() -> None:
    cmd = planted_fit(noise=1e-4)
    _, after, _ = correlation_matrix(cmd).axes
    ends = [np.asarray(line.get_xydata()) for line in after.get_lines()]
    edges = np.cumsum([np.count_nonzero(cmd.sample_labels_ == m) for m in range(4)])
    between = (edges[:-1] - 0.5).tolist()
    assert sorted(xy[0, 1] for xy in ends if xy[0, 1] == xy[1, 1]) == between
    assert sorted(xy[0, 0] for xy in ends if xy[0, 0] == xy[1, 0]) == between
    for start, stop in zip([0, *edges[:-1]], edges, strict=True):
        assert image(after)[start:stop, start:stop].min() > 0.999
    assert [label.get_text() for label in after.get_yticklabels()] == ["0", "1", "2", "3"]


def test_rows_without_a_mode_and_rows_too_many_are_left_out_of_the_matrix() -> None:
    figure = correlation_matrix(planted_fit(), at_most=50)
    assert image(figure.axes[0]).shape == (50, 50)
    assert "K = 60, 50 of them shown" in texts(figure)
    assert image(correlation_matrix(planted_fit()).axes[0]).shape == (60, 60), "of 65"


@pytest.mark.parametrize("by", ["layer", "block", "tensor"])
def test_a_bar_of_the_network_is_the_shares_of_its_rows(by: Any) -> None:
    cmd = network_fit()
    view = network(cmd)
    groups = view.groups(by) if by != "tensor" else [t for t in view.tensors if t.kind == "parameter"]
    axes = modes_through_network(cmd, by=by).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [group.name for group in groups]
    parts: list[Any] = list(axes.containers)
    assert [part.get_label() for part in parts] == [*(f"mode {m}" for m in range(4)), "not moving"]
    widths = np.array([[bar.get_width() for bar in part] for part in parts])
    rows = np.array([group.rows for group in groups])
    counts = np.array([[*group.counts, group.n_constant + group.n_nonfinite] for group in groups])
    assert np.allclose(widths, 100 * counts.T / rows)
    ends = np.array([bar.get_x() + bar.get_width() for bar in parts[-1]])
    assert np.allclose(ends, 100)
    assert [text.get_text() for text in axes.texts] == [f"{n:,}" for n in rows]


def test_modes_without_a_colour_and_layers_without_a_bar_are_told() -> None:
    shapes = {f"block.{i}.weight": (1 + i,) for i in range(70)}
    cmd = fit(in_memory(walks(70 * 71 // 2, 20), shapes), 13, n_samples=300)
    figure = modes_through_network(cmd)
    axes = figure.axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [f"block.{i}" for i in range(6, 70)], "the smallest are left out, the order is kept"
    assert "the 64 largest of 70" in figure.get_suptitle()
    parts: list[Any] = list(axes.containers)
    assert len(parts) == 11 and parts[-1].get_label() == "3 more modes"
    with pytest.raises(UsageError, match="bars by 'head'; have: layer, block, tensor"):
        modes_through_network(cmd, by="head")  # pyright: ignore


def test_histograms_and_the_bands_of_chance_are_those_of_the_view() -> None:
    cmd = planted_fit(n_rows=150)
    view = histograms(cmd)
    for axes, shares, band in zip(
        correlation_histogram(cmd).axes,
        (view.abs_correlation, view.r2),
        ("abs_correlation", "r2"),
        strict=True,
    ):
        ours, *chance = stairs(axes)
        assert np.allclose(ours.values, 100 * shares) and np.array_equal(ours.edges, view.edges)
        assert len(chance) == 2 * len(view.chance) == 6
        for high, mean, one in zip(chance[::2], chance[1::2], view.chance.values(), strict=True):
            assert np.allclose(high.values, 100 * getattr(one, f"{band}_high"))
            assert np.allclose(high.baseline, 100 * getattr(one, f"{band}_low"))
            assert np.allclose(mean.values, 100 * getattr(one, f"{band}_mean"))


def test_sampled_weights_are_drawn_recorded_rebuilt_and_by_baselines() -> None:
    cmd = planted_fit()
    assert cmd.trajectory is not None
    given = {"PCA": PCA(2).fit(cmd.trajectory), "average": EMA(0.5).fit(cmd.trajectory)}
    view = weights(cmd, per_mode=3)
    figure = sampled_weights(cmd, given)
    panels = [axes for axes in figure.axes if axes.axison]
    assert len(panels) == len(view.row) == 12
    by_baseline = [rebuilt_by(baseline, view) for baseline in given.values()]
    for i, axes in enumerate(panels):
        for line, rows in zip(axes.get_lines(), (view.recorded, view.rebuilt, *by_baseline), strict=True):
            assert np.array_equal(y_of(line), rows[i])
        assert axes.get_title(loc="left") == f"W[{view.row[i]}]   r = {view.correlation[i]:.2f}"
    assert [text.get_text() for text in figure.legends[0].texts] == ["recorded", "CMD", "PCA", "average"]


def test_of_many_modes_some_weights_are_drawn_and_the_heading_says_so() -> None:
    figure = sampled_weights(fit(walks(60, 12), 15))
    assert "10 of 15 modes" in figure.get_suptitle()
    assert len({axes.get_ylabel() for axes in figure.axes} - {""}) == 10


def test_scalars_are_drawn_where_they_are_finite() -> None:
    loss, nothing = np.linspace(2, 1, 12), np.full(12, np.nan)
    loss[4] = np.nan
    traj = in_memory(walks(60, 12), scalars={"loss": loss, "nothing": nothing, "accuracy": 1 - loss / 2})
    figure = scalars_against_step(fit(traj))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["loss", "accuracy"]
    line = figure.axes[0].get_lines()[0]
    assert np.array_equal(y_of(line), loss[np.isfinite(loss)])
    assert np.array_equal(x_of(line), traj.steps[np.isfinite(loss)])
    with pytest.raises(UsageError, match="no scalar was recorded"):
        scalars_against_step(fit(in_memory(walks(60, 12), scalars={"nothing": nothing})))


def test_errors_stand_at_their_numbers_of_modes() -> None:
    traj = in_memory(walks(200, 20))
    given = {str(m): fit(traj, m) for m in (8, 1, 3)}
    error, shares = error_against_modes(given).axes
    points = fits(given)
    assert x_of(error.get_lines()[0]).tolist() == [1, 3, 8]
    assert y_of(error.get_lines()[0]).tolist() == [point.weight_mse for point in points]
    drawn = {str(line.get_label()): y_of(line).tolist() for line in shares.get_lines()}
    assert drawn == {
        "R² by energy": [point.r2_energy for point in points],
        "R²": [point.r2 for point in points],
        "|corr|": [point.mean_abs_correlation for point in points],
    }
    assert error.get_yscale() == "log" and error.get_xscale() == "linear"
    assert error_against_modes({"1": given["1"], "11": fit(traj, 11)}).axes[0].get_xscale() == "log"


def test_the_path_of_the_training_is_the_plane_of_the_view_or_of_two_profiles() -> None:
    cmd = planted_fit()
    view = plane(cmd)
    axes = trajectory_plane(cmd).axes[0]
    paths = [np.array([x_of(line), y_of(line)]) for line in axes.get_lines()]
    for first, path in zip((0, 3), (view.recorded, view.rebuilt), strict=True):
        assert np.array_equal(paths[first], path)
        assert np.array_equal(paths[first + 1], path[:, :1]) and np.array_equal(
            paths[first + 2], path[:, -1:]
        )
    assert f"{100 * view.explained[0]:.1f} % of the movement" in axes.get_xlabel()
    line = trajectory_plane(cmd, modes=(2, 0)).axes[0].get_lines()[0]
    z_mt = profiles(cmd).z_mt
    assert np.array_equal(x_of(line), z_mt[2]) and np.array_equal(y_of(line), z_mt[0])
    for modes in ((0, 4), (-1, 0)):
        with pytest.raises(UsageError, match="have: 4, the first is 0"):
            trajectory_plane(cmd, modes=modes)


# ---- fits of nothing much, names that are anything ----------------------------------------------------

OF_A_FIT: dict[str, Callable[[CMD], Figure]] = {
    "profiles": reference_profiles,
    "correlation": correlation_matrix,
    "histogram": correlation_histogram,
    "weights": sampled_weights,
    "plane": trajectory_plane,
    "fits": lambda cmd: error_against_modes({"this": cmd}),
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_a_fit_of_nothing_much_is_drawn_or_refused_in_a_line(name: str) -> None:
    cmd = DEGENERATE[name]()
    modes_through_network(cmd).draw_without_rendering()
    for draw in OF_A_FIT.values():
        if cmd.n_modes_:
            draw(cmd).draw_without_rendering()
        else:
            with pytest.raises(UsageError, match="moves"):
                draw(cmd)


def test_five_hundred_modes_are_drawn() -> None:
    cmd = fit(walks(1000, 7), 500)
    for draw in (*OF_A_FIT.values(), modes_through_network):
        draw(cmd).draw_without_rendering()
    after = correlation_matrix(cmd).axes[1]
    assert not after.get_lines(), "a thousand lines would hide the matrix"
    assert after.get_ylabel() == "500 modes"


HOSTILE: tuple[str, ...] = (
    "$x^2", "a$b$c$\\frac{", "\n\x1b[31m\x00", "名前", "x" * 1000 + ".weight", "_hidden", "<script>"
)  # fmt: skip


def test_names_from_a_file_are_drawn_as_text() -> None:
    """No formula, no missing glyph (a warning, here an error), no second line, no thousand characters."""
    shapes = dict.fromkeys(HOSTILE, (10,))
    traj = in_memory(walks(70, 12), shapes, scalars=dict.fromkeys(HOSTILE, np.arange(12.0)))
    cmd = fit(traj)
    given = {name: EMA(0.5).fit(traj) for name in HOSTILE}
    figures = [
        modes_through_network(cmd, by="tensor"),
        sampled_weights(cmd, given),
        scalars_against_step(cmd),
        accuracy_against_step(STEPS, dict.fromkeys(HOSTILE, STEPS)),
        methods_against_step(STEPS, dict.fromkeys(HOSTILE, STEPS)),
    ]
    for figure in figures:
        figure.savefig(io.BytesIO(), format="png")
    labels = [label.get_text() for label in figures[0].axes[0].get_yticklabels()]
    assert len(labels) == len(HOSTILE) and max(map(len, labels)) < 40
    assert any("…" in label and label.endswith(".weight") for label in labels)


@pytest.mark.parametrize("draw", [reference_profiles, trajectory_plane, correlation_matrix])
def test_a_heading_lies_inside_a_narrow_figure(draw: Callable[[CMD], Figure]) -> None:
    figure = draw(fit(walks(60, 12), 1))
    figure.draw_without_rendering()
    assert heading_of(figure).x1 <= figure.bbox.x1


@pytest.mark.parametrize(
    ("name", "limit", "shown"),
    [
        ("layer1.weight", 40, "layer1.weight"),
        ("abcdefghij", 5, "ab…ij"),
        ("abcdefghij", 6, "ab…hij"),
        ("a$b", 40, r"a\$b"),
        ("a\nb", 40, r"a\nb"),
        ("名", 40, r"\u540d"),
    ],
)
def test_of_a_long_name_the_middle_is_left_out(name: str, limit: int, shown: str) -> None:
    assert spoken(name, limit) == shown


def test_a_legend_of_ten_modes_hides_no_heading_and_no_bar() -> None:
    """Names, headings and legends of the crowded figures lie beside each other, inside the figure."""
    shapes = {f"encoder.layers.{i}.attention.projection.weight": (30,) for i in range(60)}
    traj = in_memory(walks(1800, 20), shapes)
    cmd = fit(traj, 12, n_samples=300)
    given = {f"a method of quite a long name, {i}": EMA(0.1 * i).fit(traj) for i in range(6)}
    for figure in (modes_through_network(cmd, by="tensor"), sampled_weights(cmd, given)):
        figure.draw_without_rendering()
        legend, heading = figure.legends[0].get_window_extent(), heading_of(figure)
        inside = figure.bbox
        assert not legend.overlaps(heading)
        assert legend.x0 >= 0 and legend.x1 <= inside.x1 and heading.x1 <= inside.x1
        for axes in figure.axes:
            if not axes.axison:
                continue
            assert not legend.overlaps(axes.get_window_extent())
            parts = [axes.title, axes.xaxis.label, *axes.get_yticklabels()]
            for text in parts:
                box = text.get_window_extent()
                assert not box.width or (box.x0 >= 0 and box.x1 <= inside.x1 and not legend.overlaps(box))
