"""The type of an argument that is a path or a URL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from cmdgpu.errors import UsageError
from cmdgpu.store.places import Place, local_path, place_of

if TYPE_CHECKING:
    _ParamType = click.ParamType[Place]
else:
    _ParamType = click.ParamType  # has no parameter in the older versions that serve as well


class PlaceType(_ParamType):
    """A place: a URL stays what it is, where a path would lose one of its slashes."""

    name = "path"

    def __init__(self, local: str | None = None) -> None:
        """``local`` says who needs a folder on this machine; a URL is then refused."""
        self._local = local

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Place:
        try:
            return place_of(value) if self._local is None else local_path(value, self._local)
        except UsageError as error:
            self.fail(str(error), param, ctx)
