"""Files that are no checkpoint of any format here, told apart by their first bytes, each with the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

from cmdgpu.importing.files import Source


class Foreign(NamedTuple):
    found: str
    hint: str


_RE_SAVE: Final = "save the state_dict as safetensors where it was made"
_UNPACK: Final = Foreign("is compressed, or an archive", "unpack it first")

_BEGINNINGS: Final[dict[bytes, Foreign]] = {
    b"version https://git-lfs": Foreign("is a pointer of Git LFS, not the file itself", "run git lfs pull"),
    b"\x80\x02": Foreign("is a bare pickle, which is never run", _RE_SAVE),
    b"\x80\x03": Foreign("is a bare pickle, which is never run", _RE_SAVE),
    b"\x80\x04": Foreign("is a bare pickle, which is never run", _RE_SAVE),
    b"\x80\x05": Foreign("is a bare pickle, which is never run", _RE_SAVE),
    b"GGUF": Foreign(
        "is a GGUF file, whose weights are packed for inference", "import what it was made from"
    ),
    b"\x93NUMPY": Foreign("is one array without a name", "put it into an .npz: np.savez(path, name=array)"),
    b"\x1f\x8b": _UNPACK,
    b"\x28\xb5\x2f\xfd": _UNPACK,
    b"BZh": _UNPACK,
    b"\xfd7zXZ": _UNPACK,
    b"7z\xbc\xaf": _UNPACK,
    b"<!DOCTYPE html": Foreign("is a web page, perhaps instead of a download", "download it again"),
}
_LEVELDB: Final = bytes.fromhex("57fb808b247547db")
"""How the table of a TensorFlow checkpoint ends."""
_TENSORFLOW: Final = Foreign(
    "is a checkpoint of TensorFlow, which nothing here reads",
    "write its variables into an .npz where TensorFlow is installed: np.savez(path, **{name: array})",
)


def what_it_is(path: Path) -> Foreign | None:
    """None for what is not known either. Raises CheckpointError for what cannot be opened."""
    if path.is_dir():
        return _TENSORFLOW if (path / "saved_model.pb").is_file() else None
    source = Source(path)
    if source.size == 0:
        return Foreign("is empty", "write it again, or leave it out")
    head = source.read(0, min(source.size, 32))
    for beginning, foreign in _BEGINNINGS.items():
        if head.startswith(beginning):
            return foreign
    if ".ckpt.data-" in path.name or source.read(max(source.size - 8, 0), min(source.size, 8)) == _LEVELDB:
        return _TENSORFLOW
    return None
