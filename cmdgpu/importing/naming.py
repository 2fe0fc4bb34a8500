"""What the tensors of a checkpoint are called in the trajectory, and which of them are taken.

In this order: ``prefix`` selects names and is taken off; without one, wrappers are stripped when every name
has them; ``key_map`` renames; ``include`` and ``exclude`` are searched for in what came out of it. Then types
decide: integers and bools have no rows, complex numbers are refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final, TypeAlias, cast

from cmdgpu.errors import CheckpointError, UnsupportedTensor, UsageError, printable
from cmdgpu.importing.contract import Checkpoint, TensorInfo
from cmdgpu.models import Patterns, compile_patterns
from cmdgpu.store.parameter_map import FLOAT_DTYPES, Kind

KeyMap: TypeAlias = Mapping[str, str] | Callable[[str], str] | None

WRAPPERS: Final = ("module.", "_orig_mod.", "model.")
"""What DataParallel, torch.compile and training frameworks put before every name."""
_BUFFERS: Final = ("running_mean", "running_var")
_WITHOUT_ROWS: Final = re.compile(r"u?int\d+|bool")
_MOST_KEY_MAP_BYTES: Final = 32 << 20


@dataclass(frozen=True)
class Rules:
    """How names become names."""

    prefix: str = ""
    include: tuple[re.Pattern[str], ...] = ()
    exclude: tuple[re.Pattern[str], ...] = ()
    key_map: KeyMap = None

    @staticmethod
    def of(prefix: str, include: Patterns, exclude: Patterns, key_map: KeyMap | str | Path) -> Rules:
        """Raises UsageError for a broken pattern and for a JSON file of names that is none."""
        chosen = read_key_map(Path(key_map)) if isinstance(key_map, (str, Path)) else key_map
        return Rules(prefix, compile_patterns(include), compile_patterns(exclude), chosen)


@dataclass(frozen=True)
class Named:
    """The tensors of one checkpoint that are taken, under the names they will have."""

    sources: Mapping[str, str]
    """Name in the trajectory -> name in the file, in the file's order; a tied tensor under its first name."""
    aliases: Mapping[str, str]
    """Other name -> the name it is taken under, for tied tensors."""
    skipped: tuple[tuple[str, str], ...]
    """(name in the file, reason)."""
    stripped: str = ""
    """Wrappers that stood before every name."""
    infos: Mapping[str, TensorInfo] = field(default_factory=dict[str, TensorInfo], repr=False)
    """By name in the file."""

    @cached_property
    def digest(self) -> str:
        """Vouches for which tensor was read for which."""
        pairs = sorted((name, self.sources[name]) for name in self.sources)
        return hashlib.sha256(json.dumps(pairs, separators=(",", ":")).encode()).hexdigest()

    def source_of(self, name: str, aliases: Mapping[str, str]) -> str | None:
        """The name in the file of what is called so, or by one of ``aliases``: of a tie any may be kept."""
        for known in (name, *(alias for alias, of in aliases.items() if of == name)):
            if (source := self.sources.get(self.aliases.get(known, known))) is not None:
                return source
        return None


def kind_of(name: str) -> Kind:
    """A checkpoint does not tell buffers from parameters: the running statistics of BatchNorm are buffers."""
    return "buffer" if name.rpartition(".")[2].endswith(_BUFFERS) else "parameter"


def name_tensors(checkpoint: Checkpoint, rules: Rules) -> Named:
    """Apply the rules to the header of a checkpoint.

    Raises CheckpointError when two tensors come out under one name or nothing is left, UnsupportedTensor by
    name for complex and exotic types, UsageError for a key map that names what is not there.
    """
    if checkpoint.models and not rules.prefix:
        models = ", ".join(printable(model) for model in checkpoint.models)
        raise CheckpointError(
            f"holds more than one model: {printable(models, 300)}",
            file=checkpoint.path,
            hint=f"choose one by its prefix, as in '{printable(checkpoint.models[0])}.'",
        )
    every = {**{name: name for name in checkpoint.tensors}, **checkpoint.aliases}
    skipped = list(checkpoint.skipped)
    selected: dict[str, str] = {}
    for name in every:
        if name.startswith(rules.prefix) and name != rules.prefix:
            selected[name] = name.removeprefix(rules.prefix)
        else:
            skipped.append((name, f"not below {printable(rules.prefix)}"))
    stripped = "" if rules.prefix else common_wrappers(selected.values())
    renamed = _rename({old: new.removeprefix(stripped) for old, new in selected.items()}, rules, checkpoint)
    sources: dict[str, str] = {}
    aliases: dict[str, str] = {}
    infos: dict[str, TensorInfo] = {}
    taken_as: dict[str, str] = {}
    origin: dict[str, str] = {}
    for old, new in renamed.items():
        info = checkpoint.tensors[every[old]]
        if reason := _refusal(new, info, rules):
            skipped.append((old, reason))
            continue
        _require_supported(new, info, checkpoint.path)
        if new in origin:
            raise CheckpointError(
                f"'{printable(origin[new])}' and '{printable(old)}' would both be called so",
                file=checkpoint.path,
                tensor=new,
                hint="change prefix or key_map, or leave one out with exclude",
            )
        origin[new] = old
        if every[old] in taken_as:
            aliases[new] = taken_as[every[old]]
            continue
        taken_as[every[old]] = new
        sources[new], infos[every[old]] = every[old], info
    return Named(sources, aliases, tuple(skipped), stripped, infos)


def common_wrappers(names: Iterable[str]) -> str:
    """``"module._orig_mod."`` when every name begins with it, one wrapper after the other; often nothing."""
    found = ""
    rest: list[str] = list(names)
    while True:
        for wrapper in WRAPPERS:
            if rest and all(name.startswith(wrapper) and name != wrapper for name in rest):
                rest = [name.removeprefix(wrapper) for name in rest]
                found += wrapper
                break
        else:
            return found


def _rename(names: dict[str, str], rules: Rules, checkpoint: Checkpoint) -> dict[str, str]:
    key_map = rules.key_map
    if key_map is None:
        return names
    if not callable(key_map):
        if absent := sorted(set(key_map) - set(names.values())):
            raise UsageError(
                f"the key map renames '{printable(absent[0])}', and no tensor has that name",
                file=checkpoint.path,
                hint="`cmdgpu import --dry-run` without it shows the names",
            )
        return {old: key_map.get(new, new) for old, new in names.items()}
    renamed = {old: key_map(new) for old, new in names.items()}
    for new in renamed.values():
        if not isinstance(cast(object, new), str):
            raise UsageError(f"the key map answers {type(new).__name__}", hint="it answers a name")
    return renamed


def _refusal(name: str, info: TensorInfo, rules: Rules) -> str | None:
    if rules.include and not any(pattern.search(name) for pattern in rules.include):
        return "not included"
    if any(pattern.search(name) for pattern in rules.exclude):
        return "excluded"
    if _WITHOUT_ROWS.fullmatch(info.dtype):
        return f"{info.dtype} has no rows"
    return None


def _require_supported(name: str, info: TensorInfo, path: Path) -> None:
    if info.dtype in FLOAT_DTYPES and name and name.encode(errors="ignore").decode() == name:
        return
    hint = "leave it out with exclude"
    if info.dtype in FLOAT_DTYPES:
        found, hint = "a tensor whose name no store can hold", "rename it with key_map"
    else:
        found = f"a tensor of {printable(info.dtype)}"
    raise UnsupportedTensor(f"{found} cannot be imported", file=path, tensor=name, hint=hint)


def read_key_map(path: Path) -> dict[str, str]:
    """A JSON object of names: name in the checkpoint -> name in the trajectory."""
    try:
        if path.stat().st_size > _MOST_KEY_MAP_BYTES:
            raise UsageError(f"holds more than {_MOST_KEY_MAP_BYTES} bytes", file=path)
        found: object = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", file=path) from error
    except (ValueError, RecursionError) as error:
        raise UsageError("is no JSON", file=path, hint='write {"old name": "new name"}') from error
    if not isinstance(found, dict) or not all(
        isinstance(value, str) for value in cast(dict[str, object], found).values()
    ):
        raise UsageError("is no JSON object of names", file=path, hint='write {"old name": "new name"}')
    return cast(dict[str, str], found)
