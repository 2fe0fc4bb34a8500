"""The operation ``assign_and_fit``: its definition, its implementations in order of preference, its door."""

from __future__ import annotations

from functools import partial
from typing import Protocol

from numpy.typing import ArrayLike
from torch import Tensor

from cmdgpu_kernels import dispatch
from cmdgpu_kernels.assignment import native_impl, torch_impl, triton_impl
from cmdgpu_kernels.assignment.reference import ReferenceFit, assign_and_fit_reference
from cmdgpu_kernels.assignment.row_fit import RowFit
from cmdgpu_kernels.dispatch import Implementation, Problem
from cmdgpu_kernels.native import library
from cmdgpu_kernels.references import References, prepare_references

__all__ = [
    "IMPLEMENTATIONS",
    "ReferenceFit",
    "RowFit",
    "assign_and_fit",
    "assign_and_fit_reference",
    "choose",
    "workspace_bytes",
]


class Run(Protocol):
    """W_tb is (T, B) with any strides; the door has checked everything that does not depend on the device."""

    def __call__(
        self, W_tb: Tensor, references: References, *, margin: bool = False, threads: int | None = None
    ) -> RowFit: ...


IMPLEMENTATIONS: tuple[Implementation[Run], ...] = (
    Implementation("triton", triton_impl.run, triton_impl.refusals, triton_impl.TOLERANCE),
    *(
        Implementation(
            f"native-{path}",
            partial(native_impl.run, path),
            partial(native_impl.refusals, path),
            native_impl.TOLERANCE,
        )
        for path in library.PATHS
    ),
    Implementation("torch", torch_impl.run, torch_impl.refusals, torch_impl.TOLERANCE),
    # Last, so that it runs only by name: it proves the kernel's logic where there is no GPU, a thousand
    # times slower.
    Implementation(
        "triton-interpreted", triton_impl.run, triton_impl.refusals_interpreted, triton_impl.TOLERANCE
    ),
)


def choose(
    problem: Problem, *, implementation: str | None = None
) -> tuple[Implementation[Run], dict[str, tuple[str, ...]]]:
    """Implementation that serves the problem, and the reasons of those preferred to it that do not.

    ``implementation`` names the only candidate. Raises NoKernelError with every candidate's every reason.
    """
    names = [candidate.name for candidate in IMPLEMENTATIONS]
    if implementation is not None and implementation not in names:
        raise ValueError(f"no implementation named {implementation!r}; have: {', '.join(names)}")
    candidates = [c for c in IMPLEMENTATIONS if implementation in (None, c.name)]
    return dispatch.choose("assign_and_fit", candidates, problem)


def workspace_bytes(problem: Problem, threads: int) -> int:
    """Host memory of a pass beside W and the outputs, by the implementation that would run it."""
    chosen, _ = choose(problem)
    if chosen.name == "torch" and problem.device == "cpu":
        return torch_impl.workspace_bytes(problem.snapshots, problem.modes, threads)
    prefix, _, path = chosen.name.partition("-")
    return native_impl.workspace_bytes(path, problem, threads) if prefix == "native" else 0


def assign_and_fit(
    W: Tensor,
    R_mt: References | ArrayLike | Tensor,
    *,
    time_major: bool = True,
    implementation: str | None = None,
    margin: bool = False,
    threads: int | None = None,
) -> RowFit:
    """Best mode of every row of W and its least-squares line on that mode's reference.

    W is (T, B) when ``time_major``, else (B, T), in float32, float16 or bfloat16, on any device; R_mt is
    (M, T), raw or prepared by ``prepare_references``. The equations and the rows that have no mode stand in
    ``assign_and_fit_reference``; here sums are float32 behind a pivot, on values converted exactly from
    storage. Both layouts give the same bits on the CPU, each its own on a GPU. ``threads`` is the number of
    tiles in flight on the CPU (torch's number of threads by default); it does not change a bit.

    Raises ValueError when W and R_mt disagree on T, NoKernelError when no implementation accepts W.
    """
    references = R_mt if isinstance(R_mt, References) else prepare_references(R_mt)
    layout = "(T, B)" if time_major else "(B, T)"
    if W.ndim != 2:
        raise ValueError(f"W must be {layout}, found shape {tuple(W.shape)}")
    W_tb = (W if time_major else W.T).detach()
    if W_tb.shape[0] != references.snapshots or W_tb.shape[0] == 0:
        raise ValueError(
            f"W has {W_tb.shape[0]} snapshots ({layout} = {tuple(W.shape)}), "
            f"the references have {references.snapshots} ((M, T) = {references.z_mt.shape})"
        )
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be 1 or more, found {threads}")
    problem = Problem(
        dtype=str(W.dtype).removeprefix("torch."),
        snapshots=references.snapshots,
        modes=references.modes,
        device=W.device.type,
        time_major=time_major,
    )
    chosen, _ = choose(problem, implementation=implementation)
    if W_tb.shape[1] == 0:
        return RowFit.empty(0, W.device, margin=margin)
    return chosen.run(W_tb, references, margin=margin, threads=threads)
