"""Our own choices, each exchanged for another one: affinity, clustering, reference, element type.

    python -m benchmarks.experiments.ablations --in run-0.zarr run-1.zarr run-2.zarr

writes ``results/experiments/ablations.json``: a list over the runs at every leaf. The parameters of a run are
held in memory. Every variant clusters the same sampled rows and follows all rows; its verdict is measured
against the null models through the linkage and the kind of reference nearest to it.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import scipy.cluster.vq  # pyright: ignore[reportMissingTypeStubs]
import torch
from torch import Tensor

from benchmarks.experiments.report import write
from benchmarks.machine import RESULTS
from cmdgpu import CMD, Trajectory, ops
from cmdgpu.clustering import Clustering, absolute_correlation, cluster_sample, moving_rows
from cmdgpu.errors import CmdgpuWarning
from cmdgpu.miniature import Rule, references_of
from cmdgpu.notation import F32, F64, I16, I64
from cmdgpu.profiles import References
from cmdgpu.quality import AtHand, Sampled, adjusted_rand, assess, rows_at_hand

NAME = "ablations"
DEFAULT: Final = "ours: 1 - |corr|, complete linkage, central row, float32"
_VQ: Any = scipy.cluster.vq  # SciPy ships no types


@dataclass(frozen=True)
class Variant:
    """What is exchanged, and how the references of the (K, T) sample are found then."""

    references: Callable[[F64, int], F64]
    rule: Callable[[int], Rule]
    """The pipeline that the null models go through."""
    dtype: str = "float32"


def _by_rule(affinity: str = "abs-corr", references: References = "row") -> Variant:
    def rule(n_modes: int) -> Rule:
        return Rule(n_modes, None, affinity, references, objective="correlation")

    return Variant(lambda sample_kt, n_modes: references_of(sample_kt, rule(n_modes)), rule)


def _mean_references(sample_kt: F64, n_modes: int) -> F64:
    """Mean of each mode's centred unit-norm rows, signs as that of their correlation with the central row."""
    found = _clustered(sample_kt, n_modes)
    z_kt, _ = moving_rows(sample_kt)
    means: list[F64] = []
    for m, reference in enumerate(found.references.tolist()):
        mine = z_kt[found.labels == m]
        means.append((np.sign(mine @ z_kt[reference])[:, None] * mine).mean(axis=0))
    return np.array(means)


def _k_means_references(sample_kt: F64, n_modes: int) -> F64:
    """K-means of the rows of |corr|, k-means++ with a fixed seed; then each cluster's central row."""
    corr_kk = absolute_correlation(sample_kt)
    _, label_k = _VQ.kmeans2(corr_kk, n_modes, minit="++", rng=np.random.default_rng(0), missing="warn")
    members: list[I64] = [np.flatnonzero(label_k == m) for m in np.unique(label_k)]
    return sample_kt[[int(mine[np.argmax(corr_kk[np.ix_(mine, mine)].sum(axis=1))]) for mine in members]]


def _clustered(sample_kt: F64, n_modes: int) -> Clustering:
    return cluster_sample(sample_kt, n_modes=n_modes, threshold=None, affinity="abs-corr")


_OURS = _by_rule()
VARIANTS: Final[dict[str, Variant]] = {
    DEFAULT: _OURS,
    "affinity: distance of |corr| profiles": _by_rule(affinity="corr-profile"),
    "clustering: k-means of |corr| profiles": Variant(_k_means_references, _OURS.rule),
    "reference: mean of the mode": Variant(_mean_references, _by_rule(references="component").rule),
    "reference: first principal component": _by_rule(references="component"),
    "trajectory: bfloat16": Variant(_OURS.references, _OURS.rule, "bfloat16"),
}


def ablate(traj: Trajectory, n_modes: int, n_samples: int, seed: int) -> dict[str, dict[str, Any]]:
    """Per variant: modes, R^2, R^2 by energy, mean |corr|, ARI with the usual labels, verdict, excess."""
    rows = np.concatenate(
        [np.arange(p.row, p.stop) for t in traj.parameters if t.kind == "parameter" for p in t.pieces]
    )
    stored_nt: Tensor = torch.as_tensor(traj.read_rows(rows).astype(np.float32))
    cmd = CMD(n_modes, n_samples=n_samples, random_state=seed).fit(traj)
    drawn = Sampled(cmd.sample_rows_, cmd.sample_, n_samples, cmd.sampling, seed)
    exact = rows_at_hand(drawn, traj)
    found: dict[str, dict[str, Any]] = {}
    usual: I16 | None = None
    for name, variant in VARIANTS.items():
        rounded = variant.dtype == "bfloat16"
        at_hand = _rounded(exact) if rounded else exact
        sample_kt = (_to_bfloat16(cmd.sample_) if rounded else cmd.sample_).astype(np.float64)
        R_mt = variant.references(sample_kt[moving_rows(sample_kt)[1] == 0], n_modes)
        fitted, label_n = _followed(stored_nt.bfloat16() if rounded else stored_nt, R_mt)
        usual = label_n if usual is None else usual
        quality = assess(at_hand, traj.steps, R_mt, variant.rule(len(R_mt)))
        found[name] = {
            **fitted,
            "n_modes": len(R_mt),
            "ari": adjusted_rand(label_n, usual),
            "verdict": quality.verdict,
            "excess": None if quality.levels is None else quality.levels.excess,
            "words": quality.words,
        }
    return found


def _followed(W_nt: Tensor, R_mt: F64) -> tuple[dict[str, float], I16]:
    fit = ops.assign_and_fit(W_nt, R_mt.astype(np.float32), time_major=False, device="cpu")
    moving = fit.mode >= 0
    corr, ss = fit.correlation[moving].double(), fit.ss[moving].double()
    return {
        "r2": float((corr**2).mean()),
        "r2_energy": float((corr**2 * ss).sum() / ss.sum()),
        "mean_abs_correlation": float(corr.abs().mean()),
    }, fit.mode.numpy()


def _to_bfloat16(values: F32 | F64) -> F32:
    return torch.as_tensor(np.asarray(values)).bfloat16().float().numpy()


def _rounded(at_hand: AtHand) -> AtHand:
    """What is at hand of a run that was recorded in bfloat16."""
    rows_nt = at_hand.rows_nt
    return AtHand(
        at_hand.columns,
        _to_bfloat16(at_hand.sample_kt).astype(np.float64),
        None if rows_nt is None else _to_bfloat16(rows_nt).astype(np.float64),
        [_to_bfloat16(other).astype(np.float64) for other in at_hand.resampled],
        at_hand.note,
    )


def rows(found: dict[str, Any]) -> list[list[str]]:
    """Of ``ablations.json``: what is exchanged, R^2, R^2 by energy, mean |corr|, ARI with ours, excess over
    chance, each as mean and standard deviation over the runs; and the verdicts.
    """
    table: list[list[str]] = []
    for name, one in found["variants"].items():
        keys = ("r2", "r2_energy", "mean_abs_correlation", "ari", "excess")
        table.append([name, *(_mean_and_spread(one[key]) for key in keys), ", ".join(one["verdict"])])
    return table


def _mean_and_spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    spread = f" ± {np.std(known, ddof=1):.3f}" if len(known) > 1 else ""
    return f"{np.mean(known):.3f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--in", dest="stores", nargs="+", required=True, metavar="STORE")
    parser.add_argument("--modes", type=int, default=10)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=RESULTS / "experiments")
    asked = parser.parse_args()
    runs: list[dict[str, dict[str, Any]]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CmdgpuWarning)
        for seed, store in enumerate(asked.stores):
            runs.append(ablate(Trajectory.open(store), asked.modes, asked.samples, seed))
    names = " ".join(Path(store).name for store in asked.stores)
    found = {
        "config": {"n_modes": asked.modes, "n_samples": asked.samples},
        "variants": {
            name: {key: [run[name][key] for run in runs] for key in runs[0][name]} for name in VARIANTS
        },
    }
    write(asked.out, NAME, f"python -m benchmarks.experiments.{NAME} --in {names}", found)
    for row in rows(found):
        print("  ".join(row))


if __name__ == "__main__":
    main()
