"""Render the tables of benchmarks/README.md and the figures: ``python benchmarks/render.py``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks are no installed package

from benchmarks.experiments import ablations, chance, recovery, references  # noqa: E402
from benchmarks.experiments.claims import (  # noqa: E402
    CLAIMS,
    claim_rows,
    method_head,
    method_rows,
    remarks,
    where,
)
from benchmarks.machine import RESULTS  # noqa: E402
from benchmarks.scaling import AXES, curves  # noqa: E402
from cmdgpu.memory import show_bytes  # noqa: E402

PAGE = ROOT / "benchmarks" / "README.md"
END = "<!-- end -->"

Results: TypeAlias = dict[str, Any]
Records: TypeAlias = Sequence[dict[str, Any]]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


# ---- in memory ------------------------------------------------------------------------------------------


def in_memory(results: Results) -> list[str]:
    """A row per case, a column per provider; then exponents, and who has no figure and why."""
    records: Records = results["records"]
    lines: list[str] = []
    for operation in dict.fromkeys(r["operation"] for r in records):
        mine = [r for r in records if r["operation"] == operation]
        lines += [f"`{operation}`, GB/s of W as stored; the product's own choice in bold:", ""]
        lines += [*_rates(mine), ""]
    lines += [*_exponents(records), ""]
    lines += [*_absent(records), *_settings(records)]
    if (RESULTS / results["machine"]["name"] / "scaling.png").exists():
        lines += ["", *(f"![{name}](results/{results['machine']['name']}/{name}.png)" for name in _FIGURES)]
    return lines


_FIGURES = ("scaling", "rates")


def _rates(records: Records) -> list[str]:
    names = [n for n in dict.fromkeys(r["provider"] for r in records) if _timed(records, n)]
    rows: list[list[str]] = []
    for case in dict.fromkeys(r["case"] for r in records):
        found = {r["provider"]: r for r in records if r["case"] == case}
        ceiling = next(r["ceiling_gb_per_s"] for r in found.values() if r["ceiling_gb_per_s"])
        label = case.partition(" ")[2]
        rows.append([label, f"{ceiling:.1f}", *(_rate(found.get(name)) for name in names)])
    return table(["case", "reading memory", *names], rows)


def _timed(records: Records, provider: str) -> bool:
    return any(r["provider"] == provider and r["median_ms"] is not None for r in records)


def _rate(r: dict[str, Any] | None) -> str:
    if r is None or r["median_ms"] is None:
        return "-"
    rate = f"{_short(r['gb_per_s'])} ({_short(r['percent_of_ceiling'])} %)"
    fewer = "" if r["rows_run"] == r["rows"] else f", {r['rows_run']} rows"
    return f"**{rate}**{fewer}" if r["chosen"] else f"{rate}{fewer}"


def _short(number: float) -> str:
    """Two digits that count, and no power of ten for what is larger."""
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"


def _exponents(records: Records) -> list[str]:
    found = curves(records)
    names = list(dict.fromkeys(curve.provider for curve in found))
    axes = [axis for axis in AXES if any(curve.axis == axis for curve in found)]
    cells = {(c.provider, c.axis): "-" if c.exponent is None else f"{c.exponent:.2f}" for c in found}
    rows = [[name, *(cells.get((name, axis), "-") for axis in axes)] for name in names]
    if not rows:
        return []
    return ["Exponent p of time ~ x^p:", "", *table(["provider", *(AXES[axis] for axis in axes)], rows)]


def _absent(records: Records) -> list[str]:
    """Everybody who was asked and gave no figure, with the reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for r in records:
        if r["not_run"]:
            reasons.setdefault((r["provider"], r["not_run"]), []).append(r["case"].partition(" ")[2])
    n_cases = len({r["case"] for r in records if r["operation"] == "assign_and_fit"})
    return [
        f"* {provider}, {'every case' if len(cases) == n_cases else '; '.join(cases)}: {reason}"
        for (provider, reason), cases in reasons.items()
    ]


def _settings(records: Records) -> list[str]:
    """Which of its settings were a rival's best, and what its layout cost outside the clock."""
    lines: list[str] = []
    for provider in dict.fromkeys(r["provider"] for r in records):
        mine = [r for r in records if r["provider"] == provider and r["note"]]
        if not mine:
            continue
        notes = dict.fromkeys(r["note"] for r in mine)
        said = "; ".join(f"{n} (M={_list(r['modes'] for r in mine if r['note'] == n)})" for n in notes)
        largest = max(mine, key=lambda r: r["rows"])
        lines.append(
            f"* {provider}: {said}. Not timed: its layout, {largest['prepare_ms']:.0f} ms for "
            f"{largest['rows']} rows of T={largest['snapshots']}"
        )
    return lines


def _list(values: Iterable[int]) -> str:
    return ", ".join(str(value) for value in sorted(set(values)))


# ---- out of core ----------------------------------------------------------------------------------------


def out_of_core(results: Results) -> list[str]:
    records: Records = results["records"]
    rows = [
        [
            r["case"].removeprefix("fit ") if r["provider"] == "pass, cached" else "",
            r["provider"],
            f"{r['gb_per_s']:.2f} GB/s ± {_half_spread(r):.2f}",
            "-" if r["ceiling"] is None else f"{r['ceiling_gb_per_s']:.2f} GB/s, {r['ceiling']}",
            "-" if r["percent_of_ceiling"] is None else f"{r['percent_of_ceiling']:.0f} %",
            "-" if r["peak_bytes"] is None else _memory(r),
        ]
        for r in records
    ]
    return table(["case", "what", "rate", "ceiling", "of it", "peak memory of plan"], rows)


def _half_spread(r: dict[str, Any]) -> float:
    """Half of slowest less fastest, as a rate around the median."""
    return r["gb_per_s"] * r["spread_ms"] / (2 * r["median_ms"])


def _memory(r: dict[str, Any]) -> str:
    return f"{r['peak_bytes'] / 1e6:.0f} of {r['planned_bytes'] / 1e6:.0f} MB"


# ---- storage --------------------------------------------------------------------------------------------


def storage(results: Results) -> list[str]:
    """A row per kind of work and provider, cmdgpu's rate as a part of the provider's."""
    rows: list[list[str]] = []
    for what in dict.fromkeys(r["what"] for r in results["records"]):
        found: Records = [r for r in results["records"] if r["what"] == what]
        for r in found:
            ratio = found[0]["gb_per_s"] / r["gb_per_s"]
            rate = f"{r['gb_per_s']:.2f} GB/s ({r['slowest_gb_per_s']:.2f} to {r['fastest_gb_per_s']:.2f})"
            rows.append([f"{what}, {r['bytes'] / 1e6:.0f} MB", r["provider"], rate, f"{ratio:.0%}"])
    return table(["work", "provider", "rate", "cmdgpu's rate is"], rows)


def importing(results: Results) -> list[str]:
    rows: list[list[str]] = []
    for r in results["records"]:
        mine = r["provider"] == "cmdgpu"
        rows.append(
            [
                r["case"] if mine else "",
                r["provider"],
                f"{r['gb_per_s']:.2f} GB/s ± {r['gb_per_s'] * r['spread_s'] / (2 * r['median_s']):.2f}",
                f"{r['percent_of_ceiling']:.0f} %" if mine else "-",
                f"{r['peak_bytes'] / 2**20:.0f} MiB of {r['limit']}" if mine else "-",
            ]
        )
    return table(["case", "what", "rate", "of a cold read, then a synced write", "peak memory"], rows)


def grid(results: Results) -> list[str]:
    """One fit, twelve in one pass, and the same bytes by plain files."""
    rows = [
        [
            r["case"],
            r["provider"],
            f"{r['seconds']:.1f} s",
            "-" if r["times_one"] is None else f"{r['times_one']:.2f}",
            show_bytes(r["store_bytes"]),
            "-" if r["device_read_bytes"] is None else show_bytes(r["device_read_bytes"]),
            show_bytes(r["result_bytes"]) if r["fits"] else "-",
        ]
        for r in results["records"]
    ]
    return table(["case", "what", "wall", "of one fit", "store", "read from the device", "results"], rows)


def page(results: Results) -> list[str]:
    """A row per size of the model."""
    rows = [
        [
            r["case"],
            str(r["tensors"]),
            f"{r['seconds']:.1f} s",
            show_bytes(r["resident_bytes"]),
            show_bytes(r["page_bytes"]),
            str(len(r["figures"])),
        ]
        for r in results["records"]
    ]
    return table(["fit", "tensors", "wall", "resident memory", "page", "figures"], rows)


def scale(results: Results) -> list[str]:
    rows: list[list[str]] = []
    for r in results["records"]:
        fetched = r["device_read_bytes"]
        rows.append(
            [
                r["case"] if r["stage"] == "synthesise" else "",
                r["stage"],
                f"{r['bytes'] / 1e9:.3g} GB",
                f"{r['seconds']:.0f} s, {r['gb_per_s']:.2f} GB/s"
                if r["seconds"] >= 10
                else f"{r['seconds']:.1f} s",
                "-" if r["times_plain"] is None else f"{r['times_plain']:.2f} x {r['plain']}",
                "-" if fetched is None else f"{fetched / 1e9:.3g} GB",
                f"{r['peak_bytes'] / 1e6:.0f} of {r['limit_bytes'] / 1e6:.0f} MB",
            ]
        )
    head = ["case", "what", "bytes", "time", "beside plain files", "read from the device", "peak memory"]
    return table(head, rows)


# ---- GPU ------------------------------------------------------------------------------------------------


def gpu(results: Results) -> list[str]:
    rows = [
        [
            r["case"],
            r["provider"],
            f"{r['gb_per_s']:.1f} GB/s",
            "-" if r["percent_of_copy"] is None else f"{r['percent_of_copy']:.0f} %",
            "-" if r["percent_of_ceiling"] is None else f"{r['percent_of_ceiling']:.0f} % of {r['ceiling']}",
        ]
        for r in results["records"]
    ]
    return table(["case", "provider", "rate", "of the device copy", "of its ceiling"], rows)


def tune(results: Results) -> list[str]:
    """What the frozen launch of each case makes, and the fastest of all that were tried."""
    rows: list[list[str]] = []
    records: Records = [r for r in results["records"] if r["gb_per_s"]]
    for shipped in (r for r in records if r["shipped"]):
        case = [shipped[name] for name in ("kernel", "dtype", "layout", "modes")]
        fastest = max(
            (r for r in records if [r[name] for name in ("kernel", "dtype", "layout", "modes")] == case),
            key=lambda r: r["gb_per_s"],
        )
        kernel, dtype, layout, modes = case
        rows.append(
            [
                f"gram_matrix {dtype}, {layout}" if kernel == "gram" else
                f"assign_and_fit on {kernel}, M={modes} {dtype}, {layout}",
                f"{shipped['gb_per_s']:.0f} GB/s",
                f"{100 * shipped['gb_per_s'] / shipped['ceilings']['device copy']:.1f} %",
                f"{100 * shipped['gb_per_s'] / shipped['ceilings']['device read']:.1f} %",
                f"{fastest['gb_per_s']:.0f} GB/s",
            ]
        )  # fmt: skip
    return table(["T=100, resident", "frozen launch", "of the copy", "of reading", "fastest tried"], rows)


# ---- experiments ----------------------------------------------------------------------------------------

EXPERIMENTS = "<!-- rendered from results/experiments/*.json -->"


def _noises(results: Results) -> list[str]:
    noises = dict.fromkeys(one["noise"] for one in results["curves"])
    return ["affinity", "T", "M", "holds up to noise", *(f"ARI at {noise:g}" for noise in noises)]


Others: TypeAlias = tuple[str, Callable[[Results], list[str]], Callable[[Results], list[list[str]]]]
OTHERS: dict[str, Others] = {
    "references": (
        "Better references at the same bytes",
        lambda _: ["M", "references", "R² by energy", "R²", "mean \\|corr\\|", "seconds"],
        references.rows,
    ),
    "recovery": ("Planted modes found again: adjusted Rand index against noise", _noises, recovery.rows),
    "chance": (
        "The verdict on made trajectories",
        lambda _: ["family", "trials", "better", "cannot tell", "no better", "excess over chance"],
        chance.rows,
    ),
    "ablations": (
        "One choice of ours exchanged at a time",
        lambda _: [
            "exchanged",
            "R²",
            "R² by energy",
            "mean \\|corr\\|",
            "ARI with ours",
            "excess",
            "verdicts",
        ],
        ablations.rows,
    ),
}
"""Experiments about CMD itself: what they show, the head of their table, its rows."""


def experiments(found: Mapping[str, Results]) -> list[str]:
    """The paper's claims beside what was measured; then every method of every experiment; then the others."""
    head = ["the paper's claim", "measured, mean ± deviation over the seeds", "where"]
    rows = claim_rows(found)
    lines = table(head, rows) if rows else []
    for name, results in found.items():
        if name in OTHERS:
            what, head_of, rows_of = OTHERS[name]
            lines += ["", f"{what} ({where(results)}):", "", *_padded(head_of(results), rows_of(results))]
        elif "methods" in results:
            shown = f"{results['n_parameters'][0]} parameters, {results['n_snapshots'][0]} snapshots"
            lines += ["", f"`{name}`, {len(results['seeds'])} seeds, {shown}:", ""]
            lines += table(method_head(results), method_rows(results))
            lines += ["", *remarks(results)]
        figures = [f"{name}.png", f"{name}-modes.png"]
        drawn = [figure for figure in figures if (RESULTS / "experiments" / figure).exists()]
        lines += ["", *(f"![{figure}](results/experiments/{figure})" for figure in drawn)] if drawn else []
    return lines


def _padded(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A row that has less to say ends in dashes; a bar within a cell is no end of it."""
    cells = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    return table(head, [row + ["-"] * (len(head) - len(row)) for row in cells])


def experiments_rendered(page: str, found: Mapping[str, Results]) -> str:
    before, _, rest = page.partition(EXPERIMENTS)
    _, _, after = rest.partition(END)
    body = "\n".join(experiments(found)) or "No results yet."
    return f"{before}{EXPERIMENTS}\n{body}\n{END}{after}"


def experiments_found() -> dict[str, Results]:
    """By name, in the order of the claims, the others behind them."""
    files = {file.stem: file for file in sorted((RESULTS / "experiments").glob("*.json"))}
    order = [*dict.fromkeys(claim.experiment for claim in CLAIMS if claim.experiment in files), *files]
    return {name: json.loads(files[name].read_text()) for name in dict.fromkeys(order)}


# ---- the page -------------------------------------------------------------------------------------------

TABLES: dict[str, Callable[[Results], list[str]]] = {
    "quick": in_memory,
    "full": in_memory,
    "out-of-core": out_of_core,
    "storage": storage,
    "importing": importing,
    "scale": scale,
    "grid": grid,
    "page": page,
    "gpu": gpu,
    "tune": tune,
}


def rendered(page: str, name: str, found: Sequence[Results]) -> str:
    """The page with what every machine's ``<name>.json`` says in its place; unchanged without that place."""
    begin = f"<!-- rendered from results/*/{name}.json -->"
    if begin not in page:
        return page
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(END)
    body = "\n\n".join("\n".join([_machine(results), "", *TABLES[name](results)]) for results in found)
    return f"{before}{begin}\n{body or 'No results yet.'}\n{END}{after}"


def _machine(results: Results) -> str:
    machine = results["machine"]
    device = f"{machine['gpu']}, " if "gpu" in machine else ""
    return (
        f"{device}{machine['cpu']}, {machine['threads']} threads, {machine['capability']}, "
        f"torch {machine['torch']}, commit {machine['commit']}"
    )


def results_of(name: str) -> list[Results]:
    return [json.loads(file.read_text()) for file in sorted(RESULTS.glob(f"*/{name}.json"))]


def main() -> None:
    from benchmarks.plots import draw

    for name in ("quick", "full"):
        for file in sorted(RESULTS.glob(f"*/{name}.json")):
            draw(json.loads(file.read_text())["records"], file.parent)
    for name in TABLES:
        PAGE.write_text(rendered(PAGE.read_text(), name, results_of(name)))
    PAGE.write_text(experiments_rendered(PAGE.read_text(), experiments_found()))


if __name__ == "__main__":
    main()
