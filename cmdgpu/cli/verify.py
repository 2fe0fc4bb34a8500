"""``cmdgpu verify``."""

from __future__ import annotations

import click

from cmdgpu.cli.outcome import Context, Outcome, command
from cmdgpu.cli.places import PlaceType
from cmdgpu.memory import show_bytes
from cmdgpu.store.places import Place

_REMEDIES = {
    "trajectory": "put the files back from a copy, or let `cmdgpu repair` say what going back would cost; "
    "snapshots that are whole stay usable with sel(steps=...)",
    "result": "put the files back from a copy, or fit again into a new output",
}


@command("verify")
@click.argument("path", type=PlaceType())
@click.option("--quick", is_flag=True, help="Metadata, presence, sizes and digests; not every byte.")
def run(context: Context, *, path: Place, quick: bool) -> Outcome:
    """Check the trajectory or result at PATH; exit code 1 when anything is damaged.

    Every damaged file is named with its step and its tensors. Nothing is changed.

    \b
    cmdgpu verify run.zarr
    cmdgpu verify run.cmd.zarr --quick
    """
    from cmdgpu.results import kind_of, verify_result
    from cmdgpu.store.verification import verify_store

    kind = kind_of(path)
    check = verify_store if kind == "trajectory" else verify_result
    found = check(path, quick=quick, progress=context.progress)
    lines = [f"damaged  {damage}" for damage in found.damaged]
    checked = f"{found.chunks_checked} chunks, {show_bytes(found.bytes_checked)}"
    lines.append(f"{len(found.damaged)} damaged; checked {checked}" if lines else f"sound: {checked} checked")
    remedy = None
    if found.damaged:
        remedy = _REMEDIES[kind]
        lines.append(remedy)
    payload = {
        "kind": kind,
        "chunks_checked": found.chunks_checked,
        "bytes_checked": found.bytes_checked,
        "hint": remedy,
        "damaged": [damage.to_json() for damage in found.damaged],
    }
    return Outcome(payload, "\n".join(lines), ok=not found.damaged)
