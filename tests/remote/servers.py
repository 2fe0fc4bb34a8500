"""Servers for the tests: an S3 of moto's, and one of our own that counts, fails and lies when told to."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final, cast

import boto3  # pyright: ignore[reportMissingTypeStubs]
import fsspec  # pyright: ignore[reportMissingTypeStubs]
import pytest
from moto.server import ThreadedMotoServer

from cmdgpu.store.places import RemotePath, place_of


class Bucket:
    """Objects below a URL, put and taken by other hands than ours."""

    url: str

    def put(self, key: str, data: bytes) -> None: ...

    def get(self, key: str) -> bytes: ...

    def delete(self, key: str) -> None: ...

    def keys(self) -> list[str]: ...

    def place(self, name: str) -> RemotePath:
        found = place_of(f"{self.url}/{name}")
        assert isinstance(found, RemotePath)
        return found

    def upload(self, folder: Path) -> str:
        """The folder, file by file, under its name; the URL it has then."""
        for file in folder.rglob("*"):
            if file.is_file() and file.name != ".lock":
                self.put(f"{folder.name}/{file.relative_to(folder)}", file.read_bytes())
        return f"{self.url}/{folder.name}"

    def tree(self, name: str) -> dict[str, bytes]:
        """Every object below a name, by its key below that."""
        return {k.removeprefix(f"{name}/"): self.get(k) for k in self.keys() if k.startswith(f"{name}/")}

    def change(self, key: str, edit: Callable[[bytes], bytes]) -> None:
        self.put(key, edit(self.get(key)))


class S3(Bucket):
    """A bucket of a server of moto's."""

    def __init__(self, endpoint: str, name: str) -> None:
        client: Any = cast(Any, boto3).client("s3", endpoint_url=endpoint)
        client.create_bucket(Bucket=name)
        self._client = client
        self._name = name
        self.url = f"s3://{name}"

    def put(self, key: str, data: bytes) -> None:
        self._client.put_object(Bucket=self._name, Key=key, Body=data)

    def get(self, key: str) -> bytes:
        return self._client.get_object(Bucket=self._name, Key=key)["Body"].read()

    def delete(self, key: str) -> None:
        self._client.delete_object(Bucket=self._name, Key=key)

    def keys(self) -> list[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._name)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]


class Memory(Bucket):
    """``memory://`` of fsspec: no server, and fast."""

    def __init__(self, name: str) -> None:
        self._system: Any = cast(Any, fsspec).filesystem("memory")
        self._name = name
        self.url = f"memory://{name}"

    def put(self, key: str, data: bytes) -> None:
        self._system.pipe_file(f"/{self._name}/{key}", data)

    def get(self, key: str) -> bytes:
        return self._system.cat_file(f"/{self._name}/{key}")

    def delete(self, key: str) -> None:
        self._system.rm_file(f"/{self._name}/{key}")

    def keys(self) -> list[str]:
        return [str(k).removeprefix(f"/{self._name}/") for k in self._system.find(f"/{self._name}")]


@contextlib.contextmanager
def s3_server() -> Generator[str]:
    """The endpoint of a server that takes any credentials; the environment names it meanwhile."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request takes longer than some
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": endpoint,
        }.items():
            patch.setenv(name, value)
        yield endpoint
    server.stop()


@dataclass
class Answer:
    """What a server is about to say."""

    status: int
    headers: dict[str, str]
    body: bytes


Lie = Callable[[str, Answer], Answer]
"""(path, the honest answer) -> what is said instead."""


@dataclass
class WebServer:
    """A folder over HTTP, with ranges."""

    root: Path
    url: str = ""
    lie: Lie = field(default=lambda path, answer: answer)
    served: list[tuple[str, str, int]] = field(default_factory=list[tuple[str, str, int]])
    """(method, path, bytes) of every answer."""

    @property
    def served_bytes(self) -> int:
        return sum(n_bytes for method, _, n_bytes in self.served if method == "GET")

    def honest(self, path: str, wanted: str | None) -> Answer:
        file = self.root / path.strip("/")
        if not file.is_file():
            return Answer(404, {}, b"")
        data = file.read_bytes()
        headers = {"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT", "Accept-Ranges": "bytes"}
        if wanted is None:
            return Answer(200, headers, data)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last) + 1, len(data))
        if start >= len(data):
            return Answer(416, {**headers, "Content-Range": f"bytes */{len(data)}"}, b"")
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return Answer(206, headers, data[start:stop])


@contextlib.contextmanager
def web_server(root: Path) -> Generator[WebServer]:
    served = WebServer(root)
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def _answer(self, *, with_body: bool) -> None:
            told = served.lie(self.path, served.honest(self.path, self.headers.get("Range")))
            self.send_response(told.status)
            for name, value in {"Content-Length": str(len(told.body)), **told.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            with lock:
                served.served.append((self.command, self.path, len(told.body) if with_body else 0))
            if with_body:
                self.wfile.write(told.body)
                if told.headers.get("Content-Length", str(len(told.body))) != str(len(told.body)):
                    self.close_connection = True

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request: Any, client_address: Any) -> None:
            del request, client_address  # a client that hangs up on a liar

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


CHUNK_ARRAYS: Final = ("mode", "a", "b", "correlation", "segment_stats", "unit_hist", "done")


def chunks(tree: dict[str, bytes], arrays: Iterable[str] = CHUNK_ARRAYS) -> dict[str, bytes]:
    return {k: v for k, v in tree.items() if k.partition("/")[0] in arrays and not k.endswith("zarr.json")}
