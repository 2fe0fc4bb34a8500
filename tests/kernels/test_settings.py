"""What a caller has set for himself neither changes a bit of a fit nor is changed by one."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from cmdgpu_kernels import RowFit, assign_and_fit
from torch import Tensor

# The stubs of torch.backends lag behind its attributes.
MATMUL: Any = torch.backends.mkldnn
GENERAL: Any = torch.backends


def fit() -> RowFit:
    rng = np.random.default_rng(0)
    W = torch.tensor(np.cumsum(rng.standard_normal((100, 700)), axis=0), dtype=torch.float32, device="cpu")
    R = np.cumsum(rng.standard_normal((10, 100)), axis=1)
    return assign_and_fit(W, R, implementation="torch")


def bits(answer: RowFit) -> list[bytes]:
    return [t.cpu().numpy().tobytes() for t in vars(answer).values() if isinstance(t, Tensor)]


@contextmanager
def default_device() -> Generator[None]:
    with torch.device("meta"):
        yield


@contextmanager
def default_dtype() -> Generator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "mode",
    [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu"), default_device, default_dtype],
    ids=["inference mode", "no grad", "autocast", "default device", "default dtype"],
)
def test_a_callers_mode_changes_no_bit(mode: type[AbstractContextManager[Any]]) -> None:
    plain = bits(fit())
    with mode():
        inside = fit()
    assert bits(inside) == plain


@pytest.mark.parametrize("allowed", ["one backend", "every backend"])
def test_products_in_sixteen_bits_are_not_used_and_stay_allowed(allowed: str) -> None:
    plain = bits(fit())
    owner = MATMUL.matmul if allowed == "one backend" else GENERAL
    found = MATMUL.matmul.fp32_precision, GENERAL.fp32_precision
    MATMUL.matmul.fp32_precision = "none"  # inherits, until it is set
    owner.fp32_precision = "bf16"
    try:
        assert bits(fit()) == plain
        assert owner.fp32_precision == MATMUL.matmul.fp32_precision == "bf16"
        if allowed == "every backend":
            # Still inherited: a later change of the general setting must reach the products.
            owner.fp32_precision = "ieee"
            assert MATMUL.matmul.fp32_precision == "ieee"
    finally:
        MATMUL.matmul.fp32_precision, GENERAL.fp32_precision = found


def test_passes_at_the_same_time_put_the_precision_back_once() -> None:
    plain = bits(fit())
    torch.set_float32_matmul_precision("medium")
    try:
        answers: list[list[bytes]] = []
        threads = [threading.Thread(target=lambda: answers.append(bits(fit()))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == [plain] * 4
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_weights_that_require_a_gradient_are_fitted_without_one() -> None:
    W = torch.linspace(0, 1, 60).reshape(12, 5).pow(2).requires_grad_()
    answer = assign_and_fit(W, np.arange(12.0)[None])
    assert not answer.a.requires_grad and (answer.mode == 0).all()
