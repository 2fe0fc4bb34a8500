"""Laws for bytes that nobody meant: any pickle, any damaged file is read for what it is or refused in one
line, and nothing else ever comes out.
"""

from __future__ import annotations

import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmdgpu.errors import CheckpointError, CmdgpuError
from cmdgpu.importing import pickles
from cmdgpu.importing.files import Source
from cmdgpu.importing.torch_archive import ADMITTED
from cmdgpu.importing.zip_records import read_records
from tests.faults import hostile
from tests.importing.test_hostile import look
from tests.importing.written import WRITERS, Tensors, flat_bits, torch_save

FILE: Final = Path("data.pkl")

_KEYS: Final = (
    st.text() | st.integers() | st.floats(allow_nan=False) | st.booleans() | st.none() | st.binary()
)
DATA: Final = st.recursive(
    _KEYS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(_KEYS | st.tuples(_KEYS, _KEYS), inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
    ),
    max_leaves=20,
)


def only_ours(action: Callable[[], object]) -> None:
    try:
        action()
    except CmdgpuError as error:
        assert len(str(error)) <= hostile.LONGEST_TEXT
        assert hostile.is_printable(str(error)), repr(str(error))


@given(data=DATA, protocol=st.integers(2, 5))
def test_plain_data_are_what_pickle_makes_of_them(data: Any, protocol: int) -> None:
    assert pickles.read(pickle.dumps(data, protocol), FILE, ADMITTED) == data


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """A pickle of torch.save and one of torch.distributed.checkpoint."""
    folder = tmp_path_factory.mktemp("programs")
    torch_save({"model": {"w": torch.ones(3)}, "epoch": 3}, folder / "a.pt")
    with zipfile.ZipFile(folder / "a.pt") as archive:
        program = archive.read("a/data.pkl")
    return [program, (WRITERS["dcp"](folder, {"w": torch.ones(3)}).path / ".metadata").read_bytes()]


@given(raw=st.binary(max_size=100))
def test_any_bytes_are_a_pickle_or_refused(raw: bytes) -> None:
    only_ours(lambda: pickles.read(b"\x80\x02" + raw + b".", FILE, ADMITTED))


class _Anything:
    """Lets every global through: what they would do is not done all the same."""

    def __contains__(self, name: object) -> bool:
        return True


@given(data=st.data())
def test_any_change_of_a_pickle_is_read_or_refused(programs: list[bytes], data: st.DataObject) -> None:
    raw = bytearray(data.draw(st.sampled_from(programs)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
        raw = raw or bytearray(b".")
    only_ours(lambda: pickles.read(bytes(raw), FILE, _Anything()))


TENSORS: Final[Tensors] = {
    "w": torch.arange(400, dtype=torch.float32).reshape(20, 20),
    "b": torch.arange(30, dtype=torch.float64),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_flipped_or_cut_file_is_read_or_refused(kind: str, tmp_path: Path) -> None:
    """Every file of a checkpoint, 60 places in each; a hang or another exception would show."""
    draw = random.Random(kind)
    path = WRITERS[kind](tmp_path, dict(TENSORS)).path
    for file in path.iterdir() if path.is_dir() else [path]:
        raw = file.read_bytes()
        for i in range(60):
            damaged = bytearray(raw)
            at = draw.randrange(len(raw))
            if i % 6 == 0:
                del damaged[at:]
            else:
                damaged[at] ^= 1 << draw.randrange(8)
            file.write_bytes(damaged)
            only_ours(lambda: look(str(path)))
        file.write_bytes(raw)


@pytest.mark.parametrize("kind", ["pt", "npz", "npz compressed"])
def test_no_flip_of_a_bit_goes_unnoticed_where_there_are_checksums(kind: str, tmp_path: Path) -> None:
    """The same numbers under the same names, or a refusal."""
    from tests.importing.test_formats import check_checksums, open_checkpoint, read

    draw = random.Random(0)
    file = WRITERS[kind](tmp_path, dict(TENSORS)).path
    raw = file.read_bytes()
    refused = 0
    for _ in range(150):
        damaged = bytearray(raw)
        damaged[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        try:
            checkpoint = open_checkpoint(file)
            check_checksums(checkpoint)
            found = {name: read(checkpoint, name).tobytes() for name in checkpoint.tensors}
        except (CheckpointError, AssertionError):  # or no format claims it any more
            refused += 1
            continue
        assert found == {name: flat_bits(tensor) for name, tensor in TENSORS.items()}
    assert refused > 100


def test_archives_with_numbers_of_64_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As beyond 4 GiB, where sizes and offsets stand in other places."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    path = tmp_path / "a.npz"
    np.savez(path, **{name: cast(Any, tensor).numpy() for name, tensor in TENSORS.items()})
    assert b"PK\x06\x06" in path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        expected = {info.filename: (info.file_size, info.CRC) for info in archive.infolist()}
    records = read_records(Source(path))
    assert {name: (record.size, record.crc32) for name, record in records.items()} == expected
    from tests.importing.test_formats import check_whole, open_checkpoint

    check_whole(open_checkpoint(path), dict(TENSORS))
