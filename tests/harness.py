"""What the tests of a fit share: planted trajectories, the definition in float64, a fit as bits, commands.

A command runs in this process (``run_cli``: the real entry point, its streams caught) or in a child
(``start_child``, ``run_child``), where processes, signals and imports are what is tested.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from cmdgpu import ops
from cmdgpu.cli import main
from cmdgpu.decomposition import CMD
from cmdgpu.notation import CONSTANT, F32, F64, I64, NON_FINITE, AnyArray, BoolArray
from cmdgpu.sampling import candidate_rows
from cmdgpu.store import format as fmt
from cmdgpu.store import view
from cmdgpu.store.journal import Journal
from cmdgpu.store.parameter_map import ParameterMap, whole
from cmdgpu.trajectory import Trajectory

# ---- trajectories -------------------------------------------------------------------------------------


def walks(n_rows: int, n_snapshots: int, seed: int = 0) -> F32:
    """(N, T) independent random walks."""
    steps = np.random.default_rng(seed).standard_normal((n_rows, n_snapshots))
    return np.cumsum(steps, axis=1).astype(np.float32)


def planted(
    n_rows: int, n_snapshots: int, n_modes: int = 3, *, noise: float = 0.05, level: float = 1.0, seed: int = 0
) -> F32:
    """(N, T) rows a r_m + b + noise; the mean of a row is about ``level`` times its movement."""
    rng = np.random.default_rng(seed)
    r_mt = np.cumsum(rng.standard_normal((n_modes, n_snapshots)), axis=1)
    if n_snapshots > 1:
        r_mt = (r_mt - r_mt.mean(axis=1, keepdims=True)) / r_mt.std(axis=1, keepdims=True)
    a = rng.choice([-1.0, 1.0], n_rows) * rng.uniform(0.5, 2.0, n_rows)
    curves = a[:, None] * r_mt[rng.integers(n_modes, size=n_rows)]
    around = np.abs(a)[:, None] * (level + noise * rng.standard_normal((n_rows, n_snapshots)))
    return (curves + around).astype(np.float32)


def one_tensor(n_rows: int, dtype: str = "float32") -> ParameterMap:
    return ParameterMap(whole([("W", "parameter", dtype, (n_rows,))]))


def write_store(
    path: Path,
    W_nt: AnyArray,
    *,
    rows: int = 256,
    dtype: str = "float32",
    layout: ParameterMap | None = None,
    steps: Sequence[int] | None = None,
    sketch: bool = True,
    compressed: bool = False,
) -> Trajectory:
    """A store of these values, column by column; any layout of as many rows."""
    n_rows, n_snapshots = W_nt.shape
    layout = layout or one_tensor(n_rows)
    journal = Journal.create(
        path,
        layout,
        dtype=dtype,
        rows=rows,
        unit="step",
        sketch_rows=candidate_rows(layout) if sketch else None,
        compressed=compressed,
    )
    storage = fmt.storage(dtype)
    column = np.full(fmt.round_up(n_rows, rows), storage.fill, dtype=storage.numpy)
    try:
        for t, step in enumerate(range(n_snapshots) if steps is None else steps):
            column[:n_rows] = fmt.narrow(W_nt[:, t], dtype)
            kept = journal.view.sketch_rows
            journal.append(column, step, {}, None if kept is None else column[kept])
    finally:
        journal.close()
    return Trajectory.open(path)


# ---- the definition -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Definition:
    """Of every row, in float64: best reference, least-squares line on it, and by how much it is the best."""

    mode: I64
    a: F64
    b: F64
    correlation: F64
    margin: F64
    mean: F64
    norm: F64
    """||w - mean(w)||"""


def define(W_nt: AnyArray, R_mt: AnyArray) -> Definition:
    """argmax |corr| over the references, then numpy.linalg.lstsq on [r, 1]."""
    R = R_mt.astype(np.float64)
    finite = cast(BoolArray, np.isfinite(W_nt).all(axis=1))
    W = np.where(finite[:, None], W_nt.astype(np.float64), 0.0)
    mean = W.mean(axis=1)
    centred = W - mean[:, None]
    norm = np.where(W.max(axis=1) > W.min(axis=1), np.linalg.norm(centred, axis=1), 0.0)
    moving = cast(BoolArray, (W.max(axis=1) > W.min(axis=1)) & finite)
    mode = np.where(finite, CONSTANT, NON_FINITE).astype(np.int64)
    a, b, correlation, margin = np.zeros(len(W)), np.where(finite, W[:, 0], np.nan), *np.zeros((2, len(W)))
    if not len(R):
        mode[finite] = CONSTANT
        return Definition(mode, a, np.where(finite, mean, np.nan), correlation, margin, mean, norm)
    z = R - R.mean(axis=1, keepdims=True)
    corr = centred @ (z / np.linalg.norm(z, axis=1, keepdims=True)).T
    corr /= np.where(moving, norm, 1.0)[:, None]
    best = np.argmax(np.abs(corr), axis=1)
    ordered = np.sort(np.abs(corr), axis=1)
    for m in range(len(R)):
        mine = moving & (best == m)
        design = np.stack([R[m], np.ones(R.shape[1])], axis=1)
        a[mine], b[mine] = np.linalg.lstsq(design, W[mine].T, rcond=None)[0]
        mode[mine], correlation[mine] = m, corr[mine, m]
    margin[moving] = ordered[moving, -1] - (ordered[moving, -2] if len(R) > 1 else 0.0)
    return Definition(mode, a, b, correlation, margin, mean, norm)


def check_equals_definition(
    cmd: CMD, W_nt: AnyArray, *, tolerance: float = 1e-5, least_sure: float = 0.99
) -> None:
    """Every row of the fit, by the rules the design sets.

    Labels wherever the best reference leads by more than the tolerance; |d corr| and |d a| ||r|| / ||w||
    within it; b judged for the a returned, in units of float32 rounding of what it is made of.
    """
    R = cmd.references_.astype(np.float64)
    assert np.array_equal(cmd.references_, W_nt[cmd.reference_rows_].astype(np.float32))
    is_ = define(W_nt, R)
    mode, a, b, corr = (np.asarray(x) for x in (cmd.labels_, cmd.a_, cmd.b_, cmd.correlation_))
    assert (mode.dtype, a.dtype, b.dtype, corr.dtype) == (np.int16, np.float32, np.float32, np.float32)
    idle = is_.mode < 0
    assert np.array_equal(mode[idle], is_.mode[idle])
    assert not a[idle].any() and not corr[idle].any()
    still = idle & ~(is_.norm > 0)
    assert np.array_equal(b[still], is_.b[still].astype(np.float32), equal_nan=True)
    sure = idle | (is_.margin > tolerance) | (len(R) == 1)
    assert np.array_equal(mode[sure], is_.mode[sure])
    assert np.mean(sure) >= least_sure, "the case does not test labels"
    # without references a moving row is its mean
    lost = idle & (is_.norm > 0) & np.isfinite(is_.b)
    rounding = 8 * 2.0**-23 * (np.abs(is_.mean) + is_.norm / np.sqrt(R.shape[1]))
    assert np.all(np.abs(b - is_.b)[lost] <= rounding[lost])
    # the same reference must be compared; a near-tie may have gone either way
    same = ~idle & (mode == is_.mode)
    if not len(R):
        return
    r = R[mode[same]]
    r_mean, r_norm = r.mean(axis=1), np.linalg.norm(r - r.mean(axis=1, keepdims=True), axis=1)
    assert np.abs(corr[same] - is_.correlation[same]).max(initial=0.0) <= tolerance
    off = np.abs(a[same] - is_.a[same]) * r_norm / is_.norm[same]
    assert off.max(initial=0.0) <= tolerance
    a64, b64 = a[same].astype(np.float64), b[same].astype(np.float64)
    rms = is_.norm[same] / np.sqrt(R.shape[1])
    scale = np.abs(is_.mean[same]) + np.abs(a64 * r_mean) + rms
    assert np.all(np.abs(b64 + a64 * r_mean - is_.mean[same]) <= 8 * 2.0**-23 * scale)
    own = sure[cmd.reference_rows_]
    at = cmd.reference_rows_[own]
    assert np.array_equal(mode[at], np.flatnonzero(own))
    assert np.abs(a[at] - 1.0).max(initial=0.0) <= tolerance
    assert np.abs(corr[at] - 1.0).max(initial=0.0) <= tolerance
    assert np.all(np.abs(b[at]) <= tolerance * np.abs(R[own]).max(axis=1, initial=0.0))


# ---- a fit as bits ------------------------------------------------------------------------------------


def row_bits(cmd: CMD) -> str:
    """One digest of references, mode, a, b, correlation."""
    digest = hashlib.sha256()
    for array in (cmd.references_, cmd.reference_rows_, cmd.labels_, cmd.a_, cmd.b_, cmd.correlation_):
        digest.update(np.ascontiguousarray(np.asarray(array)).tobytes())
    return digest.hexdigest()


def fit_bits(cmd: CMD) -> str:
    """One digest of everything a fit found, its statistics included."""
    totals = cmd.result.totals
    digest = hashlib.sha256(row_bits(cmd).encode())
    digest.update(totals.tensors.tobytes())
    digest.update(totals.histogram.tobytes())
    digest.update(repr(cmd.result.metrics).encode())
    return digest.hexdigest()


# ---- commands -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one strict JSON object that is all of stdout."""
        assert self.out.endswith("}\n") and self.out.count("\n") == 1, self.out

        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is not strict JSON")

        found = json.loads(self.out, parse_constant=refuse)
        assert isinstance(found, dict)
        return cast(dict[str, Any], found)


def run_cli(*arguments: str | Path) -> Ended:
    """``cmdgpu`` in this process."""
    out, err = io.StringIO(), io.StringIO()
    argv, handler = sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = ["cmdgpu", *map(str, arguments)]
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as ended:
        code = ended.code
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, handler)
    assert isinstance(code, int)
    return Ended(code, out.getvalue(), err.getvalue())


def start_child(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    """``python <arguments>``; its streams are pipes where ``options`` do not say otherwise.

    It hears interrupts even where these tests run in the background of a shell, which ignores them for all.
    """
    streams: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return subprocess.Popen([sys.executable, *map(str, arguments)], text=True, **streams)
    finally:
        signal.signal(signal.SIGINT, before)


def end_of(child: subprocess.Popen[str], timeout: float = 120) -> Ended:
    try:
        out, err = child.communicate(timeout=timeout)
    finally:
        child.kill()
    return Ended(child.returncode, out, err)


def run_child(*arguments: str | Path) -> Ended:
    """``python -m cmdgpu <arguments>`` in a process of its own."""
    return end_of(start_child("-m", "cmdgpu", *arguments))


class Ticks:
    """A Progress that keeps what it is told."""

    def __init__(self) -> None:
        self.total = self.done = self.advances = self.ends = 0
        self.what = ""

    def begin(self, what: str, total_bytes: int) -> None:
        self.what, self.total = what, total_bytes

    def advance(self, done_bytes: int) -> None:
        self.done += done_bytes
        self.advances += 1

    def end(self) -> None:
        self.ends += 1


class Stopped(Exception):
    """A fit was stopped by the one who watched it."""


class StopAfter(Ticks):
    """Ends the fit once more than ``most`` advances were told."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def advance(self, done_bytes: int) -> None:
        super().advance(done_bytes)
        if self.advances > self._most:
            raise Stopped


def chunks_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the chunks of weights that are read from here on, by whatever way a pass has."""
    read: list[str] = []
    inner_fit, inner_checked, inner_chunk = ops.fit_files, ops.files.read_checked, view.read_chunk

    def fit_files(dtype: str, references: Any, chunks: Any, *rest: Any, **asked: Any) -> Any:
        read.extend(chunks.names)
        return inner_fit(dtype, references, chunks, *rest, **asked)

    def read_checked(directory: str, names: Any, *rest: Any) -> Any:
        read.extend(names)
        return inner_checked(directory, names, *rest)

    def read_chunk(path: Path, *rest: Any, **how: Any) -> Any:
        if path.parent.name == "weights":
            read.append(path.name)
        return inner_chunk(path, *rest, **how)

    monkeypatch.setattr(ops, "fit_files", fit_files)
    monkeypatch.setattr(ops.files, "read_checked", read_checked)
    monkeypatch.setattr(view, "read_chunk", read_chunk)
    return read
