"""Render the tables of benchmarks/README.md from the JSON: ``python benchmarks/render.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
END = "<!-- end -->"


def table(results: dict[str, Any]) -> str:
    """Markdown: one row per case, one column per provider, GB/s and percent of the read rate."""
    records: list[dict[str, Any]] = results["records"]
    providers = list(dict.fromkeys(r["provider"] for r in records))
    lines = [
        _machine(results),
        "",
        "| case | " + " | ".join(providers) + " | reading memory |",
        "|---" * (len(providers) + 2) + "|",
    ]
    for case in dict.fromkeys(r["case"] for r in records):
        found = {r["provider"]: r for r in records if r["case"] == case}
        cells = [
            f"{found[p]['gb_per_s']:.2f} GB/s ({found[p]['percent_of_ceiling']:.0f} %)" for p in providers
        ]
        ceiling = next(iter(found.values()))["ceiling_gb_per_s"]
        lines.append(
            f"| {case.removeprefix('assign_and_fit ')} | " + " | ".join(cells) + f" | {ceiling:.1f} GB/s |"
        )
    return "\n".join(lines)


def storage_table(results: dict[str, Any]) -> str:
    """Markdown: one row per kind of work and provider, cmdgpu's rate as a part of the provider's."""
    lines = [_machine(results), "", "| work | provider | rate | cmdgpu's rate is |", "|---|---|---|---|"]
    for what in dict.fromkeys(r["what"] for r in results["records"]):
        found: list[dict[str, Any]] = [r for r in results["records"] if r["what"] == what]
        for r in found:
            ratio = found[0]["gb_per_s"] / r["gb_per_s"]
            rate = f"{r['gb_per_s']:.2f} GB/s ({r['slowest_gb_per_s']:.2f} to {r['fastest_gb_per_s']:.2f})"
            lines.append(f"| {what}, {r['bytes'] / 1e6:.0f} MB | {r['provider']} | {rate} | {ratio:.0%} |")
    return "\n".join(lines)


def _machine(results: dict[str, Any]) -> str:
    machine = results["machine"]
    return (
        f"{machine['cpu']}, {machine['threads']} threads, {machine['capability']}, torch {machine['torch']}, "
        f"commit {machine['commit']}"
    )


TABLES = {"cpu": table, "storage": storage_table}


def rendered(page: str, name: str, results: dict[str, Any]) -> str:
    """The page with the table of ``results/<name>.json`` in its place."""
    begin = f"<!-- rendered from results/{name}.json -->"
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(END)
    return f"{before}{begin}\n{TABLES[name](results)}\n{END}{after}"


def main() -> None:
    page = HERE / "README.md"
    for name in TABLES:
        results = json.loads((HERE / "results" / f"{name}.json").read_text())
        page.write_text(rendered(page.read_text(), name, results))


if __name__ == "__main__":
    main()
