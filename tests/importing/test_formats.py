"""Laws of every format: what was written comes back, whole or in slices, bit for bit, from any thread, in
little memory; and where in a file the model is looked for.
"""

from __future__ import annotations

import concurrent.futures
import random
from collections import OrderedDict
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import pytest
import torch
from torch import nn

from cmdgpu.errors import CheckpointError
from cmdgpu.exporting import FORMATS as EXPORTS
from cmdgpu.importing import checksums
from cmdgpu.importing.contract import FORMATS, Checkpoint
from cmdgpu.importing.elements import numpy_type
from cmdgpu.importing.naming import Rules, name_tensors
from cmdgpu.importing.runs import boxes, extent
from cmdgpu.memory import MemoryMeter
from cmdgpu.notation import AnyArray
from cmdgpu.trajectory import Trajectory
from tests.importing.written import (
    WRITERS,
    Tensors,
    Written,
    every_kind,
    flat_bits,
    quiet,
    torch_save,
    write_fsdp2,
)
from tests.verbs import build_store


def open_checkpoint(path: Path) -> Checkpoint:
    """By the one format that claims it."""
    claiming = [name for name in FORMATS if FORMATS[name].claims(path)]
    assert len(claiming) == 1, claiming
    return FORMATS[claiming[0]].open(path)


def read(checkpoint: Checkpoint, name: str, start: int = 0, stop: int | None = None) -> AnyArray:
    info = checkpoint.tensors[name]
    stop = int(np.prod(info.shape, dtype=object)) if stop is None else stop
    out = np.full((stop - start) * numpy_type(info.dtype).itemsize, 0xA5, np.uint8).view(
        numpy_type(info.dtype)
    )
    checkpoint.read(name, start, stop, out)
    return out


def check_whole(checkpoint: Checkpoint, tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        stands = checkpoint.aliases.get(name, name)
        info = checkpoint.tensors[stands]
        assert (info.dtype, info.shape) == (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)), (
            name
        )
        assert read(checkpoint, stands).tobytes() == flat_bits(tensor), name


def check_checksums(checkpoint: Checkpoint) -> None:
    """Whatever the blocks are, what is whole is taken."""
    assert set(checkpoint.checksums) <= set(checkpoint.files)
    for path, found in checkpoint.checksums.items():
        raw = path.read_bytes()
        for size in (1000, len(raw)):
            check = checksums.Check(path, found)
            for start in range(0, len(raw), size):
                check.update(raw[start : start + size])
            check.finish()


@pytest.fixture(scope="module", params=list(WRITERS))
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("written")
    return WRITERS[cast(str, request.param)](folder, every_kind())


@pytest.fixture
def checkpoint(written: Written) -> Iterator[Checkpoint]:
    found = open_checkpoint(written.path)
    yield found
    found.close()


# ---- every format ---------------------------------------------------------------------------------------


def test_what_was_written_is_read_bit_for_bit(written: Written, checkpoint: Checkpoint) -> None:
    assert set(checkpoint.tensors) | set(checkpoint.aliases) == set(written.tensors)
    check_whole(checkpoint, written.tensors)
    assert checkpoint.path == written.path
    assert all(path.is_file() and path.is_relative_to(written.path) for path in checkpoint.files)


def test_a_slice_is_that_part_of_the_whole(written: Written, checkpoint: Checkpoint) -> None:
    draw = random.Random(0)
    for name, tensor in written.tensors.items():
        whole = flat_bits(tensor)
        for _ in range(40 if tensor.numel() > 100 else 6):
            start = draw.randint(0, tensor.numel())
            stop = draw.randint(start, tensor.numel())
            size = tensor.itemsize
            assert read(checkpoint, name, start, stop).tobytes() == whole[start * size : stop * size], name


def test_threads_do_not_disturb_each_other(written: Written, checkpoint: Checkpoint) -> None:
    whole = {name: flat_bits(tensor) for name, tensor in written.tensors.items()}

    def some(seed: int) -> bool:
        draw = random.Random(seed)
        right = True
        for _ in range(30):
            name = draw.choice(list(whole))
            tensor = written.tensors[name]
            start = draw.randint(0, tensor.numel())
            stop = draw.randint(start, tensor.numel())
            found = read(checkpoint, name, start, stop).tobytes()
            right &= found == whole[name][start * tensor.itemsize : stop * tensor.itemsize]
        return right

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(some, range(8)))


def test_its_own_checksums_agree_with_its_bytes(checkpoint: Checkpoint) -> None:
    check_checksums(checkpoint)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_slice_takes_no_memory_of_the_whole(kind: str, tmp_path: Path) -> None:
    """64 MiB in the file, 1 MiB of it read at its end: what is measured stays below what is promised."""
    values = torch.arange(1 << 24, dtype=torch.int32).remainder(251).float()
    written = WRITERS[kind](tmp_path, {"w": values.reshape(1 << 12, -1)})
    (name,) = written.tensors
    out = np.empty(1 << 18, np.float32)
    with MemoryMeter(0.001) as meter:
        checkpoint = open_checkpoint(written.path)
        checkpoint.read(name, (1 << 24) - (1 << 18), 1 << 24, out)
    assert out.tobytes() == flat_bits(values[-(1 << 18) :])
    assert meter.above_start_bytes < checkpoint.read_bytes + out.nbytes + (6 << 20)


def test_a_file_that_changes_after_it_was_opened_is_not_believed(tmp_path: Path) -> None:
    torch_save({"w": torch.zeros(100)}, tmp_path / "a.pt")
    checkpoint = open_checkpoint(tmp_path / "a.pt")
    torch_save({"w": torch.ones(100)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="changed while it was being read"):
        read(checkpoint, "w")


def test_boxes_cover_a_run_of_elements_in_order() -> None:
    draw = random.Random(1)
    for _ in range(200):
        shape = tuple(draw.randint(1, 5) for _ in range(draw.randint(0, 4)))
        numbers = np.arange(int(np.prod(shape))).reshape(shape)
        start = draw.randint(0, numbers.size)
        stop = draw.randint(start, numbers.size)
        found = list(boxes(shape, start, stop))
        parts = [numbers[box].reshape(extent(box)).reshape(-1) for box in found]
        assert np.concatenate([*parts, np.empty(0, int)]).tolist() == list(range(start, stop))
        assert len(found) <= 2 * len(shape) + 1


@pytest.mark.parametrize("format", list(EXPORTS))
def test_what_we_export_comes_back(format: str, tmp_path: Path) -> None:
    """Names of tied weights included, whatever the format does with them."""
    trajectory = Trajectory.open(build_store(tmp_path / "run.zarr"))
    expected = trajectory.state_dict(-1)
    checkpoint = open_checkpoint(trajectory.export(tmp_path / "out" / "x", -1, format).path)
    assert set(checkpoint.tensors) | set(checkpoint.aliases) == set(expected)
    check_whole(checkpoint, dict(expected))
    check_checksums(checkpoint)


# ---- torch.save -----------------------------------------------------------------------------------------


def test_views_of_a_storage_are_what_they_are(tmp_path: Path) -> None:
    """The same view twice is one tensor under two names; another view of its numbers is another tensor."""
    base = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    tensors = {
        "whole": base,
        "tied": base,
        "rows": base[2:5],
        "columns": base[:, 3:5],
        "transposed": base.T,
        "folded": base.reshape(6, 2, 4).permute(2, 0, 1),
        "channels_last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "expanded": base[:1].expand(4, 8),
        "parameter": nn.Parameter(base[0]),
    }
    torch_save(tensors, tmp_path / "a.pt")
    checkpoint = open_checkpoint(tmp_path / "a.pt")
    assert checkpoint.aliases == {"tied": "whole"}
    check_whole(checkpoint, tensors)
    for start, stop in ((0, 1), (5, 41), (13, 14), (47, 48)):
        expected = flat_bits(base.T)[4 * start : 4 * stop]
        assert read(checkpoint, "transposed", start, stop).tobytes() == expected


W, V = torch.arange(6.0).reshape(2, 3), torch.arange(3.0)
SD: Final[Tensors] = {"w": W, "b": V}
ADAM: Final[Any] = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": W}}, "param_groups": [{"lr": 0.1}]}


@pytest.mark.parametrize(
    ("saved", "step"),
    [
        (SD, None),
        (OrderedDict({"w": W, "b": V, "n": torch.tensor(3)}), None),
        ({"model": SD, "optimizer": ADAM, "epoch": 3}, 3),
        ({"state_dict": SD, "epoch": 1, "global_step": 70, "best_acc1": torch.tensor(76.0)}, 70),
        ({"model_state_dict": SD, "optimizer_state_dict": ADAM, "step": torch.tensor(9)}, 9),
        ({"net": SD, "acc": 0.3, "iteration": 12}, 12),
        ({"module": SD, "rng_state": torch.zeros(5, dtype=torch.uint8)}, None),
        ({"model": {"state_dict": SD}, "it": 4}, 4),
        ({"my_network": SD, "optimizer": ADAM, "steps": 8}, 8),
        ({"params": SD, "scheduler": {"last": torch.ones(3)}}, None),
    ],
    ids=lambda value: "-".join(cast(dict[str, Any], value)) if isinstance(value, dict) else str(value),
)
def test_the_model_is_found_wherever_trainers_put_it(saved: Any, step: int | None, tmp_path: Path) -> None:
    torch_save(saved, tmp_path / "a.ckpt")
    checkpoint = open_checkpoint(tmp_path / "a.ckpt")
    assert list(checkpoint.tensors)[:2] == ["w", "b"]
    check_whole(checkpoint, SD)
    assert checkpoint.step == step


def test_dicts_in_the_model_give_their_names_a_prefix(tmp_path: Path) -> None:
    torch_save({"model": {"encoder": SD, "decoder": {"head": {"w": V}}, "version": 3}}, tmp_path / "a.pt")
    checkpoint = open_checkpoint(tmp_path / "a.pt")
    assert list(checkpoint.tensors) == ["encoder.w", "encoder.b"]
    assert checkpoint.aliases == {"decoder.head.w": "encoder.b"}
    assert checkpoint.skipped == (("version", "an int, no tensor"),)


def test_of_two_models_in_a_file_a_prefix_has_to_choose(tmp_path: Path) -> None:
    torch_save({"model": SD, "ema": {"w": W + 1}, "mean": V, "epoch": 2}, tmp_path / "a.pt")
    checkpoint = open_checkpoint(tmp_path / "a.pt")
    assert checkpoint.models == ("model", "ema")
    assert list(checkpoint.tensors) == ["model.w", "model.b", "ema.w"]
    assert ("mean", "a tensor, beside the model") in checkpoint.skipped
    with pytest.raises(CheckpointError, match=r"more than one model: model, ema; choose one .* 'model\.'"):
        name_tensors(checkpoint, Rules())
    assert name_tensors(checkpoint, Rules(prefix="ema.")).sources == {"w": "ema.w"}


def test_only_the_optimizer_is_no_model(tmp_path: Path) -> None:
    torch_save({"optimizer": ADAM, "epoch": 3}, tmp_path / "optimizer-3.pt")
    checkpoint = open_checkpoint(tmp_path / "optimizer-3.pt")
    assert dict(checkpoint.tensors) == {}
    assert ("optimizer", "state of the training, not of the model") in checkpoint.skipped


def test_what_is_no_plain_tensor_is_left_out_with_the_reason(tmp_path: Path) -> None:
    with quiet():
        odd: Tensors = {
            "w": W,
            "sparse": W.to_sparse(),
            "quantised": torch.quantize_per_tensor(W, 0.1, 0, torch.qint8),
            "meta": torch.empty(3, device="meta"),
            "conjugate": torch.view_as_complex(torch.ones(3, 2)).conj(),
        }
        torch_save(odd, tmp_path / "a.pt")
    checkpoint = open_checkpoint(tmp_path / "a.pt")
    assert list(checkpoint.tensors) == ["w"]
    assert dict(checkpoint.skipped) == {
        "sparse": "a sparse tensor",
        "quantised": "a quantised tensor",
        "meta": "a tensor without data (device meta)",
        "conjugate": "a view whose numbers are conjugated or negated when it is read",
    }


def test_settings_of_a_trainer_do_not_stand_in_the_way(tmp_path: Path) -> None:
    """torch refuses them, since it would have to build them."""
    import argparse
    from collections import Counter, defaultdict

    beside: Any = {
        "args": argparse.Namespace(lr=0.1, out=Path("x")),
        "loss": np.float64(0.3),
        "scores": np.arange(3.0),
        "counts": Counter("aab"),
        "seen": defaultdict(list, a=[1]),
        "tags": {"a", "b"},
        "raw": b"bytes",
    }
    torch_save({"state_dict": SD, **beside}, tmp_path / "a.pt")
    check_whole(open_checkpoint(tmp_path / "a.pt"), SD)


def test_a_file_saved_without_checksums_has_none(tmp_path: Path) -> None:
    serialization = torch.serialization
    serialization.set_crc32_options(False)
    try:
        torch_save(SD, tmp_path / "a.pt")
    finally:
        serialization.set_crc32_options(True)
    checkpoint = open_checkpoint(tmp_path / "a.pt")
    assert checkpoint.checksums[tmp_path / "a.pt"] == ()
    check_whole(checkpoint, SD)


def check_imported(path: Path, tensors: Tensors, out: Path, prefix: str = "") -> None:
    """The checkpoint as a trajectory of one snapshot: every floating-point tensor, bit for bit."""
    found = Trajectory.from_checkpoints([path], out, [7], prefix).state_dict(7)
    wanted = {name.removeprefix(prefix): t for name, t in tensors.items() if t.is_floating_point()}
    assert {name: flat_bits(t) for name, t in found.items()} == {n: flat_bits(t) for n, t in wanted.items()}


def test_a_checkpoint_of_lightning(tmp_path: Path) -> None:
    """Really trained for two steps."""
    with quiet():
        from tests.importing.lightning_module import train

        path, state = train(tmp_path, steps=2)
    checkpoint = open_checkpoint(path)
    assert checkpoint.step == 2
    check_whole(checkpoint, state)
    assert set(checkpoint.tensors) == set(state)
    check_imported(path, state, tmp_path / "run.zarr")


# ---- Hugging Face ---------------------------------------------------------------------------------------


def test_a_model_of_transformers_in_shards(tmp_path: Path) -> None:
    with quiet():
        import transformers

        config = cast(Any, transformers).GPT2Config(
            n_layer=1, n_embd=32, n_head=2, vocab_size=97, n_positions=16
        )
        model = cast(Any, transformers).GPT2LMHeadModel(config)
        model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
        model.save_pretrained(tmp_path / "single")
    state: Tensors = {name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}
    for name in ("sharded", "single"):
        checkpoint = open_checkpoint(tmp_path / name)
        check_whole(checkpoint, state)
        assert set(checkpoint.tensors) == set(state)
    assert len(open_checkpoint(tmp_path / "sharded").files) > 3
    check_imported(tmp_path / "sharded", state, tmp_path / "run.zarr", "transformer.")


def test_the_trainer_tells_the_step(tmp_path: Path) -> None:
    assert open_checkpoint(WRITERS["huggingface"](tmp_path, dict(SD)).path).step == 40


def test_links_of_a_hub_cache_are_followed_to_its_blobs(tmp_path: Path) -> None:
    """snapshots/<revision>/model.safetensors -> ../../blobs/<digest>, as huggingface_hub lays them out."""
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    made = WRITERS["safetensors"](tmp_path, dict(SD)).path
    made.rename(blobs / "0123abcd")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123abcd")
    check_whole(open_checkpoint(snapshot), SD)
    elsewhere = tmp_path / "elsewhere"
    (blobs / "0123abcd").rename(elsewhere)
    (blobs / "0123abcd").symlink_to(elsewhere)
    with pytest.raises(CheckpointError, match="out of the folder"):
        open_checkpoint(snapshot)


# ---- torch.distributed ----------------------------------------------------------------------------------


def test_two_ranks_of_fsdp2(tmp_path: Path) -> None:
    """What each of them wrote, put together: every tensor of the whole model, bit for bit, from any slice."""
    written = write_fsdp2(tmp_path)
    checkpoint = open_checkpoint(written.path)
    assert set(checkpoint.tensors) == set(written.tensors)
    assert checkpoint.step == 5
    assert {reason for name, reason in checkpoint.skipped if "optimizer" in name} >= {"optimizer state"}
    check_whole(checkpoint, written.tensors)
    check_checksums(checkpoint)
    model = {name: tensor for name, tensor in written.tensors.items() if name.startswith("app.model.")}
    check_imported(written.path, model, tmp_path / "run.zarr", "app.model.")
    for name in ("columns", "app.model.0.weight"):
        tensor = written.tensors[name]
        whole, size = flat_bits(tensor), tensor.itemsize
        for start in range(0, tensor.numel(), 7):
            stop = min(start + 13, tensor.numel())
            assert read(checkpoint, name, start, stop).tobytes() == whole[start * size : stop * size]


def test_a_step_that_is_a_tensor_and_names_that_share_their_items(tmp_path: Path) -> None:
    written = WRITERS["dcp"](tmp_path, {"w": W, "global_step": torch.tensor(33)})
    assert open_checkpoint(written.path).step == 33


# ---- safetensors, npz, Keras ----------------------------------------------------------------------------


def test_names_of_tied_weights_in_the_metadata(tmp_path: Path) -> None:
    """As our own export writes them down; and a step, where somebody wrote one."""
    import json

    save: Any = import_module("safetensors.torch").save_file
    save({"w": W}, tmp_path / "a.safetensors", metadata={"aliases": json.dumps({"tied": "w"}), "step": "17"})
    checkpoint = open_checkpoint(tmp_path / "a.safetensors")
    assert (checkpoint.aliases, checkpoint.step) == ({"tied": "w"}, 17)
    save({"w": W}, tmp_path / "b.safetensors", metadata={"aliases": "none of ours"})
    assert open_checkpoint(tmp_path / "b.safetensors").aliases == {}


def test_arrays_of_numpy_in_every_order(tmp_path: Path) -> None:
    numbers = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    arrays: dict[str, Any] = {
        "fortran": np.asfortranarray(numbers),
        "big": numbers.astype(">f4"),
        "step": np.int64(6),
        "text": np.array(["a", "b"]),
    }
    np.savez(tmp_path / "a.npz", **arrays)
    checkpoint = open_checkpoint(tmp_path / "a.npz")
    assert checkpoint.step == 6
    assert [name for name, _ in checkpoint.skipped] == ["text"]
    check_whole(checkpoint, {"fortran": torch.as_tensor(numbers), "big": torch.as_tensor(numbers)})


def test_a_large_compressed_array_is_read_from_anywhere(tmp_path: Path) -> None:
    """More than one state of the inflater is kept, and used."""
    values = np.random.default_rng(0).integers(0, 9, 6_000_000).astype(np.int32)
    np.savez_compressed(tmp_path / "a.npz", w=values)
    checkpoint = open_checkpoint(tmp_path / "a.npz")
    for start in (5_500_000, 1_500_000, 0, 3_654_321, 5_999_000, 750_000):
        assert (read(checkpoint, "w", start, start + 1000) == values[start : start + 1000]).all()


def test_one_dataset_under_two_names_and_a_whole_model_of_keras_2(tmp_path: Path) -> None:
    h5py: Any = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["model_weights/dense/kernel:0"] = np.ones((2, 3), np.float32)
        file["model_weights/tied/kernel:0"] = file["model_weights/dense/kernel:0"]
        file["optimizer_weights/m"] = np.ones(3, np.float32)
        file["model_weights/dense/again"] = file["model_weights/dense"]
    checkpoint = open_checkpoint(tmp_path / "a.h5")
    assert list(checkpoint.tensors) == ["dense/kernel:0"]
    assert checkpoint.aliases == {"tied/kernel:0": "dense/kernel:0"}
    assert dict(checkpoint.skipped) == {
        "optimizer_weights": "beside the model",
        "dense/again": "no array, or a group that is there already",
    }


def test_without_h5py_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    (tmp_path / "a.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(CheckpointError, match=r"needs the package h5py; pip install 'cmdgpu\[h5\]'"):
        open_checkpoint(tmp_path / "a.h5")


@pytest.mark.parametrize(
    ("kind", "suffix"), [("pt", ".safetensors"), ("safetensors", ".pt"), ("npz", ".ckpt")]
)
def test_the_content_decides_and_not_the_suffix(kind: str, suffix: str, tmp_path: Path) -> None:
    written = WRITERS[kind](tmp_path, dict(SD))
    check_whole(open_checkpoint(written.path.rename(tmp_path / f"b{suffix}")), SD)
