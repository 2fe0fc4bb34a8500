"""Checkpoints that other people's programs really wrote, and what they wrote down."""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from torch import Tensor

ROOT: Final = Path(__file__).resolve().parent.parent.parent

Tensors = dict[str, Tensor]


def every_kind() -> Tensors:
    """Every element type, no axis, no elements, and a tensor of some size."""
    made = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=made, dtype=torch.float64)

    return {
        "f32": normal(67, 37).float(),
        "f64": normal(5, 3, 2),
        "f16": normal(40).half(),
        "bf16": normal(3, 11).bfloat16(),
        "with.nan": torch.tensor([float("nan"), -0.0, float("inf"), 1e-45]),
        "i64": torch.arange(-3, 4),
        "i32": torch.arange(6, dtype=torch.int32).reshape(2, 3),
        "i16": torch.arange(3, dtype=torch.int16),
        "i8": torch.tensor([-128, 127], dtype=torch.int8),
        "u8": torch.arange(250, 256).to(torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "complex": torch.view_as_complex(normal(4, 2)),
        "scalar": torch.tensor(3.5),
        "count": torch.tensor(7),
        "empty": torch.empty(0, 4),
    }


def flat_bits(tensor: Tensor) -> bytes:
    """The elements in C order, as they lie in memory."""
    flat = tensor.detach().contiguous().reshape(-1)
    return cast(Any, flat.view(torch.uint8)).numpy().tobytes() if flat.numel() else b""


def torch_save(value: object, path: Path) -> None:
    cast(Any, torch).save(value, path)


def _numpy(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """NumPy has no bfloat16."""
    return {name: cast(Any, t).numpy() for name, t in tensors.items() if t.dtype != torch.bfloat16}


@dataclass(frozen=True)
class Written:
    path: Path
    tensors: Tensors
    """By the names they have to come back under."""
    rename: Callable[[str], str] = str


Write = Callable[[Path, Tensors], Written]


def _pt(folder: Path, tensors: Tensors) -> Written:
    torch_save(tensors, folder / "a.pt")
    return Written(folder / "a.pt", tensors)


def _safetensors(folder: Path, tensors: Tensors) -> Written:
    save = cast(Any, import_module("safetensors.torch")).save_file
    kept = {name: t for name, t in tensors.items() if t.dtype != torch.complex128}
    save(kept, folder / "a.safetensors")
    return Written(folder / "a.safetensors", kept)


def _hub(safe: bool) -> Write:
    def write(folder: Path, tensors: Tensors) -> Written:
        """As huggingface_hub writes a state dict in shards."""
        hub = cast(Any, import_module("huggingface_hub"))
        kept = {name: t for name, t in tensors.items() if not t.is_complex()}
        home = folder / "checkpoint-40"
        home.mkdir()
        hub.save_torch_state_dict(kept, home, max_shard_size="5KB", safe_serialization=safe)
        (home / "trainer_state.json").write_text(json.dumps({"global_step": 40, "log": [float("nan")]}))
        for name in ("optimizer.pt", "rng_state.pth", "training_args.bin"):
            (home / name).write_bytes(b"never opened")
        return Written(home, kept)

    return write


def _dcp(folder: Path, tensors: Tensors) -> Written:
    checkpoint = cast(Any, import_module("torch.distributed.checkpoint"))
    state = {"model": tensors, "optim": {"exp_avg": torch.ones(3)}, "step": 12}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        checkpoint.save(state, checkpoint_id=folder / "dcp", no_dist=True)
    return Written(folder / "dcp", {f"model.{name}": t for name, t in tensors.items()})


def _npz(save: Callable[..., None]) -> Write:
    def write(folder: Path, tensors: Tensors) -> Written:
        arrays = _numpy(tensors)
        save(folder / "a.npz", **arrays)
        return Written(folder / "a.npz", {name: tensors[name] for name in arrays})

    return write


def _h5(**options: Any) -> Write:
    def write(folder: Path, tensors: Tensors) -> Written:
        """The layout of Keras 3: ``layers/<name>/vars/0`` beside the optimizer's."""
        h5py = cast(Any, import_module("h5py"))
        arrays = _numpy(tensors)
        with h5py.File(folder / "a.weights.h5", "w") as file:
            for name, values in arrays.items():
                file.create_dataset(
                    f"layers/{name}/vars/0", data=values, **(options if values.size > 1 else {})
                )
            file["optimizer/vars/0"] = np.int64(3)
        return Written(folder / "a.weights.h5", {f"layers/{name}/vars/0": tensors[name] for name in arrays})

    return write


def _keras(folder: Path, tensors: Tensors) -> Written:
    import zipfile

    inner = _h5()(folder, tensors)
    with zipfile.ZipFile(folder / "a.keras", "w") as archive:
        archive.writestr("metadata.json", "{}")
        archive.writestr("config.json", "{}")
        archive.write(inner.path, "model.weights.h5")
    return Written(folder / "a.keras", inner.tensors)


WRITERS: Final[dict[str, Write]] = {
    "pt": _pt,
    "safetensors": _safetensors,
    "huggingface": _hub(True),
    "huggingface .bin": _hub(False),
    "dcp": _dcp,
    "npz": _npz(np.savez),
    "npz compressed": _npz(np.savez_compressed),
    "keras": _h5(),
    "keras gzip": _h5(compression="gzip", shuffle=True, fletcher32=True, chunks=True),
    ".keras": _keras,
}


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Libraries of others warn and draw bars."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


_FSDP: Final = """
    import os, sys, warnings
    warnings.simplefilter("ignore")
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch import nn
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor
    rank, folder = int(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(37, 23), nn.BatchNorm1d(23), nn.Linear(23, 1))
    model.half_precision = nn.Parameter(torch.randn(7, 5).bfloat16())
    if rank == 0:
        torch.save(model.state_dict(), f"{folder}/whole.pt")
    across = torch.arange(6 * 10, dtype=torch.float64).reshape(6, 10)
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.Adam(model.parameters())
    weights, optim = get_state_dict(model, optimizer)
    state = {"app": {"model": weights, "optimizer": optim}, "step": 5,
             "columns": distribute_tensor(across, mesh, [Shard(1)])}
    dcp.save(state, checkpoint_id=f"{folder}/step-5")
    dist.barrier()
    os._exit(0)  # of gloo's threads one now and then outlives the group, and C++ ends the process for it
"""


def write_fsdp2(folder: Path) -> Written:
    """Two ranks of FSDP2 with one checkpoint, as torch writes it, and the state dict of the whole model."""
    script = folder / "rank.py"
    script.write_text(textwrap.dedent(_FSDP))
    ranks = [
        subprocess.Popen([sys.executable, script, str(rank), str(folder)], cwd=ROOT, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    whole: Tensors = cast(Any, torch).load(folder / "whole.pt", weights_only=True)
    tensors = {f"app.model.{name}": tensor for name, tensor in whole.items()}
    across = torch.arange(6 * 10, dtype=torch.float64).reshape(6, 10)
    return Written(folder / "step-5", tensors | {"columns": across})
