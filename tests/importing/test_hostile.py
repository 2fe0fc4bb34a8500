"""Laws for files that are odd or hostile: each gets its one clear line, or is read for what it is, in little
time and memory. ``hostile_files`` holds them; a child opens each and reads its numbers to the end.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import pytest

from cmdgpu.importing.checksums import Check
from cmdgpu.importing.discovery import discover
from cmdgpu.importing.elements import numpy_type
from cmdgpu.importing.naming import Rules, name_tensors
from cmdgpu.tensors import BLOCK_ROWS
from tests.faults import hostile
from tests.importing.hostile_files import CORPUS, lay_out

MORE_MEMORY: Final = 512 << 20
"""What the longest pickle that is followed may take."""

_CHILD: Final = """
import json, signal, sys, time, warnings
warnings.simplefilter("error")
import h5py, torch
from cmdgpu.errors import CmdgpuError
from cmdgpu.memory import MemoryMeter
from tests.importing.test_hostile import look
for line in sys.stdin:
    name, path = json.loads(line)
    began, meter = time.perf_counter(), MemoryMeter(0.002)
    signal.alarm(30)
    try:
        with meter:
            tensors, skipped = look(path)
        found = {"line": None if tensors else "no tensor", "tensors": tensors, "skipped": skipped}
    except CmdgpuError as error:
        found = {"line": str(error), "kind": type(error).__name__}
    except BaseException as error:
        found = {"line": None, "broke": repr(error)}
    found |= {"seconds": time.perf_counter() - began, "more": meter.above_start_bytes}
    print(json.dumps({name: found}), flush=True)
"""


def look(path: str) -> tuple[list[str], list[tuple[str, str]]]:
    """From the first look to the last number: (names of tensors, what was skipped)."""
    (candidate,) = discover([path]).candidates
    checkpoint = candidate.format.open(candidate.path)
    if checkpoint.models:
        name_tensors(checkpoint, Rules())
    for file in checkpoint.files:
        check = Check(file, checkpoint.checksums.get(file, ()))
        check.update(file.read_bytes())
        check.finish()
    for name, info in checkpoint.tensors.items():
        count = math.prod(info.shape)
        for start in range(0, count, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, count)
            checkpoint.read(name, start, stop, np.empty(stop - start, numpy_type(info.dtype)))
    return list(checkpoint.tensors), list(checkpoint.skipped)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of every case, in one process: one that breaks it breaks those behind it."""
    paths = lay_out(tmp_path_factory.mktemp("hostile") / "cases")
    asked = "".join(json.dumps([name, str(path)]) + "\n" for name, path in paths.items())
    ended = subprocess.run(
        [sys.executable, "-c", _CHILD],
        input=asked,
        capture_output=True,
        text=True,
        cwd=hostile.ROOT,
        timeout=200,
    )
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = {}
    for line in ended.stdout.splitlines():
        found |= cast(dict[str, Any], json.loads(line))
    return found


@pytest.mark.parametrize("name", CORPUS)
def test_every_file_gets_its_line_or_is_read(name: str, seen: dict[str, Any]) -> None:
    case, found = CORPUS[name], seen[name]
    assert "broke" not in found, found["broke"]
    line = cast(str | None, found["line"])
    if case.line is None:
        assert line is None, line
        assert found["tensors"] != []
    else:
        assert line is not None, f"was read: {found}"
        assert re.search(case.line, line), line
        assert "\n" not in line and hostile.is_printable(line)
        assert len(line) < hostile.LONGEST_TEXT
        assert line == "no tensor" or found["kind"] in ("CheckpointError", "UsageError")
    assert found["more"] < MORE_MEMORY
    assert found["seconds"] < hostile.SECONDS


def test_names_of_a_file_are_labels_and_nothing_else(seen: dict[str, Any], tmp_path: Path) -> None:
    assert seen["torch: names like paths and escapes"]["tensors"] == ["../../etc/x", "\x1b[2J\r\n"]
    assert seen["torch: names that are numbers"]["skipped"] == [["0", "its name is no text"]]


def test_pickled_objects_of_numpy_are_left_where_they_are(seen: dict[str, Any]) -> None:
    found = seen["npz: pickled objects"]
    assert (found["tensors"], found["skipped"]) == (
        ["w"],
        [["evil", "pickled objects, which are never read"]],
    )
