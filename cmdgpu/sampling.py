"""Which rows are clustered, from the parameter map alone.

Every draw is without replacement. A trajectory has fixed *candidates*, drawn once with seed 0; a recorder
keeps their values in the ``sketch``, so that sampling a terabyte store reads megabytes. A sample of up to
half as many rows is drawn from them by the user's seed: a store, its sketch and an array in memory give the
same sample. The random numbers are taken raw from PCG64, whose stream is fixed, and not from a library's
sampling routine, whose stream may change with its version.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias

import numpy as np

from cmdgpu.errors import UsageError
from cmdgpu.memory import show_bytes
from cmdgpu.notation import I64
from cmdgpu.registry import Registry
from cmdgpu.store.parameter_map import ParameterMap
from cmdgpu.store.view import StoreView

N_CANDIDATES: Final = 8192
"""S: rows whose values a recorder keeps in the sketch."""
_CANDIDATE_SEED: Final = 0
_WORTH_A_WORD: Final = 64 << 20
"""Bytes that are read before anybody wonders what takes so long."""


@dataclass(frozen=True)
class Sample:
    rows: I64
    """(min(K, live),) distinct row numbers, ascending."""
    rule: str
    """How they were drawn, in words."""
    from_candidates: bool
    """True when the sketch holds every one of them."""


class _Stream:
    """Uniform integers from the raw PCG64 stream; the bias of the multiplication is below n / 2^64."""

    def __init__(self, seed: int) -> None:
        self._bits = np.random.PCG64(seed)

    def subset(self, n: int, k: int) -> I64:
        """k distinct integers below n, ascending, all subsets equally likely (Floyd's algorithm)."""
        raws: list[int] = np.asarray(self._bits.random_raw(k)).tolist() if k else []
        chosen: set[int] = set()
        for top, raw in zip(range(n - k, n), raws, strict=True):
            drawn = (raw * (top + 1)) >> 64
            chosen.add(top if drawn in chosen else drawn)
        return np.array(sorted(chosen), dtype=np.int64)


class _Live:
    """Live rows numbered 0, 1, ... tensor by tensor: parameters only, no buffers, holes or aliases."""

    def __init__(self, parameter_map: ParameterMap) -> None:
        tensors = [t for t in parameter_map if t.kind == "parameter" and t.n_rows]
        pieces = [piece for tensor in tensors for piece in tensor.pieces]
        self._piece_rows = np.array([piece.row for piece in pieces], dtype=np.int64)
        self._piece_starts = np.cumsum([0] + [piece.n_rows for piece in pieces], dtype=np.int64)
        self.bounds = np.cumsum([0] + [tensor.n_rows for tensor in tensors], dtype=np.int64)
        self.n_tensors = len(tensors)
        self.n = int(self.bounds[-1])

    def rows(self, live: I64) -> I64:
        piece = np.searchsorted(self._piece_starts, live, side="right") - 1
        return np.sort(self._piece_rows[piece] + (live - self._piece_starts[piece]))


class _Pool(Protocol):
    """What a rule draws from; both answers are live numbers, ascending."""

    def uniform(self, stream: _Stream, k: int, taken: I64) -> I64: ...

    def of_tensor(self, stream: _Stream, tensor: int, k: int) -> I64: ...


class _Everything:
    def __init__(self, live: _Live) -> None:
        self._live = live

    def uniform(self, stream: _Stream, k: int, taken: I64) -> I64:
        ranks = stream.subset(self._live.n - len(taken), k)
        # rank r among the rows not taken is r plus the number of taken rows before it
        return ranks + np.searchsorted(taken - np.arange(len(taken)), ranks, side="right")

    def of_tensor(self, stream: _Stream, tensor: int, k: int) -> I64:
        start, stop = self._live.bounds[tensor : tensor + 2].tolist()
        return start + stream.subset(stop - start, min(k, stop - start))


class _Candidates:
    def __init__(self, live: _Live, uniform: I64, others: I64) -> None:
        self._bounds = live.bounds
        self.uniform_ones = uniform
        self.all = np.union1d(uniform, others)

    def uniform(self, stream: _Stream, k: int, taken: I64) -> I64:
        eligible = np.setdiff1d(self.uniform_ones, taken, assume_unique=True)
        return eligible[stream.subset(len(eligible), k)]

    def of_tensor(self, stream: _Stream, tensor: int, k: int) -> I64:
        first, last = np.searchsorted(self.all, self._bounds[tensor : tensor + 2])
        eligible = self.all[first:last]
        return eligible[stream.subset(len(eligible), min(k, len(eligible)))]


def _draw_candidates(live: _Live) -> _Candidates:
    if live.n <= N_CANDIDATES:
        everything = np.arange(live.n, dtype=np.int64)
        return _Candidates(live, everything, everything[:0])
    stream, pool = _Stream(_CANDIDATE_SEED), _Everything(live)
    uniform = pool.uniform(stream, N_CANDIDATES // 2, np.empty(0, np.int64))
    shares = _shares(live, stream, uniform, N_CANDIDATES // (2 * live.n_tensors))
    taken = np.sort(np.concatenate([uniform, *shares]))
    rest = pool.uniform(stream, N_CANDIDATES - len(taken), taken)
    return _Candidates(live, uniform, np.concatenate([*shares, rest]))


def _shares(live: _Live, stream: _Stream, taken: I64, k: int) -> list[I64]:
    """k more rows of every tensor, or what it has left; nothing is drawn for k = 0."""
    if not k:
        return []
    edges = np.searchsorted(taken, live.bounds).tolist()
    bounds: list[int] = live.bounds.tolist()
    shares: list[I64] = []
    for (start, stop), (first, last) in zip(
        itertools.pairwise(bounds), itertools.pairwise(edges), strict=True
    ):
        free = stop - start - (last - first)
        ranks = stream.subset(free, min(k, free))
        before = taken[first:last] - start
        shares.append(start + ranks + np.searchsorted(before - np.arange(len(before)), ranks, side="right"))
    return shares


def candidate_rows(parameter_map: ParameterMap) -> I64:
    """(S,) rows every ordinary sample is drawn from, ascending; all live rows when there are fewer.

    Half of them uniform over the live rows, then an equal share per tensor, then uniform up to S.
    """
    live = _Live(parameter_map)
    return live.rows(_draw_candidates(live).all)


def uniform_candidates(parameter_map: ParameterMap) -> I64:
    """(S / 2,) those of the candidates that were drawn uniformly over the live rows, ascending."""
    live = _Live(parameter_map)
    return live.rows(_draw_candidates(live).uniform_ones)


# ---- the two rules ------------------------------------------------------------------------------------

_Rule: TypeAlias = Callable[[_Live, _Pool, int, _Stream], tuple[I64, str]]
SAMPLINGS: Final[Registry[_Rule]] = Registry("sampling")


def _uniform(live: _Live, pool: _Pool, k: int, stream: _Stream) -> tuple[I64, str]:
    del live
    return pool.uniform(stream, k, np.empty(0, np.int64)), "uniform"


def _layer_balanced(live: _Live, pool: _Pool, k: int, stream: _Stream) -> tuple[I64, str]:
    """Half of the sample spread evenly over the L tensors, the rest uniform (paper, section 8.2)."""
    if k <= 2 * live.n_tensors:
        drawn, _ = _uniform(live, pool, k, stream)
        return drawn, f"uniform, for {k} rows are no more than two per tensor ({live.n_tensors} tensors)"
    share = k // (2 * live.n_tensors)
    per_tensor = [pool.of_tensor(stream, tensor, share) for tensor in range(live.n_tensors)]
    balanced = np.sort(np.concatenate(per_tensor))
    rest = pool.uniform(stream, k - len(balanced), balanced)
    return np.union1d(balanced, rest), f"layer-balanced, {share} per tensor of {live.n_tensors}"


SAMPLINGS.add("uniform", _uniform)
SAMPLINGS.add("layer-balanced", _layer_balanced)


def check_sampling(n_samples: int, sampling: str, seed: int) -> None:
    """Raises UsageError for K < 1, an unknown rule, a negative seed."""
    if n_samples < 1:
        raise UsageError(f"a sample of {n_samples} rows", hint="n_samples is at least 1; the paper uses 1000")
    if seed < 0:
        raise UsageError(f"a random_state of {seed}", hint="it is a non-negative integer")
    _ = SAMPLINGS[sampling]


def draw_sample(parameter_map: ParameterMap, n_samples: int, sampling: str, seed: int) -> Sample:
    """K distinct rows; all live ones when K is larger.

    Up to K = S / 2 (or whenever the candidates are all there is) the sample comes from the candidates;
    a larger K draws from all live rows. Raises UsageError for K < 1, an unknown rule, a negative seed.
    """
    check_sampling(n_samples, sampling, seed)
    rule = SAMPLINGS[sampling]
    live = _Live(parameter_map)
    k = min(n_samples, live.n)
    if k == live.n:
        return Sample(live.rows(np.arange(live.n)), "every row", live.n <= N_CANDIDATES)
    from_candidates = live.n <= N_CANDIDATES or k <= N_CANDIDATES // 2
    pool: _Pool = _draw_candidates(live) if from_candidates else _Everything(live)
    drawn, words = rule(live, pool, k, _Stream(seed))
    return Sample(live.rows(drawn), words, from_candidates)


def reading(rows: I64, view: StoreView, n_snapshots: int) -> tuple[int, int]:
    """Chunks of a store that are read for rows outside its sketch, and their bytes: each chunk with one of
    these rows in it, at every snapshot.
    """
    n_chunks = len(np.unique(rows // view.rows)) * n_snapshots
    return n_chunks, n_chunks * view.rows * view.storage.numpy.itemsize


def announcement(sample: Sample, view: StoreView, n_snapshots: int) -> str | None:
    """What reading a sample costs where the sketch does not hold it, in words; None where it is little."""
    k, sketch = len(sample.rows), view.sketch_rows
    if sketch is not None and bool(np.isin(sample.rows, sketch).all()):
        return None
    n_chunks, n_bytes = reading(sample.rows, view, n_snapshots)
    if n_bytes < _WORTH_A_WORD:
        return None
    if sketch is None:
        why = f"a sample of {k} rows of a store without a sketch"
    elif sample.from_candidates:
        why = f"a sample of {k} rows that the sketch does not hold"
    else:
        why = f"a sample of {k} rows is beyond the {N_CANDIDATES // 2} that the sketch serves"
    return f"{why}: {show_bytes(n_bytes)} in {n_chunks} chunks are read for it"
