"""Law of the look at a document before it is parsed: the marks that count are those outside of strings."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmdgpu.store import format as fmt

STRINGS = st.lists(st.sampled_from(["a", "[", "}", ",", ":", '\\"', "\\\\", "\\u00e9", " "]), max_size=6)
PARTS = st.lists(
    st.one_of(STRINGS.map(lambda parts: f'"{"".join(parts)}"'), st.sampled_from([*"[]{},: 1"])), max_size=30
)


def counted(text: str) -> tuple[int, int, int]:
    """The definition, a character at a time."""
    depth = deepest = opened = separators = 0
    in_string = is_escaped = False
    for mark in text:
        if in_string:
            in_string = is_escaped or mark != '"'
            is_escaped = mark == "\\" and not is_escaped
        elif mark == '"':
            in_string = True
        elif mark in "[{":
            depth, opened = depth + 1, opened + 1
        elif mark in "]}":
            depth -= 1
        elif mark in ",:":
            separators += 1
        deepest = max(deepest, depth)
    return deepest, opened, separators


@pytest.mark.parametrize("piece_bytes", [1, 2, 3, 7, 1 << 16])
@given(parts=PARTS, end=st.sampled_from(["", '"[[', '"[[\\', '"\\\\']))
def test_only_marks_outside_of_strings_count(piece_bytes: int, parts: list[str], end: str) -> None:
    text = "".join(parts) + end
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fmt, "_PIECE_BYTES", piece_bytes)
        *_, last = [(0, 0, 0), *fmt.shapes(text.encode())]
    assert last == counted(text)


def test_a_document_is_given_up_in_the_piece_where_it_passes_a_bound() -> None:
    raw = b"[" * (1 << 20)
    looks = fmt.shapes(raw)
    deepest, opened, _ = next(looks)
    assert deepest == opened == 1 << 16
    assert counted(json.dumps({"a": [{"b": "]]"}], "c": 1})) == (3, 3, 4)
