"""``.pt``, ``.pth``, ``.ckpt``, ``.bin``: one file of ``torch.save``, and where in it the model lies."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final, cast

import numpy as np

from cmdgpu.errors import CheckpointError, printable
from cmdgpu.importing.contract import Checkpoint
from cmdgpu.importing.elements import Elements, numpy_type
from cmdgpu.importing.files import Source
from cmdgpu.importing.opened import Opened
from cmdgpu.importing.pickles import WAY_OUT, Call, Data
from cmdgpu.importing.torch_archive import Archive, View, open_archive
from cmdgpu.importing.zip_records import MAGIC, first_name, read_records

NAME: Final = "pt"

_LEGACY: Final = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""The magic number that torch.save began with until version 1.6, pickled."""

MODEL_ENTRIES: Final = (
    "model", "state_dict", "model_state_dict", "model_state", "net", "network", "module", "params", "weights",
    "ema", "model_ema", "state_dict_ema", "ema_state_dict", "ema_model",
)  # fmt: skip
"""Where trainers put a model."""
_NO_MODEL: Final = re.compile(
    r"optim|sched|scaler|amp|rng|random|callback|loops|hparam|hyper_param|args|config"
)
"""Entries that hold tensors and no model."""
_STEPS: Final = ("global_step", "step", "steps", "iteration", "iter", "it", "epoch")
"""Entries that tell the step, the first one that is there."""

_MAX_DEPTH: Final = 32
_MAX_TENSORS: Final = 1 << 20
_MAX_DICTS: Final = 1 << 14
"""A dict that lies in a dict many times over has more names than the file has bytes."""


class TorchFile:
    def claims(self, path: Path) -> bool:
        return path.is_file() and looks_like_torch(Source(path))

    def open(self, path: Path) -> Checkpoint:
        """Raises CheckpointError for files older than torch 1.6, TorchScript, pickled objects, two models."""
        return open_torch(path, Source(path))


def looks_like_torch(source: Source) -> bool:
    head = source.read(0, min(source.size, 1024))
    if head.startswith(_LEGACY):
        return True
    if not head.startswith(MAGIC):
        return False
    name = first_name(head) or ""
    if _is_torch_record(name):
        return True
    try:
        return any(map(_is_torch_record, read_records(source)))
    except CheckpointError:  # a damaged archive that does not even begin as one of torch
        return False


def _is_torch_record(name: str) -> bool:
    folder, _, rest = name.partition("/")
    return bool(folder) and rest in ("data.pkl", "constants.pkl")


def open_torch(path: Path, source: Source) -> Opened:
    """``path`` is what a person calls it; the bytes are read through ``source``."""
    if source.read(0, min(source.size, len(_LEGACY))) == _LEGACY:
        raise CheckpointError(
            "was written in the format of torch before 1.6, one pickle from end to end",
            file=path,
            hint="load it where it was made and save its state_dict again, as safetensors",
        )
    archive = open_archive(source)
    return _Reading(path, archive).opened()


class _Reading:
    """From the pickled value of a file to its model."""

    def __init__(self, path: Path, archive: Archive) -> None:
        self._path, self._archive = path, archive
        self._elements: dict[str, Elements] = {}
        self._aliases: dict[str, str] = {}
        self._skipped: list[tuple[str, str]] = []
        self._views: dict[View, str] = {}
        self._holding: dict[int, bool] = {}
        self._dicts = 0

    def opened(self) -> Opened:
        pickled: object = self._archive.root
        if type(pickled) is not dict:
            raise CheckpointError(
                f"holds {_what(pickled)}, no dict of named tensors", file=self._path, hint=WAY_OUT
            )
        root = cast(dict[Data, Data], pickled)
        models = self._models(root)
        for name, entry in models.items():
            self._take(self._descend(entry), "" if len(models) == 1 else f"{name}.", 0)
        return Opened(
            self._path,
            NAME,
            (self._path,),
            self._elements,
            self._aliases,
            tuple(self._skipped),
            self._step(root, is_bare="" in models),
            0,
            {self._path: self._archive.checksums},
            tuple(models) if len(models) > 1 else (),
        )

    # ---- where the model lies ---------------------------------------------------------------------------

    def _models(self, root: dict[Data, Data]) -> dict[str, dict[Data, Data]]:
        """Every dict that could be the model, by its entry: the file itself as ``""``. The rest is skipped.

        What trainers call their model comes before other entries that hold named tensors, and those count
        only in a file that has no weights of its own.
        """
        is_bare = any(self._is_weight(value) for value in root.values())
        found = {
            key: cast(dict[Data, Data], root[key])
            for key in MODEL_ENTRIES
            if self._holds_tensors(root.get(key), _MAX_DEPTH)
        }
        if is_bare and not found:
            return {"": root}
        if not found:
            found = {
                key: cast(dict[Data, Data], value)
                for key, value in root.items()
                if type(key) is str and not _NO_MODEL.search(key.lower()) and self._holds_tensors(value, 1)
            }
        for key, value in root.items():
            if key not in found:
                self._skip(key if type(key) is str else _label(key), self._why_not(key, value))
        return found

    def _descend(self, entry: dict[Data, Data]) -> dict[Data, Data]:
        """``{"model": {"state_dict": ...}}``: on, as long as one such name holds all the tensors."""
        for _ in range(_MAX_DEPTH):
            holding = [key for key, value in entry.items() if self._has_tensor(value)]
            if len(holding) != 1 or holding[0] not in MODEL_ENTRIES or type(entry[holding[0]]) is not dict:
                break
            entry = entry[holding[0]]
        return entry

    def _has_tensor(self, value: Data) -> bool:
        return self._archive.view(value) is not None or self._holds_tensors(value, _MAX_DEPTH)

    def _holds_tensors(self, value: Data, depth: int) -> bool:
        """Whether a dict holds a tensor, that many levels down. Every dict is looked at once."""
        seen: set[int] = set()
        level = [value]
        for _ in range(depth):
            following: list[Data] = []
            for found in level:
                if type(found) is dict and id(cast(Any, found)) not in seen:
                    seen.add(id(cast(Any, found)))
                    for key, inner in cast(dict[Data, Data], found).items():
                        if type(key) is str and self._archive.view(inner) is not None:
                            return True
                        following.append(inner)
            level = following
        return False

    def _holds_any(self, value: dict[Data, Data]) -> bool:
        """The same at any depth; a dict that lies in many places is asked once."""
        if id(value) not in self._holding:
            self._holding[id(value)] = self._holds_tensors(value, _MAX_DEPTH)
        return self._holding[id(value)]

    def _is_weight(self, value: Data) -> bool:
        """A tensor of real numbers with an axis: no counter, no score, no state of a random generator."""
        view = self._archive.view(value)
        return (
            type(view) is View and view.shape != () and view.dtype.startswith(("float", "bfloat", "complex"))
        )

    def _why_not(self, key: Data, value: Data) -> str:
        if type(key) is str and _NO_MODEL.search(key.lower()):
            return "state of the training, not of the model"
        if type(value) is dict:
            return "beside the model"
        what = _what(value) if self._archive.view(value) is None else "a tensor"
        return f"{what}, beside the model"

    def _step(self, root: dict[Data, Data], *, is_bare: bool) -> int | None:
        for key in _STEPS:
            value = root.get(key)
            if type(value) is int and 0 <= value < 1 << 63:
                return value
            view = None if is_bare else self._archive.view(value)
            if type(view) is View and (view.dtype, view.shape) == ("int64", ()):
                out = np.empty(1, numpy_type(view.dtype))
                self._archive.elements(view).read(0, 1, out)
                return int(out[0]) if out[0] >= 0 else None
        return None

    # ---- what it holds ----------------------------------------------------------------------------------

    def _take(self, entry: dict[Data, Data], prefix: str, depth: int) -> None:
        """The tensors of a dict under their names, and of the dicts in it under ``<its name>.<theirs>``."""
        self._dicts += 1
        if depth > _MAX_DEPTH or self._dicts > _MAX_DICTS:
            found = f"holds dicts in dicts, more than {_MAX_DEPTH} levels or {_MAX_DICTS} in all"
            raise CheckpointError(found, file=self._path)
        for key, value in entry.items():
            if type(key) is not str:
                self._skip(f"{prefix}{_label(key)}", "its name is no text")
                continue
            name = prefix + key
            view = self._archive.view(value)
            if type(view) is View:
                self._add(name, view)
            elif type(view) is str:
                self._skip(name, view)
            elif type(value) is dict and self._holds_any(cast(dict[Data, Data], value)):
                self._take(cast(dict[Data, Data], value), f"{name}.", depth + 1)
            else:
                self._skip(name, f"{_what(value)}, no tensor")

    def _add(self, name: str, view: View) -> None:
        if name in self._elements or name in self._aliases:
            raise CheckpointError("is there twice", file=self._path, tensor=name)
        self._room()
        if view in self._views:
            self._aliases[name] = self._views[view]
        else:
            self._views[view] = name
            self._elements[name] = self._archive.elements(view)

    def _skip(self, name: str, reason: str) -> None:
        self._room()
        self._skipped.append((name, reason))

    def _room(self) -> None:
        if len(self._elements) + len(self._aliases) + len(self._skipped) >= _MAX_TENSORS:
            raise CheckpointError(f"holds more than {_MAX_TENSORS} names", file=self._path)


def _label(key: Data) -> str:
    return str(key) if type(key) in (int, float, bool) else _what(key)


def _what(value: Data) -> str:
    word = printable(value.what) if type(value) is Call else type(value).__name__
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
