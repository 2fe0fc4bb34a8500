"""Shared verbs: build a small store, break a file of it, compare bits.

The store of ``build_store`` has three chunks of 256 rows per column, the last one padded, and a sketch.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
import xarray
import zarr
from torch import Tensor, nn

from cmdgpu.notation import F32, F64, AnyArray
from cmdgpu.sampling import candidate_rows
from cmdgpu.store import format as fmt
from cmdgpu.store.chunks import crc32c
from cmdgpu.store.journal import Journal
from cmdgpu.store.parameter_map import ParameterMap, whole
from cmdgpu.store.places import Place
from cmdgpu.store.verification import verify_store
from cmdgpu.store.view import StoreView

ROWS: Final = 256
STEPS: Final[tuple[int, ...]] = (0, 10, 25)
LAYOUT: Final = ParameterMap(
    whole(
        [
            ("embed.weight", "parameter", "float32", (20, 16)),
            ("fc.weight", "parameter", "float32", (16, 16)),
            ("fc.bias", "parameter", "float32", (16,)),
            ("norm.running_mean", "buffer", "float32", (30,)),
        ]
    ),
    aliases={"head.weight": "embed.weight"},
    skipped=(("norm.num_batches_tracked", "int64 has no rows"),),
)
N: Final = 20 * 16 + 16 * 16 + 16 + 30
S: Final = N - 30
"""Candidates of the sketch: every row of a parameter."""
N_CHUNKS: Final = 3


# ---- stores -------------------------------------------------------------------------------------------


def values_at(step: int, n: int = N) -> F32:
    """(n,) what the tests record at a step."""
    return np.random.default_rng(step).standard_normal(n).astype(np.float32)


def stored_at(step: int, dtype: str = "float32", n: int = N) -> AnyArray:
    """The same as a column of whole chunks in the stored type."""
    storage = fmt.storage(dtype)
    column = np.full(fmt.round_up(n, ROWS), storage.fill, dtype=storage.numpy)
    column[:n] = fmt.narrow(values_at(step, n), dtype)
    return column


def create_store(
    path: Path,
    *,
    dtype: str = "float32",
    sketch: bool = True,
    layout: ParameterMap = LAYOUT,
    compressed: bool = False,
) -> Journal:
    rows = candidate_rows(layout) if sketch else None
    return Journal.create(
        path, layout, dtype=dtype, rows=ROWS, unit="step", sketch_rows=rows, compressed=compressed
    )


def append(journal: Journal, step: int, **scalars: float) -> None:
    """Append ``values_at(step)``."""
    column = stored_at(step, journal.view.dtype, journal.view.map.n_rows)
    sketch = None if journal.view.sketch_rows is None else column[journal.view.sketch_rows]
    journal.append(column, step, scalars, sketch)


def build_store(
    path: Path,
    steps: Sequence[int] = STEPS,
    *,
    dtype: str = "float32",
    sketch: bool = True,
    compressed: bool = False,
) -> Path:
    """A store that holds ``values_at(step)`` for every step, with loss = step / 4."""
    journal = create_store(path, dtype=dtype, sketch=sketch, compressed=compressed)
    try:
        for step in steps:
            append(journal, step, loss=step / 4)
    finally:
        journal.close()
    return path


def check_store_holds(path: Path, steps: Sequence[int], scalars: Sequence[str] = ("loss",)) -> None:
    """Our reader, the verification and a plain Zarr reader all see exactly these snapshots."""
    view = StoreView.open(path)
    assert view.steps.tolist() == list(steps)
    assert sorted(view.scalars) == sorted(scalars)
    weights = plain_array(path, fmt.WEIGHTS)
    assert weights.shape == (N, len(steps))
    for t, step in enumerate(steps):
        column = np.empty(N_CHUNKS * ROWS, dtype=view.storage.numpy)
        for i in range(N_CHUNKS):
            view.read_chunk(i, t, column[i * ROWS : (i + 1) * ROWS])
        expected = stored_at(step, view.dtype)
        assert column.tobytes() == expected.tobytes(), f"step {step} has other values"
        assert np.asarray(weights[:, t]).tobytes() == expected[:N].tobytes(), f"step {step} read by zarr"
        if view.sketch_rows is not None:
            assert view.read_sketch(t).tobytes() == expected[view.sketch_rows].tobytes()
    assert [str(damage) for damage in verify_store(path).damaged] == []


def plain_array(path: Path, name: str) -> Any:
    """The array as somebody without this package opens it."""
    return cast(Any, zarr).open_group(str(path), mode="r")[name]


def open_xarray(path: Path) -> Any:
    return cast(Any, xarray).open_zarr(path, consolidated=False)


def zarr_values(path: Path, name: str) -> AnyArray:
    return np.asarray(plain_array(path, name)[...])


def leftovers(path: Path) -> list[str]:
    """Names of everything unfinished in a tree."""
    return sorted(p.name for p in path.rglob("*.partial"))


def on_disk(place: Place) -> Path:
    """A place that is a path on this machine."""
    assert isinstance(place, Path)
    return place


def tree_bytes(place: Place) -> dict[str, bytes]:
    """Every file of a tree but the lock, by its relative name."""
    path = on_disk(place)
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }


# ---- damage -------------------------------------------------------------------------------------------


def flip_bit(file: Path, bit: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[bit // 8] ^= 1 << (bit % 8)
    file.write_bytes(raw)


def swap_files(a: Path, b: Path) -> None:
    other = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(other)


def replace_by_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def replace_by_symlink(file: Path) -> None:
    """To a faithful copy outside of the store."""
    outside = file.parent.parent.parent / f"outside-{file.name}"
    shutil.move(file, outside)
    file.symlink_to(outside)


def replace_by_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def edit_document(file: Path, edit: Callable[[Any], object], *, sealed: bool = True) -> None:
    """Change a ``zarr.json`` in place; ``sealed`` gives it a right digest again, as a forger would."""
    document = json.loads(file.read_bytes())
    edit(document)
    if sealed:
        document = fmt.seal(document)
    file.write_bytes(fmt.spell(document))


def edit_trajectory(path: Path, edit: Callable[[Any], object]) -> None:
    """Change the group document and tie the commit document to it again."""
    edit_document(path / fmt.DOCUMENT, edit)
    seal = json.loads((path / fmt.DOCUMENT).read_bytes())["attributes"]["cmdgpu"]["self"]

    def tie(document: Any) -> None:
        document["attributes"]["cmdgpu"]["layout"] = seal

    edit_document(path / fmt.WEIGHTS / fmt.DOCUMENT, tie)


def declaring(frame: bytes, n_bytes: int) -> bytes:
    """A zstd frame with another size of its content in its header: eight bytes, and no window before them."""
    window = 0 if frame[4] & 0x20 else 1
    width = (1, 2, 4, 8)[frame[4] >> 6]
    return frame[:4] + bytes([0xE0]) + n_bytes.to_bytes(8, "little") + frame[5 + window + width :]


def put_frame(path: Path, frame: bytes, i: int, t: int) -> Path:
    """Bytes in the place of a compressed chunk, with a right CRC, and a commit that vouches for them."""
    file = path / fmt.WEIGHTS / fmt.chunk_name(i, t)
    file.write_bytes(frame + crc32c(np.frombuffer(frame, dtype=np.uint8)))
    vouch(path, t)
    return file


def vouch(path: Path, t: int) -> None:
    """Make the commit's digest that of the chunks of snapshot t as they lie there."""
    column = sorted((path / fmt.WEIGHTS).glob(f"c.*.{t}"), key=lambda file: int(file.name.split(".")[1]))
    files = [*column, *(path / fmt.SKETCH).glob(f"c.0.{t}")]
    digest = fmt.sha256(*(file.read_bytes()[-fmt.CRC_BYTES :] for file in files))
    edit_document(
        path / fmt.WEIGHTS / fmt.DOCUMENT,
        lambda d: d["attributes"]["cmdgpu"]["digests"].__setitem__(t, digest),
    )


# ---- models -------------------------------------------------------------------------------------------


class Weights(nn.Module):
    """The model of ``LAYOUT``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.fc = nn.Linear(16, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(30, affine=False)
        self.norm.running_var = None


class Net(nn.Module):
    """Tied, frozen, empty, 0-dim, transposed and half-precision tensors, buffers kept and not kept."""

    running: Tensor
    scratch: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.body = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.turned = nn.Parameter(torch.arange(12.0).reshape(3, 4).T)
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)
        self.low = nn.Parameter(torch.ones(7, dtype=torch.bfloat16))
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("running", torch.zeros(2))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)


def float_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a recording must give back: the floating-point part of the state dict, under every name."""
    return {name: t.detach() for name, t in model.state_dict().items() if t.is_floating_point()}


def scramble(model: nn.Module, step: int) -> None:
    """Give every floating-point tensor the values of a step."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for tensor in float_tensors(model).values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))


def net_at(step: int) -> Net:
    model = Net()
    scramble(model, step)
    return model


def bits(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    """Everything about a tensor's value: NaN payloads and signs of zeros included."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    raw = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return str(tensor.dtype), tuple(tensor.shape), raw


def check_same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert bits(found[name]) == bits(tensor), f"'{name}' came back with other bits"


def numbers(values: Iterable[float]) -> F64:
    return np.array(list(values), dtype=np.float64)
