"""Laws of recycled outputs: never two owners at a time, never more memory than is looked at at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from cmdgpu_kernels.assignment.recycled import outputs
from cmdgpu_kernels.assignment.row_fit import RowFit

ROWS = 1000


def addresses(fits: list[RowFit]) -> set[int]:
    return {t.data_ptr() for fit in fits for t in (fit.mode, fit.a, fit.b, fit.correlation, fit.ss)}


def in_new_thread(work: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


def test_memory_comes_back_when_the_last_tensor_is_gone_and_not_before() -> None:
    def work() -> None:
        fits = outputs(ROWS, 2)
        first, part = addresses(fits), fits[1].mode[:10].numpy()
        del fits
        second = outputs(ROWS, 2)
        assert not first & addresses(second), "given away while an array still looks at it"
        del part
        assert addresses(outputs(ROWS, 2)) == first

    in_new_thread(work)


def test_another_thread_may_be_the_last_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    inner, taken = np.empty, list[object]()

    def empty(*arguments: Any, **named: Any) -> Any:
        taken.append(arguments)
        return inner(*arguments, **named)

    monkeypatch.setattr("cmdgpu_kernels.assignment.recycled.np.empty", empty)

    def look(fits: list[RowFit]) -> int:
        return len(addresses(fits))

    def work() -> None:
        with ThreadPoolExecutor(4) as pool:
            for _ in range(50):
                fits = outputs(ROWS, 3)
                asked = pool.submit(look, fits)
                del fits
                asked.result()
                del asked
        assert 1 <= len(taken) <= 5, "new memory for one unit after the other"

    in_new_thread(work)


def test_sets_share_ss_and_nothing_else_and_another_number_of_sets_gets_memory_of_its_own() -> None:
    def work() -> None:
        for sets in (1, 3, 2):
            fits = outputs(ROWS, sets)
            assert len(addresses(fits)) == 1 + 4 * sets
            for number, fit in enumerate(fits):
                fit.mode.fill_(number)
                for tensor in (fit.a, fit.b, fit.correlation):
                    tensor.fill_(number)
            fits[0].ss.fill_(-1.0)
            for number, fit in enumerate(fits):
                assert fit.mode.dtype == torch.int16 and bool((fit.mode == number).all())
                assert all(bool((t == number).all()) for t in (fit.a, fit.b, fit.correlation))
                assert bool((fit.ss == -1).all())
                assert all(t.shape == (ROWS,) for t in (fit.mode, fit.a, fit.b, fit.correlation, fit.ss))

    in_new_thread(work)
