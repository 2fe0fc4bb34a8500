"""Settings every test shares."""

import os

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
