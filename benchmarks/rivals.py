"""The rivals, each in its natural layout and its best settings; a package that is missing is a reason."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, TypeAlias, cast

import numpy as np
import torch

from benchmarks import in_memory_script
from benchmarks.cases import F32, Block, Case
from benchmarks.providers import SAMPLED, Answer, NotRun, Prepared, Provider
from cmdgpu.notation import I64

Run: TypeAlias = Callable[[int], Answer]

TRIED_ROWS = 1 << 14
"""Rows on which a rival's settings are compared, outside the clock."""
DASK_CHUNK_BYTES = (1 << 20, 1 << 23, 1 << 26)
KEOPS_FLAGS = "-O3 -march=native -fno-math-errno -fno-trapping-math -fno-signed-zeros -fassociative-math"
"""KeOps compiles with its own flags and ``CXXFLAGS``; these made it four times faster with AVX-512.
``-ffast-math`` would say the same, and switch off subnormal numbers for everybody in the process."""


def package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotRun(f"{name.partition('.')[0]} is not installed: {error}") from error


@contextmanager
def using_threads(threads: int) -> Generator[None]:
    """Every library of the process at the same number: torch, OpenBLAS and each OpenMP.

    Without threadpoolctl only torch: the others then have all threads, and no figure for fewer.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    limit: AbstractContextManager[object] = nullcontext()
    with suppress(NotRun):
        limit = package("threadpoolctl").threadpool_limits(threads)
    try:
        with limit:
            yield
    finally:
        torch.set_num_threads(before)


def fastest(candidates: Mapping[str, Run], rows: int) -> tuple[str, Run]:
    """The best of a rival's settings on this case, by the better of two runs after one to warm up."""
    seconds: dict[str, float] = {}
    for name, run in candidates.items():
        run(rows)
        seconds[name] = min(_seconds(run, rows) for _ in range(2))
    best = min(seconds, key=lambda name: seconds[name])
    return best, candidates[best]


def _seconds(run: Run, rows: int) -> float:
    started = time.perf_counter()
    run(rows)
    return time.perf_counter() - started


def _centred_unit(R_mt: F32) -> tuple[F32, F32, F32]:
    """Unit references, their norms and means."""
    R = R_mt.astype(np.float64)
    rmean = R.mean(axis=1)
    centred = R - rmean[:, None]
    rnorm = np.linalg.norm(centred, axis=1)
    unit = centred / rnorm[:, None]
    return unit.astype(np.float32), rnorm.astype(np.float32), rmean.astype(np.float32)


def _signed(positive: Any, size: F32) -> F32:
    return cast(F32, np.where(positive, size, -size))


def plain_torch(case: Case, block: Block, R_mt: F32, threads: int) -> Prepared:
    """Whole matrix, row-major: centre, one product, norms, argmax, fit. What one writes in five lines."""
    del threads
    W_nt = torch.as_tensor(block.W_nt)
    z_mt, rnorm, rmean = (torch.as_tensor(array) for array in _centred_unit(R_mt))

    def run(rows: int) -> Answer:
        W = W_nt[:rows]
        mean = W.mean(dim=1, keepdim=True)
        x = W - mean
        d = x @ z_mt.T
        mode = d.abs().max(dim=1).indices
        best = d.gather(1, mode[:, None])[:, 0]
        a = best / rnorm[mode]
        _ = mean[:, 0] - a * rmean[mode], best / x.square().sum(dim=1).sqrt()
        return Answer(mode.numpy(), a.numpy(), R_mt)

    return Prepared(run, block.prepare_ms["row-major"], block.rival_rows_of(case.modes))


def _numpy_lines(W: F32, z_mt: F32, rnorm: F32, rmean: F32) -> tuple[I64, F32]:
    mean = W.mean(axis=1, keepdims=True)
    x = W - mean
    d = x @ z_mt.T
    mode = np.abs(d).argmax(axis=1)
    best = np.take_along_axis(d, mode[:, None], axis=1)[:, 0]
    a = best / rnorm[mode]
    _ = mean[:, 0] - a * rmean[mode], best / np.sqrt(np.einsum("nt,nt->n", x, x))
    return mode, cast(F32, a)


def plain_numpy(case: Case, block: Block, R_mt: F32, threads: int) -> Prepared:
    """The same five lines in NumPy."""
    del threads
    W_nt, prepared = block.W_nt, _centred_unit(R_mt)

    def run(rows: int) -> Answer:
        return Answer(*_numpy_lines(W_nt[:rows], *prepared), R_mt)

    return Prepared(run, block.prepare_ms["row-major"], block.rival_rows_of(case.modes))


def dask_array(case: Case, block: Block, R_mt: F32, threads: int) -> Prepared:
    """The five lines mapped over chunks of rows: threads of dask, one BLAS thread in each of them."""
    da, dask, threadpoolctl = package("dask.array"), package("dask"), package("threadpoolctl")
    W_nt, prepared = block.W_nt, _centred_unit(R_mt)

    def lines(W: F32) -> F32:
        mode, a = _numpy_lines(W, *prepared)
        return np.stack([mode.astype(np.float32), a], axis=1)

    def in_chunks(chunk_rows: int) -> Run:
        def run(rows: int) -> Answer:
            W = da.from_array(W_nt[:rows], chunks=(chunk_rows, case.snapshots), name=False)
            found: F32 = W.map_blocks(lines, dtype=np.float32, chunks=(W.chunks[0], (2,))).compute()
            return Answer(found[:, 0], found[:, 1], R_mt)

        return run

    @contextmanager
    def around() -> Generator[None]:
        config = dask.config.set(scheduler="threads", num_workers=threads)
        with threadpoolctl.threadpool_limits(1, "blas"), config:
            yield

    candidates = {
        f"chunks of {size >> 20} MiB": in_chunks(max(size // (4 * case.snapshots), 1))
        for size in DASK_CHUNK_BYTES
    }
    with around():
        note, run = fastest(candidates, min(16 * TRIED_ROWS, block.rival_rows))
    return Prepared(run, block.prepare_ms["row-major"], block.rival_rows_of(case.modes), note, around)


def faiss_flat(case: Case, block: Block, R_mt: F32, threads: int) -> Prepared:
    """IndexFlatIP over the references and their negatives, k = 1: the product is |d|, its place the mode.

    Rows are centred beforehand. They are not divided by their norms, which changes no order within a row.
    """
    faiss = package("faiss")
    x_nt, mean_n = block.centred_nt, block.mean_n
    z_mt, rnorm, rmean = _centred_unit(R_mt)
    modes = len(z_mt)
    index = faiss.IndexFlatIP(z_mt.shape[1])
    index.add(np.concatenate([z_mt, -z_mt]))

    def searching(settings: Callable[[], AbstractContextManager[None]]) -> Run:
        def run(rows: int) -> Answer:
            with settings():
                product, place = index.search(x_nt[:rows], 1)
            mode = place[:, 0] % modes
            best = _signed(place[:, 0] < modes, product[:, 0])
            a = best / rnorm[mode]
            _ = mean_n[:rows] - a * rmean[mode]
            return Answer(mode, a, R_mt)

        return run

    @contextmanager
    def tuned(threshold: int, queries: int) -> Generator[None]:
        cvar = faiss.cvar
        before = cvar.distance_compute_blas_threshold, cvar.distance_compute_blas_query_bs
        cvar.distance_compute_blas_threshold, cvar.distance_compute_blas_query_bs = threshold, queries
        try:
            yield
        finally:
            cvar.distance_compute_blas_threshold, cvar.distance_compute_blas_query_bs = before

    @contextmanager
    def around() -> Generator[None]:
        faiss.omp_set_num_threads(threads)
        yield

    candidates = {
        "without BLAS": searching(lambda: tuned(1 << 30, 4096)),
        "BLAS, 4096 queries": searching(lambda: tuned(20, 4096)),
        "BLAS, 65536 queries": searching(lambda: tuned(20, 1 << 16)),
    }
    with around():
        note, run = fastest(candidates, min(4 * TRIED_ROWS, block.rival_rows))
    prepare_ms = block.prepare_ms["row-major"] + block.prepare_ms["centring"]
    return Prepared(run, prepare_ms, block.rival_rows_of(case.modes), note, around)


def keops(case: Case, block: Block, R_mt: F32, threads: int) -> Prepared:
    """A reduction over the references: max and argmax of |<x, z>|, or of <x, +-z>, whichever is faster."""
    del threads  # KeOps takes OpenMP's number
    LazyTensor = _lazy_tensor()
    x_nt, mean_n = block.centred_nt, block.mean_n
    z_mt, rnorm, rmean = _centred_unit(R_mt)
    modes = len(z_mt)
    both = LazyTensor(np.concatenate([z_mt, -z_mt])[None])
    one = LazyTensor(z_mt[None])

    def finish(mode: I64, best: F32, rows: int) -> Answer:
        a = best / rnorm[mode]
        _ = mean_n[:rows] - a * rmean[mode]
        return Answer(mode, a, R_mt)

    def of_both(rows: int) -> Answer:
        x = LazyTensor(x_nt[:rows, None, :])
        product, place = (x | both).max_argmax(dim=1, backend="CPU")
        place = place[:, 0].astype(np.int64)
        return finish(place % modes, _signed(place < modes, product[:, 0]), rows)

    def of_magnitudes(rows: int) -> Answer:
        x = LazyTensor(x_nt[:rows, None, :])
        mode = (x | one).abs().argmax(dim=1, backend="CPU")[:, 0].astype(np.int64)
        return finish(mode, np.einsum("nt,nt->n", x_nt[:rows], z_mt[mode]), rows)

    note, run = fastest({"±z": of_both, "|<x, z>|": of_magnitudes}, min(TRIED_ROWS, block.rival_rows))
    prepare_ms = block.prepare_ms["row-major"] + block.prepare_ms["centring"]
    return Prepared(run, prepare_ms, block.rival_rows_of(case.modes), note)


def _lazy_tensor() -> Any:
    before = os.environ.get("CXXFLAGS")
    os.environ["CXXFLAGS"] = KEOPS_FLAGS
    try:
        pykeops = package("pykeops")  # reads the flags once, when it is imported
        pykeops.set_verbose(False)
        return package("pykeops.numpy").LazyTensor
    finally:
        if before is None:
            del os.environ["CXXFLAGS"]
        else:
            os.environ["CXXFLAGS"] = before


def script_stage(case: Case, block: Block, R_mt: F32, threads: int) -> Prepared:
    """Assignment and fit of the paper's algorithm in memory."""
    del threads
    W_nt = block.W_nt

    def run(rows: int) -> Answer:
        mode = in_memory_script.assign(W_nt[:rows], R_mt)
        a, _ = in_memory_script.fit(W_nt[:rows], R_mt, mode)
        return Answer(mode, a, R_mt)

    return Prepared(run, block.prepare_ms["row-major"], block.rival_rows_of(case.modes))


def script_whole(case: Case, block: Block, R_mt: F32, threads: int) -> Prepared:
    """The paper's algorithm in memory, from the matrix to the result."""
    del R_mt, threads
    W_nt = block.W_nt

    def run(rows: int) -> Answer:
        found = in_memory_script.decompose(W_nt[:rows], SAMPLED, case.modes)
        return Answer(found.mode, found.a, found.references)

    return Prepared(run, block.prepare_ms["row-major"], block.rival_rows_of(case.modes))


RIVALS: Sequence[Provider] = (
    Provider("plain torch", plain_torch),
    Provider("plain numpy", plain_numpy),
    Provider("faiss flat", faiss_flat),
    Provider("keops", keops),
    Provider("dask", dask_array),
    Provider("in-memory script", script_stage),
)
