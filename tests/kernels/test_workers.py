"""Workers compute on one thread each, and nobody else's number of threads changes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable

import pytest
import torch
from cmdgpu_kernels.workers import run_in_workers


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_worker_stays_on_one_thread_after_its_first_product(threads: int) -> None:
    seen: list[int] = []

    def work(tasks: Iterable[int]) -> None:
        for _ in tasks:
            torch.mm(torch.ones(300, 300), torch.ones(300, 300))
            seen.append(torch.get_num_threads())

    before = torch.get_num_threads()
    run_in_workers(work, range(8), threads)
    assert seen == [1] * 8
    assert torch.get_num_threads() == before


NUMBERS = """
import threading, torch
from cmdgpu_kernels.workers import run_in_workers
torch.set_num_threads(3)
run_in_workers(list, range(4), 2)
born = threading.Thread(target=lambda: print(torch.get_num_threads()))
born.start()
born.join()
print(torch.get_num_threads())
"""


def test_neither_the_caller_nor_a_thread_born_later_loses_its_number_of_threads() -> None:
    """In a new process: the workers of this one are up already."""
    done = subprocess.run([sys.executable, "-c", NUMBERS], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["3", "3"], done.stderr


def test_an_error_of_one_task_is_raised_when_all_workers_have_stopped() -> None:
    def work(tasks: Iterable[int]) -> None:
        for task in tasks:
            if task == 3:
                raise ArithmeticError("task 3")

    with pytest.raises(ArithmeticError, match="task 3"):
        run_in_workers(work, range(50), 2)
