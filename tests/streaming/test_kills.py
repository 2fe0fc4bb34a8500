"""A fit that is killed goes on where it stopped, to the same bytes."""

from __future__ import annotations

import hashlib
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from cmdgpu.results import partials_of, progress_of
from cmdgpu.trajectory import Trajectory
from tests.harness import end_of, planted, run_child, run_cli, start_child

N_UNITS = 40
KILLS = 5


def tree(path: Path) -> dict[str, str]:
    """Digest of every file of a result."""
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def command(here: Path, out: str) -> list[str | Path]:
    limit = ["--memory-limit", "128MiB", "--modes", "8", "--samples", "500", "-q"]
    return ["-m", "cmdgpu", "fit", here / "run.zarr", "-o", here / out, *limit]


def kill_midway(here: Path, out: str, at: int) -> tuple[int, int]:
    """Start the fit, SIGKILL it once ``at`` units are done; answer (done, total) of what it left."""
    child = start_child(*command(here, out))
    deadline = time.monotonic() + 60
    while child.poll() is None and time.monotonic() < deadline:
        done = [len(list((partial / "done").glob("c.*.0"))) for partial in partials_of(here / out)]
        if done and done[0] >= at:
            break
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    assert end_of(child).code in (-signal.SIGKILL, 0)
    (partial,) = partials_of(here / out)
    return progress_of(partial)


@pytest.mark.slow
def test_five_kills_and_the_same_command_give_the_bytes_of_an_undisturbed_fit(tmp_path: Path) -> None:
    rows = 16_384
    W = np.concatenate([planted(rows, 32, 8, seed=seed) for seed in range(4)] * (N_UNITS // 4))[:-5]
    Trajectory.from_array(W, out=tmp_path / "run.zarr", rows_per_chunk=rows)
    undisturbed = end_of(start_child(*command(tmp_path, "whole")))
    assert undisturbed.code == 0, undisturbed.err

    midway = 0
    for kill in range(KILLS):
        done, total = kill_midway(tmp_path, "killed", at=1 + kill * 6)
        assert total == N_UNITS
        midway += 0 < done < total
        assert not (tmp_path / "killed").exists()
        told = run_cli("inspect", tmp_path / "killed")
        assert told.code == 1 and f"{done} of {total} units done" in told.err
    assert midway >= 3, f"only {midway} of {KILLS} kills came with some but not all units done"

    resumed = run_child(*[str(part) for part in command(tmp_path, "killed")[2:]], "--json")
    assert resumed.code == 0, resumed.err
    assert 0 < resumed.json["units_resumed"] < N_UNITS
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")
    assert partials_of(tmp_path / "killed") == []
