"""The benchmarks run tiny as tests, so that they cannot rot; what would let them flatter fails here."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cmdgpu_kernels as kernels
import numpy as np
import pytest
import torch

from cmdgpu import CMD, Trajectory

ROOT = Path(__file__).resolve().parent.parent
RIVALS = {"plain torch", "plain numpy", "faiss flat", "keops", "dask", "in-memory script"}
OURS = {f"cmdgpu {implementation.name}" for implementation in kernels.IMPLEMENTATIONS}


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.syspath_prepend(str(ROOT))  # pyright: ignore[reportUnknownMemberType]


def run_tiny(tmp_path: Path, only: str = "") -> dict[str, Any]:
    from benchmarks import run

    written = run.main(["--suite", "tiny", "--only", only, "--out", str(tmp_path / "tiny.json")])
    return json.loads(written.read_text())


# ---- in memory ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_provider_has_a_checked_figure_or_a_reason(tmp_path: Path) -> None:
    results = run_tiny(tmp_path)
    records: list[dict[str, Any]] = results["records"]
    for case in dict.fromkeys(r["case"] for r in records):
        mine = [r for r in records if r["case"] == case]
        expected = {"cmdgpu", "in-memory script"} if case.startswith("decompose") else OURS | RIVALS
        assert {r["provider"] for r in mine} == expected
        assert [r["median_ms"] is not None for r in mine if r["chosen"]] == [True], "the product's own choice"
    for r in records:
        assert r["machine"] == results["machine"]["name"]
        assert (r["not_run"] is None) == (r["median_ms"] is not None)
        if r["not_run"] is None:
            assert r["labels_differ"] == 0, r
            assert r["runs"] == 2 and r["gb_per_s"] > 0 and r["spread_ms"] >= 0
            assert 0 < r["rows_run"] <= 1024, "fewer where the slowest would take too long"
            assert r["percent_of_ceiling"] == pytest.approx(100 * r["gb_per_s"] / r["ceiling_gb_per_s"])
    for ceiling in results["ceilings"]:
        assert ceiling["gb_per_s"] == max(ceiling["ways"].values()), "the best of the ways, or it flatters"
    assert {ceiling["name"] for ceiling in results["ceilings"]} == {"read memory", "copy memory"}


def test_a_missing_package_is_a_row_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import rivals, run

    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(run, "RIVALS", [r for r in rivals.RIVALS if r.name == "faiss flat"])
    records = run_tiny(tmp_path, "M=5")["records"]
    assert next(r for r in records if r["provider"] == "faiss flat")["not_run"].startswith(
        "faiss is not installed"
    )


@pytest.mark.parametrize("wrong", ["labels", "slopes"])
def test_a_provider_that_computes_something_else_ends_the_run(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import providers, rivals, run

    def prepare(case: Any, block: Any, R_mt: providers.F32, threads: int) -> providers.Prepared:
        right = rivals.plain_numpy(case, block, R_mt, threads)

        def work(rows: int) -> providers.Answer:
            mode, a, references = right.run(rows)
            if wrong == "labels":
                other = mode.astype(np.int64) ^ 1
                return providers.Answer(np.where(np.arange(rows) == rows - 1, other, mode), a, references)
            return providers.Answer(mode, np.where(np.arange(rows) == 0, 1.01 * a, a), references)

        return replace(right, run=work)

    monkeypatch.setattr(run, "RIVALS", [providers.Provider("impostor", prepare)])
    with pytest.raises(SystemExit, match=r"impostor on assign_and_fit T=20 N=1024 M=5 float32 \(1 rows\)"):
        run_tiny(tmp_path, "M=5")
    written = json.loads((tmp_path / "tiny.json").read_text())["records"]
    assert {r["provider"]: r["labels_differ"] for r in written if r["labels_differ"]} == {"impostor": 1}


def test_a_slow_provider_runs_on_fewer_rows_and_the_product_on_all() -> None:
    from benchmarks import cases, measure, providers, rivals, run

    suite = replace(cases.SUITES["tiny"], rival_seconds=1e-9)
    case = suite.cases[0]
    rival = providers.Provider("plain numpy", rivals.plain_numpy)
    found = {"threads": torch.get_num_threads(), "name": "here", "commit": None}
    everybody = [*providers.our_implementations(), rival]
    records, _ = measure.measure(case, run.block_of(case), everybody, suite, found)
    by_name = {r.provider: r for r in records}
    assert by_name["plain numpy"].rows_run == 256
    assert by_name["plain numpy"].bytes == case.bytes(256)
    assert [r.rows_run for r in records if r.chosen] == [1024]


def test_counted_bytes_are_w_and_eighteen_a_row() -> None:
    from benchmarks.cases import Case

    assert Case(100, 1000, 10).bytes(1000) == 100 * 1000 * 4 + 18 * 1000
    assert Case(100, 1000, 10, "bfloat16").bytes(10) == 100 * 10 * 2 + 18 * 10


def test_the_quick_suite_holds_what_it_promises() -> None:
    from benchmarks.cases import SUITES

    large = {
        c.modes for c in SUITES["quick"].cases if c.rows >= 4_000_000 and c.block[::2] == (100, "float32")
    }
    assert large >= {1, 2, 10, 30, 100, 300, 1000}
    assert {c.dtype for c in SUITES["quick"].cases} == {"float32", "bfloat16", "float16"}
    assert max(c.rows for c in SUITES["full"].cases) == 100_000_000


def test_the_script_finds_planted_modes_and_their_lines() -> None:
    from benchmarks.in_memory_script import decompose

    rng = np.random.default_rng(0)
    profiles = rng.standard_normal((3, 30)).cumsum(axis=1)
    planted, slope, offset = rng.integers(3, size=500), rng.uniform(1, 2, 500), rng.standard_normal(500)
    slope *= rng.choice([-1, 1], size=500)
    W = (slope[:, None] * profiles[planted] + offset[:, None]).astype(np.float32)
    found = decompose(W, 200, 3)
    assert len(found.references) == 3
    assert all(len(np.unique(found.mode[planted == m])) == 1 for m in range(3))
    rebuilt = found.a[:, None] * found.references[found.mode] + found.b[:, None]
    np.testing.assert_allclose(rebuilt, W, atol=2e-3)


# ---- out of core, storage, GPU --------------------------------------------------------------------------


@pytest.mark.slow
def test_a_store_is_fitted_beside_its_stages(tmp_path: Path) -> None:
    from benchmarks import out_of_core

    arguments = ["--suite", "tiny", "--in", str(tmp_path), "--out", str(tmp_path / "out-of-core.json")]
    records = json.loads(out_of_core.main(arguments).read_text())["records"]
    by_name = {r["provider"]: r for r in records}
    assert set(by_name) == {
        "pass, cached", "pass, cold", "whole fit, cached", "whole fit, cold", "read + crc", "kernel",
        "read + crc beside kernel", "cold read, in order", "cold read, 8 in flight",
    }  # fmt: skip
    assert all(r["bytes"] == 2048 * 12 * 4 and r["gb_per_s"] > 0 for r in records)
    for name in ("pass, cached", "pass, cold"):
        assert by_name[name]["labels_differ"] == 0 and 0 < by_name[name]["percent_of_ceiling"] < 100
        assert by_name[name]["peak_bytes"] > 0 and by_name[name]["planned_bytes"] > 0
    shared = 1 / (1 / by_name["read + crc"]["gb_per_s"] + 1 / by_name["kernel"]["gb_per_s"])
    assert by_name["pass, cached"]["ceiling_gb_per_s"] == pytest.approx(shared)
    assert [file.name for file in tmp_path.iterdir()] == ["out-of-core.json"]


def test_a_fit_with_other_labels_is_noticed() -> None:
    from benchmarks import out_of_core
    from benchmarks.cases import walks

    W_nt = torch.stack([column.clone() for column in walks(600, 20)]).T.numpy()
    traj = Trajectory.from_array(W_nt)
    fitted = CMD(n_modes=3, n_samples=50).fit(traj)
    assert out_of_core.count_wrong(fitted, traj) == 0
    labels = np.asarray(fitted.labels_[:]).copy()
    labels[599] ^= 1
    fake: Any = SimpleNamespace(references_=fitted.references_, labels_=labels)
    assert out_of_core.count_wrong(fake, traj) == 1


def test_reading_checks_what_it_reads(tmp_path: Path) -> None:
    from benchmarks.ceilings import read_files
    from cmdgpu.store.chunks import write_chunk

    values = np.arange(5000, dtype=np.float32)
    for i in range(3):
        write_chunk(tmp_path, f"c.{i}.0", values)
    files = sorted(tmp_path.iterdir())
    assert read_files(files, 2, crc=True, piece=4096) == 3 * (20_000 + 4)
    flipped = bytearray(files[1].read_bytes())
    flipped[77] ^= 1
    files[1].write_bytes(flipped)
    with pytest.raises(OSError, match=r"c\.1\.0 is damaged"):
        read_files(files, 2, crc=True, piece=4096)


def test_storage_is_measured_beside_plain_files(tmp_path: Path) -> None:
    from benchmarks import storage

    arguments = ["--tiny", "--runs", "2", "--in", str(tmp_path), "--out", str(tmp_path / "storage.json")]
    written = storage.main(arguments)
    records = json.loads(written.read_text())["records"]
    assert [r["provider"] for r in records].count("cmdgpu") == 2 and len(records) == 6
    for record in records:
        assert record["gb_per_s"] > 0 and record["bytes"] >= 4 * 4096
    assert [file.name for file in tmp_path.iterdir()] == ["storage.json"]


@pytest.mark.slow
def test_an_import_is_measured_beside_plain_files(tmp_path: Path) -> None:
    from benchmarks import importing

    arguments = ["--tiny", "--in", str(tmp_path), "--out", str(tmp_path / "importing.json")]
    records = json.loads(importing.main(arguments).read_text())["records"]
    assert [r["provider"] for r in records] == 2 * [
        "cmdgpu", "cold read", "synced write", "cold read, then synced write",
    ]  # fmt: skip
    for r in records:
        assert r["gb_per_s"] > 0 and r["bytes"] >= 2 * 90_000
        assert (r["percent_of_ceiling"] is not None) == (r["provider"] == "cmdgpu")
    assert all(r["peak_bytes"] <= r["planned_bytes"] <= 512 << 20 for r in records if r["peak_bytes"])
    assert [file.name for file in tmp_path.iterdir()] == ["importing.json"]


@pytest.mark.slow
def test_a_grid_is_measured_beside_one_fit_and_plain_files(tmp_path: Path) -> None:
    from benchmarks import grid

    written = grid.main(["--tiny", "--in", str(tmp_path), "--out", str(tmp_path / "grid.json")])
    plain, one, twelve = json.loads(written.read_text())["records"]
    assert (plain["fits"], one["fits"], twelve["fits"]) == (0, 1, 12)
    assert one["store_bytes"] == twelve["store_bytes"] == 4 * 12 * (512 * 4 + 4)
    assert one["times_one"] == 1 and twelve["result_bytes"] > one["result_bytes"] > 14 * 2048
    assert [file.name for file in tmp_path.iterdir()] == ["grid.json"]


@pytest.mark.slow
def test_a_page_is_measured_and_held_to_its_limits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import page

    arguments = ["--tiny", "--in", str(tmp_path), "--out", str(tmp_path / "page.json")]
    (record,) = json.loads(page.main(arguments).read_text())["records"]
    assert {"profiles", "network", "histogram"} <= set(record["figures"])
    assert 20_000 < record["page_bytes"] < 3_000_000 and record["resident_bytes"] > 50 << 20
    assert [file.name for file in tmp_path.iterdir()] == ["page.json"]
    assert "resident" in capsys.readouterr().out
    monkeypatch.setattr(page, "MOST_PAGE", 1000)
    with pytest.raises(SystemExit):
        page.main(arguments)


@pytest.mark.slow
def test_the_figures_of_the_readme_are_drawn_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import figures

    written = figures.main(["--tiny", "--out", str(tmp_path)])
    assert {file.stem for file in written} >= set(figures.DRAWN)
    for file in written:
        assert file.read_bytes().startswith(b"\x89PNG") and 1000 < file.stat().st_size < figures.MOST_BYTES
    kept = {file.name for file in figures.FOLDER.iterdir()}
    assert kept == {f"{name}.png" for name in (*figures.DRAWN, "report")}
    monkeypatch.setattr(figures, "MOST_BYTES", 1000)
    with pytest.raises(SystemExit, match=r"profiles.png has"):
        figures.main(["--tiny", "--out", str(tmp_path)])


def test_the_browser_is_the_one_that_is_named_or_one_that_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.browser import chromium_path

    installed = tmp_path / "google-chrome"
    installed.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CMDGPU_CHROMIUM", raising=False)
    assert chromium_path() == str(installed)
    monkeypatch.setenv("CMDGPU_CHROMIUM", "/opt/chromium")
    assert chromium_path() == "/opt/chromium"


def test_an_import_of_other_numbers_is_noticed(tmp_path: Path) -> None:
    from benchmarks import importing

    sources = importing.Sources(tmp_path, "safetensors", 2, 100_000)
    sources.state["layers.3.weight"] += 1
    with pytest.raises(SystemExit, match="other numbers"):
        sources.import_()


def test_a_trajectory_is_followed_from_its_first_byte_to_its_last(tmp_path: Path) -> None:
    from benchmarks import scale

    arguments = ["--tiny", "--in", str(tmp_path), "--out", str(tmp_path / "scale.json")]
    records = json.loads(scale.main(arguments).read_text())["records"]
    assert [r["stage"] for r in records] == ["synthesise", "sample", "fit", "export", "verify", "verify-fit"]
    for r in records:
        assert r["gb_per_s"] > 0 and 0 < r["peak_bytes"] < r["limit_bytes"] == 2 << 30
        assert (r["times_plain"] is None) == (r["stage"] in ("synthesise", "sample"))
    assert records[2]["bytes"] >= 20_000 * (8 * 4 + 14)
    assert [file.name for file in tmp_path.iterdir()] == ["scale.json"]


def test_a_fit_of_other_rows_than_were_planted_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import one_stage, scale

    def with_a_flip(stage: str, folder: Path, *sizes: int) -> dict[str, Any]:
        told = one_stage.measured(stage, folder, *sizes)
        if stage == "export":
            raw = bytearray((folder / one_stage.FILE).read_bytes())
            raw[8 + int.from_bytes(raw[:8], "little")] ^= 1  # the first element
            (folder / one_stage.FILE).write_bytes(raw)
        return told

    def with_another_label(*arguments: Any, **options: Any) -> kernels.ReferenceFit:
        fit = right(*arguments, **options)
        fit.mode[5:6] ^= 1
        return fit

    right = kernels.assign_and_fit_reference
    monkeypatch.setattr(kernels, "assign_and_fit_reference", with_another_label)
    told = scale.Scale(tmp_path, (4096, 6, 4), with_a_flip)
    told.run()
    fit, export = told.problems
    assert fit == "fit: 1 of 2048 rows of chunk 0 have other labels"
    assert export == "export: embed.weight is not a r + b"


def test_the_gpu_suite_runs_on_any_device(tmp_path: Path) -> None:
    from benchmarks import gpu

    written = gpu.run(torch.device("cpu"), gpu.TINY, tmp_path / "gpu.json")
    records = json.loads(written.read_text())["records"]
    read = max(r["gb_per_s"] for r in records[3:] if r["case"] == "device read")
    assert read > 0
    fused = [r for r in records if r["case"].startswith("assign_and_fit")]
    assert {r["case"].split()[-1] for r in fused} == {"float32", "bfloat16"}
    assert all(r["percent_of_ceiling"] > 0 and r["percent_of_copy"] > 0 for r in fused)
    assert [r["ceiling"] for r in records if r["case"].startswith("stream")] == ["host to device"]


def test_the_gpu_suite_measures_nothing_that_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import gpu

    right = kernels.assign_and_fit

    def wrong(*arguments: Any, **options: Any) -> kernels.RowFit:
        fit = right(*arguments, **options)
        fit.mode[7:8] ^= 1
        return fit

    monkeypatch.setattr(kernels, "assign_and_fit", wrong)
    with pytest.raises(SystemExit, match="M=3 float32 ragged: 1 labels are wrong"):
        gpu.run(torch.device("cpu"), gpu.TINY, tmp_path / "gpu.json")
    assert not (tmp_path / "gpu.json").exists()


def test_without_cuda_the_gpu_suite_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        gpu.main([])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


# ---- the page -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["quick", "out-of-core", "storage", "importing", "scale", "gpu", "tune"])
def test_the_page_is_rendered_from_the_json(name: str) -> None:
    from benchmarks import render

    page = render.PAGE.read_text()
    assert f"<!-- rendered from results/*/{name}.json -->" in page
    assert render.rendered(page, name, render.results_of(name)) == page
    assert name in render.TABLES


def record(provider: str, ms: float, **fields: Any) -> dict[str, Any]:
    base = {
        "case": f"assign_and_fit {provider}", "operation": "assign_and_fit", "snapshots": 100, "rows": 1000,
        "modes": 10, "dtype": "float32", "threads": 2, "provider": provider, "chosen": provider == "cmdgpu",
        "median_ms": ms, "rows_run": fields.get("rows", 1000), "gb_per_s": 1.0, "ceiling_gb_per_s": 10.0,
        "percent_of_ceiling": 10.0, "not_run": None, "note": "", "prepare_ms": 0.0,
    }  # fmt: skip
    return {**base, **fields}


def test_exponents_are_recovered() -> None:
    from benchmarks.scaling import curves

    records = [record("cmdgpu", 0.3 * n**1.1, rows=n) for n in (10**4, 10**5, 10**6)]
    records += [record("rival", 2.0 * t**1.7, snapshots=t) for t in (20, 50, 200)]
    found = {(c.provider, c.axis): c.exponent for c in curves(records)}
    assert found["cmdgpu", "rows"] == pytest.approx(1.1)
    assert found["rival", "snapshots"] == pytest.approx(1.7)


def test_an_exponent_along_m_begins_where_modes_begin_to_cost() -> None:
    from benchmarks.scaling import curves

    modes = (1, 2, 5, 10, 100, 300, 1000)
    records = [record("cmdgpu", max(10.0, 0.5 * m), modes=m) for m in modes]
    (curve,) = [c for c in curves(records) if c.axis == "modes"]
    assert curve.beyond_memory() == ((100, 300, 1000), (50.0, 150.0, 500.0))
    assert curve.exponent == pytest.approx(1.0)


def test_a_run_on_fewer_rows_is_drawn_as_one_on_all() -> None:
    from benchmarks.scaling import curves

    records = [record("rival", 5.0, modes=m, rows_run=rows) for m, rows in ((1, 1000), (2, 500), (4, 250))]
    (curve,) = [c for c in curves(records) if c.axis == "modes"]
    assert curve.ms == (5.0, 10.0, 20.0)


def test_figures_and_tables_are_drawn_from_records(tmp_path: Path) -> None:
    from benchmarks import plots, render

    records = [
        record(name, slower * m, modes=m, case=f"assign_and_fit M={m}")
        for name, slower in (("cmdgpu", 1.0), ("rival", 5.0))
        for m in (1, 10, 100)
    ]
    records.append(
        {**record("absent", 1.0), "case": "assign_and_fit M=1", "median_ms": None, "not_run": "no"}
    )
    assert [path.name for path in plots.draw(records, tmp_path)] == ["scaling.png", "rates.png"]
    text = "\n".join(render.in_memory({"machine": {"name": "nowhere"}, "records": records}))
    assert "| M=10 | 10.0 | **1 (10 %)** | 1 (10 %) |" in text
    assert "| rival | 1.00 |" in text
    assert "* absent, M=1: no" in text


def test_a_machine_is_named_by_what_tells_it_apart() -> None:
    from benchmarks.machine import slug

    here = {"cpu": "Intel(R) Xeon(R) Processor", "threads": 2, "capability": "AVX512"}
    assert slug(here) == "xeon-2-threads-avx512"
    epyc = {"cpu": "AMD EPYC 7763 64-Core Processor", "threads": 8, "capability": "AVX2"}
    assert slug(epyc) == "epyc-7763-8-threads-avx2"
    assert slug({**here, "gpu": "NVIDIA H200"}) == "h200"
