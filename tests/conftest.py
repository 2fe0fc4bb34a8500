"""Settings every test shares."""

import os
from collections.abc import Iterator

import pytest
import torch

# before anything imports triton: a kernel decides where it runs when it is decorated
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import settings

# a busy machine makes one example slow; what bounds the time is the number of examples. `make test` looks at
# the same examples everywhere; `make faults` goes looking for new ones
settings.register_profile("cmdgpu", deadline=None, max_examples=60, derandomize=True)
settings.register_profile("search", deadline=None, max_examples=600, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "cmdgpu"))


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    """A test sets torch's threads as it likes, but never replaces what tells their number.

    The kernels' workers outlive the test they are born in, and would keep what they were told.
    """
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
