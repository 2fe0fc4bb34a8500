"""The operation ``gram_matrix``: its definition, its implementations in order of preference, its door."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from cmdgpu_kernels import dispatch
from cmdgpu_kernels.dispatch import Implementation, Problem
from cmdgpu_kernels.gram import torch_impl, triton_impl
from cmdgpu_kernels.gram.reference import gram_matrix_reference
from cmdgpu_kernels.gram.sums import GRANULE, Gram

__all__ = ["GRANULE", "IMPLEMENTATIONS", "Gram", "gram_matrix", "gram_matrix_reference"]


class Run(Protocol):
    """W_tb is (T, B), at least one of each, with any strides."""

    def __call__(self, W_tb: Tensor, *, threads: int | None = None) -> Gram: ...


IMPLEMENTATIONS: tuple[Implementation[Run], ...] = (
    Implementation("triton", triton_impl.run, triton_impl.refusals, triton_impl.TOLERANCE),
    Implementation("torch", torch_impl.run, torch_impl.refusals, torch_impl.TOLERANCE),
    # Last, so that it runs only by name.
    Implementation(
        "triton-interpreted", triton_impl.run, triton_impl.refusals_interpreted, triton_impl.TOLERANCE
    ),
)


def gram_matrix(
    W: Tensor, *, time_major: bool = True, implementation: str | None = None, threads: int | None = None
) -> Gram:
    """Inner products of the snapshots over all rows, each displaced by its first value; and what undoes it.

    W is (T, B) when ``time_major``, else (B, T), in float32, float16 or bfloat16, on any device. The
    equations stand in ``gram_matrix_reference``; here products are float32 on values converted exactly from
    storage, and granules of 16,384 rows are added in order in float64. An error of an entry (i, j) is
    measured against sqrt(G_ii G_jj). Neither ``threads`` nor the blocks that ``Gram.__add__`` merges change a
    bit, as long as blocks end at multiples of 16,384 rows.

    Raises ValueError for a W without snapshots, NoKernelError when no implementation accepts W.
    """
    layout = "(T, B)" if time_major else "(B, T)"
    if W.ndim != 2:
        raise ValueError(f"W must be {layout}, found shape {tuple(W.shape)}")
    W_tb = (W if time_major else W.T).detach()
    if W_tb.shape[0] == 0:
        raise ValueError(f"W has no snapshots ({layout} = {tuple(W.shape)})")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be 1 or more, found {threads}")
    problem = Problem(
        dtype=str(W.dtype).removeprefix("torch."),
        snapshots=W_tb.shape[0],
        modes=0,
        device=W.device.type,
        time_major=time_major,
    )
    candidates = dispatch.named("gram_matrix", IMPLEMENTATIONS, implementation)
    chosen, _ = dispatch.choose("gram_matrix", candidates, problem)
    if W_tb.shape[1] == 0:
        return gram_matrix_reference(W_tb.cpu().double().numpy())
    return chosen.run(W_tb, threads=threads)
