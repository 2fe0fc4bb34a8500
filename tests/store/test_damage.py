"""Laws of the reader: a damaged file is an error on use and in ``verify``, never a number."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cmdgpu.errors import StoreCorrupt
from cmdgpu.sampling import draw_sample
from cmdgpu.store import format as fmt
from cmdgpu.store import zstd
from cmdgpu.store.chunks import ChunkDamage, crc32c, read_chunk, stored_crc, write_chunk
from cmdgpu.store.journal import Journal
from cmdgpu.store.verification import verify_store
from cmdgpu.store.view import StoreView
from cmdgpu.trajectory import Trajectory
from tests.verbs import (
    N_CHUNKS,
    ROWS,
    STEPS,
    N,
    Weights,
    append,
    build_store,
    check_store_holds,
    create_store,
    flip_bit,
    leftovers,
    replace_by_directory,
    replace_by_fifo,
    replace_by_symlink,
    stored_at,
    swap_files,
    tree_bytes,
    values_at,
)

BLOCK, T = 1, 2
"""The chunk and the column that are damaged."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        "plain": build_store(folder / "plain.zarr", sketch=False),
        "zstd": build_store(folder / "zstd.zarr", sketch=False, compressed=True),
        "sketched": build_store(folder / "sketched.zarr"),
        "sketched zstd": build_store(folder / "sketched-zstd.zarr", compressed=True),
    }


@pytest.fixture
def chain() -> str:
    """Chunks as they are; tests of both chains say so."""
    return "plain"


@pytest.fixture
def store(bases: dict[str, Path], tmp_path: Path, chain: str) -> Path:
    """Without a sketch: what is read is read from ``weights``."""
    return Path(shutil.copytree(bases[chain], tmp_path / "run.zarr"))


@pytest.fixture
def sketched(bases: dict[str, Path], tmp_path: Path, chain: str) -> Path:
    name = "sketched" if chain == "plain" else "sketched zstd"
    return Path(shutil.copytree(bases[name], tmp_path / "sketched.zarr"))


both_chains = pytest.mark.parametrize("chain", ["plain", "zstd"])


def chunk(store: Path, i: int = BLOCK, t: int = T) -> Path:
    return store / fmt.WEIGHTS / fmt.chunk_name(i, t)


# ---- kinds of damage ------------------------------------------------------------------------------------


def cut(file: Path, size: int) -> None:
    with file.open("r+b") as opened:
        opened.truncate(size)


def size_of(file: Path) -> int:
    return file.stat().st_size


def put(file: Path, elements: np.ndarray) -> None:
    """A chunk that is whole in itself, with a right CRC, but was never committed here."""
    level = None if size_of(file) == SIZE else zstd.LEVEL
    file.unlink()
    write_chunk(file.parent, file.name, elements, level)


SIZE = 4 * ROWS + 4
"""Of a chunk file that is not compressed; none that is has as many bytes here."""
CUT: dict[str, Callable[[Path], object]] = {
    "half": lambda file: cut(file, size_of(file) // 2),
    "one byte short": lambda file: cut(file, size_of(file) - 1),
    "one byte long": lambda file: cut(file, size_of(file) + 1),
}
"""Compressed chunks have any size: of them this is seen by what stands at their end, as all below is."""
ABSENT: dict[str, Callable[[Path], object]] = {
    **CUT,
    "missing": Path.unlink,
    "empty": lambda file: cut(file, 0),
    "a directory": replace_by_directory,
    "a symbolic link": replace_by_symlink,
    "a FIFO": replace_by_fifo,
}
"""The file is not what a chunk file is: seen before an element is read."""
FOREIGN: dict[str, Callable[[Path], object]] = {
    "swapped between columns": lambda file: swap_files(file, file.with_name(fmt.chunk_name(BLOCK, T - 1))),
    "swapped between rows": lambda file: swap_files(file, file.with_name(fmt.chunk_name(BLOCK - 1, T))),
    "a copy of another column": lambda file: shutil.copy(file.with_name(fmt.chunk_name(BLOCK, 0)), file),
    "stale": lambda file: put(file, stored_at(999)[BLOCK * ROWS : (BLOCK + 1) * ROWS]),
    "zeros with a right CRC": lambda file: put(file, np.zeros(ROWS, np.float32)),
    "a flipped bit of the CRC": lambda file: flip_bit(file, 8 * (size_of(file) - 4) + 5),
}
"""A chunk file, but not the committed one: seen when its column is first met."""
FLIPPED: dict[str, Callable[[Path], object]] = {
    "the first bit": lambda file: flip_bit(file, 0),
    "a bit in the middle": lambda file: flip_bit(file, 8 * (size_of(file) // 2) + 3),
    "the last bit": lambda file: flip_bit(file, 8 * (size_of(file) - 4) - 1),
}
"""Seen when the chunk itself is read."""
DAMAGE = ABSENT | FOREIGN | FLIPPED


def fill_slot(traj: Trajectory) -> None:
    slot = np.empty((len(STEPS), N_CHUNKS * ROWS), dtype=np.float32)
    for task in traj.source.fill_tasks(0, N_CHUNKS, traj.columns, slot):
        task()


READERS: dict[str, Callable[[Trajectory, Path], object]] = {
    "all of it": lambda traj, _: traj[:, :],
    "one number of the chunk": lambda traj, _: traj[ROWS + 7, -1],
    "rows and columns": lambda traj, _: traj[[3, ROWS, N - 1], [True, False, True]],
    "a state dict": lambda traj, _: traj.state_dict(STEPS[T]),
    "a tensor": lambda traj, _: traj.state_dict(-1, params="fc.weight"),
    "a model": lambda traj, _: traj.load_into(Weights(), -1),
    "safetensors": lambda traj, out: traj.export(out / "x.safetensors", -1),
    "pt": lambda traj, out: traj.export(out / "x.pt", -1),
    "a sample": lambda traj, _: traj.read_rows(draw_sample(traj.parameters, 500, "uniform", 0).rows),
    "the pass": lambda traj, _: fill_slot(traj),
}


def check_names_the_place(caught: StoreCorrupt, store: Path, kind: str, chain: str = "plain") -> None:
    assert caught.step == STEPS[T]
    assert caught.hint is not None
    assert "verify" in caught.hint
    if kind in FOREIGN or (
        kind in CUT and chain == "zstd"
    ):  # which chunk of the column is the wrong one, nobody can tell
        assert caught.file == str(store / fmt.WEIGHTS / f"c.*.{T}")
        assert caught.tensor == "embed.weight +3"
    else:
        assert caught.file == str(chunk(store))
        assert caught.tensor == "embed.weight +1"


@both_chains
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_an_error_that_names_its_place_for_every_reader(
    store: Path, tmp_path: Path, kind: str, reader: str, chain: str
) -> None:
    READERS[reader](Trajectory.open(store), tmp_path)  # sound: it reads
    outputs = [tmp_path / "x.safetensors", tmp_path / "x.pt"]
    for out in outputs:
        out.unlink(missing_ok=True)
    DAMAGE[kind](chunk(store))
    traj = Trajectory.open(store)
    if kind == "swapped between columns":
        traj = traj.sel(start=T)  # the other column is damaged as well, and would be met first
        reader = "all of it" if reader in ("rows and columns", "the pass") else reader
    with pytest.raises(StoreCorrupt) as caught:
        READERS[reader](traj, tmp_path)
    check_names_the_place(caught.value, store, kind, chain)
    assert not any(out.exists() for out in outputs)
    assert leftovers(tmp_path) == []


@both_chains
@pytest.mark.parametrize("kind", ABSENT | FOREIGN)
def test_a_read_of_one_chunk_learns_of_another_that_is_not_the_committed_one(store: Path, kind: str) -> None:
    DAMAGE[kind](chunk(store))
    with pytest.raises(StoreCorrupt):
        _ = Trajectory.open(store)[N - 1, T]


@both_chains
@pytest.mark.parametrize("kind", DAMAGE)
def test_verify_finds_it(store: Path, kind: str) -> None:
    before = tree_bytes(store)
    DAMAGE[kind](chunk(store))
    found = verify_store(store).damaged
    steps = {STEPS[T], STEPS[T - 1]} if kind == "swapped between columns" else {STEPS[T]}
    assert {damage.step for damage in found} == steps
    assert all(damage.array == fmt.WEIGHTS and damage.tensors for damage in found)
    assert str(found[-1]).startswith(found[-1].file)
    quick = verify_store(store, quick=True).damaged
    assert bool(quick) == (kind not in FLIPPED), "quick reads no elements, and everything else"
    assert Trajectory.open(store).verify() == found
    assert {name for name in before if name in tree_bytes(store)} == set(tree_bytes(store)), "verify wrote"


@pytest.mark.parametrize("bit", [0, 8 * 4 * (3 * ROWS - N) - 1], ids=["first", "last"])
def test_a_flipped_bit_of_the_padding_is_damage(store: Path, bit: int) -> None:
    """Nobody reads it as a weight; a disk that flips bits there flips them elsewhere."""
    flip_bit(chunk(store, N_CHUNKS - 1), 8 * 4 * (N - (N_CHUNKS - 1) * ROWS) + bit)
    with pytest.raises(StoreCorrupt, match="crc32c"):
        _ = Trajectory.open(store)[N - 1, T]
    (found,) = verify_store(store).damaged
    assert found.rows == ((N_CHUNKS - 1) * ROWS, N - 1)


@both_chains
def test_one_bit_in_every_few_bytes_of_a_column_is_seen(store: Path) -> None:
    sound = verify_store(store)
    assert sound.damaged == []
    for i in range(N_CHUNKS):
        for bit in range(0, 8 * size_of(chunk(store, i)), 37 * 8 + 1):
            flip_bit(chunk(store, i), bit)
            out = np.empty(ROWS, np.float32)
            with pytest.raises(StoreCorrupt):
                StoreView.open(store).read_chunk(i, T, out)
            flip_bit(chunk(store, i), bit)
    check_store_holds(store, STEPS)


def test_damage_in_one_snapshot_leaves_the_others_readable(store: Path) -> None:
    chunk(store).unlink()
    traj = Trajectory.open(store)
    for t in (0, 1):
        assert np.array_equal(traj[:, t], values_at(STEPS[t]))
    assert np.array_equal(traj.sel(steps=STEPS[:2])[:, :], np.stack([values_at(s) for s in STEPS[:2]], 1))


@both_chains
def test_damage_done_after_the_first_look_is_still_seen(store: Path) -> None:
    view = StoreView.open(store)
    out = np.empty(ROWS, np.float32)
    view.read_chunk(BLOCK, T, out)
    put(chunk(store), stored_at(999)[BLOCK * ROWS : (BLOCK + 1) * ROWS])
    with pytest.raises(StoreCorrupt, match="not the chunk that was committed") as caught:
        view.read_chunk(BLOCK, T, out)
    check_names_the_place(caught.value, store, "")


def test_a_weight_that_is_not_a_number_is_a_weight(tmp_path: Path) -> None:
    """What was never written is told by the file and never by the value."""
    column = np.full(N_CHUNKS * ROWS, np.nan, np.float32)
    column[:N] = np.frombuffer(np.array([0x7FC00123, 0x80000000, 0xFF800000], "<u4").tobytes() * N, "<f4")[:N]
    journal = create_store(tmp_path / "nan.zarr", sketch=False)
    journal.append(column, 1, {}, None)
    journal.close()
    found = Trajectory.open(tmp_path / "nan.zarr")[:, 0]
    assert found.tobytes() == column[:N].tobytes()


# ---- all of it ------------------------------------------------------------------------------------------


@both_chains
def test_verify_lists_everything_that_is_wrong(sketched: Path) -> None:
    chunk(sketched, 0, 0).unlink()
    cut(chunk(sketched, 2, 0), 0)
    flip_bit(chunk(sketched, 1, 1), 5)
    flip_bit(sketched / fmt.SKETCH / fmt.chunk_name(0, 2), 9)
    stray = chunk(sketched, 0, len(STEPS) + 1)
    stray.write_bytes(b"of a newer commit")
    found = {(Path(d.file).name, d.array, d.step) for d in verify_store(sketched).damaged}
    assert found == {
        (stray.name, fmt.WEIGHTS, None),
        ("c.0.0", fmt.WEIGHTS, STEPS[0]),
        ("c.2.0", fmt.WEIGHTS, STEPS[0]),
        ("c.1.1", fmt.WEIGHTS, STEPS[1]),
        ("c.0.2", fmt.SKETCH, STEPS[2]),
    }
    quick = {(Path(d.file).name, d.array) for d in verify_store(sketched, quick=True).damaged}
    assert quick == {(stray.name, fmt.WEIGHTS), ("c.0.0", fmt.WEIGHTS), ("c.2.0", fmt.WEIGHTS)}


def test_verify_beside_a_recorder_raises_no_alarm(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorder is two snapshots on before the files are looked at."""
    journal = Journal.open(store)
    opened = StoreView.open

    def open_and_go_on(path: Path) -> StoreView:
        view = opened(path)
        for step in (90, 91):
            append(journal, step, loss=1.0)
        return view

    monkeypatch.setattr(StoreView, "open", staticmethod(open_and_go_on))
    assert verify_store(store).damaged == []
    journal.close()


@both_chains
def test_verify_counts_what_it_read(sketched: Path, chain: str) -> None:
    found = verify_store(sketched)
    assert found.chunks_checked == len(STEPS) * (N_CHUNKS + 1)
    files = [file for name in (fmt.WEIGHTS, fmt.SKETCH) for file in (sketched / name).glob("c.*")]
    assert found.bytes_checked == sum(map(size_of, files)) == StoreView.open(sketched).stored_bytes
    plain = len(STEPS) * (N_CHUNKS * SIZE + 4 * (N - 30) + 4)
    assert found.bytes_checked == plain if chain == "plain" else found.bytes_checked < plain
    assert verify_store(sketched, quick=True).bytes_checked == 0


def test_a_damage_says_where_it_is_as_json_too(store: Path) -> None:
    chunk(store).unlink()
    (found,) = verify_store(store).damaged
    assert found.to_json() == {
        "file": str(chunk(store)),
        "array": "weights",
        "problem": "is missing",
        "step": STEPS[T],
        "rows": (ROWS, 2 * ROWS - 1),
        "tensors": "embed.weight +1",
    }


# ---- sketch and small arrays ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ABSENT | FLIPPED)
def test_a_damaged_sketch_is_an_error_when_a_sample_is_drawn(sketched: Path, kind: str) -> None:
    file = sketched / fmt.SKETCH / fmt.chunk_name(0, T)
    DAMAGE[kind](file)
    traj = Trajectory.open(sketched)
    sample = draw_sample(traj.parameters, 100, "layer-balanced", 0)
    assert sample.from_candidates
    with pytest.raises(StoreCorrupt) as caught:
        traj.read_rows(sample.rows)
    assert (caught.value.file, caught.value.step) == (str(file), STEPS[T])
    found = verify_store(sketched).damaged
    assert [(damage.file, damage.array, damage.step) for damage in found] == [(str(file), "sketch", STEPS[T])]


@pytest.mark.parametrize(
    "kind", ["missing", "empty", "a directory", "a symbolic link", "a FIFO", "the first bit"]
)
@pytest.mark.parametrize("name", [fmt.STEP, "loss", fmt.SKETCH_ROW])
def test_a_damaged_small_array_is_an_error_on_opening(sketched: Path, name: str, kind: str) -> None:
    file = sketched / name / fmt.chunk_name(0)
    DAMAGE[kind](file)
    with pytest.raises(StoreCorrupt) as caught:
        Trajectory.open(sketched)
    assert caught.value.file == str(file)
    (found,) = verify_store(sketched).damaged
    assert found.file == str(file)


def test_a_small_array_with_other_values_is_an_error_though_its_crc_is_right(sketched: Path) -> None:
    file = sketched / "loss" / fmt.chunk_name(0)
    values = np.frombuffer(file.read_bytes()[:-4], dtype="<f8").copy()
    values[1] = 77.0
    file.write_bytes(values.tobytes() + crc32c(values))
    with pytest.raises(StoreCorrupt, match="committed values"):
        Trajectory.open(sketched)


def test_what_lies_beyond_the_last_snapshot_in_a_small_array_is_ignored(sketched: Path) -> None:
    file = sketched / "loss" / fmt.chunk_name(0)
    values = np.frombuffer(file.read_bytes()[:-4], dtype="<f8").copy()
    values[len(STEPS) :] = 77.0
    file.write_bytes(values.tobytes() + crc32c(values))
    assert Trajectory.open(sketched).scalars["loss"].tolist() == [s / 4 for s in STEPS]


# ---- one chunk file -------------------------------------------------------------------------------------


def test_a_chunk_comes_back_as_it_was_written(tmp_path: Path) -> None:
    file, values = tmp_path / "c.0.0", np.arange(300, dtype="<f4")
    file.write_bytes(values.tobytes() + crc32c(values))
    out = np.empty(300, "<f4")
    assert read_chunk(file, out) == crc32c(values) == stored_crc(file, 1200)
    assert np.array_equal(out, values)
    assert read_chunk(file, out, crc32c(values)) == crc32c(values)
    with pytest.raises(ChunkDamage, match="not the chunk that was committed"):
        read_chunk(file, out, b"\0\0\0\0")


@pytest.mark.parametrize("name", ["step", "loss", "sketch_row"])
@pytest.mark.parametrize("file", ["c.0", "zarr.json"])
def test_damage_to_a_small_array_hides_no_damage_to_a_chunk(sketched: Path, name: str, file: str) -> None:
    flip_bit(sketched / name / file, 100)
    flip_bit(chunk(sketched), 100)
    first, second = verify_store(sketched).damaged
    assert (first.array, Path(first.file)) == (name, sketched / name / file)
    assert (second.array, second.step, Path(second.file)) == (fmt.WEIGHTS, STEPS[T], chunk(sketched))


def test_every_chunk_is_read_whatever_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that end inside, at the end of, and beyond a chunk."""
    store = build_store(tmp_path / "run.zarr")
    for piece in (1, 1000, 1024, 4096):
        monkeypatch.setattr("cmdgpu.store.scan.PIECE", piece)
        assert verify_store(store).damaged == []
        for bit in (0, 8 * 1000, 8 * 1023 + 7, 8 * SIZE - 1):
            flip_bit(chunk(store), bit)
            assert [Path(damage.file) for damage in verify_store(store).damaged] == [chunk(store)]
            flip_bit(chunk(store), bit)
