"""Laws of a landscape: every point's weights to the bit, points that last, honest selection, clear lines."""

# torch leaves the types of many methods open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import functools
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cmdgpu
from cmdgpu.decomposition import CMD
from cmdgpu.errors import (
    CmdgpuError,
    CmdgpuWarning,
    ModelMismatch,
    NotAStore,
    StepNotFound,
    StoreCorrupt,
    StoreExists,
    UsageError,
)
from cmdgpu.mode_space import Landscape, landscape
from cmdgpu.notation import F32
from cmdgpu.recording import Recorder
from cmdgpu.store.parameter_map import ParameterMap, Piece, TensorEntry
from cmdgpu.trajectory import Trajectory
from tests.harness import Ticks, end_of, planted, start_child, write_store

N, T, M = 400, 8, 3


class Vector(nn.Module):
    """The model of an array."""

    def __init__(self, n: int = N) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.zeros(n))


def fitted(W_nt: F32 | None = None, n_modes: int = M, **settings: Any) -> CMD:
    if W_nt is None and n_modes == M and not settings:
        return the_fit()
    given = planted(N, T, M) if W_nt is None else W_nt
    return CMD(n_modes, n_samples=100, device="cpu", **settings).fit(given)


@functools.cache
def the_fit() -> CMD:
    """Of most tests: nothing changes a fit."""
    return CMD(M, n_samples=100, device="cpu").fit(planted(N, T, M))


def summed(model: nn.Module) -> dict[str, float]:
    W = next(model.parameters()).detach().double().flatten()
    return {"loss": float((W**2).sum()), "accuracy": float(W[: len(W) // 2].sum())}


class Watched:
    """An evaluation that keeps the weights it was given, and fails at a call of one's choice."""

    def __init__(self, fails_at: int = -1, answer: Callable[[nn.Module], Any] = summed) -> None:
        self.weights: list[Tensor] = []
        self._fails_at, self._answer = fails_at, answer

    def __call__(self, model: nn.Module) -> Any:
        assert not model.training and not torch.is_grad_enabled()
        if len(self.weights) == self._fails_at:
            raise RuntimeError("no images")
        self.weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]).clone())
        return self._answer(model)


def defined(cmd: CMD, factors: dict[int, float], step: int = -1) -> F32:
    """(N,) weights: a (f r) + b in float64, rounded once; NaN for rows that are not finite."""
    references = cmd.references_.astype(np.float64)[:, step]
    for mode, factor in factors.items():
        references[mode] *= factor
    label, a, b = (np.asarray(array) for array in (cmd.labels_, cmd.a_, cmd.b_))
    w = np.where(label >= 0, a.astype(np.float64) * references[label], 0.0) + b
    return w.astype(np.float32)


# ---- numbers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("modes", "points"), [((0, 1), 3), ((2, 0), 4), ((1,), 5), ((1,), 2)])
def test_every_point_has_the_weights_and_the_scores_of_its_definition(
    modes: tuple[int, ...], points: int
) -> None:
    cmd, model, watched, ticks = fitted(), Vector(), Watched(), Ticks()
    found = landscape(cmd, watched, model, modes=modes, span=0.4, points=points, step=3, progress=ticks)
    factors = np.linspace(0.6, 1.4, points)
    assert np.allclose(found.x, factors, rtol=1e-15) and (points % 2 == 0 or found.x[points // 2] == 1.0)
    ys = found.x if len(modes) == 2 else np.ones(1)
    assert np.array_equal(found.y, ys)
    places = [(1.0, 1.0), *((x, y) for y in ys for x in found.x)]
    places = list(dict.fromkeys(places))  # the trained point first, and once
    assert len(watched.weights) == len(places) == ticks.total == ticks.done and ticks.ends == 1
    for at, weights in zip(places, watched.weights, strict=True):
        expected = defined(cmd, dict(zip(modes, at, strict=False)), step=3)
        assert np.array_equal(weights.numpy(), expected)
    for name in ("loss", "accuracy"):
        assert found.scores[name].shape == (len(ys), points)
        for row, y in enumerate(ys):
            for column, x in enumerate(found.x):
                vector = Vector()
                vector.W.data = torch.from_numpy(defined(cmd, dict(zip(modes, (x, y), strict=False)), 3))
                assert found.scores[name][row, column] == summed(vector)[name]
    assert found.trained == summed(model)
    assert found.reference == tuple(cmd.references_[list(modes), 3].tolist())
    assert (found.modes, found.step, found.batch_norm) == (modes, 3, "none")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_trained_point_has_the_bits_of_load_into_whatever_the_layout(tmp_path: Path, dtype: str) -> None:
    """Tensors in other memory orders, of other types, recorded in pieces, tied, and a single number."""
    layout = ParameterMap(
        (
            TensorEntry("conv", "parameter", dtype, (4, 3, 5, 5), (Piece((0, 0, 0, 0), (4, 3, 5, 5), 0),)),
            TensorEntry(
                "cut", "parameter", dtype, (6, 8),
                (Piece((0, 0), (6, 3), 300), Piece((0, 3), (2, 5), 318), Piece((2, 3), (4, 5), 328)),
            ),
            TensorEntry("one", "parameter", dtype, (), (Piece((), (), 348),)),
            TensorEntry("flat", "parameter", dtype, (N - 349,), (Piece((0,), (N - 349,), 349),)),
        ),
        aliases={"tied": "flat"},
    )  # fmt: skip
    W = planted(N, T, M)
    W[5], W[70, 2] = 0.5, np.nan
    traj = write_store(tmp_path / "s.zarr", W, layout=layout, dtype=dtype, rows=256)
    cmd = CMD(M, n_samples=100, device="cpu").fit(traj, out=tmp_path / "s.cmd.zarr")

    def network() -> nn.Module:
        model = nn.Module()
        conv = torch.zeros(4, 3, 5, 5).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        model.conv = nn.Parameter(conv)
        model.cut = nn.Parameter(torch.zeros(16, 12)[::2, ::2].T)
        model.one = nn.Parameter(torch.zeros(()))
        model.flat = model.tied = nn.Parameter(torch.zeros(N - 349, dtype=torch.float16))
        return model

    def bits(model: nn.Module) -> list[bytes]:
        return [p.detach().contiguous().numpy().tobytes() for p in model.parameters()]

    model, loaded, watched = network(), network(), Watched()
    with pytest.warns(CmdgpuWarning, match="non-finite rows are NaN in conv"):
        cmd.load_into(loaded, -1)
    with pytest.warns(CmdgpuWarning, match="non-finite rows are NaN in conv"):
        found = landscape(cmd, watched, model, modes=(0, 2), points=3)
    assert bits(model) == bits(loaded)
    # in the order of the parameters, which is the order of the elements whatever lies in memory
    whole = torch.cat([p.detach().flatten() for p in loaded.parameters()])
    assert torch.equal(watched.weights[0].nan_to_num(9.0), whole.nan_to_num(9.0))
    assert torch.isnan(whole).sum() == 1
    corner = watched.weights[found.grid.index((1.5, 0.5))]
    w = torch.from_numpy(defined(cmd, {0: 1.5, 2: 0.5})).to(getattr(torch, dtype))
    expected = network()
    cut = torch.cat([w[300:318].view(6, 3), torch.cat([w[318:328].view(2, 5), w[328:348].view(4, 5)])], 1)
    with torch.no_grad():
        for name, values in {"conv": w[:300], "cut": cut, "one": w[348], "flat": w[349:]}.items():
            target = expected.get_parameter(name)
            target.copy_(values.view(target.shape))
    assert not torch.equal(corner.nan_to_num(9.0), whole.nan_to_num(9.0))
    flat = torch.cat([p.detach().flatten() for p in expected.parameters()])
    assert torch.equal(corner.nan_to_num(9.0), flat.nan_to_num(9.0))


def test_what_evaluate_reads_last_is_the_trained_model_again_even_after_an_error() -> None:
    cmd, model, loaded = fitted(), Vector(), Vector()
    cmd.load_into(loaded, -1)
    with pytest.raises(CmdgpuError, match=r"no images"):
        landscape(cmd, Watched(fails_at=4), model, points=3)
    assert torch.equal(model.W, loaded.W)


def test_references_that_are_no_rows_and_steps_that_were_not_fitted(tmp_path: Path) -> None:
    traj = write_store(tmp_path / "s.zarr", planted(N, T, M), rows=256)
    cmd = CMD(M, n_samples=100, device="cpu", references="component", refine=1).fit(
        traj.sel(stop=6), out=tmp_path / "s.cmd.zarr"
    )
    watched = Watched()
    found = landscape(cmd, watched, Vector(), points=2, step=7)
    loaded = Vector()
    cmd.load_into(loaded, 7)
    assert torch.equal(watched.weights[0], loaded.W.detach()) and found.step == 7
    assert found.reference == tuple(cmd.references_at(7)[:2].tolist())
    with pytest.raises(StepNotFound, match="was not recorded"):
        cmd.references_at(99)


# ---- points last -----------------------------------------------------------------------------------------


def test_a_landscape_that_failed_goes_on_where_it_was(tmp_path: Path) -> None:
    cmd, whole, out = fitted(), tmp_path / "whole.json", tmp_path / "new" / "cut.json"
    landscape(cmd, Watched(), Vector(), points=4, out=whole)
    with pytest.raises(CmdgpuError, match=r"at 0.833333 and 0.5 times the references of 0 and 1"):
        landscape(cmd, Watched(fails_at=2), Vector(), points=4, out=out)
    assert not out.exists()
    with pytest.raises(NotAStore, match="is not finished; run `cmdgpu landscape` with the same settings"):
        Landscape.load(out)
    # what a kill leaves of a line is dropped
    lines = out.with_name("cut.json.partial")
    with lines.open("ab") as file:
        file.write(b'{"at": [0.5, 0.')
    rest, ticks = Watched(), Ticks()
    found = landscape(cmd, rest, Vector(), points=4, out=out, progress=ticks)
    assert len(rest.weights) == ticks.total == 15
    assert out.read_bytes() == whole.read_bytes() and not lines.exists()
    again = landscape(cmd, Watched(fails_at=0), Vector(), points=4, out=out)
    assert again.to_json() == found.to_json() == Landscape.load(out).to_json()


KILLED = """
import os, signal, sys
from tests.test_landscape import *
calls = []
def dies(model):
    calls.append(1)
    if len(calls) == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return summed(model)
dies.__module__, dies.__qualname__ = "here", "evaluate"
landscape(fitted(), dies, Vector(), points=3, out=sys.argv[1])
"""


def test_a_kill_loses_the_point_under_way_and_no_other(tmp_path: Path) -> None:
    ended = end_of(start_child("-c", KILLED, tmp_path / "a.json"))
    assert ended.code == -signal.SIGKILL, ended.err
    calls: list[int] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        calls.append(1)
        return summed(model)

    evaluate.__module__, evaluate.__qualname__ = "here", "evaluate"
    landscape(fitted(), evaluate, Vector(), points=3, out=tmp_path / "a.json")
    assert len(calls) == 9 - 5
    landscape(fitted(), evaluate, Vector(), points=3, out=tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"modes": (0, 2)}, r"a landscape of another modes: \[0, 1\] there, \[0, 2\] asked; choose another"),
        ({"span": 0.25}, r"another span: 0.5 there, 0.25 asked"),
        ({"points": 3}, r"another points: 2 there, 3 asked"),
        ({"step": 4}, r"another step: 7 there, 4 asked"),
        ({"evaluate": summed}, r"another evaluate: .*Watched there, .*summed asked"),
        ({"cmd": {"random_state": 1}}, r"another (result|reference)"),
    ],
)
def test_another_setting_is_refused_and_nothing_is_touched(
    tmp_path: Path, finished: bool, changed: dict[str, Any], says: str
) -> None:
    out = tmp_path / "a.json"
    asked: dict[str, Any] = {"modes": (0, 1), "points": 2, "out": out}
    if finished:
        landscape(fitted(), Watched(), Vector(), **asked)
    else:
        with pytest.raises(CmdgpuError, match="no images"):
            landscape(fitted(), Watched(fails_at=3), Vector(), **asked)
    (file,) = tmp_path.iterdir()
    before = file.read_bytes()
    changed = dict(changed)
    cmd, evaluate = fitted(**changed.pop("cmd", {})), changed.pop("evaluate", Watched(fails_at=0))
    with pytest.raises(StoreExists, match=says) as raised:
        landscape(cmd, evaluate, Vector(), **{**asked, **changed})
    assert raised.value.file == str(file) and "\n" not in str(raised.value)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_files_of_others_are_never_written_over(tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    for there in ("{}", "hello", '{"kind": "cmdgpu landscape", "x": 3}', "[]", "null"):
        out.write_text(there)
        with pytest.raises(StoreExists, match="is there, and is no landscape; choose another path"):
            landscape(fitted(), Watched(fails_at=0), Vector(), points=2, out=out)
        with pytest.raises(NotAStore, match="is no landscape"):
            Landscape.load(out)
        assert out.read_text() == there
    out.unlink()
    with pytest.raises(NotAStore, match="is not there"):
        Landscape.load(out)
    out.mkdir()
    with pytest.raises(StoreExists, match="is no landscape"):
        landscape(fitted(), Watched(fails_at=0), Vector(), points=2, out=out)
    with pytest.raises(UsageError, match="s3://"):
        landscape(fitted(), Watched(fails_at=0), Vector(), points=2, out="s3://bucket/a.json")


@pytest.mark.parametrize("line", ["nonsense", '{"at": [1.0]}', '{"at": ["x", 1.0], "scores": {}}', "[]", ""])
def test_lines_that_are_no_points_are_named(tmp_path: Path, line: str) -> None:
    out, lines = tmp_path / "a.json", tmp_path / "a.json.partial"
    with pytest.raises(CmdgpuError, match="no images"):
        landscape(fitted(), Watched(fails_at=2), Vector(), points=2, out=out)
    lines.write_text(f"{lines.read_text()}{line}\n")
    with pytest.raises(StoreCorrupt, match=r"a.json.partial: line 4 is no point of a landscape; mend it, or"):
        landscape(fitted(), Watched(), Vector(), points=2, out=out)


def test_lines_that_another_program_left_are_not_written_over(tmp_path: Path) -> None:
    lines = tmp_path / "a.json.partial"
    lines.write_text("half a download")
    with pytest.raises(StoreCorrupt, match=r"a.json.partial: line 1 is no point of a landscape"):
        landscape(fitted(), Watched(fails_at=0), Vector(), points=2, out=tmp_path / "a.json")
    assert lines.read_text() == "half a download"


def test_another_answer_than_before_is_an_error_and_its_point_is_not_kept(tmp_path: Path) -> None:
    cmd, out = fitted(), tmp_path / "a.json"
    with pytest.raises(CmdgpuError, match="no images"):
        landscape(cmd, Watched(fails_at=2), Vector(), points=2, out=out)
    before = (tmp_path / "a.json.partial").read_bytes()
    other = Watched(answer=lambda model: {"f1": 0.5})
    with pytest.raises(CmdgpuError, match="the scores are f1, and loss, accuracy at the points before"):
        landscape(cmd, other, Vector(), points=2, out=out)
    assert (tmp_path / "a.json.partial").read_bytes() == before
    turned = Watched(answer=lambda model: dict(reversed(summed(model).items())))
    assert list(landscape(cmd, turned, Vector(), points=2, out=out).scores) == ["loss", "accuracy"]


# ---- scores ----------------------------------------------------------------------------------------------


def answers(*values: float) -> Callable[[nn.Module], dict[str, float]]:
    """These, one after the other; a second score that rises."""
    left = list(enumerate(values))

    def evaluate(model: nn.Module) -> dict[str, float]:
        del model
        order, value = left.pop(0)
        return {"acc": value, "late": float(order)}

    return evaluate


NAN, INF = float("nan"), float("inf")


def test_what_is_no_finite_number_is_null_and_stays_so(tmp_path: Path) -> None:
    found = landscape(
        fitted(), answers(0.5, NAN, INF, -INF, 0.25), Vector(), points=2, out=tmp_path / "a.json",
        select="acc",
    )  # fmt: skip
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text)["scores"]["acc"] == [[None, None], [None, 0.25]]
    assert "NaN" not in text and "Infinity" not in text
    assert np.array_equal(found.scores["acc"], [[NAN, NAN], [NAN, 0.25]], equal_nan=True)
    assert found.best is not None and found.best.at == (1.0, 1.0)
    loaded = Landscape.load(tmp_path / "a.json")
    assert json.dumps(loaded.to_json()) == json.dumps(found.to_json()) == text.strip()
    assert "no number at 3 points" in found.table()
    nothing = landscape(fitted(), answers(*[NAN] * 5), Vector(), points=2, select="acc")
    assert nothing.best is None and "acc  no number" in nothing.table() and nothing.to_json()["best"] is None


@pytest.mark.parametrize(
    ("values", "select", "at"),
    [
        # the trained point first, then (0.5, 0.5), (1.5, 0.5), (0.5, 1.5), (1.5, 1.5)
        ((0.1, 0.2, 0.4, 0.3, 0.1), "acc", (1.5, 0.5)),
        ((0.1, 0.2, 0.4, 0.3, 0.0), "min:acc", (1.5, 1.5)),
        ((0.1, 0.4, 0.4, 0.4, 0.0), ("acc", "late"), (0.5, 1.5)),
        ((0.1, 0.4, 0.4, 0.4, 0.0), ("acc", "min:late"), (0.5, 0.5)),
        ((0.4, 0.4, 0.4, 0.4, 0.4), "acc", (1.0, 1.0)),
        ((NAN, NAN, 0.1, NAN, NAN), "acc", (1.5, 0.5)),
    ],
)
def test_the_best_point_is_the_selected_one_and_of_equals_the_nearest(
    values: tuple[float, ...], select: str | tuple[str, ...], at: tuple[float, float]
) -> None:
    found = landscape(fitted(), answers(*values), Vector(), points=2, select=select)
    assert found.best is not None and found.best.at == at
    said = found.to_json()["best"]
    assert (said["x"], said["y"]) == at and said["scores"]["late"] == found.best.scores["late"]
    assert landscape(fitted(), answers(*values), Vector(), points=2).best is None


def test_another_selection_of_the_same_points_needs_no_evaluation(tmp_path: Path) -> None:
    cmd, out = fitted(), tmp_path / "a.json"
    landscape(cmd, Watched(), Vector(), points=2, out=out)
    assert Landscape.load(out).best is None
    found = landscape(cmd, Watched(fails_at=0), Vector(), points=2, out=out, select="min:loss")
    assert Landscape.load(out).best == found.best and found.best is not None
    assert found.best.scores["loss"] == min(scores["loss"] for scores in found.evaluated.values())
    with pytest.raises(UsageError, match="no score 'f1' to select by; have: loss, accuracy"):
        landscape(cmd, Watched(fails_at=0), Vector(), points=2, out=out, select="f1")
    assert Landscape.load(out).best == found.best


def test_json_has_a_row_for_every_y_and_a_column_for_every_x() -> None:
    cmd = fitted()
    found = landscape(cmd, Watched(), Vector(), modes=(2, 1), points=3, select="min:loss")
    said = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert (said["modes"], said["span"], said["points"], said["step"]) == ([2, 1], 0.5, 3, 7)
    assert said["x"] == said["y"] == [0.5, 1.0, 1.5] and said["trained"] == [1.0, 1.0]
    assert said["reference"] == cmd.references_[[2, 1], -1].tolist()
    vector = Vector()
    vector.W.data = torch.from_numpy(defined(cmd, {2: 1.5, 1: 0.5}))
    assert said["scores"]["loss"][0][2] == summed(vector)["loss"]
    assert said["scores"]["loss"][1][1] == said["trained_scores"]["loss"]
    for broken in (
        {"points": 4},
        {"x": [1.0], "points": 1},
        {"span": 1e999},
        {"kind": "other"},
        {"scores": {"loss": [[1.0]]}},
        {"y": None},
    ):
        with pytest.raises(NotAStore):
            Landscape.from_json({**said, **broken})


# ---- BatchNorm -------------------------------------------------------------------------------------------


class Normed(nn.Module):
    """x -> BatchNorm(w x)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.norm = nn.BatchNorm1d(4, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x * self.scale)


def normed_cmd(path: Path) -> CMD:
    model, generator = Normed(), torch.Generator().manual_seed(0)
    with Recorder(path) as recorder, torch.no_grad():
        for t in range(6):
            model.scale.add_(torch.rand(4, generator=generator))
            assert model.norm.running_mean is not None
            model.norm.running_mean.fill_(10.0 * t)
            recorder.record(model, t)
    return CMD(1, device="cpu").fit(Trajectory.open(path))


def test_statistics_are_kept_as_recorded_or_measured_at_every_point(tmp_path: Path) -> None:
    cmd = normed_cmd(tmp_path / "r.zarr")
    batches = [(torch.arange(12.0).view(3, 4), 0), (torch.ones(3, 4), 0)]

    def evaluate(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, Normed) and model.norm.running_mean is not None
        return {"mean": model.norm.running_mean[0], "scale": model.scale[0]}  # type: ignore[dict-item]

    asked: dict[str, Any] = {"modes": (0,), "points": 3}
    with pytest.warns(CmdgpuWarning, match="BatchNorm keeps the statistics of the step at every point; give"):
        kept = landscape(cmd, evaluate, Normed, **asked, step=3)
    assert kept.batch_norm == "kept" and kept.scores["mean"].tolist() == [[30.0] * 3]
    same = landscape(cmd, evaluate, Normed, **asked, step=3, batch_norm="kept")
    assert same.to_json() == kept.to_json()
    anew = landscape(cmd, evaluate, Normed, **asked, loader=batches)
    assert anew.batch_norm == "reestimated"
    inputs = np.mean([batch[:, 0].mean() for batch, _ in batches])
    assert np.allclose(anew.scores["mean"], anew.scores["scale"] * inputs, rtol=1e-6)
    assert len(set(anew.scores["mean"][0])) == 3
    with pytest.raises(UsageError, match="one treatment of BatchNorm; have: kept, reestimated"):
        landscape(cmd, evaluate, Normed, **asked, loader=batches, batch_norm="both")
    with pytest.raises(UsageError, match="there is no loader"):
        landscape(cmd, evaluate, Normed, **asked, batch_norm="reestimated")


# ---- what the user gives ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"modes": (0, 3)}, "there is no mode 3; have: 0 to 2"),
        ({"modes": (-1, 0)}, "there is no mode -1; have: 0 to 2"),
        ({"modes": (1, 1)}, "mode 1 is there twice; give two modes, or one for a line"),
        ({"modes": ()}, "0 modes are no plane"),
        ({"modes": (0, 1, 2)}, "3 modes are no plane; give two modes, or one for a line"),
        ({"points": 1}, "1 points are no line; give two at least"),
        ({"span": 0.0}, "the span cannot be 0.0; give 0.5 for factors from 0.5 to 1.5"),
        ({"span": -0.5}, "the span cannot be -0.5"),
        ({"span": NAN}, "the span cannot be nan"),
        ({"span": INF}, "the span cannot be inf"),
        ({"model": lambda: 3}, "the model is a int, not a torch.nn.Module"),
        ({"batch_norm": "off"}, "batch_norm cannot be 'off'"),
        ({"loader": iter([1]), "model": Normed, "batch_norm": "reestimated"}, "gone through only once"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_evaluated(options: dict[str, Any], says: str) -> None:
    asked: dict[str, Any] = {"model": Vector(), **options}
    with pytest.raises(UsageError, match=says) as raised:
        landscape(fitted(), Watched(fails_at=0), **asked)
    assert "\n" not in str(raised.value)


def test_what_nothing_would_move_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    W = planted(N, T, 1)
    with pytest.raises(UsageError, match=r"there is no mode 1; have: 0 alone: give modes=\(0,\) for a line"):
        landscape(fitted(W, 1), Watched(), Vector())
    with pytest.warns(CmdgpuWarning, match="none of the 100 sampled rows moves"):
        still = fitted(np.ones((N, T), dtype=np.float32))
    with pytest.raises(UsageError, match="there is no mode 0; nothing moves"):
        landscape(still, Watched(), Vector(), modes=(0,))
    W[:, 2] = 0.0
    with pytest.raises(UsageError, match="the reference of mode 0 is 0 at step 2, and no factor moves it"):
        landscape(fitted(W, 1), Watched(), Vector(), modes=(0,), step=2)
    with monkeypatch.context() as patched:
        patched.setattr(CMD, "metrics_", {"mode_sizes": [N, 0, 0]})
        with pytest.raises(UsageError, match="no parameter belongs to mode 1; choose another mode"):
            landscape(fitted(), Watched(), Vector())
    with pytest.raises(StepNotFound):
        landscape(fitted(W, 1), Watched(), Vector(), modes=(0,), step=-99)
    with pytest.raises(UsageError, match="this CMD is not fitted"):
        landscape(CMD(2), Watched(), Vector())


def test_another_model_is_refused_untouched() -> None:
    model = Vector(7)
    with pytest.raises(ModelMismatch):
        landscape(fitted(), Watched(), model, points=2)
    assert not model.W.detach().any()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (0.5, "answered 0.5 at 1 and 1 times the references of 0 and 1; it must answer named numbers"),
        ({}, "answered {} at 1 and 1 times"),
    ],
)
def test_an_answer_that_is_none_is_blamed_with_its_point(answer: Any, says: str) -> None:
    with pytest.raises(CmdgpuError, match=says):
        landscape(fitted(), Watched(answer=lambda model: answer), Vector(), points=2)


def test_a_score_to_select_by_that_is_not_answered_is_refused_at_the_first_point(tmp_path: Path) -> None:
    watched = Watched()
    with pytest.raises(CmdgpuError, match="no score 'val' to select by; have: loss, accuracy"):
        landscape(fitted(), watched, Vector(), points=2, select="min:val", out=tmp_path / "a.json")
    assert len(watched.weights) == 1 and not list(tmp_path.iterdir())


def test_it_is_a_public_name() -> None:
    assert cmdgpu.landscape is landscape and cmdgpu.Landscape is Landscape
