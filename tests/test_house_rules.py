"""Rules of the house that no other tool keeps."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import cmdgpu

ROOT = Path(__file__).resolve().parent.parent


def test_the_public_names_are_these() -> None:
    """A name is added here in the commit that adds it; none is taken away."""
    assert sorted(cmdgpu.__all__) == [
        "CMD",
        "CmdgpuError",
        "CmdgpuWarning",
        "Comparison",
        "Landscape",
        "Recorder",
        "Report",
        "Trajectory",
        "__version__",
        "baselines",
        "compare",
        "landscape",
        "plot",
        "report",
    ]
    assert set(dir(cmdgpu)) >= set(cmdgpu.__all__)
    for name in cmdgpu.__all__:
        assert getattr(cmdgpu, name) is not None


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    try:
        _ = getattr(cmdgpu, "Nothing")  # noqa: B009
    except AttributeError as error:
        assert "Nothing" in str(error)
    else:
        raise AssertionError("a name was invented")


def test_both_packages_say_that_they_are_typed() -> None:
    for package in ("cmdgpu", "cmdgpu_kernels"):
        assert resources.files(package).joinpath("py.typed").is_file()


def test_kernels_is_a_source_root_and_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


_START = """
import json, os, sys
before = dict(os.environ)
heavy = ("torch", "zarr", "triton", "scipy", "matplotlib", "xarray")
def loaded():
    return [name for name in heavy if name in sys.modules]
found = {"import cmdgpu": loaded()}
import cmdgpu
found["import cmdgpu"] = loaded()
from cmdgpu.cli import main
for line in sys.stdin.read().splitlines():
    sys.argv = ["cmdgpu", *line.split()]
    try:
        code = main() or 0
    except SystemExit as ended:
        code = ended.code or 0
    found[line] = [code, *loaded()]
assert dict(os.environ) == before, "importing configures"
print(json.dumps(found), file=sys.__stderr__)
"""
QUICK: dict[str, int] = {
    "--help": 0,
    "--version": 0,
    "-h": 0,
    "": 2,
    "fit --help": 0,
    "import --help": 0,
    "verify --help": 0,
    "export --help": 0,
    "inspect --help": 0,
    "demo --help": 0,
    "compare --help": 0,
    "report --help": 0,
    "landscape --help": 0,
    "repair --help": 0,
    "doctor --help": 0,
    "nonsense": 2,
    "--nonsense": 2,
    "fit": 2,
    "fit run.zarr --nonsense": 2,
    "export run.zarr": 2,
    "import": 2,
    "import run": 2,
    "verify": 2,
    "compare": 2,
    "compare run.zarr --batch-norm off": 2,
    "report run.cmd.zarr": 2,
    "landscape": 2,
    "landscape run.cmd.zarr -o x.json --evaluate task:evaluate": 2,
}


def test_importing_helping_and_usage_errors_load_nothing_heavy() -> None:
    run = subprocess.run(
        [sys.executable, "-c", _START],
        input="\n".join(QUICK),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    found: dict[str, Any] = json.loads(run.stderr.splitlines()[-1])
    assert found.pop("import cmdgpu") == []
    assert found == {line: [code] for line, code in QUICK.items()}
