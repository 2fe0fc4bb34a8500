"""The page of a report: what its file holds, and what a browser makes of it."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pytest

from cmdgpu.errors import printable
from cmdgpu.reporting.page import render
from tests.browser import Visit, chromium, serious_faults, until
from tests.report_data import HOSTILE, Json, bare, motionless, page_data

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

Open = Callable[..., Visit]

FIGURES: Final = {
    "scalars", "chance", "correlation", "profiles", "bands", "network", "abs_correlation", "r2", "weights",
    "rebuilt", "methods", "fits", "plane", "landscape",
}  # fmt: skip
WITHOUT_ANYTHING: Final = {"profiles", "bands", "network", "plane"}
NARROW: Final = {"width": 360, "height": 740}
MARKS: Final = ":is(path, rect, circle):not(.cursor)"

PAGES: Final[dict[str, tuple[Json, set[str]]]] = {
    "whole": (page_data(), FIGURES),
    "one mode, two snapshots": (page_data(modes=1, snapshots=2, landscape=1), FIGURES),
    "five hundred modes": (page_data(modes=500, snapshots=40), FIGURES),
    "hostile names": (
        page_data(
            names=HOSTILE,
            title="".join(HOSTILE),
            batch_norm=("kept", "reestimated"),
            verdict="no better than chance",
        ),
        FIGURES,
    ),
    "bare": (bare(page_data()), WITHOUT_ANYTHING),
    "nothing moves": (motionless(page_data()), set()),
}

SMALL: Final = page_data(
    modes=4, snapshots=12, n_tensors=8, names=HOSTILE[:2], batch_norm=("kept", "reestimated")
)
"""Every kind of element, few of each: axe looks at all of them."""


# ---- the file ---------------------------------------------------------------------------------------------


def embedded(page: str) -> Json:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found is not None
    return json.loads(found[1])


def addresses(page: str) -> list[tuple[str, str]]:
    """Whatever an element of the page could load or lead to."""
    found: list[tuple[str, str]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.extend(
                (tag, value or "")
                for name, value in attrs
                if name in ("src", "href", "srcset", "action", "data")
            )

    Reader().feed(page)
    return found


@pytest.mark.parametrize("name", PAGES)
def test_the_file_holds_the_numbers_and_asks_for_nothing(name: str) -> None:
    data, _ = PAGES[name]
    page = render(data)
    assert embedded(page) == data
    assert page.encode("utf-8").decode("utf-8") == page
    assert page.count("<script") == page.count("</script>") == 2
    assert [(tag, url) for tag, url in addresses(page) if not url.startswith("#")] == []
    assert "url(" not in page and "@import" not in page


def test_the_policy_allows_this_script_and_no_other() -> None:
    page = render(PAGES["whole"][0])
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    script = re.search(r"<script>(.*?)</script>", page, re.S)
    assert policy is not None and script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert (
        f"script-src &#39;sha256-{digest}&#39;" in policy[1] or f"script-src 'sha256-{digest}'" in policy[1]
    )
    assert policy[1].startswith("default-src 'none'")


def test_a_number_that_json_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        render({**PAGES["whole"][0], "steps": [float("nan")]})


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        ("better than chance", "These modes are better than chance (1965 rows"),
        ("no better than chance", "These modes are no better than chance (1965 rows"),
        ("cannot tell", "Whether these modes are better than chance cannot be told (1965 rows"),
    ],
)
def test_the_verdict_stands_there_in_the_words_of_the_judge(verdict: str, words: str) -> None:
    page = render(page_data(verdict=verdict))
    badge = page[page.index('id="verdict"') :]
    assert words in badge[:900]


def test_the_verdict_has_words_where_the_judge_gave_none() -> None:
    assert "Whether these modes are better than chance cannot be told." in render(PAGES["bare"][0])


def test_the_script_and_the_template_never_make_markup_of_data() -> None:
    folder = Path(render.__code__.co_filename).parent
    script = "".join(file.read_text() for file in sorted((folder / "script").glob("*.js")))
    for banned in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function"):
        assert banned not in script
    assert "|safe" not in (folder / "template.html.jinja").read_text().replace(" ", "")


# ---- in a browser -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture
def visit(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """Opens a page; at the end all of them must have been silent."""
    visits: list[Visit] = []

    def open_(data: Json, address: str = "", **context: Any) -> Visit:
        file = tmp_path / "report.html"
        file.write_bytes(render(data).encode())
        visits.append(Visit(browser, file, address, **context))
        return visits[-1]

    yield open_
    for one in visits:
        one.check_silent()
        one.close()


def drawn(page: Page) -> dict[str, int]:
    """Marks of every figure that has some."""
    return page.evaluate(
        f"""Object.fromEntries([...document.querySelectorAll("figure")].map((figure) =>
            [figure.id.slice(4), figure.querySelectorAll("{MARKS}").length]))"""
    )


@pytest.mark.parametrize("name", PAGES)
def test_every_figure_is_drawn_and_nothing_is_asked_for(visit: Open, name: str) -> None:
    data, figures = PAGES[name]
    page = visit(data).ready()
    marks = drawn(page)
    assert set(marks) == figures
    assert all(marks.values()), marks
    until(page, "[...document.images].every((image) => image.complete)")
    images = page.evaluate("[...document.images].map((image) => [image.complete, image.naturalWidth])")
    assert all(complete and width > 0 for complete, width in images)
    assert len(images) == (2 if "correlation" in figures else 0)
    assert page.locator("img:not([alt])").count() == 0
    for figure in figures:
        svg = page.locator(f"#fig-{figure} svg").first
        assert svg.get_attribute("role") == "img"
        assert len(svg.get_attribute("aria-label") or "") > 20
        caption = page.locator(f"#fig-{figure} figcaption").inner_text()
        assert all(f"{letter} = " in caption for letter in "NTM")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.set_viewport_size({"width": 360, "height": 740})
    until(
        page,
        "[...document.querySelectorAll('#main figure svg')].every((svg) => svg.viewBox.baseVal.width <= 360)",
    )
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert drawn(page).keys() == marks.keys()


def test_hostile_names_are_text(visit: Open) -> None:
    page = visit(PAGES["hostile names"][0]).ready()
    names = page.evaluate(
        """[...document.querySelectorAll("#table-tensors tbody th bdi")]
            .map((name) => name.title || name.innerText)"""
    )
    assert names[: len(HOSTILE)] == [printable(name, len(name)) for name in HOSTILE]
    assert page.evaluate("document.scripts.length") == 2
    assert page.evaluate("document.querySelectorAll('img').length") == 2
    page.get_by_role("button", name="tensor", exact=True).click()
    labels = page.locator("#fig-network text.name").all_text_contents()
    assert labels[0] == "<script>alert(1)</script>"
    assert any("…" in label and label.endswith("end") for label in labels)
    assert any(label.startswith("right\\u202eto left") for label in labels)
    page.locator("#fig-network svg").hover(position={"x": 400, "y": 20})
    assert "<script>alert(1)</script>" in page.locator("#tip").inner_text()


def test_the_slider_shows_the_weights_of_its_step(visit: Open) -> None:
    data, _ = PAGES["whole"]
    page = visit(data).ready()
    for t in (60, 0, 17):
        page.locator("#step").evaluate(
            "(slider, t) => { slider.value = t; slider.dispatchEvent(new Event('input', {bubbles: true})) }",
            t,
        )
        assert page.locator("#step-shown").inner_text() == f"{data['steps'][t]}"
        recorded = np.array([weight["recorded"][t] for weight in data["weights"]])
        raw = data["profiles"]["raw"]
        rebuilt = np.array([w["a"] * raw[w["mode"]][t] + w["b"] for w in data["weights"]])
        np.testing.assert_allclose(dots(page), np.stack([recorded, rebuilt], axis=1), atol=1e-9)
        at = page.locator("#fig-profiles line.now").get_attribute("x1")
        first, last = page.evaluate(
            "(() => { const box = document.querySelector('#fig-profiles path.line').getBBox();"
            " return [box.x, box.x + box.width] })()"
        )
        assert float(at or "nan") == pytest.approx(first + (last - first) * t / 60, abs=0.2)
    page.locator("#rebuilt-method").select_option("dmd(rank=10)")
    dmd = [weight["rebuilt"]["dmd(rank=10)"][17] for weight in data["weights"]]
    np.testing.assert_allclose(dots(page)[:, 1], dmd, atol=1e-9)


def dots(page: Page) -> Any:
    """(n, 2) recorded and rebuilt values, read back from where the dots stand against the diagonal."""
    found = page.evaluate(
        """(() => {
        const figure = document.querySelector("#fig-rebuilt");
        const line = figure.querySelector(".diagonal");
        const of = (node, name) => Number(node.getAttribute(name));
        const [from, to] = [Number(line.dataset.from), Number(line.dataset.to)];
        const value = (at, a, b) => from + (to - from) * (at - of(line, a)) / (of(line, b) - of(line, a));
        return [...figure.querySelectorAll(".dot")].map((dot) =>
            [value(of(dot, "cx"), "x1", "x2"), value(of(dot, "cy"), "y1", "y2")]);
        })()"""
    )
    return np.array(found)


def column(page: Page, table: str, number: int) -> list[str]:
    return page.evaluate(
        f"""[...document.querySelectorAll("#{table} tbody tr")].filter((row) => !row.hidden)
            .map((row) => row.cells[{number}].innerText)"""
    )


def test_a_heading_sorts_and_a_word_filters(visit: Open) -> None:
    data, _ = PAGES["whole"]
    page = visit(data).ready()
    as_recorded = [tensor["name"] for tensor in data["network"]["tensors"]]
    assert column(page, "table-tensors", 0) == as_recorded
    heading = page.locator("#table-tensors th", has_text="weights")
    rows = [f"{tensor['rows']:,}" for tensor in data["network"]["tensors"]]
    by_size = sorted(rows, key=lambda text: int(text.replace(",", "")))
    for way, expected in [("descending", by_size[::-1]), ("ascending", by_size), ("none", rows)]:
        heading.get_by_role("button").click()
        assert heading.get_attribute("aria-sort") == way
        assert column(page, "table-tensors", 2) == expected
    page.locator("#table-tensors th", has_text="tensor").get_by_role("button").press("Enter")
    assert column(page, "table-tensors", 0)[:3] == ["bn1.bias", "bn1.weight", "conv1.weight"]
    assert heading.get_attribute("aria-sort") == "none"

    page.get_by_role("button", name="tensor", exact=True).click()
    page.get_by_role("searchbox").fill("BN2")
    kept = [name for name in as_recorded if "bn2" in name]
    assert sorted(column(page, "table-tensors", 0)) == sorted(kept)
    assert page.locator("#filtered").inner_text() == f"{len(kept)} of {len(as_recorded)}"
    assert page.locator("#fig-network text.name").all_text_contents() == kept
    page.get_by_role("searchbox").fill("no such tensor")
    assert column(page, "table-tensors", 0) == []
    assert "no tensor" in (page.locator("#fig-network svg").text_content() or "")


LINKED: Final = ("correlation", "profiles", "bands", "network", "abs_correlation", "weights", "rebuilt")


def lit(page: Page) -> dict[str, list[int]]:
    """In every linked figure: the modes that can be seen, the others being faded."""
    until(page, "document.getAnimations().length === 0")
    found = page.evaluate(
        """(() => Object.fromEntries([...document.querySelectorAll("figure")].map((figure) => [
        figure.id.slice(4),
        [...new Set([...figure.querySelectorAll("svg :not(text)[data-mode]")]
            .filter((node) => Number(getComputedStyle(node).opacity) > 0.5)
            .map((node) => Number(node.dataset.mode)))].sort((a, b) => a - b)])))()"""
    )
    return {name: found[name] for name in LINKED if found[name]}


def check_lit(page: Page, mode: int) -> None:
    seen = lit(page)
    assert set(seen) == set(LINKED) - {"weights"}
    assert all(modes == [mode] for modes in seen.values()), seen
    assert page.evaluate("location.hash") == f"#mode={mode}"
    assert f"mode {mode}," in page.locator("#pill").inner_text()
    assert page.locator("#weights-mode").input_value() == str(mode)
    assert page.locator(f"#table-modes button[data-mode='{mode}']").get_attribute("aria-pressed") == "true"


def check_unlit(page: Page) -> None:
    assert len(lit(page)["profiles"]) == 10
    assert page.evaluate("location.hash") == ""
    assert page.locator("#pill").is_hidden()
    assert page.locator("button[aria-pressed=true][data-mode]").count() == 0


def click_mark(page: Page, selector: str) -> None:
    """The middle of a mark, as a hand would: what lies above it takes the click."""
    mark = page.locator(selector).first
    mark.evaluate("(node) => node.scrollIntoView({block: 'center'})")  # not below what floats at the bottom
    box = mark.bounding_box()
    assert box is not None
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)


def test_a_mode_is_lit_through_every_figure_from_wherever_it_is_clicked(visit: Open) -> None:
    page = visit(PAGES["whole"][0]).ready()
    check_unlit(page)
    for mode, click in {
        3: lambda: page.locator("#table-modes button[data-mode='3']").click(),
        4: lambda: page.locator("#legend-modes button[data-mode='4']").click(),
        5: lambda: page.locator("#table-tensors button[data-mode='5']").first.click(),
        6: lambda: click_mark(page, "#fig-correlation .block[data-mode='6']"),
        7: lambda: click_mark(page, "#fig-bands path[data-mode='7']"),
        1: lambda: click_mark(page, "#fig-network rect[data-mode='1']"),
    }.items():
        click()
        check_lit(page, mode)
    mode = page.evaluate(
        """(() => {
        const x = (dot) => Number(dot.getAttribute("cx"));
        const alone = [...document.querySelectorAll("#fig-rebuilt .dot:not([data-mode='1'])")]
            .reduce((a, b) => (x(a) < x(b) ? a : b));
        alone.id = "outermost";
        return Number(alone.dataset.mode);
        })()"""
    )
    click_mark(page, "#outermost")
    check_lit(page, mode)
    bars = page.evaluate(
        """(mode) => [...document.querySelectorAll(`#fig-network rect[data-mode='${mode}']`)]
            .map((bar) => bar.getAttribute("x"))""",
        mode,
    )
    assert len(bars) > 3 and len(set(bars)) == 1, "bars of the lit mode begin at one line"
    page.keyboard.press("Escape")
    check_unlit(page)
    for _ in range(2):  # a second click lets it go
        page.locator("#table-modes button[data-mode='3']").click()
    check_unlit(page)
    page.locator("#table-modes button[data-mode='3']").click()
    page.locator("#pill-clear").click()
    check_unlit(page)


def spoken(value: float) -> str:
    """A number of ordinary size as the page says it."""
    return str(float(f"{value:.4g}")).replace("-", "−")


def test_the_profile_under_the_pointer_is_the_one_that_is_lit(visit: Open) -> None:
    data, _ = PAGES["whole"]
    page = visit(data).ready()
    x, y = page.evaluate(
        """(() => { const path = document.querySelector("#fig-profiles path[data-mode='9']");
        path.scrollIntoView({block: "center"});
        const at = path.getPointAtLength(0), frame = path.ownerSVGElement.getBoundingClientRect();
        return [frame.left + at.x, frame.top + at.y] })()"""
    )
    page.mouse.move(x, y)
    lines = page.locator("#tip").inner_text().splitlines()
    assert lines[0] == "epoch 0"
    assert lines[1] == f"mode 9: {spoken(data['profiles']['z'][9][0])}"
    page.mouse.click(x, y)
    check_lit(page, 9)


def test_an_address_keeps_the_lit_mode(visit: Open) -> None:
    page = visit(PAGES["whole"][0], "#mode=3").ready()
    check_lit(page, 3)
    page.get_by_role("link", name="Landscape").click()
    assert set(lit(page)["profiles"]) == {3}
    page.evaluate("location.hash = '#mode=4'")
    until(page, "document.documentElement.dataset.lit === '4'")
    check_lit(page, 4)
    page = visit(PAGES["whole"][0], "#mode=10").ready()
    assert page.locator("#pill").is_hidden()


def test_a_lit_mode_of_five_hundred_is_in_every_figure(visit: Open) -> None:
    page = visit(PAGES["five hundred modes"][0], "#mode=137").ready()
    seen = lit(page)
    assert set(seen) >= {"correlation", "profiles", "bands", "abs_correlation", "rebuilt"}
    assert all(modes == [137] for modes in seen.values()), seen
    assert page.locator("#fig-bands .panel").count() == 13
    page.locator("#more-bands").click()
    assert page.locator("#fig-bands .panel").count() == 500


def test_the_keyboard_reads_values_and_lights_a_mode(visit: Open) -> None:
    data, _ = PAGES["whole"]
    page = visit(data).ready()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    svg = page.locator("#fig-profiles svg")
    svg.focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    expected = f"mode 2: {spoken(data['profiles']['z'][2][59])}"
    assert page.locator("#tip").inner_text().splitlines()[:2] == ["epoch 590", expected]
    assert page.locator("#said").inner_text().startswith(f"epoch 590, {expected}")
    page.keyboard.press("Enter")
    check_lit(page, 2)
    page.keyboard.press("ArrowRight")
    assert page.locator("#tip").inner_text().splitlines()[0] == "epoch 600"
    page.keyboard.press("Escape")
    check_unlit(page)
    for figure in FIGURES:
        page.locator(f"#fig-{figure} svg").first.focus()
        for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "Home"):
            page.keyboard.press(key)
        assert page.locator("#tip").inner_text().strip(), figure
    page.locator("#step").focus()
    page.keyboard.press("Home")
    assert page.locator("#step-shown").inner_text() == "0"


def test_the_controls_change_their_figures(visit: Open) -> None:
    data = page_data(batch_norm=("kept", "reestimated"))
    page = visit(data).ready()

    def shape(figure: str) -> str:
        return page.locator(f"#fig-{figure} .plot").inner_html()

    def changes(figure: str, act: Callable[[], object]) -> None:
        before = shape(figure)
        act()
        assert shape(figure) != before, figure

    changes("correlation", lambda: page.get_by_role("button", name="as in the model").click())
    assert page.locator("#matrix-unordered").is_visible() and page.locator("#matrix-ordered").is_hidden()
    for level in ("layer", "tensor", "block"):
        changes("network", page.get_by_role("button", name=level, exact=True).click)
        wanted = data["network"][f"{level}s"][:40]
        shown = page.locator("#fig-network text.name").all_text_contents()
        assert shown == [share["name"] for share in wanted]
    page.get_by_role("button", name="tensor", exact=True).click()
    page.locator("#more-network").click()
    assert page.locator("#fig-network text.name").count() == len(data["network"]["tensors"])
    changes("r2", lambda: page.locator("#log-histogram").check())
    changes("weights", lambda: page.locator("#weights-mode").select_option("4"))
    mine = [weight for weight in data["weights"] if weight["mode"] == 4]
    assert page.locator("#fig-weights text.name").all_text_contents() == [
        f"{weight['tensor']}[{', '.join(map(str, weight['index']))}]" for weight in mine
    ]
    changes("methods", lambda: page.locator("#treatment").select_option("kept"))
    changes("plane", lambda: page.locator("#plane-x").select_option("mode 3"))
    changes("landscape", lambda: page.locator("#landscape-score").select_option("accuracy"))


def taken(page: Page, what: str) -> list[list[str]]:
    """The CSV behind a link."""
    with page.expect_download() as download:
        page.locator(f"a[data-csv='{what}']").click()
    assert download.value.suggested_filename == f"{what}.csv"
    text = Path(download.value.path()).read_bytes().decode()
    return list(csv.reader(io.StringIO(text, newline="")))


def numbers_of(page: Page, selector: str, *names: str) -> Any:
    """(n, names) attributes of marks."""
    found = page.evaluate(
        """([selector, names]) => [...document.querySelectorAll(selector)]
            .map((node) => names.map((name) => Number(node.getAttribute(name))))""",
        [selector, list(names)],
    )
    return np.array(found)


def test_marks_are_as_long_and_stand_as_high_as_their_numbers(visit: Open) -> None:
    data, _ = PAGES["whole"]
    page = visit(data).ready()
    block = data["network"]["blocks"][0]
    bars = numbers_of(page, "#fig-network rect", "x", "width", "y")
    wide = bars[bars[:, 2] == bars[0, 2], 1]
    np.testing.assert_allclose(wide / wide.sum(), np.array(block["counts"]) / block["rows"], atol=1e-6)
    for quantity in ("abs_correlation", "r2"):
        high = numbers_of(page, f"#fig-{quantity} rect.bar", "height")[:, 0]
        shares = np.array([share for share in data["histogram"][quantity] if share])
        np.testing.assert_allclose(high / high.max(), shares / shares.max(), atol=1e-6)
    x, y = numbers_of(page, "#fig-fits .dot", "cx", "cy").T
    np.testing.assert_allclose(np.diff(x) / (x[-1] - x[0]), np.diff([1, 2, 5, 10]) / 9, atol=1e-6)
    ticks = dict(
        page.evaluate(
            """[...document.querySelectorAll("#fig-fits .tick")]
                .map((tick) => [tick.textContent, Number(tick.getAttribute("y"))])"""
        )
    )
    assert ticks["1e−5"] - 4 == pytest.approx(y[2], abs=1e-6), "the third fit has this error"
    error = np.log([fit["weight_mse"] for fit in data["fits"]])
    np.testing.assert_allclose(
        (y - y[0]) / (y[-1] - y[0]), (error - error[0]) / (error[-1] - error[0]), atol=1e-6
    )
    x, y = numbers_of(page, "#fig-plane circle.bar.ink", "cx", "cy").T
    for drawn_at, path in zip((x, -y), data["plane"]["recorded"], strict=True):
        assert np.corrcoef(drawn_at, path)[0, 1] == pytest.approx(1, abs=1e-9)
    curve = page.evaluate(
        """document.querySelector("#fig-profiles path[data-mode='5']").getAttribute("d")
            .match(/-?[\\d.]+ -?[\\d.]+/g).map((pair) => Number(pair.split(" ")[1]))"""
    )
    assert np.corrcoef(-np.array(curve), data["profiles"]["z"][5])[0, 1] == pytest.approx(1, abs=1e-5)


def test_steps_keep_their_digits_and_their_distances(visit: Open) -> None:
    steps = [10, 20, 1000, 20_000, 12_345_678]
    data = {**page_data(modes=2, snapshots=5, n_tensors=4), "steps": steps}
    page = visit(data, viewport=NARROW, has_touch=True).ready()
    assert page.locator("#step").get_attribute("aria-valuetext") == "epoch 12,345,678"
    assert page.locator("#step-shown").inner_text() == "12,345,678"
    assert "epoch 12,345,678" in page.locator("#fig-rebuilt text.name").all_text_contents()
    ends = page.evaluate(
        """document.querySelector("#fig-profiles path[data-mode='1']").getAttribute("d")
            .match(/-?[\\d.]+ -?[\\d.]+/g).map((pair) => Number(pair.split(" ")[0]))"""
    )
    along = (np.array(steps) - steps[0]) / (steps[-1] - steps[0])
    np.testing.assert_allclose(ends, ends[0] + (ends[-1] - ends[0]) * along, atol=0.11)
    page.locator("#step").focus()
    page.keyboard.press("Home")
    assert page.locator("#step").get_attribute("aria-valuetext") == "epoch 10"
    assert "epoch 10" in page.locator("#fig-rebuilt text.name").all_text_contents()


def test_values_are_put_away_by_touch_and_by_escape_and_follow_the_page(visit: Open) -> None:
    page = visit(SMALL, viewport=NARROW, has_touch=True).ready()
    tip, svg = page.locator("#tip"), page.locator("#fig-r2 svg")
    svg.evaluate("(node) => node.scrollIntoView({block: 'center'})")
    svg.tap(position={"x": 200, "y": 90})
    assert tip.inner_text().startswith("R² 0.")
    high = tip.evaluate("(node) => node.getBoundingClientRect().top")
    page.evaluate("scrollBy(0, 60)")
    until(page, f"document.getElementById('tip').getBoundingClientRect().top <= {high} - 59")
    page.evaluate("scrollBy(0, 2000)")
    until(page, "document.getElementById('tip').hidden")
    svg.evaluate("(node) => node.scrollIntoView({block: 'center'})")
    until(page, "!document.getElementById('tip').hidden")
    page.locator("#histograms-title").tap()
    assert tip.is_hidden() and page.locator(".cursor").count() == 0
    svg.tap(position={"x": 200, "y": 90})
    assert tip.is_visible()
    page.keyboard.press("Escape")
    assert tip.is_hidden()


def test_a_block_of_the_matrix_says_how_large_its_correlation_is(visit: Open) -> None:
    data: Json = {**SMALL, "correlation": {**SMALL["correlation"], "rows": 5000}}
    page = visit(data, accept_downloads=True).ready()
    svg = page.locator("#fig-correlation svg")
    side = svg.evaluate("(node) => node.getBoundingClientRect().width")
    between = data["correlation"]["between"]
    for i, j in ((0, 0), (0, 2), (3, 1)):
        svg.hover(position={"x": (j + 0.5) * side / 4, "y": (i + 0.5) * side / 4})
        assert f"mean |corr| {float(f'{between[i][j]:.3g}')}" in page.locator("#tip").inner_text()
    assert "between every two of 200 sampled weights, evenly spread over the 5,000 that move" in (
        page.locator("#correlation p").first.inner_text()
    )
    rows = np.array([list(map(float, row)) for row in taken(page, "correlation")[1:]])
    np.testing.assert_array_equal(rows[:, 3], data["correlation"]["within"])
    np.testing.assert_array_equal(rows[:, 4:], between)


def test_a_method_that_runs_away_hides_nobody_and_one_without_scores_says_why(visit: Open) -> None:
    methods = json.loads(json.dumps(SMALL["methods"]))
    for row in methods["methods"]:
        if row["method"] == "dmd":
            row.update(relative_error=1e30 if row["step"] else 0.1, error="weights beyond float64 <b>")
            row["scores"] = {"accuracy": None, "loss": 1e9}
    page = visit({**SMALL, "methods": methods}).ready()
    ticks = page.locator("#fig-methods text.tick").all_text_contents()
    assert "1e30" not in ticks and not any(tick.startswith(("1e8", "5e8", "1e9")) for tick in ticks), ticks
    reasons = page.get_by_role("list", name="Methods without scores").locator("li").all_inner_texts()
    assert reasons[0] == f"No scores of dmd(rank=10) at {SMALL['unit']} 0: weights beyond float64 <b>"
    assert reasons[-1] == "and 9 more without scores"


def test_a_mode_without_quantiles_sorts_last(visit: Open) -> None:
    profiles: Json = {**SMALL["profiles"], "quantiles": [[None] * 5, *SMALL["profiles"]["quantiles"][1:]]}
    page = visit({**SMALL, "profiles": profiles}).ready()
    heading = page.locator("#table-modes th", has_text="5 to 95 %").get_by_role("button")
    heading.click()
    modes = [int(mode) for mode in column(page, "table-modes", 0)]
    low = [profiles["quantiles"][mode][0] for mode in modes[:-1]]
    assert modes[-1] == 0 and low == sorted(low, reverse=True)


def test_what_is_left_out_of_the_network_is_told() -> None:
    page = render({**SMALL, "network": {**SMALL["network"], "layers_left_out": 1234}})
    assert "1,234 smaller ones are left out" in page


def test_a_landscape_has_a_cell_for_every_score_and_marks_two_points(visit: Open) -> None:
    data, _ = PAGES["whole"]
    page = visit(data).ready()
    loss = np.array(data["landscape"]["scores"]["loss"], dtype=np.float64)
    fills = page.evaluate(
        "[...document.querySelectorAll('#fig-landscape .cell')].map((c) => c.getAttribute('fill'))"
    )
    assert len(fills) == loss.size
    assert fills[0] is None, "a score that is no number has no colour"
    assert (
        fills[int(np.nanargmin(loss))] == "rgb(68 1 84)"
        and fills[int(np.nanargmax(loss))] == "rgb(253 231 37)"
    )
    svg = page.locator("#fig-landscape svg")
    svg.focus()
    for key in ("ArrowRight", "ArrowUp"):
        svg.press(key)
    lines = page.locator("#tip").inner_text().splitlines()
    assert lines == [f"loss: {spoken(loss[1, 1])}", "reference 0 × 0.55", "reference 1 × 0.55"]
    ring = numbers_of(page, "#fig-landscape .ring", "cx", "cy")[0]
    middle = numbers_of(page, "#fig-landscape .cell", "x", "y", "width", "height")[10 * 21 + 10]
    np.testing.assert_allclose(ring, middle[:2] + middle[2:] / 2, atol=0.5)


def test_numbers_are_taken_away_as_csv(visit: Open) -> None:
    data = page_data(names=HOSTILE)
    page = visit(data, accept_downloads=True).ready()
    profiles = taken(page, "profiles")
    assert profiles[0][1:] == [f"mode {mode}" for mode in range(10)]
    values = np.array([list(map(float, row)) for row in profiles[1:]])
    np.testing.assert_array_equal(values[:, 0], data["steps"])
    np.testing.assert_array_equal(values[:, 1:].T, data["profiles"]["z"])
    tensors = taken(page, "tensors")
    names = [name.replace("\ud800", "\ufffd") for name in HOSTILE]
    names[-1] = f"'{names[-1]}"  # a spreadsheet would compute it
    assert [row[0] for row in tensors[1 : 1 + len(names)]] == names


def test_a_csv_has_the_embedded_numbers_and_no_others(visit: Open) -> None:
    data = SMALL
    page = visit(data, accept_downloads=True).ready()

    def of(what: str, *columns: int) -> list[list[float | None]]:
        rows = taken(page, what)[1:]
        return [[float(row[i]) if row[i] else None for i in columns] for row in rows]

    curves, steps = data["profiles"], range(len(data["steps"]))
    assert of("bands", 0, 1, 2, 3, 4, 5) == [
        [mode, data["steps"][t], *(curves[name][mode][t] for name in ("z", "low", "high", "raw"))]
        for mode in range(4)
        for t in steps
    ]
    histogram = data["histogram"]
    assert of("abs_correlation", 0, 1, 2) == [
        [*histogram["edges"][i : i + 2], histogram["abs_correlation"][i]] for i in range(50)
    ]
    assert of("scalars", 0, 5) == [
        [data["steps"][t], data["scalars"]["validation accuracy"][t]] for t in steps
    ]
    recorded = [row for row in taken(page, "weights")[1:] if row[7] == "recorded"]
    assert [[float(value) for value in (*row[4:7], *row[8:])] for row in recorded] == [
        [one["a"], one["b"], one["correlation"], *one["recorded"]] for one in data["weights"]
    ]
    assert of("methods", 2, 4, 5, 7) == [
        [row["step"], row["weight_mse"], row["relative_error"], row["fit_s"]]
        for row in data["methods"]["methods"]
    ]
    assert of("plane", 1, 2, 3, 4) == [
        [*(axis[t] for axis in data["plane"]["recorded"]), *(axis[t] for axis in data["plane"]["rebuilt"])]
        for t in steps
    ]


@pytest.mark.parametrize("half", [0, 1])
def test_every_figure_has_a_csv(visit: Open, half: int) -> None:
    page = visit(PAGES["hostile names"][0], accept_downloads=True).ready()
    for what in sorted(FIGURES)[half::2]:  # Chromium grants a page ten downloads in a row
        rows = taken(page, what)
        assert len(rows) > 1 and len({len(row) for row in rows}) == 1, what


# ---- for everybody ----------------------------------------------------------------------------------------


def colours(page: Page) -> tuple[str, str, str]:
    return tuple(  # pyright: ignore[reportReturnType]
        page.evaluate(
            """[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,
            getComputedStyle(document.querySelector("#fig-profiles path.line")).stroke]"""
        )
    )


def test_dark_follows_the_reader_and_the_button_turns_it(visit: Open) -> None:
    data, _ = PAGES["whole"]
    light = colours(visit(data).ready())
    page = visit(data, color_scheme="dark").ready()
    dark = colours(page)
    assert all(a != b for a, b in zip(light, dark, strict=True))
    page.get_by_role("button", name="Light colours").click()
    assert colours(page) == light
    page.get_by_role("button", name="Dark colours").click()
    assert colours(page) == dark


@pytest.mark.parametrize(
    ("data", "context"),
    [
        (SMALL, {}),
        (SMALL, {"color_scheme": "dark"}),
        (SMALL, {"viewport": NARROW}),
        (SMALL, {"address": "#mode=1", "color_scheme": "dark", "viewport": NARROW}),
        (motionless(SMALL), {"color_scheme": "dark"}),
    ],
    ids=["light", "dark", "narrow", "a lit mode", "nothing moves"],
)
def test_nobody_is_shut_out(visit: Open, data: Json, context: dict[str, Any]) -> None:
    page = visit(data, **context).ready()
    assert serious_faults(page) == []


def test_on_paper_everything_is_light_and_without_controls(visit: Open) -> None:
    page = visit(PAGES["whole"][0], color_scheme="dark").ready()
    page.emulate_media(media="print", color_scheme="dark")
    until(page, "document.querySelector('#fig-profiles svg').viewBox.baseVal.width === 680")
    assert colours(page)[0] == "rgb(255, 255, 255)"
    marks = drawn(page)
    assert set(marks) == FIGURES and all(marks.values())
    for figure in FIGURES:
        assert page.locator(f"#fig-{figure} svg").first.is_visible()
    assert "epoch 600" in page.locator("#fig-rebuilt text.name").all_text_contents()
    assert page.locator("#legend-weights").inner_text().endswith("mode 0")
    assert "loss" in page.locator("#fig-landscape text.tick").all_text_contents()
    for gone in ("nav", "#theme", "#step", "#filter", "a.csv"):
        assert page.locator(gone).first.is_hidden()


def test_words_and_tables_need_no_script(visit: Open) -> None:
    page = visit(PAGES["whole"][0], java_script_enabled=False).page
    text = page.locator("main").inner_text()
    assert "These modes are better than chance" in text
    assert "The figures need JavaScript" in text
    assert page.locator("#table-tensors tbody tr").count() == 62
    assert page.locator("#theme").is_hidden() and page.locator("#step").is_hidden()
