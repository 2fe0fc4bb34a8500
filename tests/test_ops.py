"""Laws of the door to the kernels: devices by name, stored types as they are, refusals as errors of ours."""

# torch leaves the types of many methods open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import numpy as np
import pytest
import torch

from cmdgpu import ops
from cmdgpu.errors import CmdgpuError, KernelError, UsageError
from cmdgpu.store import format as fmt
from tests.harness import planted, walks

CPU = torch.device("cpu")


# ---- devices ------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_auto_is_the_cpu_where_there_is_no_cuda() -> None:
    assert ops.resolve_device("auto") == CPU
    with pytest.raises(CmdgpuError, match="asked for cuda:1, found 0 CUDA devices; use --device cpu"):
        ops.resolve_device("cuda:1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_auto_is_the_first_cuda_device() -> None:
    assert ops.resolve_device("auto") == ops.resolve_device("cuda") == torch.device("cuda", 0)


@pytest.mark.parametrize("name", ["cpu", "cpu:0"])
def test_the_cpu_is_one_device(name: str) -> None:
    assert ops.resolve_device(name) == CPU


@pytest.mark.parametrize("name", ["abacus", "", "cuda:x", "meta", "mps"])
def test_a_name_that_is_no_device_of_ours_lists_what_is(name: str) -> None:
    with pytest.raises(UsageError, match=r"have: auto, cpu, cuda, cuda:0, \.\.\."):
        ops.resolve_device(name)


def test_a_device_class_names_what_decides_the_bits() -> None:
    said = ops.device_class(CPU)
    assert said.startswith("cpu ") and torch.backends.cpu.get_cpu_capability() in said


# ---- element types --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_stored_elements_are_seen_as_what_they_are_without_a_copy(dtype: str) -> None:
    values = np.array([1.5, -2.0, np.inf, 0.0078125], np.float32)
    stored = fmt.narrow(values, dtype)
    tensor = ops.as_tensor(stored, dtype)
    assert tensor.dtype == getattr(torch, dtype)
    assert tensor.float().tolist() == values.tolist()
    assert tensor.data_ptr() == stored.ctypes.data


# ---- the operation ----------------------------------------------------------------------------------------


def test_both_layouts_and_prepared_references_give_the_same_bits() -> None:
    W = planted(900, 20, noise=0.2)
    R = W[:3]
    fits = [
        ops.assign_and_fit(np.ascontiguousarray(W.T), R),
        ops.assign_and_fit(W, R, time_major=False),
        ops.assign_and_fit(torch.as_tensor(W).T, ops.prepare_references(R)),
        ops.assign_and_fit(W.T, R, device="cpu"),
    ]
    for fit in fits[1:]:
        for name in ("mode", "a", "b", "correlation", "ss"):
            assert torch.equal(getattr(fit, name), getattr(fits[0], name)), name
    assert fits[0].mode[:3].tolist() == [0, 1, 2]


def test_what_no_kernel_takes_lists_every_kernel_with_its_reasons() -> None:
    W = walks(10, 5).astype(np.float64)
    with pytest.raises(KernelError) as refused:
        ops.assign_and_fit(W, W[:2].T[:5].T, time_major=False)
    for name in ("triton", "torch"):
        assert f"{name}: " in str(refused.value)
    assert "dtype float64" in str(refused.value)
    with pytest.raises(KernelError, match="dtype int32"):
        ops.choose("int32", 5, 2, CPU)


def test_the_kernel_that_runs_is_named_with_the_reasons_of_those_before_it() -> None:
    name, refused = ops.choose("float32", 100, 10, CPU)
    assert name.startswith("native-") or all(f"native-{path}" in refused for path in ("avx512", "baseline"))
    assert any("CUDA" in reason for reason in refused["triton"])


@pytest.mark.parametrize(
    ("R", "said"),
    [
        (np.ones((2, 5), np.float32), "reference 0 is constant"),
        (np.array([[1, 2, 3, 4, np.nan]], np.float32), "reference 0 holds NaN or inf"),
        (walks(2, 6), "W has 5 snapshots .* references have 6"),
        (np.ones(5, np.float32), r"references must be \(M, T\)"),
    ],
)
def test_references_that_cannot_be_are_refused_as_usage(R: np.ndarray, said: str) -> None:  # pyright: ignore
    with pytest.raises(UsageError, match=said):
        ops.assign_and_fit(walks(9, 5), R, time_major=False)  # pyright: ignore[reportUnknownArgumentType]


def test_an_unknown_kernel_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        UsageError, match=r"no implementation named 'abacus'; have: triton, native-avx512, .*, torch"
    ):
        ops.assign_and_fit(walks(9, 5), walks(1, 5), time_major=False, implementation="abacus")


def test_the_caller_keeps_his_threads_and_his_precision() -> None:
    before = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.is_grad_enabled()
    ops.assign_and_fit(walks(40_000, 5), walks(2, 5), time_major=False)
    assert (torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.is_grad_enabled()) == before
    parameter = torch.nn.Parameter(torch.as_tensor(walks(9, 5)))
    fit = ops.assign_and_fit(parameter, walks(2, 5), time_major=False)
    assert not fit.a.requires_grad


def test_the_workspace_grows_with_threads_and_references() -> None:
    def needed(modes: int, threads: int) -> int:
        return ops.workspace_bytes("float32", 100, modes, torch.device("cpu"), threads)

    assert 0 < needed(10, 1) < needed(100, 1) < needed(100, 2)


def test_the_version_of_triton_is_told_or_none() -> None:
    assert ops.triton_version() is None or ops.triton_version()[:1].isdigit()  # pyright: ignore
