"""``cmdgpu compare``: the code of the user is found, run and blamed; what is written is what was found."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
import torch

from cmdgpu.comparison import compare
from cmdgpu.demo import MARKER, run_demo
from cmdgpu.recording import Recorder
from cmdgpu.trajectory import Trajectory
from tests.harness import run_cli

TASK = """
import torch

calls = []

def network():
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))

def batches():
    return [torch.randn(8, 3, generator=torch.Generator().manual_seed(s)) for s in range(2)]

def evaluate(model):
    assert not model.training
    return {"first": model[0].weight[0, 0], "mean": model[1].running_mean[0], "less": -model[0].bias[1]}

def broken(model):
    calls.append(1)
    if len(calls) > 2:
        raise RuntimeError("no images")
    return {"accuracy": 0.5}

def silent(model):
    pass

def no_network():
    return [1, 2]

def failing():
    raise OSError("no file")

number = 3
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("compare")
    (here / "compare_task.py").write_text(TASK)
    (here / "compare_lost.py").write_text("import there_is_no_such_module\n")
    (here / "compare_wrong.py").write_text("x = 1 / 0\n")
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    generator = torch.Generator().manual_seed(0)
    with Recorder(here / "run.zarr", unit="epoch") as recorder, torch.no_grad():
        for epoch in range(6):
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
            recorder.record(model, epoch)
    fitted = run_cli("fit", here / "run.zarr", "-o", here / "run.cmd.zarr", "--modes", "2", "-q")
    assert fitted.code == 0, fitted.err
    return here


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder with the user's module is the current one, and nothing of it is left behind."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in ("compare_task", "compare_lost", "compare_wrong"):
        monkeypatch.delitem(sys.modules, name, raising=False)


TASKS = ("--evaluate", "compare_task:evaluate", "--model", "compare_task:network")


def test_the_recorded_snapshots_and_a_cmd_are_always_there() -> None:
    def labels(*arguments: str) -> list[str]:
        found = run_cli("compare", *arguments, "--step", "last", "--json", "-q")
        assert found.code == 0, found.err
        return [row["label"] for row in found.json["methods"]]

    assert labels("run.zarr") == ["recorded", "cmd:modes=10"]
    assert labels("run.cmd.zarr") == ["recorded", "cmd:modes=2"]
    assert labels("run.zarr", "--modes", "1,3", "--methods", "ema") == [
        *("recorded", "cmd:modes=1", "cmd:modes=3", "ema:decay=0.9")
    ]
    assert labels("run.zarr", "--baselines", "dmd:rank=2,groups=layer,gd", "--methods", "cmd:seed=1") == [
        *("dmd:rank=2,groups=layer", "recorded", "cmd:modes=10,seed=1")
    ]


def test_scores_are_those_of_the_python_function_and_statistics_are_treated_alike(tmp_path: Path) -> None:
    written = tmp_path / "c.csv", tmp_path / "c.png"
    found = run_cli(
        *("compare", "run.zarr", "--methods", "ema:decay=0.5,swa", "--modes", "2", *TASKS),
        *("--loader", "compare_task:batches", "--select", "first,min:less", "--steps", "1,every=2"),
        *("--csv", written[0], "--figure", written[1], "--json", "-q"),
    )
    assert found.code == 0, found.err
    said = found.json
    sys.path.insert(0, str(Path.cwd()))
    import compare_task as task  # pyright: ignore[reportMissingImports]

    expected = compare(
        Trajectory.open("run.zarr"),
        ["recorded", "cmd:modes=2", "ema:decay=0.5", "swa"],
        task.evaluate,  # pyright: ignore[reportUnknownArgumentType, reportUnknownMemberType]
        model=task.network,  # pyright: ignore[reportUnknownArgumentType, reportUnknownMemberType]
        loader=task.batches(),  # pyright: ignore[reportUnknownArgumentType, reportUnknownMemberType]
        steps=[1, 3, 5],
        select=["first", "min:less"],
    )
    assert said["batch_norm"] == ["kept", "reestimated"] and said["steps"] == [1, 3, 5]
    for name in ("methods", "last", "selected"):
        mine, theirs = said[name], json.loads(json.dumps(expected.to_json()[name]))
        for row in (*mine, *theirs):
            del row["fit_s"], row["rebuild_s"]
        assert mine == theirs
    with written[0].open(newline="") as file:
        assert [row["label"] for row in csv.DictReader(file)] == [row["label"] for row in said["methods"]]
    assert written[1].read_bytes().startswith(b"\x89PNG")
    assert said["csv"] == str(written[0]) and said["figure"] == str(written[1])


def test_without_an_evaluation_weights_alone_are_compared() -> None:
    found = run_cli("compare", "run.zarr", "--methods", "swa")
    assert found.code == 0
    assert found.out.startswith("run.zarr  24 parameters x 6 snapshots, 6 of them compared\n")
    assert "weight MSE" in found.out and "BatchNorm" not in found.out
    assert "weight errors  100 %" in found.err and "comparing" not in found.err


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["nowhere"], 2, "nowhere: there is nothing here"),
        (["run.zarr", "--methods", "ica"], 2, "no method named 'ica'; have: cmd, dmd"),
        (["run.zarr", "--methods", "ema:rate=2"], 2, "ema has no setting 'rate'; have: decay, unit"),
        (["run.zarr", "--methods", "swa,swa"], 2, "swa is there twice"),
        (["run.zarr", "--methods", "pca:components=9"], 2, "rank 5 is the most they can have"),
        (["run.zarr", "--modes", "many"], 2, "--modes 'many' is no list of numbers"),
        (["run.zarr", "--step", "9"], 1, "step 9: is not among the snapshots; nearest: 3, 4, 5"),
        (["run.zarr", "--step", "later"], 2, "'later' is no step"),
        (["run.zarr", "--memory-limit", "1MiB"], 1, "the memory limit is 1.05 MB"),
        (["run.zarr", "--select", "first"], 2, "select is given, and nothing that evaluates"),
        (["run.zarr", "--evaluate", "compare_task:evaluate"], 2, "there is no model to evaluate"),
        (["run.zarr", "--evaluate", "evaluate"], 2, "--evaluate 'evaluate' is no MODULE:FUNCTION"),
        (
            ["run.zarr", "--evaluate", "there_is_none:f"],
            2,
            "--evaluate: there is no module 'there_is_none'; it is",
        ),
        (
            ["run.zarr", "--evaluate", "compare_lost:f"],
            1,
            "importing compare_lost raised ModuleNotFoundError (No mod",
        ),
        (
            ["run.zarr", "--evaluate", "compare_wrong:f"],
            1,
            "importing compare_wrong raised ZeroDivisionError (div",
        ),
        (["run.zarr", "--evaluate", "compare_task:judge"], 2, "compare_task has no function 'judge'"),
        (
            ["run.zarr", "--evaluate", "compare_task:number"],
            2,
            "has something else than a function as 'number'",
        ),
        (
            ["run.zarr", *TASKS[:2], "--model", "compare_task:no_network"],
            2,
            "the model is a list, not a torch",
        ),
        (
            ["run.zarr", *TASKS[:2], "--model", "compare_task:failing"],
            1,
            "--model: failing raised OSError (no file)",
        ),
        (
            ["run.zarr", *TASKS, "--loader", "compare_task:failing"],
            1,
            "--loader: failing raised OSError (no file)",
        ),
        (["run.zarr", *TASKS, "--batch-norm", "both"], 2, "there is no loader"),
        (
            ["run.zarr", *TASKS, "--select", "accuracy"],
            1,
            "no score 'accuracy' to select by; have: first, mean",
        ),
        (
            ["run.zarr", "--evaluate", "compare_task:broken", *TASKS[2:], "--methods", "swa"],
            1,
            "broken raised RuntimeError (no images) for recorded at step 2",
        ),
        (
            ["run.zarr", "--evaluate", "compare_task:silent", *TASKS[2:]],
            1,
            "silent answered None for recorded at step 0; it must answer named numbers",
        ),
        (["run.zarr", "--evaluate", "demo"], 2, "run.zarr: is nothing that `cmdgpu demo` made"),
        (["run.zarr", "--evaluate", "demo", *TASKS[2:]], 2, "the demo brings its own network"),
    ],
)
def test_bad_input_gets_one_line_and_its_code(arguments: list[str], code: int, says: str) -> None:
    ended = run_cli("compare", *arguments, "-q")
    assert (ended.code, ended.out) == (code, ""), ended
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1 and says in ended.err
    sys.modules.pop("compare_task", None)
    found = run_cli("compare", *arguments, "-q", "--json").json
    assert found["ok"] is False and found["error"]["message"] in ended.err


def test_the_demo_is_compared_by_its_own_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cmdgpu.demo.MODES", (2,))
    report = run_demo(tmp_path / "demo", epochs=2)
    for name in ("demo", "demo/run.zarr", "demo/modes-2.cmd.zarr"):
        found = run_cli("compare", tmp_path / name, "--evaluate", "demo", "--modes", "2", "--json", "-q")
        assert found.code == 0, found.err
        said, scores = found.json, (report.training, report.fits[0].score)
        assert said["select"] == ["validation_accuracy", "min:validation_loss"]
        assert [row["label"] for row in said["last"]] == ["recorded", "cmd:modes=2"]
        for last, selected, score in zip(said["last"], said["selected"], scores, strict=True):
            assert last["scores"]["test_accuracy"] == score.last_test
            assert selected["step"] == score.selected_epoch
            assert selected["scores"]["test_accuracy"] == score.selected_test
    (tmp_path / "demo" / MARKER).write_text('{"kind": "cmdgpu demo"}')
    ended = run_cli("compare", tmp_path / "demo", "--evaluate", "demo", "-q")
    assert ended.code == 2 and "this demo was not finished" in ended.err
