"""The compiled kernel: its build, its refusals, its strides and spans; the laws say what it computes."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cmdgpu_kernels import (
    IMPLEMENTATIONS,
    Problem,
    References,
    RowFit,
    assign_and_fit,
    assign_and_fit_reference,
    can_fit_files,
    choose,
    fit_files,
    limits,
    prepare_references,
)
from cmdgpu_kernels.assignment import from_files, native_impl, torch_impl
from cmdgpu_kernels.class_sums import FIELDS as SUMS
from cmdgpu_kernels.class_sums import IMPLEMENTATIONS as SUMMING
from cmdgpu_kernels.class_sums import N_BINS, class_sums, reference
from cmdgpu_kernels.class_sums import native_impl as sums_impl
from cmdgpu_kernels.native import files, library
from crc32c import crc32c
from torch import Tensor

from cmdgpu import ops
from tests.page_cache import evict, is_cached

ROOT = Path(__file__).resolve().parent.parent.parent
PROBLEM = Problem("float32", 9, 2, "cpu")
ON_CPU = [i.name for i in IMPLEMENTATIONS if not i.refusals(PROBLEM) and i.name != "triton-interpreted"]
HERE = [path for path in library.PATHS if not native_impl.refusals(path, PROBLEM)]
native = pytest.mark.skipif(not HERE, reason="no compiled kernel here: see `cmdgpu doctor`")
FIELDS = ("mode", "a", "b", "correlation", "ss", "margin")


@pytest.fixture
def hook() -> Any:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def libraries(tmp_path: Path, hook: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place for them, where hook and kernel look; what is known of this machine is forgotten."""
    monkeypatch.setattr(hook, "LIBRARIES", tmp_path / "lib")
    monkeypatch.setattr(library, "LIBRARIES", tmp_path / "lib")
    for cached in ("_absent", "load"):
        monkeypatch.setattr(library, cached, getattr(library, cached).__wrapped__)
    return tmp_path / "lib"


def walks(snapshots: int, rows: int, modes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(snapshots, rows, generator=generator).cumsum(0)
    return W, torch.randn(modes, snapshots, generator=generator).cumsum(1)


# ---- building ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"CMDGPU_NATIVE": "0"}, "switched off by CMDGPU_NATIVE=0"),
        ({"PATH": "", "CXX": ""}, "no C++ compiler was found"),
        ({"CXX": "false"}, "false failed: no message"),
        ({"CXX": "no-such-compiler -x"}, "could not be run"),
    ],
)
def test_an_install_without_a_compiler_leaves_the_reason_and_torch_serves(
    hook: Any, libraries: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], said: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert hook.compile_all() == []
    chosen, refused = choose(PROBLEM)
    assert chosen.name == "torch"
    for path in library.PATHS:
        (reason,) = refused[f"native-{path}"]
        assert said in reason, reason
    (libraries / "report.txt").unlink()
    assert "built without compiled kernels" in choose(PROBLEM)[1]["native-avx2"][0]


@native
def test_what_a_compiler_builds_is_used_and_what_it_cannot_is_told(
    hook: Any, libraries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hook, "TARGETS", {**hook.TARGETS, "avx512": ["-march=no-such-level"]})
    built = hook.compile_all()
    assert "baseline" in built and "avx512" not in built
    assert native_impl.refusals("baseline", PROBLEM) == ()
    (reason,) = native_impl.refusals("avx512", PROBLEM)
    assert "no-such-level" in reason or "is for x86-64" in reason


@native
def test_a_library_of_another_source_is_not_used(
    hook: Any, libraries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "native.cpp").write_bytes(hook.SOURCE.read_bytes() + b"\n")
    monkeypatch.setattr(hook, "SOURCE", tmp_path / "native.cpp")
    assert "baseline" in hook.compile_all()
    assert "another native.cpp: install cmdgpu again" in native_impl.refusals("baseline", PROBLEM)[0]
    (libraries / "avx2.so").write_bytes(b"no library")
    monkeypatch.setattr(library, "_features", lambda: library.PATHS["avx2"])
    assert "cannot be loaded" in native_impl.refusals("avx2", PROBLEM)[0]


@native
def test_a_cpu_without_the_instructions_is_refused_by_name(
    hook: Any, libraries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "avx2" not in hook.compile_all():
        pytest.skip("no x86-64")
    monkeypatch.setattr(library, "_features", lambda: library.PATHS["avx2"] - {"fma"})
    assert native_impl.refusals("avx2", PROBLEM) == ("this CPU lacks fma",)
    assert native_impl.refusals("baseline", PROBLEM) == ()


def test_the_source_and_the_python_side_agree_on_the_constants() -> None:
    source = library.SOURCE.read_text()
    for name in ("PARTIAL", "CONSTANT", "NOT_FINITE"):
        found = re.search(rf"\b{name} = (-?\d+)", source)
        assert found is not None and int(found[1]) == getattr(limits, name), name
    assert f"{limits.SMALLEST_SS:.0e}" == "1e-38" and "0x1p-126f" in source
    assert np.float32("3.40282347e38") == np.float32(limits.LARGEST_SS)
    assert f"sweep<{native_impl.WIDEST}>" in source and f"sweep<{native_impl.WIDEST + 1}>" not in source
    structs: list[tuple[str, Any]] = [
        ("Set", native_impl._Set),  # pyright: ignore[reportPrivateUsage]
        ("Arguments", native_impl._Arguments),  # pyright: ignore[reportPrivateUsage]
        ("SumArguments", sums_impl._Arguments),  # pyright: ignore[reportPrivateUsage]
        ("Files", files.Files),
        ("Pieces", from_files._Pieces),  # pyright: ignore[reportPrivateUsage]
    ]
    for struct, declared in structs:  # pyright: ignore[reportPrivateUsage]
        body = re.search(rf"struct {struct} \{{(.*?)\n\}};", source, re.DOTALL)
        assert body is not None
        names = re.findall(r"(\w+)(?=[,;])", re.sub(r"//.*", "", body[1]))
        assert names == [field[0] for field in declared._fields_], struct
    for name, value in (("FIRST_MODE", reference.FIRST_MODE), ("N_BINS", N_BINS), ("FIELDS", len(SUMS))):
        assert f"{name} = {value}" in source, name
    assert reference.GRANULE == 1 << 14 and "GRANULE = 1 << 14" in source


# ---- computing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_sixteen_bit_number_is_read_exactly(name: str, dtype: torch.dtype) -> None:
    """With one snapshot a row is its own mean."""
    W = torch.arange(1 << 16).to(torch.uint16).view(dtype)[None]
    fit = assign_and_fit(W, np.empty((0, 1)), implementation=name)
    finite = torch.isfinite(W[0])
    assert (fit.mode == torch.where(finite, -1, -2)).all()
    assert torch.equal(fit.b[finite], W[0].float()[finite])
    turned = assign_and_fit(W.T.contiguous(), np.empty((0, 1)), implementation=name, time_major=False)
    assert torch.equal(fit.b[finite], turned.b[finite]) and torch.equal(fit.mode, turned.mode)


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("modes", [*range(1, 14), 64, 100, 1000])
def test_any_number_of_references_equals_the_definition(name: str, modes: int) -> None:
    W, R = walks(70, 150, modes, seed=modes)
    fit = assign_and_fit(W, R, implementation=name, margin=True)
    want = assign_and_fit_reference(W.double().numpy(), R.double().numpy())
    sure = want.margin > 1e-5
    assert np.array_equal(fit.mode.numpy()[sure], want.mode[sure]) and sure.mean() > 0.95
    assert fit.margin is not None and np.abs(fit.margin.numpy() - want.margin).max() <= 1e-5
    same = fit.mode.numpy() == want.mode
    assert np.abs(fit.correlation.numpy() - want.correlation)[same].max() <= 3e-6


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("snapshots", [1023, 1024, 1025, 2100])
def test_snapshots_beyond_one_buffer_equal_the_definition(name: str, snapshots: int) -> None:
    W, R = walks(snapshots, 70, 9, seed=snapshots)
    fit = assign_and_fit(W, R, implementation=name)
    want = assign_and_fit_reference(W.double().numpy(), R.double().numpy())
    sure = want.margin > 1e-5
    assert np.array_equal(fit.mode.numpy()[sure], want.mode[sure])
    assert np.abs(fit.correlation.numpy() - want.correlation)[sure].max() <= 3e-6
    assert np.abs(fit.ss.numpy() / want.ss - 1).max() <= 6e-6


@pytest.mark.parametrize("path", HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("snapshots", [1, 7, 16, 100, 1090])
def test_any_strides_give_the_same_bits(path: str, dtype: torch.dtype, snapshots: int) -> None:
    exact, R = walks(snapshots, 200, 0 if snapshots == 1 else 7)
    W = exact.to(dtype)
    name = f"native-{path}"
    plain = assign_and_fit(W, R, implementation=name, margin=True)
    wide = torch.zeros(2 * snapshots, 600, dtype=dtype)
    wide[::2, ::3] = W
    for other in (
        assign_and_fit(wide[::2, ::3], R, implementation=name, margin=True),
        assign_and_fit(wide[::2, ::3].T, R, implementation=name, margin=True, time_major=False),
        assign_and_fit(W.T.contiguous(), R, implementation=name, margin=True, time_major=False),
        assign_and_fit(W.T.contiguous().T, R, implementation=name, margin=True),
    ):
        for field in FIELDS:
            assert torch.equal(getattr(plain, field), getattr(other, field)), field


@pytest.mark.parametrize("path", HERE)
def test_a_row_has_the_same_bits_wherever_it_stands_in_its_tile(path: str) -> None:
    W, R = walks(100, 300, 11)
    name = f"native-{path}"
    whole = assign_and_fit(W, R, implementation=name, margin=True)
    for start in (1, 5, 63, 64, 130):
        part = assign_and_fit(W[:, start:], R, implementation=name, margin=True)
        for field in FIELDS:
            assert torch.equal(getattr(whole, field)[start:], getattr(part, field)), (start, field)


@pytest.mark.parametrize("path", HERE)
def test_the_memory_of_a_pass_does_not_grow_with_its_rows(path: str) -> None:
    small = native_impl.workspace_bytes(path, Problem("float32", 100, 10, "cpu"), 2)
    assert small < 1 << 20
    assert small < native_impl.workspace_bytes(path, Problem("float32", 2000, 1000, "cpu"), 2) < 20 << 20
    assert small < torch_impl.workspace_bytes(100, 10, 2)


_GUARDED = """
import ctypes, mmap, sys
import numpy as np, torch
from cmdgpu_kernels import assign_and_fit
page = mmap.PAGESIZE
pages = mmap.mmap(-1, 2 * page)
start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + page), page, 0) == 0
for rows, snapshots in ((70, 3), (1, 9), (63, 16), (64, 4), (65, 15)):
    for dtype in (torch.float32, torch.bfloat16):
        W = torch.frombuffer(pages, dtype=dtype, count=rows * snapshots,
                             offset=page - rows * snapshots * dtype.itemsize)
        W.copy_(torch.linspace(0, 1, len(W)))
        R = np.arange(float(snapshots))[None]
        for fit in (assign_and_fit(W.view(snapshots, rows), R, implementation=sys.argv[1]),
                    assign_and_fit(W.view(rows, snapshots), R, implementation=sys.argv[1], time_major=False)):
            assert (fit.mode == 0).all()
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="looks for x86's instruction")
@pytest.mark.parametrize("path", HERE)
def test_the_compiler_kept_what_asks_for_the_next_tile(path: str) -> None:
    """GCC once dropped every one of them, and two thirds of the speed: nothing else shows it."""
    prefetch = b"\x0f\x18"
    assert (library.LIBRARIES / f"{path}.so").read_bytes().count(prefetch) >= 3


@pytest.mark.parametrize("path", HERE)
def test_nothing_beyond_the_last_row_is_read(path: str) -> None:
    """The page after the block cannot be read: whoever tries is killed."""
    done = subprocess.run(
        [sys.executable, "-c", _GUARDED, f"native-{path}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-500:]


# ---- straight from files ----------------------------------------------------------------------------------

READING = [path for path in HERE if can_fit_files(f"native-{path}")]
SIZES = [0, 1, 7, 8, 9, 12_287, 12_288, 12_293, 262_143, 262_144, 262_145, 1_000_003]


def put(file: Path, values: bytes) -> bytes:
    """A file of elements and their CRC, which is returned."""
    crc = crc32c(values).to_bytes(4, "little")
    file.write_bytes(values + crc)
    return crc


@pytest.mark.skipif(not files.can_read(), reason="no compiled kernel that reads files")
@pytest.mark.parametrize("n_bytes", SIZES)
def test_files_of_any_size_are_read_into_their_place_and_checked(tmp_path: Path, n_bytes: int) -> None:
    values = np.random.default_rng(n_bytes).integers(0, 256, n_bytes).astype(np.uint8)
    kept = [put(tmp_path / name, values.tobytes()) for name in ("a", "b", "c")]
    places = [np.zeros(n_bytes, np.uint8) for _ in kept]
    assert files.read_checked(str(tmp_path), ["a", "b", "c"], n_bytes, places, kept) == []
    assert all(np.array_equal(place, values) for place in places)
    assert files.read_tails(str(tmp_path), ["a", "b", "c"], n_bytes) == kept


def write_files(folder: Path, W: Tensor) -> list[bytes]:
    """A file for each snapshot, and the CRCs that they carry."""
    return [put(folder / f"c.{t}", w.view(torch.uint8).numpy().tobytes()) for t, w in enumerate(W)]


def fit_written(
    folder: Path, kept: list[bytes], path: str, W: Tensor, sets: list[References], rows: int
) -> list[RowFit]:
    """The first ``rows`` rows of W, of which these files were written, against every set."""
    names = [f"c.{t}" for t in range(len(W))]
    dtype = str(W.dtype).removeprefix("torch.")
    fits = fit_files(f"native-{path}", dtype, sets, str(folder), names, W[0].nbytes, kept, rows, names)
    assert fits is not None
    return fits


def _damage(how: str, file: Path, n_bytes: int) -> None:
    raw = bytearray(file.read_bytes())
    match how:
        case "gone":
            file.unlink()
        case "short":
            file.write_bytes(raw[:-1])
        case "long":
            file.write_bytes(raw + b"x")
        case "a flipped bit":
            raw[n_bytes // 2] ^= 4
            file.write_bytes(raw)
        case "a flipped bit of the CRC":
            raw[-1] ^= 1
            file.write_bytes(raw)
        case "another whole file":
            put(file, bytes(n_bytes))
        case "a link":
            file.rename(file.with_name("elsewhere"))
            file.symlink_to("elsewhere")
        case _:
            file.unlink()
            os.mkfifo(file)


DAMAGES = [
    "gone", "short", "long", "a flipped bit", "a flipped bit of the CRC", "another whole file", "a link",
    "a FIFO",
]  # fmt: skip


@pytest.mark.skipif(not READING, reason="no compiled kernel that reads files")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux what its page cache holds")
@pytest.mark.parametrize("rows", [1, 1023, 1024, 3000, 40_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_past_the_page_cache_there_are_the_same_bits_and_nothing_stays_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(from_files, "SNAPSHOT_BYTES", 8192)
    monkeypatch.setattr(from_files, "PIECE_BYTES", 4096)
    walked, R = walks(7, rows, 2)
    W, names = walked.to(dtype), [f"c.{t}" for t in range(7)]
    kept = write_files(tmp_path, W)
    sets, name = [prepare_references(R)], str(dtype).removeprefix("torch.")

    def fitted(*, past_cache: bool) -> list[bytes]:
        fits = fit_files(
            f"native-{READING[0]}", name, sets, str(tmp_path), names, W[0].nbytes, kept, rows,
            past_cache=past_cache,
        )  # fmt: skip
        assert fits is not None
        return [getattr(fits[0], field).numpy().tobytes() for field in FIELDS[:-1]]

    if not all(evict(tmp_path / each) for each in names):
        pytest.skip("this file system keeps its files in memory")
    past = fitted(past_cache=True)
    assert not any(is_cached(tmp_path / each) for each in names)
    assert fitted(past_cache=False) == past
    assert all(is_cached(tmp_path / each) for each in names)
    assert fitted(past_cache=True) == past, "what is in memory is taken from there"
    evict(tmp_path / names[3])
    _damage("a flipped bit of the CRC", tmp_path / names[3], W[0].nbytes)
    evict(tmp_path / names[3])
    call = (f"native-{READING[0]}", name, sets, str(tmp_path), names, W[0].nbytes, kept, rows)
    assert fit_files(*call, past_cache=True) is None


@pytest.mark.skipif(not READING, reason="no compiled kernel that reads files")
@pytest.mark.parametrize("how", DAMAGES)
def test_a_file_that_is_not_what_was_kept_is_told_from_the_others(tmp_path: Path, how: str) -> None:
    W, R = walks(5, 3000, 2)
    names = [str(t) for t in range(5)]
    kept = [put(tmp_path / name, w.numpy().tobytes()) for name, w in zip(names, W, strict=True)]
    references = prepare_references(R)
    call = ("float32", [references, references], str(tmp_path), names, 12_000, kept, 3000)
    assert fit_files(f"native-{READING[0]}", *call) is not None
    _damage(how, tmp_path / "3", 12_000)
    places = [np.zeros(3000, np.float32) for _ in names]
    assert files.read_checked(str(tmp_path), names, 12_000, places, kept) == [3]
    assert np.array_equal(places[4], W[4].numpy())
    assert fit_files(f"native-{READING[0]}", *call) is None
    tails = files.read_tails(str(tmp_path), names, 12_000)
    assert tails == kept if how == "a flipped bit" else tails != kept


@pytest.mark.parametrize("path", READING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("snapshots", "rows", "live"),
    [(3, 512, 300), (100, 40_960, 40_960), (40, 30_000, 29_999), (2000, 1024, 77)],
)
def test_rows_straight_from_files_have_the_bits_of_a_block(
    tmp_path: Path, path: str, dtype: torch.dtype, snapshots: int, rows: int, live: int
) -> None:
    exact, R = walks(snapshots, rows, 8)
    W = exact.to(dtype)
    references = prepare_references(R)
    (fit,) = fit_written(tmp_path, write_files(tmp_path, W), path, W, [references], live)
    block = assign_and_fit(W[:, :live], references, implementation=f"native-{path}")
    for field in FIELDS[:-1]:
        assert torch.equal(getattr(fit, field), getattr(block, field)), field


def several_sets(snapshots: int) -> list[References]:
    """M of 0, 1, 2, 5, 10 and 33; equal and negated references in a set, equal ones in sets, in any order."""
    if snapshots == 1:
        return [prepare_references(np.empty((0, 1))) for _ in range(3)]
    R = walks(snapshots, 1, 40, seed=1)[1].numpy()
    rows = [[0, 1], [7], [], [1, 0, 2, 3, 4], [4, 2, 4, 0, 2], [*range(9, -1, -1)], [], [*range(5, 38)]]
    signs = [np.where(np.arange(len(row)) % 3 == 2, -1, 1)[:, None] for row in rows]
    return [
        prepare_references(R[row].reshape(-1, snapshots) * sign)
        for row, sign in zip(rows, signs, strict=True)
    ]


@pytest.mark.skipif(not READING, reason="no compiled kernel that reads files")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("snapshots", [1, 2, 3, 70, 1025])
def test_every_set_of_references_has_the_bits_of_a_call_of_its_own(
    tmp_path: Path, dtype: torch.dtype, snapshots: int
) -> None:
    exact, _ = walks(snapshots, 1000, 1)
    # Rows that never move, rows that are not finite.
    exact[:, 65], exact[:, 66] = exact[0, 65], 0
    exact[-1, 67], exact[0, 68], exact[:, 69] = float("nan"), float("inf"), float("-inf")
    W, sets = exact.to(dtype), several_sets(snapshots)
    kept = write_files(tmp_path, W)
    for path in READING:
        fits = fit_written(tmp_path, kept, path, W, sets, 997)
        for references, fit in zip(sets, fits, strict=True):
            (alone,) = fit_written(tmp_path, kept, path, W, [references], 997)
            for field in FIELDS[:-1]:
                got, want = getattr(fit, field), getattr(alone, field)
                assert torch.equal(got.view(torch.int16), want.view(torch.int16)), (references.modes, field)
            assert torch.equal(fit.mode[65:70], torch.tensor([-1, -1, -2, -2, -2], dtype=torch.int16))
            assert fit.ss is fits[0].ss and ((fit.mode >= 0).sum() > 900) == (references.modes > 0)


@pytest.mark.parametrize("path", READING)
def test_a_tie_goes_to_the_first_reference_of_its_own_set(tmp_path: Path, path: str) -> None:
    early, late = np.array([1.0, -1, 0, 0]), np.array([0.0, 0, 1, -1])
    sets = [prepare_references(np.stack(rows)) for rows in ((early, late), (late, early))]
    W = torch.tensor([[2.0], [-2], [2], [-2]]).repeat(1, 70)
    for fit in fit_written(tmp_path, write_files(tmp_path, W), path, W, sets, 70):
        assert torch.equal(fit.mode, torch.zeros(70, dtype=torch.int16))
        assert torch.equal(fit.correlation, torch.full((70,), 0.5**0.5))


@pytest.mark.skipif(not READING, reason="no compiled kernel that reads files")
def test_sets_that_share_references_multiply_them_once() -> None:
    sets = several_sets(70)
    path = READING[0]
    rows = [RowFit.empty(8, torch.device("cpu"), margin=False) for _ in sets]
    one_ss = [replace(fit, ss=rows[0].ss) for fit in rows]
    arguments = native_impl.Call(path, sets, one_ss, "float32").arguments
    distinct = {z.tobytes() for one in sets for z in one.z_mt[one.distinct]}
    assert sum(len(one.distinct) for one in sets) > len(distinct) + 6
    assert len(distinct) <= arguments.groups * arguments.width < len(distinct) + 6
    again = native_impl.Call(path, sets, one_ss, "float32").arguments
    assert again.z == arguments.z, "packed once"
    fewer = native_impl.Call(path, sets[:2], one_ss[:2], "float32").arguments
    assert fewer.groups * fewer.width == 3


@pytest.mark.skipif(not READING, reason="no compiled kernel that reads files")
@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="asks Linux what was read")
def test_files_are_read_once_for_all_sets(tmp_path: Path) -> None:
    W, _ = walks(70, 40_000, 1)
    kept, names = write_files(tmp_path, W), [f"c.{t}" for t in range(70)]

    def so_far() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    before, sets = so_far(), several_sets(70)
    fits = fit_files(f"native-{READING[0]}", "float32", sets, str(tmp_path), names, 160_000, kept, 40_000)
    assert fits is not None and W.nbytes <= so_far() - before < W.nbytes + 100_000


@pytest.mark.skipif(not READING, reason="no compiled kernel that reads files")
@pytest.mark.parametrize("snapshots", [70, 600])
def test_the_memory_of_sets_is_what_is_planned_for_all_their_references(
    tmp_path: Path, snapshots: int
) -> None:
    W, R = walks(snapshots, 512, 300)
    sets = [prepare_references(R[start:stop]) for start, stop in ((0, 2), (2, 100), (100, 300))]
    kept = write_files(tmp_path, W)
    with ThreadPoolExecutor(1) as fresh:  # without the buffer of an earlier call
        tracemalloc.start()
        try:
            fresh.submit(fit_written, tmp_path, kept, READING[0], W, sets, 512).result()
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    planned = ops.files_workspace_bytes("float32", snapshots, [2, 98, 200], 1)
    assert from_files.PIECE_BYTES // 2 + 300 * snapshots * 4 < peak < planned


# ---- sums by class ----------------------------------------------------------------------------------------


def fitted(rows: int, modes: int, seed: int = 0) -> dict[str, Any]:
    """Fits of every class: modes, constant and non-finite rows, |corr| up to 1, means far from 0."""
    rng = np.random.default_rng(seed)
    mode = rng.integers(-2, modes, rows).astype(np.int16)
    a, b = rng.standard_normal((2, rows)).astype(np.float32)
    correlation = np.tanh(4 * rng.standard_normal(rows)).astype(np.float32)
    correlation[:: max(rows // 7, 1)] = -1.0
    correlation[mode < 0] = 0
    ss = rng.exponential(1e-3, rows).astype(np.float32)
    a[mode < 0] = 0
    ss[mode == -1] = 0
    b[mode == -2] = ss[mode == -2] = np.nan
    return {"mode": mode, "a": a, "b": b, "correlation": correlation, "ss": ss}


@pytest.mark.parametrize("name", [i.name for i in SUMMING if not i.refusals(PROBLEM)])
@pytest.mark.parametrize("modes", [0, 1, 10, 500])
@pytest.mark.parametrize("rows", [0, 1, 1000, 40_000])
def test_every_implementation_gives_the_bits_of_the_sums_by_class(name: str, modes: int, rows: int) -> None:
    rows_of = fitted(rows, modes)
    means = np.linspace(-3, 3, modes)
    answers: list[tuple[bytes, bytes]] = []
    for implementation in ("numpy", name):
        sums, histogram = np.full((len(SUMS), 2 + modes), 0.5), np.ones((modes, N_BINS), np.int64)
        class_sums(
            **rows_of,
            reference_means=means,
            n_snapshots=64,
            epsilon=2.0**-10,
            sums=sums,
            histogram=histogram,
            implementation=implementation,
        )
        answers.append((sums.tobytes(), histogram.tobytes()))
        alone = np.zeros_like(sums)
        class_sums(
            **rows_of,
            reference_means=means,
            n_snapshots=64,
            epsilon=2.0**-10,
            sums=alone,
            histogram=None,
            implementation=implementation,
        )
        assert alone[0].sum() == rows and histogram.sum() - modes * N_BINS == (rows_of["mode"] >= 0).sum()
        assert rows < 1000 or modes == 0 or 0 < alone[5].sum() < rows
    assert answers[0] == answers[1]
