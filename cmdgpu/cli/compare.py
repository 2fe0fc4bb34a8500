"""``cmdgpu compare``."""

# matplotlib ships its types with unannotated **kwargs.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from cmdgpu.cli.outcome import Context, Outcome, command
from cmdgpu.cli.places import PlaceType
from cmdgpu.cli.steps import parse_numbers
from cmdgpu.cli.users_code import task
from cmdgpu.store.places import Place

if TYPE_CHECKING:
    from cmdgpu.decomposition import CMD
    from cmdgpu.trajectory import Trajectory


@command("compare")
@click.argument("source", metavar="PLACE", type=PlaceType())
@click.option(
    "--methods",
    "--baselines",
    "methods",
    multiple=True,
    help="What to compare beside the recorded snapshots and a CMD: ema,swa,lawa,pca,dmd,rank-one,"
    "reference-dmd,cmd; with settings: ema:decay=0.9,dmd:rank=10,groups=layer.",
)
@click.option("--modes", help="A CMD of each of these numbers of modes: 2,5,10.  [default: 10]")
@click.option(
    "--step", "--steps", "steps", multiple=True, help="all, last, every=10, or steps.  [default: all]"
)
@click.option(
    "--evaluate",
    metavar="MODULE:FUNCTION",
    help="Takes the loaded model, answers named scores; demo for the folder of `cmdgpu demo`.",
)
@click.option("--model", metavar="MODULE:FUNCTION", help="Builds the network that was recorded.")
@click.option("--loader", metavar="MODULE:FUNCTION", help="Makes the batches to measure BatchNorm on.")
@click.option(
    "--batch-norm",
    type=click.Choice(["kept", "reestimated", "both"]),
    help="Running statistics as recorded, or measured anew.  [default: both with --loader, else kept]",
)
@click.option("--select", help="Validation score that chooses a step of every method: val_acc, min:val_loss.")
@click.option("--csv", type=click.Path(path_type=Path), help="Write all numbers to this file.")
@click.option("--figure", type=click.Path(path_type=Path), help="Draw errors and scores into this file.")
@click.option(
    "--memory-limit", help="Host memory of a pass: 512MiB, 4GiB.  [default: a quarter of what is free]"
)
def run(
    context: Context,
    *,
    source: Place,
    methods: tuple[str, ...],
    modes: str | None,
    steps: tuple[str, ...],
    evaluate: str | None,
    model: str | None,
    loader: str | None,
    batch_norm: Literal["kept", "reestimated", "both"] | None,
    select: str | None,
    csv: Path | None,
    figure: Path | None,
    memory_limit: str | None,
) -> Outcome:
    """Hold methods against the recorded snapshots of PLACE, a trajectory or a result.

    Weight error, bytes and seconds of every method at every step; with --evaluate also what the models are
    worth: FUNCTION of MODULE, found from the current directory, takes a loaded model in evaluation mode and
    answers numbers as in {"val_accuracy": 0.9}. --model builds the network. BatchNorm is treated alike for
    all methods, and what --select chooses by should be a score on validation data.

    \b
    cmdgpu compare run.zarr --methods ema,swa,lawa,pca,dmd --modes 2,5,10
    cmdgpu compare run.cmd.zarr --evaluate task:evaluate --model task:network --select val_accuracy
    cmdgpu compare cmdgpu-demo --evaluate demo --methods ema,swa --csv compared.csv --figure compared.png
    """
    from cmdgpu.comparison import compare, split_methods

    source, given, keys = task(source, evaluate, model, loader, select)
    named = [one for text in methods for one in split_methods(text)]
    comparison = compare(
        _opened(source),
        _with_the_usual(named, modes),
        steps=steps or "all",
        batch_norm=batch_norm,
        select=keys,
        memory_limit=memory_limit,
        progress=context.progress,
        **given,
    )
    if csv is not None:
        comparison.write_csv(csv)
    if figure is not None:
        comparison.figure().savefig(figure)
    wrote = [str(path) for path in (csv, figure) if path is not None]
    text = comparison.table() + (f"\n\nwrote {', '.join(wrote)}" if wrote else "")
    payload = {"csv": None if csv is None else str(csv), "figure": None if figure is None else str(figure)}
    return Outcome({**comparison.to_json(), **payload}, text)


def _with_the_usual(named: list[str], modes: str | None) -> list[str]:
    """The recorded snapshots first, then a CMD."""
    kinds = {one.partition(":")[0].strip() for one in named}
    usual = [] if kinds & {"recorded", "gd"} else ["recorded"]
    if modes is not None:
        usual += [f"cmd:modes={m}" for m in parse_numbers("--modes", modes)]
    elif "cmd" not in kinds:
        usual.append("cmd")
    return [*usual, *named]


def _opened(source: Place) -> Trajectory | CMD:
    from cmdgpu.decomposition import CMD
    from cmdgpu.results import kind_of
    from cmdgpu.trajectory import Trajectory

    return Trajectory.open(source) if kind_of(source) == "trajectory" else CMD.load(source)
