"""``cmdgpu repair``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cmdgpu.cli.outcome import Context, Outcome, command
from cmdgpu.cli.places import PlaceType

if TYPE_CHECKING:
    from cmdgpu.repairing import Repair


@command("repair")
@click.argument("path", type=PlaceType("a repair"))
@click.option("--to", type=int, help="Go back to this step at most; what lies after it is dropped.")
@click.option("--yes", is_flag=True, help="Do it; without, say what would be done (a terminal is asked).")
def run(context: Context, *, path: Path, to: int | None, yes: bool) -> Outcome:
    """Bring the trajectory at PATH back to its last whole snapshot.

    First everything is read and what will be dropped is said; then, when asked, it is dropped, one
    snapshot at a time. What other files still vouch for (steps, sketch, shapes) is written again. A damaged
    snapshot before a whole one stays; all others stay usable.

    \b
    cmdgpu repair run.zarr
    cmdgpu repair run.zarr --yes
    cmdgpu repair run.zarr --to 4000 --yes
    """
    from cmdgpu.errors import NotAStore
    from cmdgpu.repairing import plan_repair
    from cmdgpu.results import kind_of

    if kind_of(path) != "trajectory":
        raise NotAStore("is a decomposition", file=path, hint="fit its trajectory again into a new output")
    repair = plan_repair(path, to, context.progress)
    lines = _describe(repair)
    done = False
    if repair.is_needed:
        if not yes and sys.stdin.isatty() and sys.stderr.isatty():
            click.echo("\n".join(lines), err=True)
            yes = click.confirm("Do this?", err=True)
        if yes:
            repair.carry_out()
            done = True
            lines.append("done")
        else:
            lines.append("nothing was changed; `cmdgpu repair --yes` does this")
    return Outcome(_payload(repair, done), "\n".join(lines), ok=done >= repair.is_needed and not repair.left)


def _describe(repair: Repair) -> list[str]:
    lines = [f"keeps    {repair.n_kept} snapshots, up to step {repair.keep}"]
    if repair.dropped:
        first, last, n = repair.dropped[0], repair.dropped[-1], len(repair.dropped)
        lines.append(f"drops    step {first}" if n == 1 else f"drops    {n} snapshots, steps {first}..{last}")
    lines += [f"loses    the scalar {name!r}: its values are damaged" for name in repair.lost]
    if repair.rewritten:
        lines.append(f"rewrites {', '.join(repair.rewritten)}: nothing of it is lost")
    lines += [f"leaves   {damage}" for damage in repair.left]
    if not repair.is_needed and not repair.left:
        lines = [f"sound: {repair.n_kept} snapshots, nothing to repair"]
    return lines


def _payload(repair: Repair, done: bool) -> dict[str, Any]:
    return {
        "done": done,
        "last_step": repair.keep,
        "n_snapshots": repair.n_kept,
        "dropped_steps": list(repair.dropped),
        "lost_scalars": list(repair.lost),
        "rewritten": list(repair.rewritten),
        "damaged": [damage.to_json() for damage in repair.left],
    }
