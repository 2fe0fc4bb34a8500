"""Laws of opening: no byte of a store or a checkpoint is ever run, and no text of a store ever gets past the
checks untyped.

The child of the first half installs its audit hook before it imports anything: what is started, connected or
unpickled from then on is on its list. Silence alone would prove nothing, so the same child must hear a plain
``pickle.load``, and a canary must die of it.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cmdgpu.decomposition import CMD
from cmdgpu.errors import CmdgpuError, CmdgpuWarning, StoreCorrupt
from cmdgpu.results import describe_result, kind_of, open_result, verify_result
from cmdgpu.store import format as fmt
from cmdgpu.store.chunks import crc32c
from cmdgpu.store.parameter_map import ParameterMap
from cmdgpu.store.verification import verify_store
from cmdgpu.store.view import StoreView
from cmdgpu.trajectory import Trajectory
from tests.faults import hostile
from tests.importing import hostile_files
from tests.verbs import LAYOUT, edit_document, edit_trajectory

# ---- nothing is run -------------------------------------------------------------------------------------

_CHILD: Final = """
import sys, os, json
events, armed = [], True
FORBIDDEN = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect",
             "pickle.find_class", "marshal.loads.foreign", "pty.spawn"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
top = os.path.realpath(sys.argv[1])
def hook(event, arguments):
    if not armed:
        return
    if event in FORBIDDEN:
        events.append(f"{event} {arguments!r}"[:200])
    elif event == "open" and not isinstance(arguments[0], int):
        flags = arguments[2] if isinstance(arguments[2], int) else 0
        name = os.fsdecode(arguments[0])
        if flags & WRITING and not os.path.realpath(name).startswith(top) and name != os.devnull:
            events.append(f"open {name!r} for writing")
sys.addaudithook(hook)
import warnings
from pathlib import Path
warnings.simplefilter("ignore")
exec(compile(sys.stdin.read(), "<question>", "exec"))
print(json.dumps({"events": events, "seen": seen}))
"""

_ALL_DOORS: Final = """
from tests.faults import hostile
from cmdgpu.errors import CmdgpuError
importing, events[:] = list(events), []
seen = {}
for store in sorted(Path(sys.argv[1]).glob("*/*.zarr")):
    if store.name == "run.zarr":
        continue
    doors = hostile.TRAJECTORY_DOORS if store.name == "hostile.zarr" else hostile.RESULT_DOORS
    for i, (name, door) in enumerate(doors.items()):
        out = store.parent / f"written-{i}"
        out.mkdir()
        try:
            door(store, out)
            became = "ok"
        except CmdgpuError:
            became = "refused"
        except Exception as error:
            became = type(error).__name__
        seen[f"{store.parent.name} {name}"] = became
events += [event for event in importing if not event.startswith("open")]
"""

_ALL_CHECKPOINTS: Final = """
import h5py  # asks uname what machine this is
events.clear()
import torch
from tests.importing.test_hostile import look
from cmdgpu.errors import CmdgpuError
importing, events[:] = list(events), []
seen = {}
for name, path in json.loads(Path(sys.argv[2]).read_text()).items():
    try:
        look(path)
        became = "ok"
    except CmdgpuError:
        became = "refused"
    except Exception as error:
        became = type(error).__name__
    seen[name] = became
events += [event for event in importing if not event.startswith("open")]
"""

_LOAD_PT_LOOSELY: Final = """
import torch
importing, events[:] = list(events), []
seen = None
torch.load(sys.argv[2], weights_only=False)
"""

_LOAD_PT: Final = """
import torch
importing, events[:] = list(events), []
seen = sorted(torch.load(sys.argv[2], weights_only=True))
"""

_LOAD_PICKLE: Final = """
import pickle
seen = None
with open(sys.argv[2], "rb") as file:
    pickle.load(file)
"""


def _run(question: str, folder: Path, *arguments: Path) -> dict[str, Any]:
    """The answer of a child whose hook was there before anything else."""
    ended = subprocess.run(
        [sys.executable, "-c", _CHILD, str(folder), *map(str, arguments)],
        input=question,
        capture_output=True,
        text=True,
        cwd=hostile.ROOT,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


class _Bomb:
    """Unpickled, it kills the canary."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return cast(Any, os).system, (f"rm -f {self._canary}",)


def _plant(store: Path, bomb: bytes) -> None:
    """The bomb wherever some reader might unpickle or import something."""
    for name in (".zattrs", ".zmetadata", ".metadata", "data.pkl", "conftest.py", "sitecustomize.py"):
        (store / name).write_bytes(bomb)
    (store / "__init__.py").write_text("import os; os.system('rm -f canary')")
    edit_document(store / fmt.DOCUMENT, lambda d: d["attributes"]["cmdgpu"].update(extra=bomb.hex()))


def _pickled_chunk(store: Path, name: str, bomb: bytes) -> None:
    """A chunk of the right size and with a right CRC, and a codec that would unpickle it."""
    file = next((store / name).glob("c.*"))
    size = file.stat().st_size - fmt.CRC_BYTES
    values = np.frombuffer(bomb.ljust(size, b"\0")[:size], dtype=np.uint8)
    file.write_bytes(values.tobytes() + crc32c(values))
    codec = {"name": "numcodecs.pickle", "configuration": {"protocol": 5}}
    edit_document(store / name / fmt.DOCUMENT, lambda d: d["codecs"].insert(0, codec))


@pytest.fixture
def bombs(tmp_path: Path) -> tuple[Path, Path, bytes]:
    """(folder of stores, canary, bomb)"""
    canary = tmp_path / "canary"
    canary.write_text("alive")
    folder = tmp_path / "stores"
    folder.mkdir()
    return folder, canary, pickle.dumps(_Bomb(canary))


def test_no_door_runs_what_lies_in_a_store(
    bombs: tuple[Path, Path, bytes], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    folder, canary, bomb = bombs
    base = hostile.make_bases(tmp_path)
    code = f"__import__('os').system('rm -f {canary}')"
    forgeries: dict[str, Callable[[Path], object]] = {
        "planted": lambda store: _plant(store, bomb),
        "code as names": lambda store: edit_trajectory(
            store, lambda d: d["attributes"]["cmdgpu"]["layout"]["tensors"][1].update(name=code)
        ),
        "pickled chunks": lambda store: _pickled_chunk(store, fmt.WEIGHTS, bomb),
        "pickled steps": lambda store: _pickled_chunk(store, fmt.STEP, bomb),
        "a pickle as document": lambda store: (store / fmt.DOCUMENT).write_bytes(bomb),
        "a pickle as commit": lambda store: (store / fmt.WEIGHTS / fmt.DOCUMENT).write_bytes(bomb),
    }
    result_forgeries: dict[str, Callable[[Path], object]] = {
        "planted in a result": lambda store: _plant(store, bomb),
        "pickled references": lambda store: _pickled_chunk(store, "references", bomb),
        "code as settings": lambda store: edit_document(
            store / fmt.DOCUMENT, lambda d: d["attributes"]["cmdgpu"]["config"].update(sampling=code)
        ),
        "a pickle as document of a result": lambda store: (store / fmt.DOCUMENT).write_bytes(bomb),
    }
    for name, forge in forgeries.items():
        forge(Path(shutil.copytree(base / "run.zarr", folder / name / "hostile.zarr")))
    for name, forge in result_forgeries.items():
        store = Path(shutil.copytree(base / "out.zarr", folder / name / "out.zarr"))
        shutil.copytree(base / "run.zarr", folder / name / "run.zarr")
        shutil.copyfile(base / "fingerprint", folder / name / "fingerprint")
        forge(store)
    found = _run(_ALL_DOORS, folder)
    record_property("doors", len(found["seen"]))
    assert len(found["seen"]) >= 80
    assert found["events"] == []
    assert canary.exists()
    assert set(found["seen"].values()) <= {"ok", "refused"}, found["seen"]


def test_an_exported_checkpoint_loads_without_running_anything(
    bombs: tuple[Path, Path, bytes], tmp_path: Path
) -> None:
    """With the strict loader of torch: what the product writes never needs the other one."""
    folder, canary, _ = bombs
    base = hostile.make_bases(tmp_path)
    edit_trajectory(
        base / "run.zarr",
        lambda d: d["attributes"]["cmdgpu"]["layout"]["tensors"][1].update(name="cos\nsystem\n(S'x'\ntR."),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CmdgpuWarning)  # its buffers are out of reach now
        CMD.load(base / "out.zarr").export(folder / "result.pt", -1)
    Trajectory.open(base / "run.zarr").export(folder / "recorded.pt", -1)
    for file in ("result.pt", "recorded.pt"):
        found = _run(_LOAD_PT, folder, folder / file)
        assert found["events"] == []
        assert "embed.weight" in found["seen"]
    assert canary.exists()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """(folder, every odd or hostile checkpoint by name, but for those that only take long)"""
    folder = tmp_path_factory.mktemp("checkpoints") / "cases"
    return folder, hostile_files.lay_out(
        folder, [name for name in hostile_files.CORPUS if "million" not in name]
    )


def test_no_importer_runs_what_lies_in_a_checkpoint(
    checkpoints: tuple[Path, dict[str, Path]], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Every format, from the first look to the last number."""
    folder, paths = checkpoints
    (tmp_path / "paths.json").write_text(json.dumps({name: str(path) for name, path in paths.items()}))
    found = _run(_ALL_CHECKPOINTS, folder, tmp_path / "paths.json")
    record_property("checkpoints", len(found["seen"]))
    assert found["events"] == []
    assert (folder / "canary").exists()
    assert set(found["seen"]) == set(paths)
    assert set(found["seen"].values()) == {"ok", "refused"}, found["seen"]


def test_the_same_checkpoint_loaded_loosely_is_heard_and_kills_the_canary(
    checkpoints: tuple[Path, dict[str, Path]],
) -> None:
    """The positive control: what the importer refuses is live."""
    folder, paths = checkpoints
    canary = folder / "canary"
    try:
        found = _run(_LOAD_PT_LOOSELY, folder, paths["torch: side effects"])
        assert any(event.startswith("os.system") for event in found["events"])
        assert not canary.exists()
    finally:
        canary.write_text("alive")


def test_the_hook_hears_and_the_canary_dies_where_something_is_unpickled(
    bombs: tuple[Path, Path, bytes],
) -> None:
    """The positive control."""
    folder, canary, bomb = bombs
    (folder / "bomb.pkl").write_bytes(bomb)
    found = _run(_LOAD_PICKLE, folder, folder / "bomb.pkl")
    assert any(event.startswith("pickle.find_class") for event in found["events"])
    assert any(event.startswith("os.system") for event in found["events"])
    assert not canary.exists()


def test_the_strict_loader_of_torch_refuses_the_bomb(bombs: tuple[Path, Path, bytes]) -> None:
    folder, canary, _ = bombs
    torch.save({"w": _Bomb(canary)}, folder / "bomb.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(folder / "bomb.pt", weights_only=True)
    assert canary.exists()


# ---- every text is refused in type ----------------------------------------------------------------------

FILE: Final = Path("zarr.json")
_NUMBERS: Final = st.sampled_from(
    [0, 1, -1, 2, 3, 255, 256, 1 << 31, 1 << 62, 1 << 63, 10**12, 1 << 70, 0.5, -0.0, 1e300, True, False]
)
_TEXTS: Final = st.sampled_from(
    ["", "x", "float32", "parameter", "NaN", "../x", "/etc", "a\0b", "\x1b[2J", "\ud800", "w" * 2000]
)
JSON: Final = st.recursive(
    st.none() | _NUMBERS | _TEXTS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["name", "row", "size", "offset", "pieces", "shape", "x"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@st.composite
def mutated(draw: st.DrawFn, document: Any) -> Any:
    """The document with up to three places replaced, taken out, doubled or added to."""
    found = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        places = _places(found)
        if not places:
            return found
        owner, key = draw(st.sampled_from(places))
        what = draw(st.sampled_from(["replace", "replace", "remove", "double", "add"]))
        if what == "replace":
            owner[key] = draw(JSON)
        elif what == "remove":
            del owner[key]
        elif what == "double" and isinstance(owner, list):
            cast(list[Any], owner).append(copy.deepcopy(cast(list[Any], owner)[key]))
        elif isinstance(owner, dict):
            owner[draw(_TEXTS)] = draw(JSON)
    return found


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a document."""
    inner: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        inner = list(cast(dict[Any, Any], value).items())
    elif isinstance(value, list):
        inner = list(enumerate(cast(list[Any], value)))
    return [(cast(Any, value), key) for key, _ in inner] + [place for _, v in inner for place in _places(v)]


def only_ours(action: Callable[[], object]) -> None:
    """Whatever comes out is ours, and one line that a terminal can show."""
    try:
        action()
    except CmdgpuError as error:
        text = str(error)
        assert len(text) <= hostile.LONGEST_TEXT, f"a text of {len(text)} characters"
        assert hostile.is_printable(text), repr(text)


def _encode(text: str, coding: str) -> bytes:
    return text.encode(coding, "surrogatepass")


_JSON_TEXT: Final = st.text(alphabet='{}[]":,0129eE.-+ nultrfasN\\u\u2200', max_size=80)


@given(
    raw=st.binary(max_size=200)
    | st.builds(_encode, _JSON_TEXT, st.sampled_from(["utf-8", "utf-16", "utf-16-le", "utf-32", "utf-8-sig"]))
    | JSON.map(lambda value: json.dumps(value).encode())
)
@example(raw=b'{"a":"' + b'\\"' * 3000)
@example(raw=('{"\u2200":' + "[" * 100_000 + "]" * 100_000 + ',"\u2200":1}').encode("utf-16"))
def test_any_bytes_are_an_object_or_refused(raw: bytes) -> None:
    def parse() -> None:
        assert isinstance(fmt.parse(raw, FILE), dict)

    only_ours(parse)


@given(layout=mutated(LAYOUT.to_json()) | JSON)
def test_any_layout_is_a_layout_or_refused(layout: Any) -> None:
    def read() -> None:
        found = ParameterMap.from_json(layout, FILE)
        found.segments(0, found.n_rows)
        found.name_rows(0, found.n_rows)
        if found.spans:
            found.locate(found.spans[-1][1] - 1)

    only_ours(read)


_ARRAY: Final[Any] = fmt.array_document(
    (622, 3), (256, 1), "float32", ("parameter", "snapshot"), float("nan"), {"cmdgpu": fmt.own("weights")}
)


@given(document=mutated(_ARRAY))
def test_any_array_is_one_of_ours_or_refused(document: Any) -> None:
    if (found := fmt.as_dict(document)) is not None:
        only_ours(lambda: fmt.check_array(found, FILE, ("parameter", "snapshot"), float("nan")))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile.make_bases(tmp_path_factory.mktemp("fuzz"))


def _put(file: Path, document: Any) -> None:
    """Sealed, where there is a place for a seal."""
    with contextlib.suppress(KeyError, TypeError, AttributeError):
        fmt.seal(document)
    file.write_bytes(json.dumps(document, separators=(",", ":")).encode())  # as the product spells


_FIXTURE: Final = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@_FIXTURE
@given(data=st.data(), name=st.sampled_from(["", fmt.WEIGHTS, fmt.STEP, fmt.SKETCH, fmt.SKETCH_ROW]))
def test_any_document_of_a_trajectory_is_read_or_refused(base: Path, data: st.DataObject, name: str) -> None:
    file, commit = base / "run.zarr" / name / fmt.DOCUMENT, base / "run.zarr" / fmt.WEIGHTS / fmt.DOCUMENT
    raw, tied = file.read_bytes(), commit.read_bytes()
    try:
        document = data.draw(mutated(json.loads(raw)))
        _put(file, document)
        if name == "":
            with contextlib.suppress(KeyError, TypeError, AttributeError):
                seal = document["attributes"]["cmdgpu"]["self"]
                edit_document(commit, lambda d: d["attributes"]["cmdgpu"].update(layout=seal))
        for door in (StoreView.open, verify_store, kind_of):
            only_ours(lambda door=door: door(base / "run.zarr"))
    finally:
        commit.write_bytes(tied)
        file.write_bytes(raw)


@_FIXTURE
@given(data=st.data())
def test_any_head_of_a_result_is_read_or_refused(base: Path, data: st.DataObject) -> None:
    file = base / "out.zarr" / fmt.DOCUMENT
    raw = file.read_bytes()
    try:
        _put(file, data.draw(mutated(json.loads(raw))))
        for door in (open_result, describe_result, verify_result, kind_of, CMD.load):
            only_ours(lambda door=door: door(base / "out.zarr"))
    finally:
        file.write_bytes(raw)


@_FIXTURE
@given(data=st.data(), name=st.sampled_from(["references", "sample_row", "linkage"]))
def test_any_document_of_an_array_of_a_result_is_read_or_refused(
    base: Path, data: st.DataObject, name: str
) -> None:
    file = base / "out.zarr" / name / fmt.DOCUMENT
    raw = file.read_bytes()
    try:
        _put(file, data.draw(mutated(json.loads(raw))))
        for door in (open_result, verify_result):
            only_ours(lambda door=door: door(base / "out.zarr"))
    finally:
        file.write_bytes(raw)


def test_the_fuzzer_of_these_tests_can_write_what_is_accepted(base: Path) -> None:
    """Or it would only ever test the seal."""
    file = base / "run.zarr" / fmt.DOCUMENT
    raw = file.read_bytes()
    document = json.loads(raw)
    document["attributes"]["cmdgpu"]["unit"] = "epoch"
    _put(file, document)
    assert kind_of(base / "run.zarr") == "trajectory"
    fmt.read_document(file, "group", "trajectory")
    with pytest.raises(StoreCorrupt, match="another layout"):
        StoreView.open(base / "run.zarr")
    file.write_bytes(raw)
