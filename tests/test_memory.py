"""Laws of byte counts: read as people write them, measured as a limit means them."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from cmdgpu.errors import UsageError
from cmdgpu.memory import MemoryMeter, default_limit, parse_bytes, show_bytes

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (2000, 2000),
        ("1000", 1000),
        ("1000B", 1000),
        ("4GiB", 4 << 30),
        ("4 GiB", 4 << 30),
        (" 4gib ", 4 << 30),
        ("1.5MiB", 3 << 19),
        ("256 MB", 256_000_000),
        ("2k", 2000),
        ("2KiB", 2048),
        ("1TB", 10**12),
        ("1TiB", 1 << 40),
    ],
)
def test_bytes_are_read_as_people_write_them(text: int | str, number: int) -> None:
    assert parse_bytes(text) == number


NO_BYTES = ["", "GiB", "four", "4 GiBs", "1e9", "-1", "0", "0GiB", -5, "0.1B", "nan", "4 4"]


@pytest.mark.parametrize("text", NO_BYTES)
def test_what_is_no_number_of_bytes_is_refused(text: int | str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_bytes(text)
    assert caught.value.hint is not None


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1234, "1.23 kB"),
        (999_999, "1 MB"),
        (4_194_308, "4.19 MB"),
        (1.5e9, "1.5 GB"),
        (2e12, "2 TB"),
        (5e15, "5e+03 TB"),
    ],
)
def test_bytes_are_shown_in_three_digits(number: float, text: str) -> None:
    assert show_bytes(number) == text


def test_the_limit_nobody_gave_leaves_room_for_training() -> None:
    free: Any = psutil.virtual_memory().available
    assert 256 * MIB <= default_limit() <= max(free // 2, 256 * MIB)


def test_a_meter_sees_what_was_allocated_in_between_and_given_back() -> None:
    gc.collect()
    with MemoryMeter(0.001) as meter:
        held = np.ones(256 * MIB // 8)
        patience = time.monotonic() + 10  # where the machine is busy, the meter may not have had its turn yet
        while meter.above_start_bytes < 240 * MIB and time.monotonic() < patience:
            time.sleep(0.002)
        del held
    assert 240 * MIB < meter.above_start_bytes < 290 * MIB
    with MemoryMeter() as meter:
        pass
    assert meter.above_start_bytes < 8 * MIB


def test_pages_of_a_file_are_not_memory(tmp_path: Path) -> None:
    """The kernel takes them back whenever it needs them."""
    np.ones(64 * MIB // 8).tofile(tmp_path / "f")
    with MemoryMeter() as meter:
        mapped = np.memmap(tmp_path / "f", dtype=np.float64, mode="r")
        total = float(np.add.reduce(mapped))
    assert total == 64 * MIB // 8
    assert meter.above_start_bytes < 16 * MIB
