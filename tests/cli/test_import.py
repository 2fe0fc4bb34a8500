"""What ``cmdgpu import`` and ``cmdgpu inspect`` say of checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cmdgpu.trajectory import Trajectory
from tests.harness import run_cli
from tests.verbs import tree_bytes


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two epochs of a wrapped model, with what lies beside them; the current folder is theirs."""
    folder = tmp_path / "runs"
    folder.mkdir()
    for epoch in (10, 9):
        state = {"module.w": torch.full((3, 2), float(epoch)), "module.bn.running_mean": torch.zeros(4)}
        tied = {"module.head": state["module.w"], "module.n": torch.tensor(epoch)}
        torch.save({"model": {**state, **tied}, "epoch": epoch}, folder / f"ep{epoch}-loss0.5.pt")
    (folder / "args.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return folder


def test_json_has_the_keys_that_programs_read(runs: Path) -> None:
    said = run_cli("import", "runs", "run.zarr", "--unit", "epoch", "--json").json
    for key, value in {
        "command": "import", "ok": True, "out": "run.zarr", "format": "pt", "dtype": "float32",
        "unit": "epoch", "n_rows": 10, "n_parameters": 6, "n_buffers": 4, "n_holes": 0, "n_tensors": 2,
        "n_snapshots": 2,
        "n_added": 2, "first_step": 9, "last_step": 10, "aliases": {"head": "w"}, "stripped": "module.",
        "bytes_read": sum(file.stat().st_size for file in runs.glob("*.pt")),
        "skipped_paths": [{"path": "runs/args.json", "reason": "is no checkpoint"}],
    }.items():  # fmt: skip
        assert said[key] == value, key
    assert {"name": "module.n", "reason": "int64 has no rows"} in said["skipped"]
    assert said["bytes_written"] == Trajectory.open("run.zarr").stored_bytes
    assert said["peak_rss_bytes"] >= 0 and said["bytes_per_s"] > 0
    assert Trajectory.open("run.zarr").state_dict(9)["head"].tolist() == [[9, 9]] * 3  # pyright: ignore[reportUnknownMemberType]


def test_a_dry_run_says_all_and_writes_nothing(runs: Path) -> None:
    before = tree_bytes(runs.parent)
    ended = run_cli("import", "runs", "run.zarr", "--dry-run", "--exclude", "running")
    assert ended.code == 0 and ended.err == ""
    assert ended.out.index("ep9-loss0.5.pt") < ended.out.index("ep10-loss0.5.pt")
    for part in (
        "2 checkpoints (pt), steps 9..10",
        "every name begins with 'module.': stripped",
        "w (there module.w)  float32  [3, 2]",
        "1 tensors, 6 rows: 6 parameters, 0 buffer elements",
        "skipped  module.bn.running_mean: excluded",
        "skipped  module.n: int64 has no rows",
        "skipped  runs/args.json: is no checkpoint",
        "are free; memory",
        "nothing was written",
    ):
        assert part in ended.out
    said = run_cli("import", "runs", "run.zarr", "--dry-run", "--json").json
    assert [one["step"] for one in said["checkpoints"]] == [9, 10]
    assert said["names"] == {"w": "module.w", "bn.running_mean": "module.bn.running_mean"}
    assert (said["n_added"], said["n_missing"], said["dry_run"]) == (0, 2, True)
    assert said["stored_bytes"] == 2 * (256 * 4 + 4) and said["free_bytes"] > said["stored_bytes"]
    assert tree_bytes(runs.parent) == before


def test_text_says_what_came_in_and_the_same_command_again_adds_nothing(runs: Path) -> None:
    ended = run_cli("import", "runs", "run.zarr")
    assert "wrote run.zarr: 2 snapshots added, 2 in all, 2 tensors, 10 rows, float32" in ended.out
    assert "every name begins with 'module.': stripped" in ended.out
    assert "GB/s, peak memory" in ended.out and "import  100 %" in ended.err
    kept = tree_bytes(Path("run.zarr"))
    ended = run_cli("import", "runs", "run.zarr", "-q")
    assert ended.code == 0 and ended.err == ""
    assert "2 of them imported before" in ended.out and "0 snapshots added, 2 in all" in ended.out
    assert tree_bytes(Path("run.zarr")) == kept
    ended = run_cli("inspect", "run.zarr")
    assert "imported from 2 files, ep9-loss0.5.pt to ep10-loss0.5.pt" in ended.out
    said = run_cli("inspect", "run.zarr", "--json").json
    assert [(one["step"], one["files"][0][0]) for one in said["sources"]] == [
        (9, "ep9-loss0.5.pt"), (10, "ep10-loss0.5.pt"),
    ]  # fmt: skip


def test_options_reach_the_import(runs: Path) -> None:
    Path("names.json").write_text(json.dumps({"w": "weight"}))
    done = run_cli(
        *("import", "runs/ep9-loss0.5.pt", "runs/ep10-loss0.5.pt", "run.zarr", "--steps", "70,60", "--zstd"),
        *(
            "--prefix",
            "module.",
            "--include",
            "weight|head",
            "--key-map",
            "names.json",
            "--dtype",
            "bfloat16",
        ),
        *("--memory-limit", "64MiB", "--no-resume", "--json"),
    )
    said = done.json
    assert (said["first_step"], said["last_step"], said["dtype"]) == (60, 70, "bfloat16")
    assert said["rounded"] == ["weight"] and said["warnings"] == ["'weight' (float32) is rounded to bfloat16"]
    traj = Trajectory.open("run.zarr")
    assert traj[0, :].tolist() == [10, 9]
    assert list(traj.parameters.aliases) == ["head"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["absent", "run.zarr"], 2, "error: absent: there is nothing here"),
        (["*.npz", "run.zarr"], 2, "error: the glob *.npz matches nothing"),
        (["runs", "run.zarr", "--steps", "1"], 2, "error: 1 steps for 2 checkpoints: runs/ep9"),
        (["runs", "run.zarr", "--steps", "1,x"], 2, "'1,x' is no list of steps"),
        (["runs", "run.zarr", "--include", "("], 2, "is no regular expression"),
        (["runs", "run.zarr", "--dtype", "int8"], 2, "cannot be stored as 'int8'"),
        (["runs", "run.zarr", "--memory-limit", "1MiB"], 1, "the memory limit is 1.05 MB"),
        (["runs", "runs"], 1, "error: runs: is there already and is no trajectory to continue"),
        (["runs", "run.zarr", "--include", "lstm"], 1, "none of its 3 tensors is taken; it holds module.w"),
        (["runs"], 2, "OUT is missing beside runs; cmdgpu import CHECKPOINTS... TRAJECTORY"),
    ],
)
def test_what_goes_wrong_is_one_line(arguments: list[str], code: int, said: str, runs: Path) -> None:
    ended = run_cli("import", *arguments)
    assert (ended.code, ended.out) == (code, "")
    assert said in ended.err and ended.err.count("\n") == 1
    assert not Path("run.zarr").exists()


def test_inspect_reads_headers_of_checkpoints(runs: Path) -> None:
    ended = run_cli("inspect", "runs", "--tensors")
    for part in (
        "2 checkpoints  runs",
        "step        9  runs/ep9-loss0.5.pt  pt, 3 tensors",
        "2 of 3 tensors would be taken",
        "every name begins with 'module.': stripped",
        "module.w                float32    [3, 2]",
        "skipped module.n: int64 has no rows",
        "skipped runs/args.json: is no checkpoint",
    ):
        assert part in ended.out, ended.out
    said = run_cli("inspect", "runs/ep*.pt", "--tensors", "--json").json
    assert (said["kind"], said["format"], said["n_tensors"], said["n_taken"]) == ("checkpoint", "pt", 3, 2)
    assert said["steps"] == {"count": 2, "first": 9, "last": 10}
    assert said["total_bytes"] == sum(file.stat().st_size for file in runs.glob("*.pt"))
    assert said["stored_bytes"] == 2 * 10 * 4
    assert said["tensors"][0] == {"name": "module.w", "dtype": "float32", "shape": [3, 2]}
    torch.save({"module.w": torch.zeros(3, 2)}, runs / "best.pt")
    ended = run_cli("inspect", "runs")
    assert "2 checkpoints  runs" in ended.out and "step        ?" not in ended.out
    assert "skipped runs/best.pt: its name tells no step, beside others that do" in ended.out
    (runs / "best.pt").unlink()
    torch.save(torch.nn.Linear(1, 1), runs / "ep11.pt")
    said = run_cli("inspect", "runs", "--json").json
    assert len(said["checkpoints"]) == 2 and "ep11.pt: is one pickled object" in said["problems"][0]
    ended = run_cli("inspect", "runs/args.json")
    assert ended.code == 1 and ended.err.startswith("error: runs/args.json: is no checkpoint")
    ended = run_cli("inspect", ".")
    assert ended.code == 1 and ended.err.startswith("error: runs: holds 3 checkpoints: ")
