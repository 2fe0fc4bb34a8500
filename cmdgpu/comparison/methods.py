"""Methods by name: ``cmd:modes=10``, ``ema:decay=0.9``, ``dmd:rank=10,groups=layer``."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

from cmdgpu.baselines import DMD, EMA, LAWA, PCA, SWA, Baseline, RankOne, ReferenceDMD
from cmdgpu.decomposition import CMD
from cmdgpu.errors import UsageError, printable
from cmdgpu.notation import I64
from cmdgpu.registry import Registry
from cmdgpu.store import format as fmt
from cmdgpu.trajectory import Trajectory

if TYPE_CHECKING:
    from torch import nn


class Recorded:
    """The snapshots as they were recorded, plain training: what every other method is held against."""

    def __init__(self) -> None:
        self._traj: Trajectory | None = None

    def fit(self, traj: Trajectory) -> Recorded:
        """Nothing is learned."""
        self._traj = traj
        return self

    @property
    def trajectory(self) -> Trajectory:
        assert self._traj is not None
        return self._traj

    @property
    def steps_(self) -> I64:
        """(T,)"""
        return self.trajectory.steps

    @property
    def metrics_(self) -> dict[str, Any]:
        """What all selected snapshots of the parameters take as stored."""
        traj = self.trajectory
        itemsize = fmt.storage(traj.dtype).numpy.itemsize
        return {"result_bytes": traj.parameters.n_rows_of("parameter") * len(traj.columns) * itemsize}

    def load_into(self, model: nn.Module, step: int) -> None:
        """Copy the snapshot of a step into the model; see ``Trajectory.load_into``."""
        self.trajectory.load_into(model, step)


Fittable: TypeAlias = Recorded | CMD | Baseline | ReferenceDMD
Asked: TypeAlias = str | Fittable
"""A method as it is asked for: by name, or made already, fitted or not."""


@dataclass(frozen=True)
class Kind:
    """What a name stands for."""

    makers: tuple[type[Any], ...]
    """Constructors that its settings go to; the first one makes the method."""
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Settings that are always told: these, where none are given."""


METHODS: Final[Registry[Kind]] = Registry("method")
METHODS.add("recorded", Kind((Recorded,)))
METHODS.add("cmd", Kind((CMD,), {"modes": 10}))
METHODS.add("ema", Kind((EMA,), {"decay": 0.9}))
METHODS.add("swa", Kind((SWA,)))
METHODS.add("lawa", Kind((LAWA,), {"k": 5}))
METHODS.add("pca", Kind((PCA,), {"components": 10}))
METHODS.add("rank-one", Kind((RankOne,)))
METHODS.add("dmd", Kind((DMD,), {"rank": 10}))
METHODS.add("reference-dmd", Kind((ReferenceDMD, CMD), {"rank": 10, "modes": 10}))

_ALSO: Final = {"gd": "recorded"}
_SPELLED: Final = {
    "n_modes": "modes", "n_samples": "samples", "random_state": "seed", "n_components": "components",
}  # fmt: skip


@dataclass
class Method:
    """One method of a comparison."""

    name: str
    fittable: Fittable
    config: dict[str, Any]
    """Its settings, all of them."""
    label: str
    """What tables and figures call it: its name and the settings that are not the usual ones."""
    base: CMD | None = None
    """Of a ``reference-dmd`` that is still to be fitted: the CMD whose references it carries on."""
    fit_s: float = float("nan")
    """Seconds of the fit, shared with those fitted in the same pass; NaN where it was fitted before."""

    @property
    def stored_bytes(self) -> int:
        """What rebuilding the parameters takes; of a CMD label, slope, offset (10 bytes) and references."""
        fittable = self.fittable
        if not isinstance(fittable, CMD):
            return int(fittable.metrics_["result_bytes"])
        n_rows = fittable.result.frame.map.n_rows_of("parameter")
        return 10 * n_rows + 4 * fittable.n_modes_ * len(fittable.steps_)


def parse_method(text: str, fitted: CMD | None = None) -> Method:
    """``name`` or ``name:setting=value,...``.

    Settings are those of the constructors by their own names, but ``modes``, ``samples``, ``seed`` and
    ``components``; ``reference-dmd`` takes those of its CMD, too. Where none of a CMD is given, ``fitted`` is
    the CMD that is meant. Raises UsageError naming what is unknown, with what there is.
    """
    name, colon, rest = text.partition(":")
    name = _ALSO.get(name.strip(), name.strip())
    kind = METHODS[name]
    given = _split_settings(text, rest) if colon else {}
    taken = {setting for maker in kind.makers for setting, _, _ in _parameters(maker)}
    if strangers := [setting for setting in given if setting not in taken]:
        raise UsageError(
            f"{name} has no setting {printable(strangers[0])!r}",
            hint=f"have: {', '.join(sorted(taken))}" if taken else "it has none",
        )
    objects: list[Any] = []
    for maker in kind.makers:
        keywords: dict[str, Any] = {}
        parameters = list(_parameters(maker))
        if maker is CMD and fitted is not None and not any(setting in given for setting, _, _ in parameters):
            objects.append(fitted)
            continue
        for setting, keyword, accepted in parameters:
            if setting in given:
                keywords[keyword] = _value(f"{name}:{setting}", given[setting], accepted)
            elif setting in kind.defaults:
                keywords[keyword] = kind.defaults[setting]
        objects.append(maker(**keywords))
    return _method(name, objects, base=objects[1] if len(objects) > 1 else None)


def method_of(fittable: Fittable) -> Method:
    """A method that was made already. Raises UsageError for anything else."""
    for name in METHODS:
        if isinstance(fittable, METHODS[name].makers[0]):
            if isinstance(fittable, ReferenceDMD):
                return _method(name, [fittable, fittable.forecast])
            return _method(name, [fittable])
    raise UsageError(
        f"a {type(fittable).__name__} is no method", hint=f"give CMD, a baseline, or: {', '.join(METHODS)}"
    )


def split_methods(text: str) -> list[str]:
    """``"ema:decay=0.9,dmd:rank=10,groups=layer"`` is two methods: settings belong to the one before."""
    found: list[str] = []
    for part in text.split(","):
        if found and re.match(r"\s*[a-z_]+\s*=", part):
            found[-1] += f",{part}"
        else:
            found.append(part)
    return found


def _method(name: str, objects: list[Any], base: CMD | None = None) -> Method:
    kind = METHODS[name]
    config: dict[str, Any] = {}
    told: dict[str, Any] = {}
    for maker, made in zip(kind.makers, objects, strict=True):
        usual = inspect.signature(maker).parameters
        for setting, keyword, _ in _parameters(maker):
            config[setting] = value = getattr(made, keyword)
            if setting in kind.defaults or value != usual[keyword].default:
                told[setting] = value
    if config.get("threshold") is not None:
        config["modes"] = None
        del told["modes"]
    settings = ",".join(f"{setting}={value}" for setting, value in told.items())
    return Method(name, objects[0], config, f"{name}:{settings}" if settings else name, base)


def _parameters(maker: type[Any]) -> Iterator[tuple[str, str, Any]]:
    """(setting, keyword, type) of everything a constructor takes."""
    hints = typing.get_type_hints(maker.__init__)
    for keyword in inspect.signature(maker).parameters:
        yield _SPELLED.get(keyword, keyword), keyword, hints[keyword]


def _split_settings(text: str, rest: str) -> dict[str, str]:
    given: dict[str, str] = {}
    for part in rest.split(","):
        setting, equals, value = (piece.strip() for piece in part.partition("="))
        if not (setting and equals and value) or setting in given:
            raise UsageError(
                f"{printable(part)!r} of {printable(text)!r} is no setting, or given twice",
                hint="write cmd:modes=10 or dmd:rank=10,groups=layer",
            )
        given[setting] = value
    return given


def _value(where: str, text: str, accepted: Any) -> Any:
    """The text as one of the types that are accepted."""
    union = typing.get_origin(accepted) in (typing.Union, types.UnionType)
    for each in typing.get_args(accepted) if union else (accepted,):
        if each is str or typing.get_origin(each) is Literal:  # which words there are, the constructor knows
            return text
        if each in (int, float):
            try:
                return each(text)
            except ValueError:
                continue
    raise UsageError(f"{where} cannot be {printable(text)!r}", hint="give a number")
