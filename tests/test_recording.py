"""Laws of the recorder: what was recorded is there bit for bit, and training neither waits nor breaks."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from cmdgpu.column import HostColumn, Part
from cmdgpu.errors import (
    CmdgpuError,
    CmdgpuWarning,
    DurabilityUnknown,
    ModelMismatch,
    NotAStore,
    StepNotFound,
    StoreCorrupt,
    StoreExists,
    StoreLocked,
    UnsupportedTensor,
    UsageError,
    WriteFailed,
)
from cmdgpu.memory import MemoryMeter
from cmdgpu.models import unwrap
from cmdgpu.recording import Recorder
from cmdgpu.store import format as fmt
from cmdgpu.store.journal import Journal
from cmdgpu.store.verification import verify_store
from cmdgpu.trajectory import Trajectory
from tests.faults.disk import Disk
from tests.verbs import Net, check_same_bits, float_tensors, net_at, scramble, tree_bytes


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


def record_steps(path: Path, steps: Iterator[int] | range | list[int], **options: Any) -> None:
    model = Net()
    with Recorder(path, **options) as recorder:
        for step in steps:
            scramble(model, step)
            recorder.record(model, step)


def check_recorded(path: Path, steps: list[int]) -> None:
    traj = Trajectory.open(path)
    assert traj.steps.tolist() == steps
    for step in steps:
        check_same_bits(traj.state_dict(step), float_tensors(net_at(step)))
    assert traj.verify() == []


# ---- what is there afterwards -----------------------------------------------------------------------------


def test_what_was_recorded_is_there_bit_for_bit(path: Path) -> None:
    record_steps(path, [0, 3, 4])
    check_recorded(path, [0, 3, 4])


@pytest.mark.parametrize(("every", "kept"), [(1, [0, 1, 2, 3, 4, 5, 6]), (3, [0, 3, 6]), (10, [0])])
def test_steps_that_are_no_multiple_are_passed_over(path: Path, every: int, kept: list[int]) -> None:
    model = Net()
    with Recorder(path, every) as recorder:
        assert [step for step in range(7) if recorder.record(model, step)] == kept
    assert Trajectory.open(path).steps.tolist() == kept


def test_a_recording_is_taken_up_where_it_ended(path: Path) -> None:
    record_steps(path, [0, 1])
    with Recorder(path) as recorder:
        assert recorder.last_committed == 1
        with pytest.raises(UsageError, match="step 1 cannot follow step 1"):
            recorder.record(net_at(1), 1)
        recorder.record(net_at(2), 2)
    check_recorded(path, [0, 1, 2])


def test_the_store_appears_with_the_first_snapshot(path: Path) -> None:
    with Recorder(path / "deeper" / "run.zarr") as recorder:
        assert recorder.last_committed is None
        assert recorder.skipped == ()
    assert not (path / "deeper" / "run.zarr").exists()


def test_what_a_step_counts_is_kept(path: Path) -> None:
    record_steps(path, [0], unit="epoch")
    assert Trajectory.open(path).unit == "epoch"


def test_steps_and_counts_may_come_as_whatever_integer(path: Path) -> None:
    with Recorder(path) as recorder:
        recorder.record(net_at(1), np.int64(1))  # pyright: ignore[reportArgumentType]
        recorder.record(net_at(2), torch.tensor(2))  # pyright: ignore[reportArgumentType]
    check_recorded(path, [1, 2])


@pytest.mark.parametrize("step", [-1, 4, 5, 1 << 63, 1 << 80])
def test_a_step_that_cannot_be_is_refused_and_recording_goes_on(path: Path, step: int) -> None:
    with Recorder(path) as recorder:
        recorder.record(net_at(5), 5)
        with pytest.raises(UsageError, match=str(step)):
            recorder.record(net_at(6), step)
        recorder.record(net_at(6), 6)
    check_recorded(path, [5, 6])


def every_pattern(dtype: torch.dtype) -> nn.ParameterDict:
    """A tensor of all 16-bit patterns; in float32 they are the upper halves, over lower ones of all kinds."""
    upper = torch.arange(1 << 16, dtype=torch.int64)
    if dtype != torch.float32:
        return nn.ParameterDict({"w": upper.to(torch.uint16).view(dtype)})
    return nn.ParameterDict({"w": (upper << 16 | (upper * 40503) % 65536).to(torch.uint32).view(dtype)})


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_store_as_wide_as_the_model_gives_every_bit_back(path: Path, dtype: str) -> None:
    """NaN payloads and negative zeros too."""
    model = every_pattern(getattr(torch, dtype))
    with Recorder(path, dtype=dtype) as recorder:
        recorder.record(model, 0)
    traj = Trajectory.open(path)
    check_same_bits(traj.state_dict(0), float_tensors(model))
    twin = nn.ParameterDict({"w": torch.zeros_like(model["w"])})
    traj.load_into(twin, 0)
    check_same_bits(float_tensors(twin), float_tensors(model))


def test_a_bfloat16_model_survives_a_float32_store_to_the_bit(path: Path) -> None:
    model = every_pattern(torch.bfloat16)
    with Recorder(path) as recorder:
        recorder.record(model, 0)
    check_same_bits(Trajectory.open(path).state_dict(0), float_tensors(model))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_narrower_store_holds_the_nearest_values(path: Path, dtype: str) -> None:
    record_steps(path, [3], dtype=dtype)
    found, expected = Trajectory.open(path).state_dict(3), float_tensors(net_at(3))
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.to(getattr(torch, dtype)).to(tensor.dtype)), name


def test_chunks_hold_as_many_rows_as_asked_for(path: Path) -> None:
    record_steps(path, [0], rows_per_chunk=256)
    assert len(list((path / "weights").glob("c.*.0"))) == 3


def test_a_sketch_is_kept_unless_it_is_not_wanted(path: Path, tmp_path: Path) -> None:
    record_steps(path, [0])
    record_steps(tmp_path / "bare.zarr", [0], sketch=False)
    assert (path / "sketch").is_dir()
    assert not (tmp_path / "bare.zarr" / "sketch").exists()
    assert np.array_equal(
        Trajectory.open(path)[:, 0], Trajectory.open(tmp_path / "bare.zarr")[:, 0], equal_nan=True
    )


def test_the_copies_of_every_card_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model on two cards the column would otherwise be read before the second copy is there."""
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    column = HostColumn(6, fmt.storage("float32"))
    column.take([Part("w", 0, torch.zeros(6))])  # without a card: the memory need not be pinned
    parts: list[Part] = []
    for card in range(2):
        kind: Any = type("OnCard", (torch.Tensor,), {"is_cuda": True, "device": torch.device("cuda", card)})
        parts.append(Part("w", 3 * card, torch.full((3,), card + 1.0).as_subclass(kind)))
    assert column.take(parts).tolist() == [1, 1, 1, 2, 2, 2]
    assert sorted(map(str, waited)) == ["cuda:0", "cuda:1"]


# ---- scalars --------------------------------------------------------------------------------------------


def test_scalars_are_series_with_nan_where_not_given(path: Path) -> None:
    with Recorder(path) as recorder:
        recorder.record(net_at(0), 0, loss=2.5)
        recorder.record(net_at(1), 1)
        recorder.record(net_at(2), 2, loss=torch.tensor(0.5, requires_grad=True), accuracy=np.float32(0.25))
    with Recorder(path) as recorder:
        recorder.record(net_at(3), 3, accuracy=True)
    scalars = Trajectory.open(path).scalars
    nan = float("nan")
    assert np.array_equal(scalars["loss"], [2.5, nan, 0.5, nan], equal_nan=True)
    assert np.array_equal(scalars["accuracy"], [nan, nan, 0.25, 1.0], equal_nan=True)
    selected = Trajectory.open(path).sel(steps=[0, 2]).scalars
    assert selected["loss"].tolist() == [2.5, 0.5]


class Unready:
    """A number that is still being computed."""

    def __float__(self) -> float:
        raise AssertionError("somebody waits for it")


def test_nobody_waits_for_the_scalars_of_a_step_that_is_passed_over(path: Path) -> None:
    with Recorder(path, every=2) as recorder:
        assert not recorder.record(net_at(1), 1, loss=Unready())
        with pytest.raises(UsageError, match="cannot be named"):
            recorder.record(net_at(1), 1, weights=Unready())


BAD_NAMES = ["weights", "sketch", "sketch_row", "snapshot", "parameter", "a b", "a.b", "../x", "", "1a", "ä"]


@pytest.mark.parametrize("name", [*BAD_NAMES, "zarr.json", "x" * 65])
def test_a_name_no_scalar_can_have_is_refused_before_anything_happens(path: Path, name: str) -> None:
    with Recorder(path) as recorder, pytest.raises(UsageError, match="cannot be named"):
        recorder.record(net_at(0), 0, **{name: 1.0})
    assert not path.exists()


@pytest.mark.parametrize("value", ["x", None, [1.0], torch.ones(2), np.ones(2), 1j, 10**400])
def test_what_is_no_number_is_refused_by_name(path: Path, value: Any) -> None:
    with Recorder(path) as recorder:
        with pytest.raises(UsageError, match="'loss'"):
            recorder.record(net_at(0), 0, loss=value)
        recorder.record(net_at(0), 0, loss=1.0)
    check_recorded(path, [0])


# ---- which tensors --------------------------------------------------------------------------------------


def test_every_floating_tensor_of_the_state_dict_is_recorded_once(path: Path) -> None:
    with Recorder(path) as recorder:
        recorder.record(net_at(0), 0)
        assert recorder.skipped == (("body.1.num_batches_tracked", "int64 has no rows"),)
    parameters = Trajectory.open(path).parameters
    assert {t.name: t.kind for t in parameters} == {
        "embed.weight": "parameter",
        "body.0.weight": "parameter",
        "body.0.bias": "parameter",
        "body.1.weight": "parameter",
        "body.1.bias": "parameter",
        "scale": "parameter",
        "empty": "parameter",
        "turned": "parameter",
        "frozen": "parameter",
        "low": "parameter",
        "body.1.running_mean": "buffer",
        "body.1.running_var": "buffer",
        "running": "buffer",
    }
    assert parameters.aliases == {"head.weight": "embed.weight"}
    assert parameters["low"].dtype == "bfloat16"
    assert (parameters["scale"].shape, parameters["empty"].n_rows) == ((), 0)
    assert parameters.skipped == recorder.skipped


CHOICES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "include": ({"include": r"^body\.0"}, {"body.0.weight", "body.0.bias"}),
    "several": ({"include": ["scale", "turned"]}, {"scale", "turned"}),
    "exclude": ({"include": r"^body\.0", "exclude": "bias"}, {"body.0.weight"}),
    "no buffers": ({"include": r"body\.1", "buffers": "skip"}, {"body.1.weight", "body.1.bias"}),
    "only buffers": ({"include": "running"}, {"body.1.running_mean", "body.1.running_var", "running"}),
    "trainable": ({"include": ["frozen", "scale", "running"], "trainable_only": True},
                  {"scale", "running", "body.1.running_mean", "body.1.running_var"}),
    "the other name of a tie": ({"include": "head"}, {"head.weight"}),
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_only_the_tensors_that_were_chosen_are_recorded(path: Path, name: str) -> None:
    options, expected = CHOICES[name]
    with Recorder(path, **options) as recorder:
        assert recorder.record(net_at(0), 0)
        assert recorder.record(net_at(1), 1)
        skipped = {name for name, _ in recorder.skipped}
    traj = Trajectory.open(path)
    assert {t.name for t in traj.parameters} == expected
    everything = {n for n, _ in net_at(0).named_parameters(remove_duplicate=False)} | set(
        net_at(0).state_dict()
    )
    assert skipped == everything - expected
    for step in (0, 1):
        check_same_bits(
            traj.state_dict(step), {n: t for n, t in float_tensors(net_at(step)).items() if n in expected}
        )


def test_a_left_out_tensor_keeps_the_models_own_value(path: Path) -> None:
    with Recorder(path, exclude="body") as recorder:
        recorder.record(net_at(0), 0)
    model = net_at(5)
    Trajectory.open(path).load_into(model, 0)
    for name, tensor in float_tensors(model).items():
        source = net_at(5 if "body" in name else 0)
        check_same_bits({name: tensor}, {name: float_tensors(source)[name]})


class Holder(nn.Module):
    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.fine = nn.Parameter(torch.ones(3))
        self.register_buffer("odd", tensor)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.ones(2, dtype=torch.complex64), "complex64"),
        (torch.ones(2, device="meta"), "meta"),
        (torch.ones(2).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (torch.ones(2, 2).to_sparse(), "sparse"),
    ],
    ids=["complex", "meta", "float8", "sparse"],
)
def test_a_tensor_without_a_place_is_refused_by_name_before_anything_is_created(
    path: Path, tensor: torch.Tensor, words: str
) -> None:
    model = Holder(tensor)
    with Recorder(path) as recorder, pytest.raises(UnsupportedTensor, match=words) as caught:
        recorder.record(model, 0)
    assert caught.value.tensor == "odd"
    assert not path.exists()
    with Recorder(path, exclude="odd") as recorder:
        assert recorder.record(model, 0)


def test_a_name_that_no_file_format_holds_is_refused(path: Path) -> None:
    model = nn.ParameterDict({"half \ud800": nn.Parameter(torch.ones(3))})
    with Recorder(path) as recorder, pytest.raises(UnsupportedTensor, match="half a surrogate"):
        recorder.record(model, 0)
    assert not path.exists()


@pytest.mark.parametrize(
    "options", [{"include": "nothing"}, {"exclude": "."}, {"include": "empty"}], ids=repr
)
def test_nothing_to_record_is_said_before_a_store_is_made(path: Path, options: Any) -> None:
    with Recorder(path, **options) as recorder, pytest.raises(UsageError, match="nothing to record"):
        recorder.record(net_at(0), 0)
    assert not path.exists()


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "never": ({"every": 0}, "every"),
    "a type too wide": ({"dtype": "float64"}, "float32, float16, bfloat16"),
    "an unknown type": ({"dtype": "int8"}, "int8"),
    "unknown treatment": ({"buffers": "drop"}, "record, skip"),
    "a broken pattern": ({"include": "("}, r"'\(' is no regular expression"),
    "rows off the quantum": ({"rows_per_chunk": 100}, "256"),
    "no rows": ({"rows_per_chunk": 0}, "256"),
    "chunks beyond a gigabyte": ({"rows_per_chunk": (1 << 28) + 256}, "2\\^28"),
    "compressed chunks beyond 16 MiB": (
        {"rows_per_chunk": (1 << 22) + 256, "zstd": True},
        "2\\^22 with zstd",
    ),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_an_option_that_cannot_be_is_refused_before_training_starts(path: Path, name: str) -> None:
    options, words = BAD_OPTIONS[name]
    with pytest.raises(UsageError, match=words):
        Recorder(path, **options)
    assert not path.exists()


# ---- which path -----------------------------------------------------------------------------------------


def another_shape(model: Any) -> None:
    model.scale = nn.Parameter(torch.ones(2))


def another_type(model: Any) -> None:
    model.low = nn.Parameter(torch.ones(7))


def another_tie(model: Any) -> None:
    model.head.weight = nn.Parameter(torch.ones(20, 16))


def a_missing_one(model: Any) -> None:
    del model.running


def an_extra_one(model: Any) -> None:
    model.register_buffer("zz", torch.ones(1))


def another_order(model: Any) -> None:
    body = model.body
    model.body = None
    model.last = body


@pytest.mark.parametrize(
    ("change", "tensor"),
    [
        (another_shape, "scale"),
        (another_type, "low"),
        (another_tie, "running"),
        (a_missing_one, "running"),
        (an_extra_one, "body.1.running_mean"),
        (another_order, "body.0.weight"),
    ],
)
def test_another_model_is_refused_by_its_first_tensor_that_differs(
    path: Path, change: Callable[[Any], None], tensor: str
) -> None:
    record_steps(path, [0, 1])
    before = tree_bytes(path)
    other = Net()
    change(other)
    for same_recorder in (False, True):
        with Recorder(path) as recorder:
            if same_recorder:
                recorder.record(net_at(2), 2)
                recorder.flush()
                before = tree_bytes(path)
            with pytest.raises(ModelMismatch) as caught:
                recorder.record(other, 3)
            assert caught.value.tensor == tensor
            assert caught.value.file == str(path)
        assert tree_bytes(path) == before


def test_wrappers_are_looked_through(path: Path) -> None:
    class Compiled(nn.Module):
        """What torch.compile puts around a model."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self._orig_mod = model

    with Recorder(path) as recorder:
        recorder.record(net_at(0), 0)
        recorder.record(nn.DataParallel(net_at(1)), 1)
        recorder.record(Compiled(net_at(2)), 2)
        recorder.record(nn.DataParallel(Compiled(nn.DataParallel(net_at(3)))), 3)
        inner = net_at(4)
        inner.body = Compiled(inner.body)  # pyright: ignore[reportAttributeAccessIssue]
        recorder.record(inner, 4)
    check_recorded(path, [0, 1, 2, 3, 4])
    model = nn.DataParallel(Compiled(Net()))
    Trajectory.open(path).load_into(model, 3)
    check_same_bits(float_tensors(unwrap(model)), float_tensors(net_at(3)))


@pytest.mark.slow
def test_a_compiled_model_is_the_model(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own machinery, which is imported here
        compiled = cast(Any, torch).compile(net_at(0))
    with Recorder(path) as recorder:
        recorder.record(compiled, 0)
    check_recorded(path, [0])


@pytest.mark.parametrize("kind", ["file", "empty folder", "folder", "group", "dangling link"])
def test_a_path_that_is_something_else_is_refused_and_untouched(path: Path, kind: str) -> None:
    if kind == "file":
        path.write_text("precious")
    elif kind == "dangling link":
        path.symlink_to(path.parent / "nowhere")
    else:
        path.mkdir()
        if kind == "folder":
            (path / "precious").write_text("x")
        if kind == "group":
            (path / "zarr.json").write_text('{"zarr_format":3,"node_type":"group","attributes":{}}')
    before = tree_bytes(path.parent)
    with pytest.raises((StoreExists, UsageError)), Recorder(path) as recorder:
        recorder.record(net_at(0), 0)
    assert tree_bytes(path.parent) == before


def test_another_element_type_is_refused_naming_both(path: Path) -> None:
    record_steps(path, [0])
    with pytest.raises(StoreExists, match=r"holds float32, this recorder writes bfloat16"):
        Recorder(path, dtype="bfloat16")
    record_steps(path, [1])


@pytest.mark.parametrize("zstd", [False, True])
def test_a_store_keeps_the_codecs_it_was_made_with(path: Path, zstd: bool) -> None:
    with Recorder(path, zstd=zstd) as recorder:
        recorder.record(net_at(0), 0)
    made, mine = ("with", "without") if zstd else ("without", "with")
    with pytest.raises(StoreExists, match=f"made {made} zstd, this recorder writes {mine}; use zstd={zstd}"):
        Recorder(path, zstd=not zstd)
    with Recorder(path, zstd=zstd) as recorder:
        recorder.record(net_at(1), 1)
    with Recorder(path, zstd=zstd, rewind_to=0) as recorder:
        recorder.record(net_at(2), 2)
    check_recorded(path, [0, 2])
    assert Trajectory.open(path).verify() == []
    for array in ("weights", "sketch"):
        codecs = json.loads((path / array / "zarr.json").read_bytes())["codecs"]
        assert [codec["name"] for codec in codecs] == ["bytes", *["zstd"] * zstd, "crc32c"]


def test_what_hardly_changes_takes_little_room(path: Path, tmp_path: Path) -> None:
    """A frozen layer of zeros; noise hardly shrinks at all."""
    frozen = nn.Linear(200, 200)
    nn.init.zeros_(frozen.weight)
    model = nn.Sequential(nn.Linear(200, 200), frozen)
    for target, zstd in ((path, False), (tmp_path / "small.zarr", True)):
        with Recorder(target, zstd=zstd) as recorder:
            recorder.record(model, 0)
    small, plain = (Trajectory.open(p).stored_bytes for p in (tmp_path / "small.zarr", path))
    assert 0.3 * plain < small < 0.6 * plain
    assert small == sum(f.stat().st_size for f in (tmp_path / "small.zarr").glob("[ws]*/c.*.0"))


def test_a_damaged_store_is_refused_before_training_starts(path: Path) -> None:
    record_steps(path, [0])
    (path / "step" / "c.0").unlink()
    with pytest.raises(StoreCorrupt):
        Recorder(path)


def test_a_second_recorder_is_refused_until_the_first_is_closed(path: Path) -> None:
    first = Recorder(path)
    first.record(net_at(0), 0)
    with pytest.raises(StoreLocked):
        Recorder(path)
    first.close()
    record_steps(path, [1])
    check_recorded(path, [0, 1])


def test_of_two_recorders_of_a_new_path_the_later_one_is_refused(path: Path) -> None:
    first, second = Recorder(path), Recorder(path)
    first.record(net_at(0), 0)
    with pytest.raises((StoreExists, StoreLocked)):
        second.record(net_at(1), 1)
    first.close()
    second.close()
    check_recorded(path, [0])


# ---- going back -----------------------------------------------------------------------------------------


def test_training_restarted_from_a_checkpoint_is_recorded_from_there(path: Path) -> None:
    record_steps(path, [0, 5, 10, 15])
    with Recorder(path, rewind_to=5) as recorder:
        assert recorder.last_committed == 5
        recorder.record(net_at(7), 7)
    check_recorded(path, [0, 5, 7])


def test_a_step_to_go_back_to_that_was_not_recorded_is_refused_and_nothing_dropped(path: Path) -> None:
    record_steps(path, [0, 5, 10])
    with pytest.raises(StepNotFound, match="0, 5, 10"):
        Recorder(path, rewind_to=7)
    check_recorded(path, [0, 5, 10])
    record_steps(path, [11])  # the lock was given back


def test_there_is_no_going_back_in_nothing(path: Path) -> None:
    with pytest.raises(NotAStore):
        Recorder(path, rewind_to=0)
    assert not path.exists()


# ---- behind the back of training --------------------------------------------------------------------------


class Gate:
    """Before every commit the writer arrives here and waits until it is opened."""

    def __init__(self) -> None:
        self.arrived = threading.Event()
        self.opened = threading.Event()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    commit: Any = Journal.__dict__["_commit"]

    def held(journal: Journal, *args: Any) -> None:
        gate.arrived.set()
        assert gate.opened.wait(20)
        commit(journal, *args)

    monkeypatch.setattr(Journal, "_commit", held)
    yield gate
    gate.opened.set()


def test_record_returns_before_the_commit_and_acknowledges_nothing_before_it(path: Path, gate: Gate) -> None:
    recorder = Recorder(path)
    assert recorder.record(net_at(0), 0)
    assert gate.arrived.wait(20)
    assert recorder.last_committed is None
    assert Trajectory.open(path).steps.tolist() == []
    gate.opened.set()
    recorder.flush()
    assert recorder.last_committed == 0
    assert Trajectory.open(path).steps.tolist() == [0]
    recorder.close()


def test_training_may_go_on_while_the_snapshot_is_written(path: Path, gate: Gate) -> None:
    model = net_at(0)
    with Recorder(path) as recorder:
        recorder.record(model, 0)
        scramble(model, 1)  # the optimizer's next step
        gate.opened.set()
        recorder.record(model, 1)
        assert recorder.last_committed == 0
    check_recorded(path, [0, 1])


def test_at_most_one_snapshot_is_in_flight(path: Path, gate: Gate) -> None:
    recorder = Recorder(path)
    recorder.record(net_at(0), 0)
    second = threading.Thread(target=lambda: recorder.record(net_at(1), 1))
    second.start()
    second.join(0.2)
    assert second.is_alive(), "a second copy was taken while the first was not written"
    gate.opened.set()
    second.join(20)
    recorder.close()
    check_recorded(path, [0, 1])


def test_staging_holds_one_copy_of_the_model(path: Path) -> None:
    n = 4_000_000
    record_steps(path.with_name("first.zarr"), [0])  # what is imported and started once
    model = nn.ParameterDict({"w": torch.zeros(n)})
    with Recorder(path) as recorder, MemoryMeter() as meter:
        for step in range(3):
            recorder.record(model, step)
        recorder.flush()
    assert meter.above_start_bytes < 4 * n * 1.5, "more than one staging copy"


# ---- errors of the writer ---------------------------------------------------------------------------------


def fail_one_append(recorder: Recorder, step: int) -> None:
    """Record a snapshot whose first chunk the disk refuses."""
    with Disk(1, "disk").in_place():
        recorder.record(net_at(step), step)
        writing: Any = recorder.__dict__["_writing"]
        assert writing.exception(20) is not None


@pytest.mark.parametrize("how", ["record", "the same step again", "flush", "close"])
def test_an_error_of_the_writer_surfaces_at_the_next_call_and_recording_goes_on(path: Path, how: str) -> None:
    recorder = Recorder(path)
    recorder.record(net_at(0), 0, loss=1.0)
    recorder.flush()
    fail_one_append(recorder, 1)
    assert recorder.last_committed == 0
    with pytest.raises(WriteFailed) as caught:
        {
            "record": lambda: recorder.record(net_at(2), 2),
            "the same step again": lambda: recorder.record(net_at(1), 1),
            "flush": recorder.flush,
            "close": recorder.close,
        }[how]()
    assert caught.value.file is not None
    assert caught.value.hint is not None
    assert recorder.last_committed == 0
    if how == "close":
        recorder = Recorder(path)
    recorder.record(net_at(1), 1)
    recorder.record(net_at(3), 3)
    recorder.close()
    check_recorded(path, [0, 1, 3])


def test_after_an_unknown_outcome_the_store_is_opened_again(path: Path) -> None:
    recorder = Recorder(path)
    recorder.record(net_at(0), 0)
    recorder.flush()
    watched = Disk()
    with watched.in_place():
        recorder.record(net_at(1), 1)
        recorder.flush()
    last_flush = max(i for i, c in enumerate(watched.calls) if c.name == "fsync")
    with Disk(last_flush + 1, "disk").in_place():
        recorder.record(net_at(2), 2)
        with pytest.raises(DurabilityUnknown):
            recorder.flush()
    with pytest.raises(CmdgpuError):
        recorder.record(net_at(3), 3)
        recorder.flush()
    recorder.close()
    with Recorder(path) as recorder:
        assert recorder.last_committed in (1, 2)
        recorder.record(net_at(4), 4)
    check_recorded(path, [*Trajectory.open(path).steps.tolist()])


def test_the_trainings_own_exception_is_not_replaced(path: Path) -> None:
    with (
        pytest.warns(CmdgpuWarning, match="last snapshot was lost"),
        pytest.raises(KeyError, match="mine"),
        Recorder(path) as recorder,
    ):
        recorder.record(net_at(0), 0)
        recorder.flush()
        fail_one_append(recorder, 1)
        raise KeyError("mine")
    check_recorded(path, [0])


def test_an_exception_in_training_keeps_what_was_recorded(path: Path) -> None:
    with pytest.raises(KeyError), Recorder(path) as recorder:
        recorder.record(net_at(0), 0)
        raise KeyError("diverged")
    check_recorded(path, [0])
    record_steps(path, [1])


def test_leaving_the_block_raises_what_the_writer_met(path: Path) -> None:
    with pytest.raises(WriteFailed), Recorder(path) as recorder:
        recorder.record(net_at(0), 0)
        recorder.flush()
        fail_one_append(recorder, 1)
    record_steps(path, [2])
    check_recorded(path, [0, 2])


def test_a_closed_recorder_says_so_and_closes_twice(path: Path) -> None:
    recorder = Recorder(path)
    recorder.record(net_at(0), 0)
    recorder.close()
    recorder.close()
    assert recorder.last_committed == 0
    for call in (lambda: recorder.record(net_at(1), 1), recorder.flush):
        with pytest.raises(UsageError, match="closed"):
            call()


# ---- warnings -------------------------------------------------------------------------------------------


def test_rounding_of_float64_is_said_once(path: Path) -> None:
    model = nn.Linear(3, 2).double()
    with Recorder(path) as recorder, pytest.warns(CmdgpuWarning, match=r"float64.*'weight'") as caught:
        recorder.record(model, 0)
        recorder.record(model, 1)
    assert len(caught) == 1
    found = Trajectory.open(path).state_dict(1)
    assert found["weight"].dtype == torch.float64
    assert torch.equal(found["weight"], model.weight.detach().float().double())


def test_values_beyond_float16_are_counted_and_named_once(path: Path) -> None:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight[0] = torch.tensor([1e6, -1e6, float("inf")])
    with (
        Recorder(path, dtype="float16") as recorder,
        pytest.warns(CmdgpuWarning, match=r"'weight' holds 2 values beyond float16") as caught,
    ):
        recorder.record(model, 0)
        recorder.record(model, 1)
    assert len(caught) == 1
    assert Trajectory.open(path)[:3, 0].tolist() == [float("inf"), float("-inf"), float("inf")]


# ---- killed ---------------------------------------------------------------------------------------------

_RECORD_UNTIL_KILLED = """
import json, os, random, signal, sys, time
import torch, zarr
from torch import nn
from cmdgpu.recording import Recorder

path, trials = sys.argv[1], int(sys.argv[2])
model = nn.Linear(40, 30)

def train(pipe):
    recorder = Recorder(path, rows_per_chunk=256)
    first = -1 if recorder.last_committed is None else recorder.last_committed
    os.write(pipe, f"{first}\\n".encode())
    for step in range(first + 1, first + 10_000):
        generator = torch.Generator().manual_seed(step)
        with torch.no_grad():
            model.weight.copy_(torch.randn(30, 40, generator=generator))
        recorder.record(model, step, loss=step)
        os.write(pipe, f"{recorder.last_committed}\\n".encode())

for _ in range(trials):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        train(write)
        os._exit(1)
    os.close(write)
    with os.fdopen(read) as told:
        lines = [told.readline() for _ in range(random.randint(3, 5))]
        time.sleep(random.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        print(json.dumps([line.strip() for line in [*lines, *told]]), flush=True)
"""


def test_killed_at_any_moment_every_acknowledged_snapshot_is_there(path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _RECORD_UNTIL_KILLED, str(path), "12"],
        check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    acknowledged = -1
    for line in run.stdout.splitlines():
        told = [int(word) for word in json.loads(line) if word not in ("", "None")]
        assert told[0] >= acknowledged, "an acknowledged snapshot was not there after the kill"
        acknowledged = max(told)
    assert acknowledged >= 12, "hardly anything was recorded"
    assert verify_store(path).damaged == []
    Recorder(path).close()
    traj = Trajectory.open(path)
    assert traj.steps.tolist() == list(range(len(traj.steps)))
    assert len(traj.steps) > acknowledged
    assert traj.scalars["loss"].tolist() == traj.steps.tolist()
    for step in traj.steps.tolist():
        expected = torch.randn(30, 40, generator=torch.Generator().manual_seed(step))
        assert torch.equal(traj.state_dict(step, params="weight")["weight"], expected), f"step {step}"


def test_a_unit_that_no_reader_would_take_is_refused_before_training(tmp_path: Path) -> None:
    for unit in ("x" * 65, "step\x1b[31m", "a\nb"):
        with pytest.raises(UsageError, match="a unit named"):
            Recorder(tmp_path / "run.zarr", unit=unit)
    with Recorder(tmp_path / "run.zarr", unit="x" * 64) as recorder:
        recorder.record(net_at(0), 0)
    assert Trajectory.open(tmp_path / "run.zarr").shape[1] == 1
