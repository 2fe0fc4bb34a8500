"""The built-in example: train on real digits, record, decompose, rebuild every snapshot, compare, show.

Everything it needs ships with the package and nothing leaves the machine. What is selected is selected
on validation images; test images are only reported.
"""

# matplotlib ships its types with unannotated **kwargs.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from cmdgpu.comparison import compare
from cmdgpu.decomposition import CMD
from cmdgpu.demo.digits import SELECT, SPLIT, evaluation, initial_model, load_digits, split_digits, train
from cmdgpu.demo.folder import (
    ACCURACY,
    CORRELATION,
    MARKER,
    MODES,
    PAGE,
    PROFILES,
    RUN,
    Task,
    claim,
    result_name,
    task_of,
    write_marker,
)
from cmdgpu.demo.outcome import DemoReport, FitReport, Score, curve_of, score_of
from cmdgpu.errors import UsageError
from cmdgpu.null_model import random_walk_correlation
from cmdgpu.ops import resolve_device
from cmdgpu.plot import accuracy_against_step, correlation_matrix, reference_profiles
from cmdgpu.progress import Progress, Silent
from cmdgpu.reporting import report as make_page
from cmdgpu.trajectory import Trajectory

__all__ = ["MARKER", "MODES", "SELECT", "DemoReport", "Task", "run_demo", "task_of"]


def run_demo(
    directory: Path | str,
    *,
    seed: int = 0,
    epochs: int = 60,
    device: str = "cpu",
    progress: Progress | None = None,
) -> DemoReport:
    """Train, record, decompose with M = 1, 2, 5, 10 modes, rebuild every snapshot, evaluate, draw, show.

    The seed fixes the split, the initial weights, the order and shifts of the training images and the
    sampled rows; torch's global random state and thread count are the caller's again afterwards.
    On the CPU the numbers do not depend on the number of threads.

    ``directory`` must be absent, empty, or hold an earlier demo, whose files are then replaced and
    whose other files stay; anything else is refused untouched (StoreExists).
    """
    if epochs < 2:
        raise UsageError(f"epochs is {epochs}; a trajectory worth decomposing needs at least 2")
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed is {seed}; it must lie in 0 .. 2^63 - 1")
    where = resolve_device(device)
    directory = Path(directory)
    began = time.perf_counter()
    tell = Silent() if progress is None else progress
    claim(directory)

    run = directory / RUN
    images = split_digits(load_digits(), seed, where)
    model = initial_model(seed, where)
    train(model, images, run, seed=seed, epochs=epochs, progress=tell)
    trajectory = Trajectory.open(run)
    steps = np.asarray(trajectory.steps)
    took: dict[str, float] = {}
    fitted: dict[str, CMD] = {}
    for n_modes in MODES:
        started = time.perf_counter()
        name = f"CMD, M = {n_modes}"
        fitted[name] = CMD(n_modes=n_modes, random_state=seed, device=device).fit(
            trajectory, out=directory / result_name(n_modes), progress=tell
        )
        took[name] = time.perf_counter() - started
    comparison = compare(
        trajectory,
        {"training": "recorded", **fitted},
        evaluation(images),
        model=model,
        select=SELECT,
        progress=tell,
    )
    curves = {label: curve_of(comparison, label) for label in comparison.labels}
    fits = [
        _report_fit(
            cmd, n_modes, score_of(steps, curves[name]), directory / result_name(n_modes), seed, took[name]
        )
        for n_modes, (name, cmd) in zip(MODES, fitted.items(), strict=True)
    ]

    n, t = trajectory.shape
    finest = fitted[f"CMD, M = {MODES[-1]}"]
    figures = {
        ACCURACY: accuracy_against_step(
            steps,
            {label: curve.test_t for label, curve in curves.items()},
            unit=trajectory.unit,
            title=f"Test accuracy of every rebuilt snapshot (N = {n:,}, T = {t}, {SPLIT[2]} test images)",
        ),
        PROFILES: reference_profiles(finest, unit=trajectory.unit),
        CORRELATION: correlation_matrix(finest),
    }
    for name, figure in figures.items():
        figure.savefig(directory / name)
    page = make_page(
        finest,
        directory / PAGE,
        fits=fitted,
        scores=comparison,
        title=f"Handwritten digits: {epochs} epochs in {finest.n_modes_} modes",
    )
    report = DemoReport(
        directory=directory,
        seed=seed,
        epochs=epochs,
        device=str(where),
        n_parameters=n,
        n_snapshots=t,
        n_samples=int(np.count_nonzero(np.asarray(finest.sample_labels_) >= 0)),
        trajectory=run,
        trajectory_bytes=trajectory.stored_bytes,
        training=score_of(steps, curves["training"]),
        fits=tuple(fits),
        figures=tuple(directory / name for name in figures),
        page=page.path,
        elapsed_s=time.perf_counter() - began,
    )
    write_marker(directory, report.to_json())
    return report


def _report_fit(cmd: CMD, n_modes: int, score: Score, result: Path, seed: int, fit_s: float) -> FitReport:
    metrics = cmd.metrics_
    sample_kt = np.asarray(cmd.sample_)
    return FitReport(
        n_modes_asked=n_modes,
        n_modes=cmd.n_modes_,
        score=score,
        weight_mse=float(metrics["weight_mse"]),
        r2_energy=float(metrics["r2_energy"]),
        mean_abs_correlation=float(metrics["mean_abs_correlation"]),
        null=random_walk_correlation(sample_kt, n_modes, None, "abs-corr", seed=seed),
        result=result,
        result_bytes=int(metrics["result_bytes"]),
        bytes_per_s=float(metrics["bytes_per_s"]),
        fit_s=fit_s,
    )
