"""The figures of the README, from a run of the demo: ``python benchmarks/figures.py``.

Trains, fits and draws anew (a minute), so that what the README shows is what the package does. The picture of
the report needs playwright and Chromium; without them the one that is there stays.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks are no installed package

from matplotlib.figure import Figure  # noqa: E402
from PIL import Image  # noqa: E402

import cmdgpu as cg  # noqa: E402
from benchmarks.browser import FLAGS, chromium_path  # noqa: E402
from benchmarks.machine import RESULTS  # noqa: E402
from cmdgpu.demo import DemoReport, run_demo  # noqa: E402

FOLDER: Final = RESULTS / "figures"
MOST_BYTES: Final = 160_000
"""Of one picture."""
COLOURS: Final = 64
DPI: Final = 100

DRAWN: Final[dict[str, Callable[[cg.CMD], Figure]]] = {
    "profiles": cg.plot.reference_profiles,
    "correlation": cg.plot.correlation_matrix,
    "histogram": cg.plot.correlation_histogram,
    "network": cg.plot.modes_through_network,
}


def draw(demo: DemoReport, folder: Path) -> list[Path]:
    """Every figure of the demo's finest fit, and the top of its page."""
    folder.mkdir(parents=True, exist_ok=True)
    cmd = cg.CMD.load(demo.fits[-1].result)
    written: list[Path] = []
    for name, figure_of in DRAWN.items():
        file = folder / f"{name}.png"
        figure: Any = figure_of(cmd)
        figure.savefig(file, dpi=DPI)
        written.append(file)
    chromium = chromium_path()
    if chromium is None:
        print("no Chromium: report.png stays as it is", flush=True)
    else:
        photograph(demo.page, folder / "report.png", chromium)
        written.append(folder / "report.png")
    for file in written:
        fewer_colours(file)
        if file.stat().st_size > MOST_BYTES:
            raise SystemExit(f"{file.name} has {file.stat().st_size} bytes, {MOST_BYTES} are allowed")
    return written


def photograph(page: Path, file: Path, chromium: str) -> None:
    """What is seen of a page without scrolling."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=list(FLAGS))
        try:
            view = browser.new_context(viewport={"width": 1180, "height": 1000}, offline=True).new_page()
            view.goto(page.resolve().as_uri())
            view.wait_for_selector('html[data-ready="1"]', state="attached")
            view.screenshot(path=file)
        finally:
            browser.close()


def fewer_colours(file: Path) -> None:
    """The picture with a palette: a third of the bytes, and nobody sees it."""
    image = Image.open(file).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    image.save(file, optimize=True)


def main(arguments: list[str] | None = None) -> list[Path]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="three epochs, for a test")
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        demo = run_demo(Path(folder) / "demo", epochs=3 if options.tiny else 60)
        written = draw(demo, options.out)
    for file in written:
        print(f"{file.name}  {file.stat().st_size} bytes", flush=True)
    return written


if __name__ == "__main__":
    main()
