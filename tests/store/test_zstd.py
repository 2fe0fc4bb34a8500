"""Laws of a compressed chunk: what comes back, and what is refused before a byte of it is decompressed."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cmdgpu.errors import StoreCorrupt
from cmdgpu.memory import anonymous_bytes
from cmdgpu.notation import F32
from cmdgpu.recording import Recorder
from cmdgpu.store import format as fmt
from cmdgpu.store import zstd
from cmdgpu.store.chunks import crc32c
from cmdgpu.store.journal import Journal
from cmdgpu.store.verification import verify_store
from cmdgpu.store.view import StoreView
from cmdgpu.trajectory import Trajectory
from tests.verbs import (
    N_CHUNKS,
    ROWS,
    STEPS,
    append,
    build_store,
    check_store_holds,
    declaring,
    edit_document,
    flip_bit,
    on_disk,
    put_frame,
    stored_at,
    tree_bytes,
)

LENGTH: Final = 4 * ROWS


def noise(n: int = ROWS, seed: int = 0) -> F32:
    return np.random.default_rng(seed).standard_normal(n).astype(np.float32)


def back(frame: bytes, n_bytes: int = LENGTH) -> bytes:
    out = np.full(n_bytes, 7, dtype=np.uint8)
    zstd.decompress(memoryview(frame), out)
    return out.tobytes()


# ---- what comes back ------------------------------------------------------------------------------------


@given(
    st.binary(max_size=40), st.integers(1, 40_000), st.integers(0, 3000), st.sampled_from(sorted(zstd.LEVELS))
)
def test_what_was_compressed_comes_back_within_the_bound(
    pattern: bytes, times: int, noisy: int, level: int
) -> None:
    raw = (pattern * times)[: 1 << 18] + noise(noisy).tobytes()
    frame = zstd.compress(np.frombuffer(raw, dtype=np.uint8), level)
    assert len(frame) <= zstd.bound(len(raw))
    assert back(frame, len(raw)) == raw


@pytest.mark.parametrize("n_bytes", [0, 1, 255, 256, 65791, 65792, (128 << 10) - 1, 128 << 10, 3 << 20])
@pytest.mark.parametrize("kind", ["zeros", "noise"])
def test_every_length_comes_back_and_noise_keeps_within_the_bound(n_bytes: int, kind: str) -> None:
    """Lengths at which a header changes its form, and where the bound changes its formula."""
    raw = bytes(n_bytes) if kind == "zeros" else np.random.default_rng(1).bytes(n_bytes)
    for level in (1, 3, 19) if n_bytes < 1 << 20 else (1,):
        frame = zstd.compress(np.frombuffer(raw, dtype=np.uint8), level)
        assert len(frame) <= zstd.bound(n_bytes)
        assert back(frame, n_bytes) == raw


def test_a_chunk_is_decompressed_into_its_place_and_nowhere_else() -> None:
    slot = np.full((3, 2 * ROWS), 5.0, dtype=np.float32)
    values = noise()
    zstd.decompress(memoryview(zstd.compress(values, 1)), slot[1, ROWS:])
    assert np.array_equal(slot[1, ROWS:], values)
    slot[1, ROWS:] = 5.0
    assert (slot == 5.0).all()


def test_other_threads_run_while_a_chunk_is_compressed_or_decompressed() -> None:
    """Neither holds the interpreter's lock: this thread goes on meanwhile."""
    values = noise(4 << 20)
    frame = memoryview(zstd.compress(values, 1))

    def gaps_beside(work: Callable[[], object]) -> tuple[float, float]:
        """(how long the work took, how long at most this thread stood still meanwhile)"""
        thread, longest = threading.Thread(target=work), 0.0
        started = before = time.perf_counter()
        thread.start()
        while thread.is_alive():
            now = time.perf_counter()
            longest, before = max(longest, now - before), now
        return time.perf_counter() - started, longest

    for work in (lambda: zstd.compress(values, 1), lambda: zstd.decompress(frame, np.empty_like(values))):
        looks = [gaps_beside(work) for _ in range(5)]
        assert any(still < took / 2 for took, still in looks), looks


# ---- what is refused ------------------------------------------------------------------------------------

FRAME: Final = zstd.compress(noise(), 1)
BLOCKS: Final = 5 + 2
"""Where the blocks of FRAME begin: magic, descriptor, two bytes of size."""


def _header(descriptor: int, *rest: int) -> bytes:
    return bytes([*FRAME[:4], descriptor, *rest])


SKIPPABLE: Final = bytes.fromhex("502a4d18") + (4).to_bytes(4, "little") + b"junk"
EMPTY: Final = zstd.compress(np.empty(0, dtype=np.uint8), 1)
EMPTY_BLOCK: Final = bytes(3)
BOMB: Final = zstd.compress(np.zeros(64 << 20, dtype=np.uint8), 1)
BAD: Final[dict[str, tuple[bytes, str]]] = {
    "nothing": (b"", "is no zstd frame"),
    "the elements themselves": (noise().tobytes(), "is no zstd frame"),
    "an older magic number": (b"\x27" + FRAME[1:], "is no zstd frame"),
    "a skippable frame before it": (SKIPPABLE + FRAME, "is no zstd frame"),
    "a frame that declares no size": (_header(0x00, 0x58) + FRAME[BLOCKS:], "declares no size"),
    "a bomb": (BOMB, f"of {64 << 20} bytes instead of {LENGTH}"),
    "a bomb that declares what it should": (declaring(BOMB, LENGTH), "too many blocks"),
    "too little declared": (declaring(FRAME, LENGTH - 1), f"of {LENGTH - 1} bytes"),
    "too much declared": (declaring(FRAME, LENGTH + 1), f"of {LENGTH + 1} bytes"),
    "2^64 - 1 declared": (declaring(FRAME, (1 << 64) - 1), f"of {(1 << 64) - 1} bytes"),
    "less in it than declared": (
        declaring(zstd.compress(noise(ROWS - 1), 1), LENGTH),
        "cannot be decompressed",
    ),
    "more in it than declared": (
        declaring(zstd.compress(noise(ROWS + 1), 1), LENGTH),
        "cannot be decompressed",
    ),
    "a checksum": (bytes([*FRAME[:4], FRAME[4] | 4, *FRAME[5:], 0, 0, 0, 0]), "checksum or a dictionary"),
    "a dictionary": (bytes([*FRAME[:4], FRAME[4] | 1, 9, *FRAME[5:]]), "checksum or a dictionary"),
    "a reserved bit": (bytes([*FRAME[:4], FRAME[4] | 8, *FRAME[5:]]), "checksum or a dictionary"),
    "only a header": (FRAME[:BLOCKS], "is cut or damaged"),
    "half a header": (FRAME[:6], "bytes instead of"),
    "half": (FRAME[: len(FRAME) // 2], "is cut or damaged"),
    "a byte short": (FRAME[:-1], "is cut or damaged"),
    "a byte long": (FRAME + b"\0", "holds 1 bytes behind"),
    "the frame twice": (FRAME + FRAME, f"holds {len(FRAME)} bytes behind"),
    "an empty frame behind it": (FRAME + EMPTY, f"holds {len(EMPTY)} bytes behind"),
    "a skippable frame behind it": (FRAME + SKIPPABLE, "holds 12 bytes behind"),
    "a block of a reserved kind": (FRAME[:BLOCKS] + bytes([7, 0, 0]), "is cut or damaged"),
    "blocks without an end": (FRAME[:BLOCKS] + 2000 * EMPTY_BLOCK, "too many blocks"),
    "many empty blocks": (FRAME[:BLOCKS] + 2000 * EMPTY_BLOCK + FRAME[BLOCKS:], "too many blocks"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_frame_that_is_not_exactly_a_chunk_is_refused_in_words(name: str) -> None:
    frame, words = BAD[name]
    beyond = np.full(2 * LENGTH, 7, dtype=np.uint8)
    with pytest.raises(zstd.BadFrame, match=words):
        zstd.decompress(memoryview(frame), beyond[:LENGTH])
    assert (beyond[LENGTH:] == 7).all(), "written beyond its place"


def test_a_bomb_costs_no_memory() -> None:
    out = np.empty(LENGTH, dtype=np.uint8)
    before = anonymous_bytes()
    for frame in (BOMB, declaring(BOMB, LENGTH)):
        with pytest.raises(zstd.BadFrame):
            zstd.decompress(memoryview(frame), out)
    assert anonymous_bytes() - before < 8 << 20


@given(st.binary(max_size=200), st.integers(0, 40), st.integers(0, 40))
def test_whatever_bytes_there_are_give_the_chunk_or_a_refusal(junk: bytes, start: int, kept: int) -> None:
    frame = FRAME[:start] + junk + (FRAME[-kept:] if kept else b"")
    try:
        back(frame)
    except zstd.BadFrame:
        return
    assert frame == FRAME


# ---- in a store -----------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Without a sketch: what is read is read from ``weights``."""
    return build_store(tmp_path / "run.zarr", sketch=False, compressed=True)


@pytest.mark.parametrize("name", BAD)
def test_a_store_with_such_a_frame_names_file_rows_tensor_and_step(store: Path, name: str) -> None:
    """The commit vouches for it, and its CRC is right: only its own header tells."""
    file = put_frame(store, BAD[name][0], i=1, t=2)
    traj = Trajectory.open(store)
    with pytest.raises(StoreCorrupt, match=rf"rows {ROWS}..{2 * ROWS - 1} of weights: ") as caught:
        _ = traj[ROWS + 1, 2]
    assert (caught.value.file, caught.value.step) == (str(file), STEPS[2])
    assert caught.value.tensor == "embed.weight +1"
    (found,) = verify_store(store).damaged
    assert (found.file, found.step, found.rows) == (str(file), STEPS[2], (ROWS, 2 * ROWS - 1))


_BYTES: Final = {"name": "bytes", "configuration": {"endian": "little"}}
_CRC: Final = {"name": "crc32c"}


def _codecs(**configuration: Any) -> list[Any]:
    return [_BYTES, {"name": "zstd", "configuration": configuration}, _CRC]


OURS: Final = _codecs(level=1, checksum=False)
BAD_CODECS: Final[dict[str, list[Any]]] = {
    "no level": _codecs(checksum=False),
    "level 20": _codecs(level=20, checksum=False),
    "level 0": _codecs(level=0, checksum=False),
    "level -1": _codecs(level=-1, checksum=False),
    "a level that is true": _codecs(level=True, checksum=False),
    "a level that is a float": _codecs(level=1.0, checksum=False),
    "a checksum of its own": _codecs(level=1, checksum=True),
    "a checksum that is 0": _codecs(level=1, checksum=0),
    "nothing said of a checksum": _codecs(level=1),
    "more to say": _codecs(level=1, checksum=False, threads=2),
    "no configuration": [_BYTES, {"name": "zstd"}, _CRC],
    "a configuration that is a list": [_BYTES, {"name": "zstd", "configuration": [1]}, _CRC],
    "another name": [_BYTES, {**OURS[1], "name": "numcodecs.zstd"}, _CRC],
    "a list in its place": [_BYTES, [], _CRC],
    "after the crc": [_BYTES, _CRC, OURS[1]],
    "first": [OURS[1], _BYTES, _CRC],
    "twice": [_BYTES, OURS[1], OURS[1], _CRC],
    "no crc": [_BYTES, OURS[1]],
    "two crcs": [_BYTES, _CRC, _CRC],
}


def _with(store: Path, codecs: list[Any]) -> Path:
    edit_document(store / fmt.WEIGHTS / fmt.DOCUMENT, lambda d: d.update(codecs=codecs))
    return store


@pytest.mark.parametrize("name", BAD_CODECS)
def test_no_other_chain_than_the_two_is_believed(store: Path, name: str) -> None:
    with pytest.raises(StoreCorrupt, match="unexpected array metadata: codecs"):
        StoreView.open(_with(store, BAD_CODECS[name]))


@pytest.mark.parametrize("level", [1, 7, 19])
def test_any_level_that_costs_little_is_believed(store: Path, level: int) -> None:
    check_store_holds(_with(store, _codecs(level=level, checksum=False)), STEPS)


def test_a_file_longer_than_any_frame_is_refused_before_it_is_read(store: Path) -> None:
    most = zstd.bound(LENGTH)
    put_frame(store, FRAME.ljust(most, b"\0"), i=1, t=2)
    with pytest.raises(StoreCorrupt, match="behind its zstd frame"):
        _ = Trajectory.open(store)[ROWS + 1, 2]
    file = put_frame(store, FRAME.ljust(most + 1, b"\0"), i=1, t=2)
    with pytest.raises(StoreCorrupt, match=f"holds {most + 5} bytes, and {LENGTH} compressed are {most + 4}"):
        _ = Trajectory.open(store)[0, 2]
    assert [damage.file for damage in verify_store(store, quick=True).damaged] == [str(file)]


def test_the_crc_is_judged_before_anything_is_decompressed(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touched(*_: object) -> None:
        raise AssertionError("a damaged frame was looked into")

    flip_bit(store / fmt.WEIGHTS / fmt.chunk_name(1, 2), 8 * 100)
    monkeypatch.setattr(zstd, "decompress", touched)
    with pytest.raises(StoreCorrupt, match="crc32c mismatch"):
        _ = Trajectory.open(store)[ROWS + 1, 2]


@pytest.mark.parametrize("level", [3, 19])
def test_a_store_of_another_level_is_read_and_goes_on_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: int
) -> None:
    with monkeypatch.context() as other:
        other.setattr(zstd, "LEVEL", level)
        store = build_store(tmp_path / "run.zarr", compressed=True)
        whole = build_store(tmp_path / "whole.zarr", [*STEPS, 30], compressed=True)
    assert StoreView.open(store).zstd_level == level != zstd.LEVEL
    journal = Journal.open(store)
    append(journal, 30, loss=7.5)
    journal.close()
    check_store_holds(store, [*STEPS, 30])
    assert tree_bytes(store) == tree_bytes(whole)


def test_a_store_that_is_not_compressed_takes_no_notice_of_zstd(tmp_path: Path) -> None:
    """Byte for byte what it was: the codecs in its documents, the elements and their CRC in its chunks."""
    store = build_store(tmp_path / "run.zarr")
    for name in (fmt.WEIGHTS, fmt.SKETCH):
        codecs = json.loads((store / name / fmt.DOCUMENT).read_bytes())["codecs"]
        assert codecs == [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    for t, step in enumerate(STEPS):
        column = stored_at(step)
        for i in range(N_CHUNKS):
            part = column[i * ROWS : (i + 1) * ROWS]
            raw = (store / fmt.WEIGHTS / fmt.chunk_name(i, t)).read_bytes()
            assert raw == part.tobytes() + crc32c(part)


def test_a_model_of_buffers_alone_has_a_sketch_of_nothing(tmp_path: Path) -> None:
    with Recorder(tmp_path / "run.zarr", zstd=True) as recorder:
        recorder.record(nn.BatchNorm1d(3, affine=False), 0)
    traj = Trajectory.open(tmp_path / "run.zarr")
    assert traj.verify() == []
    assert traj[:, 0].tolist() == [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]


def test_the_kept_crc_is_that_of_the_stored_bytes(store: Path) -> None:
    view = StoreView.open(store)
    for i, kept in enumerate(view.crcs(1)[:-1]):
        raw = on_disk(view.chunk_path(i, 1)).read_bytes()
        assert raw[-4:] == kept == crc32c(np.frombuffer(raw[:-4], dtype=np.uint8))
