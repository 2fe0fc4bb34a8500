"""Laws of the layout: every row belongs to one place of one tensor, or to a hole."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmdgpu.errors import CmdgpuError, ModelMismatch, UsageError
from cmdgpu.store import parameter_map
from cmdgpu.store.parameter_map import ParameterMap, Piece, TensorEntry, whole
from tests.strategies import layouts
from tests.verbs import LAYOUT, N

FILE = Path("zarr.json")


@given(layouts())
def test_a_layout_survives_json(layout: ParameterMap) -> None:
    assert ParameterMap.from_json(layout.to_json(), FILE) == layout


@given(layouts())
def test_every_row_lies_in_exactly_one_tensor_or_hole(layout: ParameterMap) -> None:
    owner: dict[int, str] = {}
    for tensor in layout:
        assert sum(piece.n_rows for piece in tensor.pieces) == tensor.n_rows == math.prod(tensor.shape)
        for row in itertools.chain(*(range(piece.row, piece.stop) for piece in tensor.pieces)):
            assert row not in owner
            owner[row] = tensor.name
    holes = {row for start, stop in layout.holes for row in range(start, stop)}
    assert not holes & set(owner)
    assert holes | set(owner) == set(range(layout.n_rows))


@given(layouts(), st.data())
def test_segments_are_the_runs_of_tensors_in_a_range(layout: ParameterMap, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, max(layout.n_rows - 1, 0)))
    stop = data.draw(st.integers(start, layout.n_rows))
    found = {row: s.tensor for s in layout.segments(start, stop) for row in range(s.start, s.stop)}
    expected = {
        row: i
        for i, tensor in enumerate(layout)
        for piece in tensor.pieces
        for row in range(max(piece.row, start), min(piece.stop, stop))
    }
    assert found == expected
    runs = [s.start for s in layout.segments(start, stop)]
    assert runs == sorted(runs)


@given(layouts(), st.data())
def test_a_row_is_the_element_its_piece_lays_out_in_c_order(
    layout: ParameterMap, data: st.DataObject
) -> None:
    tensors = [tensor for tensor in layout if tensor.n_rows]
    if not tensors:
        return
    tensor = data.draw(st.sampled_from(tensors))
    piece = data.draw(st.sampled_from(tensor.pieces))
    k = data.draw(st.integers(0, piece.n_rows - 1))
    at = next(itertools.islice(itertools.product(*map(range, piece.size)), k, None))
    place = [i + o for i, o in zip(at, piece.offset, strict=True)]
    assert layout.locate(piece.row + k) == f"{tensor.name}{place if place else ''}"


@given(layouts(), st.data())
def test_some_of_the_tensors_keep_their_rows_and_those_of_the_others_are_holes(
    layout: ParameterMap, data: st.DataObject
) -> None:
    kept = {tensor.name for tensor in layout if data.draw(st.booleans())}
    some = layout.only(kept)
    assert ParameterMap.from_json(some.to_json(), FILE) == some, "every row has one place"
    assert (some.n_rows, [t.name for t in some]) == (
        layout.n_rows,
        [t.name for t in layout if t.name in kept],
    )
    assert all(some[name] is layout[name] for name in kept)
    assert some.aliases == {alias: name for alias, name in layout.aliases.items() if name in kept}
    gone = {t.name for t in layout} - kept
    assert dict(some.skipped) == {
        **dict(layout.skipped),
        **dict.fromkeys(gone, "not selected"),
        **{alias: "not selected" for alias, name in layout.aliases.items() if name in gone},
    }
    live = np.zeros(layout.n_rows, dtype=bool)
    for tensor in some:
        for piece in tensor.pieces:
            live[piece.row : piece.stop] = True
    assert some.n_live == live.sum()
    assert np.array_equal(some.are_live(np.arange(layout.n_rows)), live)
    start = data.draw(st.integers(0, layout.n_rows))
    stop = data.draw(st.integers(start, layout.n_rows))
    found = some.holes_in(start, stop)
    assert [row for low, high in found for row in range(low, high)] == [
        row for row in range(start, stop) if not live[row]
    ]
    assert all(low < high for low, high in found)
    assert all(high < low for (_, high), (low, _) in itertools.pairwise(found)), "holes that touch are one"


def test_one_tensor_of_many_leaves_two_holes() -> None:
    many = ParameterMap(whole([(f"layer{i}.w", "parameter", "float32", (3,)) for i in range(2000)]))
    one = many.only(["layer700.w"])
    assert one.holes == ((0, 2100), (2103, 6000))
    assert len(repr(many)) < 200 and repr(one) == "ParameterMap(3 of 6000 rows in 1 tensors: layer700.w [3])"
    assert many.only([t.name for t in many]) is many
    with pytest.raises(KeyError, match="layer2000"):
        many.only(["layer0.w", "layer2000.w"])


def test_modules_are_the_first_components_in_row_order() -> None:
    names = ["scale", "g.in.w", "g.in.b", "d.w", "g.out.w", "d.norm.mean"]
    layout = ParameterMap(whole([(name, "parameter", "float32", (2,)) for name in names]), {"a.b": "d.w"})
    assert layout.modules() == ["scale", "g", "d"]
    assert layout.modules(2) == ["scale", "g.in", "d.w", "g.out", "d.norm"]
    assert layout.modules(9) == names
    with pytest.raises(UsageError, match="at least 1"):
        layout.modules(0)


def test_a_row_of_a_hole_belongs_to_nobody() -> None:
    layout = ParameterMap(whole([("w", "parameter", "float32", (3,))]), holes=((3, 5),))
    with pytest.raises(CmdgpuError, match="row 4"):
        layout.locate(4)
    assert layout.name_rows(3, 5) == "no tensor"
    assert layout.n_rows == 5


def test_rows_are_named_by_their_first_tensor_and_how_many_follow() -> None:
    assert LAYOUT.name_rows(0, 320) == "embed.weight"
    assert LAYOUT.name_rows(319, 321) == "embed.weight +1"
    assert LAYOUT.name_rows(0, N) == "embed.weight +3"


def test_a_name_that_would_act_on_a_terminal_is_escaped() -> None:
    layout = ParameterMap(whole([("a\x1b[2J\nb", "parameter", "float32", (3,))]))
    for text in (layout.name_rows(0, 3), layout.locate(1)):
        assert text.isprintable()
        assert "\\x1b" in text


def test_a_tensor_is_found_under_every_name_it_has() -> None:
    assert LAYOUT["head.weight"] is LAYOUT["embed.weight"] is LAYOUT.tensors[0]
    assert "head.weight" in LAYOUT
    assert "tail.weight" not in LAYOUT
    assert [t.name for t in LAYOUT] == ["embed.weight", "fc.weight", "fc.bias", "norm.running_mean"]
    assert (LAYOUT.n_rows_of("parameter"), LAYOUT.n_rows_of("buffer")) == (N - 30, 30)


def test_tensors_follow_one_another_an_empty_one_takes_no_rows() -> None:
    layout = ParameterMap(
        whole(
            [
                ("scalar", "parameter", "float32", ()),
                ("empty", "parameter", "float32", (0, 4)),
                ("w", "buffer", "float64", (2, 3)),
            ]
        )
    )
    assert layout["scalar"].pieces == (Piece((), (), 0),)
    assert layout["empty"].pieces == ()
    assert layout["w"].pieces == (Piece((0, 0), (2, 3), 1),)
    assert layout.n_rows == 7


def _with(i: int, **changes: object) -> ParameterMap:
    tensors = list(LAYOUT.tensors)
    tensors[i] = replace(tensors[i], **changes)  # pyright: ignore[reportArgumentType]
    return ParameterMap(tuple(tensors), LAYOUT.aliases)


OTHERS: dict[str, tuple[ParameterMap, str, str]] = {
    "another name": (_with(1, name="fd.weight"), "fc.weight", "'fd.weight'"),
    "another shape": (_with(2, shape=(17,)), "fc.bias", r"\[16\].*\[17\]"),
    "another type": (_with(2, dtype="float64"), "fc.bias", "float32.*float64"),
    "another kind": (_with(3, kind="parameter"), "norm.running_mean", "buffer.*parameter"),
    "one less": (ParameterMap(LAYOUT.tensors[:3], LAYOUT.aliases), "norm.running_mean", "model lacks it"),
    "one more": (
        ParameterMap(
            (*LAYOUT.tensors, TensorEntry("more", "parameter", "float32", (1,), ())), LAYOUT.aliases
        ),
        "more",
        "store lacks it",
    ),
    "no tie": (ParameterMap(LAYOUT.tensors, {}), "head.weight", "tied in one"),
    "another tie": (ParameterMap(LAYOUT.tensors, {"head.weight": "fc.weight"}), "head.weight", "tied in one"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_first_tensor_that_differs_is_named(name: str) -> None:
    other, tensor, words = OTHERS[name]
    with pytest.raises(ModelMismatch, match=words) as caught:
        LAYOUT.require(other, "run.zarr")
    assert (caught.value.tensor, caught.value.file) == (tensor, "run.zarr")
    assert caught.value.hint is not None


def test_what_was_skipped_does_not_make_another_model() -> None:
    LAYOUT.require(ParameterMap(LAYOUT.tensors, LAYOUT.aliases, (), (("x", "why"),)), "run.zarr")


@st.composite
def _boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Piece]]:
    """A small tensor cut at random, now and then with one box moved, stretched, doubled or lost."""
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=3)))
    boxes = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 5)) if shape else 0):
        offset, size = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        k = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(0, size[k]))
        for low, n in ((0, at), (at, size[k] - at)):
            if n:
                boxes.append((_put(offset, k, offset[k] + low), _put(size, k, n)))
    match draw(st.sampled_from(["whole", "moved", "stretched", "doubled", "lost"])) if shape else "whole":
        case "moved":
            offset, size = boxes[0]
            boxes[0] = (_put(offset, 0, offset[0] + 1), size)
        case "stretched":
            offset, size = boxes[0]
            boxes[0] = (offset, _put(size, 0, size[0] + 1))
        case "doubled":
            boxes.append(boxes[0])
        case "lost":
            boxes.pop()
        case _:
            pass
    return shape, [Piece(offset, size, 0) for offset, size in boxes]


def _put(values: tuple[int, ...], k: int, value: int) -> tuple[int, ...]:
    return (*values[:k], value, *values[k + 1 :])


@given(_boxes())
def test_pieces_tile_a_tensor_when_every_element_lies_in_exactly_one(
    found: tuple[tuple[int, ...], list[Piece]],
) -> None:
    shape, pieces = found
    counts: Counter[tuple[int, ...]] = Counter()
    for piece in pieces:
        counts.update(itertools.product(*map(range, piece.offset, np.add(piece.offset, piece.size))))
    expected = dict.fromkeys(itertools.product(*map(range, shape)), 1)
    assert parameter_map.tile(pieces, shape) == (counts == expected)


def test_a_tensor_that_is_cut_along_more_axes_than_anybody_cuts_is_refused_without_counting_its_corners() -> (
    None
):
    n = 60
    halves = [Piece((0,) * n, (1,) * n, 0)] + [
        Piece((0,) * k + (1,) + (0,) * (n - k - 1), (2,) * k + (1,) * (n - k), 0) for k in range(n)
    ]
    assert not parameter_map.tile(halves, (2,) * n)
