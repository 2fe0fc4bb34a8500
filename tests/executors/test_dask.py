"""Laws of a fit on a Dask cluster: the bytes of one process whatever happens to workers, or one line."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import distributed
import pytest
from dask.utils import key_split  # pyright: ignore[reportUnknownVariableType]

from cmdgpu.errors import CmdgpuError, MemoryLimitError, StoreCorrupt, UsageError, WorkerLost
from cmdgpu.results import partials_of
from cmdgpu.streaming import dask as ours
from cmdgpu.streaming.dask import Crew, DaskExecutor
from cmdgpu.streaming.executors import executor_for
from tests.executors import world as w
from tests.executors.world import Midway, World, digest, line_of


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "PATIENCE_S", 0.5)
    monkeypatch.setattr(ours, "CONNECT_S", 2.0)
    monkeypatch.setattr(ours, "_LOOK_S", 0.1)


def wait_for(condition: Callable[[], bool], longest_s: float = 30) -> None:
    deadline = time.monotonic() + longest_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def state_of(pid: int) -> str:
    """``T`` for a process that is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def client_of(cluster: Any) -> Any:
    return cast(Any, distributed).Client(cluster, set_as_default=False)


def pid_of(client: Any, address: str) -> int:
    return int(client.run(os.getpid, workers=[address])[address])


# ---- the same bytes -----------------------------------------------------------------------------------


def test_a_worker_killed_in_the_middle_changes_no_byte(client: Any, world: World, tmp_path: Path) -> None:
    client.run(w.write_slowly, 0.1)
    victim = pid_of(client, sorted(client.nthreads())[0])
    midway = Midway(3, lambda: os.kill(victim, signal.SIGKILL))
    out = world.out(tmp_path)
    world.fit(out, client, progress=midway)
    assert midway.left, "the kill came when all was done"
    assert digest(out) == world.expected
    assert midway.done == midway.total


@pytest.mark.slow
def test_a_zombie_that_wakes_up_changes_nothing(world: World, tmp_path: Path) -> None:
    out = world.out(tmp_path)
    with Crew((None, None), 1).cluster() as cluster, client_of(cluster) as client:
        client.wait_for_workers(2, timeout=60)
        zombie, other = sorted(client.nthreads())
        pid = pid_of(client, zombie)
        client.run(w.fall_asleep_at, 0, workers=[zombie])
        client.run(w.write_slowly, 0.05, workers=[other])

        def give_up() -> None:
            """What the scheduler does with a worker that has been silent for five minutes."""
            wait_for(lambda: state_of(pid) == "T")
            gone = {"stimulus_id": "silent", "expected": False, "close": False}
            client.sync(cluster.scheduler.remove_worker, zombie, **gone)

        world.fit(out, client, progress=Midway(3, give_up))
        before = digest(out)
        assert state_of(pid) == "T", "it woke up too early"
        os.kill(pid, signal.SIGCONT)
        time.sleep(1)
        assert state_of(pid) != "T"
    assert before == digest(out) == world.expected
    assert partials_of(out) == []


def test_a_fit_that_ended_is_not_confused_with_the_next_at_its_place(
    client: Any, world: World, tmp_path: Path
) -> None:
    import shutil

    out = world.out(tmp_path)
    for _ in range(2):
        world.fit(out, client)
        assert digest(out) == world.expected
        shutil.rmtree(out)


@pytest.mark.slow
def test_a_cluster_of_our_own_has_a_worker_for_each_device_and_is_gone_afterwards(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "cuda_devices", lambda: ["0", "GPU-7"])
    out = world.out(tmp_path)
    with DaskExecutor.local() as executor:
        world.fit(out, executor)
        client: Any = executor._client  # pyright: ignore[reportPrivateUsage]
        assert sorted(client.run(os.getenv, "CUDA_VISIBLE_DEVICES").values()) == ["0", "GPU-7"]
        pids = client.run(os.getpid).values()
    assert digest(out) == world.expected
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def in_this_process(threads: int) -> Any:
    """A cluster whose one worker is threads of ours."""
    return cast(Any, distributed).LocalCluster(
        n_workers=1, processes=False, threads_per_worker=threads, dashboard_address="127.0.0.1:0"
    )


def test_a_worker_of_several_threads_takes_them_all_for_one_block(world: World, tmp_path: Path) -> None:
    out = world.out(tmp_path)
    with in_this_process(3) as cluster:
        with executor_for(cluster) as executor:
            assert isinstance(executor, DaskExecutor)
            assert list(executor.map_blocks(w.how_many_threads, [0])) == [(0, 3)]
        world.fit(out, cluster)
    assert digest(out) == world.expected


# ---- tasks --------------------------------------------------------------------------------------------


def test_blocks_come_back_with_their_answers_under_names_that_say_what_they_are(client: Any) -> None:
    assert sorted(DaskExecutor(client).map_blocks(w.double, [3, 1, 2])) == [(1, 2), (2, 4), (3, 6)]
    names = [ours._names(w.double, [(0, 4)]) for _ in range(2)]  # pyright: ignore[reportPrivateUsage]
    (first,), (second,) = names
    assert first.startswith("cmdgpu-task-0-4-") and first != second
    assert key_split(first) == "cmdgpu-task"


def test_kernels_take_the_threads_of_the_worker_or_those_asked_for(client: Any) -> None:
    assert list(DaskExecutor(client).map_blocks(w.how_many_threads, [0])) == [(0, 1)]
    assert list(DaskExecutor(client, threads=3).map_blocks(w.how_many_threads, [0])) == [(0, 3)]
    assert list(DaskExecutor(client).map_blocks(w.how_many_threads, [0])) == [(0, 1)], "it was not put back"


def test_who_stops_listening_cancels_what_is_outstanding(client: Any) -> None:
    executor = DaskExecutor(client)
    coming = executor.map_blocks(w.sleep, [0.01] + [0.5 + i / 1000 for i in range(20)])
    next(coming)
    coming.close()  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
    wait_for(lambda: not client.cluster.scheduler.tasks)


def test_a_machine_is_shared_by_its_workers() -> None:
    assert Crew.of(["0", "GPU-7"], cores=8) == Crew(("0", "GPU-7"), 4)
    assert Crew.of(["0"], cores=8).resources == {"GPU": 1}
    assert Crew.of([], cores=2) == Crew((None, None), 1)
    assert Crew.of([], cores=16) == Crew((None,) * 4, 4)
    assert Crew.of([], cores=16).resources == {}


# ---- one line -----------------------------------------------------------------------------------------


def refused(kind: type[CmdgpuError], run: Any) -> str:
    with pytest.raises(kind) as caught:
        run()
    return line_of(caught.value)


def test_errors_of_ours_cross_the_wire_as_they_are(client: Any) -> None:
    with pytest.raises(StoreCorrupt) as caught:
        list(DaskExecutor(client).map_blocks(w.fail, [5]))
    error = caught.value
    assert (error.file, error.tensor, error.step) == ("s.zarr/weights/c.1.2", "fc.weight", 7)
    assert line_of(error) == (
        "s.zarr/weights/c.1.2: tensor 'fc.weight' at step 7: block 5 is damaged; "
        "`cmdgpu verify` lists all damage and says what to do"
    )
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    with pytest.raises(ZeroDivisionError):
        list(DaskExecutor(client).map_blocks(w.fail_otherwise, [5]))


def test_a_block_at_which_workers_die_is_named(client: Any) -> None:
    client.cluster.scheduler.allowed_failures = 0
    try:
        line = refused(WorkerLost, lambda: list(DaskExecutor(client).map_blocks(w.die, [(4, 8)])))
    finally:
        client.cluster.scheduler.allowed_failures = 3
    assert line.startswith("1 workers died at one task (task, block 4-8), the last one at tcp://127.0.0.1:")


@pytest.mark.usefixtures("impatient")
def test_what_no_worker_has_is_said_after_a_bounded_wait(client: Any) -> None:
    executor = DaskExecutor(client, resources={"GPU": 2})
    line = refused(WorkerLost, lambda: list(executor.map_blocks(w.double, [1])))
    address = client.scheduler.address
    assert line.startswith(
        f"for 0 s there was no worker with GPU=2 at the scheduler {address}: it has 2 workers, "
        "with no resources; start workers"
    )


@pytest.fixture
def bare_scheduler() -> Iterator[Any]:
    """A cluster of nobody."""
    options = {"host": "127.0.0.1", "port": 0, "dashboard": False, "dashboard_address": "127.0.0.1:0"}
    spec = {"cls": distributed.Scheduler, "options": options}
    with cast(Any, distributed).SpecCluster(scheduler=spec, workers={}) as cluster:
        yield cluster


@pytest.mark.usefixtures("impatient")
def test_a_scheduler_without_workers_and_one_that_is_gone(bare_scheduler: Any) -> None:
    address = bare_scheduler.scheduler_address
    with DaskExecutor.connect(address) as executor:
        line = refused(WorkerLost, lambda: list(executor.map_blocks(w.double, [1])))
        assert f"no worker at the scheduler {address}: it has no workers" in line
    with executor_for(bare_scheduler) as theirs:
        assert isinstance(theirs, DaskExecutor)
    bare_scheduler.close()
    line = refused(WorkerLost, lambda: DaskExecutor.connect(address))
    assert line.startswith(f"no scheduler of Dask answers at {address} (")
    line = refused(UsageError, lambda: DaskExecutor.connect("tcp://host:port"))
    assert "'tcp://host:port' is no address of a scheduler" in line


def test_a_scheduler_that_goes_away_in_the_middle(world: World, tmp_path: Path) -> None:
    out = world.out(tmp_path)
    with in_this_process(1) as cluster, client_of(cluster) as client:
        address = cluster.scheduler_address
        w.write_slowly(0.1)
        try:
            line = refused(WorkerLost, lambda: world.fit(out, client, progress=Midway(2, cluster.close)))
        finally:
            w.write_slowly(0)
        again = refused(UsageError, lambda: world.fit(out, client))
    assert line.startswith(f"the scheduler at {address} is gone, or gave up what it was asked (fit, block ")
    assert line.endswith("start it again, then the same fit: what is done is kept")
    assert again == "this Client is closed; open a new one"
    world.fit(out)
    assert digest(out) == world.expected


def test_a_cluster_without_the_package_and_clients_of_other_kinds(client: Any) -> None:
    client.run(w.forget_cmdgpu)
    try:
        line = refused(UsageError, lambda: list(DaskExecutor(client).map_blocks(w.double, [1])))
    finally:
        client.run(w.remember_cmdgpu)
    assert line.startswith("cmdgpu is not installed everywhere on the cluster at tcp://127.0.0.1:")
    line = refused(UsageError, lambda: DaskExecutor.over(cast(Any, distributed).Security()))
    assert line == "Security of Dask runs no blocks; give a Client or a cluster"


def test_a_worker_with_too_little_memory_says_so(client: Any, world: World, tmp_path: Path) -> None:
    line = refused(MemoryLimitError, lambda: world.fit(world.out(tmp_path), client, memory_limit="10MB"))
    assert "a worker on " in line and "the memory limit is 10 MB; give" in line


def test_without_dask_the_way_to_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    monkeypatch.delitem(sys.modules, "cmdgpu.streaming.dask")
    with pytest.raises(UsageError) as caught, executor_for("dask"):
        pass
    assert line_of(caught.value) == "Dask is not installed; pip install 'cmdgpu[dask]'"


def test_what_a_scheduler_imports_is_light() -> None:
    code = "import sys, cmdgpu.streaming.dask; print({'torch', 'zarr'} & set(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "set()\n"
