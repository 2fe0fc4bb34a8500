"""How commands end: what lands on which stream, what stays on disk, what a script can rely on."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import safetensors.torch
import torch

from cmdgpu import ops
from cmdgpu.cli import outcome
from cmdgpu.cli.bar import LineProgress, counting
from cmdgpu.decomposition import CMD
from cmdgpu.errors import CmdgpuError
from cmdgpu.progress import Silent
from cmdgpu.results import partials_of, progress_of
from cmdgpu.store.parameter_map import ParameterMap, whole
from cmdgpu.trajectory import Trajectory
from tests.faults.disk import Disk
from tests.harness import Ended, end_of, planted, run_cli, start_child, walks, write_store
from tests.verbs import flip_bit, leftovers, tree_bytes

N, ROWS, T = 4 * 256 + 40, 256, 6
FIT = ("--modes", "3", "--samples", "60")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """s.zarr and its fit out.zarr."""
    folder = tmp_path_factory.mktemp("outcomes")
    write_store(folder / "s.zarr", planted(N, T, noise=0.2))
    assert run_cli("fit", folder / "s.zarr", "-o", folder / "out.zarr", *FIT, "-q").code == 0
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to break, and the working directory."""
    copy = Path(shutil.copytree(pristine, tmp_path / "copy"))
    monkeypatch.chdir(copy)
    return copy


@pytest.fixture
def unit_by_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cmdgpu.streaming.plan.TARGET_BLOCK_BYTES", 1)


def one_error(ended: Ended, code: int = 1) -> str:
    """The one line of a command that failed."""
    assert (ended.code, ended.out) == (code, ""), ended
    (line,) = ended.err.splitlines()
    assert line.startswith("error: ")
    return line


# ---- streams ------------------------------------------------------------------------------------------


def test_results_go_to_stdout_and_everything_else_to_stderr(folder: Path) -> None:
    W = planted(N, 2)
    write_store(folder / "two.zarr", W)
    ended = run_cli("fit", "two.zarr", "-o", "two.cmd.zarr", *FIT)
    assert ended.code == 0
    assert [line.partition(":")[0] for line in ended.err.splitlines()][:2] == ["warning", "warning"]
    assert "with 2 snapshots every moving row has |corr| = 1" in ended.err
    assert re.search(r"^fit  100 %  \S+ \S+ of \S+ \S+  \S+ GB/s  0 s left$", ended.err, re.MULTILINE)
    assert "warning" not in ended.out and "100 %  " not in ended.out
    assert ended.out.startswith("source  two.zarr") and "wrote two.cmd.zarr" in ended.out


def test_quiet_is_silent_but_for_the_result(folder: Path) -> None:
    write_store(folder / "two.zarr", planted(N, 2))
    ended = run_cli("fit", "two.zarr", "-o", "two.cmd.zarr", *FIT, "--quiet")
    assert (ended.code, ended.err) == (0, "") and "1 modes" in ended.out
    assert run_cli("fit", "two.zarr", "-o", "again.zarr", *FIT, "-q", "--json").json["warnings"] != []


def test_json_is_all_of_stdout_and_has_no_number_that_json_lacks(folder: Path) -> None:
    write_store(folder / "still.zarr", np.ones((N, 4), np.float32))
    ended = run_cli("fit", "still.zarr", "-o", "still.cmd.zarr", *FIT, "--json")
    found = ended.json
    assert (found["n_modes"], found["mode_sizes"], found["r2"], found["mean_abs_correlation"]) == (
        0,
        [],
        None,
        None,
    )
    assert found["n_constant"] == N and found["ok"] is True
    assert isinstance(found["elapsed_s"], float) and isinstance(found["bytes_read"], int)
    assert run_cli("inspect", "still.cmd.zarr", "--json").json["r2"] is None


def test_a_log_gets_a_line_per_tenth_and_not_more_often_than_once_a_second(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("cmdgpu.cli.bar.time.perf_counter", lambda: clock[0])
    slow = LineProgress()
    slow.begin("fit", 1000)
    for _ in range(1000):
        clock[0] += 0.2
        slow.advance(1)
    slow.end()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == [str(tenth) for tenth in range(10, 101, 10)]
    assert lines[4].split("  ")[-1] == "100 s left"
    quick = LineProgress()
    quick.begin("fit", 1000)
    for _ in range(1000):
        quick.advance(1)
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["100"]


def test_work_that_counts_things_is_told_in_things(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("cmdgpu.cli.bar.time.perf_counter", lambda: clock[0])
    points = counting(LineProgress(), "points")
    points.begin("landscape", 20)
    for _ in range(20):
        clock[0] += 0.5
        points.advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "landscape   10 %  2 of 20 points  2 points/s  9 s left" and len(lines) == 10
    silent = Silent()
    assert counting(silent, "points") is silent


@pytest.mark.parametrize(
    ("bar", "shown"),
    [
        ("terminal_progress()", r"1\.0/1\.0 kB"),
        ("counting(terminal_progress(), 'points')", r"1000/1000\S* points  \S+ points/s"),
    ],
)
def test_a_terminal_gets_a_bar_on_stderr(bar: str, shown: str) -> None:
    script = f"""
import time
from cmdgpu.cli.bar import counting, terminal_progress
bar = {bar}
bar.begin("fit", 1000)
for _ in range(10):
    bar.advance(100)
    time.sleep(0.03)
bar.end()
bar.end()
"""
    terminal, its_end = os.openpty()
    child = start_child("-c", script, stderr=its_end)
    os.close(its_end)
    ended = end_of(child)
    drawn = ""
    with contextlib.suppress(OSError):  # the other end is closed: all was read
        while part := os.read(terminal, 1 << 16):
            drawn += part.decode()
    os.close(terminal)
    assert (ended.code, ended.out) == (0, "")
    assert "fit" in drawn and "━" in drawn and re.search(shown, drawn)


# ---- errors -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unit_by_unit")
def test_damage_met_by_a_fit_is_named_and_the_units_before_it_stay(folder: Path) -> None:
    flip_bit(folder / "s.zarr" / "weights" / "c.3.4", 55)
    line = one_error(run_cli("fit", "s.zarr", "-o", "new.zarr", *FIT, "-q"))
    assert re.fullmatch(
        r"error: s\.zarr/weights/c\.3\.4: tensor 'W' at step 4: rows 768\.\.1023 of weights: "
        r"crc32c mismatch; `cmdgpu verify` lists all damage; .*",
        line,
    )
    found = run_cli("fit", "s.zarr", "-o", "new.zarr", *FIT, "-q", "--json").json
    assert found["error"] == {
        "kind": "StoreCorrupt",
        "message": "rows 768..1023 of weights: crc32c mismatch",
        "file": "s.zarr/weights/c.3.4",
        "tensor": "W",
        "step": 4,
        "hint": found["error"]["hint"],
    }
    assert not (folder / "new.zarr").exists()
    flip_bit(folder / "s.zarr" / "weights" / "c.3.4", 55)
    assert run_cli("fit", "s.zarr", "-o", "new.zarr", *FIT, "-q", "--json").json["units_resumed"] == 3


def test_damage_of_a_result_ends_verify_with_one_and_no_error(folder: Path) -> None:
    assert run_cli("verify", "out.zarr", "-q").out.startswith("sound: 35 chunks, ")
    flip_bit(folder / "out.zarr" / "b" / "c.2", 9)
    (folder / "out.zarr" / "mode" / "c.4").unlink()
    ended = run_cli("verify", "out.zarr", "-q")
    assert (ended.code, ended.err) == (1, "")
    lines = ended.out.splitlines()
    assert lines[0] == "damaged  out.zarr/b/c.2  rows 512..767  W  crc32c mismatch"
    assert lines[1] == f"damaged  out.zarr/mode/c.4  rows 1024..{N - 1}  W  is missing"
    assert lines[2].startswith("2 damaged; checked 35 chunks")
    found = run_cli("verify", "out.zarr", "-q", "--json")
    assert found.code == 1 and found.json["ok"] is False and "error" not in found.json
    assert [d["array"] for d in found.json["damaged"]] == ["b", "mode"]
    assert set(found.json["damaged"][0]) == {"file", "array", "step", "rows", "tensors", "problem"}
    line = one_error(run_cli("export", "out.zarr", "-o", "x.pt", "-q"))
    assert "out.zarr/mode/c.4" in line and "is missing" in line
    assert leftovers(folder) == [] and not (folder / "x.pt").exists()


@pytest.mark.usefixtures("unit_by_unit")
def test_a_full_disk_is_named_and_the_same_command_goes_on(folder: Path) -> None:
    disk = Disk(450, "disk")
    with disk.in_place():
        line = one_error(run_cli("fit", "s.zarr", "-o", "new.zarr", *FIT, "-q"))
    assert "new.zarr." in line and line.endswith("then run the same command again")
    assert not (folder / "new.zarr").exists()
    assert run_cli("fit", "s.zarr", "-o", "new.zarr", *FIT, "-q").code == 0
    assert tree_bytes(folder / "new.zarr") == tree_bytes(folder / "out.zarr")


@pytest.mark.usefixtures("unit_by_unit")
def test_an_unfinished_fit_is_said_by_every_command_that_is_given_its_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip_bit(folder / "s.zarr" / "weights" / "c.2.0", 1)
    assert run_cli("fit", "s.zarr", "-o", "new.zarr", *FIT, "-q").code == 1
    (partial,) = partials_of(folder / "new.zarr")
    for command in (["inspect"], ["verify"], ["export", "-o", "x.pt"]):
        line = one_error(run_cli(command[0], "new.zarr", *command[1:], "-q"))
        assert line == (
            "error: new.zarr: this fit is not finished: 2 of 5 units done; "
            "run the same `cmdgpu fit` again, it goes on where it stopped"
        )
    said = run_cli("inspect", partial, "--json").json
    assert (said["status"], said["units_done"], said["units_total"], said["r2"]) == ("incomplete", 2, 5, None)
    assert "incomplete: 2 of 5 units" in run_cli("inspect", partial).out
    flip_bit(folder / "s.zarr" / "weights" / "c.2.0", 1)
    line = one_error(run_cli("fit", "s.zarr", "-o", "new.zarr", "--modes", "2", "--samples", "60", "-q"))
    assert "an unfinished fit with other settings is here (config n_modes: 3 there, 2 asked)" in line
    assert line.endswith("or start over with --no-resume")
    ended = run_cli(
        "fit", "s.zarr", "-o", "new.zarr", "--modes", "2", "--samples", "60", "--no-resume", "--json"
    )
    assert ended.json["units_resumed"] == 0 and ended.json["n_modes"] == 2


def test_nan_weights_are_counted_and_warned_of_and_no_failure(folder: Path) -> None:
    W = planted(N, T)
    W[3, 2] = np.nan
    write_store(folder / "nan.zarr", W)
    ended = run_cli("fit", "nan.zarr", "-o", "nan.cmd.zarr", *FIT, "--json")
    assert ended.code == 0 and ended.json["n_nonfinite"] == 1
    ended = run_cli("export", "nan.cmd.zarr", "-o", "x.pt", "--json")
    assert ended.code == 0 and ended.json["warnings"] == ["non-finite rows are NaN in W"]
    assert "warning: non-finite rows are NaN in W" in ended.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_an_absent_device_is_a_failure_and_no_wrong_command_line(folder: Path) -> None:
    before = tree_bytes(folder)
    line = one_error(run_cli("fit", "s.zarr", "-o", "new.zarr", *FIT, "--device", "cuda:1", "-q"))
    assert line == "error: asked for cuda:1, found 0 CUDA devices; use --device cpu"
    assert tree_bytes(folder) == before


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (MemoryError(), 1, "error: out of memory; give a smaller --memory-limit"),
        (PermissionError(13, "Permission denied", "s.zarr/a"), 1, "error: s.zarr/a: Permission denied"),
        (KeyboardInterrupt(), 1, "error: interrupted; the same command goes on where it stopped"),
        (CmdgpuError("odd", file="f", tensor="t\x1b[2J", step=3, hint="h"), 1,
         "error: f: tensor 't\\x1b[2J' at step 3: odd; h"),
    ],
)  # fmt: skip
def test_whatever_ends_a_command_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int, said: str
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise raised

    monkeypatch.setattr(CMD, "fit", fail)
    assert one_error(run_cli("fit", "s.zarr", "-o", "x", "-q"), code) == said
    found = run_cli("fit", "s.zarr", "-o", "x", "-q", "--json")
    assert found.code == code and found.json["ok"] is False and found.json["error"]["message"] in said


def test_a_fault_of_ours_is_never_dressed_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(CMD, "fit", fail)
    with pytest.raises(ZeroDivisionError):
        run_cli("fit", "s.zarr", "-o", "x", "-q")


def test_a_wrong_command_line_is_a_json_object_too(folder: Path) -> None:
    for arguments in (
        ["fit", "--json"],
        ["fit", "s.zarr", "-o", "x", "--bogus", "--json"],
        ["nothing", "--json"],
    ):
        ended = run_cli(*arguments)
        found = ended.json
        assert ended.code == 2 and found["ok"] is False and found["schema"] == 1
        assert found["error"]["message"] in ended.err
        assert set(found) == {"schema", "command", "ok", "version", "elapsed_s", "warnings", "error"}
    assert sorted(p.name for p in folder.iterdir()) == ["out.zarr", "s.zarr"]


# ---- ended from outside -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_fit_ends_in_words_and_the_same_command_goes_on(tmp_path: Path, number: int) -> None:
    store, out = tmp_path / "s.zarr", tmp_path / "out.zarr"
    write_store(store, walks(600 * 256, 4), rows=256)
    arguments = ("fit", store, "-o", out, *FIT, "-q", "--memory-limit", "70MiB")
    child = start_child("-m", "cmdgpu", *arguments)
    deadline = time.monotonic() + 60
    while child.poll() is None and time.monotonic() < deadline:
        if any(progress_of(partial)[0] >= 5 for partial in partials_of(out)):
            child.send_signal(number)
            break
        time.sleep(0.002)
    ended = end_of(child)
    line = one_error(ended)
    assert line == "error: interrupted; the same command goes on where it stopped"
    (partial,) = partials_of(out)
    assert 5 <= progress_of(partial)[0] < 600 and leftovers(partial) == []
    again = run_cli(*arguments, "--json")
    assert again.code == 0 and again.json["units_resumed"] >= 5


# ---- what a person reads ----------------------------------------------------------------------------------


def test_inspect_says_what_a_trajectory_holds(folder: Path) -> None:
    layout = ParameterMap(
        whole(
            [("w\x1b[31m", "parameter", "float32", (300,)), ("bn.running_mean", "buffer", "float16", (5, 20))]
        ),
        aliases={"tied": "w\x1b[31m"},
        skipped=(("bn.count", "int64 has no rows"),),
    )
    write_store(folder / "x.zarr", planted(400, 3), layout=layout, dtype="bfloat16", steps=[5, 7, 90])
    ended = run_cli("inspect", "x.zarr", "--tensors")
    assert ended.code == 0 and "\x1b" not in ended.out, "a terminal acts on a name"
    parts = [
        "400 rows x 3 snapshots, bfloat16",
        "steps 5..90",
        "300 parameters, 100 buffer elements, 1 tied",
        "chunks of 256 rows, 300 candidates",
        "scalars: none",
        "skipped bn.count: int64 has no rows",
        "w\\x1b[31m",
        "buffer     float16    [5, 20]",
        "tied is w\\x1b[31m",
    ]
    for part in parts:
        assert part in ended.out, part
    said = run_cli("inspect", "x.zarr", "--tensors", "--json").json
    assert said["shape"] == [400, 3] and said["steps"] == {"count": 3, "first": 5, "last": 90}
    assert (said["dtype"], said["chunks"], said["unit"]) == ("bfloat16", [256, 1], "step")
    assert (said["n_parameters"], said["n_buffers"], said["n_holes"], said["sketch_rows"]) == (
        300,
        100,
        0,
        300,
    )
    assert said["tensors"][0] == {
        "name": "w\x1b[31m",
        "kind": "parameter",
        "dtype": "float32",
        "shape": [300],
    }
    assert said["aliases"] == {"tied": "w\x1b[31m"}
    assert said["skipped"] == [{"name": "bn.count", "reason": "int64 has no rows"}]


def test_inspect_says_what_a_result_holds(folder: Path) -> None:
    cmd = CMD.load(folder / "out.zarr")
    ended = run_cli("inspect", "out.zarr")
    assert f"complete: 5 of 5 units, {N} rows x {T} snapshots, 3 modes" in ended.out
    assert f"mode sizes {cmd.metrics_['mode_sizes']}" in ended.out
    said = run_cli("inspect", "out.zarr", "--json").json
    assert said["mode_sizes"] == cmd.metrics_["mode_sizes"] and said["r2"] == cmd.metrics_["r2"]
    assert said["config"]["n_samples"] == 60 and "steps" not in said["source"]
    assert said["quality"] == cmd.quality().to_dict()
    assert cmd.quality().words.splitlines()[0] in ended.out
    assert "tensors" not in said


def test_what_a_fit_says_is_what_the_result_says(folder: Path) -> None:
    said = run_cli("fit", "s.zarr", "-o", "new.zarr", *FIT, "--json", "-q").json
    metrics = json.loads(json.dumps(outcome.strict(CMD.load(folder / "new.zarr").metrics_)))
    assert {key: said[key] for key in metrics} == metrics
    assert said["quality"] == CMD.load(folder / "new.zarr").quality().to_dict()
    assert said["out"] == "new.zarr" and said["bytes_read"] == 5 * ROWS * T * 4
    assert set(said["stage_s"]) == {"sample", "cluster", "pass", "finish"}
    assert 0 < said["peak_rss_bytes"] < 1 << 30 and said["peak_device_bytes"] >= 0


@pytest.mark.parametrize(
    ("options", "select"),
    [
        (["--start", "1", "--stop", "5"], {"start": 1, "stop": 5}),
        (["--stride", "2"], {"stride": 2}),
        (["--steps", "0,2,3,5"], {"steps": [0, 2, 3, 5]}),
        (["--seed", "4", "--sampling", "uniform", "--affinity", "corr-profile"], {}),
        (["--threshold", "0.5"], {}),
    ],
)
def test_options_mean_what_the_api_means(folder: Path, options: list[str], select: dict[str, Any]) -> None:
    modes = [] if "--threshold" in options else ["--modes", "3"]
    ended = run_cli("fit", "s.zarr", "-o", "new.zarr", "--samples", "60", *modes, *options, "-q")
    assert ended.code == 0, ended.err
    settings: dict[str, Any] = {"n_modes": 3}
    if "--seed" in options:
        settings |= {"random_state": 4, "sampling": "uniform", "affinity": "corr-profile"}
    if "--threshold" in options:
        settings = {"threshold": 0.5}
    source = Trajectory.open("s.zarr").sel(**select)
    again = CMD(n_samples=60, **settings).fit(source, out="new.zarr")
    assert again.metrics_["bytes_read"] == 0, "another fit than the one asked for"
    assert again.steps_.tolist() == source.steps.tolist()


def test_exports_keep_every_tensor_in_its_own_type(folder: Path) -> None:
    names = [("full", "float32"), ("half", "float16"), ("low", "bfloat16"), ("wide", "float64")]
    layout = ParameterMap(whole([(name, "parameter", dtype, (100,)) for name, dtype in names]))
    write_store(folder / "x.zarr", planted(400, 5), layout=layout)
    assert run_cli("fit", "x.zarr", "-o", "x.cmd.zarr", *FIT, "-q").code == 0
    for source in ("x.zarr", "x.cmd.zarr"):
        for kind in ("safetensors", "pt"):
            ended = run_cli("export", source, "-o", "x.bin", "--format", kind, "--step", "2", "--json")
            assert (ended.json["format"], ended.json["n_tensors"], ended.json["step"]) == (kind, 4, 2)
            assert ended.json["bytes"] == Path("x.bin").stat().st_size and ended.json["left_out"] == []
            assert dtypes_of(folder / "x.bin", kind) == dict(names), (source, kind)


def dtypes_of(path: Path, kind: str) -> dict[str, str]:
    load = cast(Any, safetensors.torch).load_file if kind == "safetensors" else cast(Any, torch).load
    return {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in load(path).items()}


# ---- doctor and demo ----------------------------------------------------------------------------------


def test_doctor_names_every_kernel_with_its_reasons() -> None:
    ended = run_cli("doctor")
    assert ended.code == 0 and ended.out.splitlines()[-1] == "no problems"
    chosen, refused = ops.choose("float32", 16, 2, torch.device("cpu"))
    assert f"  assign_and_fit: {chosen}\n" in ended.out
    assert all(f"    not {name}: " in ended.out for name in refused)
    said = run_cli("doctor", "--json").json
    assert said["problems"] == [] and said["cpu_count"] == os.cpu_count()
    assert said["devices"][0]["name"] == "cpu" and said["devices"][0]["memory_bytes"] > 1 << 28
    assert said["torch"] is not None and said["zarr"] is not None


def test_doctor_finds_a_kernel_that_computes_nonsense(monkeypatch: pytest.MonkeyPatch) -> None:
    from cmdgpu import ops

    inner = ops.assign_and_fit

    def wrong(*args: Any, **options: Any) -> Any:
        fit = inner(*args, **options)
        fit.a.mul_(1.01)
        return fit

    monkeypatch.setattr(ops, "assign_and_fit", wrong)
    ended = run_cli("doctor")
    assert ended.code == 1 and ended.err == ""
    assert ended.out.splitlines()[-1].startswith("problem  assign_and_fit on cpu: a, b = ")
    found = run_cli("doctor", "--json")
    assert found.code == 1 and found.json["ok"] is False and len(found.json["problems"]) == 1


def test_demo_refuses_what_it_cannot_do_before_it_does_anything(folder: Path) -> None:
    for arguments, code, said in (
        (["--epochs", "1"], 2, "1 is not in the range x>=2"),
        (["--device", "abacus"], 2, "no device named 'abacus'"),
        (["--seed", "-1"], 2, "seed is -1"),
    ):
        line = one_error(run_cli("demo", "new", *arguments, "-q"), code)
        assert said in line
    (folder / "mine").mkdir()
    (folder / "mine" / "precious").write_text("precious")
    before = tree_bytes(folder)
    one_error(run_cli("demo", "mine", "--epochs", "3", "-q"), 1)
    assert tree_bytes(folder) == before and not (folder / "new").exists()


def test_demo_hands_its_options_on_and_prints_the_report(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    class Report:
        def to_json(self) -> dict[str, Any]:
            return {"fit": {"1": {"r2": float("nan")}}}

        def table(self) -> str:
            return "the table"

    def run_demo(directory: Path, **options: Any) -> Report:
        asked.append((directory, {key: options[key] for key in ("seed", "epochs", "device")}))
        return Report()

    monkeypatch.setattr("cmdgpu.demo.run_demo", run_demo)
    assert run_cli("demo").out == "the table\n"
    ended = run_cli("demo", "here", "--seed", "4", "--epochs", "9", "--device", "cpu", "--json")
    assert ended.json["fit"] == {"1": {"r2": None}}
    assert asked == [
        (Path("cmdgpu-demo"), {"seed": 0, "epochs": 60, "device": "cpu"}),
        (Path("here"), {"seed": 4, "epochs": 9, "device": "cpu"}),
    ]
