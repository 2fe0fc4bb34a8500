"""The experiments on planted modes, on chance and on our own choices run tiny, and say what they are for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmdgpu import CMD
from tests.harness import planted, write_store

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.syspath_prepend(str(ROOT))  # pyright: ignore[reportUnknownMemberType]


def test_planted_rows_are_what_they_are_said_to_be() -> None:
    from benchmarks.planted import planted_rows

    rows, mode_n = planted_rows(np.random.default_rng(0), 4000, 60, 5, 0.5)
    assert set(mode_n.tolist()) == set(range(5))
    exact, same = planted_rows(np.random.default_rng(0), 4000, 60, 5, 0.0)
    assert np.array_equal(mode_n, same)
    assert np.sqrt(np.mean((rows - exact) ** 2)) == pytest.approx(0.5, rel=0.01)
    profiles = [exact[mode_n == m][0] - exact[mode_n == m][0].mean() for m in range(5)]
    corr = np.corrcoef(profiles)
    assert np.allclose(corr, np.eye(5), atol=1e-9), "orthogonal to each other"
    for m in range(5):
        assert np.abs(np.corrcoef(exact[mode_n == m])).min() == pytest.approx(1.0)


def test_planted_modes_are_recovered_up_to_some_noise(tmp_path: Path) -> None:
    from benchmarks.experiments.recovery import Config, curves, draw, rows

    config = Config(modes=(2, 5), snapshots=(30,), noise=(0.05, 0.1, 3.0), seeds=3, rows=1500, samples=200)
    found = {"curves": list(curves(config))}
    json.dumps(found, allow_nan=False)
    for one in found["curves"]:
        assert len(one["ari"]) == 3
        if one["noise"] < 1:
            assert min(one["ari"]) >= 0.99 and one["n_modes_found"] == [one["n_modes"]] * 3
        else:
            assert max(one["ari"]) < 0.8
    table = rows(found)
    assert [row[:4] for row in table] == [
        ["abs-corr", "30", "2", "0.1"],
        ["abs-corr", "30", "5", "0.1"],
        ["corr-profile", "30", "2", "0.1"],
        ["corr-profile", "30", "5", "0.1"],
    ]
    assert all(len(row) == 7 and " ± " in row[4] for row in table)
    draw(found, tmp_path / "recovery.png")
    assert (tmp_path / "recovery.png").stat().st_size > 5000


def test_rates_of_error_are_counted() -> None:
    from benchmarks.experiments.chance import BETWEEN, PLANTED, UNRELATED, Config, rows, trials

    found = {"trials": list(trials(Config((20,), (100,), (2,), seeds=2, rows=400)))}
    json.dumps(found, allow_nan=False)
    table = {row[0]: row for row in rows(found)}
    assert set(table) == {*UNRELATED, *BETWEEN, *PLANTED}
    for family in UNRELATED:
        assert table[family][1:5] == ["2", "0", "0", "2"]
    for family in PLANTED:
        assert table[family][1:5] == ["2", "2", "0", "0"]


def test_every_choice_is_exchanged_for_another(tmp_path: Path) -> None:
    from benchmarks.experiments.ablations import DEFAULT, VARIANTS, ablate, rows

    traj = write_store(tmp_path / "s.zarr", planted(1500, 20, 3, noise=0.3))
    found = ablate(traj, 3, 150, 0)
    assert set(found) == set(VARIANTS)
    usual = found[DEFAULT]
    assert usual["ari"] == 1.0 and usual["verdict"] == "better than chance"
    for name, one in found.items():
        assert one["r2"] == pytest.approx(usual["r2"], abs=0.05) and one["ari"] > 0.9, name
        assert one["n_modes"] == 3 and one["words"].startswith("these modes are better than chance")
    component = found["reference: first principal component"]
    assert component["r2"] > usual["r2"], "it is the best reference of the sampled rows"
    merged: dict[str, Any] = {
        "variants": {name: {key: [value, value] for key, value in one.items()} for name, one in found.items()}
    }
    json.dumps(merged, allow_nan=False)
    table = rows(merged)
    assert table[0][0] == DEFAULT and table[0][4] == "1.000 ± 0.000"


def test_the_usual_variant_is_the_fit_itself(tmp_path: Path) -> None:
    from benchmarks.experiments.ablations import DEFAULT, ablate

    traj = write_store(tmp_path / "s.zarr", planted(1500, 20, 3, noise=0.3))
    one, cmd = ablate(traj, 3, 150, 0)[DEFAULT], CMD(3, n_samples=150).fit(traj)
    assert one["r2"] == pytest.approx(cmd.metrics_["r2"], abs=1e-7)
    assert one["r2_energy"] == pytest.approx(cmd.metrics_["r2_energy"], abs=1e-6)
    assert one["words"] == cmd.quality().words
