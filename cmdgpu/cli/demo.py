"""``cmdgpu demo``."""

from __future__ import annotations

from pathlib import Path

import click

from cmdgpu.cli.outcome import Context, Outcome, command


@command("demo")
@click.argument("directory", type=click.Path(path_type=Path), default=Path("cmdgpu-demo"))
@click.option("--device", default="cpu", show_default=True, help="Where to train and fit.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--epochs", type=click.IntRange(min=2), default=60, show_default=True)
def run(context: Context, *, directory: Path, device: str, seed: int, epochs: int) -> Outcome:
    """The whole way on real data, offline, in under a minute on two cores.

    Trains a small network on 1,797 scanned digits, records every epoch, decomposes the run into 1, 2, 5 and
    10 modes, rebuilds every snapshot, evaluates it on held-out images, prints one table, and leaves a page to
    look at, report.html, and three figures in DIRECTORY (cmdgpu-demo by default).
    """
    from cmdgpu.demo import run_demo

    report = run_demo(directory, seed=seed, epochs=epochs, device=device, progress=context.progress)
    return Outcome(report.to_json(), report.table())
