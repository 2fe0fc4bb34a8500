"""Laws of the way back: state dict, model and file are what was recorded, bit for bit."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from torch import Tensor, nn

from cmdgpu import tensors as tensors_module
from cmdgpu.cli import cli
from cmdgpu.errors import (
    DurabilityUnknown,
    ModelMismatch,
    StepNotFound,
    StoreCorrupt,
    UsageError,
    WriteFailed,
)
from cmdgpu.exporting import FORMATS, Export
from cmdgpu.models import Choice, describe_model, named_tensors
from cmdgpu.recording import Recorder
from cmdgpu.store.parameter_map import ParameterMap, Piece, TensorEntry
from cmdgpu.tensors import build, flat_blocks
from cmdgpu.trajectory import Trajectory
from tests.faults.disk import every_fault
from tests.verbs import Net, check_same_bits, flip_bit, float_tensors, leftovers, net_at, scramble

SUFFIX = {"safetensors": ".safetensors", "pt": ".pt"}


def load_safetensors(path: Path) -> dict[str, Tensor]:
    with cast(Any, safe_open)(path, framework="pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
        aliases = json.loads(file.metadata()["aliases"])
    return found | {alias: found[name] for alias, name in aliases.items()}


def load_pt(path: Path) -> dict[str, Tensor]:
    return cast(Any, torch).load(path, weights_only=True)


LOADERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {"safetensors": load_safetensors, "pt": load_pt}


@pytest.fixture(scope="module")
def traj(tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    path = tmp_path_factory.mktemp("base") / "run.zarr"
    model = Net()
    with Recorder(path, rows_per_chunk=256) as recorder:
        for step in (0, 10, 25):
            scramble(model, step)
            recorder.record(model, step)
    return Trajectory.open(path)


def weird_model() -> nn.Module:
    """Every floating type; NaN payloads, signed zeros, subnormals; tensors over chunk borders."""
    odd = torch.tensor([0x7FC00123, 0xFF800001, 0x80000000, 1, 0xFF7FFFFF], dtype=torch.uint32)
    model = nn.ParameterDict(
        {
            "odd": odd.view(torch.float32).repeat(70),
            "small": torch.tensor([-0.0, 65504.0, 6e-8, -1.5], dtype=torch.float16),
            "low": torch.tensor([0x7FC5, 0x8000, 0xFF80, 0x0001], dtype=torch.uint16).view(torch.bfloat16),
            "big": torch.linspace(-1, 1, 300, dtype=torch.float64).float().double(),
            "none": torch.empty(3, 0),
            "one": torch.tensor(-0.0),
            "last": torch.arange(700.0).reshape(7, 10, 10).permute(2, 0, 1),
        }
    )
    model.register_buffer("count", torch.tensor(3))
    return model


# ---- files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(FORMATS))
def test_a_file_holds_what_was_recorded_bit_for_bit(traj: Trajectory, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "deeper" / f"model{SUFFIX[kind]}"
    told = traj.export(out, 10)
    check_same_bits(LOADERS[kind](out), float_tensors(net_at(10)))
    assert told == Export(out, kind, 13, out.stat().st_size, ())
    assert leftovers(out.parent) == []


@pytest.mark.filterwarnings("ignore:float64 tensors:cmdgpu.errors.CmdgpuWarning")
@pytest.mark.parametrize("kind", list(FORMATS))
def test_no_value_is_too_odd(tmp_path: Path, kind: str) -> None:
    model = weird_model()
    with Recorder(tmp_path / "run.zarr", rows_per_chunk=256) as recorder:
        recorder.record(model, 0)
    traj = Trajectory.open(tmp_path / "run.zarr")
    traj.export(tmp_path / "model", 0, kind)
    check_same_bits(LOADERS[kind](tmp_path / "model"), float_tensors(model))
    check_same_bits(traj.state_dict(0), float_tensors(model))
    twin = weird_model()
    with torch.no_grad():
        for tensor in float_tensors(twin).values():
            tensor.zero_()
    traj.load_into(twin, 0)
    check_same_bits(float_tensors(twin), float_tensors(model))


@pytest.mark.parametrize("kind", list(FORMATS))
def test_blocks_of_any_size_make_the_same_file(
    traj: Trajectory, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    traj.export(tmp_path / "whole", 25, kind)
    monkeypatch.setattr(tensors_module, "BLOCK_ROWS", 7)
    traj.export(tmp_path / "blocks", 25, kind)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "blocks").read_bytes()


def test_a_pt_file_loads_into_the_model_that_was_recorded_ties_intact(
    traj: Trajectory, tmp_path: Path
) -> None:
    traj.export(tmp_path / "m.pt", -1)
    found = load_pt(tmp_path / "m.pt")
    assert found["head.weight"].data_ptr() == found["embed.weight"].data_ptr()
    model = Net()
    model.load_state_dict(found)
    check_same_bits(float_tensors(model), float_tensors(net_at(25)))


def test_a_safetensors_file_holds_a_tied_tensor_once_and_names_it_twice(
    traj: Trajectory, tmp_path: Path
) -> None:
    traj.export(tmp_path / "m.safetensors", -1)
    raw = (tmp_path / "m.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    metadata = header.pop("__metadata__")
    assert metadata["format"] == "pt"
    assert json.loads(metadata["aliases"]) == {"head.weight": "embed.weight"}
    assert "head.weight" not in header
    ends = sorted(entry["data_offsets"] for entry in header.values())
    assert [start for start, _ in ends] == [0, *(end for _, end in ends[:-1])], "a gap or an overlap"
    assert 8 + length + ends[-1][1] == len(raw)
    assert length % 8 == 0


def test_the_suffix_tells_the_format_and_safetensors_is_the_default(traj: Trajectory, tmp_path: Path) -> None:
    for name, kind in {"a.safetensors": "safetensors", "a.pt": "pt", "a.pth": "pt", "a.bin": "pt",
                       "a": "safetensors", "a.xyz": "safetensors"}.items():  # fmt: skip
        assert traj.export(tmp_path / name).format == kind
    assert traj.export(tmp_path / "b.pt", format="safetensors").format == "safetensors"


@pytest.mark.parametrize("kind", list(FORMATS))
def test_only_the_parameters_asked_for_are_written(traj: Trajectory, tmp_path: Path, kind: str) -> None:
    told = traj.export(tmp_path / "m", 10, kind, params=[r"^embed", "scale"])
    everything = float_tensors(net_at(10))
    check_same_bits(
        LOADERS[kind](tmp_path / "m"),
        {name: everything[name] for name in ("embed.weight", "head.weight", "scale")},
    )
    assert told.n_tensors == 2
    traj.export(tmp_path / "untied", 10, kind, params="scale")
    check_same_bits(LOADERS[kind](tmp_path / "untied"), {"scale": everything["scale"]})


def test_the_other_name_of_a_tie_finds_the_tensor(traj: Trajectory, tmp_path: Path) -> None:
    expected = {name: float_tensors(net_at(10))["embed.weight"] for name in ("embed.weight", "head.weight")}
    check_same_bits(traj.state_dict(10, params="^head"), expected)
    traj.export(tmp_path / "m.pt", 10, params="^head")
    check_same_bits(load_pt(tmp_path / "m.pt"), expected)


def test_what_cannot_be_exported_is_said_and_nothing_is_written(traj: Trajectory, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    out = tmp_path / "m.pt"
    with pytest.raises(UsageError, match=r"no format named 'onnx'; have: pt, safetensors"):
        traj.export(out, format="onnx")
    with pytest.raises(UsageError, match="no tensor matches 'nothing'"):
        traj.export(out, params="nothing")
    with pytest.raises(UsageError, match="no regular expression"):
        traj.export(out, params="(")
    with pytest.raises(UsageError, match="is a directory"):
        traj.export(tmp_path / "folder")
    with pytest.raises(StepNotFound, match="nearest: 0, 10, 25") as caught:
        traj.export(out, 11)
    assert caught.value.step == 11
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_tensor_named_like_the_metadata_of_safetensors_goes_to_pt_only(tmp_path: Path) -> None:
    model = nn.ParameterDict({"__metadata__": nn.Parameter(torch.ones(3))})
    with Recorder(tmp_path / "run.zarr") as recorder:
        recorder.record(model, 0)
    found = Trajectory.open(tmp_path / "run.zarr")
    with pytest.raises(UsageError, match=r"'__metadata__'.*export to \.pt"):
        found.export(tmp_path / "x.safetensors", 0)
    found.export(tmp_path / "x.pt", 0)
    check_same_bits(torch.load(tmp_path / "x.pt", weights_only=True), float_tensors(model))
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("kind", list(FORMATS))
def test_a_file_that_is_there_stays_until_the_new_one_is_whole(
    traj: Trajectory, tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "m"
    out.write_bytes(b"old")
    for disk in every_fault("disk", least=2):
        try:
            with disk.in_place():
                traj.export(out, 10, kind)
        except WriteFailed as error:
            assert error.file in (str(out), str(tmp_path))
            assert out.read_bytes() == b"old"
        except DurabilityUnknown as error:  # after the rename
            assert error.file == str(out)
            check_same_bits(LOADERS[kind](out), float_tensors(net_at(10)))
            out.write_bytes(b"old")
        if not disk.fired or disk.calls[disk.fail_at - 1].name != "unlink":  # what cannot be deleted stays
            assert leftovers(tmp_path) == []
        for stuck in tmp_path.glob("*.partial"):
            stuck.unlink()
    check_same_bits(LOADERS[kind](out), float_tensors(net_at(10)))


@pytest.mark.parametrize("kind", list(FORMATS))
def test_a_damaged_source_leaves_the_old_file_and_no_new_one(tmp_path: Path, kind: str) -> None:
    with Recorder(tmp_path / "run.zarr", rows_per_chunk=256, sketch=False) as recorder:
        recorder.record(net_at(0), 0)
    out = tmp_path / "m"
    out.write_bytes(b"old")
    flip_bit(tmp_path / "run.zarr" / "weights" / "c.2.0", 77)
    with pytest.raises(StoreCorrupt):
        Trajectory.open(tmp_path / "run.zarr").export(out, 0, kind)
    assert out.read_bytes() == b"old"
    assert leftovers(tmp_path) == []


def test_the_command_line_writes_the_same_file(traj: Trajectory, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    options = f"export {traj.path} -o {out} --step 10 --params scale --params ^low --json".split()
    result = CliRunner().invoke(cli, options)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["n_tensors"], told["step"], told["format"]) == (2, 10, "safetensors")
    everything = float_tensors(net_at(10))
    check_same_bits(load_safetensors(out), {name: everything[name] for name in ("scale", "low")})


# ---- state dict and model ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "label"), [(0, 0), (25, 25), (-1, 25), (-3, 0)])
def test_a_state_dict_is_the_recorded_one_under_every_name(traj: Trajectory, step: int, label: int) -> None:
    found = traj.state_dict(step)
    check_same_bits(found, float_tensors(net_at(label)))
    assert found["head.weight"] is found["embed.weight"]


def test_a_step_that_is_not_selected_is_there_as_long_as_it_is_recorded(traj: Trajectory) -> None:
    selected = traj.sel(start=1, stop=2)
    check_same_bits(selected.state_dict(25), float_tensors(net_at(25)))
    check_same_bits(selected.state_dict(-1), float_tensors(net_at(10)))
    for step in (11, -4, 26):
        with pytest.raises(StepNotFound):
            traj.state_dict(step)


def test_a_model_is_loaded_in_place(traj: Trajectory) -> None:
    model = Net()
    places = {name: tensor.data_ptr() for name, tensor in float_tensors(model).items()}
    traj.load_into(model, 10)
    check_same_bits(float_tensors(model), float_tensors(net_at(10)))
    assert {name: tensor.data_ptr() for name, tensor in float_tensors(model).items()} == places
    assert model.turned.stride() == (1, 4), "a transposed parameter stays transposed"
    assert not model.frozen.requires_grad
    assert model.scale.requires_grad


def another_shape(model: Any) -> None:
    model.turned = nn.Parameter(torch.ones(3, 4))


def a_missing_one(model: Any) -> None:
    del model.frozen


def an_extra_one(model: Any) -> None:
    model.extra = nn.Parameter(torch.ones(3))


def an_untied_one(model: Any) -> None:
    model.head.weight = nn.Parameter(torch.zeros(20, 16))


def a_new_tie(model: Any) -> None:
    model.body[1].bias = model.body[0].bias


@pytest.mark.parametrize(
    ("change", "tensor"),
    [
        (another_shape, "turned"),
        (a_missing_one, "frozen"),
        (an_extra_one, "extra"),
        (an_untied_one, "head.weight"),
        (a_new_tie, "body.1.bias"),
    ],
)
def test_another_model_is_refused_by_name_and_left_as_it_was(
    traj: Trajectory, change: Callable[[Any], None], tensor: str
) -> None:
    model = net_at(99)
    change(model)
    before = {name: t.clone() for name, t in float_tensors(model).items()}
    with pytest.raises(ModelMismatch) as caught:
        traj.load_into(model, 10)
    assert caught.value.tensor == tensor
    assert caught.value.file == str(traj.path)
    check_same_bits(float_tensors(model), before)


def test_a_recording_of_an_array_has_no_model(tmp_path: Path) -> None:
    traj = Trajectory.from_array(np.zeros((4, 2), np.float32), out=tmp_path / "run.zarr")
    with pytest.raises(ModelMismatch):
        traj.load_into(nn.Linear(1, 1), 0)


# ---- pieces ---------------------------------------------------------------------------------------------


def test_a_tensor_in_pieces_is_put_together() -> None:
    """As a sharded recording lays it out: boxes of a tensor, a hole between their rows."""
    whole = torch.arange(24.0).reshape(4, 6)
    pieces = (Piece((0, 0), (4, 2), 0), Piece((0, 2), (1, 4), 10), Piece((1, 2), (3, 4), 14))
    entry = TensorEntry("w", "parameter", "float32", (4, 6), pieces)
    rows = np.full(26, np.nan, np.float32)
    for piece in pieces:
        (top, left), (height, width) = piece.offset, piece.size
        box = whole[top : top + height, left : left + width].reshape(-1).numpy()
        rows[piece.row : piece.stop] = box

    class Rows:
        def read(self, start: int, stop: int) -> Any:
            return rows[start:stop].copy()

    assert torch.equal(build(entry, Rows()), whole)
    assert torch.equal(torch.cat(list(flat_blocks(entry, Rows()))), whole.reshape(-1))


# ---- names ----------------------------------------------------------------------------------------------


def test_parameters_come_before_buffers_and_every_name_of_a_tie_is_listed() -> None:
    found = [(name, kind) for name, kind, _ in named_tensors(Net())]
    assert [kind for _, kind in found] == sorted((kind for _, kind in found), reverse=True)
    assert {name for name, _ in found} == set(Net().state_dict())
    assert ("scratch", "buffer") not in found, "what a state dict leaves out is not recorded"


def test_a_map_describes_a_model_in_the_order_of_its_tensors() -> None:
    parameter_map, tensors = describe_model(Net(), Choice())
    assert [t.shape for t in parameter_map] == [tuple(t.shape) for t in tensors]
    assert isinstance(parameter_map, ParameterMap)
    assert isinstance(parameter_map.aliases, Mapping)
    spans = [(piece.row, piece.stop) for t in parameter_map for piece in t.pieces]
    assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])]
