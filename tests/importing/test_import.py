"""Laws of an import: the bits of the checkpoints, one by one, whole or not at all, in bounded memory."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import signal
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from cmdgpu.errors import (
    CheckpointError,
    CmdgpuError,
    CmdgpuWarning,
    MemoryLimitError,
    StepNotFound,
    StoreExists,
    StoreLocked,
    UnsupportedTensor,
    UsageError,
    WriteFailed,
)
from cmdgpu.importing import carry_out, hashing, look, plan_checkpoints, writing
from cmdgpu.importing.planning import hashers
from cmdgpu.importing.torch_file import TorchFile
from cmdgpu.recording import Recorder
from cmdgpu.store.journal import Journal
from cmdgpu.store.parameter_map import ParameterMap, Piece, TensorEntry
from cmdgpu.store.view import StoreView
from cmdgpu.trajectory import Trajectory
from tests.harness import Ticks, end_of, start_child
from tests.verbs import flip_bit, tree_bytes

State = dict[str, Tensor]
ROWS = 256
"""Per chunk: the net below is six of them, and its tensors begin and end anywhere."""


class Net(nn.Module):
    """Parameters, tied and empty ones too, buffers with rows and one without, before parameters."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]
        self.embed = nn.Embedding(40, 9)
        self.norm = nn.BatchNorm1d(100)
        self.layer = nn.Linear(9, 100)
        self.scale = nn.Parameter(torch.randn(()))
        self.none = nn.Parameter(torch.empty(0, 3))
        self.head = nn.Linear(9, 40, bias=False)
        self.head.weight = self.embed.weight


def state(seed: int) -> State:
    return dict(Net(seed).state_dict())


def untied(seed: int) -> State:
    """For formats that hold a name per tensor."""
    return {name: value.clone() for name, value in state(seed).items() if name != "head.weight"}


def save(path: Path, **states: Any) -> Path:
    """A ``.pt`` per keyword, which is its name."""
    path.mkdir(exist_ok=True)
    for name, content in states.items():
        torch.save(content, path / f"{name}.pt")
    return path


def three(path: Path) -> Path:
    return save(path, ep1=state(1), ep2=state(2), ep10=state(10))


def check_holds(out: Path, expected: Mapping[int, State]) -> Trajectory:
    """These steps, every floating-point tensor bit for bit in its own type, and a sound store."""
    traj = Trajectory.open(out)
    assert traj.steps.tolist() == sorted(expected)
    for step, tensors in expected.items():
        found = traj.state_dict(step)
        floats = {name: value for name, value in tensors.items() if value.is_floating_point()}
        assert set(found) == set(floats)
        for name, value in floats.items():
            assert found[name].dtype == value.dtype and found[name].shape == value.shape
            bits = [t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in (found[name], value)]
            assert bits[0] == bits[1], f"{name} at step {step}"
    assert traj.verify() == []
    return traj


# ---- every writer ---------------------------------------------------------------------------------------


def _torch(path: Path, content: State) -> None:
    torch.save(content, path.with_suffix(".pt"))


def _lightning(path: Path, content: State) -> None:
    """As its Trainer nests them, optimizer and all."""
    beside = {
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
        "pytorch-lightning_version": "2",
    }
    torch.save({"state_dict": content, "epoch": 0, **beside}, path.with_suffix(".ckpt"))


def _wrapped(path: Path, content: State) -> None:
    inside = {f"module._orig_mod.{name}": value for name, value in content.items()}
    torch.save({"model": inside, "optimizer": {}}, path.with_suffix(".pt"))


def _safetensors(path: Path, content: State) -> None:
    save_file(content, path.with_suffix(".safetensors"))


def _sharded(path: Path, content: State) -> None:
    from huggingface_hub import save_torch_state_dict

    path.mkdir()
    save_torch_state_dict(content, path, max_shard_size=2000)
    assert len(list(path.iterdir())) > 2
    torch.save({"exp_avg": torch.ones(3)}, path / "optimizer.pt")


def _distributed(path: Path, content: State) -> None:
    dcp: Any = importlib.import_module("torch.distributed.checkpoint")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that no process group is there
        dcp.save({"model": content}, checkpoint_id=path, no_dist=True)


def _npz(path: Path, content: State) -> None:
    arrays: dict[str, Any] = {name: value.numpy() for name, value in content.items()}
    np.savez(path.with_suffix(".npz"), **arrays)


WRITERS: dict[str, tuple[Callable[[Path, State], None], Callable[[int], State]]] = {
    "torch": (_torch, state),
    "lightning": (_lightning, state),
    "wrapped": (_wrapped, state),
    "safetensors": (_safetensors, untied),
    "huggingface": (_sharded, untied),
    "dcp": (_distributed, untied),
    "npz": (_npz, untied),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_checkpoint_comes_back_bit_for_bit(writer: str, tmp_path: Path) -> None:
    write, make = WRITERS[writer]
    (tmp_path / "runs").mkdir()
    expected = {step: make(step) for step in (2, 10, 1)}
    for step, content in expected.items():
        write(tmp_path / "runs" / f"step-{step}", content)
    out = tmp_path / "run.zarr"
    Trajectory.from_checkpoints(tmp_path / "runs", out, rows_per_chunk=ROWS)
    traj = check_holds(out, expected)
    assert traj.parameters.n_rows_of("buffer") == 200
    assert "norm.num_batches_tracked" in str(traj.parameters.skipped)
    if make is state:
        assert traj.parameters.aliases == {"head.weight": "embed.weight"}


def test_an_import_writes_what_a_recorder_would(tmp_path: Path) -> None:
    runs, recorded, out = tmp_path / "runs", tmp_path / "recorded.zarr", tmp_path / "imported.zarr"
    with Recorder(recorded, rows_per_chunk=ROWS) as recorder:
        for step in (1, 2, 10):
            recorder.record(Net(step), step)
    three(runs)
    Trajectory.from_checkpoints(runs, out, rows_per_chunk=ROWS)
    mine, theirs = tree_bytes(out), tree_bytes(recorded)
    names = [name for name in theirs if Path(name).name != "zarr.json"]
    assert len(names) == 3 * 8 + 2 and all(mine[name] == theirs[name] for name in names)
    with Recorder(out) as recorder:
        recorder.record(Net(11), 11)
    check_holds(out, {step: state(step) for step in (1, 2, 10, 11)})


# ---- element types --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("types", "asked", "stored"),
    [
        (["bfloat16", "bfloat16"], None, "bfloat16"),
        (["float16", "float16"], None, "float16"),
        (["bfloat16", "float16"], None, "float32"),
        (["float32", "bfloat16"], None, "float32"),
        (["bfloat16", "bfloat16"], "float32", "float32"),
    ],
)
def test_the_store_is_as_wide_as_the_widest(
    types: list[str], asked: str | None, stored: str, tmp_path: Path
) -> None:
    content = torch.randn(70_000, generator=torch.Generator().manual_seed(0))
    made = {f"s{i}": {"w": content.to(getattr(torch, dtype))} for i, dtype in enumerate(types)}
    save(tmp_path / "runs", **made)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", CmdgpuWarning)
        traj = Trajectory.from_checkpoints(tmp_path / "runs", tmp_path / "run.zarr", dtype=asked)
    assert traj.dtype == stored
    for i in range(2):
        assert np.array_equal(traj[:, i], made[f"s{i}"]["w"].float().numpy())
    assert [str(w.message) for w in warned] == (
        [] if len(set(types)) == 1 else [
            f"'w' is {types[0]} and {types[1]} over time; it is kept as float32, and stored in float32"
        ]
    )  # fmt: skip


def test_float64_is_rounded_and_what_leaves_the_range_is_said(tmp_path: Path) -> None:
    wide = torch.tensor([1 / 3, 1e300, -1e300, float("inf"), float("nan")], dtype=torch.float64)
    save(tmp_path / "runs", s0={"w": wide}, s1={"w": wide})
    with pytest.warns(CmdgpuWarning) as warned:
        traj = Trajectory.from_checkpoints(tmp_path / "runs", tmp_path / "run.zarr")
    assert [str(w.message) for w in warned] == [
        "'w' (float64) is rounded to float32",
        f"{tmp_path}/runs/s0.pt: 'w' holds 2 values beyond float32; they are stored as infinite",
    ]
    rounded = np.array([1 / 3, np.inf, -np.inf, np.inf, np.nan], dtype=np.float32)
    assert np.array_equal(traj[:, 0], rounded, equal_nan=True)


def test_narrower_when_asked(tmp_path: Path) -> None:
    save(tmp_path / "runs", s0={"w": torch.tensor([1.0, 70000.0])})
    with pytest.warns(CmdgpuWarning) as warned:
        traj = Trajectory.from_checkpoints(tmp_path / "runs", tmp_path / "run.zarr", dtype="float16")
    assert [str(w.message).rpartition(": ")[2] for w in warned] == [
        "'w' (float32) is rounded to float16",
        "'w' holds 1 values beyond float16; they are stored as infinite",
    ]
    assert traj[:, 0].tolist() == [1.0, np.inf]


# ---- headers are compared first -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "tensor", "what"),
    [
        ({"b": torch.zeros(4)}, "b", r"has shape \[4\], and \[3\] in"),
        ({"b": None}, "b", "is missing, and is in"),
        ({"c": torch.zeros(1)}, "c", "is not in"),
    ],
)
def test_checkpoints_that_differ_are_refused_before_anything_is_written(
    change: dict[str, Tensor | None], tensor: str, what: str, tmp_path: Path
) -> None:
    first: State = {"a": torch.zeros(2), "b": torch.zeros(3)}
    other = {name: value for name, value in {**first, **change}.items() if value is not None}
    runs = save(tmp_path / "runs", s1=first, s2=other)
    with pytest.raises(CheckpointError, match=rf"s2\.pt: tensor '{tensor}': {what} .*s1\.pt"):
        Trajectory.from_checkpoints(runs, tmp_path / "run.zarr")
    assert not (tmp_path / "run.zarr").exists()


def test_weights_tied_in_one_and_not_in_the_other_are_refused(tmp_path: Path) -> None:
    tied = torch.zeros(3)
    runs = save(tmp_path / "runs", s1={"a": tied, "b": tied}, s2={"a": tied, "b": torch.ones(3)})
    with pytest.raises(CheckpointError, match=r"s2\.pt: tensor 'b': is a tensor of its own, and is tied in"):
        plan_checkpoints(runs, tmp_path / "run.zarr")
    with pytest.raises(CheckpointError, match=r"s1\.pt: tensor 'b': is tied to 'a', and is not in .*s2\.pt"):
        plan_checkpoints([runs / "s1.pt", runs / "s2.pt"], tmp_path / "run.zarr", [9, 3])


def test_names_that_a_first_checkpoint_has_tied_may_be_absent_later(tmp_path: Path) -> None:
    tied = torch.arange(3.0)
    runs = save(tmp_path / "runs", s1={"a": tied, "b": tied}, s2={"b": tied + 1})
    traj = Trajectory.from_checkpoints(runs, tmp_path / "run.zarr")
    assert torch.equal(traj.state_dict(2)["a"], tied + 1)


def test_nothing_to_take_says_what_there_is(tmp_path: Path) -> None:
    runs = save(tmp_path / "runs", s1={"a": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="none of its 1 tensors is taken; it holds a; change prefix"):
        plan_checkpoints(runs, tmp_path / "run.zarr", include="b")
    with pytest.raises(UnsupportedTensor, match="tensor 'z': a tensor of complex64 cannot be imported"):
        z = {"z": torch.zeros(2, dtype=torch.complex64)}
        plan_checkpoints(save(tmp_path / "complex", s1=z), tmp_path / "run.zarr")
    with pytest.raises(CheckpointError, match="tensors that are taken are empty"):
        plan_checkpoints(save(tmp_path / "empty", s1={"e": torch.zeros(0, 2)}), tmp_path / "run.zarr")


# ---- whole or not at all --------------------------------------------------------------------------------


def test_a_checkpoint_that_proves_damaged_leaves_those_before_it(tmp_path: Path) -> None:
    runs, out = three(tmp_path / "runs"), tmp_path / "run.zarr"
    whole = (runs / "ep2.pt").read_bytes()
    place = whole.index(state(2)["embed.weight"].numpy().tobytes())
    flip_bit(runs / "ep2.pt", 8 * place + 3)
    before = psutil.Process().num_fds()
    with pytest.raises(CheckpointError, match=r"ep2\.pt: is damaged: .* does not match its checksum"):
        Trajectory.from_checkpoints(runs, out, rows_per_chunk=ROWS)
    assert psutil.Process().num_fds() == before
    check_holds(out, {1: state(1)})
    (runs / "ep2.pt").write_bytes(whole)
    Trajectory.from_checkpoints(runs, out)
    check_holds(out, {step: state(step) for step in (1, 2, 10)})


class Counted:
    """A checkpoint that says when it is closed."""

    def __init__(self, checkpoint: Any, left: list[Path]) -> None:
        self._checkpoint, self._left = checkpoint, left
        left.append(checkpoint.path)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    def close(self) -> None:
        self._left.remove(self._checkpoint.path)
        self._checkpoint.close()


def test_whatever_happens_what_was_opened_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, left = three(tmp_path / "runs"), list[Path]()
    opens = TorchFile.open

    def counted(self: TorchFile, path: Path) -> Any:
        return Counted(opens(self, path), left)

    monkeypatch.setattr(TorchFile, "open", counted)
    Trajectory.from_checkpoints(runs, tmp_path / "run.zarr")
    Trajectory.from_checkpoints(runs, tmp_path / "run.zarr")
    assert left == []
    flip_bit(runs / "ep1.pt", 8 * ((runs / "ep1.pt").stat().st_size // 2))
    with pytest.raises(CheckpointError):  # while the next one has been opened ahead
        Trajectory.from_checkpoints(runs, tmp_path / "other.zarr")
    assert left == []


_KILLED = """
import os, signal, sys
from cmdgpu.importing import writing
from cmdgpu.trajectory import Trajectory
calls, chunk = 0, writing._Stage.chunk
def chunk_or_die(self, i):
    global calls
    calls += 1
    if calls == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return chunk(self, i)
writing._Stage.chunk = chunk_or_die
Trajectory.from_checkpoints(sys.argv[1], sys.argv[2], rows_per_chunk=256)
"""


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    runs = three(tmp_path / "runs")
    Trajectory.from_checkpoints(runs, tmp_path / "straight.zarr", rows_per_chunk=ROWS)
    killed = end_of(start_child("-c", _KILLED, runs, tmp_path / "killed.zarr"))
    assert killed.code == -signal.SIGKILL, killed.err
    assert Trajectory.open(tmp_path / "killed.zarr").steps.tolist() == [1]
    Trajectory.from_checkpoints(runs, tmp_path / "killed.zarr", rows_per_chunk=ROWS)
    assert tree_bytes(tmp_path / "killed.zarr") == tree_bytes(tmp_path / "straight.zarr")


def test_a_file_that_is_still_written_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, out = three(tmp_path / "runs"), tmp_path / "run.zarr"
    stage: Any = writing
    chunk = stage._Stage.chunk

    def chunk_while_it_is_written(self: Any, i: int) -> Any:
        if "ep2" in str(self._planned.path):
            os.utime(self._planned.path)
        return chunk(self, i)

    monkeypatch.setattr(stage._Stage, "chunk", chunk_while_it_is_written)
    with pytest.raises(CheckpointError, match=r"ep2\.pt: changed while it was .*run the same command again"):
        Trajectory.from_checkpoints(runs, out, rows_per_chunk=ROWS)
    check_holds(out, {1: state(1)})


def test_a_hash_never_runs_far_ahead_and_never_waits_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing granted ahead, and optimizer state behind the weights, an import still ends."""
    module: Any = hashing
    monkeypatch.setattr(module, "_AHEAD", 0)
    monkeypatch.setattr(module, "HASH_BLOCK", 512)
    content = {f"s{i}": {"model": state(i), "optimizer": {"m": torch.ones(9000)}} for i in range(3)}
    runs = save(tmp_path / "runs", **content)
    Trajectory.from_checkpoints(runs, tmp_path / "run.zarr", rows_per_chunk=ROWS)
    check_holds(tmp_path / "run.zarr", {i: state(i) for i in range(3)})


def test_a_full_disk_is_refused_before_it_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)

    def nearly_full(path: Path) -> object:
        assert path == tmp_path
        return usage

    monkeypatch.setattr("cmdgpu.importing.writing.shutil.disk_usage", nearly_full)
    with pytest.raises(WriteFailed, match=r"21\.6 kB are to be written, 1 kB are free"):
        Trajectory.from_checkpoints(three(tmp_path / "runs"), tmp_path / "run.zarr", rows_per_chunk=ROWS)
    assert not (tmp_path / "run.zarr").exists()


# ---- going on -------------------------------------------------------------------------------------------


def test_where_every_snapshot_came_from_is_kept(tmp_path: Path) -> None:
    runs, out = three(tmp_path / "runs"), tmp_path / "run.zarr"
    Trajectory.from_checkpoints(runs, out)
    for step, origin in zip((1, 2, 10), StoreView.open(out).sources, strict=True):
        raw = (runs / f"ep{step}.pt").read_bytes()
        assert origin is not None
        (file,) = origin.files
        assert (file.name, file.size) == (f"ep{step}.pt", len(raw))
        assert file.sha256 == hashlib.sha256(raw).hexdigest()
    journal = Journal.open(out)
    journal.rewind(2)
    journal.close()
    assert [origin is not None for origin in StoreView.open(out).sources] == [True, True]


def test_more_checkpoints_go_on_and_none_is_read_into_it_twice(tmp_path: Path) -> None:
    runs, out = save(tmp_path / "runs", ep1=state(1), ep2=state(2)), tmp_path / "run.zarr"
    Trajectory.from_checkpoints(runs, out, rows_per_chunk=ROWS)
    three(runs)
    os.rename(runs / "ep1.pt", runs / "epoch_000.pt")  # noqa: PTH104
    with pytest.raises(UsageError, match="count different things"):
        plan_checkpoints(runs, out)
    (runs / "epoch_000.pt").unlink()  # what is imported need not be there any more
    ticks = Ticks()
    plan = plan_checkpoints(runs, out)
    assert (plan.n_committed, plan.n_snapshots, len(plan.missing)) == (1, 3, 1)
    report = carry_out(plan, ticks)
    assert (report.n_added, report.n_snapshots, ticks.what, ticks.ends) == (1, 3, "import", 2)
    assert ticks.done == (runs / "ep2.pt").stat().st_size + (runs / "ep10.pt").stat().st_size
    assert ticks.total == (runs / "ep10.pt").stat().st_size
    check_holds(out, {step: state(step) for step in (1, 2, 10)})
    three(tmp_path / "other")
    torch.save(state(5), tmp_path / "other" / "ep5.pt")
    with pytest.raises(UsageError, match=r"ep5\.pt: step 5 cannot be put before step 10 of"):
        plan_checkpoints(tmp_path / "other", out)


def test_another_file_or_rule_is_refused_by_name(tmp_path: Path) -> None:
    runs, out = three(tmp_path / "runs"), tmp_path / "run.zarr"
    Trajectory.from_checkpoints(runs, out, unit="epoch")
    kept = tree_bytes(out)
    content = {**state(1), "scale": torch.zeros(())}
    torch.save(content, runs / "ep1.pt")
    with pytest.raises(CheckpointError, match=r"ep1\.pt: step 1: is not the file that was imported"):
        Trajectory.from_checkpoints(runs, out, unit="epoch")
    torch.save(state(1), runs / "ep1.pt")
    swapped = {"norm.weight": "norm.bias", "norm.bias": "norm.weight"}
    refusals: list[tuple[dict[str, Any], type[CmdgpuError], str]] = [
        ({"key_map": swapped}, CheckpointError, "was imported under other rules"),
        ({"exclude": "scale"}, CheckpointError, r"tensor 'scale': is missing, and is in .*run\.zarr"),
        (
            {"dtype": "float16"},
            StoreExists,
            "was made with dtype='float32', and dtype='float16' is asked for",
        ),
        ({"zstd": True}, StoreExists, "was made with zstd=False"),
        ({"unit": "step"}, StoreExists, "was made with unit='epoch'"),
        ({"rows_per_chunk": 256}, StoreExists, "was made with rows_per_chunk="),
        ({"resume": False}, StoreExists, "is there already"),
    ]
    for settings, error, what in refusals:
        with pytest.raises(error, match=what):
            merged: dict[str, Any] = {"unit": "epoch", **settings}
            Trajectory.from_checkpoints(runs, out, **merged)
    (tmp_path / "file").write_text("")
    with pytest.raises(CmdgpuError, match="file: "):
        plan_checkpoints(runs, tmp_path / "file")
    assert tree_bytes(out) == kept
    Trajectory.from_checkpoints(runs, out, unit="epoch")
    assert tree_bytes(out) == kept


def test_a_recorded_store_is_no_import_to_go_on_with(tmp_path: Path) -> None:
    content = {"weight": torch.zeros(1, 2), "bias": torch.zeros(1)}
    runs, out = save(tmp_path / "runs", s3=content, s4=content), tmp_path / "run.zarr"
    with Recorder(out) as recorder:
        recorder.record(nn.Linear(2, 1), 3)
        recorder.flush()
        with pytest.raises(StoreLocked):
            carry_out(plan_checkpoints(runs / "s4.pt", out))
    with pytest.raises(CheckpointError, match=r"s3\.pt: step 3: is recorded in the store, and was not"):
        carry_out(plan_checkpoints(runs, out))
    Trajectory.from_checkpoints(runs / "s4.pt", out)
    assert [origin is None for origin in StoreView.open(out).sources] == [True, False]
    with Recorder(out) as recorder:
        recorder.record(nn.Linear(2, 1), 5)
    assert [origin is None for origin in StoreView.open(out).sources] == [True, False, True]
    with pytest.raises(StepNotFound):
        Trajectory.open(out).state_dict(6)


def test_a_store_in_shards_is_not_continued_with_whole_tensors(tmp_path: Path) -> None:
    """Its rows are in another order, with holes between them."""
    halves = (Piece((0, 0), (4, 32), 0), Piece((0, 32), (4, 32), ROWS))
    holes = ((128, ROWS), (ROWS + 128, 2 * ROWS))
    mapped = ParameterMap((TensorEntry("w", "parameter", "float32", (4, 64), halves),), {}, holes)
    out = tmp_path / "run.zarr"
    Journal.create(out, mapped, dtype="float32", rows=ROWS, unit="step", sketch_rows=None).close()
    runs = save(tmp_path / "runs", s1={"w": torch.zeros(4, 64)})
    with pytest.raises(UnsupportedTensor, match=r"run\.zarr: tensor 'w': is stored in shards, and whole"):
        plan_checkpoints(runs, out)


def test_of_what_is_imported_already_only_a_few_are_open_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = save(tmp_path / "runs", **{f"s{i}": {"w": torch.full((3,), float(i))} for i in range(12)})
    Trajectory.from_checkpoints(runs, tmp_path / "run.zarr")
    announce, origin = hashing.Hasher.announce, hashing.Digests.origin
    under_way, most = 0, 0

    def counted(*arguments: Any) -> hashing.Digests:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        return announce(*arguments)

    def done(digests: hashing.Digests) -> Any:
        nonlocal under_way
        under_way -= 1
        return origin(digests)

    monkeypatch.setattr(hashing.Hasher, "announce", counted)
    monkeypatch.setattr(hashing.Digests, "origin", done)
    Trajectory.from_checkpoints(runs, tmp_path / "run.zarr")
    assert under_way == 0 and 1 <= most <= hashers() + 1


def test_a_compressed_import_holds_the_same(tmp_path: Path) -> None:
    runs, out = three(tmp_path / "runs"), tmp_path / "run.zarr"
    Trajectory.from_checkpoints(runs, out, zstd=True, rows_per_chunk=ROWS)
    check_holds(out, {step: state(step) for step in (1, 2, 10)})
    assert StoreView.open(out).is_compressed


# ---- memory ---------------------------------------------------------------------------------------------


def test_too_little_memory_is_refused_with_both_numbers(tmp_path: Path) -> None:
    runs = three(tmp_path / "runs")
    with pytest.raises(
        MemoryLimitError, match=r"needs 3\d\.\d MB, the memory limit is 1\.05 MB; give \d\dMiB"
    ):
        plan_checkpoints(runs, tmp_path / "run.zarr", memory_limit="1MiB")
    plan = plan_checkpoints(runs, tmp_path / "run.zarr", memory_limit="512MiB")
    least = plan.needed_bytes // 2
    assert (
        plan_checkpoints(runs, tmp_path / "run.zarr", memory_limit=plan.needed_bytes).writers == plan.writers
    )
    assert least < plan.limit_bytes


_MEASURED = """
import json, sys, warnings
from pathlib import Path
from cmdgpu.memory import MemoryMeter
from cmdgpu.trajectory import Trajectory
from tests.harness import run_cli
here = Path(sys.argv[1])
Trajectory.from_checkpoints(here / "tiny", here / "tiny.zarr")
with MemoryMeter(0.001) as meter:
    limit = ["--memory-limit", sys.argv[2], "--json", "-q"]
    ended = run_cli("import", here / "large", here / "large.zarr", *limit)
print(json.dumps({"peak": meter.above_start_bytes, "code": ended.code, "said": ended.out, "err": ended.err}))
"""


def test_thousands_of_pieces_are_memory_that_a_plan_knows_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An open item of torch.distributed costs as much as two tensors do."""
    needed: list[int] = []
    with Recorder(tmp_path / "run.zarr") as recorder:
        recorder.record(nn.Linear(100, 100), 1)
    for size in (1 << 20, 64):
        monkeypatch.setattr("cmdgpu.exporting.dcp.ITEM_BYTES", size)
        Trajectory.open(tmp_path / "run.zarr").export(tmp_path / f"{size}-step1", 1, "dcp")
        needed.append(plan_checkpoints(tmp_path / f"{size}-step1", tmp_path / "out.zarr").needed_bytes)
    n_items = 100 * 7 + 7  # 16 elements each, of rows of 100
    assert needed[1] - needed[0] == 2 * (n_items - 2) * (5 << 10)


@pytest.mark.slow
@pytest.mark.parametrize("write", [_torch, _safetensors, _distributed])
def test_memory_stays_below_its_limit_whatever_the_size(
    write: Callable[[Path, State], None], tmp_path: Path
) -> None:
    """Tensors of 128 MB, one of them in another type than the store's."""
    (tmp_path / "large").mkdir()
    for step in (1, 2):
        content = {"a": torch.full((1 << 25,), float(step)), "b": torch.full((1 << 24,), step).double()}
        write(tmp_path / "large" / f"step-{step}", content)
    save(tmp_path / "tiny", s1=state(1))
    ended = end_of(start_child("-c", _MEASURED, tmp_path, "80MiB"))
    found = json.loads(ended.out)
    assert found["code"] == 0, found["err"]
    said = json.loads(found["said"])
    print(f"peak {found['peak'] / 2**20:.0f} MiB, planned {said['planned_bytes'] / 2**20:.0f} MiB")
    assert found["peak"] <= said["planned_bytes"] <= 80 << 20
    assert said["peak_rss_bytes"] <= 80 << 20
    traj = Trajectory.open(tmp_path / "large.zarr")
    assert traj.read_rows(np.array([0, (1 << 25) - 1, 1 << 25, 3 * (1 << 24) - 1])).tolist() == [[1, 2]] * 4


# ---- a look before --------------------------------------------------------------------------------------


def test_a_look_tells_what_an_import_would_take_and_what_speaks_against_it(tmp_path: Path) -> None:
    runs = three(tmp_path / "runs")
    (runs / "notes.txt").write_text("")
    found = look(runs)
    assert [seen.step for seen in found.checkpoints] == [1, 2, 10]
    assert found.named is not None and set(found.named.sources) < set(found.tensors)
    assert found.total_bytes == sum(file.stat().st_size for file in runs.glob("*.pt"))
    assert found.stored_bytes == 3 * sum(t.numel() for t in untied(1).values() if t.is_floating_point()) * 4
    assert found.problems == () and Path(found.skipped_paths[0][0]).name == "notes.txt"
    torch.save({"model": state(2), "count": torch.ones(3)}, runs / "best.pt")
    found = look(runs)
    assert [seen.step for seen in found.checkpoints] == [1, 2, 10]
    assert (str(runs / "best.pt"), "its name tells no step, beside others that do") in found.skipped_paths
    assert found.named is not None and dict(found.named.skipped).keys() == {"norm.num_batches_tracked"}
    torch.save(Net(3), runs / "ep3.pt")
    torch.save({"w": torch.zeros(2)}, runs / "ep003.pt")
    found = look(runs)
    assert len(found.problems) == 2 and "ep3.pt: is one pickled object" in found.problems[0]
    assert "ep003.pt: tensor 'scale': is missing" in found.problems[1]
    with pytest.raises(CheckpointError, match="is one pickled object"):
        look(runs / "ep3.pt")
