"""Laws of stores that are elsewhere: the same bits, the same refusals, no byte more than is needed."""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from cmdgpu import CMD, Recorder, Trajectory
from cmdgpu.errors import (
    CmdgpuError,
    NotAStore,
    RemoteFailed,
    StoreCorrupt,
    StoreExists,
    UsageError,
)
from cmdgpu.results import Result, begin_result, verify_result
from cmdgpu.results import remote as results
from cmdgpu.results.contract import ModeSet, Provenance, UnitRows
from cmdgpu.results.opened import open_parts
from cmdgpu.results.stored import StoredWriter
from cmdgpu.statistics import UnitStatistics
from cmdgpu.store import remote
from cmdgpu.store.places import RemotePath, place_of
from cmdgpu.store.verification import verify_store
from tests.harness import planted, run_cli, write_store
from tests.remote.servers import S3, Bucket, Memory, chunks, s3_server
from tests.verbs import tree_bytes

ROWS: Final = 256
N: Final = 4 * ROWS - 17
T: Final = 5
N_UNITS: Final = 4
KINDS: Final = ("memory", "s3")


def work(n_modes: int = 3) -> CMD:
    return CMD(n_modes=n_modes, n_samples=200, device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``run.zarr`` and ``small.zarr`` (compressed), each with its fit."""
    here = tmp_path_factory.mktemp("remote")
    W = planted(N, T, 3)
    for name, compressed in (("run", False), ("small", True)):
        write_store(here / f"{name}.zarr", W, rows=ROWS, compressed=compressed)
        work().fit(Trajectory.open(here / f"{name}.zarr"), out=here / f"{name}.cmd.zarr")
    return here


@pytest.fixture(scope="module")
def buckets(folder: Path) -> Generator[dict[str, Bucket]]:
    """The two stores in ``memory://`` and on a server that speaks S3."""
    with s3_server() as endpoint:
        found: dict[str, Bucket] = {"memory": Memory("laws"), "s3": S3(endpoint, "laws-of-remote")}
        for bucket in found.values():
            bucket.upload(folder / "run.zarr")
            bucket.upload(folder / "small.zarr")
        yield found


@pytest.fixture(params=KINDS)
def bucket(request: pytest.FixtureRequest, buckets: dict[str, Bucket]) -> Bucket:
    return buckets[request.param]


# ---- the same bits --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run", "small"])
def test_a_fit_elsewhere_leaves_the_bytes_of_a_fit_in_a_folder(
    bucket: Bucket, folder: Path, name: str
) -> None:
    url = f"{bucket.url}/{name}.cmd.zarr"
    cmd = work().fit(Trajectory.open(f"{bucket.url}/{name}.zarr"), out=url)
    expected = tree_bytes(folder / f"{name}.cmd.zarr")
    assert bucket.tree(f"{name}.cmd.zarr") == expected
    assert cmd.result.n_bytes == sum(map(len, expected.values()))
    loaded = CMD.load(url)
    assert np.array_equal(np.asarray(loaded.a_), np.asarray(CMD.load(folder / f"{name}.cmd.zarr").a_))
    assert loaded.state_dict(-1, buffers="recorded").keys() == {"W"}


def test_every_number_of_a_trajectory_is_the_one_in_the_folder(bucket: Bucket, folder: Path) -> None:
    for name in ("run", "small"):
        here, there = Trajectory.open(folder / f"{name}.zarr"), Trajectory.open(f"{bucket.url}/{name}.zarr")
        assert there[:, :].tobytes() == here[:, :].tobytes()
        assert there.stored_bytes == here.stored_bytes and there.steps.tolist() == here.steps.tolist()
        assert there.verify() == []


def test_commands_take_urls(bucket: Bucket, folder: Path, tmp_path: Path) -> None:
    store, out = f"{bucket.url}/run.zarr", f"{bucket.url}/by-command.cmd.zarr"
    fitted = run_cli("fit", store, "-o", out, "--modes", "3", "--samples", "200", "--device", "cpu", "--json")
    assert fitted.code == 0, fitted.err
    assert chunks(bucket.tree("by-command.cmd.zarr")) == chunks(tree_bytes(folder / "run.cmd.zarr"))
    for url in (store, out):
        checked = run_cli("verify", url, "--json").json
        assert checked["ok"] and checked["damaged"] == [] and checked["bytes_checked"] > 0
        here, there = (run_cli("inspect", place, "--json").json for place in (here_of(folder, url), url))
        assert {**here, "elapsed_s": 0} == {**there, "elapsed_s": 0}
        written = run_cli("export", url, "-o", tmp_path / "there.safetensors", "--step", "3")
        assert written.code == 0, written.err
        run_cli("export", here_of(folder, url), "-o", tmp_path / "here.safetensors", "--step", "3")
        assert (tmp_path / "there.safetensors").read_bytes() == (tmp_path / "here.safetensors").read_bytes()


def here_of(folder: Path, url: str) -> Path:
    return folder / url.rpartition("/")[2].replace("by-command", "run")


# ---- damage ---------------------------------------------------------------------------------------------

DAMAGE: Final[dict[str, tuple[Callable[[bytes], bytes] | None, str]]] = {
    "flipped": (lambda data: bytes([data[0] ^ 1]) + data[1:], "crc32c mismatch"),
    "cut": (lambda data: data[:-1], "holds 1027 bytes instead of 1028"),
    "emptied": (lambda data: b"", "holds 0 bytes instead of 1028"),
    "longer": (lambda data: data + b"\0", "holds 1029 bytes instead of 1028"),
    "deleted": (None, "is missing"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_an_error_on_use_and_named_by_verify(bucket: Bucket, how: str) -> None:
    edit, words = DAMAGE[how]
    key = "run.zarr/weights/c.2.4"
    whole = bucket.get(key)
    try:
        if edit is None:
            bucket.delete(key)
        else:
            bucket.put(key, edit(whole))
        (damage,) = verify_store(bucket.place("run.zarr")).damaged
        assert (damage.file, damage.problem) == (f"{bucket.url}/{key}", words)
        assert (damage.step, damage.rows) == (4, (2 * ROWS, 3 * ROWS - 1))
        with pytest.raises(StoreCorrupt, match=words) as raised:
            work().fit(Trajectory.open(f"{bucket.url}/run.zarr"))
        assert raised.value.file == f"{bucket.url}/{key}" and raised.value.tensor == "W"
        if how != "flipped":  # seen without its bytes
            assert len(verify_store(bucket.place("run.zarr"), quick=True).damaged) == 1
    finally:
        bucket.put(key, whole)


def test_a_swapped_chunk_and_a_damaged_document_are_told(bucket: Bucket) -> None:
    one, other = "run.zarr/weights/c.1.3", "run.zarr/weights/c.2.3"
    a, b = bucket.get(one), bucket.get(other)
    try:
        bucket.put(one, b)
        bucket.put(other, a)
        with pytest.raises(StoreCorrupt, match="swapped, stale or foreign"):
            Trajectory.open(f"{bucket.url}/run.zarr")[0, 3]
    finally:
        bucket.put(one, a)
        bucket.put(other, b)
    document = "run.zarr/weights/zarr.json"
    whole = bucket.get(document)
    try:
        bucket.put(document, whole.replace(b"float32", b"float16"))
        with pytest.raises(StoreCorrupt, match="does not match its own digest"):
            Trajectory.open(f"{bucket.url}/run.zarr")
        bucket.put(document, b"0" * (33 << 20))
        with pytest.raises(StoreCorrupt, match="more than 33554432"):
            Trajectory.open(f"{bucket.url}/run.zarr")
    finally:
        bucket.put(document, whole)


def test_a_damaged_result_is_named(bucket: Bucket) -> None:
    work().fit(Trajectory.open(f"{bucket.url}/run.zarr"), out=f"{bucket.url}/hurt.cmd.zarr")
    bucket.change("hurt.cmd.zarr/b/c.2", lambda data: data[:9] + bytes([data[9] ^ 4]) + data[10:])
    (damage,) = verify_result(bucket.place("hurt.cmd.zarr")).damaged
    assert damage.file == f"{bucket.url}/hurt.cmd.zarr/b/c.2" and damage.problem == "crc32c mismatch"
    with pytest.raises(StoreCorrupt, match=r"rows 512..767 of b: crc32c mismatch"):
        np.asarray(CMD.load(f"{bucket.url}/hurt.cmd.zarr").b_)


# ---- a result that is not finished ----------------------------------------------------------------------


class Stop(Exception):
    pass


def stopped_fit(bucket: Bucket, name: str, monkeypatch: pytest.MonkeyPatch, after: int = 2) -> str:
    """A fit that ends in the middle: the URL of what it left."""
    write, written = StoredWriter.write, list[int]()

    def write_some(self: StoredWriter, unit: int, *rest: object) -> None:
        if len(written) >= after:
            raise Stop
        written.append(unit)
        write(self, unit, *rest)  # pyright: ignore[reportArgumentType]

    url = f"{bucket.url}/{name}.cmd.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(StoredWriter, "write", write_some)
        with pytest.raises(Stop):
            work().fit(Trajectory.open(f"{bucket.url}/run.zarr"), out=url)
    return url


def test_a_stopped_fit_says_so_and_goes_on_to_the_same_bytes(
    bucket: Bucket, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = stopped_fit(bucket, "stopped", monkeypatch)
    with pytest.raises(CmdgpuError, match="this fit is not finished: 2 of 4 units done"):
        CMD.load(url)
    assert run_cli("inspect", url, "--json").json["units_done"] == 2
    assert run_cli("verify", url).code == 0
    cmd = work().fit(Trajectory.open(f"{bucket.url}/run.zarr"), out=url)
    assert cmd.metrics_["units_resumed"] == 2
    assert cmd.metrics_["bytes_read"] == (N_UNITS - 2) * ROWS * T * 4, "what was done is not read again"
    assert bucket.tree("stopped.cmd.zarr") == tree_bytes(folder / "run.cmd.zarr")


def test_a_unit_whose_record_vouches_for_other_bytes_is_computed_again(
    bucket: Bucket, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = stopped_fit(bucket, "torn", monkeypatch)
    one, other = sorted(k.split(".")[-2] for k in bucket.tree("torn.cmd.zarr") if k.startswith("done/c."))
    bucket.put(f"torn.cmd.zarr/a/c.{one}", bucket.get(f"torn.cmd.zarr/a/c.{other}"))
    work().fit(Trajectory.open(f"{bucket.url}/run.zarr"), out=url)
    assert bucket.tree("torn.cmd.zarr") == tree_bytes(folder / "run.cmd.zarr")


def test_another_fit_is_refused_naming_the_setting(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    traj, url = Trajectory.open(f"{bucket.url}/run.zarr"), stopped_fit(bucket, "other", monkeypatch)
    with pytest.raises(StoreExists, match=r"unfinished.*n_modes: 3 there, 2 asked"):
        work(2).fit(traj, out=url)
    before = bucket.tree("other.cmd.zarr")
    work(2).fit(traj, out=url, resume=False)
    after = bucket.tree("other.cmd.zarr")
    assert after.keys() >= before.keys() and after["zarr.json"] != before["zarr.json"]
    with pytest.raises(StoreExists, match=r"a fit with other settings is here.*n_modes: 2 there, 3 asked"):
        work().fit(traj, out=url, resume=False)
    assert bucket.tree("other.cmd.zarr") == after, "a finished one stays"
    assert work(2).fit(traj, out=url).metrics_["bytes_read"] == 0
    assert verify_result(bucket.place("other.cmd.zarr")).damaged == []


def test_what_is_no_result_is_never_written_into(bucket: Bucket) -> None:
    traj = Trajectory.open(f"{bucket.url}/run.zarr")
    bucket.put("foreign/letter.txt", b"dear reader")
    for name in ("foreign", "run.zarr"):
        before = bucket.tree(name)
        with pytest.raises(StoreExists, match="something else is here"):
            work().fit(traj, out=f"{bucket.url}/{name}", resume=False)
        assert bucket.tree(name) == before


def test_what_a_killed_creation_left_is_begun_again(bucket: Bucket, folder: Path) -> None:
    bucket.put("begun.cmd.zarr/mode/zarr.json", b"half")
    work().fit(Trajectory.open(f"{bucket.url}/run.zarr"), out=f"{bucket.url}/begun.cmd.zarr")
    assert bucket.tree("begun.cmd.zarr") == tree_bytes(folder / "run.cmd.zarr")


def begin(out: RemotePath, like: Result, modes: Callable[[], ModeSet]) -> StoredWriter | Result:
    settings = {part: like.provenance[part] for part in ("source", "config", "code")}
    return begin_result(out, like.frame, Provenance(**settings), modes, resume=True)


def test_of_two_that_begin_at_once_the_second_goes_on_with_the_first(bucket: Bucket, folder: Path) -> None:
    like, out = CMD.load(folder / "run.cmd.zarr").result, bucket.place("second.cmd.zarr")

    def slowly() -> ModeSet:
        begin(out, like, lambda: like.modes)
        return turned(like.modes)

    second = begin(out, like, slowly)
    assert isinstance(second, StoredWriter) and second.modes.digests() == like.modes.digests()


def test_a_head_is_not_put_over_another_and_its_references_come_back(
    bucket: Bucket, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The narrow case: both have found no head, and a near-tie split differently."""
    like, out = CMD.load(folder / "run.cmd.zarr").result, bucket.place("raced.cmd.zarr")
    firsts = list[StoredWriter | Result]()

    def rival(place: RemotePath, modes: ModeSet) -> None:
        monkeypatch.setattr(results, "_put_modes", put_modes)
        firsts.append(begin(out, like, lambda: like.modes))
        put_modes(place, modes)

    put_modes = results._put_modes  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(results, "_put_modes", rival)
    with pytest.raises(StoreCorrupt, match="does not hold the values of this fit"):
        begin(out, like, lambda: turned(like.modes))
    (first,) = firsts
    assert isinstance(first, StoredWriter)
    for unit, start in enumerate(range(0, N, ROWS)):
        rows = slice(start, min(start + ROWS, N))
        fits = UnitRows(like.mode[rows], like.a[rows], like.b[rows], like.correlation[rows])
        first.write(unit, fits, _statistics(folder / "run.cmd.zarr", like, unit))
    assert first.finish().modes.digests() == like.modes.digests()
    assert verify_result(out).damaged == []


def turned(modes: ModeSet) -> ModeSet:
    """The same references in another order."""
    return replace(modes, references=np.ascontiguousarray(modes.references[::-1]))


def _statistics(path: Path, like: Result, unit: int) -> UnitStatistics:
    ledger, modes, _ = open_parts(path)
    n_segments = len(like.frame.map.segments(*like.frame.unit(unit)))
    segments = ledger.read("segment_stats", unit)[0, :n_segments]
    return UnitStatistics(segments, ledger.read("unit_hist", unit)[0, : modes.n_modes])


# ---- what is said ---------------------------------------------------------------------------------------


def test_what_is_not_there_is_one_line(bucket: Bucket, buckets: dict[str, Bucket]) -> None:
    for command in ("inspect", "verify"):
        ended = run_cli(command, f"{bucket.url}/nothing.zarr")
        assert (ended.code, ended.err) == (
            2,
            f"error: {bucket.url}/nothing.zarr: there is nothing here; check the path\n",
        )
    bucket.put("letters/a.txt", b"dear")
    with pytest.raises(NotAStore, match="is no store of cmdgpu"):
        Trajectory.open(f"{bucket.url}/letters")


def test_a_bucket_that_is_missing_is_one_line(buckets: dict[str, Bucket]) -> None:
    ended = run_cli("verify", "s3://no-such-bucket/run.zarr")
    assert ended.code in (1, 2) and len(ended.err.splitlines()) == 1
    assert "s3://no-such-bucket/run.zarr" in ended.err
    store = f"{buckets['s3'].url}/run.zarr"
    ended = run_cli("fit", store, "-o", "s3://no-such-bucket/out", "--samples", "200", "-q")
    assert ended.code == 1 and len(ended.err.splitlines()) == 1
    assert "s3://no-such-bucket/out" in ended.err and "NoSuchBucket" in ended.err


def test_credentials_that_are_wrong_are_one_line(buckets: dict[str, Bucket]) -> None:
    from moto.core import set_initial_no_auth_action_count

    assert buckets

    @set_initial_no_auth_action_count(0)
    def refused() -> None:
        ended = run_cli("verify", "s3://laws-of-remote/run.zarr")
        assert ended.code == 1 and len(ended.err.splitlines()) == 1
        assert (
            "s3://laws-of-remote/run.zarr" in ended.err and "the credentials in the environment" in ended.err
        )

    refused()


@pytest.mark.parametrize("url", ["s3://bucket/run.zarr", "memory://bucket/run.zarr", "https://host/run.zarr"])
def test_what_needs_a_disk_refuses_a_url(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for ask in (
        lambda: Recorder(url),
        lambda: Trajectory.from_array(np.zeros((4, 3), np.float32), out=url),
        lambda: Trajectory.from_checkpoints(str(folder), url),
        lambda: Trajectory.open(folder / "run.zarr").export(f"{url}/model.safetensors"),
        lambda: CMD.load(folder / "run.cmd.zarr").export(f"{url}/model.safetensors"),
    ):
        with pytest.raises(UsageError, match=r"needs a folder on this machine.*copy it there"):
            ask()
    for command in (["repair", url], ["export", folder / "run.zarr", "-o", url], ["import", folder, url]):
        assert run_cli(*command).code == 2
    assert list(tmp_path.iterdir()) == [], "no folder of that name"


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_is_installed", "fsspec".__eq__)
    with pytest.raises(UsageError, match=r"gs:// needs a package; pip install 'cmdgpu\[remote\]'"):
        Trajectory.open("gs://bucket/run.zarr")
    with pytest.raises(UsageError, match="nonsense://"):
        Trajectory.open("nonsense://bucket/run.zarr")


BAD: Final = {
    "s3://key:secret@bucket/run.zarr": "a password in a URL",
    "https://host/run.zarr?signature=abc": "a URL with a query",
    "s3://bucket/../other": "no place in a bucket",
    "s3:///run.zarr": "no place in a bucket",
}


@pytest.mark.parametrize("url", BAD)
def test_a_url_that_is_no_place_is_refused_without_its_secrets(url: str) -> None:
    with pytest.raises(UsageError, match=BAD[url]) as raised:
        place_of(url)
    assert "secret" not in str(raised.value).replace("credentials", "") and "abc" not in str(raised.value)
    assert run_cli("inspect", url).code == 2


def test_a_place_is_a_name() -> None:
    place = place_of("s3://bucket//a/run.zarr/")
    assert isinstance(place, RemotePath)
    assert str(place) == "s3://bucket/a/run.zarr" and place.name == "run.zarr"
    assert place / "weights" == RemotePath("s3://bucket", "a/run.zarr/weights")
    assert (place / "weights").parent == place and place.parent.parent.parent == place_of("s3://bucket")
    assert pickle.loads(pickle.dumps(place)) == place and len({place, place.absolute()}) == 1
    assert place_of("file:///tmp/run.zarr") == Path("/tmp/run.zarr") and place_of("C://x") == Path("C://x")
    with pytest.raises(TypeError):
        os.fspath(place)  # pyright: ignore[reportArgumentType,reportCallIssue]


# ---- a result and its trajectory ------------------------------------------------------------------------


def test_a_result_leads_to_no_server_that_its_reader_did_not_name(bucket: Bucket, tmp_path: Path) -> None:
    url = f"{bucket.url}/run.zarr"
    work().fit(Trajectory.open(url), out=tmp_path / "here.cmd.zarr")
    alone, told = CMD.load(tmp_path / "here.cmd.zarr"), CMD.load(tmp_path / "here.cmd.zarr", trajectory=url)
    assert alone.result.provenance["origin"] is None
    with pytest.raises(CmdgpuError, match="out of reach"):
        alone.state_dict(999)
    with pytest.raises(CmdgpuError, match="was not recorded"):
        told.state_dict(999)
    with pytest.raises(UsageError, match="was not fitted on this trajectory"):
        CMD.load(tmp_path / "here.cmd.zarr", trajectory=f"{bucket.url}/small.zarr")


def test_s3fs_serves_where_obstore_is_missing(
    buckets: dict[str, Bucket], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("s3fs")
    monkeypatch.setattr(remote, "_is_installed", "fsspec".__eq__)
    monkeypatch.setattr("cmdgpu.store.places.client_of", functools.lru_cache(remote.client_of.__wrapped__))
    work().fit(Trajectory.open("s3://laws-of-remote/run.zarr"), out="s3://laws-of-remote/s3fs.cmd.zarr")
    assert buckets["s3"].tree("s3fs.cmd.zarr") == tree_bytes(folder / "run.cmd.zarr")
    with pytest.raises(RemoteFailed, match="s3://no-such-bucket"):
        work().fit(Trajectory.open("s3://laws-of-remote/run.zarr"), out="s3://no-such-bucket/out")
