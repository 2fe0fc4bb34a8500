"""Many questions under way, their answers in the order they were asked."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Q = TypeVar("Q")
A = TypeVar("A")


def in_order(ask: Callable[[Q], A], questions: Iterable[Q], in_flight: int) -> Iterator[A]:
    """``ask`` of every question, ``in_flight`` threads at it; four times as many answers are kept at most."""
    left = iter(questions)
    with ThreadPoolExecutor(in_flight, thread_name_prefix="cmdgpu-ahead") as pool:
        asked: deque[Future[A]] = deque()
        try:
            asked.extend(pool.submit(ask, question) for question in itertools.islice(left, 4 * in_flight))
            while asked:
                answer = asked.popleft().result()
                asked.extend(pool.submit(ask, question) for question in itertools.islice(left, 1))
                yield answer
        finally:
            for future in asked:
                future.cancel()
