"""The pass on a CUDA device: the CPU's labels, one set of bits however it is cut, nothing left pinned."""

# torch leaves the types of many methods open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cmdgpu.decomposition import CMD
from cmdgpu.errors import CmdgpuError, MemoryLimitError, StoreCorrupt
from cmdgpu.notation import AnyArray
from cmdgpu.store import format as fmt
from cmdgpu.streaming.device import CudaDevice
from cmdgpu.trajectory import Trajectory
from tests.harness import (
    StopAfter,
    Stopped,
    check_equals_definition,
    define,
    fit_bits,
    planted,
    row_bits,
    run_cli,
    write_store,
)
from tests.verbs import flip_bit, tree_bytes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

T, ROWS = 40, 4096
N = 7 * ROWS - 1234
CUDA = torch.device("cuda", 0)
MARGIN = 1e-5


@pytest.fixture(scope="module")
def W() -> AnyArray:
    W_nt = planted(N, T, 4, noise=0.3, level=3.0)
    W_nt[5], W_nt[ROWS, 3], W_nt[-1, 0] = 0.1, np.nan, np.inf
    return W_nt


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, W: AnyArray) -> Path:
    path = tmp_path_factory.mktemp("cuda") / "s.zarr"
    Trajectory.from_array(W, out=path, rows_per_chunk=ROWS)
    return path


@pytest.fixture
def unit_by_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one unit, whatever the limit."""
    monkeypatch.setattr("cmdgpu.streaming.plan.TARGET_BLOCK_BYTES", 1)


def fit(source: Trajectory | AnyArray, device: str = "cuda", **options: Any) -> CMD:
    return CMD(n_modes=options.pop("n_modes", 4), n_samples=300, device=device).fit(source, **options)


@pytest.mark.parametrize("n_modes", [1, 4, 16, 40, 200])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_fit_is_the_definition_and_the_cpus(tmp_path: Path, W: AnyArray, dtype: str, n_modes: int) -> None:
    source = write_store(tmp_path / "s.zarr", W, rows=ROWS, dtype=dtype)
    stored = fmt.widen(source.source.read_rows(np.arange(N), source.columns), dtype)
    here, there = fit(source, "cpu", n_modes=n_modes), fit(source, n_modes=n_modes)
    assert np.array_equal(here.references_, there.references_)
    # many modes of planted rows are near-ties of one another
    check_equals_definition(there, stored, least_sure=0.9)
    sure = define(stored, here.references_).margin > MARGIN
    assert np.array_equal(np.asarray(here.labels_)[sure], np.asarray(there.labels_)[sure])
    assert there.metrics_["implementation"] == "triton"


def test_blocks_of_any_size_and_an_array_in_memory_give_the_same_bits(
    store: Path, W: AnyArray, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Trajectory.open(store)
    large = fit(source)
    monkeypatch.setattr("cmdgpu.streaming.plan.TARGET_BLOCK_BYTES", 1)
    small = fit(source)
    assert large.metrics_["rows_per_block"] > small.metrics_["rows_per_block"] == ROWS
    assert fit_bits(large) == fit_bits(small)
    assert row_bits(fit(W)) == row_bits(large)


@pytest.mark.usefixtures("unit_by_unit")
def test_stopped_and_resumed_equals_uninterrupted(store: Path, tmp_path: Path) -> None:
    source, out = Trajectory.open(store), tmp_path / "out.zarr"
    with pytest.raises(Stopped):
        fit(source, out=out, progress=StopAfter(3))
    resumed = fit(source, out=out)
    assert 0 < resumed.metrics_["units_resumed"] < 7
    whole = fit(source, out=tmp_path / "whole.zarr")
    assert fit_bits(resumed) == fit_bits(whole)
    assert tree_bytes(out) == tree_bytes(tmp_path / "whole.zarr")


@pytest.mark.usefixtures("unit_by_unit")
def test_damage_ends_the_pass_by_name_and_the_device_serves_the_next(tmp_path: Path, W: AnyArray) -> None:
    source = write_store(tmp_path / "s.zarr", W, rows=ROWS)
    flip_bit(tmp_path / "s.zarr" / "weights" / "c.5.2", 999)
    with pytest.raises(StoreCorrupt, match=r"c\.5\.2: .*crc32c mismatch"):
        fit(source)
    flip_bit(tmp_path / "s.zarr" / "weights" / "c.5.2", 999)
    check_equals_definition(fit(Trajectory.open(tmp_path / "s.zarr")), W)


def test_slots_are_pinned_exactly_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    def pinned(values: AnyArray) -> bool:
        return torch.from_numpy(values).is_pinned()  # pyright: ignore[reportUnknownArgumentType]

    with CudaDevice(CUDA) as device:
        slots = [device.host_slot(30, 5000, dtype) for dtype in ("float32", "bfloat16")]
        assert [slot.dtype for slot in slots] == [np.float32, np.uint16]
        assert all(pinned(slot) for slot in slots)
    assert not any(pinned(slot) for slot in slots)
    slots[0][:] = 1.0  # the memory is whoever's holds the array

    class Refusing:
        def cudaHostRegister(self, *_: int) -> int:
            return 2

    monkeypatch.setattr("cmdgpu.streaming.device._cudart", Refusing)
    with pytest.raises(CmdgpuError, match=r"refuses to pin .* \(CUDA error 2\)"), CudaDevice(CUDA) as device:
        device.host_slot(30, 5000, "float32")


def test_a_block_too_large_for_the_device_is_refused(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nearly_full(*_: object) -> tuple[int, int]:
        return 1 << 20, 80 << 30

    monkeypatch.setattr(torch.cuda, "mem_get_info", nearly_full)
    with pytest.raises(MemoryLimitError, match=r"on cuda:0, 1\.05 MB are free; give a smaller memory limit"):
        fit(Trajectory.open(store))


def test_the_command_line_fits_on_a_device_by_name(store: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.zarr"
    ended = run_cli("fit", store, "-o", out, "--modes", "4", "--device", "cuda:0", "--json", "-q")
    assert ended.code == 0, ended.err
    assert ended.json["implementation"] == "triton"
    assert run_cli("verify", out, "-q").code == 0
    assert "triton" in str(run_cli("doctor", "--json").json["implementations"])
