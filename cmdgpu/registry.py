"""Named things of one kind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from cmdgpu.errors import CmdgpuError, UsageError

Item = TypeVar("Item")


class Registry(Generic[Item]):
    """Named things of one kind: an unknown name lists the known ones, a second claim is an error."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._items: dict[str, Item] = {}

    def add(self, name: str, item: Item) -> Item:
        if name in self._items:
            raise CmdgpuError(f"{self._kind} {name!r} is registered twice")
        self._items[name] = item
        return item

    def __getitem__(self, name: str) -> Item:
        if name not in self._items:
            raise UsageError(
                f"no {self._kind} named {name!r}", hint=f"have: {', '.join(sorted(self._items))}"
            )
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)
