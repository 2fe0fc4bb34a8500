"""A fit stays below its memory limit, measured: anonymous and shared memory, sampled all along the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmdgpu import ops
from cmdgpu.decomposition import CMD
from cmdgpu.errors import MemoryLimitError
from cmdgpu.memory import parse_bytes
from cmdgpu.sampling import candidate_rows
from cmdgpu.store.journal import Journal
from cmdgpu.trajectory import Trajectory
from tests.harness import end_of, one_tensor, start_child, walks, write_store

N, T, ROWS = 2_000_000, 64, 1 << 18
LIMIT = 256 << 20

pytestmark = pytest.mark.slow

PROLOGUE = """
import json, sys
from pathlib import Path
from cmdgpu.streaming import engine
if sys.argv[3:] == ["slots"]:
    engine.threads_for = lambda *_: 0
import numpy as np
from cmdgpu.decomposition import CMD
from cmdgpu.memory import MemoryMeter
from cmdgpu.trajectory import Trajectory
from tests.harness import fit_bits, run_cli, walks

out = Path(sys.argv[2])
CMD(n_modes=2).fit(walks(500, 8))
CMD(n_modes=2).fit(Trajectory.open(Path(sys.argv[1])).sel(stop=3), out=out / "warm.zarr")
"""


@pytest.fixture(scope="module")
def half_gigabyte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000,000 x 64 float32, 512 MB in chunks of 1 MiB, made a column at a time."""
    return _half_gigabyte(tmp_path_factory.mktemp("memory") / "large.zarr")


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _half_gigabyte(tmp_path_factory.mktemp("memory") / "zstd.zarr", compressed=True)


def _half_gigabyte(path: Path, *, compressed: bool = False) -> Path:
    rng = np.random.default_rng(0)
    profiles = np.cumsum(rng.standard_normal((T, 3)), axis=0).astype(np.float32)
    mode = rng.integers(3, size=N)
    slope, offset = rng.standard_normal((2, N), dtype=np.float32)
    noise = 0.1 * rng.standard_normal(N + T, dtype=np.float32)
    layout = one_tensor(N)
    sketch = candidate_rows(layout)
    journal = Journal.create(
        path, layout, dtype="float32", rows=ROWS, unit="step", sketch_rows=sketch, compressed=compressed
    )
    column = np.full(8 * ROWS, np.nan, dtype=np.float32)
    for t in range(T):
        column[:N] = slope * profiles[t, mode] + offset + noise[t : t + N]
        journal.append(column, t, {}, column[sketch])
    journal.close()
    return path


def measured(script: str, store: Path, out: Path, *route: str) -> dict[str, Any]:
    ended = end_of(start_child("-c", PROLOGUE + script, store, out, *route))
    assert ended.code == 0, ended.err
    return json.loads(ended.out)


@pytest.mark.parametrize("store", ["half_gigabyte", "compressed"])
def test_fitting_half_a_gigabyte_in_a_quarter_stays_below_it_and_changes_no_bit(
    store: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Measured above the process after its imports and tiny fits; the command measures itself, too."""
    script = f"""
with MemoryMeter(0.001) as meter:
    ended = run_cli("fit", sys.argv[1], "-o", out / "out.zarr", "--memory-limit", "{LIMIT}", "--json")
assert ended.code == 0, ended.err
roomy = CMD().fit(Trajectory.open(sys.argv[1]), memory_limit="2GiB")
print(json.dumps({{
    "peak": meter.above_start_bytes, "said": ended.json, "rows_per_block": roomy.metrics_["rows_per_block"],
    "bits": [fit_bits(CMD.load(out / "out.zarr")), fit_bits(roomy)],
}}))
"""
    found = measured(script, request.getfixturevalue(store), tmp_path, "slots")
    said = found["said"]
    print(f"peak {found['peak'] / 2**20:.0f} MiB, planned {said['planned_bytes'] / 2**20:.0f} MiB")
    assert 2 * ROWS * T * 4 < found["peak"] < LIMIT, "two slots are held, and no more than the limit"
    assert found["peak"] <= said["planned_bytes"] <= LIMIT
    assert said["peak_rss_bytes"] < LIMIT
    assert said["bytes_read"] == 8 * ROWS * T * 4
    assert found["bits"][0] == found["bits"][1]
    assert said["rows_per_block"] < found["rows_per_block"], "the limits do not change the blocks"


@pytest.mark.skipif(not ops.can_fit_files("float32", T, 10), reason="no compiled kernel that reads files")
def test_a_fit_straight_from_files_holds_a_few_rows_of_every_snapshot(
    half_gigabyte: Path, tmp_path: Path
) -> None:
    script = """
with MemoryMeter(0.001) as meter:
    cmd = CMD().fit(Trajectory.open(sys.argv[1]), out=out / "out.zarr", memory_limit="100MiB")
print(json.dumps({"peak": meter.above_start_bytes, "planned": cmd.metrics_["planned_bytes"]}))
"""
    found = measured(script, half_gigabyte, tmp_path)
    assert found["peak"] <= found["planned"] <= 100 << 20 < 2 * ROWS * T * 4


@pytest.mark.parametrize("route", ["slots", "direct"])
def test_a_fit_in_memory_counts_its_results_against_the_limit(
    half_gigabyte: Path, tmp_path: Path, route: str
) -> None:
    script = f"""
with MemoryMeter(0.001) as meter:
    cmd = CMD().fit(Trajectory.open(sys.argv[1]), memory_limit={2 * LIMIT})
print(json.dumps({{"peak": meter.above_start_bytes, "planned": cmd.metrics_["planned_bytes"]}}))
"""
    if route == "direct" and not ops.can_fit_files("float32", T, 10):
        pytest.skip("no compiled kernel that reads files")
    found = measured(script, half_gigabyte, tmp_path, route)
    slots = 2 * ROWS * T * 4 if route == "slots" else 0
    assert 14 * N + slots < found["planned"] < 2 * LIMIT
    assert found["peak"] <= found["planned"]


@pytest.mark.parametrize("affinity", ["abs-corr", "corr-profile"])
def test_clustering_a_large_sample_stays_below_what_it_asks_for(tmp_path: Path, affinity: str) -> None:
    store = tmp_path / "s.zarr"
    write_store(store, walks(2600, 4), rows=2816)
    script = f"""
work = CMD(n_samples=2500, n_modes=20, affinity="{affinity}")
CMD(n_samples=300, n_modes=20, affinity="{affinity}").fit(walks(500, 8))
try:
    work.fit(Trajectory.open(sys.argv[1]), memory_limit="100MB")
except Exception as error:
    limit = error.hint.split()[1]
with MemoryMeter(0.001) as meter:
    work.fit(Trajectory.open(sys.argv[1]), memory_limit=limit)
print(json.dumps({{"peak": meter.above_start_bytes, "limit": limit}}))
"""
    found = measured(script, store, tmp_path)
    assert 8 * 2500**2 < found["peak"] <= parse_bytes(found["limit"])


# ---- refusing ------------------------------------------------------------------------------------------


def test_a_limit_too_small_is_refused_before_anything_is_read_or_written(
    half_gigabyte: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touched(*args: object) -> None:
        raise AssertionError("a chunk was read")

    monkeypatch.setattr("cmdgpu.store.view.StoreView.read_chunk", touched)
    monkeypatch.setattr("cmdgpu.store.view.StoreView.contact", touched)
    monkeypatch.setattr("cmdgpu.store.view.StoreView.read_sketch", touched)
    out = tmp_path / "out.zarr"
    with pytest.raises(
        MemoryLimitError, match=r"needs \S+ MB, the memory limit is 41.9 MB; give \d+MiB or more"
    ):
        CMD().fit(Trajectory.open(half_gigabyte), out=out, memory_limit="40MiB")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(MemoryLimitError, match=r"clustering 5000 sampled rows needs .* sample fewer rows"):
        CMD(n_samples=5000).fit(Trajectory.open(half_gigabyte), out=out, memory_limit="100MiB")
    assert list(tmp_path.iterdir()) == []


def test_a_complete_result_opens_whatever_the_limit(tmp_path: Path) -> None:
    source = write_store(tmp_path / "s.zarr", walks(700, 5))
    CMD(n_modes=2).fit(source, out=tmp_path / "out.zarr")
    with pytest.raises(MemoryLimitError):
        CMD(n_modes=2).fit(source, out=tmp_path / "other.zarr", memory_limit="10MB")
    again = CMD(n_modes=2).fit(source, out=tmp_path / "out.zarr", memory_limit="10MB")
    assert again.metrics_["bytes_read"] == 0
