"""How long the page of a fit takes, and how large it is: ``python benchmarks/page.py --in DIR``.

A transformer's trajectory is synthesised and fitted, then the page is made of the result, each in a process
of its own (``one_stage.py``). A page over 3 MB, 30 s or 1 GiB of resident memory ends with 1.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks are no installed package

from benchmarks.machine import in_own_process, machine, results_file  # noqa: E402
from benchmarks.run import write_results  # noqa: E402
from cmdgpu.memory import show_bytes  # noqa: E402

CASES: Final = ((10**7, 60), (10**8, 12))
"""Rows and snapshots."""
TINY: Final = ((3000, 10),)
MODES: Final = 10
MOST_SECONDS, MOST_RESIDENT, MOST_PAGE = 30.0, 1 << 30, 3_000_000


@dataclass(frozen=True)
class Record:
    case: str
    tensors: int
    seconds: float
    resident_bytes: int
    """The most that the process held, the interpreter and torch included."""
    page_bytes: int
    device_read_bytes: int | None
    figures: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def is_within(self) -> bool:
        return (
            self.seconds < MOST_SECONDS
            and self.resident_bytes < MOST_RESIDENT
            and self.page_bytes < MOST_PAGE
        )


def measure(folder: Path, rows: int, snapshots: int) -> Record:
    def stage(name: str) -> dict[str, Any]:
        return in_own_process("one_stage.py", name, folder, rows, snapshots, MODES)

    tensors = stage("synthesise")["tensors"]
    stage("fit")
    told = stage("report")
    return Record(
        case=f"N={rows:.3g} T={snapshots} M={MODES}",
        tensors=tensors,
        seconds=told["seconds"],
        resident_bytes=told["resident_bytes"],
        page_bytes=told["page_bytes"],
        device_read_bytes=told.get("read_bytes"),
        figures=told["figures"],
    )


def main(arguments: list[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="sizes for a test")
    parser.add_argument("--in", dest="folder", type=Path, help="a folder for the trajectories")
    parser.add_argument("--out", type=Path, help="by default results/<machine>/page.json")
    options = parser.parse_args(arguments)
    found = machine()
    place: Path | None = options.folder
    records: list[Record] = []
    for rows, snapshots in TINY if options.tiny else CASES:
        folder = Path(tempfile.mkdtemp(dir=place))
        try:
            records.append(measure(folder, rows, snapshots))
        finally:
            shutil.rmtree(folder)
        print(shown(records[-1]), flush=True)
    out: Path = options.out or results_file("page", found)
    write_results(out, found, records=[record.to_json() for record in records])
    if not all(record.is_within for record in records):
        sys.exit(1)
    return out


def shown(record: Record) -> str:
    return (
        f"{record.case}  {record.tensors} tensors  {record.seconds:6.2f} s  "
        f"{show_bytes(record.resident_bytes)} resident  page of {show_bytes(record.page_bytes)}"
    )


if __name__ == "__main__":
    main()
