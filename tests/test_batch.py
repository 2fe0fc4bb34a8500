"""Laws of a grid: every fit has the bytes of one of its own, every chunk is read once, nothing is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmdgpu import ops
from cmdgpu.batch import GridFit, Selection, fit_grid
from cmdgpu.cli.steps import parse_numbers
from cmdgpu.decomposition import CMD
from cmdgpu.errors import CmdgpuWarning, MemoryLimitError, StoreCorrupt, UsageError
from cmdgpu.memory import show_bytes
from cmdgpu.store.parameter_map import ParameterMap, whole
from cmdgpu.trajectory import Trajectory
from tests.harness import StopAfter, Stopped, chunks_read, planted, run_cli, write_store
from tests.verbs import flip_bit, tree_bytes

ROWS = 256
T = 8
NETWORKS = ParameterMap(
    whole(
        [
            ("generator.weight", "parameter", "float32", (30, 20)),
            ("mapping.weight", "parameter", "float32", (540,)),
            ("mapping.bias", "parameter", "float32", (60,)),
        ]
    )
)
GRID: dict[str, Any] = {"n_modes": (2, 4), "seeds": (0, 1), "n_samples": 60}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stores of five units."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("a", "b")):
        write_store(folder / f"{name}.zarr", planted(1200, T, 3, seed=seed, noise=0.4), layout=NETWORKS)
    return folder


def alone(store: Path, out: Path, modes: int, seed: int, **options: Any) -> CMD:
    cmd = CMD(n_modes=modes, n_samples=60, random_state=seed)
    return cmd.fit(Trajectory.open(store), out=out, **options)


def test_every_fit_of_a_grid_has_the_bytes_of_a_fit_of_its_own(runs: Path, tmp_path: Path) -> None:
    stores = [runs / "a.zarr", runs / "b.zarr"]
    fits = fit_grid(stores, tmp_path / "grid", **GRID)
    assert [fit.out.name for fit in fits[:2]] == [f"a.m2.s{seed}.cmd.zarr" for seed in range(2)]
    assert len(fits) == 8 and not any(fit.error for fit in fits)
    for fit in fits:
        assert isinstance(fit.store, Path)
        cmd = alone(fit.store, tmp_path / "alone" / fit.out.name, fit.cmd.n_modes, fit.seed)
        assert tree_bytes(tmp_path / "grid" / fit.out.name) == tree_bytes(tmp_path / "alone" / fit.out.name)
        assert {**fit.cmd.result.metrics} == {**cmd.result.metrics}


@pytest.mark.parametrize("route", ["direct", "slots"])
def test_every_chunk_is_read_once_for_all_fits_of_a_store(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    if route == "direct" and not ops.can_fit_files("float32", T, 4):
        pytest.skip("no compiled kernel that reads files")
    if route == "slots":
        monkeypatch.setattr("cmdgpu.streaming.engine.threads_for", lambda *_: 0)  # pyright: ignore
    read = chunks_read(monkeypatch)
    fits = fit_grid([runs / "a.zarr"], tmp_path, **GRID)
    assert sorted(read) == sorted(f"c.{i}.{t}" for i in range(5) for t in range(T))
    assert {fit.cmd.metrics_["bytes_read"] for fit in fits} == {5 * ROWS * T * 4}


def test_a_grid_goes_on_where_it_stopped_and_a_larger_one_adds_what_is_new(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cmdgpu.streaming.plan.TARGET_BLOCK_BYTES", 1)
    store = runs / "a.zarr"
    fit_grid([store], tmp_path, n_modes=(2,), seeds=(0,), n_samples=60)
    with pytest.raises(Stopped):
        fit_grid([store], tmp_path, progress=StopAfter(3), **GRID)
    fits = {fit.out.name: fit for fit in fit_grid([store], tmp_path, **GRID)}
    resumed = {name: fit.cmd.metrics_["units_resumed"] for name, fit in fits.items()}
    assert resumed.pop("a.m2.s0.cmd.zarr") == 5
    assert all(0 < units < 5 for units in resumed.values()), "nothing was left to resume"
    straight = tmp_path / "straight"
    fit_grid([store], straight, **GRID)
    for name in fits:
        assert tree_bytes(straight / name).keys() == tree_bytes(tmp_path / name).keys()
        assert np.array_equal(fits[name].cmd.labels_, CMD.load(straight / name).labels_)


def test_a_limit_that_one_pass_exceeds_reads_the_store_again_and_says_so(runs: Path, tmp_path: Path) -> None:
    traj = Trajectory.open(runs / "a.zarr")
    with pytest.raises(MemoryLimitError) as two:
        cmds = [CMD(n_modes=4, n_samples=60, random_state=seed) for seed in (0, 1)]
        CMD.fit_together(cmds, [traj] * 2, [tmp_path / "0", tmp_path / "1"], memory_limit="20MB")
    limit = two.value.needed_bytes
    with pytest.warns(CmdgpuWarning, match=r"4 fits of .*a\.zarr at once: it is read again for every 2"):
        fits = fit_grid([runs / "a.zarr"], tmp_path / "small", memory_limit=limit, **GRID)
    assert not any(fit.error for fit in fits)
    fit_grid([runs / "a.zarr"], tmp_path / "large", **GRID)
    for fit in fits:
        assert tree_bytes(tmp_path / "small" / fit.out.name) == tree_bytes(tmp_path / "large" / fit.out.name)
    (refused,) = fit_grid([runs / "a.zarr"], tmp_path / "none", memory_limit="1MB", n_samples=60)
    assert isinstance(refused.error, MemoryLimitError)


def test_a_damaged_store_fails_by_name_and_the_others_are_fitted(runs: Path, tmp_path: Path) -> None:
    write_store(tmp_path / "bad.zarr", planted(1200, T, 3), layout=NETWORKS)
    flip_bit(tmp_path / "bad.zarr" / "weights" / "c.3.2", 999)
    fits = fit_grid([tmp_path / "bad.zarr", runs / "b.zarr"], tmp_path / "fits", **GRID)
    errors = [fit.error for fit in fits]
    assert all(isinstance(error, StoreCorrupt) for error in errors[:4]) and errors[4:] == [None] * 4
    shown = run_cli("fit", tmp_path / "bad.zarr", runs / "b.zarr", "-o", tmp_path / "fits", "--modes", "2,4",
                    "--seeds", "0:2", "--samples", "60", "-q")  # fmt: skip
    assert shown.code == 1
    assert shown.out.count("crc32c mismatch") == 4 and "4 of 8 fits of 2 stores" in shown.out


def test_one_fit_for_each_network_is_that_of_its_selection(runs: Path, tmp_path: Path) -> None:
    fits = fit_grid([runs / "a.zarr"], tmp_path, n_modes=(3,), n_samples=60, per_module=True)
    assert [fit.out.name for fit in fits] == ["a.generator.m3.s0.cmd.zarr", "a.mapping.m3.s0.cmd.zarr"]
    for fit in fits:
        traj = Trajectory.open(runs / "a.zarr").sel(params=rf"^{fit.module}\.")
        own = CMD(n_modes=3, n_samples=60).fit(traj)
        labels = np.asarray(fit.cmd.labels_)
        assert np.array_equal(labels, np.asarray(own.labels_))
        assert np.count_nonzero(labels >= 0) == traj.parameters.n_live
        assert sorted(fit.cmd.state_dict(0)) == sorted(t.name for t in traj.parameters)


def test_networks_whose_names_no_file_can_have_are_told_apart(tmp_path: Path) -> None:
    names = ("netz ä", "netz ö", "a" * 90, "a" * 91)
    layout = ParameterMap(whole([(f"{name}.weight", "parameter", "float32", (64,)) for name in names]))
    write_store(tmp_path / "a.zarr", planted(256, T, 3), layout=layout)
    fits = fit_grid([tmp_path / "a.zarr"], tmp_path / "fits", n_modes=(2,), n_samples=60, per_module=True)
    assert [fit.module for fit in fits] == list(names) and not any(fit.error for fit in fits)
    files = [fit.out.name for fit in fits]
    assert len(set(files)) == 4 and all(file.isascii() and len(file) < 120 for file in files)
    assert [fit.cmd.metrics_["n_rows"] for fit in fits] == [64] * 4


def test_a_grid_of_no_fit_is_refused_and_a_store_is_named_by_its_folder(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothings: list[dict[str, Any]] = [{"seeds": ()}, {"n_modes": ()}]
    for nothing in nothings:
        with pytest.raises(UsageError, match=r"a\.zarr: no fit of it is asked for"):
            fit_grid([runs / "a.zarr"], tmp_path, **nothing)
    layout = ParameterMap(whole([("norm.running_mean", "buffer", "float32", (256,))]))
    write_store(tmp_path / "buffers.zarr", planted(256, T, 3), layout=layout)
    with pytest.raises(UsageError, match="tensors that are parameters"):
        fit_grid([tmp_path / "buffers.zarr"], tmp_path, per_module=True)
    with pytest.raises(UsageError, match="no fit"):
        CMD.fit_together([], [], [])
    monkeypatch.chdir(runs / "a.zarr")
    (fit,) = fit_grid(["."], tmp_path, n_modes=(2,), n_samples=60)
    assert fit.out.name == "a.m2.s0.cmd.zarr"


def test_selections_that_are_spelled_alike_have_samples_of_their_own(runs: Path, tmp_path: Path) -> None:
    every = Trajectory.open(runs / "a.zarr")
    # of two patterns the flag is for the first alone
    trajs = [
        every.sel(params=["(?i)GENERATOR", "MAPPING.BIAS"]),
        every.sel(params="(?i)GENERATOR|MAPPING.BIAS"),
    ]
    assert trajs[0].params == trajs[1].params
    cmds = [CMD(n_modes=2, n_samples=60) for _ in trajs]
    CMD.fit_together(cmds, trajs, [tmp_path / "0.cmd.zarr", tmp_path / "1.cmd.zarr"])
    for cmd, traj in zip(cmds, trajs, strict=True):
        own = CMD(n_modes=2, n_samples=60).fit(traj)
        assert np.array_equal(cmd.sample_rows_, own.sample_rows_)


def test_fits_hold_no_sample_and_read_it_where_they_lie(runs: Path, tmp_path: Path) -> None:
    fits = fit_grid([runs / "a.zarr"], tmp_path / "grid", **GRID)
    for fit in fits:
        assert not isinstance(fit.cmd.result.modes.sample, np.ndarray)
        own = CMD(fit.cmd.n_modes, n_samples=60, random_state=fit.seed).fit(Trajectory.open(runs / "a.zarr"))
        assert np.array_equal(fit.cmd.sample_, own.sample_) and fit.cmd.sample_.dtype == np.float32
    out = tmp_path / "grid" / fits[0].out.name
    flip_bit(out / "sample" / "c.0.0", 77)
    with pytest.raises(StoreCorrupt, match=r"sample.*crc32c mismatch"):
        _ = fits[0].cmd.sample_
    with pytest.raises(StoreCorrupt, match=r"sample.*crc32c mismatch"):
        CMD.load(out)


def test_a_grid_that_names_a_result_twice_is_refused_before_anything_is_read(
    runs: Path, tmp_path: Path
) -> None:
    (tmp_path / "x").mkdir()
    write_store(tmp_path / "x" / "a.zarr", planted(300, T, 3))
    fits = fit_grid([runs / "a.zarr", tmp_path / "x" / "a.zarr"], tmp_path / "fits", n_samples=60)
    assert [fit.out.name for fit in fits] == [f"{runs.name}-a.m10.s0.cmd.zarr", "x-a.m10.s0.cmd.zarr"]
    with pytest.raises(UsageError, match=r"a\.zarr would both be fitted to .*a\.m10\.s0\.cmd\.zarr"):
        fit_grid([runs / "a.zarr", runs / "a.zarr"], tmp_path / "twice", n_samples=60)
    assert not (tmp_path / "twice").exists()


def test_fits_of_one_pass_are_of_one_trajectory_at_the_same_snapshots(runs: Path, tmp_path: Path) -> None:
    traj, other = Trajectory.open(runs / "a.zarr"), Trajectory.open(runs / "b.zarr")
    cmds = [CMD(n_modes=2, n_samples=60) for _ in range(2)]
    outs = [tmp_path / "1.zarr", tmp_path / "2.zarr"]
    for second in (other, traj.sel(stride=2)):
        with pytest.raises(UsageError, match="one trajectory, at the same snapshots"):
            CMD.fit_together(cmds, [traj, second], outs)
    assert list(tmp_path.iterdir()) == []


def test_snapshots_are_selected_for_all_stores_alike(runs: Path, tmp_path: Path) -> None:
    fits = fit_grid([runs / "a.zarr", runs / "b.zarr"], tmp_path, selection=Selection(stride=2), n_samples=60)
    assert [fit.cmd.steps_.tolist() for fit in fits] == [list(range(0, T, 2))] * 2


def test_the_command_line_makes_one_table_and_one_object_of_a_grid(runs: Path, tmp_path: Path) -> None:
    asked = ("fit", runs / "a.zarr", runs / "b.zarr", "-o", tmp_path / "fits", "--samples", "60")
    shown = run_cli(*asked, "--modes", "2,4", "--seeds", "0:2", "-q")
    assert shown.code == 0, shown.err
    lines = shown.out.splitlines()
    assert lines[0].split()[:4] == ["result", "M", "modes", "seed"]
    assert [line.split()[0] for line in lines[1:9]] == [
        f"{name}.m{m}.s{seed}.cmd.zarr" for name in "ab" for m in (2, 4) for seed in (0, 1)
    ]
    assert "8 of 8 fits of 2 stores" in lines[9] and f"{show_bytes(2 * 5 * ROWS * T * 4)} read in" in lines[9]
    said = run_cli(*asked, "--modes", "2,4", "--seeds", "0:2", "-q", "--json").json
    assert (said["ok"], said["n_failed"], said["bytes_read"], len(said["fits"])) == (True, 0, 0, 8)
    first: dict[str, Any] = said["fits"][0]
    loaded = CMD.load(first["out"])
    assert first["r2"] == loaded.metrics_["r2"] and first["units_resumed"] == 5
    assert (first["modes"], first["seed"], first["module"]) == (2, 0, None)


def test_lists_of_numbers() -> None:
    assert parse_numbers("--modes", "2,5,10") == [2, 5, 10]
    assert parse_numbers("--seeds", "0:3,7") == [0, 1, 2, 7]
    for wrong in ("", "a", "3:3", "5:2", "1,,2", "-1", "1.5", "0:9999999999"):
        with pytest.raises(UsageError, match=r"--seeds .* is no list of numbers"):
            parse_numbers("--seeds", wrong)


def test_a_grid_is_a_list_of_what_was_asked(runs: Path, tmp_path: Path) -> None:
    fits: list[GridFit] = fit_grid([runs / "a.zarr"], tmp_path, threshold=0.3, seeds=(5,), n_samples=60)
    assert [fit.out.name for fit in fits] == ["a.t0.3.s5.cmd.zarr"]
    assert fits[0].cmd.threshold == 0.3 and fits[0].cmd.random_state == 5
