"""One HTML file around the numbers of a page: template and style lie here, the script in ``script/``.

Nothing in the file asks for another one, and its content security policy forbids it. Text that came from a
user is escaped by the template; the script makes text nodes of it.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cmdgpu.errors import printable
from cmdgpu.memory import show_bytes

HERE: Final = Path(__file__).parent
SCRIPT: Final = (
    "text", "axes", "probes", "figures",
    "scalars", "chance", "matrix", "profiles", "network", "weights", "methods", "plane", "landscape",
    "tables", "page",
)  # fmt: skip
"""Files of ``script/`` in the order in which they are joined: tools, figures, and what draws them."""
SECTIONS: Final = {
    "recorded": "What was recorded",
    "summary": "In words",
    "correlation": "Correlation",
    "profiles": "References",
    "bands": "Profiles and bands",
    "network": "Through the network",
    "histograms": "More than chance?",
    "weights": "Single weights",
    "rebuilt": "Rebuilt or recorded",
    "methods": "Methods compared",
    "fits": "Error against M",
    "plane": "Path of training",
    "landscape": "Landscape",
    "costs": "Bytes and timing",
    "provenance": "Where it comes from",
}
"""In the order of the page, as its contents call them."""
VERDICTS: Final = {
    "better than chance": {
        "look": "better",
        "sign": "M6.5 12.5l3.8 3.8 7.2-8",
        "words": "these modes are better than chance",
        "meaning": "Weights that share nothing would not follow so few curves so closely.",
    },
    "no better than chance": {
        "look": "worse",
        "sign": "M7.5 7.5l9 9m0-9l-9 9",
        "words": "these modes are no better than chance",
        "meaning": "Weights that share nothing would look the same: read no structure into the figures.",
    },
    "cannot tell": {
        "look": "open",
        "sign": "M8.8 9.2a3.2 3.2 0 1 1 4.6 2.9c-.9.5-1.4 1-1.4 2.2m0 3v.1",
        "words": "whether these modes are better than chance cannot be told",
        "meaning": "The evidence is too thin or lies between; the lines below say which.",
    },
}


def render(data: Mapping[str, Any]) -> str:
    """The page of ``gathering.gather``'s numbers as one HTML text; it encodes as UTF-8 whatever names hold.

    Raises ValueError where ``data`` holds a NaN or an infinity: the embedded numbers are strict JSON.
    """
    script = _script()
    verdict = VERDICTS[data["words"]["verdict"]]
    without = {"bands": not data["n"]["modes"], "rebuilt": not data["weights"]}
    return (
        _environment()
        .get_template("template.html.jinja")
        .render(
            d=data,
            sections=[(id, name) for id, name in SECTIONS.items() if not without.get(id)],
            verdict=verdict,
            verdict_line=_sentence(data["words"]["quality"][:1] or [verdict["words"]]),
            css=Markup(_text("page.css")),
            dark_css=Markup(_text("dark.css")),
            json=Markup(embedded(data)),
            script=Markup(script),
            script_hash=_digest(script),
        )
    )


def embedded(data: Mapping[str, Any]) -> str:
    """Strict JSON in ASCII that cannot end the element it stands in: ``<``, ``>`` and ``&`` are escaped."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(HERE, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., Any]] = {
        "bytes": show_bytes,
        "count": _count,
        "main_mode": _main_mode,
        "num": _num,
        "percent": _percent,
        "short": _short,
    }
    environment.filters.update(filters)
    return environment


def _text(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _script() -> str:
    """One function around all files: their names are theirs alone."""
    return "\n".join(["(() => {", '"use strict";', *(_text(f"script/{name}.js") for name in SCRIPT), "})();"])


def _digest(script: str) -> str:
    """What a content security policy calls this script, and no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _visible(value: object) -> object:
    """Text in which control characters, directions and half characters are written out instead of obeyed."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return printable(value, len(value))
    return value


def _short(text: str, most: int) -> str:
    """Text of at most so many characters: of a longer one the middle is left out."""
    shown = printable(text, len(text))
    if len(shown) <= most:
        return shown
    head = (most - 1) * 2 // 3
    return f"{shown[:head]}…{shown[len(shown) - (most - 1 - head) :]}"


def _sentence(lines: Sequence[str]) -> str:
    return f"{lines[0][:1].upper()}{lines[0][1:].removesuffix('.')}."


def _count(value: int) -> str:
    return f"{value:,}"


def _num(value: float | None) -> str:
    """Four digits; a dash where there is no number."""
    if value is None:
        return "–"
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.4f}" if 0 < size < 1 else f"{value:#.4g}".rstrip(".") if size else "0"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f} %"


def _main_mode(counts: Sequence[Any]) -> tuple[int, int] | None:
    """The mode with most rows and their number, of counts by mode or of [mode, count] pairs."""
    pairs: Sequence[Any] = counts if counts and isinstance(counts[0], Sequence) else list(enumerate(counts))
    return max(((int(mode), int(n)) for mode, n in pairs if n), key=lambda pair: pair[1], default=None)
