"""Laws of what a person reads when something goes wrong."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from cmdgpu import errors
from cmdgpu.errors import CmdgpuError, StepNotFound, UsageError, WriteFailed, printable
from cmdgpu.registry import Registry


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({}, "found"),
        ({"hint": "do"}, "found; do"),
        ({"file": Path("a/b")}, "a/b: found"),
        ({"file": "a", "tensor": "w", "step": 3, "hint": "do"}, "a: tensor 'w' at step 3: found; do"),
        ({"file": "a", "step": 0}, "a: step 0: found"),
        ({"tensor": "w"}, "tensor 'w': found"),
        ({"tensor": "w", "step": 3}, "tensor 'w' at step 3: found"),
    ],
)
def test_an_error_is_one_line_absent_parts_left_out(fields: dict[str, object], line: str) -> None:
    error = WriteFailed("found", **fields)  # pyright: ignore[reportArgumentType]
    assert str(error) == line
    for name in ("file", "tensor", "step", "hint"):
        given = fields.get(name)
        assert getattr(error, name) == (str(given) if isinstance(given, Path) else given)
    assert error.message == "found"


def test_every_error_is_of_one_tree_and_says_when_it_comes() -> None:
    tree = [
        member
        for member in vars(errors).values()
        if isinstance(member, type) and issubclass(member, Exception) and member.__module__ == errors.__name__
    ]
    assert len(tree) > 10
    for member in tree:
        assert issubclass(member, (CmdgpuError, errors.CmdgpuWarning))
        assert member.__doc__


def test_a_name_from_a_file_does_nothing_to_a_terminal() -> None:
    hostile = "layer\x1b[31m\n\r\u202eevil\0"
    line = str(CmdgpuError("found", tensor=hostile))
    assert line.isprintable()
    assert printable(hostile).isprintable()
    assert printable("weight.ü.日本") == "weight.ü.日本"
    assert printable("a" * 1000).endswith("… (1000 characters)")
    assert len(printable("a" * 10**6)) < 200


def test_an_error_survives_the_way_between_processes() -> None:
    error = StepNotFound("is not recorded", file="run.zarr", step=3, hint="nearest: 2")
    twin = pickle.loads(pickle.dumps(error))
    assert type(twin) is StepNotFound
    assert str(twin) == str(error)
    assert (twin.file, twin.step, twin.hint, twin.message) == ("run.zarr", 3, "nearest: 2", "is not recorded")


def test_a_registry_lists_what_it_knows_and_refuses_a_second_claim() -> None:
    registry: Registry[int] = Registry("colour")
    assert registry.add("red", 1) == 1
    registry.add("blue", 2)
    assert registry["red"] == 1
    assert list(registry) == ["red", "blue"]
    assert len(registry) == 2
    with pytest.raises(UsageError, match="no colour named 'green'; have: blue, red"):
        _ = registry["green"]
    with pytest.raises(CmdgpuError, match="'red' is registered twice"):
        registry.add("red", 3)
    assert registry["red"] == 1
