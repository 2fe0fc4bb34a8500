"""Laws of a server that is not believed: it counts what it serves here, fails, and lies when told to."""

from __future__ import annotations

import tracemalloc
from collections.abc import Generator, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from cmdgpu import CMD, Trajectory
from cmdgpu.errors import CmdgpuError, RemoteFailed, StoreCorrupt, UsageError
from cmdgpu.sources import StoreSource
from cmdgpu.store import remote_obstore
from cmdgpu.store.chunks import ChunkDamage, check_chunk, read_chunk
from cmdgpu.store.places import place_of
from cmdgpu.store.remote_obstore import ObjectClient
from cmdgpu.store.verification import verify_store
from cmdgpu.store.view import StoreView
from tests.harness import planted, run_cli, write_store
from tests.remote.servers import Answer, Lie, WebServer, web_server

ROWS: Final = 1024
N: Final = 40 * ROWS - 17
T: Final = 5
CHUNK_BYTES: Final = 4 * ROWS + 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("lies")
    W = planted(N, T, 3)
    write_store(here / "run.zarr", W, rows=ROWS)
    write_store(here / "small.zarr", W[: 2 * ROWS], rows=ROWS, compressed=True)
    CMD(n_modes=3, n_samples=200, device="cpu").fit(
        Trajectory.open(here / "run.zarr"), out=here / "run.cmd.zarr"
    )
    return here


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[WebServer]:
    monkeypatch.setattr(
        remote_obstore,
        "_RETRIES",
        {
            "max_retries": 2,
            "backoff": {
                "init_backoff": timedelta(milliseconds=1),
                "max_backoff": timedelta(milliseconds=5),
                "base": 2,
            },
            "retry_timeout": timedelta(seconds=10),
        },
    )
    with web_server(folder) as found:
        yield found


def test_a_trajectory_and_a_result_are_read_from_a_plain_web_server(server: WebServer, folder: Path) -> None:
    here = Trajectory.open(folder / "run.zarr")
    there = Trajectory.open(f"{server.url}/run.zarr")
    assert there[:, :].tobytes() == here[:, :].tobytes() and there.verify() == []
    loaded = CMD.load(f"{server.url}/run.cmd.zarr")
    assert np.array_equal(np.asarray(loaded.a_), np.asarray(CMD.load(folder / "run.cmd.zarr").a_))
    assert loaded.state_dict(2).keys() == {"W"}, "its trajectory is found beside it"
    with pytest.raises(RemoteFailed, match="cannot list"):
        CMD(n_samples=200, device="cpu").fit(here, out=f"{server.url}/out")


def test_sampling_reads_the_sketch_and_the_tails_and_nothing_else(server: WebServer) -> None:
    traj = Trajectory.open(f"{server.url}/run.zarr")
    assert isinstance(traj.source, StoreSource)
    sketch = traj.source.view.sketch_rows
    assert sketch is not None
    server.served.clear()
    traj.read_rows(sketch[:1000])
    chunks = [n for _, path, n in server.served if "/weights/c." in path]
    sketches = [n for _, path, n in server.served if "/sketch/c." in path and n > 4]
    assert chunks == [4] * (40 * T), "four bytes of every chunk, once"
    assert sketches == [4 * len(sketch) + 4] * T
    assert server.served_bytes == sum(chunks) + sum(sketches) + 4 * T


def test_a_pass_reads_every_byte_once(server: WebServer) -> None:
    traj = Trajectory.open(f"{server.url}/run.zarr")
    server.served.clear()
    CMD(n_modes=3, n_samples=200, device="cpu").fit(traj)
    whole = [path for _, path, n in server.served if n == CHUNK_BYTES and "/weights/" in path]
    assert len(whole) == len(set(whole)) == 40 * T


# ---- lies -----------------------------------------------------------------------------------------------


def only(path: str, lie: Lie) -> Lie:
    return lambda asked, answer: lie(asked, answer) if asked.endswith(path) else answer


def less(_: str, answer: Answer) -> Answer:
    """Half of what it says."""
    return Answer(
        answer.status,
        {**answer.headers, "Content-Length": str(len(answer.body))},
        answer.body[: len(answer.body) // 2],
    )


def shorter(_: str, answer: Answer) -> Answer:
    """A whole answer, of half the object."""
    return Answer(200, {}, answer.body[: len(answer.body) // 2])


def longer(_: str, answer: Answer) -> Answer:
    return Answer(200, {}, answer.body + b"more")


def no_ranges(_: str, answer: Answer) -> Answer:
    """The whole object where a range was asked for."""
    return Answer(200, {}, b"x" * CHUNK_BYTES) if answer.status == 206 else answer


def other_range(_: str, answer: Answer) -> Answer:
    if answer.status != 206:
        return answer
    return Answer(206, {**answer.headers, "Content-Range": f"bytes 0-3/{CHUNK_BYTES}"}, answer.body)


def huge(_: str, answer: Answer) -> Answer:
    """A terabyte, to begin with."""
    return Answer(answer.status, {**answer.headers, "Content-Length": str(1 << 40)}, answer.body)


def in_numbers(_: str, answer: Answer) -> Answer:
    """A size that is another object's, in the answer to a range."""
    if answer.status != 206:
        return answer
    start = CHUNK_BYTES - 4
    return Answer(
        206, {**answer.headers, "Content-Range": f"bytes {start}-{start + 3}/{1 << 40}"}, answer.body
    )


@pytest.mark.parametrize("lie", [less, shorter, longer, huge], ids=lambda lie: lie.__name__)
@pytest.mark.parametrize("path", ["/weights/c.3.2", "/step/c.0", "/weights/zarr.json"])
def test_a_body_of_another_length_is_an_error_naming_the_url(server: WebServer, lie: Lie, path: str) -> None:
    server.lie = only(path, lie)
    tracemalloc.start()
    try:
        with pytest.raises((StoreCorrupt, RemoteFailed)) as raised:
            view = StoreView.open(place_of(f"{server.url}/run.zarr"))
            view.read_chunk(3, 2, np.empty(ROWS, np.float32))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20, "nothing is taken on its word"
    finally:
        tracemalloc.stop()
    assert raised.value.file == f"{server.url}/run.zarr{path}"
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize("lie", [no_ranges, other_range, in_numbers], ids=lambda lie: lie.__name__)
@pytest.mark.parametrize("store", ["run.zarr", "small.zarr"])
def test_a_range_that_was_not_asked_for_is_an_error(server: WebServer, lie: Lie, store: str) -> None:
    server.lie = only("/weights/c.1.2", lie)
    with pytest.raises((StoreCorrupt, RemoteFailed)) as raised:
        StoreView.open(place_of(f"{server.url}/{store}")).crcs(2)
    assert raised.value.file == f"{server.url}/{store}/weights/c.1.2"


class Miscounted(ObjectClient):
    """A library that hands over other bytes than it told of."""

    more: int

    def get(self, key: str, most: int) -> tuple[int, Iterator[bytes]]:
        size, pieces = super().get(key, most)
        data = b"".join(pieces)
        return size, iter([data[:7], data[7:] + b"x" * self.more if self.more > 0 else data[7 : self.more]])


@pytest.mark.parametrize("more", [-5, -1, 1, 1 << 20])
def test_what_arrives_is_counted(server: WebServer, more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    client = Miscounted(server.url)
    client.more = more
    monkeypatch.setattr("cmdgpu.store.places.client_of", lambda root: client)  # pyright: ignore[reportUnknownLambdaType,reportUnknownArgumentType]
    for store, array in (
        ("run.zarr", np.empty(ROWS, np.float32)),
        ("small.zarr", np.empty(ROWS, np.float32)),
    ):
        chunk = place_of(f"{server.url}/{store}/weights/c.1.2")
        with pytest.raises(ChunkDamage, match="arrived as"):
            read_chunk(chunk, array, compressed=store == "small.zarr")
    with pytest.raises(ChunkDamage, match="arrived as"):
        check_chunk(place_of(f"{server.url}/run.zarr/weights/c.1.2"), 4 * ROWS, np.empty(9, np.uint8))
    with pytest.raises(StoreCorrupt, match="arrived as"):
        StoreView.open(place_of(f"{server.url}/run.zarr"))


def test_other_bytes_of_the_right_length_are_damage(server: WebServer) -> None:
    server.lie = only("/weights/c.1.2", lambda _, a: Answer(a.status, a.headers, bytes(len(a.body))))
    damaged = verify_store(place_of(f"{server.url}/run.zarr")).damaged
    assert [d.file for d in damaged] == [f"{server.url}/run.zarr/weights/c.1.2"]
    with pytest.raises(StoreCorrupt, match="not the ones that were committed"):
        StoreView.open(place_of(f"{server.url}/run.zarr")).crcs(2)


# ---- failures -------------------------------------------------------------------------------------------


def test_an_error_that_passes_is_not_noticed(server: WebServer) -> None:
    failed = set[str]()

    def once(path: str, answer: Answer) -> Answer:
        if path in failed:
            return answer
        failed.add(path)
        return Answer(503, {}, b"slow down")

    server.lie = once
    assert Trajectory.open(f"{server.url}/run.zarr")[5, 2] == pytest.approx(planted(N, T, 3)[5, 2])
    assert len(failed) > 40


def test_an_error_that_stays_is_no_damage(server: WebServer) -> None:
    server.lie = only("/weights/c.1.2", lambda _, __: Answer(500, {}, b"<?xml?><Code>InternalError</Code>"))
    url = f"{server.url}/run.zarr"
    for command in (["verify", url], ["fit", url, "-o", "unused.cmd.zarr", "--samples", "200", "-q"]):
        ended = run_cli(*command)
        assert ended.code == 1 and len(ended.err.splitlines()) == 1 and "damaged" not in ended.out
        assert f"{url}/weights/c.1.2: cannot read" in ended.err and "500" in ended.err


def test_a_server_that_is_gone_is_one_line(server: WebServer, folder: Path) -> None:
    with web_server(folder) as short_lived:
        gone = short_lived.url
    ended = run_cli("inspect", f"{gone}/run.zarr")
    assert ended.code == 1 and len(ended.err.splitlines()) == 1 and f"{gone}/run.zarr" in ended.err
    ended = run_cli("inspect", f"{server.url}/nothing.zarr")
    assert ended.code == 2 and "there is nothing here" in ended.err
    with pytest.raises((CmdgpuError, UsageError)):
        Trajectory.open(f"{server.url}/run.zarr/weights")
