"""What a notebook shows of a fit: true numbers, profiles, names as text, no work of its own."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from cmdgpu import CMD
from cmdgpu.errors import CmdgpuWarning, printable
from cmdgpu.notation import F64
from cmdgpu.quality import Quality
from cmdgpu.store.parameter_map import ParameterMap, whole
from cmdgpu.summary import in_html
from tests.harness import planted, walks, write_store


def shown(cmd: CMD) -> ElementTree.Element:
    """The representation, which is well-formed."""
    return ElementTree.fromstring(cmd._repr_html_())  # pyright: ignore[reportPrivateUsage]


def cells(page: ElementTree.Element) -> list[list[str]]:
    """The text of every cell of the table's body, row by row."""
    return [["".join(cell.itertext()) for cell in row] for row in page.findall("table/tbody/tr")]


def notes(page: ElementTree.Element) -> list[str]:
    return ["".join(paragraph.itertext()) for paragraph in page.findall("p")]


def profiles(page: ElementTree.Element) -> list[F64]:
    """(points, 2) of every line that is drawn."""
    drawn = [line.attrib["points"].split() for line in page.iter("polyline")]
    return [np.array([point.split(",") for point in points], dtype=np.float64) for points in drawn]


def test_before_a_fit_a_notebook_shows_what_a_terminal_shows() -> None:
    page = shown(CMD(threshold=0.25))
    assert page.tag == "pre" and page.text == repr(CMD(threshold=0.25))


def test_a_notebook_shows_the_numbers_of_the_fit() -> None:
    cmd = CMD(4).fit(planted(2000, 12, 4))
    page, metrics, words = shown(cmd), cmd.metrics_, cmd.summary(quality=False).splitlines()
    assert "".join(cell.text or "" for cell in page.findall("table/thead/tr/th")[-2:]) == "profilereference"
    for m, (mode, share, median, spread, _, reference) in enumerate(cells(page)):
        low, _, middle, _, high = metrics["mode_quantiles"][m]
        assert (mode, share) == (str(m), f"{100 * metrics['mode_sizes'][m] / metrics['n_rows']:.2f} %")
        assert (median, spread) == (f"{middle:.4f}", f"{low:.4f}-{high:.4f}")
        assert reference == f"W[{cmd.reference_rows_[m]}]"
    head, follows = notes(page)
    assert head == words[0].replace("CMD  ", "CMD ")
    assert follows == (
        f"mean |corr| {metrics['mean_abs_correlation']:.4f}, R² {metrics['r2']:.4f} "
        f"(by energy {metrics['r2_energy']:.4f}); {words[-2]}"
    )


def test_profiles_are_the_references_against_the_step(tmp_path: Path) -> None:
    steps = [0, 1, 2, 10, 50, 100]
    traj = write_store(tmp_path / "s.zarr", walks(50, 6), steps=steps)
    cmd = CMD(3, n_samples=50).fit(traj)
    lines = profiles(shown(cmd))
    assert len(lines) == cmd.n_modes_ == 3
    for line, r in zip(lines, cmd.references_.astype(np.float64), strict=True):
        np.testing.assert_allclose(line[:, 0], 120 * np.array(steps) / 100, atol=0.05)
        np.testing.assert_allclose(line[:, 1], 20 * (r.max() - r) / np.ptp(r), atol=0.05)  # y points down


def test_a_long_profile_is_a_point_per_pixel_from_the_first_to_the_last() -> None:
    (line,) = profiles(shown(CMD(1, n_samples=20).fit(walks(20, 1000))))
    assert line.shape == (120, 2) and line[0, 0] == 0 and line[-1, 0] == 120
    assert np.all(np.diff(line[:, 0]) > 0)


def test_twelve_of_many_modes_are_shown_and_the_others_counted() -> None:
    cmd = CMD(500, n_samples=600).fit(walks(600, 8))
    page, modes = shown(cmd), cmd.n_modes_
    assert modes > 400
    *rows, last = cells(page)
    assert [row[0] for row in rows] == [str(m) for m in range(12)]
    assert last == [f"and {modes - 12} more"]
    assert len(profiles(page)) == 12
    assert "more" not in cells(shown(CMD(12).fit(walks(100, 8))))[-1][0]


def test_without_a_mode_there_is_no_table() -> None:
    with pytest.warns(CmdgpuWarning, match="none of the 50 sampled rows moves"):
        page = shown(CMD(3).fit(np.ones((50, 8), dtype=np.float32)))
    assert page.find("table") is None
    assert notes(page) == [
        "CMD 0 modes, 50 parameters x 8 snapshots, 50 rows sampled",
        "none of the sampled rows moves: there are no modes; 700 B for a trajectory of 1.6 kB",
    ]


def test_a_mode_without_rows_and_a_reference_that_is_no_row_and_not_finite() -> None:
    cmd = CMD(2, references="component").fit(planted(200, 9, 2))
    metrics = cmd.metrics_
    metrics |= {"mode_sizes": [200, 0], "mode_quantiles": [metrics["mode_quantiles"][0], [math.nan] * 5]}
    R_mt = cmd.references_.copy()
    R_mt[0], R_mt[1, 3] = 7.0, np.inf
    result = dataclasses.replace(cmd.result, modes=dataclasses.replace(cmd.result.modes, references=R_mt))
    page = ElementTree.fromstring(in_html(result, metrics, None))
    first, second = cells(page)
    assert first[-1] == second[-1] == "no row"
    assert second[1:4] == ["0.00 %", "-", "-"]
    for line in profiles(page):
        assert line[:, 1].tolist() == [10.0] * 9


@pytest.mark.filterwarnings("ignore::cmdgpu.errors.CmdgpuWarning")
def test_two_snapshots_mean_nothing_in_a_notebook_too() -> None:
    page = shown(CMD(3).fit(walks(40, 2)))
    assert [row[2] for row in cells(page)] == ["1.0000"]
    assert "fewer than three snapshots" in notes(page)[-1]


@pytest.mark.parametrize(
    "name",
    [
        "<script>alert(1)</script>",
        "\"><img src=x onerror='alert(1)'>",
        "a&amp;b</td></table>",
        "\x1b[31m",
        "x" * 500,
    ],
)
def test_a_name_is_text_and_nothing_else(name: str, tmp_path: Path) -> None:
    layout = ParameterMap(whole([(name, "parameter", "float32", (30,))]))
    cmd = CMD(2).fit(write_store(tmp_path / "s.zarr", walks(30, 5), layout=layout))
    page = shown(cmd)
    assert [row[-1] for row in cells(page)] == [f"{printable(name)}[{row}]" for row in cmd.reference_rows_]
    tags = {element.tag for element in page.iter()}
    assert tags == {"div", "p", "b", "table", "thead", "tbody", "tr", "th", "td", "svg", "polyline"}


def test_it_has_no_colour_of_its_own() -> None:
    page = shown(CMD(2).fit(walks(30, 5)))
    for element in page.iter():
        assert element.attrib.get("stroke", "currentColor") == "currentColor"
        assert element.attrib.get("fill", "none") == "none"
        assert "color" not in element.attrib.get("style", "") and "background" not in str(element.attrib)


def test_the_verdict_is_shown_where_it_was_asked_for_and_never_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cmd = CMD(3).fit(planted(400, 12, 3))

    def forbidden(_: CMD) -> Quality:
        raise AssertionError("a notebook waits for it")

    with monkeypatch.context() as patch:
        patch.setattr(CMD, "quality", forbidden)
        before = notes(shown(cmd))
    quality = cmd.quality()
    assert notes(shown(cmd)) == [*before, quality.words.splitlines()[0]]
    assert quality.verdict in notes(shown(cmd))[-1]
    cmd.fit(planted(400, 12, 3))
    assert notes(shown(cmd)) == before, "of another fit"
