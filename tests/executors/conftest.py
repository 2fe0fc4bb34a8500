"""The trajectory of these tests, and a cluster of two workers that most of them share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import distributed
import pytest

from cmdgpu.streaming.dask import Crew
from tests.executors.world import World, make_world, write_slowly


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("executors"))


@pytest.fixture(scope="session")
def _shared_client() -> Iterator[Any]:  # pyright: ignore[reportUnusedFunction]
    with Crew((None, None), 1).cluster() as cluster, distributed.Client(cluster) as client:
        yield client


@pytest.fixture
def client(_shared_client: Any) -> Any:
    """Of two workers as they were made, whatever the test before did to them."""
    _shared_client.wait_for_workers(2, timeout=60)
    _shared_client.run(write_slowly, 0)
    return _shared_client
