"""A result on an object store: at its place from the beginning, ``incomplete`` until its head says otherwise.

There is no rename there, and the put of one object is atomic. So the head, put last, begins a result; a
unit's chunks are put before its record; and the head, put again with ``complete``, ends it. What the promises
of a folder become:

- acknowledged means that the server acknowledged the put. Nothing is flushed; how long it lasts is its own.
- there is no lock. Two that begin the same fit at once put the same bytes, except where a near-tie splits
  differently: the head is put on the condition that there is none (S3, GCS, Azure), and the later one goes
  on with the first one's. References that are not those of the head are told by their digests and never used;
  who put the head puts them again at the end. A server without that condition keeps the later head.
- ``resume=False`` takes the head away first and then the rest. A worker of the old fit that is still at it
  puts chunks of other numbers into the new one: a record does not vouch for them, so that they are an error
  and no result. End the workers before starting over.
- a listing that lags behind costs a unit computed twice, to the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from cmdgpu.errors import NotAStore, StoreCorrupt, StoreExists
from cmdgpu.results.contract import Frame, ModeSet, Provenance, Refine, Result
from cmdgpu.results.head import read_head
from cmdgpu.results.ledger import DONE, UNIT_ARRAYS, unit_documents
from cmdgpu.results.modes import MODE_ARRAYS, mode_documents
from cmdgpu.results.rounds import settle
from cmdgpu.results.stored import StoredWriter, first_head, same_or_refuse
from cmdgpu.store import durable, remote
from cmdgpu.store import format as fmt
from cmdgpu.store.ahead import in_order
from cmdgpu.store.chunks import crc32c
from cmdgpu.store.places import RemotePath

_LISTING_LASTS_S: Final = 5.0
"""How long the names of done units are believed: others may be at the same fit."""


def begin_remote(
    out: RemotePath,
    frame: Frame,
    provenance: Provenance,
    make_modes: Callable[[], ModeSet],
    *,
    resume: bool,
    refine: Refine | None = None,
) -> RemoteWriter | Result:
    """``begin_result`` on an object store."""
    head = _head_at(out)
    if head is not None and head["status"] == "complete":
        return same_or_refuse(out, provenance)
    if head is not None and not resume:
        _remove(out)
        head = None
    if head is None:
        _create(out, frame, provenance, make_modes())
        head = _head_at(out)
    if head is not None and head["fingerprint"] == provenance.fingerprint:
        if refine is not None:
            settle(out, refine)
        return RemoteWriter(out, frame)
    if head is None:
        raise StoreExists("was taken away while it was begun", file=out, hint="run the same command again")
    raise StoreExists(
        f"an unfinished fit with other settings is here ({provenance.difference(head)})",
        file=out,
        hint="finish that one, choose another output, or start over with --no-resume",
    )


def join_remote(out: RemotePath) -> RemoteWriter | None:
    """The writer of a fit that another process began; None when it has ended meanwhile."""
    _, head, frame = read_head(out)
    return None if head["status"] == "complete" else RemoteWriter(out, frame)


def _head_at(out: RemotePath) -> dict[str, Any] | None:
    """What lies at ``out``; None where nothing does but what a killed creation left. Raises StoreExists."""
    taken = StoreExists("something else is here", file=out, hint="choose another output")
    if (out / fmt.DOCUMENT).exists():
        try:
            return read_head(out)[1]
        except (NotAStore, StoreCorrupt) as error:
            raise taken from error
    files, folders = out.client.names(out.key)
    if files or set(folders) - {*MODE_ARRAYS, *UNIT_ARRAYS, DONE}:
        raise taken
    return None


def _create(out: RemotePath, frame: Frame, provenance: Provenance, modes: ModeSet) -> None:
    """Everything, then the head; nothing where one has come while this process sampled."""
    head = out / fmt.DOCUMENT
    if head.exists():
        return
    for name, document in {**mode_documents(modes), **unit_documents(frame, modes.n_modes)}.items():
        durable.write_file(out / name, fmt.DOCUMENT, [fmt.encode(document)])
    _put_modes(out, modes)
    try:
        head.client.put(head.key, fmt.encode(first_head(frame, provenance, modes)), create=True)
    except remote.Taken:
        return  # begun by another process just now: its head holds


def _put_modes(out: RemotePath, modes: ModeSet) -> None:
    for name in MODE_ARRAYS:
        values = np.ascontiguousarray(getattr(modes, name))
        if values.size:
            file = fmt.chunk_name(*[0] * values.ndim)
            durable.write_file(out / name, file, [durable.bytes_of(values), crc32c(values)])


def _remove(out: RemotePath) -> None:
    """The head first: what is left without it is no result. The documents of arrays stay, to be put again."""
    head = out / fmt.DOCUMENT
    head.client.delete(head.key)
    for name in (DONE, *UNIT_ARRAYS, *MODE_ARRAYS):
        chunks = [file for file in durable.entries(out / name) if file.name != fmt.DOCUMENT]
        for _ in in_order(lambda file: file.client.delete(file.key), chunks, remote.READS_IN_FLIGHT):
            pass


class RemoteWriter(StoredWriter):
    """Units into their place; ``finish`` says that they are all there."""

    in_flight = len(UNIT_ARRAYS)
    keeps_sample = True
    """It is put again at the end, should another one lie there by then."""

    def __init__(self, out: RemotePath, frame: Frame) -> None:
        super().__init__(out, out, frame)
        self._place = out
        self._begun: set[int] = set()
        self._listed_s = -_LISTING_LASTS_S
        self._sound: dict[int, bool] = {}

    def n_begun(self) -> int:
        self._list()
        return len(self._begun)

    def _list(self) -> None:
        names = (file.name.split(".") for file in durable.entries(self._place / DONE))
        self._begun = {int(name[1]) for name in names if len(name) == 3 and name[1].isdecimal()}
        self._listed_s = time.monotonic()

    def is_done(self, unit: int) -> bool:
        """A unit counts when its record vouches for the chunks that lie there: a put leaves no torn one."""
        if time.monotonic() - self._listed_s > _LISTING_LASTS_S:
            self._list()
        if unit not in self._begun:
            return False
        if unit not in self._sound:
            asked = sorted(self._begun.difference(self._sound))
            looks = in_order(self._is_sound, asked, remote.READS_IN_FLIGHT)
            self._sound |= zip(asked, looks, strict=True)
        return self._sound[unit]

    def _is_sound(self, unit: int) -> bool:
        try:
            self._ledger.crcs(unit)
        except StoreCorrupt:
            return False  # what an older fit left here: computed again
        return True

    def finish(self) -> Result:
        """Check every record, merge the statistics in unit order, put the head that says so.

        The references are put once more: who lost the race to begin may have put its own over them. Raises
        StoreCorrupt naming the unit whose chunks are not the ones that were fitted, StoreExists where another
        fit has taken the place meanwhile.
        """
        self._require_mine()
        _put_modes(self._place, self.modes)
        return self._result_at(self._place, *self._mark_complete())

    def _require_mine(self) -> None:
        if not self._is_mine(self._place):
            raise StoreExists("another fit took this place", file=self._place, hint="choose another output")

    def _ended_elsewhere(self) -> bool:
        return False
