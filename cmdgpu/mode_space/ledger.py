"""Points that are evaluated: kept one by one beside the file that they become."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from cmdgpu.errors import CmdgpuError, StoreCorrupt, StoreExists, WriteFailed
from cmdgpu.mode_space.outcome import KIND, At, Landscape, Scores, numbers, plain
from cmdgpu.store import durable

_ANEW = "or remove it to begin anew"


class Ledger:
    """A line of JSON for every point, flushed, in ``<out>.partial``; the settings in the first line.

    What lies there, or in ``out``, of the same settings is ``done``. A line that was cut by a kill is
    dropped. Without ``out`` the points are in memory alone. Raises StoreExists naming the setting that
    differs, and for a file that is no landscape, because nothing is ever written over it; StoreCorrupt for
    lines that are no points.
    """

    def __init__(self, out: Path | None, settings: Mapping[str, Any]) -> None:
        self._settings = dict(settings)
        self.done: dict[At, Scores] = {}
        self._out = out
        self._file: BinaryIO | None = None
        if out is None:
            return
        self._lines = out.with_name(out.name + durable.PARTIAL)
        if os.path.lexists(out):
            self._take_finished(out)
        elif self._lines.exists():
            self._take_lines()

    def _take_finished(self, out: Path) -> None:
        try:
            found = Landscape.load(out)
        except CmdgpuError as error:
            raise StoreExists(
                "is there, and is no landscape", file=out, hint="choose another path"
            ) from error
        self._require_same(found.settings, out)
        self.done = dict(found.evaluated)

    def _take_lines(self) -> None:
        try:
            whole, _, _ = self._lines.read_bytes().rpartition(b"\n")
        except OSError as error:
            raise CmdgpuError(f"cannot be read: {durable.reason_of(error)}", file=self._lines) from error
        for number, line in enumerate(whole.split(b"\n"), 1):
            try:
                found = cast(dict[str, Any], json.loads(line))
                if number == 1:
                    head = cast(dict[str, Any], found[KIND])
                    self._require_same(head, self._lines)
                    continue
                x, y = map(float, found["at"])
                self.done[x, y] = numbers(found["scores"])
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise StoreCorrupt(
                    f"line {number} is no point of a landscape", file=self._lines, hint=f"mend it, {_ANEW}"
                ) from error

    def _require_same(self, there: Mapping[str, Any], file: Path) -> None:
        for name, asked in self._settings.items():
            if there.get(name) != asked:
                raise StoreExists(
                    f"is a landscape of another {name}: {there.get(name)} there, {asked} asked",
                    file=file,
                    hint=f"choose another path, {_ANEW}",
                )

    def keep(self, at: At, scores: Scores) -> None:
        """One point more; whole and durable when this returns. Raises WriteFailed."""
        if self._out is not None:
            if self._file is None:
                self._file = self._begin(self._out.parent)
            try:
                self._file.write(_line(_point(at, scores)))
                durable.flush_file(self._file.fileno())
            except OSError as error:
                raise WriteFailed(
                    f"cannot write: {durable.reason_of(error)}", file=self._lines, hint=durable.TRY_AGAIN
                ) from error
        self.done[at] = scores

    def _begin(self, folder: Path) -> BinaryIO:
        """The lines of what is done, whole ones, and room for more."""
        durable.make_directory(folder)
        lines = [{KIND: self._settings}, *(_point(at, scores) for at, scores in self.done.items())]
        durable.write_file(folder, self._lines.name, map(_line, lines))
        durable.make_name_last(self._lines)
        return self._lines.open("ab", buffering=0)

    def finish(self, found: Landscape) -> None:
        """The file itself, written where it is not there yet, or selected by other scores; the lines go."""
        self.close()
        if self._out is None:
            return
        if not self._out.exists() or Landscape.load(self._out).to_json() != found.to_json():
            found.write(self._out)
        durable.remove(self._lines)

    def close(self) -> None:
        """What is kept stays."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _point(at: At, scores: Scores) -> dict[str, Any]:
    return {"at": list(at), "scores": plain(scores)}


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, allow_nan=False).encode() + b"\n"
