"""Laws of names: which tensors are taken, and what they are called."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest

from cmdgpu.errors import CheckpointError, UnsupportedTensor, UsageError
from cmdgpu.importing.contract import Checkpoint, TensorInfo
from cmdgpu.importing.naming import Named, Rules, common_wrappers, kind_of, name_tensors


@dataclass(frozen=True)
class Header:
    """A checkpoint that has been looked at and no more."""

    tensors: Mapping[str, TensorInfo]
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    path: Path = Path("model.pt")
    skipped: tuple[tuple[str, str], ...] = ()
    models: tuple[str, ...] = ()


def named(
    tensors: Mapping[str, str] | list[str], aliases: Mapping[str, str] | None = None, **rules: Any
) -> Named:
    """``tensors`` are names, or name -> element type."""
    types = dict.fromkeys(tensors, "float32") if isinstance(tensors, list) else tensors
    header = Header({name: TensorInfo(dtype, (2,)) for name, dtype in types.items()}, aliases or {})
    settings: dict[str, Any] = {"prefix": "", "include": None, "exclude": None, "key_map": None, **rules}
    return name_tensors(cast(Checkpoint, header), Rules.of(**settings))


def test_wrappers_go_only_where_every_name_has_them() -> None:
    assert common_wrappers(["module._orig_mod.a", "module._orig_mod.b.c"]) == "module._orig_mod."
    assert common_wrappers(["model.model.a", "model.head"]) == "model."
    assert common_wrappers(["module.a", "b"]) == ""
    assert common_wrappers(["module."]) == "", "a name is never empty"
    assert common_wrappers([]) == ""
    found = named(["module.a", "module.b"])
    assert (dict(found.sources), found.stripped) == ({"a": "module.a", "b": "module.b"}, "module.")
    assert list(named(["module.a", "b"]).sources) == ["module.a", "b"]


def test_a_prefix_selects_and_is_taken_off_and_nothing_else_is() -> None:
    found = named(["net.model.a", "net.model.b", "ema.a"], prefix="net.")
    assert dict(found.sources) == {"model.a": "net.model.a", "model.b": "net.model.b"}
    assert found.skipped == (("ema.a", "not below net."),)


def test_filters_search_the_names_that_came_out() -> None:
    found = named(["module.a", "module.b.bias", "module.b.w"], include="^b", exclude=["bias$"])
    assert list(found.sources) == ["b.w"]
    assert dict(found.skipped) == {"module.a": "not included", "module.b.bias": "excluded"}


def test_a_key_map_renames_after_the_prefix(tmp_path: Path) -> None:
    assert list(named(["module.a", "module.b"], key_map={"a": "x"}).sources) == ["x", "b"]
    assert list(named(["a", "b"], key_map="net.{}".format).sources) == ["net.a", "net.b"]
    file = tmp_path / "names.json"
    file.write_text(json.dumps({"a": "x"}))
    assert list(named(["a", "b"], key_map=file).sources) == ["x", "b"]
    with pytest.raises(UsageError, match="renames 'c', and no tensor has that name"):
        named(["a", "b"], key_map={"c": "d"})
    for text, what in (
        ("{", "is no JSON;"),
        ('{"a": 1}', "is no JSON object of names"),
        ("[" * 10**5, "JSON"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=what):
            named(["a"], key_map=file)
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        named(["a"], key_map=tmp_path / "absent.json")
    with pytest.raises(UsageError, match="the key map answers int"):
        named(["a"], key_map=len)


def test_two_tensors_under_one_name_are_refused_with_both() -> None:
    with pytest.raises(CheckpointError, match=r"model\.pt: tensor 'x': 'a' and 'b' would both be called so"):
        named(["a", "b"], key_map={"a": "x", "b": "x"})


def test_types_decide_last() -> None:
    found = named({"w": "float64", "n": "int64", "mask": "bool", "q": "uint8", "h": "bfloat16"})
    assert list(found.sources) == ["w", "h"]
    assert found.skipped == (
        ("n", "int64 has no rows"), ("mask", "bool has no rows"), ("q", "uint8 has no rows"),
    )  # fmt: skip
    for dtype in ("complex64", "float8_e4m3fn"):
        with pytest.raises(UnsupportedTensor, match=f"tensor 'z': a tensor of {dtype} cannot be imported"):
            named({"w": "float32", "z": dtype})
        assert list(named({"w": "float32", "z": dtype}, exclude="^z$").sources) == ["w"]
    with pytest.raises(UnsupportedTensor, match="name no store can hold cannot be imported; rename it"):
        named(["\ud800"])


def test_tied_tensors_are_taken_once_under_the_first_name_that_is_taken() -> None:
    found = named(["embed", "b"], {"head": "embed"})
    assert (dict(found.sources), dict(found.aliases)) == ({"embed": "embed", "b": "b"}, {"head": "embed"})
    assert found.source_of("head", {}) == "embed" and found.source_of("none", {}) is None
    assert found.source_of("none", {"head": "none"}) == "embed"
    found = named(["embed", "b"], {"head": "embed"}, exclude="embed")
    assert (dict(found.sources), dict(found.aliases)) == ({"b": "b", "head": "embed"}, {})


def test_the_digest_vouches_for_which_tensor_is_which() -> None:
    straight = named(["a", "b"])
    assert straight.digest == named(["b", "a"]).digest
    assert straight.digest != named(["a", "b"], key_map={"a": "b", "b": "a"}).digest


def test_buffers_are_told_by_their_names() -> None:
    assert [kind_of(n) for n in ("bn.running_mean", "running_var", "bn.weight", "running_mean.w")] == [
        "buffer", "buffer", "parameter", "parameter",
    ]  # fmt: skip
