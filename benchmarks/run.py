"""Blocks in memory, cases by providers: ``python benchmarks/run.py [--suite tiny|quick|full] [--out FILE]``.

Writes one JSON file and exits with 1 when any provider computed something else than the definition.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks are no installed package

import psutil  # noqa: E402

from benchmarks.cases import SUITES, Block, Case, Suite  # noqa: E402
from benchmarks.machine import machine, results_file  # noqa: E402
from benchmarks.measure import CeilingRecord, Record, measure  # noqa: E402
from benchmarks.providers import Provider, decompose, our_implementations  # noqa: E402
from benchmarks.rivals import RIVALS, script_whole  # noqa: E402

SHARE_OF_MEMORY = 0.7
"""Of what is free, for the rivals' copies and everybody's intermediate matrices."""


def providers_of(case: Case) -> list[Provider]:
    if case.operation == "decompose":
        return [Provider("cmdgpu", decompose, ours=True), Provider("in-memory script", script_whole)]
    return [*our_implementations(), *RIVALS]


def block_of(case: Case) -> Block:
    """The case's block in memory, and what it leaves free."""
    block = Block(*case.block, free_bytes=0)
    _ = block.whole
    block.free_bytes = int(SHARE_OF_MEMORY * psutil.virtual_memory().available)
    return block


def run_suite(suite: Suite, found: dict[str, Any]) -> tuple[list[Record], list[CeilingRecord]]:
    records: list[Record] = []
    ceilings: list[CeilingRecord] = []
    ordered = sorted(suite.cases, key=lambda case: case.block)
    for _, group in itertools.groupby(ordered, key=lambda case: case.block):
        cases = list(group)
        block = block_of(cases[0])
        for case in cases:
            print(case.name, flush=True)
            measured, limits = measure(case, block, providers_of(case), suite, found)
            for record in measured:
                print(f"  {shown(record)}", flush=True)
            records += measured
            ceilings += limits
        del block
    return records, ceilings


def shown(record: Record) -> str:
    if record.median_ms is None:
        return f"{record.provider:26}  {record.not_run}"
    fewer = "" if record.rows_run == record.rows else f"  on {record.rows_run} rows"
    wrong = f"  WRONG in {record.labels_differ} rows" if record.labels_differ else ""
    return (
        f"{record.provider:26}  {record.median_ms:9.1f} ms  {record.gb_per_s:6.2f} GB/s  "
        f"{record.percent_of_ceiling:5.1f} % of reading {record.ceiling_gb_per_s:5.1f}"
        f"{fewer}{wrong}  {record.note}"
    )


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--suite", choices=list(SUITES), default="quick")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--out", type=Path, help="by default results/<machine>/<suite>.json")
    options = parser.parse_args(arguments)
    found = machine()
    suite = SUITES[options.suite]
    suite = replace(suite, cases=tuple(case for case in suite.cases if options.only in case.name))
    records, ceilings = run_suite(suite, found)
    out: Path = options.out or results_file(suite.name, found)
    write_results(
        out, found, records=[r.to_json() for r in records], ceilings=[c.to_json() for c in ceilings]
    )
    if wrong := [r for r in records if r.labels_differ]:
        names = ", ".join(f"{r.provider} on {r.case} ({r.labels_differ} rows)" for r in wrong)
        raise SystemExit(f"other labels or slopes than the definition: {names}")
    return out


def write_results(out: Path, found: dict[str, Any], **parts: list[dict[str, Any]]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": found, **parts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
