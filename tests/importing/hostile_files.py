"""Odd and hostile checkpoints, each with the line that it gets. ``test_hostile`` opens them in a child,
``tests/faults/test_audit`` listens for what they would run.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch
from torch import nn

from tests.importing.written import WRITERS, quiet, torch_save

Forge = Callable[[Path], Path]
"""Makes it in a folder of its own; returns the path a person would give."""


@dataclass(frozen=True)
class Case:
    forge: Forge
    line: str | None
    """What has to be found in its line; None where it is strange and readable."""


W: Final = torch.arange(6.0).reshape(2, 3)


class Bomb:
    """Unpickled, it kills the canary beside the folder of all cases."""

    def __init__(self, folder: Path) -> None:
        self._canary = folder.parent / "canary"

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return cast(Any, os).system, (f"rm -f {self._canary}",)


# ---- torch.save -----------------------------------------------------------------------------------------


def _saved(make: Callable[[Path], object]) -> Forge:
    def forge(folder: Path) -> Path:
        with quiet():
            torch_save(make(folder), folder / "a.pt")
        return folder / "a.pt"

    return forge


def _edited(edit: Callable[[bytes], bytes], kind: str = "pt") -> Forge:
    def forge(folder: Path) -> Path:
        path = WRITERS[kind](folder, {"w": W, "v": torch.ones(300)}).path
        path.write_bytes(edit(path.read_bytes()))
        return path

    return forge


def _rezipped(edit: Callable[[dict[str, bytes]], object], **options: Any) -> Forge:
    """The records of a sound file, changed, in a zip that Python wrote."""

    def forge(folder: Path) -> Path:
        torch_save({"w": W}, folder / "sound.pt")
        with zipfile.ZipFile(folder / "sound.pt") as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        edit(records)
        (folder / "sound.pt").unlink()
        with quiet(), zipfile.ZipFile(folder / "a.pt", "w", **options) as archive:
            for name, raw in records.items():
                archive.writestr(name.rstrip("!"), raw)
        return folder / "a.pt"

    return forge


def _pickled(raw: bytes) -> Forge:
    """Another data.pkl, with right checksums."""
    return _rezipped(lambda records: records.update({"sound/data.pkl": raw}))


def _in_pickle(old: bytes, new: bytes) -> Forge:
    def edit(records: dict[str, bytes]) -> None:
        assert old in records["sound/data.pkl"]
        records["sound/data.pkl"] = records["sound/data.pkl"].replace(old, new)

    return _rezipped(edit)


def _legacy(folder: Path) -> Path:
    cast(Any, torch).save({"w": W}, folder / "a.pt", _use_new_zipfile_serialization=False)
    return folder / "a.pt"


def _script(folder: Path) -> Path:
    with quiet():
        cast(Any, torch).jit.script(nn.Linear(3, 2)).save(str(folder / "a.pt"))
    return folder / "a.pt"


def _flipped(folder: Path) -> Path:
    """One bit of the numbers, which nothing but the checksum can tell."""
    torch_save({"w": torch.ones(300)}, folder / "a.pt")
    raw = bytearray((folder / "a.pt").read_bytes())
    raw[raw.index(struct.pack("<f", 1.0) * 300) + 600] ^= 1
    (folder / "a.pt").write_bytes(raw)
    return folder / "a.pt"


def _nested(depth: int) -> object:
    found: Any = {"w": W}
    for _ in range(depth):
        found = {"x": found, "y": found}
    return {"model": found}


def _doubling(times: int) -> bytes:
    """A tuple of two of a tuple of two ... as the key of a dict: hashing it once takes for ever."""
    raw = b"\x80\x02}N"
    for i in range(times):
        raw += b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86"
    return raw + b"Ns."


TORCH: Final[dict[str, Case]] = {
    "cut in half": Case(_edited(lambda raw: raw[: len(raw) // 2]), "no whole zip archive"),
    "cut by one byte": Case(_edited(lambda raw: raw[:-1]), "no whole zip archive"),
    "bytes behind its end": Case(_edited(lambda raw: raw + b"x" * 30), "no whole zip archive"),
    "one flipped bit": Case(_flipped, "'a/data/0' does not match its checksum"),
    "side effects": Case(
        _saved(lambda folder: {"w": W, "evil": Bomb(folder)}),
        r"its pickle wants posix.system, .*; re-save its state_dict as safetensors where it was made",
    ),
    "nothing but side effects": Case(_saved(Bomb), "is one pickled object of posix.system"),
    "a whole model": Case(_saved(lambda folder: nn.Linear(3, 2)), r"one pickled object of torch\.nn.*Linear"),
    "a model in a dict": Case(_saved(lambda folder: {"model": nn.Linear(3, 2)}), r"wants torch\.nn"),
    "before torch 1.6": Case(_legacy, "in the format of torch before 1.6"),
    "TorchScript": Case(_script, "is a TorchScript archive"),
    "compressed": Case(_rezipped(lambda records: None, compression=zipfile.ZIP_DEFLATED), "is compressed"),
    "a record twice": Case(
        _rezipped(lambda records: records.update({"sound/data/0!": bytes(24)})), "two records are named"
    ),
    "no storage": Case(
        _rezipped(lambda records: records.pop("sound/data/0")), "'sound/data/0' of 24 bytes, which is"
    ),
    "a short storage": Case(
        _rezipped(lambda r: r.update({"sound/data/0": bytes(20)})), "which holds 20 bytes"
    ),
    "from a big-endian machine": Case(
        _rezipped(lambda r: r.update({"sound/byteorder": b"big"})), "little-endian"
    ),
    "no pickle": Case(
        _rezipped(lambda records: records.pop("sound/data.pkl")), "is no checkpoint that can be read"
    ),
    "an empty pickle": Case(_pickled(b""), "a pickle that breaks at byte"),
    "a pickle that is cut": Case(_in_pickle(b"q\x0cRq\rs.", b""), "holds no pickle of data|breaks at byte"),
    "a pickle without an end": Case(_pickled(b"\x80\x02N"), "a pickle that breaks at byte 3"),
    "a pickle of junk": Case(_pickled(b"\xff\xfe junk"), "opcode 0xff at byte 0"),
    "a shape beyond its storage": Case(
        _in_pickle(b"K\x02K\x03\x86", b"K\x02K\x04\x86"), "reaches to element 7 of 6"
    ),
    "a negative stride": Case(
        _in_pickle(b"K\x03K\x01\x86", b"J\xff\xff\xff\xffK\x01\x86"), "shape is no shape"
    ),
    "a shape beyond all reason": Case(
        _in_pickle(b"K\x02K\x03\x86", b"\x8a\x08" + b"\xff" * 7 + b"\x7f" + b"K\x00\x86"), "beyond all reason"
    ),
    "an expanded view of 2^40": Case(
        _in_pickle(
            b"K\x02K\x03\x86q\x08K\x03K\x01\x86", b"\x8a\x06" + bytes(5) + b"\x01K\x01\x86K\x00K\x01\x86"
        ),
        "an expanded tensor",
    ),
    "memory far away": Case(_pickled(b"\x80\x02Nr\xff\xff\xff\xff."), "holds a NoneType"),
    "bytes that are claimed": Case(_pickled(b"\x80\x05\x96" + b"\xff" * 7 + b"\x0f."), "breaks at byte"),
    "a long number that is claimed": Case(
        _pickled(b"\x80\x02\x8b\xff\xff\xff\x7f."), "a whole number of 2147483647 bytes"
    ),
    "a call for 2^40 bytes": Case(
        _pickled(b"\x80\x02c__builtin__\nbytearray\n\x8a\x06" + bytes(5) + b"\x01\x85R."),
        "builtins.bytearray",
    ),
    "keys of doubling tuples": Case(_pickled(_doubling(60)), "a key that is no number and no text"),
    "a million lists": Case(_pickled(b"\x80\x02" + b"]" * 6_000_000 + b"."), "more than 4194304 objects"),
    "nested a million times": Case(
        _pickled(b"\x80\x02" + b"]" * 1_000_000 + b"a" * 999_999 + b"."), "holds a list"
    ),
    "dicts in dicts in both places": Case(_saved(lambda folder: _nested(30)), "holds dicts in dicts"),
    "a dict in itself": Case(_pickled(b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s."), "no tensor"),
    "a list": Case(_saved(lambda folder: [W, W]), "holds a list, no dict of named tensors"),
    "a bare tensor": Case(_saved(lambda folder: W), "no dict of named tensors"),
    "nothing": Case(_saved(lambda folder: {}), "no tensor"),
    "only an optimizer": Case(
        _saved(lambda f: {"optimizer": {"state": {0: {"exp_avg": W}}}, "epoch": 3}), "no tensor"
    ),
    "two models": Case(
        _saved(lambda f: {"netG": {"w": W}, "netD": {"w": W}}), "more than one model: netG, netD"
    ),
    "names that are numbers": Case(_saved(lambda folder: {0: W, "w": W}), None),
    "names like paths and escapes": Case(_saved(lambda f: {"../../etc/x": W, "\x1b[2J\r\n": W + 1}), None),
    "half a surrogate": Case(_saved(lambda folder: {"\ud800": W}), "half a surrogate"),
    "no name": Case(_saved(lambda folder: {"": W}), "a name of 0 characters"),
    "a name of a megabyte": Case(_saved(lambda folder: {"w" * (1 << 20): W}), "a name of 1048576 characters"),
    "every element type": Case(
        _saved(
            lambda f: {
                "a": torch.tensor(1),
                "b": W.bfloat16(),
                "c": W.to(torch.complex64),
                "d": torch.tensor(2.0),
            }
        ),
        None,
    ),
}

# ---- zip ------------------------------------------------------------------------------------------------


def _ending(edit: Callable[[list[int]], object]) -> Forge:
    """The numbers at the end of a zip: disk, first disk, here, records, bytes, offset, comment."""

    def change(raw: bytes) -> bytes:
        values = list(struct.unpack("<4H2IH", raw[-18:]))
        edit(values)
        return raw[:-18] + struct.pack("<4H2IH", *values)

    return _edited(change, "npz")


def _directory(offset: int, form: str, value: int) -> Forge:
    """A number in the first entry of the directory."""

    def change(raw: bytes) -> bytes:
        at = raw.index(b"PK\x01\x02") + offset
        return raw[:at] + struct.pack(form, value) + raw[at + struct.calcsize(form) :]

    return _edited(change, "npz")


ZIPS: Final[dict[str, Case]] = {
    "more records than there are": Case(
        _ending(lambda v: v.__setitem__(slice(2, 4), [9, 9])), "fewer than 9 records"
    ),
    "fewer records than there are": Case(
        _ending(lambda v: v.__setitem__(slice(2, 4), [1, 1])), "more than 1 records"
    ),
    "a directory elsewhere": Case(_ending(lambda v: v.__setitem__(5, 7)), "its directory ends at byte"),
    "two volumes": Case(_ending(lambda v: v.__setitem__(0, 1)), "several volumes"),
    "encrypted": Case(_directory(8, "<H", 1), "is encrypted"),
    "an unknown method": Case(_directory(10, "<H", 99), "compressed by method 99"),
    "a record of 4 GB": Case(_directory(20, "<Q", 0xFFFFFFF0FFFFFFF0), "two sizes|ends beyond"),
    "a header elsewhere": Case(_directory(42, "<I", 11), "is not where the directory says"),
    "another name in the header": Case(
        _edited(lambda raw: raw.replace(b"w.npy", b"x.npy", 1), "npz"), "is not where"
    ),
}

# ---- safetensors ----------------------------------------------------------------------------------------


def _tensors(header: object, n_bytes: int = 24, length: int | None = None) -> Forge:
    def forge(folder: Path) -> Path:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        size = (len(text) if length is None else length).to_bytes(8, "little")
        (folder / "a.safetensors").write_bytes(size + text + bytes(n_bytes))
        return folder / "a.safetensors"

    return forge


def _entry(start: int, stop: int, *shape: int, kind: str = "F32") -> dict[str, Any]:
    return {"dtype": kind, "shape": list(shape), "data_offsets": [start, stop]}


SAFETENSORS: Final[dict[str, Case]] = {
    "cut": Case(_edited(lambda raw: raw[:-1], "safetensors"), "cut short"),
    "a header that is longer than the file": Case(_tensors({}, 0, 4000), "cut short"),
    "a header of 2^63 bytes": Case(_tensors({}, 0, 1 << 63), "is no checkpoint that can be read"),
    "no JSON": Case(_tensors(b"{nothing}"), "holds no JSON"),
    "no UTF-8": Case(_tensors(b'{"\xff":1}'), "holds no JSON"),
    "a tensor twice": Case(_tensors(b'{"w":1,"w":2}'), "a key appears twice"),
    "nested without end": Case(
        _tensors(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "beyond all reason"
    ),
    "commas without end": Case(_tensors(b'{"a":[' + b"0," * 5_000_000 + b"0]}"), "beyond all reason"),
    "overlapping": Case(_tensors({"a": _entry(0, 16, 4), "b": _entry(8, 24, 4)}), "overlaps"),
    "a hole": Case(_tensors({"a": _entry(0, 8, 2), "b": _entry(16, 24, 2)}), "leaves a hole"),
    "bytes that no tensor has": Case(_tensors({"a": _entry(0, 16, 4)}), "its tensors end at byte"),
    "a tensor beyond the file": Case(_tensors({"a": _entry(0, 4000, 1000)}), "lies beyond the file"),
    "a size that is another": Case(_tensors({"a": _entry(0, 24, 7)}), "has 24 bytes, which a F32 of"),
    "a shape that overflows": Case(_tensors({"a": _entry(0, 24, 1 << 62, 1 << 62, 0)}), "which a F32"),
    "a negative size": Case(_tensors({"a": _entry(0, 24, -6)}), "not described as a tensor"),
    "offsets that are no numbers": Case(
        _tensors({"a": {**_entry(0, 24, 6), "data_offsets": [0.0, 24]}}), "beyond"
    ),
    "an unknown type": Case(_tensors({"a": _entry(0, 24, 6, kind="Q9")}), "has the type Q9"),
    "packed elements": Case(_tensors({"a": _entry(0, 24, 48, kind="F4")}), "no tensor"),
    "metadata that are no texts": Case(
        _tensors({"__metadata__": {"a": 1}, "a": _entry(0, 24, 6)}), "not all texts"
    ),
    "another name of nothing": Case(
        _tensors({"__metadata__": {"aliases": '{"b": "c"}'}, "a": _entry(0, 24, 6)}), "another name of 'c'"
    ),
    "a name with escapes": Case(_tensors({"\x1b[2J\u202e": _entry(0, 24, 6)}), None),
}

# ---- folders --------------------------------------------------------------------------------------------


def _hub(edit: Callable[[Path, dict[str, Any]], object]) -> Forge:
    """A sharded folder, its index changed."""

    def forge(folder: Path) -> Path:
        home = WRITERS["huggingface"](folder, {"a": W, "b": torch.ones(3000)}).path
        index = home / "model.safetensors.index.json"
        document = json.loads(index.read_bytes())
        edit(home, document)
        index.write_text(json.dumps(document))
        return home

    return forge


def _named(name: str) -> Forge:
    return _hub(lambda home, document: document["weight_map"].update(a=name))


def _linked_out(home: Path, document: dict[str, Any]) -> None:
    shard = home / document["weight_map"]["a"]
    shard.rename(home.parent / "elsewhere.safetensors")
    shard.symlink_to(home.parent / "elsewhere.safetensors")


def _fifo(home: Path, document: dict[str, Any]) -> None:
    shard = home / document["weight_map"]["a"]
    shard.unlink()
    os.mkfifo(shard)


HUB: Final[dict[str, Case]] = {
    "a file in the folder above": Case(_named("../elsewhere.safetensors"), "no bare file name"),
    "a file from the root": Case(_named("/etc/passwd"), "no bare file name"),
    "a file with an escape": Case(_named("\x1b[2J"), "no bare file name"),
    "a file that is absent": Case(_named("model-9.safetensors"), "cannot be opened: No such file"),
    "a tensor that is absent": Case(
        _hub(lambda h, d: d["weight_map"].update(c=d["weight_map"]["a"])), "not in the file"
    ),
    "an empty index": Case(_hub(lambda home, document: document.update(weight_map={})), "no weight_map"),
    "an index of numbers": Case(
        _hub(lambda home, document: document.update(weight_map={"a": 1})), "no weight_map"
    ),
    "a link out of the folder": Case(_hub(_linked_out), "symbolic link out of the folder"),
    "a FIFO": Case(_hub(_fifo), "is no regular file"),
    "a link to nowhere": Case(
        _hub(lambda h, d: (h / "x").symlink_to("y") or d["weight_map"].update(a="x")), "nowhere"
    ),
    "two indexes": Case(
        _hub(lambda home, document: (home / "model.fp16.safetensors.index.json").write_text("{}")),
        "more than one",
    ),
    "a trainer state that is none": Case(
        _hub(lambda h, d: (h / "trainer_state.json").write_text("[")), "no JSON"
    ),
}


class _Metadata:
    """``.metadata`` of torch.distributed.checkpoint, changed."""

    def __init__(self, edit: Callable[[Any, Path], object]) -> None:
        self._edit = edit

    def __call__(self, folder: Path) -> Path:
        home = WRITERS["dcp"](folder, {"w": W, "v": torch.ones(4, 5)}).path
        path = home / ".metadata"
        document = pickle.loads(path.read_bytes())
        self._edit(document, home)
        path.write_bytes(pickle.dumps(document))
        return home


def _place(document: Any, name: str, **fields: Any) -> None:
    for index, place in document.storage_data.items():
        if index.fqn == name:
            for key, value in fields.items():
                setattr(place, key, value)


def _chunk(document: Any, name: str, **fields: Any) -> None:
    for key, value in fields.items():
        setattr(document.state_dict_metadata[name].chunks[0], key, torch.Size(value))


def _swap(document: Any, home: Path) -> None:
    """The tensor where another one is said to be."""
    places = {index.fqn: place for index, place in document.storage_data.items()}
    _place(document, "model.w", offset=places["model.v"].offset, length=places["model.v"].length)


def _cut(home: Path) -> None:
    (file,) = home.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-2000])


DCP: Final[dict[str, Case]] = {
    "side effects": Case(
        _Metadata(lambda d, home: setattr(d, "planner_data", Bomb(home.parent))), "wants posix.system"
    ),
    "metadata that are cut": Case(
        lambda folder: _rewritten(WRITERS["dcp"](folder, {"w": W}).path, lambda raw: raw[:-40]),
        "breaks at byte",
    ),
    "metadata of something else": Case(
        lambda folder: _rewritten(WRITERS["dcp"](folder, {"w": W}).path, lambda raw: pickle.dumps([1, 2])),
        "no metadata of",
    ),
    "no metadata at all": Case(
        lambda folder: _rewritten(WRITERS["dcp"](folder, {"w": W}).path, lambda raw: b""), "breaks at byte 0"
    ),
    "a file that is cut": Case(_Metadata(lambda document, home: _cut(home)), "cut short"),
    "a file that is absent": Case(
        _Metadata(lambda d, home: _place(d, "model.w", relative_path="x")), "No such file"
    ),
    "a file in the folder above": Case(
        _Metadata(lambda d, h: _place(d, "model.w", relative_path="../x")), "no bare file"
    ),
    "a place beyond the file": Case(
        _Metadata(lambda d, home: _place(d, "model.w", length=1 << 40)), "cut short"
    ),
    "items that overlap": Case(
        _Metadata(lambda d, home: _place(d, "model.w", offset=5)), "items that overlap"
    ),
    "a place that is no archive": Case(
        _Metadata(lambda d, h: _place(d, "model.w", length=50)), "no whole zip"
    ),
    "another tensor in its place": Case(_Metadata(_swap), r"holds float32 \[4, 5\] at byte"),
    "a hole": Case(
        _Metadata(lambda d, h: setattr(d.state_dict_metadata["model.w"], "size", torch.Size([3, 3]))), "holes"
    ),
    "a tensor of 2^60": Case(
        _Metadata(lambda d, h: setattr(d.state_dict_metadata["model.w"], "size", torch.Size([1 << 60, 3]))),
        "holes",
    ),
    "a piece beyond its tensor": Case(
        _Metadata(lambda d, home: _chunk(d, "model.w", sizes=[9, 3])), "reaches beyond"
    ),
    "a piece at a place of its own": Case(
        _Metadata(lambda d, home: _chunk(d, "model.w", offsets=[1, 0])), "does not say"
    ),
    "a piece with another number of axes": Case(
        _Metadata(lambda d, h: _chunk(d, "model.w", sizes=[6])), "no box"
    ),
    "through a transformation": Case(
        _Metadata(lambda d, home: _place(d, "model.w", transform_descriptors=["zstd"])),
        "through a transformation",
    ),
}


def _rewritten(home: Path, edit: Callable[[bytes], bytes]) -> Path:
    (home / ".metadata").write_bytes(edit((home / ".metadata").read_bytes()))
    return home


# ---- npz ------------------------------------------------------------------------------------------------


def _array(header: str, body: bytes = bytes(24)) -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body


def _npz(*members: bytes, compression: int = zipfile.ZIP_STORED) -> Forge:
    def forge(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "a.npz", "w", compression) as archive:
            for i, raw in enumerate(members):
                archive.writestr(f"a{i}.npy", raw)
        return folder / "a.npz"

    return forge


def _header(shape: str, descr: str = "'<f4'") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"


def _objects(folder: Path) -> Path:
    evil = np.empty(1, object)
    evil[0] = Bomb(folder)
    np.savez(folder / "a.npz", evil=evil, w=cast(Any, W).numpy())
    return folder / "a.npz"


def _inflating_to_more(folder: Path) -> Path:
    """A member of 152 bytes, says the directory; 64 MB, says what was deflated."""
    path = _npz(_array(_header("(6,)")) + bytes(64 << 20), compression=zipfile.ZIP_DEFLATED)(folder)
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"PK\x01\x02") + 24 :][:4] = struct.pack("<I", 152)
    at = raw.index(b"PK\x01\x02") + 24
    raw[at : at + 4] = struct.pack("<I", 152)
    path.write_bytes(raw)
    return path


def _wrong_crc(folder: Path) -> Path:
    path = _npz(_array(_header("(6,)")), compression=zipfile.ZIP_DEFLATED)(folder)
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"PK\x01\x02") + 16] ^= 1
    path.write_bytes(raw)
    return path


NPZ: Final[dict[str, Case]] = {
    "pickled objects": Case(_objects, None),
    "a header that is code": Case(_npz(_array("__import__('os').system('x')")), "a header that is none"),
    "no header": Case(_npz(b"nothing"), "does not begin as an array"),
    "a shape that is none": Case(_npz(_array(_header("(-6,)"))), "a shape that is none"),
    "a shape that overflows": Case(_npz(_array(_header(f"({1 << 62}, 4, 0)"))), "beyond all reason"),
    "a shape that is larger": Case(
        _npz(_array(_header("(1000000000000,)"))), "holds 152 bytes, which a float32 of"
    ),
    "a type that is none": Case(_npz(_array(_header("(6,)", "'<f4\\x00'"))), "no tensor"),
    "more than it says": Case(_inflating_to_more, "does not match its checksum"),
    "a wrong checksum": Case(_wrong_crc, "does not match its checksum"),
    "no member": Case(_npz(), "is no checkpoint that can be read"),
}

# ---- HDF5 -----------------------------------------------------------------------------------------------


def _h5(make: Callable[[Any, Any, Path], object]) -> Forge:
    def forge(folder: Path) -> Path:
        h5py = cast(Any, import_module("h5py"))
        with h5py.File(folder / "a.h5", "w") as file:
            file["w"] = cast(Any, W).numpy()
            make(file, h5py, folder)
        return folder / "a.h5"

    return forge


def _external_data(file: Any, h5py: Any, folder: Path) -> None:
    (folder / "raw").write_bytes(bytes(24))
    file.create_dataset("x", (6,), "<f4", external=[(str(folder / "raw"), 0, 24)])


def _virtual(file: Any, h5py: Any, folder: Path) -> None:
    layout = h5py.VirtualLayout((6,), "<f4")
    layout[:] = h5py.VirtualSource(str(folder / "elsewhere.h5"), "x", shape=(6,))
    file.create_virtual_dataset("x", layout)


def _plugin(file: Any, h5py: Any, folder: Path) -> None:
    """A filter that nobody has: HDF5 would look for a library of that number."""
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((6,))
    plist.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, ())
    space = h5py.h5s.create_simple((6,))
    dataset = h5py.h5d.create(file.id, b"x", h5py.h5t.IEEE_F32LE, space, plist)
    dataset.write_direct_chunk((0,), bytes(24), filter_mask=0)


def _circle(file: Any, h5py: Any, folder: Path) -> None:
    file.create_group("g")
    file["g/again"] = file["g"]
    file["g/root"] = file["/"]


HDF5: Final[dict[str, Case]] = {
    "a link to another file": Case(
        _h5(lambda file, h5py, folder: file.__setitem__("x", h5py.ExternalLink("/etc/passwd", "/"))),
        "an external link",
    ),
    "a soft link": Case(
        _h5(lambda file, h5py, folder: file.__setitem__("x", h5py.SoftLink("/w"))), "a soft link"
    ),
    "elements in another file": Case(_h5(_external_data), "elements in another file"),
    "elements of another dataset": Case(_h5(_virtual), "elements in another file"),
    "a plug-in": Case(_h5(_plugin), "needs filter 32015"),
    "never written": Case(
        _h5(lambda file, h5py, folder: file.create_dataset("x", (1 << 40,), "<f4")), "never written"
    ),
    "chunks never written": Case(
        _h5(lambda file, h5py, folder: file.create_dataset("x", (1 << 40,), "<f4", chunks=(1 << 20,))),
        "never written",
    ),
    "chunks of a gigabyte": Case(
        _h5(lambda file, h5py, folder: file.create_dataset("x", (1 << 30,), "<f4", chunks=(1 << 28,))),
        "has chunks of",
    ),
    "groups in a circle": Case(_h5(_circle), None),
    "text": Case(_h5(lambda file, h5py, folder: file.__setitem__("x", "text")), None),
    "a file that is cut": Case(_edited(lambda raw: raw[:-500], "keras"), "cannot be read by HDF5"),
    "only its first bytes": Case(
        lambda folder: _raw(folder, b"\x89HDF\r\n\x1a\n" + bytes(50)), "cannot be read by HDF5"
    ),
}


# ---- what is no checkpoint ------------------------------------------------------------------------------


def _raw(folder: Path, raw: bytes, name: str = "a.pt") -> Path:
    (folder / name).write_bytes(raw)
    return folder / name


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "a.pt")
    return folder / "a.pt"


def _tensorflow(folder: Path) -> Path:
    (folder / "model.ckpt.index").write_bytes(bytes(40) + bytes.fromhex("57fb808b247547db"))
    return folder / "model.ckpt.index"


def _zip_of_texts(folder: Path) -> Path:
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        archive.writestr("readme.txt", "text")
    return _raw(folder, raw.getvalue())


FOREIGN: Final[dict[str, Case]] = {
    "empty": Case(lambda folder: _raw(folder, b""), "is empty"),
    "text": Case(lambda folder: _raw(folder, b"hello"), "is no checkpoint that can be read"),
    "a pickle": Case(lambda folder: _raw(folder, pickle.dumps(Bomb(folder))), "is a bare pickle"),
    "a pointer of Git LFS": Case(
        lambda folder: _raw(folder, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"),
        "git lfs pull",
    ),
    "compressed with gzip": Case(
        lambda folder: _raw(folder, b"\x1f\x8b\x08" + zlib.compress(b"x")), "unpack it first"
    ),
    "TensorFlow": Case(_tensorflow, "is a checkpoint of TensorFlow"),
    "GGUF": Case(lambda folder: _raw(folder, b"GGUF" + bytes(100)), "is a GGUF file"),
    "one array of NumPy": Case(
        lambda folder: _raw(folder, b"\x93NUMPY\x01\x00"), "is one array without a name"
    ),
    "a zip of something": Case(_zip_of_texts, "is no checkpoint that can be read"),
    "a FIFO": Case(_pipe, "is no regular file"),
}

CORPUS: Final[dict[str, Case]] = {
    f"{group}: {name}": case
    for group, cases in {
        "torch": TORCH,
        "zip": ZIPS,
        "safetensors": SAFETENSORS,
        "hugging face": HUB,
        "dcp": DCP,
        "npz": NPZ,
        "hdf5": HDF5,
        "foreign": FOREIGN,
    }.items()
    for name, case in cases.items()
}


def lay_out(folder: Path, names: Iterable[str] = CORPUS) -> dict[str, Path]:
    """Each of these cases in a folder of its own, numbered; ``canary`` lies among them."""
    folder.mkdir()
    (folder / "canary").write_text("alive")
    found: dict[str, Path] = {}
    for i, name in enumerate(names):
        home = folder / str(i)
        home.mkdir()
        found[name] = CORPUS[name].forge(home)
    return found
