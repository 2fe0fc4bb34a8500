"""Render the table of benchmarks/README.md from the JSON: ``python benchmarks/render.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- rendered from results/cpu.json -->", "<!-- end -->"


def table(results: dict[str, Any]) -> str:
    """Markdown: one row per case, one column per provider, GB/s and percent of the read rate."""
    records: list[dict[str, Any]] = results["records"]
    providers = list(dict.fromkeys(r["provider"] for r in records))
    machine = results["machine"]
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads, {machine['capability']}, torch {machine['torch']}, "
        f"commit {machine['commit']}",
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


def rendered(page: str, results: dict[str, Any]) -> str:
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(results)}\n{END}{after}"


def main() -> None:
    page = HERE / "README.md"
    results = json.loads((HERE / "results" / "cpu.json").read_text())
    page.write_text(rendered(page.read_text(), results))


if __name__ == "__main__":
    main()
