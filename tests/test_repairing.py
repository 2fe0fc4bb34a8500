"""Laws of repair: nothing is changed unasked, what is whole stays, and what stays verifies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cmdgpu.errors import CmdgpuError, NotAStore, StepNotFound, StoreCorrupt, StoreFenced, StoreLocked
from cmdgpu.repairing import plan_repair
from cmdgpu.store import format as fmt
from cmdgpu.store.journal import Journal
from cmdgpu.store.verification import verify_store
from cmdgpu.store.view import StoreView
from cmdgpu.trajectory import Trajectory
from tests.faults.disk import FAULTS, Died, Fault, every_fault
from tests.harness import run_cli
from tests.verbs import (
    append,
    build_store,
    check_store_holds,
    flip_bit,
    leftovers,
    open_xarray,
    swap_files,
    tree_bytes,
)

STEPS = (0, 10, 25, 30, 42)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "zstd"])
def base(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    return build_store(tmp_path_factory.mktemp("base") / "run.zarr", STEPS, compressed=request.param)


@pytest.fixture
def store(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "run.zarr"))


def weights(store: Path, t: int, i: int = 1) -> Path:
    return store / fmt.WEIGHTS / fmt.chunk_name(i, t)


def test_a_sound_store_needs_nothing_and_stays_as_it_is(store: Path, base: Path) -> None:
    repair = plan_repair(store)
    assert not repair.is_needed and (repair.keep, repair.n_kept, repair.left) == (42, 5, ())
    repair.carry_out()
    assert tree_bytes(store) == tree_bytes(base)


def test_damaged_snapshots_at_the_end_are_dropped_and_the_rest_is_the_store_that_never_had_them(
    store: Path, tmp_path: Path
) -> None:
    flip_bit(weights(store, 4), 99)
    weights(store, 3).unlink()
    before = tree_bytes(store)
    repair = plan_repair(store)
    assert (repair.keep, repair.n_kept, repair.dropped) == (25, 3, (30, 42))
    assert tree_bytes(store) == before, "the plan changed something"
    repair.carry_out()
    check_store_holds(store, STEPS[:3])
    journal = Journal.open(store)
    for step in (27, 60):
        append(journal, step, loss=step / 4)
    journal.close()
    straight = tmp_path / "straight.zarr"
    build_store(straight, (*STEPS[:3], 27, 60), compressed=journal.view.is_compressed)
    assert tree_bytes(store) == tree_bytes(straight)


def test_a_damaged_snapshot_before_a_whole_one_is_told_and_left(store: Path) -> None:
    flip_bit(weights(store, 1), 99)
    before = tree_bytes(store)
    repair = plan_repair(store)
    assert not repair.is_needed and repair.keep == 42
    assert [(damage.step, Path(damage.file)) for damage in repair.left] == [(10, weights(store, 1))]
    repair.carry_out()
    assert tree_bytes(store) == before
    assert Trajectory.open(store).sel(steps=[0, 25, 30, 42])[:, :].shape[1] == 4


def test_going_back_further_takes_the_last_whole_snapshot_no_later_than_asked(store: Path) -> None:
    flip_bit(weights(store, 2), 99)
    repair = plan_repair(store, to=25)
    assert (repair.keep, repair.dropped, repair.left) == (10, (25, 30, 42), ())
    repair.carry_out()
    check_store_holds(store, STEPS[:2])
    with pytest.raises(StepNotFound, match="nearest recorded: 0, 10"):
        plan_repair(store, to=7)


def link_outside(directory: Path) -> None:
    """A faithful copy outside of the store stands in for an array."""
    outside = directory.parent.parent / "outside"
    shutil.move(directory, outside)
    directory.symlink_to(outside)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("step/c.0", flip_bit), ("step/zarr.json", flip_bit), ("step/c.0", None), ("step", None),
        ("step", link_outside), ("sketch_row/c.0", flip_bit), ("sketch_row/zarr.json", None),
        ("sketch_row", link_outside), ("sketch/zarr.json", flip_bit), ("sketch/c.0.2", flip_bit),
        ("sketch/c.0.4", None), ("loss/zarr.json", flip_bit), ("loss/zarr.json", None),
    ],
)  # fmt: skip
def test_what_other_files_vouch_for_is_written_again_and_nothing_is_lost(
    store: Path, base: Path, file: str, damage: Callable[..., object] | None
) -> None:
    if damage is flip_bit:
        flip_bit(store / file, 77)
    elif damage is not None:
        damage(store / file)
    elif (store / file).is_dir():
        shutil.rmtree(store / file)
    else:
        (store / file).unlink()
    assert verify_store(store).damaged
    outside = tree_bytes(store.parent / "outside")
    repair = plan_repair(store)
    assert (repair.rewritten, repair.dropped, repair.lost) == ((file.partition("/")[0],), (), ())
    repair.carry_out()
    assert tree_bytes(store) == tree_bytes(base)
    assert tree_bytes(store.parent / "outside") == outside


def test_swapped_sketch_chunks_are_drawn_again_from_the_weights(store: Path, base: Path) -> None:
    swap_files(store / "sketch/c.0.1", store / "sketch/c.0.2")
    repair = plan_repair(store)
    assert (repair.rewritten, repair.dropped) == (("sketch",), ())
    repair.carry_out()
    assert tree_bytes(store) == tree_bytes(base)


def test_swapped_weights_are_no_whole_snapshots(store: Path) -> None:
    swap_files(weights(store, 3), weights(store, 4))
    repair = plan_repair(store)
    assert (repair.keep, repair.dropped, repair.rewritten) == (25, (30, 42), ())


@pytest.mark.parametrize("damage", [flip_bit, link_outside, shutil.rmtree])
def test_a_scalar_that_nothing_vouches_for_is_given_up_and_the_weights_are_kept(
    store: Path, damage: Callable[..., object]
) -> None:
    if damage is flip_bit:
        flip_bit(store / "loss" / "c.0", 77)
    else:
        damage(store / "loss")
    with pytest.raises(StoreCorrupt):
        Trajectory.open(store)
    repair = plan_repair(store)
    assert (repair.lost, repair.dropped, repair.keep) == (("loss",), (), 42)
    repair.carry_out()
    check_store_holds(store, STEPS, [])
    assert not (store / "loss").exists() and set(open_xarray(store)) == {"sketch", "sketch_row", "weights"}
    journal = Journal.open(store)
    append(journal, 50, loss=1.0)
    journal.close()
    assert np.array_equal(StoreView.open(store).scalars["loss"], [np.nan] * 5 + [1.0], equal_nan=True)


def test_everything_at_once(store: Path) -> None:
    for file in ("step/c.0", "loss/c.0", "sketch_row/c.0", "sketch/c.0.1", "sketch/zarr.json"):
        flip_bit(store / file, 77)
    flip_bit(weights(store, 4), 99)
    flip_bit(weights(store, 2), 99)
    repair = plan_repair(store)
    assert (repair.keep, repair.dropped, repair.lost) == (30, (42,), ("loss",))
    assert repair.rewritten == ("step", "sketch_row", "sketch")
    assert [damage.step for damage in repair.left] == [25]
    repair.carry_out()
    assert [(damage.step, damage.array) for damage in verify_store(store).damaged] == [(25, "weights")]


def test_where_nothing_can_be_gone_back_to_that_is_said_and_nothing_is_changed(store: Path) -> None:
    for name in ("zarr.json", "weights/zarr.json"):
        flip_bit(store / name, 700)
        with pytest.raises(StoreCorrupt, match=r"own digest|no JSON"):
            plan_repair(store)
        flip_bit(store / name, 700)
    for t in range(len(STEPS)):
        weights(store, t).unlink()
    before = tree_bytes(store)
    with pytest.raises(StoreCorrupt, match="no whole snapshot to go back to"):
        plan_repair(store)
    with pytest.raises(CmdgpuError, match="holds no snapshot yet"):
        plan_repair(build_store(store.with_name("empty.zarr"), ()))
    assert tree_bytes(store) == before


def test_an_older_commit_put_back_is_no_reason_to_delete_newer_chunks(store: Path) -> None:
    older = build_store(store.with_name("older.zarr"), STEPS[:2])
    shutil.copy(older / "weights" / "zarr.json", store / "weights" / "zarr.json")
    before = tree_bytes(store)
    with pytest.raises(StoreCorrupt, match="older commit was put back; restore the newest"):
        plan_repair(store)
    assert tree_bytes(store) == before


def test_a_repair_waits_for_no_writer_and_trusts_no_old_plan(store: Path) -> None:
    flip_bit(weights(store, 4), 99)
    repair = plan_repair(store)
    journal = Journal.open(store)
    with pytest.raises(StoreLocked):
        repair.carry_out()
    append(journal, 50, loss=1.0)
    journal.close()
    before = tree_bytes(store)
    with pytest.raises(StoreFenced, match="has changed since it was looked at; repair again"):
        repair.carry_out()
    assert tree_bytes(store) == before
    Journal.open(store).close()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_repair_that_fails_anywhere_can_be_repeated_to_the_same_end(
    base: Path, tmp_path: Path, fault: Fault
) -> None:
    broken = Path(shutil.copytree(base, tmp_path / "broken.zarr"))
    for file in ("step/c.0", "loss/c.0", "sketch_row/c.0", "sketch/c.0.1", "weights/c.1.4", "weights/c.0.3"):
        flip_bit(broken / file, 77)
    straight = Path(shutil.copytree(broken, tmp_path / "straight.zarr"))
    plan_repair(straight).carry_out()
    assert verify_store(straight).damaged == [] and StoreView.open(straight).steps.tolist() == [0, 10, 25]
    for disk in every_fault(fault):
        store = Path(shutil.copytree(broken, tmp_path / f"{disk.fail_at}.zarr"))
        done = False
        try:
            with disk.in_place():
                plan_repair(store).carry_out()
                done = True
        except (Died, CmdgpuError):
            pass
        at_the_end = disk.fired and disk.calls[disk.fail_at - 1].path.name == ".lock"
        assert done != disk.fired or at_the_end, "the fault was swallowed"
        repair = plan_repair(store)
        assert repair.keep == 25
        repair.carry_out()
        assert leftovers(store) == []
        assert tree_bytes(store) == tree_bytes(straight)
        shutil.rmtree(store)


# ---- the command ------------------------------------------------------------------------------------------


def test_the_command_says_what_it_will_drop_and_drops_it_only_when_asked(store: Path) -> None:
    flip_bit(weights(store, 4), 99)
    flip_bit(store / "loss" / "c.0", 77)
    before = tree_bytes(store)
    ended = run_cli("repair", str(store))
    assert ended.code == 1 and tree_bytes(store) == before
    assert ended.out.splitlines() == [
        "keeps    4 snapshots, up to step 30",
        "drops    step 42",
        "loses    the scalar 'loss': its values are damaged",
        "nothing was changed; `cmdgpu repair --yes` does this",
    ]
    said = run_cli("repair", str(store), "--yes", "--json")
    assert said.code == 0 and said.json["done"] is True
    assert (said.json["dropped_steps"], said.json["lost_scalars"]) == ([42], ["loss"])
    check_store_holds(store, STEPS[:4], [])
    again = run_cli("repair", str(store), "--json")
    assert (again.code, again.json["done"], again.json["dropped_steps"]) == (0, False, [])
    assert "sound: 4 snapshots, nothing to repair" in run_cli("repair", str(store)).out


def test_damage_that_a_repair_leaves_ends_with_1_and_is_named(store: Path) -> None:
    flip_bit(weights(store, 1), 99)
    ended = run_cli("repair", str(store), "--yes")
    assert ended.code == 1 and "leaves" in ended.out and "step 10" in ended.out and "c.1.1" in ended.out
    assert json.loads(json.dumps(run_cli("repair", str(store), "--json").json["damaged"]))[0]["step"] == 10


def test_a_decomposition_is_not_repaired_but_fitted_again(store: Path, tmp_path: Path) -> None:
    assert run_cli("fit", str(store), "-o", str(tmp_path / "out.zarr"), "--modes", "2").code == 0
    ended = run_cli("repair", str(tmp_path / "out.zarr"))
    assert ended.code == 1 and "is a decomposition; fit its trajectory again" in ended.err
    with pytest.raises(NotAStore):
        plan_repair(tmp_path / "out.zarr")
