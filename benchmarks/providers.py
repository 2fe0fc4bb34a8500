"""Who is measured: every implementation of ours, and the rivals, behind one small interface."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import cmdgpu_kernels as kernels
import numpy as np
from numpy.typing import NDArray

from benchmarks.cases import F32, Block, Case
from cmdgpu.decomposition import CMD
from cmdgpu.trajectory import Trajectory

SAMPLED = 1000
"""K, the rows that are clustered: the paper's number, and the default of both decompositions."""


class Answer(NamedTuple):
    """What a run found, so that a provider that computes something else is caught."""

    mode: NDArray[np.number[Any]]
    """As the provider has them: to give all the same type is nobody's work."""
    a: F32
    references: F32
    """(M, T): given, or found by the run."""


class NotRun(Exception):
    """Why a provider has no figure for a case."""


@dataclass(frozen=True)
class Prepared:
    """A provider ready for one case; everything that it may do beforehand is done."""

    run: Callable[[int], Answer]
    """Works on the first so many rows."""
    prepare_ms: float = 0.0
    """What was done beforehand that grows with the rows, of all rows prepared."""
    most_rows: int | None = None
    """Rows there are in the provider's layout; all of the block when None."""
    note: str = ""
    around: Callable[[], AbstractContextManager[object]] = nullcontext
    """Settings of its own, entered outside the clock."""


Prepare: TypeAlias = Callable[[Case, Block, F32, int], Prepared]
"""Case, block, references and threads. Raises NotRun."""


@dataclass(frozen=True)
class Provider:
    name: str
    prepare: Prepare
    ours: bool = False


def problem_of(case: Case, device: str = "cpu") -> kernels.Problem:
    return kernels.Problem(dtype=case.dtype, snapshots=case.snapshots, modes=case.modes, device=device)


def chosen_name(case: Case) -> str:
    """The provider that stands for the product: the implementation it would run by itself."""
    if case.operation != "assign_and_fit":
        return "cmdgpu"
    return f"cmdgpu {kernels.choose(problem_of(case))[0].name}"


def our_implementations() -> list[Provider]:
    """Every implementation of the operation; those that refuse a case say why."""
    return [_implementation(candidate.name, candidate.refusals) for candidate in kernels.IMPLEMENTATIONS]


def _implementation(name: str, refusals: Callable[[kernels.Problem], tuple[str, ...]]) -> Provider:
    def prepare(case: Case, block: Block, R_mt: F32, threads: int) -> Prepared:
        if reasons := refusals(problem_of(case)):
            raise NotRun(f"refuses: {'; '.join(reasons)}")
        references = kernels.prepare_references(R_mt)

        def run(rows: int) -> Answer:
            W_tb = block.W_tb[:, :rows]
            fit = kernels.assign_and_fit(W_tb, references, implementation=name, threads=threads)
            return Answer(fit.mode.numpy(), fit.a.numpy(), R_mt)

        return Prepared(run)

    return Provider(f"cmdgpu {name}", prepare, ours=True)


def decompose(case: Case, block: Block, R_mt: F32, threads: int) -> Prepared:
    """The product's public call on the same row-major matrix that the in-memory script gets."""
    del R_mt, threads

    def run(rows: int) -> Answer:
        cmd = CMD(n_modes=case.modes, n_samples=SAMPLED).fit(Trajectory.from_array(block.W_nt[:rows]))
        return Answer(np.asarray(cmd.labels_[:]), np.asarray(cmd.a_[:]), cmd.references_)

    return Prepared(run, most_rows=block.rival_rows_of(case.modes))
