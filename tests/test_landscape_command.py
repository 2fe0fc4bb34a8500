"""``cmdgpu landscape``: the numbers of the function, one JSON object, resumed after a kill, clear lines."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path

import pytest
import torch

from cmdgpu.decomposition import CMD
from cmdgpu.demo import run_demo
from cmdgpu.mode_space import Landscape, landscape
from cmdgpu.recording import Recorder
from cmdgpu.trajectory import Trajectory
from tests.harness import run_child, run_cli

TASK = """
import os, signal
from pathlib import Path
import torch

def network():
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))

def batches():
    return [torch.randn(8, 3, generator=torch.Generator().manual_seed(s)) for s in range(2)]

def evaluate(model):
    if (doom := Path("doom")).exists():
        doom.write_text(doom.read_text() + ".")
        if len(doom.read_text()) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
    return {"loss": model[0].weight.square().sum(), "mean": model[1].running_mean[0]}

def broken(model):
    raise RuntimeError("no images")
"""
TASKS = ("--evaluate", "landscape_task:evaluate", "--model", "landscape_task:network")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of ``run.zarr``, ``run.cmd.zarr`` and the user's module; nothing of it is left behind."""
    (tmp_path / "landscape_task.py").write_text(TASK)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    generator = torch.Generator().manual_seed(0)
    with Recorder(tmp_path / "run.zarr", unit="epoch") as recorder, torch.no_grad():
        for epoch in range(6):
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            recorder.record(model, epoch)
    CMD(2, device="cpu").fit(Trajectory.open(tmp_path / "run.zarr"), out=tmp_path / "run.cmd.zarr")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "landscape_task", raising=False)
    return tmp_path


@pytest.mark.usefixtures("here")
def test_it_says_and_writes_what_the_function_finds() -> None:
    asked = ("--modes", "1,0", "--span", "0.25", "--points", "3", "--step", "4", "--select", "min:loss")
    done = run_cli(
        *("landscape", "run.cmd.zarr", "-o", "a.json", *TASKS, *asked, "--loader", "landscape_task:batches"),
        *("--figure", "a.png", "--score", "mean", "--json", "-q"),
    )
    assert done.code == 0, done.err
    import landscape_task as task  # pyright: ignore[reportMissingImports]

    expected = landscape(
        CMD.load("run.cmd.zarr"), task.evaluate, task.network, loader=task.batches(),  # pyright: ignore[reportUnknownMemberType, reportUnknownArgumentType]
        modes=(1, 0), span=0.25, points=3, step=4, select="min:loss",
    ).to_json()  # fmt: skip
    said = done.json
    assert {key: said[key] for key in expected} == expected == Landscape.load("a.json").to_json()
    assert (said["out"], said["figure"], said["batch_norm"]) == ("a.json", "a.png", "reestimated")
    assert Path("a.png").stat().st_size > 5000
    text = run_cli("landscape", "run.cmd.zarr", "-o", "a.json", *TASKS, *asked, "--loader",
                   "landscape_task:batches")  # fmt: skip
    assert text.code == 0 and text.err == "", "all was there"
    for line in (
        r"modes 1 and 0 at step 4: references of \S+ and \S+, times 0.75 to 1.25, 3 x 3 points",
        r"trained  x 1.000 x 1.000   loss \d+\.\d{4}   mean -?\d+\.\d{4}",
        r"best     x \d\.\d{3} x \d\.\d{3}   loss \d+\.\d{4}",
        r"best by min:loss: its other scores were not searched for",
        r"loss  \d+\.\d{4} to \d+\.\d{4}",
        r"wrote a\.json",
    ):
        assert re.search(f"^{line}", text.out, re.MULTILINE), text.out


@pytest.mark.usefixtures("here")
def test_a_line_of_one_mode_tells_points_and_not_bytes() -> None:
    done = run_cli("landscape", "run.cmd.zarr", "-o", "a.json", *TASKS, "--modes", "1", "--points", "4")
    assert done.code == 0, done.err
    assert re.search(r"^landscape  100 %  5 of 5 points  \S+ points/s  0 s left$", done.err, re.MULTILINE)
    assert "warning: BatchNorm keeps the statistics" in done.err
    assert "mode 1 at step 5: references of" in done.out and json.loads(Path("a.json").read_text())["y"] == [
        1
    ]


@pytest.mark.usefixtures("here")
def test_the_same_command_goes_on_after_a_kill() -> None:
    command = ("landscape", "run.cmd.zarr", *TASKS, "--points", "3", "--batch-norm", "kept", "-q")
    Path("doom").write_text("")
    assert run_child(*command, "-o", "a.json").code == -signal.SIGKILL
    assert len(Path("a.json.partial").read_text().splitlines()) == 1 + 3 and not Path("a.json").exists()
    assert run_cli(*command, "-o", "a.json").code == 0
    assert len(Path("doom").read_text()) == 4 + 6
    Path("doom").unlink()
    assert run_cli(*command, "-o", "b.json").code == 0
    assert Path("a.json").read_bytes() == Path("b.json").read_bytes()
    refused = run_cli(*command, "-o", "a.json", "--span", "0.1")
    assert refused.code == 1 and refused.err == (
        "error: a.json: is a landscape of another span: 0.5 there, 0.1 asked; "
        "choose another path, or remove it to begin anew\n"
    )


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("run.zarr", *TASKS), 2, "run.zarr: is a trajectory, which has no modes; give a result of"),
        (("run.cmd.zarr", "--evaluate", "landscape_task:evaluate"), 2, "there is no model to evaluate; give"),
        (("run.cmd.zarr", *TASKS, "--modes", "0,7"), 2, "there is no mode 7; have: 0 to 1"),
        (("run.cmd.zarr", *TASKS, "--modes", "x"), 2, "--modes 'x' is no list of numbers"),
        (("run.cmd.zarr", *TASKS, "--points", "1"), 2, "1 points are no line"),
        (("run.cmd.zarr", *TASKS, "--step", "77"), 1, "step 77: was not recorded; nearest: 3, 4, 5"),
        (("run.cmd.zarr", *TASKS, "--score", "loss"), 2, "there is no --figure to draw it in"),
        (
            ("run.cmd.zarr", "--evaluate", "landscape_task:broken", "--model", "landscape_task:network",
             "--batch-norm", "kept"),
            1,
            "broken raised RuntimeError (no images) at 1 and 1 times the references of 0 and 1",
        ),
        (("run.cmd.zarr", "--evaluate", "demo"), 2, "is nothing that `cmdgpu demo` made"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(arguments: tuple[str, ...], code: int, says: str) -> None:
    done = run_cli("landscape", *arguments, "-o", "a.json", "-q")
    assert done.code == code and says in done.err and done.err.count("\n") == 1, done.err
    assert not Path("a.json").exists()


def test_a_figure_of_a_score_that_is_not_there_is_refused_and_the_points_stay(here: Path) -> None:
    command = (
        "landscape",
        "run.cmd.zarr",
        *TASKS,
        "--points",
        "2",
        "-o",
        "a.json",
        "-q",
        "--figure",
        "a.png",
    )
    done = run_cli(*command, "--score", "f1")
    assert done.code == 2 and "no score 'f1' in this landscape; have: loss, mean" in done.err
    assert (here / "a.json").exists() and run_cli(*command).code == 0


def test_the_demo_brings_its_own_function_and_is_selected_by_validation(tmp_path: Path) -> None:
    run_demo(tmp_path / "demo", epochs=2)
    result = tmp_path / "demo" / "modes-2.cmd.zarr"
    done = run_cli(
        "landscape", result, "--evaluate", "demo", "-o", tmp_path / "a.json", "--points", "2", "--json"
    )
    assert done.code == 0, done.err
    assert done.json["select"] == ["validation_accuracy", "min:validation_loss"]
    assert set(done.json["scores"]) == {"test_accuracy", "validation_accuracy", "validation_loss"}
    whole = run_cli("landscape", tmp_path / "demo", "--evaluate", "demo", "-o", tmp_path / "b.json")
    assert whole.code == 2 and "run.zarr: is a trajectory, which has no modes" in whole.err
