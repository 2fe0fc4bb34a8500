"""Where in the network the modes live: rows of every mode by tensor, by layer, by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np

from cmdgpu.notation import F64, I64
from cmdgpu.statistics import fit_of

if TYPE_CHECKING:
    from cmdgpu.decomposition import CMD

Level: TypeAlias = Literal["layer", "block"]


@dataclass(frozen=True)
class TensorShare:
    """A tensor, or the tensors of a layer or a block together; the metrics as in ``metrics_``."""

    name: str
    shape: tuple[int, ...]
    """() of a group"""
    kind: str
    """"parameter" or "buffer"."""
    layer: str
    """The name without its last part; of a block nothing."""
    block: str
    """``layer1.0`` or ``blocks.3``, see ``block_of``."""
    rows: int
    n_constant: int
    n_nonfinite: int
    counts: I64
    """(M,) rows of each mode."""
    mean_abs_correlation: float
    """NaN where no row moves, as is the next."""
    r2: float
    r2_energy: float
    """NaN where nothing finite moves."""
    weight_mse: float
    """NaN without a finite row."""


@dataclass(frozen=True)
class Network:
    """All tensors in the order of their rows, parameters and buffers; the sums are those of the pass."""

    n_modes: int
    n_snapshots: int
    tensors: list[TensorShare]
    sums: F64
    """(L, fields, 2 + M) of ``statistics.Totals``."""

    def groups(self, by: Level) -> list[TensorShare]:
        """Parameters added up by layer or by block, in the order in which these first appear.

        Buffers are in none.
        """
        members: dict[str, list[int]] = {}
        for i, tensor in enumerate(self.tensors):
            if tensor.kind == "parameter":
                members.setdefault(tensor.layer if by == "layer" else tensor.block, []).append(i)
        return [
            _share(
                self.sums[mine].sum(axis=0), self.n_snapshots, name=name, shape=(), kind="parameter",
                layer=name if by == "layer" else "", block=self.tensors[mine[0]].block,
            )
            for name, mine in members.items()
        ]  # fmt: skip


def network(cmd: CMD) -> Network:
    """The rows of every tensor of a fitted CMD by mode, from the sums of the pass: no row is read."""
    result = cmd.result
    n_snapshots, sums = len(cmd.steps_), result.totals.tensors
    shares = [
        _share(
            of_tensor, n_snapshots, name=tensor.name, shape=tensor.shape, kind=tensor.kind,
            layer=layer_of(tensor.name), block=block_of(tensor.name),
        )
        for tensor, of_tensor in zip(result.frame.map, sums, strict=True)
    ]  # fmt: skip
    return Network(cmd.n_modes_, n_snapshots, shares, sums)


def layer_of(name: str) -> str:
    """A name without its last part; all of a name that has no other."""
    return name.rpartition(".")[0] or name


def block_of(name: str) -> str:
    """The shallowest module that repeats: up to the first part that is a number, or ends in ``_<number>``.

    The first part where there is none; the last part, which names the tensor, does not count.
    """
    parts = name.split(".")
    for depth, part in enumerate(parts[:-1], start=1):
        if part.rpartition("_")[2].isdecimal() and part[:1] != "_":
            return ".".join(parts[:depth])
    return parts[0]


def _share(
    sums: F64, n_snapshots: int, *, name: str, shape: tuple[int, ...], kind: str, layer: str, block: str
) -> TensorShare:
    """One line of the view from sums (fields, 2 + M)."""
    fit = fit_of(sums, n_snapshots)
    counts = np.array(fit["mode_sizes"], dtype=np.int64)
    return TensorShare(
        name=name,
        shape=shape,
        kind=kind,
        layer=layer,
        block=block,
        rows=fit["n_nonfinite"] + fit["n_constant"] + int(counts.sum()),
        n_constant=fit["n_constant"],
        n_nonfinite=fit["n_nonfinite"],
        counts=counts,
        mean_abs_correlation=fit["mean_abs_correlation"],
        r2=fit["r2"],
        r2_energy=fit["r2_energy"],
        weight_mse=fit["weight_mse"],
    )
