"""Jobs of several ranks, on the CPU: every rank is a process, and a test hears how each of them ended.

The processes are forked from one that has imported what is slow to import, so that a job costs a second.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import cmdgpu.recording
from cmdgpu.errors import CmdgpuError, CmdgpuWarning, RankLost, UnsupportedTensor, UsageError, WriteFailed
from cmdgpu.ranks import Ranks
from cmdgpu.recording import Recorder
from cmdgpu.store import journal as journal_module
from cmdgpu.trajectory import Trajectory
from tests.verbs import check_same_bits, float_tensors

Job: TypeAlias = Callable[..., None]
"""Called with the rank, a folder that all share, and what else the test gives."""
_PATIENCE: Final = timedelta(seconds=20)
"""How long a rank waits for the others: a test that hangs ends."""
_CONTEXT: Final = multiprocessing.get_context("forkserver")
_TORCH: Final = ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict")
_CONTEXT.set_forkserver_preload([*_TORCH, "xarray", "pytest", "cmdgpu.recording", "cmdgpu.trajectory"])


def run_job(job: Job, folder: Path, *arguments: Any, world: int = 2) -> list[int]:
    """Exit codes of the ranks: 0, 1 for an exception (see ``error_of``), -9 for one that was killed."""
    store = folder / f"store.{job.__name__}.{len(list(folder.glob('store.*')))}"
    ranks = [
        _CONTEXT.Process(target=_run_rank, args=(job, rank, world, folder, store, arguments))
        for rank in range(world)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        if rank.is_alive():
            rank.kill()
            rank.join()
    return [cast(int, rank.exitcode) for rank in ranks]


def error_of(folder: Path, rank: int) -> str:
    return (folder / f"error.{rank}").read_text()


def _run_rank(job: Job, rank: int, world: int, folder: Path, store: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error", CmdgpuWarning)
    cast(Any, cmdgpu.recording).Ranks = lambda: Ranks(_PATIENCE)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=_PATIENCE
        )
        job(rank, folder, *arguments)
    except Exception as error:
        (folder / f"error.{rank}").write_text(f"{type(error).__name__}: {error}")
        sys.stdout.flush()
        os._exit(1)  # the other ranks may be gone: nothing to take leave of
    dist.destroy_process_group()
    sys.stdout.flush()
    # Of gloo's threads one now and then outlives the group, and C++ ends the process for it.
    os._exit(0)


# ---- models -------------------------------------------------------------------------------------------


class Uneven(nn.Module):
    """Rows that two ranks cannot share evenly, a parameter for one of them only, tied weights, buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.odd = nn.Linear(16, 5)
        self.one = nn.Parameter(torch.ones(1))
        self.body = nn.Sequential(nn.Linear(16, 33), nn.BatchNorm1d(33))
        self.low = nn.Linear(5, 3, dtype=torch.bfloat16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        low = self.low(self.odd(x).to(torch.bfloat16)).float()
        return (self.head(x).sum() + self.body(x).sum() + low.sum()) * self.one.sum()


def uneven_at_start() -> Uneven:
    cast(Any, torch).manual_seed(0)
    return Uneven()


def sharded_uneven() -> Any:
    model: Any = uneven_at_start()
    for part in (model.body, model.low, model):
        fully_shard(part)
    return model


def train_a_step(model: Any, optimizer: Any) -> None:
    optimizer.zero_grad()
    model(torch.arange(20)).backward()
    optimizer.step()


def gathered(model: nn.Module) -> dict[str, Tensor]:
    options = StateDictOptions(full_state_dict=True)
    found = cast(dict[str, Tensor], get_model_state_dict(model, options=options))
    return {name: t.clone() for name, t in found.items() if t.is_floating_point()}


PLACED: Final[dict[str, tuple[tuple[int, ...], Any]]] = {
    "rows": ((5, 3), Shard(0)),
    "columns": ((4, 7), Shard(1)),
    "deep": ((3, 4, 5), Shard(2)),
    "one": ((1, 6), Shard(0)),
    "both": ((3, 2), Replicate()),
    "scalar": ((), Replicate()),
    "empty": ((0, 3), Shard(0)),
}
"""Shape and placement of DTensors over two ranks."""


def whole_at(step: int) -> dict[str, Tensor]:
    """What the tensors of ``PLACED`` hold at a step."""
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, (shape, _) in PLACED.items()}


def placed_at(step: int) -> nn.ParameterDict:
    """Made by all ranks together: they talk to each other about it."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return nn.ParameterDict(
        {
            name: nn.Parameter(distribute_tensor(tensor, mesh, [PLACED[name][1]]))
            for name, tensor in whole_at(step).items()
        }
    )


# ---- jobs ---------------------------------------------------------------------------------------------


def record_training(rank: int, folder: Path) -> None:
    """FSDP2, three steps; what the full model was is kept by rank 0. Then back to the first one."""
    model = sharded_uneven()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first: dict[str, Tensor] = {}
    with Recorder(folder / "run.zarr", rows_per_chunk=256) as recorder:
        for step in range(3):
            train_a_step(model, optimizer)
            with torch.no_grad():
                model(torch.arange(20))  # leaves the root's parameters gathered
            assert recorder.record(model, step, loss=step / 2)
            assert recorder.last_committed == step
            full = gathered(model)
            first = first or full
            if rank == 0:
                torch.save(full, folder / f"full.{step}.pt")
        assert not {name for name, _ in recorder.skipped} - {"body.1.num_batches_tracked"}
    Trajectory.open(folder / "run.zarr").load_into(model, 0)
    check_same_bits(gathered(model), first)


def record_placed(rank: int, folder: Path, steps: tuple[int, ...], rewind_to: int | None = None) -> None:
    """DTensors of every placement, as they are at those steps."""
    with Recorder(folder / "run.zarr", rows_per_chunk=256, rewind_to=rewind_to) as recorder:
        for step in steps:
            recorder.record(placed_at(step), step, loss=step)
    check = placed_at(99)
    Trajectory.open(folder / "run.zarr").load_into(check, steps[-1])
    found = {name: p.detach().full_tensor() for name, p in cast(dict[str, Any], check).items()}
    check_same_bits(found, whole_at(steps[-1]))


def record_replicas(rank: int, folder: Path) -> None:
    """DistributedDataParallel: every rank calls alike, rank 0 writes."""
    bare = nn.Linear(3, 2)
    model = nn.parallel.DistributedDataParallel(bare)
    with Recorder(folder / "run.zarr", every=2) as recorder:
        assert [recorder.record(model, step) for step in range(4)] == [True, False, True, False]
        recorder.flush()
        assert recorder.last_committed == (2 if rank == 0 else None)
    if rank == 0:
        torch.save(float_tensors(bare), folder / "full.pt")


def misuse(rank: int, folder: Path) -> None:
    """What is refused, and that it is refused on every rank and leaves the recorder usable."""
    path = folder / "run.zarr"
    with Recorder(path, rows_per_chunk=256) as recorder:
        _expect(
            UsageError, "the ranks record the steps 0, 1 at once", lambda: recorder.record(placed_at(0), rank)
        )
        recorder.record(placed_at(2), 2)
        _expect(UsageError, "step 1 cannot follow", lambda: recorder.record(placed_at(1), 1))
        write, failing = journal_module.write_chunk, [rank == 1]

        def full_disk(*arguments: Any) -> bytes:
            if failing[0]:
                raise WriteFailed("cannot write: the disk is full", file=arguments[0] / arguments[1])
            return write(*arguments)

        cast(Any, journal_module).write_chunk = full_disk
        met = (
            "c.1.1: cannot write: the disk is full"
            if rank
            else "rank 1 reports: cannot write: the disk is full"
        )
        _expect(WriteFailed, met, lambda: recorder.record(placed_at(3), 3))
        failing[0] = False
        recorder.record(placed_at(3), 3)
        assert recorder.last_committed == 3
    mine = placed_at(0)
    other = nn.ParameterDict({"other": mine["rows"]})
    with Recorder(path) as recorder:
        _expect(
            CmdgpuError, "the store has it where the model has 'other'", lambda: recorder.record(other, 4)
        )
        _expect(
            UsageError, "up to step 3, and training goes on from step 2", lambda: recorder.check(other, 2)
        )
    alone = mine if rank == 0 else other
    with Recorder(folder / "apart.zarr") as recorder:
        _expect(CmdgpuError, "rank 0 holds .* where rank 1 holds 'other'", lambda: recorder.record(alone, 0))
    with Recorder(folder / "plain.zarr") as recorder:
        if rank == 1:
            met = "rank 1 holds whole tensors and leaves recording to rank 0"
            _expect(CmdgpuWarning, met, lambda: recorder.record(nn.Linear(2, 2), 0))
        else:
            recorder.record(nn.Linear(2, 2), 0)


def flat(rank: int, folder: Path) -> None:
    """FSDP1, its own names kept or not."""
    for names in (True, False):
        warnings.simplefilter("ignore", FutureWarning)  # torch's own: FSDP1 is deprecated
        model = FullyShardedDataParallel(
            nn.Sequential(nn.Linear(4, 3)), use_orig_params=names, device_id=torch.device("cpu")
        )
        for inside in (model, model.module):
            recorder = Recorder(folder / "run.zarr")
            met = "a flat parameter of FSDP1 has lost its shape; shard with fully_shard"
            _expect(UnsupportedTensor, met, lambda m=inside, r=recorder: r.record(m, 0))
            recorder.close()


def opened_too_early(rank: int, folder: Path) -> None:
    dist.destroy_process_group()
    recorder = Recorder(folder / f"run.{rank}.zarr")
    dist.init_process_group("gloo", init_method=f"file://{folder}/again", rank=rank, world_size=2)
    _expect(
        UsageError, "open the recorder after init_process_group", lambda: recorder.record(placed_at(0), 0)
    )


def _expect(kind: type[BaseException], pattern: str, call: Callable[[], object]) -> None:
    import pytest

    with pytest.raises(kind, match=pattern):
        call()


KILLS: Final = ("agree", "chunk", "written", "small", "committed")
"""Moments of a record: all say they are ready, a chunk lies there, all of one's own do, rank 0 has only the
commit to do, rank 0 has committed and has not said so."""


def die_while_recording(rank: int, folder: Path, victim: int, moment: str) -> None:
    """Two snapshots; in the third a rank is killed."""
    models = [placed_at(step) for step in range(4)]
    with Recorder(folder / "run.zarr", rows_per_chunk=256) as recorder:
        for step in (0, 1):
            recorder.record(models[step], step, loss=step)
        if rank == victim:
            _die_at(moment)
        try:
            recorder.record(models[2], 2, loss=2)
        except RankLost:
            _expect(RankLost, "a rank was lost", lambda: recorder.record(models[3], 3))
            raise


def _die_at(moment: str) -> None:
    module, name, after = {
        "agree": (cmdgpu.sharded, "lock_ranks", True),
        "chunk": (journal_module, "write_chunk", True),
        "written": (cmdgpu.sharded, "write_rows", True),
        "small": (journal_module.Journal, "_commit", False),
        "committed": (journal_module.Journal, "append_written", True),
    }[moment]
    original = getattr(module, name)

    def die(*arguments: Any, **options: Any) -> None:
        if after:
            original(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(module, name, die)
