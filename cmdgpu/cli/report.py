"""``cmdgpu report``."""

from __future__ import annotations

from pathlib import Path

import click

from cmdgpu.cli.outcome import Context, Outcome, command
from cmdgpu.cli.places import PlaceType
from cmdgpu.memory import show_bytes
from cmdgpu.store.places import Place


@command("report")
@click.argument("result", type=PlaceType())
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="The page to write.")
@click.option(
    "--baselines",
    multiple=True,
    help="Fitted for the page and drawn beside the modes: ema,swa,lawa,pca,dmd; with settings: "
    "pca:components=10,dmd:rank=10.",
)
@click.option(
    "--fits",
    multiple=True,
    type=PlaceType(),
    help="Another fit of the same run: error against M; repeatable.",
)
@click.option(
    "--scores",
    type=click.Path(path_type=Path),
    help="Accuracy and loss of methods: what `cmdgpu compare --json` wrote.",
)
@click.option("--landscape", type=click.Path(path_type=Path), help="What `cmdgpu landscape` wrote.")
@click.option("--title", help="Of the page.  [default: the name of the result]")
@click.option(
    "--memory-limit", help="Host memory of a pass of the baselines.  [default: a quarter of what is free]"
)
def run(
    context: Context,
    *,
    result: Place,
    out: Path,
    baselines: tuple[str, ...],
    fits: tuple[Place, ...],
    scores: Path | None,
    landscape: Path | None,
    title: str | None,
    memory_limit: str | None,
) -> Outcome:
    """Show RESULT, a finished fit, in one HTML file: offline, light and dark, on a phone and on paper.

    Whether the modes mean anything, their profiles, where in the network they are, how well they follow the
    weights, and with more at hand: other methods, other M, the plane of two modes. It takes seconds: nothing
    but baselines reads the trajectory.

    \b
    cmdgpu report run.cmd.zarr -o report.html
    cmdgpu report run.cmd.zarr -o report.html --baselines ema,pca,dmd:rank=10 --fits other.cmd.zarr
    cmdgpu compare run.cmd.zarr --evaluate task:evaluate --model task:network --json > scores.json
    cmdgpu report run.cmd.zarr -o report.html --scores scores.json
    """
    from cmdgpu.reporting import report

    made = report(
        result,
        out,
        baselines=",".join(baselines),
        fits=fits,
        scores=scores,
        landscape=landscape,
        title=title,
        memory_limit=memory_limit,
        progress=context.progress,
    )
    payload = {
        "out": str(made.path),
        "bytes": made.n_bytes,
        "verdict": made.data["words"]["verdict"],
        "figures": list(made.figures),
        "tables": list(made.tables),
        "notes": list(made.warnings),
    }
    text = [
        f"wrote {made.path}, {show_bytes(made.n_bytes)}, "
        f"{len(made.figures)} figures and {len(made.tables)} tables",
        *(f"note: {note}" for note in made.warnings),
        made.data["words"]["quality"][0],
    ]
    return Outcome(payload, "\n".join(text))
