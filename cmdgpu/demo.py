"""The built-in example: train on real digits, record, decompose, rebuild every snapshot, compare.

Everything it needs ships with the package and nothing leaves the machine. What is selected is selected
on validation images; test images are only reported.
"""

# torch leaves the types of many methods open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import importlib.resources
import json
import os
import shutil
import time
from collections import OrderedDict
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cmdgpu.comparison import Comparison, Evaluation, compare
from cmdgpu.decomposition import CMD
from cmdgpu.errors import StoreExists, UsageError
from cmdgpu.notation import F64, I64, U8
from cmdgpu.null_model import NullCorrelation, random_walk_correlation
from cmdgpu.ops import resolve_device
from cmdgpu.plot import accuracy_against_step, correlation_matrix, reference_profiles
from cmdgpu.progress import Progress, Silent
from cmdgpu.recording import Recorder
from cmdgpu.store import durable
from cmdgpu.trajectory import Trajectory

MODES: Final = (1, 2, 5, 10)
SPLIT: Final = (1000, 297, 500)
"""Images for training, validation and test."""
BATCH: Final = 50
LEARNING_RATE: Final = 1e-3
"""Batch and rate are common defaults: they were not tuned on what the table shows."""
LATE: Final = 10
"""Snapshots at the end over which accuracy is also averaged: one snapshot alone is noisy."""

MARKER: Final = "demo.json"
KIND: Final = "cmdgpu demo"
RUN: Final = "run.zarr"
ACCURACY: Final = "accuracy.png"
PROFILES: Final = "modes.png"
CORRELATION: Final = "correlation.png"


@dataclass(frozen=True)
class Digits:
    """Scans of handwritten digits: see ``cmdgpu/data/README.md`` for their source and licence."""

    images: U8
    """(n, 8, 8), ink from 0 to 16."""
    labels: U8
    """(n,), 0 to 9."""


def load_digits() -> Digits:
    """The 1,797 images of the UCI optical digits test set that ship with the package."""
    source = importlib.resources.files("cmdgpu").joinpath("data").joinpath("digits.npz")
    with source.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return Digits(images=arrays["images"], labels=arrays["labels"])


def digit_classifier() -> nn.Sequential:
    """(n, 1, 8, 8) images to (n, 10) logits; 101,626 parameters in eight tensors.

    Without BatchNorm: the weights alone are the model, nothing is re-estimated after rebuilding them.
    """
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            conv1=nn.Conv2d(1, 32, kernel_size=3, padding=1),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(32, 64, kernel_size=3, stride=2, padding=1),
            relu2=nn.ReLU(),
            flatten=nn.Flatten(),
            hidden=nn.Linear(64 * 4 * 4, 80),
            relu3=nn.ReLU(),
            output=nn.Linear(80, 10),
        )
    )


@dataclass(frozen=True)
class Score:
    """How well the snapshots of one method classify; accuracies are fractions of 1."""

    last_validation: float
    last_test: float
    late_test: float
    """Mean over the last ``LATE`` snapshots."""
    selected_epoch: int
    """Highest validation accuracy; among equals the lowest validation loss, then the earliest."""
    selected_validation: float
    selected_test: float


@dataclass(frozen=True)
class FitReport:
    """One decomposition beside the training it describes."""

    n_modes_asked: int
    n_modes: int
    score: Score
    weight_mse: float
    """Mean over all rows and snapshots of (w - a r - b)^2."""
    r2_energy: float
    mean_abs_correlation: float
    null: NullCorrelation
    """Mean |corr| of independent random walks of the same T, K and number of modes."""
    result: Path
    result_bytes: int
    bytes_per_s: float
    """Of the pass over the trajectory; a trajectory this small says little about the hardware."""
    fit_s: float

    @property
    def above_null(self) -> bool:
        """Whether the rows follow their references more closely than random walks follow theirs."""
        return self.mean_abs_correlation > self.null.high


@dataclass(frozen=True)
class DemoReport:
    """What the demo found, ready for a table or for JSON."""

    directory: Path
    seed: int
    epochs: int
    device: str
    n_parameters: int
    n_snapshots: int
    n_samples: int
    """Moving rows that were clustered."""
    trajectory: Path
    trajectory_bytes: int
    training: Score
    fits: tuple[FitReport, ...]
    figures: tuple[Path, ...]
    elapsed_s: float

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        fits: dict[str, Any] = {}
        for fit in self.fits:
            fits[str(fit.n_modes_asked)] = {
                **asdict(fit),
                "result": str(fit.result),
                "above_null": fit.above_null,
            }
        train, validation, test = SPLIT
        return {
            "kind": KIND,
            "dir": str(self.directory),
            "trajectory": str(self.trajectory),
            "figures": [str(figure) for figure in self.figures],
            "seed": self.seed,
            "epochs": self.epochs,
            "device": self.device,
            "images": {"train": train, "validation": validation, "test": test},
            "n_parameters": self.n_parameters,
            "n_snapshots": self.n_snapshots,
            "n_samples": self.n_samples,
            "trajectory_bytes": self.trajectory_bytes,
            "training": asdict(self.training),
            "fit": fits,
            "elapsed_s": self.elapsed_s,
        }

    def table(self) -> str:
        """The report as text of at most 110 columns."""
        head = [
            ["", "test accuracy", "", "", "weight", "|corr|", "random walks", "stored", "pass"],
            ["method", "last", f"last {LATE}", "selected", "MSE", "mean", "5-95 %", "bytes", "GB/s"],
        ]
        rows = [
            ["training", *_accuracies(self.training), "", "", "", _megabytes(self.trajectory_bytes), ""],
            *(
                [
                    f"CMD, M = {fit.n_modes_asked}",
                    *_accuracies(fit.score),
                    f"{fit.weight_mse:.2e}",
                    f"{fit.mean_abs_correlation:.3f}",
                    f"{fit.null.low:.3f}-{fit.null.high:.3f}",
                    _megabytes(fit.result_bytes),
                    f"{fit.bytes_per_s / 1e9:.2f}",
                ]
                for fit in self.fits
            ),
        ]
        train, validation, test = SPLIT
        typical = max(min(self.training.late_test, 1 - 1 / test), 1 / test)
        error = (typical * (1 - typical) / test) ** 0.5
        below = [str(fit.n_modes_asked) for fit in self.fits if not fit.above_null]
        return "\n".join(
            [
                f"data      UCI handwritten digits, {train} to train, {validation} to select, {test} to test",
                f"model     small CNN, {self.n_parameters} parameters x {self.n_snapshots} snapshots, "
                f"{self.epochs} epochs of Adam, seed {self.seed}, {self.device}",
                "",
                *_aligned(head, rows),
                "",
                "selected  the epoch (in brackets) of best validation accuracy; test images select nothing",
                f"noise     one test image is {100 / test:.1f} points, the standard error of an accuracy "
                f"about {100 * error:.1f}",
                *(
                    [f"null      |corr| is not above that of random walks: M = {', '.join(below)}"]
                    if below
                    else []
                ),
                f"wrote     {self.trajectory}, {', '.join(fit.result.name for fit in self.fits)}",
                f"figures   {', '.join(str(figure) for figure in self.figures)}",
                f"time      {self.elapsed_s:.1f} s",
            ]
        )


def run_demo(
    directory: Path | str,
    *,
    seed: int = 0,
    epochs: int = 60,
    device: str = "cpu",
    progress: Progress | None = None,
) -> DemoReport:
    """Train, record, decompose with M = 1, 2, 5, 10 modes, rebuild every snapshot, evaluate, draw.

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
    _claim(directory)

    run = directory / RUN
    images = split_digits(load_digits(), seed, where)
    model = initial_model(seed, where)
    _train(model, images, run, seed=seed, epochs=epochs, progress=tell)
    trajectory = Trajectory.open(run)
    steps = np.asarray(trajectory.steps)
    took: dict[str, float] = {}
    fitted: dict[str, CMD] = {}
    for n_modes in MODES:
        started = time.perf_counter()
        name = f"CMD, M = {n_modes}"
        fitted[name] = CMD(n_modes=n_modes, random_state=seed, device=device).fit(
            trajectory, out=directory / _result_name(n_modes), progress=tell
        )
        took[name] = time.perf_counter() - started
    comparison = compare(
        trajectory, {"training": "recorded", **fitted}, evaluation(images), model=model, progress=tell
    )
    curves = {label: _curve_of(comparison, label) for label in comparison.labels}
    fits = [
        _report_fit(
            cmd, n_modes, score_of(steps, curves[name]), directory / _result_name(n_modes), seed, took[name]
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
        elapsed_s=time.perf_counter() - began,
    )
    _write_marker(directory, report.to_json())
    return report


@dataclass(frozen=True)
class Task:
    """What a finished demo trained, to compare methods by; see ``cmdgpu.compare``."""

    place: Path
    """The trajectory, or a result of it."""
    model: nn.Module
    evaluate: Evaluation


SELECT: Final = ("validation_accuracy", "min:validation_loss")


def task_of(place: Path | str) -> Task:
    """The task of the demo in a folder, or of a trajectory or a result in it.

    Raises UsageError where no demo lies, or none was finished.
    """
    place = Path(place)
    directory = place if _is_demo(place) else place.parent
    if not _is_demo(directory):
        raise UsageError(
            "is nothing that `cmdgpu demo` made", file=place, hint="give its folder, or a store in it"
        )
    made = json.loads((directory / MARKER).read_text(encoding="utf-8"))
    if "seed" not in made:
        raise UsageError("this demo was not finished", file=directory, hint="run `cmdgpu demo` again")
    device = resolve_device(made["device"])
    images = split_digits(load_digits(), made["seed"], device)
    return Task(
        directory / RUN if place == directory else place,
        initial_model(made["seed"], device),
        evaluation(images),
    )


# --- the directory ---------------------------------------------------------------------------------


def _claim(directory: Path) -> None:
    """Make the directory ours, or refuse before anything in it is touched."""
    if directory.exists() and not directory.is_dir():
        raise StoreExists("is not a directory", file=directory, hint="choose another path")
    if directory.is_dir() and any(directory.iterdir()):
        if not _is_demo(directory):
            found = "already holds a demo" if (directory / RUN).exists() else "holds files that no demo wrote"
            raise StoreExists(found, file=directory, hint="choose another directory or remove it")
        # The marker goes last and is at once written anew: a demo killed here can still be repeated.
        for path in _our_files(directory):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    durable.make_directory(directory)
    _write_marker(directory, {"kind": KIND})


def _is_demo(directory: Path) -> bool:
    try:
        marker: object = json.loads((directory / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(marker, dict) and cast(dict[str, object], marker).get("kind") == KIND


def _our_files(directory: Path) -> list[Path]:
    """What a demo leaves behind, finished or killed, apart from the marker."""
    names = [RUN, *(_result_name(n_modes) for n_modes in MODES), ACCURACY, PROFILES, CORRELATION]
    found = [directory / name for name in names if os.path.lexists(directory / name)]
    for name in [*names, MARKER]:
        found.extend(directory.glob(f"{name}.*{durable.PARTIAL}"))
    return found


def _result_name(n_modes: int) -> str:
    return f"modes-{n_modes}.cmd.zarr"


def _write_marker(directory: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    durable.write_file(directory, MARKER, [text.encode()])


# --- the same numbers every time -------------------------------------------------------------------


@contextmanager
def _reproducible() -> Generator[None]:
    """One thread on the CPU and deterministic cuDNN, given back at the end.

    The order in which oneDNN sums a convolution depends on the number of threads; at this size one
    thread costs no time.
    """
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _announced(progress: Progress, what: str, total_bytes: int) -> Generator[None]:
    progress.begin(what, total_bytes)
    try:
        yield
    finally:
        progress.end()


# --- training --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """Images (n, 1, 8, 8) float32 in 0..1 and labels (n,) int64 of the three splits."""

    train: Tensor
    train_labels: Tensor
    held_out: Tensor
    """Validation images first, then the test images: one forward pass judges both."""
    held_out_labels: Tensor


def split_digits(digits: Digits, seed: int, device: torch.device) -> Images:
    """Shuffle by the seed, then cut by ``SPLIT``; ink 0..16 becomes 0..1."""
    order = np.random.default_rng(seed).permutation(len(digits.labels))
    x = torch.from_numpy(digits.images[order].astype(np.float32) / 16)[:, None].to(device)
    y = torch.from_numpy(digits.labels[order].astype(np.int64)).to(device)
    n = SPLIT[0]
    return Images(train=x[:n], train_labels=y[:n], held_out=x[n:], held_out_labels=y[n:])


def initial_model(seed: int, device: torch.device) -> nn.Sequential:
    """The classifier with weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        # Of the default generator alone: torch.manual_seed would reseed the caller's CUDA devices too.
        torch.default_generator.manual_seed(seed)
        return digit_classifier().to(device)


def shifted(images: Tensor, rng: torch.Generator) -> Tensor:
    """Each image moved by -1, 0 or 1 pixel in both directions, empty pixels coming in."""
    padded = functional.pad(images[:, 0], (1, 1, 1, 1))
    corner = torch.randint(0, 3, (2, len(images), 1), generator=rng).to(images.device)
    pixel = torch.arange(images.shape[-1], device=images.device)
    y, x = corner[0] + pixel, corner[1] + pixel
    which = torch.arange(len(images), device=images.device)
    return padded[which[:, None, None], y[:, :, None], x[:, None, :]][:, None]


@_reproducible()
def _train(
    model: nn.Module, images: Images, run: Path, *, seed: int, epochs: int, progress: Progress
) -> None:
    """Adam on shuffled, shifted mini-batches; the initial state and every epoch are recorded."""
    rng = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    snapshot_bytes = sum(4 * p.numel() for p in model.parameters())
    with (
        _announced(progress, "training", (epochs + 1) * snapshot_bytes),
        Recorder(run, every=1, dtype="float32", unit="epoch") as recorder,
    ):
        for epoch in range(epochs + 1):
            if epoch > 0:
                order = torch.randperm(len(images.train), generator=rng).to(images.train.device)
                for batch in torch.split(order, BATCH):
                    optimizer.zero_grad()
                    logits = model(shifted(images.train[batch], rng))
                    functional.cross_entropy(logits, images.train_labels[batch]).backward()
                    optimizer.step()
            recorder.record(
                model,
                epoch,
                train_loss=_train_loss(model, images),
                validation_accuracy=judge(model, images).validation,
            )
            progress.advance(snapshot_bytes)


@torch.no_grad()
def _train_loss(model: nn.Module, images: Images) -> float:
    return float(functional.cross_entropy(model(images.train), images.train_labels))


# --- evaluation ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """One snapshot on the held-out images."""

    validation: float
    validation_loss: float
    test: float


@torch.no_grad()
def judge(model: nn.Module, images: Images) -> Verdict:
    """Accuracies on the held-out images, and the validation loss, in one forward pass."""
    logits: Tensor = model(images.held_out)
    right = logits.argmax(dim=1) == images.held_out_labels
    n = SPLIT[1]
    return Verdict(
        validation=int(right[:n].sum()) / n,
        validation_loss=float(functional.cross_entropy(logits[:n], images.held_out_labels[:n])),
        test=int(right[n:].sum()) / len(right[n:]),
    )


@dataclass(frozen=True)
class Curve:
    """Verdicts on all T snapshots."""

    validation_t: F64
    validation_loss_t: F64
    test_t: F64


def evaluation(images: Images) -> Evaluation:
    """``judge`` with names for its numbers, the same on any number of threads."""

    @_reproducible()
    def evaluate(model: nn.Module) -> dict[str, float]:
        verdict = judge(model, images)
        return {
            "test_accuracy": verdict.test,
            "validation_accuracy": verdict.validation,
            "validation_loss": verdict.validation_loss,
        }

    return evaluate


def _curve_of(comparison: Comparison, label: str) -> Curve:
    return Curve(
        validation_t=comparison.curve(label, "validation_accuracy"),
        validation_loss_t=comparison.curve(label, "validation_loss"),
        test_t=comparison.curve(label, "test_accuracy"),
    )


def score_of(steps: I64, curve: Curve) -> Score:
    """What is reported of a curve; ``Score`` says how the selected snapshot is chosen."""
    best = int(np.lexsort((steps, curve.validation_loss_t, -curve.validation_t))[0])
    return Score(
        last_validation=float(curve.validation_t[-1]),
        last_test=float(curve.test_t[-1]),
        late_test=float(curve.test_t[-LATE:].mean()),
        selected_epoch=int(steps[best]),
        selected_validation=float(curve.validation_t[best]),
        selected_test=float(curve.test_t[best]),
    )


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


# --- the table -------------------------------------------------------------------------------------


def _accuracies(score: Score) -> tuple[str, str, str]:
    return (
        f"{100 * score.last_test:.1f} %",
        f"{100 * score.late_test:.1f} %",
        f"{100 * score.selected_test:.1f} % ({score.selected_epoch})",
    )


def _megabytes(n: int) -> str:
    return f"{n / 1e6:.1f} MB"


def _aligned(head: list[list[str]], rows: list[list[str]]) -> list[str]:
    """Columns two spaces apart: the first to the left, the others to the right, a rule under the head."""
    widths = [max(len(row[i]) for row in [*head, *rows]) for i in range(len(head[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [*head, *rows]
    ]
    rule = "-" * max(map(len, lines))
    return [line.rstrip() for line in [*lines[: len(head)], rule, *lines[len(head) :]]]
