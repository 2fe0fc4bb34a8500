"""``cmdgpu doctor``."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any, cast

from cmdgpu.cli.outcome import Context, Outcome, command
from cmdgpu.errors import CmdgpuError
from cmdgpu.memory import show_bytes


@command("doctor")
def run(context: Context) -> Outcome:
    """Say what this machine can do: versions, devices, which kernel runs where, and why not another.

    Each kernel is run on a tiny problem whose answer is known; exit code 1 when one fails.
    """
    del context
    import psutil
    import torch

    from cmdgpu import ops

    devices: list[dict[str, Any]] = [
        {
            "name": "cpu",
            "memory_bytes": psutil.virtual_memory().total,
            "capability": ops.device_class(torch.device("cpu")),
        }
    ]
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = cast(Any, torch.cuda).get_device_properties(i)
        devices.append(
            {
                "name": f"cuda:{i} {found.name}",
                "memory_bytes": found.total_memory,
                "capability": f"sm_{found.major}{found.minor}",
            }
        )
    problems: list[str] = []
    chosen: dict[str, Any] = {}
    for device in devices:
        where = device["name"].partition(" ")[0]
        name, refused = ops.choose("float32", 16, 2, ops.resolve_device(where))
        chosen[where] = {"chosen": name, "refused": {key: list(why) for key, why in refused.items()}}
        try:
            _try_known_answer(where)
        except CmdgpuError as error:
            problems.append(f"assign_and_fit on {where}: {error}")
    if sys.platform == "darwin":
        promise = "fit, load and export; recording promises less (no true flush)"
    elif sys.platform == "win32":
        promise = "fit, load and export; recording is refused (no file locks)"
    else:
        promise = "everything"
    payload: dict[str, Any] = {
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "zarr", "numcodecs", "numpy", "scipy")},
        "platform": f"{platform.system()} {platform.machine()}",
        "promise": promise,
        "cpu_count": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "devices": devices,
        "implementations": {"assign_and_fit": chosen},
        "problems": problems,
    }
    lines = [
        "  ".join(
            f"{n} {payload[n] or 'absent'}" for n in ("python", "torch", "triton", "zarr", "numcodecs")
        ),
        f"{payload['platform']}, {payload['cpu_count']} cores: {promise}",
    ]
    for device in devices:
        where = device["name"].partition(" ")[0]
        lines.append(f"{device['name']}  {show_bytes(device['memory_bytes'])}  {device['capability']}")
        lines.append(f"  assign_and_fit: {chosen[where]['chosen']}")
        lines += [f"    not {name}: {'; '.join(why)}" for name, why in chosen[where]["refused"].items()]
    lines += [f"problem  {problem}" for problem in problems] or ["no problems"]
    return Outcome(payload, "\n".join(lines), ok=not problems)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _try_known_answer(device: str) -> None:
    """Rows 2 r + 3 and -r of a reference r must come back as (2, 3) and (-1, 0)."""
    import numpy as np

    from cmdgpu import ops

    r = np.sin(np.arange(16, dtype=np.float32))
    fit = ops.assign_and_fit(np.stack([2 * r + 3, -r], axis=1), r[None], device=device)
    if not np.allclose(fit.a.numpy(), [2, -1], atol=1e-5) or not np.allclose(
        fit.b.numpy(), [3, 0], atol=1e-5
    ):
        raise CmdgpuError(f"a, b = {fit.a.numpy()}, {fit.b.numpy()} where [2, -1], [3, 0] were due")
