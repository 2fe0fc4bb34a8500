"""Laws of a selection: a network of a store is fitted, read and loaded as if it were alone, in its rows."""

# torch leaves the types of many methods open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from cmdgpu.decomposition import CMD
from cmdgpu.errors import CmdgpuWarning, ModelMismatch, StoreCorrupt, StoreExists, UsageError
from cmdgpu.notation import UNWRITTEN, AnyArray
from cmdgpu.recording import Recorder
from cmdgpu.results import describe_result, verify_result
from cmdgpu.store import format as fmt
from cmdgpu.store.parameter_map import ParameterMap, whole
from cmdgpu.trajectory import Trajectory
from tests.harness import planted, run_cli, write_store
from tests.verbs import bits, check_same_bits, edit_document, flip_bit, float_tensors

STEPS = (0, 10, 25, 40, 45, 60)
T = len(STEPS)
ROW_ARRAYS = ("labels_", "a_", "b_", "correlation_")


class Network(nn.Module):
    """Tied names and buffers; its first tensor spans two units."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.body = nn.Linear(16, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = Network(30)
        self.discriminator = Network(11)
        self.balance = nn.Parameter(torch.tensor(0.5))


def set_to(model: nn.Module, step: int) -> None:
    """The values of a step: every network's follow from the network alone."""
    with torch.no_grad():
        for i, tensor in enumerate(float_tensors(model).values()):
            a, b, noise = torch.randn(3, *tensor.shape, generator=torch.Generator().manual_seed(i))
            curve = np.sin(step / 20) * a.sign() if i % 2 else step / 20
            tensor.copy_(a * curve + b + 0.02 * noise * np.cos(step))


def pair_at(step: int) -> Pair:
    pair = Pair()
    set_to(pair.generator, step)
    set_to(pair.discriminator, step + 3)
    return pair


def record(path: Path, at: Any) -> Trajectory:
    with Recorder(path, rows_per_chunk=256) as recorder:
        for step in STEPS:
            recorder.record(at(step), step)
    return Trajectory.open(path)


def generator_at(step: int) -> Network:
    network = Network(30)
    set_to(network, step)
    return network


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pair.zarr, both networks; g.cmd.zarr, a fit of the generator."""
    folder = tmp_path_factory.mktemp("pair")
    pair = record(folder / "pair.zarr", pair_at)
    CMD(n_modes=3, n_samples=200).fit(pair.sel(params=r"^generator\."), out=folder / "g.cmd.zarr")
    return folder


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(base, tmp_path / "copy"))


def of_generator(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith("generator.")}


def assert_has_running_var(cmd: CMD) -> None:
    """A buffer verbatim, which only the trajectory knows."""
    name = "generator.norm.running_var"
    check_same_bits(cmd.state_dict(25, params=name), {name: float_tensors(pair_at(25))[name]})


# ---- fits -----------------------------------------------------------------------------------------------

G, D = 512, 700
"""Rows of two networks, of which the first ends where a unit of 256 rows does."""


def planted_pair(path: Path, **how: Any) -> tuple[Trajectory, AnyArray]:
    tensors = [("g.w", (300,)), ("g.b", (212,)), ("d.w", (20, 30)), ("d.b", (100,))]
    layout = ParameterMap(whole([(name, "parameter", "float32", shape) for name, shape in tensors]))
    W = planted(G + D, T, 4, noise=0.3)
    return write_store(path, W, layout=layout, **how), W


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "zstd"])
def test_a_network_fitted_from_a_store_of_two_is_the_network_fitted_from_its_own(
    tmp_path: Path, compressed: bool
) -> None:
    """Bit for bit where its units are the same, and of the other network nothing is read or written."""
    both, W = planted_pair(tmp_path / "both.zarr", compressed=compressed)
    layout = ParameterMap(whole([(t.name, t.kind, t.dtype, t.shape) for t in both.parameters.tensors[2:]]))
    own = write_store(tmp_path / "own.zarr", W[G:], layout=layout, compressed=compressed)
    for file in (tmp_path / "both.zarr" / "weights").glob("c.[01].*"):
        flip_bit(file, 99)  # whoever reads it, and every reader checks, is told
    alone = CMD(n_modes=3, n_samples=100).fit(own, out=tmp_path / "own.cmd.zarr")
    cmd = CMD(n_modes=3, n_samples=100).fit(both.sel(params=r"^d\."), out=tmp_path / "d.cmd.zarr")
    assert cmd.metrics_["bytes_read"] == alone.metrics_["bytes_read"] == 3 * 256 * T * 4
    cmd = CMD.load(tmp_path / "d.cmd.zarr")
    assert np.array_equal(cmd.references_, alone.references_)
    assert np.array_equal(cmd.reference_rows_, alone.reference_rows_ + G)
    for name in ROW_ARRAYS:
        found, expected = np.asarray(getattr(cmd, name)), np.asarray(getattr(alone, name))
        assert found.shape == (G + D,) and found[G:].tobytes() == expected.tobytes(), name
        assert np.array_equal(getattr(cmd, name)[G - 1 : G + 1], found[G - 1 : G + 1], equal_nan=True)
        assert (found[:G] == UNWRITTEN).all() if name == "labels_" else np.isnan(found[:G]).all()
    bytes_of = ("result_bytes", "stage_s")
    assert cmd.metrics_ == {
        **{key: alone.metrics_[key] for key in cmd.metrics_ if key not in bytes_of},
        "result_bytes": cmd.metrics_["result_bytes"],
    }
    assert verify_result(tmp_path / "d.cmd.zarr").damaged == []
    assert sorted(file.name for file in (tmp_path / "d.cmd.zarr" / "mode").glob("c.*")) == [
        "c.2", "c.3", "c.4"
    ]  # fmt: skip
    in_memory = CMD(n_modes=3, n_samples=100).fit(both.sel(params=r"^d\."))
    for name in ROW_ARRAYS:
        assert np.asarray(getattr(in_memory, name)).tobytes() == np.asarray(getattr(cmd, name)).tobytes()
    with pytest.raises(StoreCorrupt, match=r"c\.0\.0"):
        CMD(n_modes=3, n_samples=100).fit(both)


def test_where_networks_share_units_a_fit_is_the_same_but_for_rounding(base: Path, tmp_path: Path) -> None:
    """Its buffers lie behind those of nobody when it is alone, and behind the other network here."""
    cmd = CMD.load(base / "g.cmd.zarr")
    alone = CMD(n_modes=3, n_samples=200).fit(record(tmp_path / "g.zarr", generator_at))
    assert np.allclose(cmd.references_, alone.references_)
    where = {name: cmd.result.frame.map[f"generator.{name}"] for name in ("body.weight", "norm.running_var")}
    for name, entry in where.items():
        mine, theirs = entry.pieces[0], alone.result.frame.map[name].pieces[0]
        here, there = slice(mine.row, mine.stop), slice(theirs.row, theirs.stop)
        assert np.array_equal(cmd.labels_[here], alone.labels_[there])
        for rows in ROW_ARRAYS[1:]:
            assert np.allclose(getattr(cmd, rows)[here], getattr(alone, rows)[there], atol=1e-6), rows
    metrics = ("mode_sizes", "n_rows", "n_buffer_rows", "n_samples", "trajectory_bytes")
    assert {key: cmd.metrics_[key] for key in metrics} == {key: alone.metrics_[key] for key in metrics}
    assert set(cmd.tensor_shares_) == {f"generator.{name}" for name in alone.tensor_shares_}


def test_a_fit_of_other_tensors_is_refused_by_their_patterns_and_one_of_the_same_is_opened(
    folder: Path,
) -> None:
    pair, out = Trajectory.open(folder / "pair.zarr"), folder / "g.cmd.zarr"

    def fit(**selection: Any) -> CMD:
        return CMD(n_modes=3, n_samples=200).fit(pair.sel(**selection), out=out)

    with pytest.raises(StoreExists, match=r"params: \^generator\\\. there, discrim and embed asked"):
        CMD(n_modes=3, n_samples=200).fit(pair.sel(params="discrim").sel(params=["embed"]), out=out)
    with pytest.raises(StoreExists, match=r"params: \^generator\\\. there, all tensors asked"):
        fit()
    with pytest.raises(StoreExists, match="config n_modes: 3 there, 4 asked"):
        CMD(n_modes=4, n_samples=200).fit(pair.sel(params="generator"), out=out)
    for same in (["gen", "generator.norm"], r"erator"):
        assert fit(params=same).metrics_["blocks_total"] == 0
    everything = folder / "all.cmd.zarr"
    CMD(n_modes=3, n_samples=200).fit(pair, out=everything)
    again = CMD(n_modes=3, n_samples=200).fit(pair.sel(params="."), out=everything)
    assert again.metrics_["blocks_total"] == 0, "a selection of all tensors is none"


@pytest.mark.parametrize("buffers", ["fit", "skip"])
def test_tensors_without_a_row_to_fit_are_nothing_to_fit(base: Path, buffers: Any) -> None:
    pair = Trajectory.open(base / "pair.zarr").sel(params="running_mean")
    if buffers == "skip":
        with pytest.raises(UsageError, match="0 rows and 6 snapshots are nothing to fit"):
            CMD().fit(pair, buffers="skip")
    else:
        with pytest.warns(CmdgpuWarning, match="none of the 0 sampled rows moves"):
            assert CMD().fit(pair).metrics_["n_buffer_rows"] == 41


# ---- the way back ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["result", "trajectory"])
def test_a_selection_gives_its_own_tensors_and_touches_no_others(folder: Path, what: str) -> None:
    rebuilt = what == "result"
    traj = Trajectory.open(folder / "pair.zarr").sel(params="^generator")
    origin = CMD.load(folder / "g.cmd.zarr") if rebuilt else traj
    recorded = of_generator(float_tensors(pair_at(40)))
    state = origin.state_dict(40)
    assert sorted(state) == sorted(recorded), "the tied name and the buffers are among them"
    assert state["generator.head.weight"] is state["generator.embed.weight"]
    verbatim = recorded if not rebuilt else {n: t for n, t in recorded.items() if "running" in n}
    check_same_bits({name: state[name] for name in verbatim}, verbatim)
    some = origin.state_dict(40, params="running")
    check_same_bits(some, {name: t for name, t in state.items() if "running" in name})
    with pytest.raises(UsageError, match=r"no tensor matches 'discriminator'; have: generator\.embed"):
        origin.state_dict(40, params="discriminator")
    for file in ("x.pt", "x.safetensors"):
        told = origin.export(folder / file, 40)
        assert (told.n_tensors, told.left_out) == (7, ())
    check_same_bits(cast(dict[str, Tensor], torch.load(folder / "x.pt", weights_only=True)), state)
    once = safetensors.torch.load_file(folder / "x.safetensors")
    check_same_bits(once, {name: state[name] for name in once})
    assert len(once) == 7, "the format has no tied names"
    model = pair_at(3)
    before = {name: bits(tensor) for name, tensor in model.state_dict().items()}
    if rebuilt:
        with pytest.warns(CmdgpuWarning, match="running statistics"):
            origin.load_into(model, 40)
    else:
        origin.load_into(model, 40)
    check_same_bits(of_generator(float_tensors(model)), state)
    for name, tensor in model.state_dict().items():
        assert name in state or bits(tensor) == before[name], f"'{name}' was not selected"


def test_a_model_is_held_against_what_is_selected(base: Path) -> None:
    """Another discriminator does not matter to a fit of the generator; another generator does."""
    cmd = CMD.load(base / "g.cmd.zarr")
    model = pair_at(0)
    model.discriminator = Network(5)
    with pytest.warns(CmdgpuWarning, match="running statistics"):
        cmd.load_into(model, 40)
    model.generator = Network(29)
    with pytest.raises(ModelMismatch, match=r"generator\.body"):
        cmd.load_into(model, 40)


def test_a_loaded_result_finds_its_trajectory_and_selects_the_same_tensors(folder: Path) -> None:
    cmd = CMD.load(folder / "g.cmd.zarr")
    assert_has_running_var(cmd)
    found = vars(cmd)["_trajectory"]
    assert isinstance(found, Trajectory) and found.params == (r"^generator\.",)
    assert found.parameters == Trajectory.open(folder / "pair.zarr").sel(params="^generator").parameters
    assert describe_result(folder / "g.cmd.zarr").params == (r"^generator\.",)
    early = Trajectory.open(folder / "pair.zarr").sel(stop=4, params="generator")
    CMD(n_modes=2, n_samples=200).fit(early, out=folder / "early.cmd.zarr", buffers="skip")
    late = CMD.load(folder / "early.cmd.zarr").state_dict(60)
    assert not [name for name in late if "running" in name] and len(late) == 6, "60 was recorded, not fitted"


# ---- what is selected -----------------------------------------------------------------------------------


def test_rows_keep_their_numbers_and_those_of_others_are_nan_and_not_read(tmp_path: Path) -> None:
    traj, W = planted_pair(tmp_path / "both.zarr", sketch=False)
    for file in (tmp_path / "both.zarr" / "weights").glob("c.[01].*"):
        flip_bit(file, 99)
    d = traj.sel(params=r"^d\.").sel(start=1)
    assert d.shape == (G + D, T - 1) and d.parameters.n_live == D
    assert repr(d).startswith(f"Trajectory({D} of {G + D} rows x {T - 1} snapshots")
    assert np.array_equal(d[G:, :], W[G:, 1:])
    mixed = np.array([G + 5, 0, G - 1, G, G + 5])
    expected = np.where(mixed[:, None] < G, np.nan, W[mixed, 1:])
    assert np.array_equal(d[mixed, :], expected, equal_nan=True)
    assert np.isnan(d[:G, -1]).all()
    column = d.column(-1).read(0, G + D)
    assert np.isnan(column[:G]).all() and np.array_equal(column[G:], W[G:, -1])
    assert np.array_equal(d.state_dict(0)["d.b"].numpy(), W[-100:, 0]), "any recorded step"
    assert np.isnan(d.column(0).read(0, G)).all()


def test_selections_narrow_one_another_and_aliases_count(base: Path) -> None:
    pair = Trajectory.open(base / "pair.zarr")

    def names(traj: Trajectory) -> list[str]:
        return [tensor.name for tensor in traj.parameters]

    twice = pair.sel(params="^generator").sel(start=2, params=["weight", "bias"])
    assert names(twice) == [
        f"generator.{name}"
        for name in ("embed.weight", "body.weight", "body.bias", "norm.weight", "norm.bias")
    ]
    assert (twice.params, twice.steps.tolist()) == (("^generator", "weight|bias"), list(STEPS[2:]))
    assert twice.sel(params="generator").params == twice.params, "what leaves nothing out is no selection"
    head = pair.sel(params=r"discriminator\.head")
    assert names(head) == ["discriminator.embed.weight"], "found under its other name"
    assert head.parameters.aliases == {"discriminator.head.weight": "discriminator.embed.weight"}
    skipped = dict(head.parameters.skipped)
    assert skipped["generator.head.weight"] == skipped["balance"] == "not selected"
    assert skipped["generator.norm.num_batches_tracked"] == "int64 has no rows"
    assert pair.sel(params=None).parameters is pair.sel(params=[]).parameters is pair.parameters
    networks = pair.parameters.modules()
    assert sorted(networks) == ["balance", "discriminator", "generator"]
    found = [n for name in networks for n in names(pair.sel(params=rf"^{re.escape(name)}(\.|$)"))]
    assert sorted(found) == sorted(names(pair)), "every tensor is in one module"


def test_a_selection_of_nothing_names_what_there_is(base: Path, tmp_path: Path) -> None:
    pair = Trajectory.open(base / "pair.zarr")
    with pytest.raises(UsageError, match=r"no tensor matches 'encoder'; have: balance, .*, \.\.\."):
        pair.sel(params="encoder")
    with pytest.raises(UsageError, match=r"no tensor matches 'discr'; have: generator\.body\.bias$"):
        pair.sel(params=r"generator\.body\.bias").sel(params="discr")
    with pytest.raises(UsageError, match="is no regular expression"):
        pair.sel(params="(")
    layout = ParameterMap(whole([("\x1b[31mw", "parameter", "float32", (300,))]))
    odd = write_store(tmp_path / "odd.zarr", planted(300, 3), layout=layout)
    with pytest.raises(UsageError) as refused:
        odd.sel(params="x{3}")
    assert str(refused.value).isprintable()


# ---- words of a file ------------------------------------------------------------------------------------


def test_patterns_of_a_result_are_shown_and_never_run(folder: Path) -> None:
    out = folder / "g.cmd.zarr"

    def say(params: object) -> None:
        def put(document: dict[str, Any]) -> None:
            document["attributes"]["cmdgpu"]["params"] = params

        edit_document(out / fmt.DOCUMENT, put)

    say(["(a+)+$ and ("])
    assert_has_running_var(CMD.load(out))
    for bad in ([], None, "x", ["\x1b[2J"], [3], ["x" * 5000], ["x"] * 65):
        say(bad)
        with pytest.raises(StoreCorrupt, match="params"):
            CMD.load(out)


def test_a_result_whose_rows_are_not_those_of_the_store_has_no_trajectory(folder: Path) -> None:
    """Otherwise its buffers would be looked for in rows that are not there."""

    def move(document: dict[str, Any]) -> None:
        layout = document["attributes"]["cmdgpu"]["layout"]
        for tensor in layout["tensors"]:
            if tensor["name"] == "generator.norm.running_var":
                tensor["name"] = "generator.norm.running_vax"

    edit_document(folder / "g.cmd.zarr" / fmt.DOCUMENT, move)
    with pytest.warns(CmdgpuWarning, match="out of reach"):
        CMD.load(folder / "g.cmd.zarr").state_dict(25)


def test_what_a_program_chose_by_many_long_patterns_is_told_in_short(tmp_path: Path) -> None:
    traj, _ = planted_pair(tmp_path / "both.zarr")
    names = [f"^d\\.w$ # {'x' * 300}\t", r"^d\.b$"]
    cmd = CMD(n_modes=2, n_samples=50).fit(traj.sel(params="d").sel(params=names), out=tmp_path / "out.zarr")
    (first, second) = describe_result(tmp_path / "out.zarr").params
    assert first == "d" and second.isprintable() and len(second) < 300
    assert [t.name for t in cmd.result.frame.map] == ["d.b"]


def test_inspect_says_what_is_selected(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    ended = run_cli("inspect", "pair.zarr", "--params", r"^generator\.", "--params", "balance", "--tensors")
    for part in ("  modules: balance, generator\n", "tensors are not selected", "generator.body.weight"):
        assert part in ended.out, part
    assert "discriminator" not in ended.out.replace("discriminator.norm.num_batches_tracked", "")
    said = run_cli("inspect", "pair.zarr", "--params", "running", "--json").json
    assert (said["n_parameters"], said["n_buffers"], said["n_tensors"]) == (0, 82, 4)
    said = run_cli("inspect", "g.cmd.zarr", "--json").json
    assert said["params"] == [r"^generator\."] and said["units_total"] == said["units_done"] == 5
    assert r"only tensors that match ^generator\.: 7 of them" in run_cli("inspect", "g.cmd.zarr").out
    refused = run_cli("inspect", "pair.zarr", "--params", "encoder")
    assert refused.code == 2 and "no tensor matches ['encoder']; have: balance" in refused.err
