"""What the experiments share as commands: a flag per setting, a trajectory per seed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, cast

from benchmarks.experiments.analysis import Judging, kept, merged
from benchmarks.experiments.report import draw, write
from benchmarks.experiments.training import Task, train
from benchmarks.machine import RESULTS
from cmdgpu import Trajectory
from cmdgpu.comparison.methods import Fittable
from cmdgpu.errors import UsageError
from cmdgpu.store import durable

C = TypeVar("C")
JUDGED = "judged_every"
"""The setting that is about the analysis: epochs between the models that are judged. Every config has it."""


@dataclass(frozen=True)
class Asked(Generic[C]):
    """What a command was asked for."""

    name: str
    config: C
    seeds: range
    folder: Path
    """Of the trajectories."""
    only: Literal["train", "analyse"] | None
    out: Path
    """Of the JSON and the figures."""

    @property
    def settings(self) -> dict[str, Any]:
        return asdict(self.config)  # pyright: ignore[reportArgumentType]

    @property
    def command(self) -> str:
        """What to type to have the results again: of the settings, those that are not the usual ones."""
        usual = asdict(type(self.config)())  # pyright: ignore[reportArgumentType]
        seeds = f"--seeds {self.seeds.start}:{self.seeds.stop}"
        words = [f"python -m benchmarks.experiments.{self.name} {seeds} --in DIR"]
        for name, value in self.settings.items():
            if value != usual[name]:
                flag = name.replace("_", "-")
                words.append(
                    f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag} {value}"
                )
        return " ".join(words)

    def store(self, seed: int) -> Path:
        return self.folder / f"{self.name}-{seed}.zarr"

    def carry_out(
        self,
        task: Task,
        judging: Judging,
        methods: Callable[[int], dict[str, Fittable]],
        title: str,
        more: Callable[[Trajectory], dict[str, Any]] | None = None,
    ) -> None:
        """Train every seed to its last epoch; analyse them; write JSON and figures.

        What was done before is not done again: a run goes on where it stopped, and the numbers of a seed are
        kept beside it. ``methods`` are made for a number of snapshots; ``more`` adds to those numbers.
        Raises UsageError where a run was made with other settings; a longer run continues a shorter one.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.only != "analyse":
            for seed in self.seeds:
                self._require_same(seed)
                train(self.store(seed), task, seed)
        if self.only == "train":
            return
        found = merged([self._analysed(seed, judging, methods, more) for seed in self.seeds])
        asked = {"config": self.settings, "seeds": list(self.seeds), "score": judging.score}
        write(self.out, self.name, self.command, {**asked, **found})
        draw(self.out, self.name, found, judging.score, title)

    def _analysed(
        self,
        seed: int,
        judging: Judging,
        methods: Callable[[int], dict[str, Fittable]],
        more: Callable[[Trajectory], dict[str, Any]] | None,
    ) -> dict[str, Any]:
        print(f"{self.name}  analysing seed {seed}", flush=True)
        traj = Trajectory.open(self.store(seed))
        asked, steps = methods(len(traj.steps)), f"every={self.settings[JUDGED]}"
        settings = {**self.settings, "methods": list(asked), "last": int(traj.steps[-1])}
        beside = self.folder / f"{self.name}-{seed}.analysis.json"
        found = kept(beside, settings, lambda: judging.of(traj, asked, steps, quality=True))
        if more is not None:
            found |= kept(self.folder / f"{self.name}-{seed}.more.json", settings, lambda: more(traj))
        return found

    def _require_same(self, seed: int) -> None:
        settings = {k: v for k, v in self.settings.items() if k not in ("epochs", JUDGED)}
        beside = self.folder / f"{self.name}-{seed}.json"
        if not beside.exists():
            durable.write_file(self.folder, beside.name, [json.dumps(settings).encode()])
        elif (found := json.loads(beside.read_text())) != settings:
            raise UsageError(
                f"holds a run of {found}, asked for {settings}", file=beside, hint="choose another folder"
            )


def asked(name: str, doc: str | None, config: type[C], arguments: Sequence[str] | None) -> Asked[C]:
    """``--seeds 0:3 --in DIR [--only train|analyse]`` and a flag per field of ``config``, a dataclass."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0:3", help="the first, and the one after the last")
    parser.add_argument("--in", dest="folder", type=Path, required=True, help="folder of the trajectories")
    parser.add_argument("--only", choices=("train", "analyse"), help="half of it")
    parser.add_argument("--out", type=Path, default=RESULTS / "experiments", help="folder of the results")
    for field in fields(config):  # pyright: ignore[reportArgumentType]
        flag = f"--{field.name.replace('_', '-')}"
        default: Any = field.default
        if isinstance(default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default)
        else:
            kind = cast(type[Any], int if default is None else type(default))
            parser.add_argument(flag, type=kind, default=default)
    options = vars(parser.parse_args(arguments))
    first, _, stop = options["seeds"].partition(":")
    return Asked(
        name,
        config(**{field.name: options[field.name] for field in fields(config)}),  # pyright: ignore[reportArgumentType]
        range(int(first), int(stop or int(first) + 1)),
        options["folder"],
        options["only"],
        options["out"],
    )
