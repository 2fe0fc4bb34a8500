"""Build hook: compile the native kernel where a C++ compiler is found, and never fail an install without one.

The source is compiled once per instruction set into ``cmdgpu_kernels/native/lib/<name>.so``, which is loaded
by ctypes and so fits every Python; what was built, or why not, is told by ``report.txt`` beside them, which
``cmdgpu doctor`` repeats. ``CXX`` names the compiler; ``CMDGPU_NATIVE=0`` builds nothing.

    python hatch_build.py      compile again in place, after a change of the source
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run as a program
    BuildHookInterface = object

KERNELS = Path(__file__).resolve().parent / "kernels" / "cmdgpu_kernels"
SOURCE = KERNELS / "native" / "native.cpp"
LIBRARIES = KERNELS / "native" / "lib"
TARGETS = {"avx512": ["-march=x86-64-v4"], "avx2": ["-march=x86-64-v3"], "baseline": []}
"""Names in ``native.library.PATHS``. The levels are those of the x86-64 psABI."""
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math"]
"""No fast-math: a NaN must stay one, and sums keep their order."""
SECONDS = 300


class NativeKernel(BuildHookInterface):
    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel":
            return
        built = compile_all()
        build_data["artifacts"].append("/kernels/cmdgpu_kernels/native/lib/*")
        if built:
            build_data["pure_python"] = False
            system = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{system}"
        else:
            reason = (LIBRARIES / "report.txt").read_text().strip()
            self.app.display_warning(f"no compiled kernel, torch serves the CPU: {reason}")


def compile_all() -> list[str]:
    """Names of the libraries that were built; the others and their reasons stand in the report."""
    LIBRARIES.mkdir(exist_ok=True)
    for old in LIBRARIES.iterdir():
        old.unlink()
    compiler, report = _compiler()
    built: list[str] = []
    if compiler:
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        for name, flags in TARGETS.items():
            outcome = _compile(compiler, name, flags) if x86 or not flags else "is for x86-64"
            built += [name] if outcome is None else []
            report.append(f"{name}: {outcome or f'compiled by {shlex.join(compiler)}'}")
    (LIBRARIES / "report.txt").write_text("\n".join(report) + "\n")
    return built


def _compiler() -> tuple[list[str], list[str]]:
    if os.environ.get("CMDGPU_NATIVE") == "0":
        return [], ["switched off by CMDGPU_NATIVE=0 when cmdgpu was installed"]
    if sys.platform == "win32":
        return [], ["not built on Windows"]
    if asked := os.environ.get("CXX"):
        return shlex.split(asked), []
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name], []
    return [], ["no C++ compiler was found when cmdgpu was installed (looked for CXX, c++, g++, clang++)"]


def _compile(compiler: list[str], name: str, flags: list[str]) -> str | None:
    """None, or why there is no such library."""
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / f"{name}.so"
        command = [*compiler, *FLAGS, *flags, f'-DCMDGPU_SOURCE="{digest}"', str(SOURCE), "-o", str(out)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{shlex.join(compiler)} could not be run: {error}"
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
            return f"{shlex.join(compiler)} failed: {lines[0][:200]}"
        # Moved into place whole: a process that has the old library open keeps it.
        shutil.move(out, LIBRARIES / out.name)
    return None


if __name__ == "__main__":
    compile_all()
    print((LIBRARIES / "report.txt").read_text(), end="")
