"""The benchmarks run tiny as tests, so that they cannot rot, and their page shows what their JSON says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.syspath_prepend(str(ROOT))  # pyright: ignore[reportUnknownMemberType]


def test_every_provider_gives_the_same_labels_and_a_rate(tmp_path: Path) -> None:
    from benchmarks import run

    written = run.main(["--tiny", "--runs", "2", "--out", str(tmp_path / "cpu.json")])
    records = json.loads(written.read_text())["records"]
    assert {r["provider"] for r in records} == {"cmdgpu torch", "plain torch", "plain numpy"}
    for record in records:
        assert record["gb_per_s"] > 0 and record["ceiling_gb_per_s"] > 0
        assert record["labels_differ"] <= 2, record


def test_storage_is_measured_beside_plain_files(tmp_path: Path) -> None:
    from benchmarks import storage

    arguments = ["--tiny", "--runs", "2", "--in", str(tmp_path), "--out", str(tmp_path / "storage.json")]
    written = storage.main(arguments)
    records = json.loads(written.read_text())["records"]
    assert [r["provider"] for r in records].count("cmdgpu") == 2 and len(records) == 6
    for record in records:
        assert record["gb_per_s"] > 0 and record["bytes"] >= 4 * 4096
    assert [file.name for file in tmp_path.iterdir()] == ["storage.json"]


@pytest.mark.parametrize("name", ["cpu", "storage"])
def test_the_page_is_rendered_from_the_json(name: str) -> None:
    from benchmarks import render

    results = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    page = (ROOT / "benchmarks" / "README.md").read_text()
    assert render.rendered(page, name, results) == page
    assert str(results["machine"]["cpu"]) in page


def test_counted_bytes_are_w_and_eighteen_a_row() -> None:
    from benchmarks.cases import Case

    assert Case(100, 1000, 10).bytes == 100 * 1000 * 4 + 18 * 1000
    assert Case(100, 1000, 10, "bfloat16").bytes == 100 * 1000 * 2 + 18 * 1000
    assert "benchmarks" in sys.modules
