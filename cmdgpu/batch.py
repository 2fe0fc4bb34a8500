"""Many fits: stores x modules x modes x seeds, every block of a store read once for all of its fits."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cmdgpu.decomposition import CMD
from cmdgpu.errors import CmdgpuError, CmdgpuWarning, MemoryLimitError, UsageError, printable
from cmdgpu.profiles import Objective, References
from cmdgpu.progress import Progress
from cmdgpu.store import format as fmt
from cmdgpu.store.places import Named, Place, place_of
from cmdgpu.trajectory import Trajectory


@dataclass
class GridFit:
    """One fit of a grid: what was asked, and what came of it."""

    store: Place
    out: Place
    module: str | None
    """The network it is of, where there is one fit for each."""
    seed: int
    cmd: CMD
    """Fitted, unless ``error`` says why not."""
    error: CmdgpuError | None = None


@dataclass(frozen=True)
class Selection:
    """The snapshots and tensors that a grid is fitted on; see ``Trajectory.sel``."""

    start: int | None = None
    stop: int | None = None
    stride: int = 1
    steps: Sequence[int] | None = None
    params: Sequence[str] | None = None

    def of(self, traj: Trajectory) -> Trajectory:
        return traj.sel(self.start, self.stop, self.stride, self.steps, params=self.params)


def fit_grid(
    stores: Sequence[Named],
    out: Named,
    *,
    n_modes: Sequence[int] = (10,),
    threshold: float | None = None,
    seeds: Sequence[int] = (0,),
    per_module: bool = False,
    selection: Selection | None = None,
    n_samples: int = 1000,
    sampling: str = "layer-balanced",
    affinity: str = "abs-corr",
    references: References = "row",
    refine: int = 0,
    objective: Objective = "energy",
    device: str = "auto",
    executor: Any = None,
    buffers: Literal["fit", "skip"] = "fit",
    memory_limit: int | str | None = None,
    resume: bool = True,
    progress: Progress | None = None,
) -> list[GridFit]:
    """Fit every store with every number of modes and every seed; the results go into the folder ``out``.

    The fits of one store share a pass: its bytes are read once, and the bits of every result are those of a
    fit of its own. Where the memory limit does not allow that, they share as few passes as it takes, and a
    warning says so. Given again, a grid goes on where it stopped, and a larger one adds what is new.

    threshold   cut the clustering there instead of at ``n_modes``
    per_module  one fit for each network: for each first component of the tensors' names
    selection   snapshots and tensors, of all stores alike
    refine      rounds that every fit makes by itself, each a pass, before the one that they share

    The result of ``runs/a.zarr`` at M = 5 with seed 0 is ``out/a.m5.s0.cmd.zarr`` (``a.generator.m5...`` for
    a module, ``a.t0.1...`` for a threshold). Raises UsageError, before anything is read, for a grid that
    names a result twice and for a store that is none; one that fails later leaves its error in the
    ``GridFit`` of every fit that shared its pass, and the other stores are fitted.
    """
    place = place_of(out)
    selection = selection or Selection()
    rules = [("m", m) for m in dict.fromkeys(n_modes)] if threshold is None else [("t", threshold)]
    grid: list[list[tuple[GridFit, Trajectory]]] = []
    taken: dict[str, Place] = {}
    for store, name in zip(map(place_of, stores), _names(stores), strict=True):
        traj = selection.of(Trajectory.open(store))
        modules = traj.parameters.without("buffer").modules() if per_module else [None]
        fits: list[tuple[GridFit, Trajectory]] = []
        for module, (kind, rule), seed in itertools.product(modules, rules, dict.fromkeys(seeds)):
            parts = [name, *([_file_name(module)] if module is not None else []), f"{kind}{rule}", f"s{seed}"]
            file = ".".join([*parts, "cmd.zarr"])
            if file in taken:
                raise UsageError(
                    f"{taken[file]} and {store} would both be fitted to {printable(file)}",
                    hint="give them other names, or other folders for their results",
                )
            taken[file] = store
            cmd = CMD(
                n_modes=int(rule) if threshold is None else 10,
                threshold=threshold,
                n_samples=n_samples,
                sampling=sampling,
                affinity=affinity,
                random_state=seed,
                device=device,
                references=references,
                refine=refine,
                objective=objective,
            )
            of_module = traj if module is None else traj.sel(params=[_pattern_of(module)])
            fits.append((GridFit(store, place / file, module, seed, cmd), of_module))
        if not fits:
            raise UsageError(
                "no fit of it is asked for",
                file=store,
                hint="give a number of modes, a seed, and tensors that are parameters",
            )
        grid.append(fits)
    options: dict[str, Any] = {
        "buffers": buffers, "executor": executor, "memory_limit": memory_limit,
        "resume": resume, "progress": progress,
    }  # fmt: skip
    for fits in grid:
        try:
            _together(fits, options)
        except CmdgpuError as error:
            for fit, _ in fits:
                fit.error = error if not fit.cmd.is_fitted else None
    return [fit for fits in grid for fit, _ in fits]


def _together(fits: Sequence[tuple[GridFit, Trajectory]], options: dict[str, Any]) -> None:
    """In one pass; in two, each of half of them, where the memory limit refuses one."""
    try:
        CMD.fit_together(
            [fit.cmd for fit, _ in fits], [traj for _, traj in fits], [fit.out for fit, _ in fits], **options
        )
    except MemoryLimitError as error:
        if len(fits) == 1:
            raise
        half = -(-len(fits) // 2)
        warnings.warn(
            f"{error.message} for {len(fits)} fits of {fits[0][0].store} at once: "
            f"it is read again for every {half}",
            CmdgpuWarning,
            stacklevel=3,
        )
        for part in (fits[:half], fits[half:]):
            _together(part, options)


def _names(stores: Sequence[Named]) -> list[str]:
    """What the results of a store begin with: its name, behind its folder's where two have the same."""
    places = [place_of(store).absolute() for store in stores]  # of "." too
    names = [place.name.removesuffix(".zarr") for place in places]
    return [
        name if names.count(name) == 1 else f"{place.parent.name}-{name}"
        for name, place in zip(names, places, strict=True)
    ]


def _file_name(module: str) -> str:
    """A component of a tensor's name is data from a file: one that cannot stand for itself has its digest."""
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", module)[:80]
    return plain if plain == module else f"{plain}-{fmt.sha256(module.encode())[:8]}"


def _pattern_of(module: str) -> str:
    return rf"^{re.escape(module)}(\.|$)"
