"""Full float32 matrix products, whatever precision the caller allows for his own, and what tensor cores need.

``torch.set_float32_matmul_precision("medium")`` makes a CPU with bfloat16 units round every product to 8
bits, and "high" does it with TF32 on a GPU; both would move correlations by 1e-3 and more.
"""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["exact_matmul", "split_tf32"]

_lock = threading.Lock()
_passes: dict[str, int] = {}
_found: dict[str, Any] = {}


@contextmanager
def exact_matmul(device: str) -> Generator[None]:
    """Float32 products in full precision on ``device`` inside the block, the caller's setting after it.

    The setting belongs to the process: the first pass to enter changes it, the last one to leave puts it
    back. It is not touched where it already is exact. Autocast belongs to the thread and is switched off.
    """
    # Any, because the stubs of torch.backends lag behind its attributes.
    backend: Any = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
    setting: Any = backend.matmul
    with _lock:
        _passes[device] = _passes.get(device, 0) + 1
        if _passes[device] == 1:
            _found[device] = setting.fp32_precision
            if _found[device] not in ("ieee", "none"):
                setting.fp32_precision = "ieee"
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        with _lock:
            _passes[device] -= 1
            found = _found[device]
            if _passes[device] == 0 and found not in ("ieee", "none"):
                # Unset inherits the general setting; only what was set here by the caller is set again.
                setting.fp32_precision = "none"
                if setting.fp32_precision != found:
                    setting.fp32_precision = found


def split_tf32(values: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Two parts of 11 bits each, as tensor cores read them, rounded to nearest; high + low keeps 22 bits."""

    def rounded(part: NDArray[np.float32]) -> NDArray[np.float32]:
        return ((part.view(np.int32) + 0x1000) & ~0x1FFF).view(np.float32)

    high = rounded(values)
    return high, rounded(values - high)
