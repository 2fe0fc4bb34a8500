"""``cmdgpu landscape``."""

# matplotlib ships its types with unannotated **kwargs.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from cmdgpu.cli.bar import counting
from cmdgpu.cli.outcome import Context, Outcome, command
from cmdgpu.cli.places import PlaceType
from cmdgpu.cli.steps import parse_numbers
from cmdgpu.cli.users_code import task
from cmdgpu.errors import UsageError
from cmdgpu.store.places import Place


@command("landscape")
@click.argument("source", metavar="RESULT", type=PlaceType())
@click.option("-o", "--out", required=True, type=PlaceType("a landscape"), help="File to write, JSON.")
@click.option("--modes", default="0,1", show_default=True, help="Two modes, or one for a line.")
@click.option(
    "--span", type=float, default=0.5, show_default=True, help="Factors from 1 - SPAN to 1 + SPAN of each."
)
@click.option("--points", type=int, default=21, show_default=True, help="Factors of each mode.")
@click.option("--step", type=int, default=-1, show_default=True, help="A step; -1 is the last one.")
@click.option(
    "--evaluate",
    metavar="MODULE:FUNCTION",
    required=True,
    help="Takes the loaded model, answers named scores; demo for a result of `cmdgpu demo`.",
)
@click.option("--model", metavar="MODULE:FUNCTION", help="Builds the network that was recorded.")
@click.option("--loader", metavar="MODULE:FUNCTION", help="Makes the batches to measure BatchNorm on.")
@click.option(
    "--batch-norm",
    type=click.Choice(["kept", "reestimated"]),
    help="Running statistics as recorded, or measured anew at every point.  "
    "[default: reestimated with --loader]",
)
@click.option("--select", help="Validation score that chooses the best point: val_acc, min:val_loss.")
@click.option("--figure", type=click.Path(path_type=Path), help="Draw a score into this file.")
@click.option("--score", help="Which one to draw.  [default: the first]")
def run(
    context: Context,
    *,
    source: Place,
    out: Path,
    modes: str,
    span: float,
    points: int,
    step: int,
    evaluate: str,
    model: str | None,
    loader: str | None,
    batch_norm: Literal["kept", "reestimated"] | None,
    select: str | None,
    figure: Path | None,
    score: str | None,
) -> Outcome:
    """Evaluate the model of RESULT while the references of two modes take other values.

    Every other mode stays as it is; the trained point is where both factors are 1. FUNCTION of MODULE, found
    from the current directory, takes a model in evaluation mode and answers numbers as in
    {"val_loss": 0.4}; --model builds the network. Points are kept as they come: the same command goes on
    where it was ended. What --select chooses by should be a score on validation data.

    \b
    cmdgpu landscape run.cmd.zarr -o plane.json --evaluate task:evaluate --model task:network
    cmdgpu landscape run.cmd.zarr -o line.json --modes 3 --points 101 --evaluate task:evaluate \\
      --model task:network --select min:val_loss --figure line.png
    cmdgpu landscape cmdgpu-demo/modes-10.cmd.zarr -o plane.json --evaluate demo --figure plane.png
    """
    chosen = parse_numbers("--modes", modes)
    if model is None and evaluate != "demo":
        raise UsageError("there is no model to evaluate", hint="give --model MODULE:FUNCTION")
    if score is not None and figure is None:
        raise UsageError("--score is given, and there is no --figure to draw it in", hint="give both")
    source, given, keys = task(source, evaluate, model, loader, select)
    from cmdgpu.decomposition import CMD
    from cmdgpu.mode_space import landscape
    from cmdgpu.results import kind_of

    if kind_of(source) == "trajectory":
        raise UsageError(
            "is a trajectory, which has no modes", file=source, hint="give a result of `cmdgpu fit`"
        )
    found = landscape(
        CMD.load(source),
        modes=chosen,
        span=span,
        points=points,
        step=step,
        batch_norm=batch_norm,
        select=keys,
        out=out,
        progress=counting(context.progress, "points"),
        **given,
    )
    if figure is not None:
        found.figure(score).savefig(figure)
    wrote = [str(path) for path in (out, figure) if path is not None]
    payload = {"out": str(out), "figure": None if figure is None else str(figure)}
    return Outcome({**found.to_json(), **payload}, f"{found.table()}\n\nwrote {', '.join(wrote)}")
