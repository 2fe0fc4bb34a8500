"""Laws of a comparison: weights against their definition, models under equal treatment, honest selection."""

# torch leaves the types of many methods open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cmdgpu
from cmdgpu.baselines import DMD, EMA, PCA, ReferenceDMD
from cmdgpu.comparison import METHODS, Comparison, Row, compare, split_methods
from cmdgpu.comparison.methods import method_of, parse_method
from cmdgpu.comparison.weights import weight_errors
from cmdgpu.decomposition import CMD
from cmdgpu.errors import (
    CmdgpuError,
    CmdgpuWarning,
    MemoryLimitError,
    ModelMismatch,
    StepNotFound,
    UsageError,
)
from cmdgpu.notation import F32, F64
from cmdgpu.recording import Recorder
from cmdgpu.trajectory import Trajectory
from tests.baselines.cases import LAYERS, STEPS, T, parameter_rows, store_of, values
from tests.harness import Ticks, chunks_read, walks

EVERY = [
    "recorded",
    "cmd:modes=3,samples=200",
    "ema:decay=0.5",
    "swa:start=2",
    "lawa:k=3",
    "pca:components=2",
    "rank-one",
    "dmd:rank=2",
    "dmd:rank=2,amplitudes=all,groups=layer",
    "dmd:rank=2,groups=node",
    "reference-dmd:rank=2,modes=3,samples=200",
]


def by_hand(method: Any, W_nt: F32, step: int) -> tuple[float, float]:
    """Mean squared error over the finite rows of parameters, and |what - w| / |w|, of ``state_dict``."""
    state = method.state_dict(step, buffers="skip")
    what = np.concatenate([tensor.numpy().reshape(-1) for tensor in state.values()]).astype(np.float64)
    rows = parameter_rows()
    rows, what = rows[finite := np.isfinite(W_nt[rows]).all(axis=1)], what[finite]
    w = W_nt[rows, list(STEPS).index(step)].astype(np.float64)
    return float(np.mean((what - w) ** 2)), float(np.linalg.norm(what - w) / np.linalg.norm(w))


# ---- weights ---------------------------------------------------------------------------------------------


def test_every_method_has_the_weight_errors_of_its_definition(tmp_path: Path) -> None:
    """In float64, by what ``state_dict`` gives, with a row that is not finite and one that never moves."""
    W = values()
    W[7, 3], W[40] = np.nan, 2.5
    traj = store_of(tmp_path / "s.zarr", W)
    found = compare(traj, EVERY)
    assert found.n_rows == len(parameter_rows()) - 1 and found.n_snapshots == T
    assert found.labels == tuple(EVERY) and found.steps.tolist() == list(STEPS)
    for label in EVERY[1:]:
        method = parse_method(label)
        if method.base is not None:
            made: Any = ReferenceDMD(2).fit(method.base.fit(traj))
        else:
            assert not isinstance(method.fittable, ReferenceDMD)
            made = method.fittable.fit(traj)
        for row in found.of(label):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", CmdgpuWarning)  # of the row that is not finite
                mse, relative = by_hand(made, W, row.step)
            assert row.weight_mse == pytest.approx(mse, rel=1e-4, abs=1e-14)
            assert row.relative_error == pytest.approx(relative, rel=1e-4, abs=1e-7)
    assert all(row.weight_mse == row.relative_error == 0.0 for row in found.of("recorded"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_errors_are_those_of_the_stored_numbers(tmp_path: Path, dtype: str) -> None:
    W = torch.from_numpy(walks(3000, 6)).to(getattr(torch, dtype))
    traj = Trajectory.from_array(W, out=tmp_path / "s.zarr")
    found = compare(traj, ["pca:components=1"])
    stored = W.double().numpy()
    smaller = np.linalg.svd(stored - stored.mean(axis=1, keepdims=True), compute_uv=False)[1:]
    mean = np.mean([row.weight_mse for row in found.rows])
    assert mean == pytest.approx(np.square(smaller).sum() / stored.size, rel=1e-9)


def test_the_bits_depend_on_neither_memory_nor_threads_nor_units(tmp_path: Path) -> None:
    """Of methods whose fits do not, either; units are multiples of 1,024 rows."""
    W = values()
    stores = [store_of(tmp_path / f"{rows}.zarr", W, rows) for rows in (1024, 2048)]
    stores.append(Trajectory.from_array(W[parameter_rows()], list(STEPS)))
    names = [name for name in EVERY if not name.startswith(("cmd", "reference"))]

    def numbers(traj: Trajectory, methods: list[str], limit: str | None = None) -> list[tuple[float, float]]:
        found = compare(traj, methods, memory_limit=limit)
        return [(row.weight_mse, row.relative_error) for row in found.rows]

    first, all_of_first = numbers(stores[0], names), numbers(stores[0], EVERY)
    assert numbers(stores[1], names) == first
    # an array has no buffers between the layers: granules lie elsewhere
    network = [name for name in names if "groups" not in name and name != "rank-one"]
    assert np.allclose(numbers(stores[2], network), numbers(stores[0], network), rtol=1e-9)
    for n_threads, limit in ((1, "60MiB"), (3, "1GiB")):
        torch.set_num_threads(n_threads)
        assert numbers(stores[0], EVERY, limit) == all_of_first


def test_all_errors_take_one_pass_and_too_little_memory_is_refused_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traj = store_of(tmp_path / "s.zarr")
    read, ticks = chunks_read(monkeypatch), Ticks()
    compare(traj, ["recorded", "ema", "swa", "lawa:k=2"], progress=ticks)
    n_units = -(-LAYERS.n_rows // 1024)
    assert len(read) == n_units * T and ticks.ends == 1
    read.clear()
    with pytest.raises(MemoryLimitError, match=r"needs .* MB, the memory limit is 1.05 MB"):
        compare(traj, ["ema"], memory_limit="1MiB")
    assert read == []


def test_the_memory_of_filters_modes_and_steps_is_planned(tmp_path: Path) -> None:
    traj = store_of(tmp_path / "s.zarr")
    threads = torch.get_num_threads()

    def needed(name: str, n_steps: int) -> int:
        method = parse_method(name)
        assert not isinstance(method.fittable, ReferenceDMD)
        method.fittable.fit(traj)
        with pytest.raises(MemoryLimitError) as refused:
            weight_errors([method], traj, traj.steps[:n_steps], 1, Ticks())
        return refused.value.needed_bytes

    for_steps = threads * 8 * 1024 * 4 * (T - 1)
    assert needed("recorded", T) - needed("recorded", 1) == for_steps
    n_nodes = 8 + 50 + 2  # and a norm layer and a number, which are one group each
    filters = needed("dmd:rank=2,groups=node", T) - needed("dmd:rank=2,groups=node", 1) - for_steps
    assert filters == 8 * n_nodes * T * (T - 1)
    assert needed("cmd:modes=2", 1) - needed("recorded", 1) == 18 * 1024


def test_what_overflows_to_no_number_is_infinite(monkeypatch: pytest.MonkeyPatch) -> None:
    W = np.full((3, 4), 1e38, dtype=np.float32)

    def beyond(ema: EMA, step: int) -> F64:
        del ema, step
        return np.array([[1e308, -1e308, 0.0, 0.0]])

    monkeypatch.setattr(EMA, "filter_at", beyond)
    assert [row.weight_mse for row in compare(W, ["ema"]).rows] == [np.inf] * 4


def test_selections_are_all_a_comparison_knows(tmp_path: Path) -> None:
    W = values()
    traj = store_of(tmp_path / "s.zarr", W).sel(start=2, stop=8, params=r"^fc")
    found = compare(traj, ["pca:components=2"])
    rows = slice(LAYERS["fc.weight"].pieces[0].row, LAYERS["fc.bias"].pieces[0].stop)
    part = W[rows, 2:8].astype(np.float64)
    singular = np.linalg.svd(part - part.mean(axis=1, keepdims=True), compute_uv=False)
    assert found.n_rows == len(part) and found.steps.tolist() == list(STEPS)[2:8]
    assert np.mean([row.weight_mse for row in found.rows]) == pytest.approx(
        np.square(singular[2:]).sum() / part.size
    )


def test_a_mode_that_grows_beyond_all_numbers_is_told_and_the_others_go_on() -> None:
    W = np.ones((2, 100), dtype=np.float32)
    W[:, -1] = 1e38
    with pytest.warns(CmdgpuWarning, match=r"grows beyond float64|values beyond float32") as caught:
        found = compare(W, ["dmd:rank=1", "swa"], total, model=Vector(2))
    assert len(caught) == 2
    dmd, swa = found.last("dmd:rank=1"), found.last("swa")
    assert dmd.weight_mse == np.inf and dmd.scores == {} and "has grown beyond float64" in str(dmd.error)
    assert swa.error is None and swa.scores["sum"] == pytest.approx(2e36, rel=1e-6)
    assert np.isnan(found.curve("dmd:rank=1", "sum")[-1])
    assert "no scores  dmd:rank=1 at step" in found.table()
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["methods"][99]["weight_mse"] is None
    found.figure()


def test_weights_that_are_all_zero_have_no_relative_error() -> None:
    W = np.zeros((5, 4), dtype=np.float32)
    found = compare(W, ["recorded", "ema"])
    assert all(row.weight_mse == 0.0 and np.isnan(row.relative_error) for row in found.rows)
    W[:, 1] = np.nan
    found = compare(W, ["recorded"])
    assert found.n_rows == 0 and np.isnan(found.last("recorded").weight_mse)


# ---- models ----------------------------------------------------------------------------------------------


class Vector(nn.Module):
    """The model of an array."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.zeros(n))


def total(model: nn.Module) -> dict[str, float]:
    assert isinstance(model, Vector)
    return {"first": float(model.W[0]), "sum": float(model.W.sum())}


class Normed(nn.Module):
    """x -> BatchNorm(w x), so that its statistics can be worked out by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))
        self.norm = nn.BatchNorm1d(2, affine=False)
        self.seen: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.training)
        return self.norm(x * self.scale)


SCALES = ((1.0, 2.0), (2.0, 2.5), (4.0, 3.0), (3.0, 5.0))
X = np.array([[1.0, -2.0], [3.0, 0.5], [0.0, 1.0], [2.5, 4.0], [-1.0, 2.0], [0.5, 0.5]], dtype=np.float32)


def record(path: Path, buffers: bool = True) -> Trajectory:
    """Scales, and statistics of nobody: a mean of 10 t, a variance of 1 + t."""
    model = Normed()
    with Recorder(path, buffers="record" if buffers else "skip") as recorder, torch.no_grad():
        for t, scale in enumerate(SCALES):
            model.scale.copy_(torch.tensor(scale))
            assert model.norm.running_mean is not None and model.norm.running_var is not None
            model.norm.running_mean.fill_(10.0 * t)
            model.norm.running_var.fill_(1.0 + t)
            recorder.record(model, t)
    return Trajectory.open(path)


def statistics(model: nn.Module) -> dict[str, float]:
    assert isinstance(model, Normed) and not model.training and not torch.is_grad_enabled()
    assert model.norm.running_mean is not None and model.norm.running_var is not None
    return {
        "mean": model.norm.running_mean[0],
        "var": model.norm.running_var[1],
        "scale": model.scale[0],
        "out": model(torch.from_numpy(X))[0, 0],
    }  # type: ignore[return-value]


def batches() -> list[tuple[Tensor, int]]:
    return [(torch.from_numpy(X[:3]), 0), (torch.from_numpy(X[3:]), 0)]


def test_statistics_are_kept_as_recorded_or_measured_anew_for_every_method_alike(tmp_path: Path) -> None:
    traj, model = record(tmp_path / "r.zarr"), Normed()
    model.train()
    methods = ["recorded", "ema:decay=0.5", "pca:components=1", "cmd:modes=1"]
    found = compare(traj, methods, statistics, model=model, loader=batches())
    assert found.treatments == ("kept", "reestimated")
    assert found.of("recorded") == found.of("recorded", "reestimated") != found.of("recorded", "kept")
    assert model.training and model.norm.momentum == 0.1
    for label in methods:
        for kept, anew in zip(found.of(label, "kept"), found.of(label, "reestimated"), strict=True):
            scale = kept.scores["scale"]
            assert anew.scores["scale"] == scale and kept.weight_mse == anew.weight_mse
            assert (kept.scores["mean"], kept.scores["var"]) == (10.0 * kept.step, 1.0 + kept.step)
            assert kept.scores["out"] == pytest.approx(
                (scale * X[0, 0] - 10.0 * kept.step) / np.sqrt(1.0 + kept.step + 1e-5), rel=1e-5
            )
            # update_bn averages over the batches: means, and unbiased variances
            mean = scale * np.mean([X[:3, 0].mean(), X[3:, 0].mean()])
            assert anew.scores["mean"] == pytest.approx(mean, rel=1e-5)
    for row in found.of("recorded", "reestimated"):
        variances = [SCALES[row.step][1] ** 2 * x[:, 1].var(ddof=1) for x in (X[:3], X[3:])]
        assert row.scores["var"] == pytest.approx(np.mean(variances), rel=1e-5)
    # the average has its weights, and the statistics of the snapshot
    assert found.of("ema:decay=0.5", "kept")[1].scores["scale"] == 1.5


def test_without_recorded_statistics_the_model_s_own_are_kept_and_never_those_of_another_step(
    tmp_path: Path,
) -> None:
    traj, model = record(tmp_path / "r.zarr", buffers=False), Normed()
    assert model.norm.running_mean is not None
    model.norm.running_mean.fill_(-3.0)
    found = compare(traj, ["recorded", "swa"], statistics, model=model, loader=batches())
    for label in found.labels:
        assert [row.scores["mean"] for row in found.of(label, "kept")] == [-3.0] * 4
        assert -3.0 not in [row.scores["mean"] for row in found.of(label, "reestimated")]


def test_a_shuffled_loader_gives_every_method_the_same_batches_and_leaves_the_generator_alone(
    tmp_path: Path,
) -> None:
    traj = record(tmp_path / "r.zarr")
    data: Any = torch.utils.data.TensorDataset(torch.from_numpy(X))
    loader: Any = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)  # batches of unlike size
    options: dict[str, Any] = {"model": Normed, "loader": loader, "batch_norm": "reestimated"}
    methods: dict[str, Any] = {"a": "recorded", "b": "swa:start=9", "c": "recorded"}
    before = torch.get_rng_state()
    compare(traj, methods, statistics, **options)
    assert torch.equal(torch.get_rng_state(), before)

    def drawing(model: nn.Module) -> dict[str, float]:
        torch.rand(1)
        return statistics(model)

    found = compare(traj, methods, drawing, **options)
    torch.set_rng_state(before)
    assert found.treatments == ("reestimated",)
    for score in ("mean", "var"):
        a, b, c = (found.curve(label, score) for label in "abc")
        assert np.array_equal(a, b) and np.array_equal(a, c)  # swa: every step is before its start


def test_a_model_without_batchnorm_is_judged_once_with_the_weights_of_the_step() -> None:
    W = walks(12, 5)
    traj = Trajectory.from_array(W)
    model = Vector(12)
    found = compare(traj, ["gd", "lawa:k=2"], total, model=model)
    assert found.treatments == ("none",) and found.scores == ("first", "sum")
    assert np.array_equal(found.curve("recorded", "first"), W[0].astype(np.float64))
    expected = [W[0, 0], *(W[0, 1:].astype(np.float64) + W[0, :-1]) / 2]
    assert np.allclose(found.curve("lawa:k=2", "first"), expected, rtol=1e-6)
    assert float(model.W.detach()[0]) == found.last("lawa:k=2").scores["first"]
    assert all(row.rebuild_s >= 0 for row in found.rows)


def test_a_warning_of_every_step_is_given_once_and_that_of_statistics_never(tmp_path: Path) -> None:
    W = walks(12, 5)
    W[3, 3] = np.nan
    with pytest.warns(CmdgpuWarning) as caught:
        compare(W, ["pca:components=1"], total, model=Vector(12))
    assert [str(each.message) for each in caught] == ["non-finite rows are NaN in W"]
    compare(record(tmp_path / "r.zarr"), ["cmd:modes=1", "swa"], statistics, model=Normed)


# ---- what the user gives ---------------------------------------------------------------------------------


def judged(evaluate: Callable[[nn.Module], Any], **options: Any) -> Comparison:
    given: dict[str, Any] = {"model": Vector(6), **options}
    return compare(walks(6, 5), ["recorded", "swa"], evaluate, **given)


def wrong_at(step: int, answer: Any) -> Callable[[nn.Module], Any]:
    calls: list[int] = []

    def evaluate(model: nn.Module) -> Any:
        del model
        calls.append(1)
        if len(calls) <= step:
            return {"accuracy": 0.5}
        if isinstance(answer, Exception):
            raise answer
        return answer

    return evaluate


@pytest.mark.parametrize(
    ("step", "answer", "says"),
    [
        (
            7,
            ValueError("no\n  good"),
            r"wrong_at.<locals>.evaluate raised ValueError \(no good\) for swa at step 2",
        ),
        (0, ZeroDivisionError(), r"raised ZeroDivisionError for recorded at step 0"),
        (
            1,
            0.5,
            r"answered 0.5 for recorded at step 1; it must answer named numbers, as in {\"accuracy\": 0.9}",
        ),
        (0, {}, r"answered {} for recorded"),
        (0, {1: 0.5}, r"answered {1: 0.5} for recorded"),
        (0, {"accuracy": "good"}, "it must answer named numbers"),
        (0, {"accuracy": torch.zeros(2)}, "it must answer named numbers"),
        (
            6,
            {"loss": 0.5},
            "answered loss for swa at step 1, and accuracy before; it must answer the same names",
        ),
    ],
)
def test_a_function_that_fails_is_named_with_method_and_step(step: int, answer: Any, says: str) -> None:
    with pytest.raises(CmdgpuError, match=says) as raised:
        judged(wrong_at(step, answer))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model": None}, "there is no model to evaluate; give model"),
        ({"model": lambda: 3}, "the model is a int, not a torch.nn.Module"),
        ({"model": Normed, "batch_norm": "both"}, "there is no loader; give a loader"),
        ({"model": Normed, "loader": iter([X])}, "the loader can be gone through only once"),
        ({"batch_norm": "off"}, "batch_norm cannot be 'off'; have: kept, reestimated, both"),
        ({"select": "val"}, "no score 'val' to select by; have: accuracy"),
        ({"steps": "every=0"}, "'every=0' is no step; write"),
        ({"steps": "now"}, "'now' is no step"),
        ({"steps": []}, "no step to compare"),
    ],
)
def test_what_contradicts_itself_is_one_line(options: dict[str, Any], says: str) -> None:
    with pytest.raises(CmdgpuError, match=says):
        judged(lambda model: {"accuracy": 0.5}, **options)


@pytest.mark.parametrize("idle", [{"model": Normed}, {"select": "accuracy"}, {"batch_norm": "kept"}])
def test_what_is_for_an_evaluation_is_not_ignored_without_one(idle: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(idle))} is given, and nothing that evaluates"):
        compare(walks(6, 5), ["recorded"], **idle)


def test_a_model_of_another_shape_and_a_loader_that_fails_are_named(tmp_path: Path) -> None:
    traj, model = record(tmp_path / "r.zarr"), Normed()
    with pytest.raises(ModelMismatch, match=r"r\.zarr: tensor 'scale'"):
        compare(traj, ["recorded"], statistics, model=nn.Linear(2, 2))
    with pytest.raises(
        CmdgpuError, match=r"the loader, or the model on its batches, raised .* for recorded at"
    ):
        compare(traj, ["recorded"], statistics, model=model, loader=[torch.zeros(3, 7)])
    assert model.norm.momentum == 0.1


# ---- methods ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted({*METHODS, *EVERY}))
def test_a_method_is_named_by_what_makes_it(name: str) -> None:
    method = parse_method(name)
    assert parse_method(method.label).config == method.config
    if not isinstance(method.fittable, ReferenceDMD):
        again = method_of(method.fittable)
        assert (again.name, again.label, again.config) == (method.name, method.label, method.config)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("gd", "recorded"),
        ("cmd", "cmd:modes=10"),
        (" cmd : modes = 3, seed=2 ", "cmd:modes=3,seed=2"),
        ("cmd:threshold=0.3", "cmd:threshold=0.3"),
        ("ema:unit=5", "ema:decay=0.9,unit=5.0"),
        ("dmd:groups=node,rank=3", "dmd:rank=3,groups=node"),
        ("reference-dmd:modes=4", "reference-dmd:rank=10,modes=4"),
    ],
)
def test_a_label_tells_the_settings_that_are_not_the_usual_ones(text: str, label: str) -> None:
    assert parse_method(text).label == label


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "ica",
            "no method named 'ica'; have: cmd, dmd, ema, lawa, pca, rank-one, recorded, reference-dmd, swa",
        ),
        ("ema:rate=1", "ema has no setting 'rate'; have: decay, unit"),
        ("rank-one:rank=1", "rank-one has no setting 'rank'; it has none"),
        ("ema:decay", "'decay' of 'ema:decay' is no setting, or given twice"),
        ("swa:", "'' of 'swa:' is no setting"),
        ("ema:decay=1,decay=0", "'decay=0' of 'ema:decay=1,decay=0' is no setting, or given twice"),
        ("ema:decay=fast", "ema:decay cannot be 'fast'; give a number"),
        ("pca:components=2.5", "pca:components cannot be '2.5'"),
        ("ema:decay=2", "a decay of 2.0; it is from 0 to 1"),
        ("dmd:groups=head", "groups cannot be 'head'; have: network, layer, node"),
    ],
)
def test_what_is_no_method_is_told_with_what_there_is(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_method(text)


def test_settings_belong_to_the_method_before_them() -> None:
    text = "ema:decay=0.9,dmd:rank=10,groups=layer,swa,pca:components=3"
    assert split_methods(text) == ["ema:decay=0.9", "dmd:rank=10,groups=layer", "swa", "pca:components=3"]


def test_methods_may_be_made_already_fitted_or_not_and_have_names_of_your_own(tmp_path: Path) -> None:
    traj = store_of(tmp_path / "s.zarr")
    late = traj.sel(start=4)
    cmd, pca = CMD(3, n_samples=200).fit(late), PCA(2).fit(late)
    methods: dict[str, Any] = {
        "plain": "recorded",
        "late CMD": cmd,
        "CMD": CMD(3, n_samples=200),
        "late PCA": pca,
        "PCA": PCA(2),
        "carried": ReferenceDMD(2).fit(cmd),
        "EMA": EMA(0.5),
    }
    found = compare(Trajectory.open(tmp_path / "s.zarr"), methods, steps="last")
    assert found.labels == tuple(methods)
    assert found.last("late CMD").weight_mse < found.last("CMD").weight_mse
    assert found.last("late PCA").weight_mse < found.last("PCA").weight_mse
    for label in ("late CMD", "late PCA", "carried"):
        assert np.isnan(found.last(label).fit_s)
        mse, _ = by_hand(methods[label], values(), STEPS[-1])
        assert found.last(label).weight_mse == pytest.approx(mse, rel=1e-4)
    with pytest.raises(StepNotFound, match="step 0: late CMD was not fitted on it; nearest: 40, 50, 60"):
        compare(traj, {"late CMD": cmd}, steps=0)
    with pytest.raises(StepNotFound, match="step 30: pca:components=2 was not fitted on it"):
        compare(traj, [pca], steps=[30, 50])


def test_what_was_fitted_on_something_else_is_refused(tmp_path: Path) -> None:
    traj, other = store_of(tmp_path / "a.zarr"), store_of(tmp_path / "b.zarr", values(seed=1))
    says = "was fitted on other snapshots or tensors than are compared"
    for made in (CMD(2, n_samples=50).fit(other), PCA(2).fit(other), ReferenceDMD(1).fit(CMD(2).fit(other))):
        with pytest.raises(UsageError, match=says):
            compare(traj, [made])
    with pytest.raises(UsageError, match=says):
        compare(traj, [DMD(2).fit(traj.sel(params="^fc"))])
    with pytest.raises(UsageError, match=r"ema:decay=0\.9 is there twice; leave one out, or give names"):
        compare(traj, ["ema", "ema:decay=0.9"])
    with pytest.raises(UsageError, match="no method to compare; have: recorded"):
        compare(traj, [])
    with pytest.raises(UsageError, match=r"a int is no method; give CMD, a baseline, or: recorded"):
        compare(traj, [3])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="there is no snapshot of a parameter to compare"):
        compare(np.zeros((0, 3), np.float32))


def test_of_a_result_the_cmd_is_that_one_and_its_trajectory_is_compared(tmp_path: Path) -> None:
    traj = store_of(tmp_path / "s.zarr")
    CMD(3, n_samples=200).fit(traj, out=tmp_path / "r.zarr")
    cmd = CMD.load(tmp_path / "r.zarr")
    found = compare(cmd, ["recorded", "cmd", "cmd:modes=2", "reference-dmd:rank=2"])
    assert found.labels == (
        *("recorded", "cmd:modes=3,samples=200", "cmd:modes=2"),
        "reference-dmd:rank=2,modes=3,samples=200",
    )
    assert np.isnan(found.last("cmd:modes=3,samples=200").fit_s) and found.last("cmd:modes=2").fit_s > 0
    same = compare(traj, ["cmd:modes=3,samples=200", "reference-dmd:rank=2,modes=3,samples=200"])
    for label in same.labels:
        assert np.array_equal(same.curve(label, "weight_mse"), found.curve(label, "weight_mse"))
    (tmp_path / "s.zarr").rename(tmp_path / "elsewhere.zarr")
    with pytest.raises(UsageError, match=r"r\.zarr: the trajectory is out of reach.*; say where it is"):
        compare(CMD.load(tmp_path / "r.zarr"))
    found = compare(CMD.load(tmp_path / "r.zarr", tmp_path / "elsewhere.zarr"))
    assert found.labels == ("recorded", "cmd:modes=3,samples=200")


def test_decompositions_in_a_folder_share_a_pass_and_are_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traj = store_of(tmp_path / "s.zarr")
    methods = ["cmd:modes=2", "cmd:modes=3", "reference-dmd:rank=2,modes=3"]
    memory = compare(traj, methods)
    n_chunks = -(-LAYERS.n_rows // 1024) * T
    read = chunks_read(monkeypatch)
    kept = compare(traj, methods, out=tmp_path / "fits")
    assert len(read) == 2 * n_chunks  # one for both fits, one for the errors
    assert sorted(path.name for path in (tmp_path / "fits").iterdir()) == [
        "modes-2.cmd.zarr",
        "modes-3.cmd.zarr",
    ]
    read.clear()
    again = compare(traj, methods, out=tmp_path / "fits")
    assert len(read) == n_chunks
    for found in (kept, again):
        for label in memory.labels:
            assert np.array_equal(found.curve(label, "weight_mse"), memory.curve(label, "weight_mse"))


def test_bytes_are_what_rebuilding_takes(tmp_path: Path) -> None:
    found = compare(store_of(tmp_path / "s.zarr"), EVERY, steps="last")
    n = len(parameter_rows())
    stored = {label: found.last(label).stored_bytes for label in EVERY}
    assert stored["recorded"] == 4 * n * T
    assert stored["cmd:modes=3,samples=200"] == 10 * n + 4 * 3 * T
    assert stored["ema:decay=0.5"] == 4 * n
    assert stored["pca:components=2"] == 4 * (3 * n + 2 * T)


# ---- steps and selection ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "steps"),
    [
        ("all", list(STEPS)),
        ("last", [110]),
        ("every=5", [10, 60, 110]),
        ("every=99", [110]),
        (-2, [100]),
        ("-1", [110]),
        (["last", 30, "every=10", 30], [10, 30, 110]),
        ("0, 40,last", [0, 40, 110]),
        (np.array([20, 10]), [10, 20]),
    ],
)
def test_steps_are_labels_positions_from_the_end_or_a_rhythm(asked: Any, steps: list[int]) -> None:
    found = compare(Trajectory.from_array(walks(8, T), list(STEPS)), ["recorded"], steps=asked)
    assert found.steps.tolist() == steps


def test_a_step_that_is_not_there_is_told_with_its_neighbours() -> None:
    with pytest.raises(StepNotFound, match="step 33: is not among the snapshots; nearest: 20, 30, 40"):
        compare(Trajectory.from_array(walks(8, T), list(STEPS)), ["recorded"], steps=33)


def rows_of(**scores: list[float]) -> tuple[Row, ...]:
    made = range(len(next(iter(scores.values()))))
    return tuple(
        Row(
            "swa",
            "swa",
            {},
            10 * i,
            "none",
            0.1,
            0.2,
            8,
            0.5,
            0.1,
            {name: s[i] for name, s in scores.items()},
        )
        for i in made
    )


def comparison(rows: tuple[Row, ...], *select: str) -> Comparison:
    return Comparison(rows, "run.zarr", "digest", "step", 6, len(rows), select)


def test_validation_selects_and_test_is_only_reported() -> None:
    validation, loss = [0.5, 0.9, 0.9, 0.9, float("nan")], [0.1, 0.4, 0.2, 0.2, 0.0]
    for best in range(5):
        test = [1.0 if i == best else 0.1 * i for i in range(5)]
        rows = rows_of(val=validation, loss=loss, test=test)
        chosen = comparison(rows, "val", "min:loss").selected("swa")
        assert chosen is not None and chosen is rows[2] and chosen.scores["test"] == test[2]
        assert comparison(rows, "val").selected("swa") is rows[1], "the earliest among equals"
        assert comparison(rows, "min:loss").selected("swa") is rows[4]
        assert comparison(rows).selected("swa") is None
    assert comparison(rows_of(val=[float("nan")] * 2), "val").selected("swa") is None


# ---- what is written -------------------------------------------------------------------------------------


def test_table_json_and_csv_tell_the_same(tmp_path: Path) -> None:
    traj = record(tmp_path / "r.zarr")
    options: dict[str, Any] = {"model": Normed, "loader": batches(), "select": "min:mean"}
    found = compare(traj, ["recorded", "ema:decay=0.5"], statistics, **options)
    table = found.table().splitlines()
    assert "2 parameters x 4 snapshots, 4 of them compared" in table[0]
    assert table[2].split()[:3] == ["method", "BatchNorm", "step"]
    assert [line.split()[:3] for line in table[4:8]] == [
        ["recorded", "kept", "3"],
        ["recorded", "re-estimated", "3"],
        ["ema:decay=0.5", "kept", "3"],
        ["ema:decay=0.5", "re-estimated", "3"],
    ]
    assert "where min:mean is best" in table and table[10].split()[:3] == ["recorded", "kept", "0"]
    as_json = json.loads(json.dumps(found.to_json(), allow_nan=False))
    needed = {"method", "config", "step", "weight_mse", "relative_error", "stored_bytes", "fit_s", "scores"}
    assert len(as_json["methods"]) == 2 * 4 * 2 and all(needed <= set(row) for row in as_json["methods"])
    assert as_json["methods"][-1]["config"] == {"decay": 0.5, "unit": None}
    assert [row["step"] for row in as_json["last"]] == [3] * 4
    assert as_json["selected"][0]["scores"]["mean"] == 0.0
    found.write_csv(tmp_path / "c.csv")
    with (tmp_path / "c.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["mean"]) for line in lines] == [row.scores["mean"] for row in found.rows]
    assert [float(line["weight_mse"]) for line in lines] == [row.weight_mse for row in found.rows]


def test_what_was_not_compared_is_told_with_what_was() -> None:
    found = compare(walks(6, 4), ["recorded"])
    for wrong, says in (
        (lambda: found.of("swa"), "no method 'swa' was compared; have: recorded"),
        (lambda: found.of("recorded", "kept"), "no statistics of BatchNorm are 'kept'; have: none"),
        (lambda: found.curve("recorded", "loss"), "no score 'loss'; have: weight_mse, relative_error"),
    ):
        with pytest.raises(UsageError, match=says):
            wrong()


def test_the_figure_draws_the_curves_and_marks_what_was_selected(tmp_path: Path) -> None:
    traj = record(tmp_path / "r.zarr")
    options: dict[str, Any] = {"model": Normed, "loader": batches(), "select": "scale"}
    found = compare(traj, ["recorded", "ema:decay=0.5"], statistics, **options)
    errors, scores = found.figure("scale").axes
    assert errors.get_yscale() == "log" and scores.get_title(loc="left") == "scale"
    lines = {str(line.get_label()): line for line in scores.get_lines()}
    for label in found.labels:
        assert np.array_equal(np.asarray(lines[label].get_ydata()), found.curve(label, "scale"))
    rings = [line for line in scores.get_lines() if line.get_fillstyle() == "none"]
    assert [float(np.asarray(ring.get_xdata())[0]) for ring in rings] == [2.0, 3.0]
    assert [
        str(line.get_label()) for line in errors.get_lines() if len(np.asarray(line.get_xdata())) > 1
    ] == ["ema:decay=0.5"]
    assert len(compare(traj, ["swa"], steps="last").figure().axes) == 1


def test_the_public_name_is_this_one() -> None:
    assert cmdgpu.compare is compare and cmdgpu.Comparison is Comparison
