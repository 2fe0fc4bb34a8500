"""Programs that write, for somebody else to kill: ``python -m tests.faults.writers append run.zarr``.

Snapshot t is a pure function of t, so that whoever looks at a store afterwards knows what it must hold. A
writer says ``ACK <n>`` when its promise is given: n snapshots are durable, or unit n of a fit is, or the
export is there. An error of the product ends it with ``ERROR <class>: <text>`` and code 1; any other one with
``CRASH`` and code 70. It speaks by ``writev``: the faults of a sweep are in ``write``, and must not hit what
the writer says.

``serve`` is a process that has imported everything and forks a writer per line of arguments it is given.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Final
from unittest.mock import patch

import numpy as np

from cmdgpu.errors import CmdgpuError
from cmdgpu.notation import F32
from cmdgpu.sampling import candidate_rows
from cmdgpu.store.journal import Journal
from cmdgpu.store.parameter_map import ParameterMap, whole
from tests.faults import mutants
from tests.faults.mutants import Acknowledge

ROWS: Final = 256
N_WEIGHTS: Final = 500
N: Final = N_WEIGHTS + 122
N_CHUNKS: Final = 3
"""The last one is a tail."""
LAYOUT: Final = ParameterMap(
    whole([("weight", "parameter", "float32", (N_WEIGHTS,)), ("running", "buffer", "float32", (122,))])
)
LATE: Final = 3
"""The snapshot that brings a second scalar."""
FAILED: Final = 1
CRASHED: Final = 70


# ---- what is written ------------------------------------------------------------------------------------


def step_of(t: int) -> int:
    return 10 * t


def values_of(t: int) -> F32:
    """(N,) the numbers of snapshot t."""
    return np.random.default_rng(t).standard_normal(N).astype(np.float32)


def column_of(t: int) -> F32:
    """The same as whole chunks, padded."""
    column = np.full(N_CHUNKS * ROWS, np.nan, dtype=np.float32)
    column[:N] = values_of(t)
    return column


def scalars_of(t: int) -> dict[str, float]:
    return {"loss": t / 4} | ({"late": -float(t)} if t >= LATE else {})


# ---- writers --------------------------------------------------------------------------------------------


def create(path: Path) -> Journal:
    return Journal.create(
        path, LAYOUT, dtype="float32", rows=ROWS, unit="step", sketch_rows=candidate_rows(LAYOUT)
    )


def append_next(journal: Journal) -> int:
    """Append the snapshot that follows; how many there are now."""
    t = len(journal.view.steps)
    column = column_of(t)
    assert journal.view.sketch_rows is not None
    journal.append(column, step_of(t), scalars_of(t), column[journal.view.sketch_rows])
    return t + 1


def append(path: Path, snapshots: int | None, acknowledge: Acknowledge) -> None:
    """Append to the store, made when it is not there; until killed when ``snapshots`` is None."""
    journal = Journal.open(path) if path.exists() else create(path)
    try:
        written = 0
        while snapshots is None or written < snapshots:
            acknowledge(append_next(journal))
            written += 1
    finally:
        journal.close()


def record(path: Path, snapshots: int, acknowledge: Acknowledge) -> None:
    """The same store by way of a model; ``last_committed`` is the promise."""
    import torch
    from torch import nn

    from cmdgpu.recording import Recorder

    model = nn.Module()
    model.register_parameter("weight", nn.Parameter(torch.zeros(N_WEIGHTS)))
    model.register_buffer("running", torch.zeros(N - N_WEIGHTS))
    with Recorder(path, rows_per_chunk=ROWS) as recorder:

        def promise() -> None:
            if recorder.last_committed is not None:
                acknowledge(recorder.last_committed // step_of(1) + 1)

        first = 0 if recorder.last_committed is None else recorder.last_committed // step_of(1) + 1
        for t in range(first, first + snapshots):
            values = torch.from_numpy(values_of(t))  # pyright: ignore[reportUnknownMemberType]
            with torch.no_grad():
                model.get_parameter("weight").copy_(values[:N_WEIGHTS])
                model.get_buffer("running").copy_(values[N_WEIGHTS:])
            recorder.record(model, step_of(t), **scalars_of(t))
            promise()
        recorder.flush()
        promise()


def fit(store: Path, out: Path, acknowledge: Acknowledge) -> None:
    """A small fit, one unit a chunk; a unit is promised when the result's writer has returned."""
    from cmdgpu.decomposition import CMD
    from cmdgpu.results import StoredWriter
    from cmdgpu.trajectory import Trajectory

    write = StoredWriter.write

    def write_and_say(self: Any, unit: int, *rest: Any) -> None:
        write(self, unit, *rest)
        acknowledge(unit)

    with patch.object(StoredWriter, "write", write_and_say):
        CMD(n_modes=2, n_samples=40, device="cpu").fit(Trajectory.open(store), out=out, memory_limit="1GiB")


def export(store: Path, out: Path, acknowledge: Acknowledge) -> None:
    """The last snapshot as a file; its suffix tells the format."""
    from cmdgpu.trajectory import Trajectory

    trajectory = Trajectory.open(store)
    trajectory.export(out, int(trajectory.steps[-1]))
    acknowledge(1)


# ---- one thread -----------------------------------------------------------------------------------------


class InlineExecutor:
    """A pool without threads: counters of system calls are per thread, so all writing is done by one."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def submit(self, work: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(work(*args, **options))
        except BaseException as error:
            future.set_exception(error)
        return future

    def map(self, work: Callable[..., Any], *items: Any) -> list[Any]:
        return [work(*args) for args in zip(*items, strict=True)]

    def shutdown(self) -> None:
        pass

    def __enter__(self) -> InlineExecutor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


def write_in_one_thread() -> None:
    """For the rest of this process. Reading ahead keeps its own threads: nobody waits for their calls."""
    pools = ["cmdgpu.store.journal"]
    if "torch" in sys.modules:
        pools += ["cmdgpu.results.stored", "cmdgpu.recording", "cmdgpu.streaming.engine"]
    for name in pools:
        patch(f"{name}.ThreadPoolExecutor", InlineExecutor).start()


# ---- commands -------------------------------------------------------------------------------------------


def _say(line: str) -> None:
    os.writev(1, [line.encode() + b"\n"])


def _acknowledge(n: int) -> None:
    _say(f"ACK {n}")


def _wait() -> None:
    """Until somebody has attached. Byte by byte: the next line on this pipe is another writer's."""
    _say(f"READY {os.getpid()}")
    while os.read(0, 1) not in (b"\n", b""):
        pass


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="writers")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name in ("append", "record", "fit", "export"):
        verb = verbs.add_parser(name)
        verb.add_argument("store", type=Path)
        verb.add_argument("--mutant", choices=sorted(mutants.MUTANTS))
        verb.add_argument("--wait", action="store_true", help="say READY, begin after a line on stdin")
        verb.add_argument("--single", action="store_true", help="write in one thread")
        if name in ("append", "record"):
            verb.add_argument("--snapshots", type=int, default=1)
        if name == "append":
            verb.add_argument("--forever", action="store_true")
        if name in ("fit", "export"):
            verb.add_argument("out", type=Path)
    verbs.add_parser("serve")
    return parser


def _work(arguments: argparse.Namespace) -> None:
    if arguments.verb == "append":
        append(arguments.store, None if arguments.forever else arguments.snapshots, _acknowledge)
    elif arguments.verb == "record":
        record(arguments.store, arguments.snapshots, _acknowledge)
    elif arguments.verb == "fit":
        fit(arguments.store, arguments.out, _acknowledge)
    else:
        export(arguments.store, arguments.out, _acknowledge)


def run(arguments: argparse.Namespace) -> int:
    """One writer to its end; its exit code."""
    if arguments.single:
        write_in_one_thread()
    with mutants.in_place(arguments.mutant, _acknowledge):
        if arguments.wait:
            _wait()
        try:
            _work(arguments)
        except CmdgpuError as error:
            _say(f"ERROR {type(error).__name__}: {error}")
            return FAILED
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)
            inside = [frame for frame in where if "/cmdgpu/" in frame.filename][-1:]
            at = ", ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in inside)
            _say(f"CRASH {type(error).__name__}: {error} in {at}")
            return CRASHED
    return 0


# ---- a process that forks writers -----------------------------------------------------------------------


def _warm_up() -> None:
    """Every path once: a module that is imported late would spend the calls that a sweep counts."""

    def promised_nothing(_: int) -> None:
        pass

    folder = Path(tempfile.mkdtemp())
    try:
        append(folder / "run.zarr", LATE, promised_nothing)
        record(folder / "run.zarr", 1, promised_nothing)
        fit(folder / "run.zarr", folder / "run.cmd.zarr", promised_nothing)
        for suffix in ("safetensors", "pt"):
            export(folder / "run.zarr", folder / f"model.{suffix}", promised_nothing)
    finally:
        shutil.rmtree(folder)


def serve() -> None:
    """Fork a writer for every line (a JSON list of arguments); say ``END <code>`` when it is gone."""
    import torch

    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    for name in ("decomposition", "recording", "streaming.engine"):
        importlib.import_module(f"cmdgpu.{name}")
    write_in_one_thread()
    _warm_up()
    parser = _parser()
    gc.freeze()  # what was imported stays in pages that the children share
    _say("SERVING")
    while line := _read_line():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # the threads it warns of are idle
            child = os.fork()
        if child == 0:
            code = CRASHED
            try:
                code = run(parser.parse_args(json.loads(line)))
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        _say(f"END {os.waitstatus_to_exitcode(status)}")


def _read_line() -> bytes:
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return b""
        line += byte
    return bytes(line)


def main(argv: Sequence[str]) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.verb == "serve":
        serve()
        return 0
    return run(arguments)


def environment() -> Mapping[str, str]:
    """One thread in the libraries below, for a process that forks."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {**os.environ, **one}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
