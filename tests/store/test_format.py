"""Laws of the metadata: nothing is believed that this package would not have written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmdgpu.errors import CmdgpuError, NotAStore, StoreCorrupt, UsageError
from cmdgpu.store import format as fmt
from cmdgpu.store.parameter_map import ParameterMap, whole
from cmdgpu.store.verification import verify_store
from cmdgpu.store.view import StoreView
from cmdgpu.trajectory import Trajectory
from tests.verbs import (
    ROWS,
    STEPS,
    N,
    S,
    append,
    build_store,
    create_store,
    edit_document,
    edit_trajectory,
    flip_bit,
    tree_bytes,
)

Edit = Callable[[Any], object]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_store(tmp_path_factory.mktemp("base") / "run.zarr")


@pytest.fixture
def store(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "run.zarr"))


def document(store: Path, name: str = "") -> Any:
    return json.loads((store / name / fmt.DOCUMENT).read_bytes())


# ---- what is written ------------------------------------------------------------------------------------


def test_the_documents_are_the_ones_the_format_describes(base: Path) -> None:
    group, weights = document(base), document(base, fmt.WEIGHTS)
    mine, head = group["attributes"]["cmdgpu"], weights["attributes"]["cmdgpu"]
    assert set(group) == {"zarr_format", "node_type", "attributes"}
    assert (mine["kind"], mine["format"], mine["unit"]) == ("trajectory", 1, "step")
    assert mine["layout"]["rows"] == N
    assert mine["layout"]["tensors"][1] == {
        "name": "fc.weight",
        "kind": "parameter",
        "dtype": "float32",
        "shape": [16, 16],
        "pieces": [{"offset": [0, 0], "size": [16, 16], "row": 320}],
    }
    assert mine["layout"]["aliases"] == {"head.weight": "embed.weight"}
    assert {key: weights[key] for key in weights if key != "attributes"} == {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [N, 3],
        "data_type": "float32",
        "dimension_names": ["parameter", "snapshot"],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [ROWS, 1]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": "NaN",
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "storage_transformers": [],
    }
    assert weights["attributes"]["coordinates"] == "step"
    assert (head["kind"], head["format"], head["steps"]) == ("weights", 1, list(STEPS))
    assert head["layout"] == mine["self"]


@pytest.mark.parametrize("name", ["", "weights", "step", "loss", "sketch", "sketch_row"])
def test_every_document_is_sealed_by_the_sha256_of_its_canonical_json(base: Path, name: str) -> None:
    found = document(base, name)
    said = found["attributes"]["cmdgpu"].pop("self")
    text = json.dumps(found, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    assert said == "sha256:" + hashlib.sha256(text.encode("ascii")).hexdigest()
    assert found["attributes"]["cmdgpu"]["format"] == 1


def test_small_arrays_are_vouched_for_by_the_sha256_of_their_values(base: Path) -> None:
    small = document(base, fmt.WEIGHTS)["attributes"]["cmdgpu"]["small"]
    loss = np.array([step / 4 for step in STEPS], dtype="<f8")
    assert set(small) == {"step", "loss", "sketch_row"}
    assert small["step"] == hashlib.sha256(np.array(STEPS, dtype="<i8").tobytes()).hexdigest()
    assert small["loss"] == hashlib.sha256(loss.tobytes()).hexdigest()


def test_nothing_else_lies_in_a_store(base: Path) -> None:
    expected = {"zarr.json"}
    expected |= {f"weights/c.{i}.{t}" for i in range(3) for t in range(3)} | {"weights/zarr.json"}
    expected |= {f"sketch/c.0.{t}" for t in range(3)} | {"sketch/zarr.json"}
    expected |= {f"{name}/{file}" for name in ("step", "loss", "sketch_row") for file in ("c.0", "zarr.json")}
    assert set(tree_bytes(base)) == expected


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_every_chunk_holds_whole_rows_and_a_crc_padded_with_the_fill(
    tmp_path: Path, dtype: str, itemsize: int
) -> None:
    store = build_store(tmp_path / "run.zarr", dtype=dtype)
    for i in range(3):
        raw = (store / fmt.WEIGHTS / fmt.chunk_name(i, 1)).read_bytes()
        assert len(raw) == ROWS * itemsize + 4
        elements = np.frombuffer(raw[:-4], dtype=fmt.storage(dtype).numpy)
        padding = elements[max(N - i * ROWS, 0) :]
        if dtype == "bfloat16":
            assert (padding == 0x7FC0).all()
        else:
            assert np.isnan(padding).all()
        assert raw[-4:] == crc32c_bit_by_bit(raw[:-4]).to_bytes(4, "little")


def crc32c_bit_by_bit(data: bytes) -> int:
    """The definition (Castagnoli, reflected), from which a table or an instruction must not differ."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_bfloat16_is_uint16_with_an_attribute_that_says_so(tmp_path: Path) -> None:
    store = build_store(tmp_path / "run.zarr", dtype="bfloat16")
    weights = document(store, fmt.WEIGHTS)
    assert (weights["data_type"], weights["fill_value"]) == ("uint16", 0x7FC0)
    assert weights["attributes"]["cmdgpu"]["torch_dtype"] == "bfloat16"
    assert StoreView.open(store).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("n_rows", "rows"),
    [(1, 256), (256, 256), (257, 512), (1 << 18, 1 << 18), (10**8, 1 << 18), (10**9, 1 << 20)],
)
def test_chunks_hold_a_multiple_of_256_rows_and_a_megabyte_or_four(n_rows: int, rows: int) -> None:
    assert fmt.default_rows_per_chunk(n_rows) == rows


# ---- damage ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fewest bytes of metadata a trajectory can have."""
    layout = ParameterMap(whole([("w", "parameter", "float32", (2,))]))
    path = tmp_path_factory.mktemp("tiny") / "run.zarr"
    journal = create_store(path, sketch=False, layout=layout)
    append(journal, 3)
    journal.close()
    return path


@pytest.mark.parametrize(
    ("name", "node_type", "kind"),
    [("", "group", "trajectory"), (fmt.WEIGHTS, "array", "weights"), (fmt.STEP, "array", "small")],
)
def test_every_flipped_bit_of_every_document_is_an_error(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, name: str, node_type: str, kind: str
) -> None:
    file = tiny / name / fmt.DOCUMENT
    raw = file.read_bytes()
    fmt.read_document(file, node_type, kind)
    silent: list[int] = []
    damaged = bytearray(raw)

    def read_damaged(path: Path) -> bytes:
        return bytes(damaged)

    monkeypatch.setattr(fmt, "read_bytes", read_damaged)
    for bit in range(8 * len(raw)):
        damaged[:] = raw
        damaged[bit // 8] ^= 1 << (bit % 8)
        try:
            fmt.read_document(file, node_type, kind)
            silent.append(bit)
        except CmdgpuError:
            pass
    assert silent == []


@pytest.mark.parametrize("name", ["", "weights", "step", "loss", "sketch", "sketch_row"])
def test_a_flipped_bit_stops_every_door(store: Path, name: str) -> None:
    file = store / name / fmt.DOCUMENT
    size = 8 * len(file.read_bytes())
    for bit in range(17, size, 911):
        flip_bit(file, bit)
        with pytest.raises((StoreCorrupt, NotAStore)):
            Trajectory.open(store)
        with contextlib.suppress(NotAStore):
            assert verify_store(store).damaged != []
        flip_bit(file, bit)
    assert verify_store(store).damaged == []


@pytest.mark.parametrize("keep", [0, 1, 0.5, -1])
def test_a_truncated_document_is_an_error(store: Path, keep: float) -> None:
    for name in ("", "weights", "step", "sketch", "loss"):
        file = store / name / fmt.DOCUMENT
        raw = file.read_bytes()
        file.write_bytes(raw[: int(keep * len(raw)) if keep == 0.5 else int(keep)])
        with pytest.raises((StoreCorrupt, NotAStore)):
            StoreView.open(store)
        file.write_bytes(raw)


def test_a_missing_commit_file_is_damage_and_not_an_empty_trajectory(store: Path) -> None:
    (store / fmt.WEIGHTS / fmt.DOCUMENT).unlink()
    with pytest.raises(StoreCorrupt, match=r"weights/zarr\.json"):
        StoreView.open(store)
    (damage,) = verify_store(store).damaged
    assert damage.file == str(store / fmt.WEIGHTS / fmt.DOCUMENT)


def test_a_document_of_another_store_does_not_fit(store: Path, tmp_path: Path) -> None:
    """Both are whole; what differs is what ties them."""
    layout = ParameterMap(whole([("other", "parameter", "float32", (N,))]))
    journal = create_store(tmp_path / "other.zarr", layout=layout)
    for step in STEPS:
        append(journal, step, loss=1.0)
    journal.close()
    for name in ("", "weights", "step", "loss", "sketch_row"):
        source = tmp_path / "other.zarr" / name
        target = Path(shutil.copytree(store, tmp_path / f"target-{name}"))
        for file in source.iterdir():
            if file.is_file() and file.name != ".lock" and (name or file.name == fmt.DOCUMENT):
                shutil.copy(file, target / name / file.name)
        if name == "step":  # the same labels: nothing is wrong
            StoreView.open(target)
            continue
        with pytest.raises(StoreCorrupt):
            StoreView.open(target)


# ---- hostile documents ----------------------------------------------------------------------------------


def test_a_key_that_appears_twice_is_refused(store: Path) -> None:
    file = store / fmt.WEIGHTS / fmt.DOCUMENT
    file.write_bytes(file.read_bytes().replace(b'"shape":', b'"shape":[1,1],"shape":', 1))
    with pytest.raises(StoreCorrupt, match="twice"):
        StoreView.open(store)


HOSTILE_BYTES: dict[str, bytes] = {
    "deep lists": b"[" * 200_000,
    "deep objects": b'{"a":' * 200_000,
    "deep and closed": b'{"attributes":{"cmdgpu":' + b"[" * 10_000 + b"]" * 10_000 + b"}}",
    "not a number": b'{"attributes":{"cmdgpu":{"format":1,"self":"x","v":NaN}}}',
    "infinity": b'{"attributes":{"cmdgpu":{"format":1,"self":"x","v":1e999}}}',
    "endless digits": b'{"attributes":{"cmdgpu":{"format":1,"v":' + b"9" * 10_000 + b"}}}",
    "version as text": b'{"attributes":{"cmdgpu":{"format":"1"}}}',
    "attribute that is a list": b'{"attributes":{"cmdgpu":[]}}',
    "no attributes": b'{"attributes":null}',
    "text": b'"text"',
    "null": b"null",
    "no UTF-8": b"\xff\xfe\x00",
    "zeros": b"\x00" * 100,
    "empty": b"",
}


@pytest.mark.parametrize("name", HOSTILE_BYTES)
def test_whatever_a_document_holds_the_answer_is_ours(store: Path, name: str) -> None:
    for place in ("", fmt.WEIGHTS, fmt.STEP):
        file = store / place / fmt.DOCUMENT
        good = file.read_bytes()
        file.write_bytes(HOSTILE_BYTES[name])
        with pytest.raises((StoreCorrupt, NotAStore)):
            StoreView.open(store)
        file.write_bytes(good)


_SNIPPETS = st.text(alphabet='{}[]":,0129eE.-+ nultrfasN\\u', max_size=60)


@given(raw=st.binary(max_size=200) | _SNIPPETS.map(str.encode))
def test_parsing_any_bytes_gives_an_object_or_a_typed_error(raw: bytes) -> None:
    with contextlib.suppress(StoreCorrupt):
        assert isinstance(fmt.parse(raw, Path("zarr.json")), dict)


def test_an_absurd_size_is_refused_before_a_byte_is_read(store: Path) -> None:
    with (store / fmt.WEIGHTS / fmt.DOCUMENT).open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(StoreCorrupt, match=str(1 << 40)):
        StoreView.open(store)


@pytest.mark.parametrize("version", [0, 2, 99])
def test_another_format_version_is_refused_naming_both(store: Path, version: int) -> None:
    def edit(found: Any) -> None:
        found["attributes"]["cmdgpu"]["format"] = version

    for name in ("", fmt.WEIGHTS):
        file = store / name / fmt.DOCUMENT
        good = file.read_bytes()
        edit_document(file, edit)
        with pytest.raises(NotAStore, match=rf"version {version}\b.*version 1\b"):
            Trajectory.open(store)
        edit_document(file, edit, sealed=False)
        file.write_bytes(good)


def test_another_kind_is_refused_by_name(store: Path) -> None:
    edit_document(store / fmt.DOCUMENT, lambda d: d["attributes"]["cmdgpu"].update(kind="result"))
    with pytest.raises(NotAStore, match="'result', not a 'trajectory'"):
        Trajectory.open(store)


def test_a_path_that_holds_no_store_says_what_was_expected(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "zarr.json").write_text('{"zarr_format":3,"node_type":"group","attributes":{}}')
    with pytest.raises(UsageError, match="nothing here"):
        Trajectory.open(tmp_path / "absent")
    for name in ("file", "folder", "foreign"):
        with pytest.raises(NotAStore, match="is no store of cmdgpu") as caught:
            Trajectory.open(tmp_path / name)
        assert caught.value.file == str(tmp_path / name)


def _set(**keys: Any) -> Edit:
    return lambda found: found.update(keys)


def _head(**keys: Any) -> Edit:
    return lambda found: found["attributes"]["cmdgpu"].update(keys)


def _without(key: str) -> Edit:
    return lambda found: found.pop(key)


_BYTES: Any = {"name": "bytes", "configuration": {"endian": "little"}}
_ZSTD: Any = {"name": "zstd", "configuration": {"level": 1, "checksum": False}}
_WITH_ZSTD: Any = [_BYTES, _ZSTD, {"name": "crc32c"}]
HOSTILE_WEIGHTS: dict[str, Edit] = {
    "fewer snapshots than steps": _set(shape=[N, 2]),
    "more snapshots than steps": _set(shape=[N, 4]),
    "negative rows": _set(shape=[-1, 3]),
    "more rows than memory": _set(shape=[1 << 63, 3]),
    "rows that are no number": _set(shape=["x", 3]),
    "rows that are a float": _set(shape=[float(N), 3]),
    "rows that are true": _set(shape=[True, 3]),
    "one axis": _set(shape=[N]),
    "shape that is no list": _set(shape=N),
    "absurd chunks": _set(chunk_grid={"name": "regular", "configuration": {"chunk_shape": [10**12, 1]}}),
    "no rows in a chunk": _set(chunk_grid={"name": "regular", "configuration": {"chunk_shape": [0, 1]}}),
    "rows off the quantum": _set(chunk_grid={"name": "regular", "configuration": {"chunk_shape": [100, 1]}}),
    "two snapshots a chunk": _set(chunk_grid={"name": "regular", "configuration": {"chunk_shape": [256, 2]}}),
    "another grid": _set(chunk_grid={"name": "rectilinear", "configuration": {"chunk_shape": [256, 1]}}),
    "grid without configuration": _set(chunk_grid={"name": "regular"}),
    "grid configured by a number": _set(chunk_grid={"name": "regular", "configuration": 5}),
    "grid that is no object": _set(chunk_grid=[256, 1]),
    "no grid": _without("chunk_grid"),
    "unknown codec": _set(codecs=[_BYTES, {"name": "numcodecs.pickle"}, {"name": "crc32c"}]),
    "no crc": _set(codecs=[_BYTES]),
    "no codecs": _set(codecs=[]),
    "codecs that are numbers": _set(codecs=[1, 2]),
    "codecs that are text": _set(codecs=["bytes", "crc32c"]),
    "codecs in another order": _set(codecs=[{"name": "crc32c"}, _BYTES]),
    "zstd in weights and not in the sketch": _set(codecs=_WITH_ZSTD),
    "big endian": _set(codecs=[{"name": "bytes", "configuration": {"endian": "big"}}, {"name": "crc32c"}]),
    "data type of objects": _set(data_type="object"),
    "data type nobody knows": _set(data_type="f4,{"),
    "data type that is no text": _set(data_type={"name": "numpy.datetime64"}),
    "wider data type": _set(data_type="float64"),
    "uint16 that is no bfloat16": _set(data_type="uint16"),
    "bfloat16 in float32": _head(torch_dtype="bfloat16"),
    "torch type that is a list": _head(torch_dtype=["float32"]),
    "fill that looks like a weight": _set(fill_value=0.0),
    "unknown key": _set(extra=1),
    "storage transformer": _set(storage_transformers=[{"name": "x"}]),
    "other dimensions": _set(dimension_names=["param", "step"]),
    "chunks in folders": _set(
        chunk_key_encoding={"name": "default", "configuration": {"separator": "/"}}
    ),
    "Zarr v2": _set(zarr_format=2),
    "a group": _set(node_type="group"),
    "steps that fall": _head(steps=[0, 25, 10]),
    "steps that repeat": _head(steps=[0, 10, 10]),
    "negative step": _head(steps=[-5, 10, 25]),
    "step that is a float": _head(steps=[0, 10.0, 25]),
    "step beyond int64": _head(steps=[0, 10, 1 << 63]),
    "steps that are others": _head(steps=[0, 10, 26]),
    "steps that are no list": _head(steps={"0": 1}),
    "too few digests": _head(digests=["0" * 64]),
    "digests that are numbers": _head(digests=[1, 2, 3]),
    "digests that are no list": _head(digests=None),
    "small arrays that are a list": _head(small=[]),
    "small arrays without step": _head(small={}),
    "another layout": _head(layout="sha256:" + "0" * 64),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_WEIGHTS)
def test_a_forged_commit_document_is_refused(store: Path, name: str) -> None:
    edit_document(store / fmt.WEIGHTS / fmt.DOCUMENT, HOSTILE_WEIGHTS[name])
    with pytest.raises((StoreCorrupt, NotAStore)):
        view = StoreView.open(store)
        view.crcs(0)  # digests are believed or not when a column is met first


_opened: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None and not isinstance(arguments[0], int):
        _opened.append(os.fsdecode(arguments[0]))


@pytest.fixture
def opened_files() -> list[str]:
    """Every path this process opens from now on. An audit hook cannot be taken out, so it is a switch."""
    global _opened
    if not getattr(sys, "_cmdgpu_audited", False):
        sys.addaudithook(_audit)
        setattr(sys, "_cmdgpu_audited", True)  # noqa: B010
    _opened = []
    return _opened


@pytest.mark.parametrize("name", ["../outside", "/etc", "loss/../../outside", "a\0b", "", ".", "weights "])
def test_a_scalar_name_never_leads_out_of_the_store(store: Path, opened_files: list[str], name: str) -> None:
    outside = store.parent / "outside"
    shutil.copytree(store / "loss", outside)

    def edit(found: Any) -> None:
        small = found["attributes"]["cmdgpu"]["small"]
        small[name] = small["loss"]

    edit_document(store / fmt.WEIGHTS / fmt.DOCUMENT, edit)
    opened_files.clear()
    with pytest.raises(StoreCorrupt):
        StoreView.open(store)
    inside = os.path.realpath(store)
    assert [path for path in opened_files if not os.path.realpath(path).startswith(inside)] == []


@pytest.mark.parametrize("name", [fmt.WEIGHTS, fmt.STEP, fmt.SKETCH, "loss"])
def test_an_array_behind_a_symbolic_link_is_refused(store: Path, name: str) -> None:
    outside = store.parent / f"outside-{name}"
    shutil.move(store / name, outside)
    (store / name).symlink_to(outside)
    with pytest.raises(StoreCorrupt):
        StoreView.open(store)


@pytest.mark.parametrize("kind", ["symlink", "fifo", "directory"])
@pytest.mark.parametrize("name", ["", fmt.WEIGHTS, fmt.STEP])
def test_a_document_that_is_no_regular_file_is_refused_at_once(store: Path, name: str, kind: str) -> None:
    file = store / name / fmt.DOCUMENT
    if kind == "symlink":
        shutil.move(file, store.parent / "outside.json")
        file.symlink_to(store.parent / "outside.json")
    else:
        file.unlink()
        if kind == "fifo":
            os.mkfifo(file)
        else:
            file.mkdir()
    with pytest.raises((StoreCorrupt, NotAStore)):
        StoreView.open(store)


HOSTILE_SMALL: dict[str, tuple[str, Edit]] = {
    "more steps than memory": (fmt.STEP, _set(shape=[1 << 61])),
    "fewer steps than committed": (fmt.STEP, _set(shape=[2])),
    "chunks of a gigabyte": (
        fmt.STEP, _set(chunk_grid={"name": "regular", "configuration": {"chunk_shape": [1 << 27]}})
    ),
    "steps of float": (fmt.STEP, _set(data_type="float64")),
    "more sample rows than memory": (fmt.SKETCH_ROW, _set(shape=[1 << 61])),
    "sample rows of a petabyte": (fmt.SKETCH_ROW, _set(shape=[1 << 47])),
    "fewer sample rows": (fmt.SKETCH_ROW, _set(shape=[3])),
    "sketch of another height": (fmt.SKETCH, _set(shape=[S + 1, 3])),
    "sketch of fewer snapshots": (fmt.SKETCH, _set(shape=[S, 2])),
    "sketch of another type": (fmt.SKETCH, _set(data_type="float64")),
    "zstd in the sketch and not in weights": (fmt.SKETCH, _set(codecs=_WITH_ZSTD)),
    "zstd in the steps": (fmt.STEP, _set(codecs=_WITH_ZSTD)),
    "loss of another kind": ("loss", lambda d: d["attributes"]["cmdgpu"].update(kind="weights")),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_SMALL)
def test_a_forged_small_array_is_refused(store: Path, name: str) -> None:
    array, edit = HOSTILE_SMALL[name]
    edit_document(store / array / fmt.DOCUMENT, edit)
    if name == "more steps than memory":  # what lies beyond T is ignored, however long it says it is
        StoreView.open(store)
        return
    with pytest.raises((StoreCorrupt, NotAStore)):
        StoreView.open(store)


def _layout(edit: Edit) -> Edit:
    return lambda found: edit(found["attributes"]["cmdgpu"]["layout"])


def _tensor(i: int, **keys: Any) -> Edit:
    return _layout(lambda layout: layout["tensors"][i].update(keys))


def _piece(i: int, **keys: Any) -> Edit:
    return _layout(lambda layout: layout["tensors"][i]["pieces"][0].update(keys))


def _halves(found: Any) -> None:
    """Both pieces of fc.bias are its first half: every row is covered, half of the tensor is not."""
    found["attributes"]["cmdgpu"]["layout"]["tensors"][2]["pieces"] = [
        {"offset": [0], "size": [8], "row": 576},
        {"offset": [0], "size": [8], "row": 584},
    ]


HOSTILE_LAYOUTS: dict[str, Edit] = {
    "no layout": lambda found: found["attributes"]["cmdgpu"].pop("layout"),
    "layout that is a list": lambda found: found["attributes"]["cmdgpu"].update(layout=[]),
    "no tensors": _layout(lambda layout: layout.pop("tensors")),
    "a name twice": _tensor(1, name="embed.weight"),
    "a name that is an alias": _tensor(1, name="head.weight"),
    "a name that is a number": _tensor(1, name=5),
    "a kind nobody knows": _tensor(1, kind="optimizer"),
    "a type nobody knows": _tensor(1, dtype="complex64"),
    "rows covered twice": _piece(1, row=319),
    "rows not covered": _piece(1, row=321),
    "a piece outside of its tensor": _piece(1, offset=[1, 0]),
    "a piece smaller than its tensor": _piece(1, size=[16, 15]),
    "a piece with a negative row": _piece(1, row=-1),
    "a piece with too few axes": _piece(1, offset=[0], size=[256]),
    "a shape with a negative size": _tensor(1, shape=[-16, -16]),
    "half of a tensor twice": _halves,
    "more rows than are covered": _layout(lambda layout: layout.update(rows=N + 1)),
    "an alias of nothing": _layout(lambda layout: layout["aliases"].update(x="nothing")),
    "an alias of an alias": _layout(lambda layout: layout["aliases"].update(x="head.weight")),
    "a hole over rows": _layout(lambda layout: layout["holes"].append([0, 10])),
    "a hole that ends before it starts": _layout(lambda layout: layout["holes"].append([N, N - 1])),
    "a hole of three numbers": _layout(lambda layout: layout["holes"].append([N, N, N])),
    "skipped without a reason": _layout(lambda layout: layout["skipped"].append({"name": "x"})),
}


@pytest.mark.parametrize("name", HOSTILE_LAYOUTS)
def test_a_forged_layout_is_refused(store: Path, name: str) -> None:
    edit_trajectory(store, HOSTILE_LAYOUTS[name])
    with pytest.raises(StoreCorrupt):
        StoreView.open(store)


def test_the_forger_of_these_tests_can_write_what_is_accepted(store: Path) -> None:
    """Or all of the above would pass for a broken seal."""
    edit_document(store / fmt.WEIGHTS / fmt.DOCUMENT, lambda found: None)
    edit_document(store / fmt.STEP / fmt.DOCUMENT, lambda found: found["shape"].__setitem__(0, 900))
    edit_trajectory(store, _tensor(1, name="renamed"))
    view = StoreView.open(store)
    assert view.map.tensors[1].name == "renamed"
    view.crcs(0)


# ---- numbers --------------------------------------------------------------------------------------------


def test_bfloat16_patterns_widen_to_the_numbers_they_are_and_back() -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    numbers = fmt.widen(patterns, "bfloat16")
    assert numbers.dtype == np.float32
    exponent, fraction = (patterns >> 7) & 0xFF, patterns & 0x7F
    finite = exponent < 255
    sign = np.where(patterns >> 15, -1.0, 1.0)
    scale = np.where(exponent == 0, 2.0**-126, 2.0 ** (exponent.astype(float) - 127))
    value = sign * scale * (fraction / 128 + (exponent > 0))
    assert (numbers[finite] == value[finite]).all()
    assert (np.signbit(numbers) == (patterns >> 15 == 1)).all()
    assert np.isnan(numbers[(exponent == 255) & (fraction > 0)]).all()
    assert np.array_equal(fmt.narrow(numbers, "bfloat16"), patterns), "a NaN lost its bits"


@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_narrowing_to_bfloat16_takes_the_nearest_one_ties_to_even(values: list[float]) -> None:
    numbers = np.array(values, dtype=np.float32)
    found = fmt.widen(fmt.narrow(numbers, "bfloat16"), "bfloat16").astype(np.float64)
    for value, near in zip(numbers.tolist(), found.tolist(), strict=True):
        if math.isnan(value):
            assert math.isnan(near)
            continue
        _, exponent = math.frexp(value) if math.isfinite(value) else (0.0, 0)
        step = 2.0 ** (max(exponent, -125) - 8)
        if not math.isfinite(value) or abs(value) > 3.39e38:
            assert near == value or math.isinf(near)
        else:
            assert near == round(value / step) * step


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=10,
    )
)
def test_a_sealed_document_survives_its_own_encoding(value: Any) -> None:
    sealed = fmt.seal({"attributes": {"cmdgpu": {"format": 1, "value": value}}})
    assert fmt.is_sealed(fmt.parse(fmt.encode(sealed), Path("zarr.json")))
    sealed["attributes"]["more"] = 1
    assert not fmt.is_sealed(sealed)


def test_a_document_that_would_not_be_read_back_is_not_written() -> None:
    with pytest.raises(UsageError, match="several stores"):
        fmt.encode({"a": "x" * (32 << 20)})
    with pytest.raises(UsageError, match="several stores"):
        fmt.encode({"a": [1] * ((1 << 20) + 1)})
    largest = fmt.encode({"a": [1] * (1 << 20)})
    assert len(fmt.parse(largest, Path("zarr.json"))["a"]) == 1 << 20
