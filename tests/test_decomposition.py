"""Laws of CMD: what it takes, what it says; the way back: a r + b at any recorded step, buffers verbatim."""

# torch leaves the types of many methods open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import re
import shutil
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import safetensors.torch
import torch
import zarr
from torch import Tensor, nn

from cmdgpu.decomposition import CMD
from cmdgpu.errors import CmdgpuError, CmdgpuWarning, ModelMismatch, StepNotFound, StoreExists, UsageError
from cmdgpu.exporting import FORMATS
from cmdgpu.notation import F64, UNWRITTEN, AnyArray
from cmdgpu.recording import Recorder
from cmdgpu.results import verify_result
from cmdgpu.store.parameter_map import ParameterMap, whole
from cmdgpu.tensors import warn_of_running_statistics
from cmdgpu.trajectory import Trajectory
from tests.harness import check_equals_definition, fit_bits, planted, row_bits, walks, write_store
from tests.loaders import LOADERS
from tests.verbs import Net, bits, check_same_bits, flip_bit, float_tensors, net_at, scramble

STEPS = (0, 10, 25, 40, 45, 60)


def train(model: nn.Module, step: int) -> None:
    """The values of a step: curves every parameter is an image of, and noise."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for i, tensor in enumerate(float_tensors(model).values()):
            a, b, c = torch.randn(3, *tensor.shape, generator=generator)
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(100 * step + i))
            curve = np.sin(step / 20) * a.sign() if i % 2 else step / 20
            tensor.copy_(a * curve + b + 0.02 * c * noise)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """run.zarr, a recorded model; all.cmd.zarr, its fit; late.cmd.zarr, that of its last four snapshots."""
    folder = tmp_path_factory.mktemp("cmd")
    model = Net()
    with Recorder(folder / "run.zarr", rows_per_chunk=256) as recorder:
        for step in STEPS:
            train(model, step)
            recorder.record(model, step)
    traj = Trajectory.open(folder / "run.zarr")
    CMD(n_modes=4).fit(traj, out=folder / "all.cmd.zarr")
    CMD(n_modes=3).fit(traj.sel(start=2), out=folder / "late.cmd.zarr")
    return folder


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """A copy to break or to move."""
    return Path(shutil.copytree(base, tmp_path / "copy"))


def recorded(base: Path) -> Trajectory:
    return Trajectory.open(base / "run.zarr")


def model_at(step: int) -> Net:
    model = Net()
    train(model, step)
    return model


def is_buffer(name: str) -> bool:
    return "running" in name


def rebuilt_by_hand(
    cmd: CMD, values_m: AnyArray, kinds: tuple[str, ...] = ("parameter",)
) -> OrderedDict[str, Tensor]:
    """a r + b from the rows themselves, cut into tensors by the map."""
    mode, a, b = (np.asarray(rows) for rows in (cmd.labels_, cmd.a_, cmd.b_))
    padded = np.concatenate([values_m.astype(np.float64), [0.0, 0.0]])
    rows: F64 = a.astype(np.float64) * padded[mode] + b
    rows[mode == -2] = np.nan
    found: OrderedDict[str, Tensor] = OrderedDict()
    for entry in cmd.result.frame.map:
        if entry.kind in kinds:
            start = entry.pieces[0].row if entry.pieces else 0
            flat = torch.as_tensor(rows[start : start + entry.n_rows].astype(np.float32))
            found[entry.name] = flat.reshape(entry.shape).to(getattr(torch, entry.dtype))
    for alias, name in cmd.result.frame.map.aliases.items():
        found[alias] = found[name]
    return found


def parameters(state: OrderedDict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not is_buffer(name)}


def buffers(state: OrderedDict[str, Tensor] | dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if is_buffer(name)}


# ---- the way back -------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", range(len(STEPS)))
def test_a_fitted_step_is_a_times_the_reference_plus_b(base: Path, position: int) -> None:
    cmd = CMD.load(base / "all.cmd.zarr")
    expected = rebuilt_by_hand(cmd, cmd.references_[:, position])
    check_same_bits(parameters(cmd.state_dict(STEPS[position])), expected)
    check_same_bits(parameters(cmd.state_dict(position - len(STEPS))), expected)
    # and it is a description of what was recorded
    for name, tensor in float_tensors(model_at(STEPS[position])).items():
        if not is_buffer(name):
            assert torch.allclose(cmd.state_dict(STEPS[position])[name].float(), tensor.float(), atol=0.2), (
                name
            )


@pytest.mark.parametrize("step", STEPS)
def test_with_a_later_start_every_recorded_step_is_addressed_by_its_label(base: Path, step: int) -> None:
    """Column 0 of the references is the third recorded step; those before it were recorded, not fitted."""
    cmd, traj = CMD.load(base / "late.cmd.zarr"), recorded(base)
    assert cmd.steps_.tolist() == list(STEPS[2:])
    values = traj.read_rows(cmd.reference_rows_, np.array([STEPS.index(step)]))[:, 0]
    check_same_bits(parameters(cmd.state_dict(step)), rebuilt_by_hand(cmd, values))


def test_negative_steps_count_from_the_end_of_what_was_fitted(base: Path) -> None:
    for name, steps in (("all", STEPS), ("late", STEPS[2:]), ("middle", STEPS[1:3])):
        if name == "middle":
            with pytest.warns(CmdgpuWarning, match="2 snapshots"):
                cmd = CMD(n_modes=1).fit(recorded(base).sel(1, 3))
        else:
            cmd = CMD.load(base / f"{name}.cmd.zarr")
        for back in range(1, len(steps) + 1):
            check_same_bits(cmd.state_dict(-back), cmd.state_dict(steps[-back]))
        with pytest.raises(StepNotFound):
            cmd.state_dict(-len(steps) - 1)


def test_an_unknown_step_names_the_nearest_ones(base: Path, folder: Path) -> None:
    cmd = CMD.load(base / "late.cmd.zarr")
    nearest = r"step 26: was not recorded; nearest: 10, 25, 40"
    with pytest.raises(StepNotFound, match=nearest):
        cmd.state_dict(26)
    with pytest.raises(StepNotFound, match=nearest):
        cmd.load_into(Net(), 26)
    with pytest.raises(StepNotFound, match=nearest):
        cmd.export(folder / "x.pt", 26)
    shutil.rmtree(folder / "run.zarr")
    with pytest.raises(StepNotFound, match=r"step 10: was not fitted, .*; nearest: 25, 40, 45"):
        CMD.load(folder / "late.cmd.zarr").state_dict(10)


@pytest.mark.parametrize("which", ["all", "late"])
@pytest.mark.parametrize("step", STEPS)
def test_buffers_come_as_they_were_recorded(base: Path, which: str, step: int) -> None:
    cmd = CMD.load(base / f"{which}.cmd.zarr")
    found, expected = buffers(cmd.state_dict(step)), buffers(float_tensors(model_at(step)))
    assert len(expected) == 3
    check_same_bits(found, expected)


@pytest.mark.parametrize("what", ["gone", "moved", "another one", "damaged"])
def test_without_the_trajectory_buffers_are_left_out_with_a_warning(folder: Path, what: str) -> None:
    run = folder / "run.zarr"
    if what == "gone":
        shutil.rmtree(run)
    elif what == "moved":
        run.rename(folder / "renamed.zarr")
    elif what == "another one":
        shutil.rmtree(run)
        with Recorder(run, rows_per_chunk=256) as recorder:
            for step in STEPS:
                recorder.record(net_at(step), step)
    else:
        flip_bit(run / "zarr.json", 1000)
    cmd = CMD.load(folder / "all.cmd.zarr")
    assert cmd.trajectory is None
    with pytest.warns(CmdgpuWarning, match="out of reach: 3 buffers are left out"):
        state = cmd.state_dict(40)
    check_same_bits(state, rebuilt_by_hand(cmd, cmd.references_[:, 3]))
    with pytest.warns(CmdgpuWarning, match="out of reach"):
        cmd.export(folder / "x.safetensors", 40)
    check_same_bits(safetensors.torch.load_file(folder / "x.safetensors"), without_aliases(cmd, state))
    model = model_at(0)
    kept = {name: bits(tensor) for name, tensor in buffers(float_tensors(model)).items()}
    with pytest.warns(CmdgpuWarning, match="running statistics"), pytest.warns(match="out of reach"):
        cmd.load_into(model, 40)
    assert {name: bits(tensor) for name, tensor in buffers(float_tensors(model)).items()} == kept


def test_buffers_are_rebuilt_like_parameters_when_asked(folder: Path) -> None:
    """Which needs no trajectory, and says nothing."""
    shutil.rmtree(folder / "run.zarr")
    cmd = CMD.load(folder / "all.cmd.zarr")
    expected = rebuilt_by_hand(cmd, cmd.references_[:, 3], ("parameter", "buffer"))
    assert len(buffers(expected)) == 3
    check_same_bits(cmd.state_dict(40, buffers="rebuilt"), expected)
    told = cmd.export(folder / "x.pt", 40, buffers="rebuilt")
    check_same_bits(torch.load(folder / "x.pt", weights_only=True), expected)
    assert (told.left_out, told.buffers_step) == ((), None)
    model = Net()
    with pytest.warns(CmdgpuWarning, match="running statistics"):
        cmd.load_into(model, 40, buffers="rebuilt")
    check_same_bits(float_tensors(model), expected)


@pytest.mark.parametrize("stored", [True, False], ids=["on-disk", "in-memory"])
def test_a_fit_without_buffers_is_that_of_the_parameters_alone(folder: Path, stored: bool) -> None:
    whole_fit, out = CMD.load(folder / "all.cmd.zarr"), folder / "alone.cmd.zarr"
    cmd = CMD(n_modes=4).fit(recorded(folder), out=out if stored else None, buffers="skip")
    if stored:
        cmd = CMD.load(out)
        assert verify_result(out).damaged == []
        again = CMD(n_modes=4).fit(recorded(folder), out=out, buffers="skip")
        assert again.metrics_["blocks_total"] == 0 and fit_bits(again) == fit_bits(cmd)
        with pytest.raises(StoreExists, match=r"config buffers: skip there, None asked"):
            CMD(n_modes=4).fit(recorded(folder), out=out)
    of_buffers = np.zeros(len(cmd.labels_), dtype=bool)
    for entry in recorded(folder).parameters:
        for piece in entry.pieces:
            of_buffers[piece.row : piece.stop] = entry.kind == "buffer"
    assert of_buffers.sum() > 0
    for name in ("labels_", "a_", "b_", "correlation_"):
        mine, theirs = (np.asarray(getattr(fit, name)) for fit in (cmd, whole_fit))
        assert np.array_equal(mine[~of_buffers], theirs[~of_buffers])
    assert (np.asarray(cmd.labels_)[of_buffers] == UNWRITTEN).all() and np.isnan(
        np.asarray(cmd.a_)[of_buffers]
    ).all()
    same = {"mode_sizes", "r2", "r2_energy", "mean_abs_correlation", "n_constant", "weight_mse", "n_rows"}
    assert {key: cmd.metrics_[key] for key in same} == {key: whole_fit.metrics_[key] for key in same}
    assert cmd.metrics_["n_buffer_rows"] == 0
    state = cmd.state_dict(40)
    check_same_bits(state, parameters(whole_fit.state_dict(40)))
    model = model_at(0)
    with pytest.warns(CmdgpuWarning, match="running statistics"):
        cmd.load_into(model, 40)
    check_same_bits(float_tensors(model), state | buffers(float_tensors(model_at(0))))


def test_a_fit_knows_of_no_other_treatment_of_buffers(base: Path) -> None:
    with pytest.raises(UsageError, match="buffers cannot be 'none' in a fit; have: fit, skip"):
        CMD(n_modes=4).fit(recorded(base), buffers=cast(Any, "none"))


def test_buffers_are_left_out_when_asked_without_a_word(folder: Path) -> None:
    cmd = CMD.load(folder / "all.cmd.zarr")
    state = cmd.state_dict(40, buffers="skip")
    check_same_bits(state, rebuilt_by_hand(cmd, cmd.references_[:, 3]))
    model = model_at(0)
    with pytest.warns(CmdgpuWarning, match="running statistics"):
        cmd.load_into(model, 40, buffers="skip")
    check_same_bits(float_tensors(model), state | buffers(float_tensors(model_at(0))))
    shutil.rmtree(folder / "run.zarr")
    cmd = CMD.load(folder / "all.cmd.zarr")
    check_same_bits(cmd.state_dict(40, buffers="skip"), state)
    told = cmd.export(folder / "x.pt", 40, buffers="skip")
    check_same_bits(torch.load(folder / "x.pt", weights_only=True), state)
    assert (told.n_tensors, told.left_out, told.buffers_step) == (10, (), None)
    with pytest.raises(UsageError, match="buffers cannot be 'none' here; have: recorded, rebuilt, skip"):
        cmd.state_dict(40, buffers=cast(Any, "none"))


def test_the_step_of_recorded_buffers_is_told(base: Path, tmp_path: Path) -> None:
    cmd = CMD.load(base / "late.cmd.zarr")
    assert cmd.export(tmp_path / "x.pt").buffers_step == 60
    assert cmd.export(tmp_path / "x.pt", 10).buffers_step == 10
    assert cmd.export(tmp_path / "x.pt", 10, params="scale").buffers_step is None


def test_result_and_trajectory_moved_together_stay_together(folder: Path, tmp_path: Path) -> None:
    moved = folder.rename(tmp_path / "elsewhere")
    assert len(buffers(CMD.load(moved / "all.cmd.zarr").state_dict(-1))) == 3


def test_only_chosen_tensors_are_rebuilt(base: Path) -> None:
    cmd = CMD.load(base / "all.cmd.zarr")
    everything = cmd.state_dict(25)
    for params, names in {
        r"^body\.0": ["body.0.weight", "body.0.bias"],
        "embed": ["embed.weight", "head.weight"],
        "running_var": ["body.1.running_var"],
    }.items():
        found = cmd.state_dict(25, params=params)
        assert sorted(found) == sorted(names)
        check_same_bits(found, {name: everything[name] for name in names})
    with pytest.raises(UsageError, match="no tensor matches 'nothing'"):
        cmd.state_dict(25, params="nothing")


def test_a_broken_row_is_nan_and_its_tensor_is_named(tmp_path: Path) -> None:
    names = ("sound", "broken", "broken_too")
    layout = ParameterMap(whole([(name, "parameter", "float32", (200,)) for name in names]))
    W = planted(600, 8)
    W[250, 3], W[599, 0] = np.nan, -np.inf
    cmd = CMD(n_modes=3).fit(write_store(tmp_path / "s.zarr", W, layout=layout), out=tmp_path / "out.zarr")
    assert "non-finite 2" in cmd.summary()
    with pytest.warns(CmdgpuWarning, match="non-finite rows are NaN in broken, broken_too"):
        state = cmd.state_dict(5)
    lost = np.concatenate([state[name].isnan().numpy() for name in names])
    assert np.flatnonzero(lost).tolist() == [250, 599]
    assert not cmd.state_dict(5, params="sound")["sound"].isnan().any()
    with pytest.warns(CmdgpuWarning, match="NaN in broken"):
        cmd.export(tmp_path / "x.pt", 5)
    check_same_bits(torch.load(tmp_path / "x.pt", weights_only=True), state)
    model = nn.ParameterDict({name: torch.zeros(200) for name in names})
    with pytest.warns(CmdgpuWarning, match="NaN in broken"):
        cmd.load_into(model, 5)
    check_same_bits(float_tensors(model), state)


# ---- into a model -------------------------------------------------------------------------------------


def test_a_model_gets_exactly_the_state_dict(base: Path) -> None:
    cmd = CMD.load(base / "all.cmd.zarr")
    model = model_at(0)
    with pytest.warns(
        CmdgpuWarning, match=r"BatchNorm1d keeps running statistics .*update_bn\(loader, model\)"
    ):
        cmd.load_into(model, 45)
    check_same_bits(float_tensors(model), cmd.state_dict(45))
    assert model.head.weight is model.embed.weight
    assert model.scratch.eq(0).all(), "what was not recorded keeps its value"


class Missing(Net):
    def __init__(self) -> None:
        super().__init__()
        del self.scale


class Reshaped(Net):
    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))


class Larger(Net):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Parameter(torch.ones(2))


class Untied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = nn.Parameter(self.embed.weight.detach().clone())


@pytest.mark.parametrize(
    ("make", "tensor"),
    [(Missing, "scale"), (Reshaped, "low"), (Larger, "extra"), (Untied, "head.weight")],
)
def test_a_model_that_does_not_match_is_left_untouched(base: Path, make: type[Net], tensor: str) -> None:
    model = make()
    scramble(model, 7)
    before = {name: bits(value) for name, value in model.state_dict().items()}
    with pytest.raises(ModelMismatch) as refused:
        CMD.load(base / "all.cmd.zarr").load_into(model, 45)
    assert refused.value.tensor == tensor
    assert {name: bits(value) for name, value in model.state_dict().items()} == before


def test_a_model_without_running_statistics_is_loaded_in_silence(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9))
    with Recorder(tmp_path / "run.zarr") as recorder:
        for step in range(4):
            train(model, step)
            recorder.record(model, step)
    cmd = CMD(n_modes=2).fit(Trajectory.open(tmp_path / "run.zarr"))
    cmd.load_into(model, -1)
    check_same_bits(float_tensors(model), cmd.state_dict(3))


class Custom(nn.Module):
    """Keeps statistics and does not track them, like a frozen BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(4))


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ([nn.BatchNorm1d(4), nn.BatchNorm1d(4)], r"run .*update_bn\(loader, model\) before judging"),
        ([nn.Linear(4, 4), nn.SyncBatchNorm(4)], r"SyncBatchNorm .*; run .*update_bn\(loader, model\)"),
        (
            [nn.InstanceNorm1d(4, track_running_stats=True)],
            r"; send batches through the model in train mode \(InstanceNorm1d is not reached by update_bn\)",
        ),
        (
            [nn.InstanceNorm1d(4, track_running_stats=True), nn.BatchNorm2d(4)],
            r"run .*update_bn\(loader, model\) and send batches .*\(InstanceNorm1d",
        ),
        ([nn.BatchNorm1d(4, track_running_stats=False), nn.InstanceNorm1d(4)], None),
        ([Custom()], None),
    ],
)
def test_running_statistics_are_spoken_of_once_and_only_where_they_are_tracked(
    layers: list[nn.Module], said: str | None
) -> None:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        warn_of_running_statistics(nn.Sequential(*layers))
    assert len(heard) == (said is not None)
    for warning in heard:
        assert issubclass(warning.category, CmdgpuWarning)
        assert re.search(str(said), str(warning.message)), warning.message


# ---- out as a file ----------------------------------------------------------------------------------------


def without_aliases(cmd: CMD, state: OrderedDict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name not in cmd.result.frame.map.aliases}


@pytest.mark.parametrize("step", [-1, 0, 25])
def test_an_exported_file_is_the_state_dict(base: Path, tmp_path: Path, step: int) -> None:
    cmd = CMD.load(base / "late.cmd.zarr")
    state = cmd.state_dict(step)
    assert state["low"].dtype == torch.bfloat16
    done = cmd.export(tmp_path / "x.safetensors", step)
    check_same_bits(safetensors.torch.load_file(tmp_path / "x.safetensors"), without_aliases(cmd, state))
    assert (done.format, done.n_tensors, done.left_out) == (
        "safetensors",
        len(without_aliases(cmd, state)),
        (),
    )
    cmd.export(tmp_path / "x.pt", step)
    loaded = cast(dict[str, Tensor], torch.load(tmp_path / "x.pt", weights_only=True))
    check_same_bits(loaded, state)
    model = Net()
    model.load_state_dict(loaded, strict=False)
    check_same_bits(float_tensors(model), state)


@pytest.mark.parametrize("kind", list(FORMATS))
def test_every_format_holds_the_state_dict(base: Path, tmp_path: Path, kind: str) -> None:
    cmd = CMD.load(base / "late.cmd.zarr")
    told = cmd.export(tmp_path / "x", 25, kind)
    check_same_bits(LOADERS[kind](tmp_path / "x"), cmd.state_dict(25))
    assert (told.format, told.n_tensors, told.left_out, told.buffers_step) == (kind, 13, (), 25)


# ---- loading is the fit -----------------------------------------------------------------------------------


def test_what_is_loaded_is_what_was_fitted(folder: Path) -> None:
    traj = recorded(folder)
    fitted = CMD(n_modes=4, n_samples=500, sampling="uniform", random_state=3).fit(
        traj, out=folder / "x.zarr"
    )
    loaded = CMD.load(folder / "x.zarr")
    assert fit_bits(loaded) == fit_bits(fitted) == fit_bits(
        CMD(n_modes=4, n_samples=500, sampling="uniform", random_state=3).fit(traj)
    )  # fmt: skip
    for name in ("sample_", "sample_rows_", "sample_labels_", "linkage_", "references_", "steps_"):
        assert np.array_equal(getattr(loaded, name), getattr(fitted, name)), name
    settings = ("n_modes", "threshold", "n_samples", "sampling", "affinity", "random_state")
    assert all(getattr(loaded, name) == getattr(fitted, name) for name in settings)
    assert loaded.tensor_shares_ == fitted.tensor_shares_
    speeds = {"device", "implementation", "rows_per_block", "blocks_total", "units_total", "units_resumed",
              "bytes_read", "bytes_per_s", "planned_bytes", "stage_s"}  # fmt: skip
    assert {k: v for k, v in fitted.metrics_.items() if k not in speeds} == loaded.metrics_
    for step in STEPS:
        check_same_bits(loaded.state_dict(step), fitted.state_dict(step))
    check_same_bits(
        CMD.load(folder / "x.zarr").fit(traj, out=folder / "x.zarr").state_dict(-1), loaded.state_dict(-1)
    )


def test_a_threshold_survives_loading(folder: Path) -> None:
    cmd = CMD(threshold=0.4).fit(recorded(folder), out=folder / "x.zarr")
    loaded = CMD.load(folder / "x.zarr")
    assert loaded.threshold == 0.4 and loaded.n_modes_ == cmd.n_modes_ > 1
    assert repr(loaded) == "CMD(threshold=0.4, n_samples=1000, fitted)"
    corr = np.abs(np.corrcoef(loaded.sample_.astype(np.float64)))
    for m in range(loaded.n_modes_):
        mine = np.flatnonzero(loaded.sample_labels_ == m)
        assert corr[np.ix_(mine, mine)].min() >= 1 - 0.4 - 1e-9


# ---- what it says -------------------------------------------------------------------------------------


def test_the_summary_shows_modes_sizes_errors_bytes_and_speed(base: Path) -> None:
    cmd = CMD(n_modes=4).fit(recorded(base))
    metrics, lines = cmd.metrics_, cmd.summary(quality=False).splitlines()
    n = metrics["n_rows"]
    assert lines[0] == f"CMD  4 modes, {n} parameters x 6 snapshots, {metrics['n_samples']} rows sampled"
    for m, line in enumerate(lines[2:6]):
        size = metrics["mode_sizes"][m]
        assert line.split()[:4] == [str(m), str(size), f"{100 * size / n:.2f}", "%"]
        assert line.split()[4] == f"{metrics['mode_quantiles'][m][2]:.4f}"
        where = cmd.result.frame.map.locate(int(cmd.reference_rows_[m]))
        assert line.endswith(where)
    assert lines[6].startswith(f"mean |corr| {metrics['mean_abs_correlation']:.4f}   R^2 {metrics['r2']:.4f}")
    assert f"constant {metrics['n_constant']} rows" in lines[7] and "buffers apart 34 rows" in lines[7]
    assert lines[-1].startswith("pass ") and lines[-1].endswith(f"{metrics['implementation']} on cpu")
    assert cmd.summary().splitlines() == [*lines, *cmd.quality().words.splitlines()]
    assert "pass" not in CMD.load(base / "all.cmd.zarr").summary()


def test_metrics_have_these_keys(base: Path) -> None:
    found = {
        "n_modes", "n_samples", "n_rows", "n_buffer_rows", "n_constant", "n_nonfinite",
        "n_below_quantisation", "mode_sizes", "mean_abs_correlation", "r2", "r2_energy", "weight_mse",
        "mode_quantiles", "fraction_below",
        "result_bytes", "trajectory_bytes",
    }  # fmt: skip
    assert set(CMD.load(base / "all.cmd.zarr").metrics_) == found
    ran = {"device", "implementation", "rows_per_block", "blocks_total", "units_total", "units_resumed",
           "bytes_read", "bytes_per_s", "planned_bytes", "stage_s"}  # fmt: skip
    metrics = CMD(n_modes=4).fit(recorded(base)).metrics_
    assert set(metrics) == found | ran
    assert set(metrics["stage_s"]) == {"sample", "cluster", "pass", "finish"}
    map_ = recorded(base).parameters
    assert metrics["n_rows"] == map_.n_rows_of("parameter") and metrics["n_buffer_rows"] == 34
    assert metrics["trajectory_bytes"] == map_.n_rows * 6 * 4
    assert metrics["result_bytes"] == 14 * map_.n_rows + 4 * 4 * 6
    assert metrics["bytes_read"] == -(-map_.n_rows // 256) * 256 * 6 * 4


def test_buffers_have_metrics_of_their_own(base: Path, tmp_path: Path) -> None:
    """Those that a fit of the same rows as parameters would have; without buffers nothing is counted."""
    cmd, traj = CMD.load(base / "all.cmd.zarr"), recorded(base)
    found = cmd.buffer_metrics_
    rows = np.concatenate(
        [np.arange(p.row, p.stop) for t in traj.parameters if t.kind == "buffer" for p in t.pieces]
    )
    mode, correlation = np.asarray(cmd.labels_)[rows], np.asarray(cmd.correlation_)[rows].astype(np.float64)
    W = traj.read_rows(rows).astype(np.float64)
    ss = ((W - W.mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
    rss = ss * (1 - correlation**2)
    assert found["n_rows"] == len(rows) == cmd.metrics_["n_buffer_rows"] == 34
    assert found["mode_sizes"] == [int(np.sum(mode == m)) for m in range(4)]
    assert (found["n_constant"], found["n_nonfinite"]) == (int(np.sum(mode == -1)), 0)
    assert found["mean_abs_correlation"] == pytest.approx(np.abs(correlation).mean(), rel=1e-6)
    assert found["r2"] == pytest.approx((correlation**2).mean(), rel=1e-6)
    assert found["r2_energy"] == pytest.approx(1 - rss.sum() / ss.sum(), rel=1e-5)
    assert found["weight_mse"] == pytest.approx(rss.sum() / W.size, rel=1e-4)
    assert set(found) == set(cmd.metrics_) - {
        *("n_modes", "n_samples", "n_buffer_rows", "mode_quantiles", "fraction_below"),
        *("result_bytes", "trajectory_bytes"),
    }
    none = CMD(n_modes=2).fit(walks(50, 4)).buffer_metrics_
    assert none["n_rows"] == 0 and none["mode_sizes"] == [0, 0] and np.isnan(none["r2"])


def test_shares_name_every_tensor_once(base: Path) -> None:
    cmd = CMD.load(base / "all.cmd.zarr")
    shares = cmd.tensor_shares_
    assert list(shares) == [tensor.name for tensor in recorded(base).parameters]
    labels = np.asarray(cmd.labels_)
    for tensor in recorded(base).parameters:
        rows = [labels[piece.row : piece.stop] for piece in tensor.pieces]
        mine = np.concatenate([*rows, labels[:0]])
        assert shares[tensor.name] == [int(np.sum(mine == m)) for m in range(-2, 4)], tensor.name


def test_before_a_fit_there_is_nothing_to_ask() -> None:
    cmd = CMD()
    asks = [lambda: cmd.labels_, lambda: cmd.metrics_, lambda: cmd.summary(), lambda: cmd.state_dict(0)]
    for ask in [*asks, lambda: cmd.export("x.pt"), lambda: cmd.load_into(Net(), 0)]:
        with pytest.raises(UsageError, match="this CMD is not fitted; call fit"):
            ask()
    assert repr(cmd) == "CMD(n_modes=10, n_samples=1000, not fitted)"
    assert cmd.trajectory is None


def test_the_trajectory_of_a_fit_is_what_was_given_and_is_found_again(base: Path) -> None:
    given = recorded(base).sel(stride=2)
    assert CMD(2).fit(given).trajectory is given
    found = CMD.load(base / "late.cmd.zarr").trajectory
    assert found is not None and found.steps.tolist() == list(STEPS[2:])


# ---- what it takes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"n_modes": 0}, "0 modes"),
        ({"n_modes": -1}, "-1 modes"),
        ({"n_modes": 40_000}, "40000 modes"),
        ({"threshold": -0.1}, "a threshold of -0.1"),
        ({"threshold": float("nan")}, "a threshold of nan"),
        ({"n_samples": 0}, "a sample of 0 rows"),
        ({"random_state": -1}, "a random_state of -1"),
        ({"sampling": "layers"}, "no sampling named 'layers'; have: layer-balanced, uniform"),
        ({"affinity": "corr"}, "no affinity named 'corr'; have: abs-corr, corr-profile"),
    ],
)
def test_settings_that_cannot_be_are_refused_when_they_are_given(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        CMD(**settings)


@pytest.mark.parametrize("limit", ["lots", "", "-3", 0, "0GiB", "1.5.2GB"])
def test_a_limit_that_is_no_size_is_refused(limit: int | str) -> None:
    with pytest.raises(UsageError, match=r"no number of bytes|leaves nothing"):
        CMD(n_modes=2).fit(walks(20, 4), memory_limit=limit)


@pytest.mark.parametrize(
    ("device", "kind"), [("abacus", UsageError), ("meta", UsageError), ("cuda:99", CmdgpuError)]
)
def test_a_device_that_is_not_there_is_refused(device: str, kind: type[CmdgpuError]) -> None:
    with pytest.raises(CmdgpuError, match=device) as refused:
        CMD(n_modes=2, device=device).fit(walks(20, 4))
    assert type(refused.value) is kind


def test_anything_with_a_shape_that_can_be_sliced_is_fitted_alike(tmp_path: Path) -> None:
    dask_array = pytest.importorskip("dask.array")
    W = planted(700, 9, noise=0.2)
    np.save(tmp_path / "w.npy", W)
    stored = cast(Any, zarr).create_array(
        str(tmp_path / "plain.zarr"), shape=W.shape, dtype="f4", chunks=(100, 9)
    )
    stored[:] = W
    forms: dict[str, Any] = {
        "numpy": W,
        "numpy, column-major": np.asfortranarray(W),
        "torch": torch.as_tensor(W),
        "torch parameter": nn.Parameter(torch.as_tensor(W)),
        "memmap": np.load(tmp_path / "w.npy", mmap_mode="r"),
        "zarr": stored,
        "dask": dask_array.from_array(W, chunks=(64, 5)),
        "trajectory": Trajectory.from_array(W),
        "store": write_store(tmp_path / "s.zarr", W, rows=1024),
    }
    expected = row_bits(CMD(n_modes=3, n_samples=100).fit(W))
    for what, form in forms.items():
        assert row_bits(CMD(n_modes=3, n_samples=100).fit(form)) == expected, what


def test_low_precision_arrays_are_fitted_as_they_are() -> None:
    W = planted(500, 9, noise=0.2)
    for dtype in (torch.float16, torch.bfloat16):
        low = torch.as_tensor(W).to(dtype)
        check_equals_definition(CMD(n_modes=3, n_samples=100).fit(low), low.float().numpy())
    half = W.astype(np.float16)
    check_equals_definition(CMD(n_modes=3, n_samples=100).fit(half), half.astype(np.float32))


def test_float64_is_rounded_and_says_so() -> None:
    W = planted(300, 9).astype(np.float64)
    with pytest.warns(CmdgpuWarning, match="float64 rows are rounded to float32"):
        cmd = CMD(n_modes=3, n_samples=100).fit(W)
    assert row_bits(cmd) == row_bits(CMD(n_modes=3, n_samples=100).fit(W.astype(np.float32)))


@pytest.mark.parametrize(
    ("thing", "said"),
    [
        ([[1.0, 2.0]], r"an array of shape \[\] is no trajectory"),
        (np.zeros(5, np.float32), r"an array of shape \[5\]"),
        (np.zeros((5, 2, 2), np.float32), r"an array of shape \[5, 2, 2\]"),
        (np.zeros((5, 4), np.int64), "an array of int64"),
        (np.zeros((5, 4), np.complex64), "an array of complex64"),
        (np.zeros((5, 0), np.float32), "5 rows and 0 snapshots are nothing to fit"),
        (np.zeros((0, 5), np.float32), "0 rows and 5 snapshots are nothing to fit"),
    ],
)
def test_what_is_no_trajectory_is_refused(thing: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        CMD().fit(thing)


def test_a_store_without_a_snapshot_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    source = write_store(tmp_path / "s.zarr", np.empty((300, 0), np.float32))
    with pytest.raises(UsageError, match=r"s\.zarr: 300 rows and 0 snapshots are nothing to fit"):
        CMD().fit(source, out=tmp_path / "out.zarr")
    assert [p.name for p in tmp_path.iterdir()] == ["s.zarr"]


# ---- settings do what they say ----------------------------------------------------------------------------


def test_the_seed_chooses_the_sample_and_nothing_else_does(tmp_path: Path) -> None:
    W = walks(3000, 6)
    stores = [
        write_store(tmp_path / f"{sketch}.zarr", W, rows=1024, sketch=sketch) for sketch in (True, False)
    ]
    rows = [
        CMD(n_modes=3, n_samples=100, random_state=seed).fit(source).sample_rows_
        for seed in (0, 1)
        for source in (*stores, W)
    ]
    assert all(np.array_equal(rows[0], other) for other in rows[:3])
    assert all(np.array_equal(rows[3], other) for other in rows[3:])
    assert not np.array_equal(rows[0], rows[3])


def test_a_second_fit_replaces_the_first_and_a_failed_one_does_not(base: Path, folder: Path) -> None:
    cmd = CMD(n_modes=4).fit(recorded(base))
    before = fit_bits(cmd)
    with pytest.raises(StoreExists):
        cmd.fit(recorded(base).sel(stride=2), out=base / "all.cmd.zarr")
    assert fit_bits(cmd) == before
    check_same_bits(cmd.state_dict(10), CMD(n_modes=4).fit(recorded(base)).state_dict(10))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CmdgpuWarning)
        cmd.fit(walks(50, 4))
    assert cmd.a_.shape == (50,) and cmd.steps_.tolist() == [0, 1, 2, 3]


def test_the_trajectory_is_neither_written_nor_locked(folder: Path) -> None:
    run = folder / "run.zarr"
    with Recorder(run):
        before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
        cmd = CMD(n_modes=4).fit(Trajectory.open(run), out=folder / "x.zarr")
        assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert fit_bits(cmd) == fit_bits(CMD.load(folder / "all.cmd.zarr"))


def test_a_fit_while_recording_sees_what_was_committed_when_it_opened(tmp_path: Path) -> None:
    model = model_at(0)
    with Recorder(tmp_path / "run.zarr") as recorder:
        for step in STEPS[:4]:
            train(model, step)
            recorder.record(model, step)
        recorder.flush()
        traj = Trajectory.open(tmp_path / "run.zarr")
        train(model, STEPS[4])
        recorder.record(model, STEPS[4])
        recorder.flush()
        cmd = CMD(n_modes=3).fit(traj)
    assert cmd.steps_.tolist() == list(STEPS[:4])
    alone = CMD(n_modes=3).fit(Trajectory.open(tmp_path / "run.zarr").sel(stop=4))
    assert fit_bits(alone) == fit_bits(cmd)
