"""What the splits for tensor cores cost, emulated in NumPy: the interpreter multiplies in full float32.

A tensor core reads 11 bits of a float32 (TF32) and multiplies them exactly; how it rounds its sums is not
emulated, and is what the tolerances of the kernels leave room for.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cmdgpu_kernels.precision import split_tf32
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


def cut(x: F32) -> tuple[F32, F32]:
    """The two parts of ``device_math.split_tf32``; the second is read with 11 bits as well."""
    high = (x.view(np.int32) & -8192).view(np.float32)
    low = x - high
    return high, (low.view(np.int32) & -8192).view(np.float32)


def walks(rows: int, level: float) -> F32:
    rng = np.random.default_rng(0)
    x = np.cumsum(rng.standard_normal((100, rows)), axis=0)
    return (x / x.std(axis=0) + level).astype(np.float32)


def references() -> F64:
    r = np.cumsum(np.random.default_rng(1).standard_normal((30, 100)), axis=1)
    r -= r.mean(axis=1, keepdims=True)
    return r / np.sqrt((r**2).sum(axis=1, keepdims=True))


def error(W: F32, d: F64 | F32, z: F64) -> float:
    """Largest error of a correlation."""
    x = W.astype(np.float64) - W.astype(np.float64).mean(axis=0)
    return float(np.abs((d - z @ x) / np.sqrt((x**2).sum(axis=0))).max())


@pytest.mark.parametrize("values", ["random", "denormal", "negative"])
def test_two_parts_of_eleven_bits_keep_twenty_two(values: str) -> None:
    x = np.random.default_rng(2).standard_normal(10_000).astype(np.float32)
    x = {"random": x, "denormal": x * np.float32(1e-30), "negative": -np.abs(x)}[values]
    high, low = split_tf32(x)
    for part in (high, low):
        assert not (part.view(np.int32) & 0x1FFF).any()
    assert (np.abs(x.astype(np.float64) - high - low) <= 2.0**-23 * np.abs(x)).all()
    assert (np.abs(low) <= 2.0**-11 * np.abs(x)).all()


@pytest.mark.parametrize("level", [0.0, 1e2, 1e4, 1e6])
def test_three_products_are_exact_enough_and_one_is_not(level: float) -> None:
    W, z = walks(1000, level), references()
    x = (W - W[0]).astype(np.float32)
    x -= x.mean(axis=0, dtype=np.float32)
    x_high, x_low = cut(x)
    z_high, z_low = split_tf32(z.astype(np.float32))
    three = z_high @ x_low + z_low @ x_high + z_high @ x_high
    assert error(W, three, z) <= 2e-6
    assert error(W, z_high @ x_high, z) >= 1e-4


def test_products_of_raw_sixteen_bit_values_miss_the_tolerance() -> None:
    """Why tiles subtract a pivot from 16-bit rows too: raw, three parts of a reference do not suffice."""
    z = references()
    for level, missed in ((0.0, False), (100.0, True)):
        W = torch.tensor(walks(1000, level)).to(torch.bfloat16).float().numpy()
        parts: list[F32] = []
        rest = z
        for _ in range(3):
            parts.append(torch.tensor(rest).to(torch.bfloat16).float().numpy())
            rest = rest - parts[-1]
        d = np.zeros((30, 1000), np.float32)
        for t in range(0, 100, 8):  # as a tensor core adds: 8 snapshots at a time to one accumulator
            for part in reversed(parts):
                d += part[:, t : t + 8] @ W[t : t + 8]
        moved = W.std(axis=0) > 0
        assert (error(W[:, moved], d[:, moved], z) > 3e-6) == missed


@pytest.mark.parametrize("repeated", [False, True])
def test_two_products_and_the_transpose_do_for_three(repeated: bool) -> None:
    W = walks(4096, 1000.0)
    x = (W - W[0]).astype(np.float32)
    if repeated:
        x[:] = x[:, :1]  # every rounding error has the same sign
    high, low = split_tf32(x)
    products = np.zeros((100, 100), np.float32)
    for n in range(0, 4096, 64):
        products += (
            high[:, n : n + 64] @ (2 * low[:, n : n + 64]).T + high[:, n : n + 64] @ high[:, n : n + 64].T
        )
    G = (products.astype(np.float64) + products.T) / 2
    want = x.astype(np.float64) @ x.astype(np.float64).T
    assert np.abs(G - want).max() <= 3e-6 * np.abs(want).max()
    assert np.abs(high.astype(np.float64) @ high.T.astype(np.float64) - want).max() >= 3e-6 * want.max()
