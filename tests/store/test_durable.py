"""Laws of the system calls below the store: a file is there whole or not at all, a lock has one holder."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cmdgpu.errors import StoreExists, StoreLocked, WriteFailed
from cmdgpu.store import durable
from cmdgpu.store.journal import Journal
from tests.faults.disk import Disk, every_fault
from tests.verbs import append, build_store, check_store_holds, create_store, leftovers


def test_a_file_is_put_down_whole_in_whatever_pieces_it_comes(tmp_path: Path) -> None:
    parts = [b"ab", bytearray(b"c" * 5000), memoryview(b"d" * 3), b""]
    with Disk().in_place():  # writes short
        durable.write_file(tmp_path, "f", parts)
    assert (tmp_path / "f").read_bytes() == b"".join(parts)
    assert leftovers(tmp_path) == []


def test_at_any_fault_the_old_file_stays(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"old")
    for disk in every_fault("disk", least=5):
        try:
            with disk.in_place():
                durable.write_file(tmp_path, "f", [b"new" * 400])
        except WriteFailed as error:
            assert error.file == str(tmp_path / "f")
            assert (tmp_path / "f").read_bytes() == b"old"
        assert leftovers(tmp_path) == []
    assert (tmp_path / "f").read_bytes() == b"new" * 400


def test_what_makes_the_bytes_may_fail_too(tmp_path: Path) -> None:
    def parts() -> Iterator[bytes]:
        yield b"x" * 100
        raise KeyError("no more")

    with pytest.raises(KeyError):
        durable.write_file(tmp_path, "f", parts())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, words in (
        (errno.ENOSPC, "disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EIO, "Input/output"),
    ):

        def refuse(fd: int, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(durable, "flush_file", refuse)
        with pytest.raises(WriteFailed, match=words) as caught:
            durable.write_file(tmp_path, "f", [b"x"])
        assert caught.value.hint is not None


def test_a_planted_temporary_file_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "precious"
    target.write_bytes(b"precious")

    def guessed(name: str) -> str:
        return f"{name}.guessed.partial"

    monkeypatch.setattr(durable, "partial_name", guessed)
    (tmp_path / "f.guessed.partial").symlink_to(target)
    with pytest.raises(WriteFailed):
        durable.write_file(tmp_path, "f", [b"x"])
    assert target.read_bytes() == b"precious"


def test_temporary_names_do_not_repeat() -> None:
    names = {durable.partial_name("c.0.0") for _ in range(1000)}
    assert len(names) == 1000
    assert all(name.startswith("c.0.0.") and name.endswith(durable.PARTIAL) for name in names)


@pytest.mark.parametrize("kind", ["file", "empty", "full", "dangling"])
def test_a_directory_is_never_published_over_anything(tmp_path: Path, kind: str) -> None:
    final, finished = tmp_path / "final", tmp_path / "finished"
    finished.mkdir()
    if kind == "file":
        final.write_text("x")
    elif kind == "dangling":
        final.symlink_to(tmp_path / "nowhere")
    else:
        final.mkdir()
        if kind == "full":
            (final / "x").write_text("x")
    with pytest.raises(StoreExists) as caught:
        durable.publish_directory(finished, final)
    assert caught.value.file == str(final)
    assert finished.is_dir()


def test_only_what_is_unfinished_is_removed(tmp_path: Path) -> None:
    (tmp_path / "a.partial").write_text("x")
    (tmp_path / "b.partial").mkdir()
    (tmp_path / "b.partial" / "inside").write_text("x")
    (tmp_path / "a.partial.kept").write_text("x")
    (tmp_path / "outside").mkdir()
    (tmp_path / "link.partial").symlink_to(tmp_path / "outside")
    durable.remove_partials(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"a.partial.kept", "outside", "link.partial"}


def test_recording_through_a_symbolic_link_to_the_users_folder_works(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    store = build_store(tmp_path / "runs" / "run.zarr")
    (tmp_path / "mine.zarr").symlink_to(store)
    journal = Journal.open(tmp_path / "mine.zarr")
    append(journal, 99, loss=24.75, fresh=1.0)
    journal.close()
    check_store_holds(tmp_path / "disk" / "run.zarr", [0, 10, 25, 99], ["fresh", "loss"])


# ---- the lock -------------------------------------------------------------------------------------------


def test_a_lock_has_one_holder_and_is_free_once_released(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    path = tmp_path / "weights" / ".lock"
    first = durable.Lock(path)
    with pytest.raises(StoreLocked, match=f"process {os.getpid()}") as caught:
        durable.Lock(path)
    assert caught.value.hint is not None
    first.release()
    first.release()
    durable.Lock(path).release()


_HOLD = """
import os, sys
from pathlib import Path
from cmdgpu.store.journal import Journal
journal = Journal.open(Path(sys.argv[1]))
child = os.fork()
if child == 0:
    sys.stdin.read()  # a data-loader worker that outlives its parent
    os._exit(0)
print(os.getpid(), flush=True)
sys.stdin.read(1)
"""


def test_a_killed_recorder_holds_no_lock_though_its_forked_child_lives(tmp_path: Path) -> None:
    store = tmp_path / "run.zarr"
    create_store(store).close()
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(store)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        assert int(holder.stdout.readline()) == holder.pid
        with pytest.raises(StoreLocked, match=f"process {holder.pid}"):
            Journal.open(store)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        journal = Journal.open(store)
        append(journal, 1)
        journal.close()
    finally:
        holder.kill()
        holder.stdin.close()  # the child ends with its input
        holder.stdout.close()
        holder.wait()
    check_store_holds(store, [1], [])


def test_a_lock_that_cannot_be_signed_is_held_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of the process is a courtesy; a full disk has no room for it."""

    class Full(Disk):
        def pwrite(self, *_: object) -> int:
            raise OSError(errno.ENOSPC, "no space")

    (tmp_path / "weights").mkdir()
    with Full().in_place():
        lock = durable.Lock(tmp_path / "weights" / ".lock")
        with pytest.raises(StoreLocked, match="process unknown"):
            durable.Lock(tmp_path / "weights" / ".lock")
    lock.release()


@pytest.mark.parametrize("n_bytes", [0, 5, (256 << 10) - 1, 256 << 10, (1 << 20) + 4097, 3 << 20])
@pytest.mark.parametrize("offset", [0, 64])
def test_what_goes_past_the_page_cache_arrives_whole(tmp_path: Path, n_bytes: int, offset: int) -> None:
    memory = mmap.mmap(-1, (4 << 20) + offset)
    memory[:] = np.random.default_rng(0).integers(256, size=len(memory), dtype=np.uint8).tobytes()
    part = memoryview(memory)[offset : offset + n_bytes]
    durable.write_file(tmp_path, "file", [part, b"tail"], cached=False)
    assert (tmp_path / "file").read_bytes() == bytes(part) + b"tail"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("refused", ["flag", "write"])
def test_a_filesystem_without_direct_writes_is_written_through_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    inner_flag, inner_write, calls = fcntl.fcntl, os.write, list[str]()

    def fcntl_(fd: int, command: int, flags: int = 0) -> int:
        if command == fcntl.F_SETFL and flags:
            calls.append("flag")
            if refused == "flag":
                raise OSError(errno.EINVAL, "no")
        return inner_flag(fd, command, flags)

    def write(fd: int, data: memoryview) -> int:
        if refused == "write" and inner_flag(fd, fcntl.F_GETFL) & os.O_DIRECT:
            calls.append("write")
            raise OSError(errno.EINVAL, "no")
        return inner_write(fd, data)

    monkeypatch.setattr("cmdgpu.store.durable.fcntl.fcntl", fcntl_)
    monkeypatch.setattr("cmdgpu.store.durable.os.write", write)
    memory = mmap.mmap(-1, 1 << 20)
    memory[:] = b"x" * len(memory)
    durable.write_file(tmp_path, "file", [memoryview(memory)], cached=False)
    assert (tmp_path / "file").read_bytes() == b"x" * (1 << 20)
    assert refused in calls


def test_a_full_disk_past_the_cache_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("cmdgpu.store.durable.os.write", full)
    with pytest.raises(WriteFailed, match="the disk is full"):
        durable.write_file(tmp_path, "file", [memoryview(mmap.mmap(-1, 1 << 20))], cached=False)
    assert list(tmp_path.iterdir()) == []
