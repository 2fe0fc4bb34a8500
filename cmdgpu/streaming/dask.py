"""Blocks on a Dask cluster: one that is there, or one that is made on this machine for the fit.

What crosses the wire is small: to a worker a job and a block, back its report. The scheduler imports this
module, and neither torch nor anything that opens a store.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import pickle
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Final, NoReturn, TypeVar, cast

from cmdgpu.errors import CmdgpuError, UsageError, WorkerLost, printable

try:
    # it carries hardly any types
    distributed: Final[Any] = importlib.import_module("distributed")
except ModuleNotFoundError as error:
    if error.name != "distributed":
        raise
    raise UsageError("Dask is not installed", hint="pip install 'cmdgpu[dask]'") from error

B = TypeVar("B")
R = TypeVar("R")

CONNECT_S: Final = 30.0
"""How long a scheduler may take to answer."""
PATIENCE_S: Final = 300.0
"""How long a cluster may be without a worker that can do a block: queues of batch systems are slow."""
RETRIES: Final = 2
"""More attempts at a block whose worker reports an error, wherever the scheduler likes. Dask itself starts a
block again whose worker died, three times unless it is told otherwise (``allowed-failures``)."""
_LOOK_S: Final = 5.0
"""How often it is asked who is there, while nothing comes."""
_POLL_S: Final = 0.02
_MOST_WORKERS: Final = 4
"""Of our own cluster on CPUs: a quarter of the free memory, the default of each, is then no more than all."""
_GUARD: Final = 'a script that makes a cluster does so below `if __name__ == "__main__":`'


class DaskExecutor:
    """Blocks as tasks of a cluster, each the business of one worker and all its threads.

    ``client`` is a synchronous ``distributed.Client``; it stays open. ``resources`` are those that a worker
    must declare to be given a block, ``{"GPU": 1}``. ``threads`` are those of the kernels on a worker: by
    default as many as the worker has for tasks, whatever OMP_NUM_THREADS is there (Dask sets it to 1).

    A worker needs this package, in the same version, and the files of trajectory and result under the same
    names. A worker that dies costs its block, which another one starts again.
    """

    def __init__(
        self, client: Any, *, resources: Mapping[str, float] | None = None, threads: int | None = None
    ) -> None:
        if client.asynchronous:
            raise UsageError("an asynchronous Client cannot be waited for", hint="give a synchronous one")
        if client.scheduler is None:
            raise UsageError("this Client is closed", hint="open a new one")
        self._client = client
        self._address = printable(str(client.scheduler.address))  # which it forgets when it is closed
        self._resources = dict(resources or {})
        self._threads = threads
        self._ours = contextlib.ExitStack()

    @staticmethod
    def connect(address: str, *, resources: Mapping[str, float] | None = None) -> DaskExecutor:
        """The cluster of the scheduler at ``tcp://host:port``; the connection ends with the ``with``.

        Raises UsageError for what is no address, WorkerLost when nobody answers.
        """
        return DaskExecutor._over(address, resources=resources)

    @staticmethod
    def over(client_or_cluster: Any) -> DaskExecutor:
        """A Client as it is, or a cluster of any kind, which is connected to, and stays when the fit ends."""
        if isinstance(client_or_cluster, distributed.Client):
            return DaskExecutor(client_or_cluster)
        if isinstance(client_or_cluster, distributed.deploy.Cluster):
            return DaskExecutor._over(client_or_cluster)
        raise UsageError(
            f"{type(client_or_cluster).__name__} of Dask runs no blocks", hint="give a Client or a cluster"
        )

    @staticmethod
    def local() -> DaskExecutor:
        """A cluster on this machine that ends with the ``with``: a worker for each CUDA device where there
        are some, else up to four that share the cores. Without dashboard, reachable from here alone.
        """
        devices = cuda_devices()
        cores = importlib.import_module("dask.system").CPU_COUNT
        crew = Crew.of(devices, cores)
        try:
            cluster = crew.cluster()
        except (RuntimeError, OSError) as error:
            raise WorkerLost(f"the workers did not start: {_first_line(error)}", hint=_GUARD) from error
        try:
            ours = DaskExecutor._over(cluster, resources=crew.resources, threads=crew.threads)
        except CmdgpuError:
            cluster.close()
            raise
        ours._ours.callback(cluster.close)
        ours._ours.callback(ours._client.close)  # the last one in is the first to go
        return ours

    @staticmethod
    def _over(
        place: Any, *, resources: Mapping[str, float] | None = None, threads: int | None = None
    ) -> DaskExecutor:
        try:
            client = distributed.Client(place, timeout=CONNECT_S, set_as_default=False)
        except ValueError as error:
            raise UsageError(
                f"{printable(str(place))!r} is no address of a scheduler", hint="write tcp://host:8786"
            ) from error
        except OSError as error:
            raise WorkerLost(
                f"no scheduler of Dask answers at {printable(str(place))} ({_first_line(error)})",
                hint="start one with `dask scheduler`, or look whether a firewall is in between",
            ) from error
        ours = DaskExecutor(client, resources=resources, threads=threads)
        ours._ours.callback(client.close)
        return ours

    def __enter__(self) -> DaskExecutor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ours.close()

    def map_blocks(self, fn: Callable[[B], R], blocks: Sequence[B]) -> Iterator[tuple[B, R]]:
        """Each block with what ``fn`` answered for it, as they come; what is outstanding is cancelled at the
        end, whatever ends it.

        Raises what ``fn`` raises, once it has failed ``RETRIES`` times more, and WorkerLost: when workers die
        at a block, when the scheduler is gone, when for ``PATIENCE_S`` no worker could have done anything.
        """
        run, names = _Run.of(fn, self._threads), _names(fn, blocks)
        watch = _Watch(self._client, self._address, self._resources)
        futures = self._client.map(
            run, list(blocks), key=list(names), retries=RETRIES, resources=self._resources, pure=False
        )
        coming = distributed.as_completed(futures, loop=self._client.loop)
        try:
            while not coming.is_empty():
                if not coming.has_ready():
                    watch.look()
                    time.sleep(_POLL_S)
                    continue
                future = next(coming)
                block = names[future.key]
                try:
                    answer = future.result(timeout=_LOOK_S)
                except Exception as error:
                    if isinstance(error, TimeoutError) and future.status != "error":
                        coming.add(future)  # its worker died with it: it is on its way again
                        continue
                    self._explain(error, future.key, watch)
                future.release()
                watch.saw()
                yield block, answer
        finally:
            left = [future for future in futures if not future.done()]
            if left and self._client.status == "running":
                self._client.cancel(left)

    def _explain(self, error: Exception, key: str, watch: _Watch) -> NoReturn:
        """Ours as they are, those of the cluster as a line of ours, any other as it is."""
        name, address = type(error).__name__, self._address
        if isinstance(error, CmdgpuError):
            raise error
        if isinstance(error, distributed.scheduler.KilledWorker):
            told = cast(Any, error)
            raise WorkerLost(
                f"{told.allowed_failures + 1} workers died at one task ({_block_of(key)}), the last one at "
                f"{told.last_worker.address} (scheduler {address})",
                hint="look into its log: memory comes first (--memory-limit); what is done is kept",
            ) from error
        if name == "NoValidWorkerError":
            raise watch.refusal("the scheduler gave up: there was") from error
        if isinstance(error, distributed.CancelledError):
            raise WorkerLost(
                f"the scheduler at {address} is gone, or gave up what it was asked ({_block_of(key)}; "
                f"{printable(str(getattr(error, 'reason', 'cancelled')))})",
                hint="start it again, then the same fit: what is done is kept",
            ) from error
        missing = next((e for e in (error, error.__cause__) if isinstance(e, ModuleNotFoundError)), None)
        if missing is not None and str(missing.name).partition(".")[0] in ("cmdgpu", "cmdgpu_kernels"):
            raise UsageError(
                f"cmdgpu is not installed everywhere on the cluster at {address}",
                hint="scheduler and workers need the same version",
            ) from error
        raise error


def cuda_devices() -> list[str]:
    """The CUDA devices of this process, as CUDA_VISIBLE_DEVICES names them."""
    torch = importlib.import_module("torch")
    count: int = torch.cuda.device_count() if torch.cuda.is_available() else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:count] if visible else [str(i) for i in range(count)]


@dataclass(frozen=True)
class Crew:
    """The workers of a cluster on one machine: each does one block at a time, with so many threads."""

    devices: tuple[str | None, ...]
    """A worker for each: the CUDA device that it alone sees, None for a worker on CPUs."""
    threads: int

    @staticmethod
    def of(devices: Sequence[str], cores: int) -> Crew:
        named = tuple(devices) or (None,) * min(_MOST_WORKERS, cores)
        return Crew(named, max(1, cores // len(named)))

    @property
    def resources(self) -> dict[str, float]:
        return {} if None in self.devices else {"GPU": 1}

    def cluster(self) -> Any:
        """Started. Dask's own memory limit is off: ours is kept before anything is read. So are its logs:
        what matters is raised.
        """
        workers: dict[int, Any] = {}
        for i, device in enumerate(self.devices):
            options: dict[str, Any] = {
                "nthreads": 1,
                "memory_limit": 0,
                **_QUIET,
                "silence_logs": logging.CRITICAL,
            }
            if device is not None:
                options |= {"env": {"CUDA_VISIBLE_DEVICES": device}, "resources": self.resources}
            workers[i] = {"cls": distributed.Nanny, "options": options}
        scheduler = {"cls": distributed.Scheduler, "options": {"port": 0, **_QUIET}}
        return distributed.SpecCluster(scheduler=scheduler, workers=workers, silence_logs=logging.CRITICAL)


_QUIET: Final = {"host": "127.0.0.1", "dashboard": False, "dashboard_address": "127.0.0.1:0"}
"""Nobody else hears of it: without an address the scheduler takes port 8787, or warns that it is taken."""


@dataclass(frozen=True)
class _Run:
    """What a task is: a function that is unpickled on the worker, so that the scheduler need not know it."""

    fn: bytes = field(repr=False)
    threads: int | None

    @staticmethod
    def of(fn: Callable[[Any], Any], threads: int | None) -> _Run:
        return _Run(pickle.dumps(fn), threads)

    def __call__(self, block: Any) -> Any:
        from cmdgpu.streaming.jobs import whole_process

        threads = self.threads or distributed.get_worker().state.nthreads
        with whole_process(threads):
            return pickle.loads(self.fn)(block)


class _Watch:
    """Whether there is a worker that could do a block; how long there has been none."""

    def __init__(self, client: Any, address: str, resources: Mapping[str, float]) -> None:
        self._client = client
        self._address = address
        self._resources = resources
        self._since = self._looked = time.monotonic()
        self._have = "no workers"

    def saw(self) -> None:
        """A block was done: somebody is there."""
        self._since = self._looked = time.monotonic()

    def look(self) -> None:
        """From time to time. Raises WorkerLost when nobody was there for too long."""
        if time.monotonic() - self._looked < _LOOK_S:
            return
        if self._somebody():
            self._since = time.monotonic()
        if time.monotonic() - self._since > PATIENCE_S:
            raise self.refusal(f"for {PATIENCE_S:.0f} s there was")
        self._looked = time.monotonic()

    def refusal(self, how: str) -> WorkerLost:
        asked = f" with {_spelled(self._resources)}" if self._resources else ""
        return WorkerLost(
            f"{how} no worker{asked} at the scheduler {self._address}: it has {self._have}",
            hint="start workers, and wait for them where a queue is slow (client.wait_for_workers)",
        )

    def _somebody(self) -> bool:
        """Asks the scheduler; one that does not answer has nobody."""
        if self._client.status not in ("running", "connecting"):
            raise WorkerLost(
                f"the connection to the scheduler at {self._address} is closed",
                hint="open a new Client, then start the same fit: what is done is kept",
            )
        ask = self._client.scheduler.identity
        try:
            workers = self._client.sync(ask, n_workers=-1, callback_timeout=min(CONNECT_S, PATIENCE_S))
        except OSError as error:  # of which a timeout is one
            self._have = f"not answered ({_first_line(error)})"
            return False
        declared = [worker["resources"] for worker in workers["workers"].values()]
        able = [d for d in declared if all(d.get(k, 0) >= n for k, n in self._resources.items())]
        kinds = sorted({_spelled(d) for d in declared})
        self._have = f"{len(declared)} workers, with {' or '.join(kinds)}" if declared else "no workers"
        return bool(able)


def _names(fn: object, blocks: Sequence[B]) -> dict[str, B]:
    """Blocks by the names of their tasks: what the dashboard shows, and of this run alone."""
    label, run = getattr(fn, "label", "task"), secrets.token_hex(4)
    return {f"cmdgpu-{label}-{_spell(block)}-{run}": block for block in blocks}


def _spell(block: object) -> str:
    parts = cast(tuple[object, ...], block) if isinstance(block, tuple) else (block,)
    return "-".join(map(str, parts))


def _block_of(key: str) -> str:
    """``cmdgpu-fit-32-64-1f0c9a7e`` -> ``fit, block 32-64``."""
    _, label, *parts, _ = key.split("-")
    return f"{label}, block {'-'.join(parts)}"


def _spelled(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{k}={n:g}" for k, n in sorted(resources.items())) or "no resources"


def _first_line(error: BaseException) -> str:
    return printable((str(error).strip() or type(error).__name__).splitlines()[0], 160)
