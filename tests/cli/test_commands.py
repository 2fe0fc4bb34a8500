"""The command line is a contract: streams, exit codes, one JSON object, names that stay."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from safetensors import safe_open

from cmdgpu.cli import cli
from cmdgpu.recording import Recorder
from cmdgpu.trajectory import Trajectory
from tests.harness import planted, run_child, run_cli

ENVELOPE = {"schema", "command", "ok", "version", "elapsed_s", "warnings"}

OPTIONS: dict[str, set[str]] = {
    "demo": {"directory", "device", "seed", "epochs"},
    "import": {
        *("paths", "out", "steps", "prefix", "include", "exclude", "key_map", "dtype", "memory_limit"),
        *("resume", "dry_run", "zstd", "unit"),
    },
    "inspect": {"path", "tensors", "params"},
    "verify": {"path", "quick"},
    "repair": {"path", "to", "yes"},
    "fit": {
        *("stores", "out", "modes", "threshold", "samples", "sampling", "affinity", "seeds", "device"),
        *("memory_limit", "start", "stop", "stride", "steps", "buffers", "resume"),
        *("params", "per_module", "executor", "references", "refine", "objective"),
    },
    "compare": {
        *("source", "methods", "modes", "steps", "evaluate", "model", "loader", "batch_norm", "select"),
        *("csv", "figure", "memory_limit"),
    },
    "landscape": {
        *("source", "out", "modes", "span", "points", "step", "evaluate", "model", "loader", "batch_norm"),
        *("select", "figure", "score"),
    },
    "report": {"result", "out", "baselines", "fits", "scores", "landscape", "title", "memory_limit"},
    "export": {"source", "out", "step", "kind", "max_shard_size", "params", "buffers"},
    "doctor": set(),
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``run.zarr``, a recorded model; ``run.cmd.zarr``, fitted from it."""
    here = tmp_path_factory.mktemp("stores")
    model = torch.nn.Sequential(torch.nn.Linear(6, 40), torch.nn.Linear(40, 3))
    generator = torch.Generator().manual_seed(0)
    with Recorder(here / "run.zarr", unit="epoch") as recorder, torch.no_grad():
        for epoch in range(8):
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            recorder.record(model, 10 * epoch, loss=1.0 / (1 + epoch))
    done = run_cli(
        "fit", here / "run.zarr", "-o", here / "run.cmd.zarr", "--modes", "3", "--samples", "100", "-q"
    )
    assert done.code == 0, done.err
    return here


def test_commands_and_options_stay() -> None:
    context = click.Context(cli)
    found: dict[str, set[str]] = {}
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        found[name] = {str(p.name) for p in command.params} - {"json", "quiet", "debug"}
        assert {"json", "quiet", "debug"} <= {str(p.name) for p in command.params}
    assert found == OPTIONS


@pytest.mark.parametrize("name", OPTIONS)
def test_help_teaches_what_a_command_does(name: str) -> None:
    shown = run_cli(name, "--help")
    assert shown.code == 0 and shown.err == ""
    assert "Usage:" in shown.out and "--json" in shown.out and len(shown.out.splitlines()) > 6


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["fit"], ["nonsense"], ["fit", "--help"]])
def test_help_and_wrong_command_lines_load_neither_torch_nor_zarr(arguments: list[str]) -> None:
    script = (
        "import sys; sys.argv = ['cmdgpu', *sys.argv[1:]]\n"
        "from cmdgpu.cli import main\n"
        "try: main()\n"
        "finally:\n"
        "    loaded = {'torch', 'zarr', 'scipy', 'matplotlib', 'rich'} & set(sys.modules)\n"
        "    assert not loaded, loaded\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False
    )
    assert "AssertionError" not in done.stderr, done.stderr
    assert done.returncode == (0 if "help" in str(arguments) or "version" in str(arguments) else 2)


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (
            ["inspect", "run.zarr", "--tensors"],
            {"kind", "shape", "steps", "n_parameters", "tensors", "skipped"},
        ),
        (["inspect", "run.cmd.zarr"], {"kind", "status", "n_modes", "units_done", "units_total", "config"}),
        (["verify", "run.zarr"], {"kind", "chunks_checked", "bytes_checked", "damaged"}),
        (["verify", "run.cmd.zarr", "--quick"], {"kind", "chunks_checked", "bytes_checked", "damaged"}),
        (
            ["fit", "run.zarr", "-o", "other.cmd.zarr", "--threshold", "0.3", "--start", "2"],
            {
                *("out", "n_modes", "mode_sizes", "r2", "mean_abs_correlation", "n_constant", "n_nonfinite"),
                *("n_samples", "device", "implementation", "rows_per_block", "blocks_total", "units_total"),
                *(
                    "units_resumed",
                    "buffers",
                    "bytes_read",
                    "bytes_per_s",
                    "peak_rss_bytes",
                    "peak_device_bytes",
                    "stage_s",
                ),
            },
        ),
        (
            ["export", "run.cmd.zarr", "-o", "x.pt", "--step", "30"],
            {"out", "format", "step", "n_tensors", "bytes", "left_out", "buffers"},
        ),
        (
            ["compare", "run.zarr", "--baselines", "ema,pca:components=2", "--step", "70", "--step", "30"],
            {"methods", "last", "selected", "steps", "scores", "batch_norm", "n_parameters", "csv", "figure"},
        ),
        (["doctor"], {"python", "torch", "devices", "implementations", "problems", "cpu_count"}),
    ],
)
def test_json_is_one_strict_object_with_its_keys(
    stores: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], keys: set[str]
) -> None:
    monkeypatch.chdir(stores)
    done = run_cli(*arguments, "--json")
    found = done.json
    assert done.code == 0, done.err
    assert set(found) >= ENVELOPE | keys
    assert found["ok"] is True and found["command"] == arguments[0] and "error" not in found


def test_a_fit_says_what_it_found_and_what_it_took(stores: Path, tmp_path: Path) -> None:
    done = run_cli("fit", stores / "run.zarr", "-o", tmp_path / "r", "--modes", "2")
    assert done.code == 0
    for part in ("403 rows x 8 snapshots", "epochs 0..70", "mean |corr|", "GB/s", "wrote", "peak memory"):
        assert part in done.out
    assert "fit  100 %" in done.err and "GB/s" in done.err
    again = run_cli("fit", stores / "run.zarr", "-o", tmp_path / "r", "--modes", "2", "--json")
    assert again.json["units_resumed"] == again.json["units_total"] and again.json["bytes_read"] == 0


def test_export_gives_the_recorded_bits_and_the_rebuilt_numbers(stores: Path, tmp_path: Path) -> None:
    traj = Trajectory.open(stores / "run.zarr")
    assert run_cli("export", stores / "run.zarr", "-o", tmp_path / "a.safetensors", "--step", "30").code == 0
    recorded = traj.state_dict(30)
    opened: Any = safe_open(tmp_path / "a.safetensors", framework="pt")
    with opened as file:
        written: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    assert set(written) == set(recorded)
    assert all(torch.equal(written[name], recorded[name]) for name in recorded)
    done = run_cli(
        "export", stores / "run.cmd.zarr", "-o", tmp_path / "b.pt", "--step", "-1", "--params", "^0", "--json"
    )
    assert done.json["step"] == 70 and done.json["n_tensors"] == 2
    rebuilt: dict[str, Any] = torch.load(tmp_path / "b.pt", weights_only=True)
    assert set(rebuilt) == {"0.weight", "0.bias"}


# ---- what bad input gets ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["fit", "nowhere", "-o", "x"], 2, "nowhere: there is nothing here"),
        (["fit", "file.txt", "-o", "x"], 1, "file.txt: is no store of cmdgpu"),
        (["inspect", "empty"], 1, "empty: is no store of cmdgpu"),
        (["fit", "run.cmd.zarr", "-o", "x"], 1, "holds a 'result', not a 'trajectory'"),
        (["fit", "run.zarr", "-o", "x", "--modes", "2", "--threshold", "0.1"], 2, "exclude each other"),
        (["fit", "run.zarr", "-o", "x", "--modes", "0"], 2, "0 modes; give 1 to 32767"),
        (["fit", "run.zarr", "-o", "x", "--threshold", "-0.5"], 2, "a threshold of -0.5"),
        (["fit", "run.zarr", "-o", "x", "--modes", "many"], 2, "'many' is no list of numbers"),
        (["fit", "run.zarr", "-o", "x", "--sampling", "unifrom"], 2, "have: layer-balanced, uniform"),
        (["fit", "run.zarr", "-o", "x", "--affinity", "cosine"], 2, "have: abs-corr, corr-profile"),
        (["fit", "run.zarr", "-o", "x", "--steps", "0,now"], 2, "is no list of steps"),
        (["fit", "run.zarr", "-o", "x", "--steps", "0,33"], 1, "step 33"),
        (["fit", "run.zarr", "-o", "x", "--start", "50"], 2, "selects none of 8 snapshots"),
        (["fit", "run.zarr", "-o", "x", "--memory-limit", "1MiB"], 1, "the memory limit is 1.05 MB"),
        (["fit", "run.zarr", "-o", "x", "--memory-limit", "lots"], 2, "is no number of bytes"),
        (["fit", "run.zarr", "-o", "run.cmd.zarr", "--modes", "2"], 1, "n_modes: 3 there, 2 asked"),
        (["export", "run.cmd.zarr", "-o", "x", "--step", "33"], 1, "nearest: 20, 30, 40"),
        (["export", "run.zarr", "-o", "empty"], 2, "is a directory"),
        (["export", "run.zarr", "-o", "x", "--format", "onnx"], 2, "have: dcp, huggingface, pt, safetensors"),
        (["export", "run.zarr", "-o", "empty", "--format", "dcp"], 1, "something is already there"),
        (["export", "run.zarr", "-o", "x", "--max-shard-size", "1GB"], 2, "safetensors has no shards"),
        (["export", "run.zarr", "-o", "x", "--buffers", "rebuilt"], 2, "have: recorded, skip"),
        (["export", "run.zarr", "-o", "x", "--buffers", "drop"], 2, "'drop' is not one of"),
        (["export", "run.zarr", "-o", "x", "--params", "lstm"], 2, "no tensor matches"),
        (["export", "run.zarr"], 2, "Missing option"),
        (["verify"], 2, "Missing argument"),
    ],
)
def test_bad_input_gets_one_line_its_code_and_leaves_nothing(
    stores: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, says: str
) -> None:
    monkeypatch.chdir(stores)
    (stores / "file.txt").write_text("hello")
    (stores / "empty").mkdir(exist_ok=True)
    before = sorted(path.name for path in stores.iterdir())
    done = run_cli(*arguments, "-q")
    assert done.code == code, done.err
    assert done.out == "" and done.err.startswith("error: ") and done.err.count("\n") == 1
    assert says in done.err
    assert sorted(path.name for path in stores.iterdir()) == before
    as_json = run_cli(*arguments, "-q", "--json")
    found = as_json.json
    assert as_json.code == code and found["ok"] is False
    assert set(found["error"]) == {"kind", "message", "file", "tensor", "step", "hint"}


def test_a_device_that_is_not_there_is_named(stores: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    done = run_cli("fit", stores / "run.zarr", "-o", stores / "x", "--device", "cuda", "-q")
    assert done.code == 1 and "found 0 CUDA devices" in done.err


def test_a_traceback_is_shown_only_when_asked(stores: Path) -> None:
    plain = run_cli("export", stores / "run.zarr", "-o", stores / "x.pt", "--step", "33")
    assert "Traceback" not in plain.err
    shown = run_cli("export", stores / "run.zarr", "-o", stores / "x.pt", "--step", "33", "--debug")
    assert "Traceback" in shown.err and shown.code == 1


def test_damage_is_listed_and_ends_with_one(tmp_path: Path) -> None:
    W = planted(3000, 5)
    Trajectory.from_array(W, out=tmp_path / "s.zarr", rows_per_chunk=1024)
    assert run_cli("verify", tmp_path / "s.zarr", "-q").code == 0
    chunk = tmp_path / "s.zarr" / "weights" / "c.1.3"
    raw = bytearray(chunk.read_bytes())
    raw[100] ^= 4
    chunk.write_bytes(bytes(raw))
    done = run_cli("verify", tmp_path / "s.zarr", "-q")
    assert done.code == 1
    assert "c.1.3" in done.out and "step 3" in done.out and "rows 1024..2047" in done.out
    found = run_cli("verify", tmp_path / "s.zarr", "--json").json
    assert found["ok"] is False and "error" not in found
    (damage,) = found["damaged"]
    assert damage["step"] == 3 and damage["rows"] == [1024, 2047] and damage["tensors"] == "W"


def test_warnings_are_lines_and_entries(tmp_path: Path) -> None:
    Trajectory.from_array(np.ones((50, 4), np.float32), out=tmp_path / "still.zarr")
    done = run_cli("fit", tmp_path / "still.zarr", "-o", tmp_path / "r", "--json")
    assert done.code == 0
    assert any("none of the 50 sampled rows moves" in text for text in done.json["warnings"])
    assert "warning: " in done.err


def test_the_module_is_the_command() -> None:
    done = run_child("doctor", "--json")
    assert done.code == 0 and done.json["implementations"]["assign_and_fit"]["cpu"]["chosen"]
