"""Laws of the averages: their definitions, torch's own, and the product that streams them."""

# torch leaves the types of many methods open.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cmdgpu.baselines import EMA, LAWA, PCA, SWA, Baseline
from cmdgpu.baselines.filters import Filter, FilteredRows
from cmdgpu.errors import StepNotFound, UsageError
from cmdgpu.notation import F64
from cmdgpu.store import format as fmt
from cmdgpu.store.view import StoreView
from cmdgpu.trajectory import Trajectory
from tests.baselines.cases import STEPS, T, mean_squared, parameter_rows, rebuilt, store_of, values
from tests.harness import walks, write_store


def ema(W: F64, decays: list[float]) -> F64:
    """The recursion itself."""
    averages = [W[:, 0]]
    for k, decay in enumerate(decays, start=1):
        averages.append(decay * averages[-1] + (1 - decay) * W[:, k])
    return np.stack(averages, axis=1)


def means(W: F64, positions: list[list[int]]) -> F64:
    return np.stack([W[:, chosen].mean(axis=1) for chosen in positions], axis=1)


CASES: dict[str, tuple[Baseline, Callable[[F64], F64]]] = {
    "ema": (EMA(0.9), lambda W: ema(W, [0.9] * (T - 1))),
    "ema of uneven steps": (EMA(0.9, unit=5), lambda W: ema(W, [0.9**2] * (T - 1))),
    "ema that forgets all": (EMA(0.0), lambda W: W),
    "ema that learns nothing": (EMA(1.0), lambda W: W[:, [0] * T]),
    "swa": (SWA(), lambda W: means(W, [list(range(k + 1)) for k in range(T)])),
    "swa from 3 every 2": (
        SWA(3, 2),
        lambda W: means(W, [[k] if k < 3 else list(range(3, k + 1, 2)) for k in range(T)]),
    ),
    "lawa": (LAWA(3), lambda W: means(W, [list(range(max(k - 2, 0), k + 1)) for k in range(T)])),
    "lawa every 4": (LAWA(3, spacing=4), lambda W: means(W, [list(range(k, -1, -4))[:3] for k in range(T)])),
}


@pytest.mark.parametrize("case", CASES)
def test_an_average_is_its_definition_in_float64_rounded_once(case: str, tmp_path: Path) -> None:
    average, define = CASES[case]
    average.fit(store_of(tmp_path / "s.zarr"))
    W = values().astype(np.float64)[parameter_rows()]
    found, expected = rebuilt(average), define(W)
    # a mean of a few float32 numbers often lies halfway between two: the last bit of float64 decides then
    assert np.all(np.abs(found - expected) <= 2.0**-24 * np.abs(expected) + 1e-12)
    assert np.mean(found == expected.astype(np.float32)) > 0.99
    assert average.metrics_["bytes_read"] == 0 and np.isnan(average.metrics_["weight_mse"])
    weights = np.concatenate([average.filter_at(step) for step in STEPS])
    assert np.allclose(weights.sum(axis=1), 1.0, atol=1e-15)


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_an_average_is_torchs_averaged_model(kind: str) -> None:
    """Which rounds to float32 at every snapshot, where ours rounds once: within T roundings of each other."""
    W = walks(300, 30)
    live = nn.Linear(10, 30, bias=False)
    update = get_ema_multi_avg_fn(0.9) if kind == "ema" else None
    averaged = AveragedModel(live, multi_avg_fn=update)
    ours = (EMA(0.9) if kind == "ema" else SWA()).fit(W)
    for k in range(W.shape[1]):
        with torch.no_grad():
            live.weight.copy_(torch.as_tensor(W[:, k]).view(30, 10))
        averaged.update_parameters(live)
        theirs = cast(Any, averaged.module).weight.detach().numpy().reshape(-1)
        mine = ours.state_dict(k)["W"].numpy()
        assert np.abs(mine - theirs).max() <= (k + 1) * 2.0**-24 * np.abs(W[:, : k + 1]).max(), k


# ---- the streaming product ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_units_and_reads_leave_the_same_bits(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    W = walks(20_000, 9)
    stored = fmt.widen(fmt.narrow(W, dtype), dtype).astype(np.float64)
    expected = EMA(0.7).fit(stored.astype(np.float32)).state_dict(-1)["W"].float()
    for rows, slot_bytes in ((256, 1), (4096, 3 * 4096 * 4), (20_224, 1 << 30)):
        monkeypatch.setattr("cmdgpu.baselines.filters._SLOT_BYTES", slot_bytes)
        traj = write_store(tmp_path / f"{rows}.zarr", W, rows=rows, dtype=dtype)
        found = FilteredRows(
            traj.source, traj.columns, Filter(EMA(0.7).fit(traj).filter_at(-1)), traj.parameters
        )
        assert np.array_equal(found.read(0, 20_000), expected.numpy())
        assert np.array_equal(found.read(777, 12_345), expected.numpy()[777:12_345])


def test_only_the_snapshots_that_are_weighed_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traj = store_of(tmp_path / "s.zarr")
    seen: set[int] = set()
    read = StoreView.read_chunks

    def watched(view: StoreView, i: int, times: list[int], into: list[Any]) -> None:
        seen.update(times)
        read(view, i, times, into)

    monkeypatch.setattr(StoreView, "read_chunks", watched)
    LAWA(3, spacing=2).fit(traj).state_dict(80, buffers="skip")
    assert seen == {8, 6, 4}


def test_nan_comes_through_where_it_is_weighed_and_nowhere_else() -> None:
    W = walks(50, 10)
    W[3, 2] = np.nan
    W[4, 9] = np.inf
    found = LAWA(3).fit(W)
    assert np.isnan(found.state_dict(4)["W"].numpy()).tolist() == [i == 3 for i in range(50)]
    assert np.isfinite(found.state_dict(5)["W"].numpy()).all()
    assert found.state_dict(9)["W"].numpy()[4] == np.inf


def test_an_average_knows_its_error_beside_one_that_reads(tmp_path: Path) -> None:
    traj = store_of(tmp_path / "s.zarr")
    average = EMA(0.8)
    Baseline.fit_together([average, PCA(2)], traj)
    W = values()[parameter_rows()]
    assert average.metrics_["weight_mse"] == pytest.approx(mean_squared(rebuilt(average), W), rel=1e-6)
    alone = EMA(0.8).fit(traj)
    assert np.array_equal(alone.filter_at(50), average.filter_at(50))


def test_an_average_refuses_what_it_is_not() -> None:
    with pytest.raises(UsageError, match=r"a decay of 1\.5; it is from 0 to 1"):
        EMA(1.5)
    with pytest.raises(UsageError, match="a unit of 0 steps"):
        EMA(0.5, unit=0)
    with pytest.raises(UsageError, match="start=0, cycle=0; start is at least 0"):
        SWA(cycle=0)
    with pytest.raises(UsageError, match="k=0, spacing=1; both are at least 1"):
        LAWA(0)
    with pytest.raises(UsageError, match=r"this SWA is not fitted; call fit\(traj\)"):
        SWA().state_dict(0)
    swa = SWA().fit(Trajectory.from_array(walks(20, 3), [5, 10, 20]))
    with pytest.raises(StepNotFound, match="step 30: SWA does not extrapolate; the last is 20"):
        swa.state_dict(30)
    with pytest.raises(StepNotFound, match=r"step 12: is not among the snapshots; nearest: .*10"):
        swa.state_dict(12)
    with pytest.raises(UsageError, match="0 snapshots are nothing to fit"):
        SWA().fit(walks(20, 0))
