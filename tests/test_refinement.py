"""Laws of references that are no rows: Lloyd's algorithm, no round worse than the last, the same bits."""

from __future__ import annotations

import itertools
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from benchmarks.experiments import references as experiment
from cmdgpu.batch import fit_grid
from cmdgpu.decomposition import CMD
from cmdgpu.errors import CmdgpuError, CmdgpuWarning, MemoryLimitError, StoreCorrupt, StoreExists, UsageError
from cmdgpu.fitting import Settings
from cmdgpu.notation import F32, F64, AnyArray
from cmdgpu.profiles import OBJECTIVES, Objective
from cmdgpu.progress import Silent
from cmdgpu.refinement import LEAST_GAIN, refined
from cmdgpu.results import Refined, describe_result, partials_of, rounds, verify_result
from cmdgpu.store.parameter_map import ParameterMap, whole
from cmdgpu.trajectory import Trajectory
from tests.harness import (
    Stopped,
    Ticks,
    end_of,
    planted,
    row_bits,
    run_cli,
    start_child,
    walks,
    write_store,
)
from tests.verbs import edit_document, flip_bit, on_disk, tree_bytes

B = TypeVar("B")
R = TypeVar("R")

CHOICES: Final[tuple[dict[str, Any], ...]] = (
    {"references": "component"},
    {"references": "component", "objective": "correlation"},
    {"refine": 3},
    {"references": "component", "refine": 3, "objective": "correlation"},
)


# ---- the definition -----------------------------------------------------------------------------------


def centred(W: AnyArray) -> F64:
    w = W.astype(np.float64)
    return w - w.mean(axis=1, keepdims=True)


def unit(R_mt: AnyArray) -> F64:
    r = centred(R_mt)
    return r / np.linalg.norm(r, axis=1, keepdims=True)


def moving(W: AnyArray, objective: str) -> F64:
    """Rows that move, centred; of unit length where every row counts alike."""
    x = centred(W[np.isfinite(W).all(axis=1)])
    x = x[np.linalg.norm(x, axis=1) > 1e-12]
    return unit(x) if objective == "correlation" else x


def share(x: F64, R_mt: AnyArray) -> float:
    """What of all squares lies along every row's best reference."""
    return float(((x @ unit(R_mt).T) ** 2).max(axis=1).sum() / (x**2).sum())


def lloyd(W: AnyArray, R_mt: F32, n_rounds: int, objective: str) -> tuple[list[float], F64]:
    """The objective before and after every round, and the unit profiles (M, T) that the last one leaves."""
    x, z = moving(W, objective), unit(R_mt)
    values = [share(x, R_mt)]
    for _ in range(n_rounds):
        label = np.argmax(np.abs(np.einsum("nt,mt->nm", x, z)), axis=1)  # a tie is one
        along = 0.0
        for m in range(len(z)):
            if (label == m).any():
                found, vectors = np.linalg.eigh(x[label == m].T @ x[label == m])
                z[m], along = vectors[:, -1], along + float(found[-1])
        values.append(along / float((x**2).sum()))
    return values, z


def rounds_of(W: AnyArray, R_mt: AnyArray, n: int, objective: Objective) -> list[Refined]:
    traj = Trajectory.from_array(np.asarray(W, np.float32))
    return list(refined(traj, Refined(np.asarray(R_mt, np.float32)), n, objective, 1 << 30, Silent()))


def awkward(seed: int) -> F32:
    """(N, T) planted rows, noise, and every kind of row that is none."""
    W = np.concatenate([planted(400, 12, 4, noise=0.4, seed=seed), walks(200, 12, seed)])
    W[5], W[17], W[40, 3], W[41, 0] = 2.5, 0.0, np.nan, np.inf
    W[50:60] = W[60:70]
    W[70:80] = 3.0 - 2.0 * W[80:90]
    return W


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("seed", range(3))
def test_rounds_are_those_of_lloyds_algorithm_in_float64(seed: int, objective: Objective) -> None:
    W = awkward(seed)
    start = W[[100, 200, 300, 100, 450]]  # the fourth is the first: its mode is empty for a round
    start[3] *= -4
    states = rounds_of(W, start, 4, objective)
    values, z = lloyd(W, start, len(states), objective)
    assert len(states) == 4
    assert np.allclose(states[-1].values, values, rtol=0, atol=1e-6)
    found = unit(states[-1].references)
    assert np.abs((found * z).sum(axis=1)).min() > 1 - 1e-6
    assert np.array_equal(states[0].references[3], start[3])
    sizes = [np.linalg.norm(centred(R_mt), axis=1) for R_mt in (states[-1].references, start)]
    assert np.allclose(*sizes)
    assert np.abs(np.delete(states[0].references, 3, axis=0).mean(axis=1)).max() < 1e-6
    assert ((unit(states[0].references) * unit(start)).sum(axis=1) > 0).all(), "a sign was lost"


ROWS = arrays(np.float32, st.tuples(st.integers(2, 24), st.integers(2, 6)), elements=st.integers(-3, 3))


@given(ROWS, st.integers(1, 4), st.sampled_from(OBJECTIVES), st.integers(0, 10))
@settings(max_examples=40)
def test_no_round_is_worse_than_the_one_before(W: F32, m: int, objective: Objective, seed: int) -> None:
    moves = np.flatnonzero(W.max(axis=1) > W.min(axis=1))
    if not len(moves):
        return
    start = W[np.random.default_rng(seed).choice(moves, m)]
    states = rounds_of(W, start, 6, objective)
    x = moving(W, objective)
    shares = [share(x, start), *(share(x, state.references) for state in states)]
    values = states[-1].values
    assert abs(values[0] - shares[0]) < 1e-6
    assert all(after >= before for before, after in itertools.pairwise(values))
    assert all(after >= before - 1e-6 for before, after in itertools.pairwise(shares))
    # what is said of a round holds for the rows as it found them; sent to their best reference, they gain
    assert all(shares[k] >= values[k] - 1e-6 for k in range(1, len(values)))
    assert all(len(state.values) == k + 2 for k, state in enumerate(states))
    assert len(values) == 7 or values[-1] - values[-2] < LEAST_GAIN, "it ended without a reason"


def test_a_round_that_gains_nothing_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of two lines exactly: one round finds them, the next one sees that there is no more to gain."""
    r = walks(2, 9)
    a = np.random.default_rng(0).standard_normal(300)[:, None]
    W: F32 = np.asarray(np.where(np.arange(300)[:, None] % 2, a * r[0], a * r[1]) + a, np.float32)
    states = rounds_of(W, W[:2], 50, "energy")
    assert len(states) == 1 and states[0].values[1] == pytest.approx(1.0, abs=1e-9)
    # and one that is worse, as rounding may have it, is not taken
    noisy = awkward(0)
    good = rounds_of(noisy, noisy[[100, 200]], 1, "energy")[0]
    assert good.values[1] > good.values[0]

    def worse(G_mtt: F64, like_mt: F32) -> tuple[F64, F32]:
        return np.zeros(len(G_mtt)), np.zeros_like(like_mt)

    monkeypatch.setattr("cmdgpu.refinement.first_components", worse)
    (last,) = refined(Trajectory.from_array(noisy), good, 5, "energy", 1 << 30, Silent())
    assert last.values == (*good.values, good.values[-1])
    assert np.array_equal(last.references, good.references)


# ---- components ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_component_is_the_best_profile_of_the_sampled_rows_of_its_mode(objective: Objective) -> None:
    W = awkward(1)
    rows = CMD(n_modes=4, n_samples=300).fit(W)
    cmd = CMD(n_modes=4, n_samples=300, references="component", objective=objective).fit(W)
    assert np.array_equal(cmd.sample_labels_, rows.sample_labels_)
    assert (cmd.reference_rows_ == -1).all() and "refinement" not in cmd.metrics_
    for m in range(cmd.n_modes_):
        mine = cmd.sample_[cmd.sample_labels_ == m]
        x = moving(mine, objective)
        best = np.linalg.eigh(x.T @ x)[0][-1] / (x**2).sum()
        assert share(x, cmd.references_[m : m + 1]) == pytest.approx(best, abs=1e-6)
        medoid, r = rows.references_[m : m + 1], cmd.references_[m : m + 1]
        assert float((unit(medoid) * unit(r)).sum()) > 0
        assert np.linalg.norm(centred(r)) == pytest.approx(np.linalg.norm(centred(medoid)), rel=1e-6)
        assert abs(r.mean()) < 1e-6
    # b is the row's mean then
    known = np.asarray(cmd.labels_) >= 0
    assert np.allclose(np.asarray(cmd.b_)[known], W[known].mean(axis=1), atol=1e-5)


def test_better_references_explain_more_at_the_same_bytes() -> None:
    W = walks(8_000, 40)
    choices: dict[str, dict[str, Any]] = {
        "row": {},
        "component": {"references": "component"},
        "energy": {"references": "component", "refine": 4},
        "correlation": {"refine": 4, "objective": "correlation"},
    }
    found = {
        name: CMD(n_modes=10, n_samples=500, **choice).fit(W).metrics_ for name, choice in choices.items()
    }
    energy = {name: metrics["r2_energy"] for name, metrics in found.items()}
    assert energy["row"] + 0.02 < energy["component"] and energy["component"] + 0.01 < energy["energy"]
    assert found["correlation"]["r2"] > max(found["row"]["r2"], found["energy"]["r2"])
    assert len({metrics["result_bytes"] for metrics in found.values()}) == 1
    for name, key in (("energy", "r2_energy"), ("correlation", "r2")):
        values = found[name]["refinement"]
        assert len(values) == 5 and values[0] < values[1] < values[-1]
        assert found[name][key] >= values[-1] - 1e-6
    assert found["correlation"]["refinement"][0] == pytest.approx(found["row"]["r2"], abs=1e-6)


# ---- fits ---------------------------------------------------------------------------------------------


def test_a_fit_as_in_the_paper_is_what_it_was(tmp_path: Path) -> None:
    plain = {"n_modes": 3, "threshold": None, "n_samples": 60, "sampling": "layer-balanced"}
    plain |= {"affinity": "abs-corr", "random_state": 0}
    assert Settings(n_modes=3, n_samples=60).to_json() == plain
    assert Settings(n_modes=3, n_samples=60, objective="correlation").to_json() == plain
    traj = write_store(tmp_path / "s.zarr", planted(700, 6), rows=256)
    cmd = CMD(n_modes=3, n_samples=60, references="row", refine=0).fit(traj, out=tmp_path / "out.zarr")
    head = json.loads((tmp_path / "out.zarr" / "zarr.json").read_bytes())["attributes"]["cmdgpu"]
    assert not {"refinement", "refining"} & set(head) and head["config"] == plain
    assert "refined_by" not in head["code"] and "refinement" not in cmd.metrics_
    assert (cmd.reference_rows_ >= 0).all() and "refine" not in cmd.metrics_["stage_s"]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_chunks_blocks_limits_threads_and_arrays_leave_the_same_bits(
    choice: dict[str, Any], tmp_path: Path
) -> None:
    W = walks(70_000, 10)
    W[40_000:40_100] = np.nan
    found: set[tuple[str, tuple[float, ...]]] = set()
    cases = ((16_384, "64MiB", 1), (32_768, "1GiB", 3), (0, "1GiB", 2))
    for rows, limit, threads in cases:
        torch.set_num_threads(threads)
        traj = write_store(tmp_path / f"{rows}.zarr", W, rows=rows) if rows else Trajectory.from_array(W)
        cmd = CMD(n_modes=4, n_samples=200, **choice).fit(traj, memory_limit=limit)
        found.add((row_bits(cmd), cmd.result.refinement))
    assert len(found) == 1


def test_buffers_holes_and_what_is_not_selected_have_no_say(tmp_path: Path) -> None:
    W = walks(1500, 8)
    parts: list[tuple[str, Any, str, tuple[int, ...]]] = [
        ("a.weight", "parameter", "float32", (20, 30)),
        ("a.running_var", "buffer", "float32", (400,)),
        ("b.weight", "parameter", "float32", (500,)),
    ]
    traj = write_store(tmp_path / "s.zarr", W, rows=256, layout=ParameterMap(whole(parts)))
    start = W[[1, 50, 100]]
    args = (Refined(start), 3, "energy", 1 << 30, Silent())
    *_, all_of_it = refined(traj, *args)
    *_, alone = refined(Trajectory.from_array(np.concatenate([W[:600], W[1000:]])), *args)
    assert np.allclose(all_of_it.values, alone.values, atol=1e-9)
    assert np.allclose(all_of_it.references, alone.references, atol=1e-4)
    *_, selected = refined(traj.sel(params="^a"), *args)
    *_, alone = refined(Trajectory.from_array(W[:600]), *args)
    assert np.allclose(selected.values, alone.values, atol=1e-9)


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rows_of_16_bits(choice: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    traj = write_store(tmp_path / "s.zarr", planted(900, 9, noise=0.3), rows=256, dtype=dtype)
    assert CMD(n_modes=3, n_samples=100, **choice).fit(traj).metrics_["r2"] > 0.85


ONE_LINE: F32 = np.arange(1, 30, dtype=np.float32)[:, None] * walks(1, 6)
SHAPELESS: Final[dict[str, tuple[F32, int]]] = {
    "one snapshot": (walks(50, 1), 0),
    "two snapshots": (walks(50, 2), 1),
    "three snapshots": (walks(50, 3), 4),
    "nothing moves": (np.ones((40, 6), np.float32), 0),
    "one row moves": (np.vstack([np.ones((9, 6), np.float32), walks(1, 6)]), 1),
    "fewer profiles than modes": (ONE_LINE, 1),
    "more modes than rows": (walks(3, 6), 3),
    "rows that hardly move": ((1e-18 * walks(60, 6)).astype(np.float32), 4),
    "rows that move far": ((1e17 * walks(60, 6)).astype(np.float32), 4),
}


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("what", SHAPELESS)
def test_what_has_no_shape_to_find(choice: dict[str, Any], what: str) -> None:
    W, n_modes = SHAPELESS[what]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CmdgpuWarning)
        cmd = CMD(n_modes=4, **choice).fit(W)
    assert cmd.n_modes_ == n_modes and cmd.references_.shape == (n_modes, W.shape[1])
    assert np.isfinite(cmd.references_).all()
    values = cmd.metrics_.get("refinement", [])
    assert all(0 <= value <= 1 + 1e-9 for value in values)
    assert bool(values) == (bool(n_modes) and "refine" in choice)
    assert cmd.summary()


# ---- steps that were not fitted ------------------------------------------------------------------------

STEPS: Final = (0, 5, 10, 20, 40, 50, 70, 75, 90)


def line_through_rows(cmd: CMD, W: AnyArray, t: int) -> F64:
    """The value of every profile at column t that explains its rows best: lstsq on a, rows weighted."""
    component = not cmd.refine
    rows = cmd.sample_rows_ if component else np.arange(len(W))
    label = cmd.sample_labels_ if component else np.asarray(cmd.labels_)
    fitted = [STEPS.index(step) for step in cmd.steps_]
    values = np.zeros(cmd.n_modes_)
    for m in range(cmd.n_modes_):
        mine = rows[label == m]
        x, z = centred(W[mine][:, fitted]), centred(cmd.references_[m : m + 1])[0]
        a = x @ z / (z @ z)
        b = W[mine][:, fitted].astype(np.float64).mean(axis=1) - a * float(
            cmd.references_[m].astype(np.float64).mean()
        )
        v = 1.0 / (np.linalg.norm(x, axis=1) if cmd.objective == "correlation" else np.ones(len(mine)))
        values[m] = np.linalg.lstsq((v * a)[:, None], v * (W[mine, t] - b), rcond=None)[0][0]
    return values


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_a_profile_has_a_value_at_every_recorded_step(choice: dict[str, Any], tmp_path: Path) -> None:
    W = planted(900, len(STEPS), noise=0.1)
    traj = write_store(tmp_path / "s.zarr", W, rows=256, steps=STEPS)
    selected = traj.sel(steps=[0, 10, 20, 40, 70, 90])
    cmd = CMD(n_modes=3, n_samples=100, **choice).fit(selected, out=tmp_path / "out.zarr")
    loaded = CMD.load(tmp_path / "out.zarr")
    mode, a, b = (np.asarray(rows) for rows in (cmd.labels_, cmd.a_, cmd.b_))
    for t, step in enumerate(STEPS):
        values = line_through_rows(cmd, W, t)
        if step in cmd.steps_:
            stored = cmd.references_[:, cmd.steps_.tolist().index(step)]
            if "refine" not in choice:  # a component is that combination of its rows
                assert np.allclose(values, stored, atol=1e-6)
            values = stored.astype(np.float64)
        rebuilt = cast(F32, loaded.state_dict(step)["W"].numpy())
        assert np.allclose(rebuilt, a * values[mode] + b, atol=1e-5)
        error = float(
            np.square(rebuilt - W[:, t]).mean() / np.square(W - W.mean(axis=1, keepdims=True)).mean()
        )
        assert error < 0.1, "it describes what was recorded"
    shutil.rmtree(tmp_path / "s.zarr")
    assert CMD.load(tmp_path / "out.zarr").state_dict(-1).keys() == {"W"}


def test_rows_without_a_value_at_a_step_have_no_say_in_it() -> None:
    W = planted(400, 9, noise=0.2)
    W[7, 4] = np.nan
    traj = Trajectory.from_array(W).sel(steps=[0, 1, 2, 3, 5, 6, 7, 8])
    for choice in CHOICES:
        cmd = CMD(n_modes=3, n_samples=400, **choice).fit(traj)
        assert np.isfinite(cmd.state_dict(4)["W"].numpy()).all()


# ---- many, elsewhere, by others -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("refinement") / "s.zarr"
    write_store(path, walks(1500, 10), rows=256)
    return path


def work(**others: Any) -> CMD:
    return CMD(n_modes=4, n_samples=100, references="component", refine=4, device="cpu", **others)


def place(folder: Path, store: Path, name: str = "out.zarr") -> Path:
    """A place for a fit, with the trajectory beside it: the way to it is in the result."""
    folder.mkdir(exist_ok=True)
    (folder / "s.zarr").symlink_to(store)
    return folder / name


@pytest.fixture(scope="module")
def undisturbed(store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = place(tmp_path_factory.mktemp("undisturbed"), store)
    work().fit(Trajectory.open(out.parent / "s.zarr"), out=out)
    return tree_bytes(out)


def test_a_refined_result_is_opened_checked_and_told(
    store: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    out = place(tmp_path, store)
    ended = run_cli(
        *("fit", tmp_path / "s.zarr", "-o", out, "--modes", "4", "--samples", "100", "--device", "cpu"),
        *("--references", "component", "--refine", "4", "--json"),
    )
    assert ended.code == 0, ended.err
    assert tree_bytes(out) == undisturbed and not list(out.rglob("*.partial"))
    values = ended.json["refinement"]
    assert len(values) == 5 and ended.json["stage_s"]["refine"] > 0
    assert verify_result(out).damaged == []
    shown, told = run_cli("inspect", out), run_cli("inspect", out, "--json").json
    assert f"refined in up to 4 rounds: {values[0]:.4f}, {values[1]:.4f}" in shown.out
    assert told["refinement"] == values and told["config"]["references"] == "component"
    cmd = CMD.load(out)
    assert (cmd.references, cmd.refine, cmd.objective) == ("component", 4, "energy")
    assert f"R^2 by energy {values[0]:.4f} -> {values[-1]:.4f}" in cmd.summary() and "no row" in cmd.summary()
    assert cmd.metrics_["refinement"] == values
    with pytest.raises(StoreExists, match="config objective: energy there, correlation asked"):
        work(objective="correlation").fit(Trajectory.open(tmp_path / "s.zarr"), out=out)


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"references": "mean"}, "references cannot be 'mean'; have: row, component"),
        ({"objective": "r2"}, "an objective cannot be 'r2'; have: energy, correlation"),
        ({"refine": -1}, "-1 rounds of refinement; each is a pass: give 0 to 1000"),
    ],
)
def test_what_cannot_be_asked_is_refused(options: dict[str, Any], hint: str) -> None:
    with pytest.raises(UsageError, match=hint):
        CMD(**options)


def test_a_grid_gives_the_bits_of_fits_of_their_own(store: Path, tmp_path: Path) -> None:
    fits = fit_grid(
        [store], tmp_path, n_modes=[2, 4], seeds=[0, 1], n_samples=100, references="component", refine=2
    )
    assert all(fit.error is None for fit in fits) and len(fits) == 4
    for fit in fits:
        alone = CMD(fit.cmd.n_modes, n_samples=100, random_state=fit.seed, references="component", refine=2)
        alone.fit(Trajectory.open(store))
        assert row_bits(alone) == row_bits(fit.cmd) and alone.result.refinement == fit.cmd.result.refinement


class Inline:
    """An executor that runs every block here, one after the other."""

    def map_blocks(self, fn: Callable[[B], R], blocks: Sequence[B]) -> Iterator[tuple[B, R]]:
        for block in blocks:
            yield block, fn(block)


def test_the_pass_may_be_anybodys(store: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    out = place(tmp_path, store)
    work().fit(Trajectory.open(tmp_path / "s.zarr"), out=out, executor=Inline())
    assert tree_bytes(out) == undisturbed


def test_ranks_do_not_refine_the_same_references_each(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="3 ranks would each refine the same references; fit in one process"):
        work().fit(Trajectory.open(store), out=tmp_path / "out.zarr", executor="ranks")
    assert list(tmp_path.iterdir()) == []


def test_on_an_object_store(store: Path) -> None:
    url = "memory://refinement"
    out = f"{url}/out.zarr"
    with pytest.raises(Stopped):
        work().fit(Trajectory.open(store), out=out, progress=Rounds("round 3"))
    ticks = Rounds()
    cmd = work().fit(Trajectory.open(store), out=out, progress=ticks)
    assert ticks.begun == ["round 3", "round 4", "fit"]
    assert row_bits(cmd) == row_bits(work().fit(Trajectory.open(store)))
    assert CMD.load(out, store).metrics_["refinement"] == list(cmd.result.refinement)


# ---- resume -------------------------------------------------------------------------------------------


class Rounds(Ticks):
    """What was begun; stops a fit in the middle of it."""

    def __init__(self, stop_in: str = "", after: int = 1) -> None:
        super().__init__()
        self.begun: list[str] = []
        self._stop_in, self._after = stop_in, after

    def begin(self, what: str, total_bytes: int) -> None:
        super().begin(what, total_bytes)
        self.begun.append(what)

    def advance(self, done_bytes: int) -> None:
        super().advance(done_bytes)
        if self.what == self._stop_in:
            self._after -= 1
            if not self._after:
                raise Stopped


@pytest.mark.parametrize("stop_in", [1, 2, 4])
def test_a_killed_fit_goes_on_at_the_round_it_was_in(
    stop_in: int, store: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    out = place(tmp_path, store)
    traj = Trajectory.open(tmp_path / "s.zarr")
    with pytest.raises(Stopped):
        work().fit(traj, out=out, progress=Rounds(f"round {stop_in}"))
    (partial,) = partials_of(out)
    assert len(describe_result(partial).refinement) == (stop_in if stop_in > 1 else 0)
    assert verify_result(partial).damaged == []
    with pytest.raises(StoreExists, match="config refine: 4 there, 3 asked"):
        CMD(n_modes=4, n_samples=100, references="component", refine=3, device="cpu").fit(traj, out=out)
    ticks = Rounds()
    work().fit(traj, out=out, progress=ticks)
    assert ticks.begun == [*(f"round {k}" for k in range(stop_in, 5)), "fit"]
    assert tree_bytes(out) == undisturbed


def test_a_fit_killed_in_its_pass_makes_no_round_again(
    store: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    out = place(tmp_path, store)
    traj = Trajectory.open(tmp_path / "s.zarr")
    with pytest.raises(Stopped):
        work().fit(traj, out=out, progress=Rounds("fit", after=3))
    ticks = Rounds()
    work().fit(traj, out=out, progress=ticks)
    assert ticks.begun == ["fit"]
    assert tree_bytes(out) == undisturbed


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("at", range(10))
def test_between_any_two_writes_there_is_a_way_on(
    at: int,
    before: bool,
    store: Path,
    tmp_path: Path,
    undisturbed: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four rounds of a file and a head each, the references, the head that vouches for them."""
    out = place(tmp_path, store)
    traj = Trajectory.open(tmp_path / "s.zarr")
    inner = rounds.durable.write_file
    count = 0

    def dies(*args: Any, **options: Any) -> None:
        nonlocal count
        count += 1
        if count == at + 1 and before:
            raise Stopped
        inner(*args, **options)
        if count == at + 1:
            raise Stopped

    settle = rounds.settle

    def settled(*args: Any) -> None:
        with monkeypatch.context() as broken:
            broken.setattr(rounds.durable, "write_file", dies)
            settle(*args)

    with monkeypatch.context() as patched:
        patched.setattr("cmdgpu.results.stored.settle", settled)
        with pytest.raises(Stopped):
            work().fit(traj, out=out)
    (partial,) = partials_of(out)
    assert verify_result(partial).damaged == []
    work().fit(traj, out=out)
    assert tree_bytes(out) == undisturbed


def test_a_fit_that_another_process_ends_meanwhile_is_taken_for_ones_own(
    store: Path, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    out = place(tmp_path, store)
    traj = Trajectory.open(tmp_path / "s.zarr")

    class Beside(Rounds):
        def begin(self, what: str, total_bytes: int) -> None:
            super().begin(what, total_bytes)
            if what == "round 3":
                work().fit(traj, out=out)

    cmd = work().fit(traj, out=out, progress=Beside())
    assert cmd.metrics_["units_resumed"] == 6
    assert tree_bytes(out) == undisturbed and partials_of(out) == []


def test_damage_of_what_a_round_left_is_an_error(store: Path, tmp_path: Path) -> None:
    out = place(tmp_path, store)
    traj = Trajectory.open(tmp_path / "s.zarr")
    with pytest.raises(Stopped):
        work().fit(traj, out=out, progress=Rounds("round 3"))
    (partial,) = partials_of(out)
    file = partial / "references" / "round.2.partial"
    for bit in (0, 8 * file.stat().st_size - 1):
        flip_bit(file, bit)
        with pytest.raises(StoreCorrupt, match=r"round\.2\.partial"):
            work().fit(traj, out=out)
        assert verify_result(partial).damaged
        flip_bit(file, bit)
    file.unlink()
    with pytest.raises(StoreCorrupt, match=r"round\.2\.partial"):
        work().fit(traj, out=out)
    assert work().fit(traj, out=out, resume=False).n_modes_ == 4


HEADS: Final[dict[str, Callable[[Any], object]]] = {
    "no refinement": lambda head: head.pop("refinement"),
    "text": lambda head: head.update(refinement=[0.5, "0.6"]),
    "a fall": lambda head: head.update(refinement=[0.6, 0.5]),
    "more rounds than asked": lambda head: head.update(refinement=[0.1] * 6),
    "an object": lambda head: head.update(refinement={}),
    "complete and not": lambda head: head.update(refining="0" * 64),
    "values of no rounds": lambda head: head["config"].pop("refine"),
    "no objective": lambda head: head["config"].pop("objective"),
    "true rounds": lambda head: head["config"].update(refine=True),
    "endless rounds": lambda head: head["config"].update(refine=10**9),
    "rows, said": lambda head: head["config"].update(references="row"),
    "a list": lambda head: head["config"].update(objective=["energy"]),
    "rows, not said": lambda head: [
        *map(head["config"].pop, ("references", "refine", "objective")),
        head.pop("refinement"),
    ],
}


@pytest.mark.parametrize("edit", HEADS)
def test_a_head_that_says_what_cannot_be_is_not_believed(edit: str, store: Path, tmp_path: Path) -> None:
    cmd = work().fit(Trajectory.open(store), out=tmp_path / "out.zarr")
    path = on_disk(cmd.result.path or tmp_path)
    edit_document(path / "zarr.json", lambda document: HEADS[edit](document["attributes"]["cmdgpu"]))
    with pytest.raises(StoreCorrupt, match=r"refinement|config|outside"):
        CMD.load(path)


# ---- memory -------------------------------------------------------------------------------------------


def test_gram_matrices_that_do_not_fit_are_refused_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def touched(*args: object) -> None:
        raise AssertionError("something was read")

    monkeypatch.setattr("cmdgpu.sources.ArraySource._slab", touched)
    refused = r"memory limit is 105 MB.*refine fewer modes: their 100 Gram matrices take 128 MB"
    with pytest.raises(MemoryLimitError, match=refused):
        CMD(n_modes=100, refine=1).fit(walks(300, 400), memory_limit="100MiB")


MEASURED = """
import json, sys
from cmdgpu.memory import MemoryMeter
from cmdgpu.profiles import OBJECTIVES
from cmdgpu.progress import Silent
from cmdgpu.refinement import plan_round, refined
from cmdgpu.results import Refined
from cmdgpu.trajectory import Trajectory
from tests.harness import walks
tiny = walks(5000, 8)
list(refined(Trajectory.from_array(tiny), Refined(tiny[:9]), 1, "energy", 1 << 30, Silent()))
traj, limit = Trajectory.open(sys.argv[1]), 130 << 20
start = Refined(traj[:150, :])
with MemoryMeter(0.001) as meter:
    list(refined(traj, start, 1, "correlation", limit, Silent()))
print(json.dumps([meter.above_start_bytes, plan_round(traj, 150, limit).needed_bytes]))
"""


@pytest.mark.slow
def test_a_round_stays_within_its_plan(tmp_path: Path) -> None:
    """150 modes of 72 snapshots: 6 MB of Gram matrices, 38 MB of slots at least."""
    W = np.asfortranarray(np.random.default_rng(0).standard_normal((150_000, 72), dtype=np.float32))
    write_store(tmp_path / "s.zarr", W, rows=1 << 16)
    ended = end_of(start_child("-c", MEASURED, tmp_path / "s.zarr"))
    assert ended.code == 0, ended.err
    peak, planned = json.loads(ended.out)
    print(peak, planned)
    assert 2 * 72 * (1 << 16) * 4 + 150 * 72 * 72 * 8 < peak <= planned


def test_the_experiment_tells_what_references_gain(tmp_path: Path) -> None:
    traj = write_store(tmp_path / "s.zarr", walks(1500, 12), rows=256)
    runs = [experiment.measure(traj, [2, 4], 200, seed) for seed in (0, 1)]
    found = {"results": experiment.together(runs)}
    assert experiment.gain(found, 4) > 0.02
    table = experiment.rows(found)
    assert len(table) == 2 * len(experiment.CHOICES) + 2 and table[0][:2] == ["M=2", "row (paper)"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    experiment.draw(found, tmp_path / "references.png")
    assert (tmp_path / "references.png").stat().st_size > 10_000


def test_an_error_of_a_round_is_the_fits(tmp_path: Path) -> None:
    traj = write_store(tmp_path / "s.zarr", walks(600, 6), rows=256)
    flip_bit(tmp_path / "s.zarr" / "weights" / "c.1.3", 4321)
    with pytest.raises(CmdgpuError, match=r"c\.1\.3"):
        CMD(n_modes=3, refine=2).fit(traj)
