"""A compressed member of a zip, read from anywhere in bounded memory.

Deflated bytes can only be inflated from the beginning, so the state of the inflater is kept every so often:
a read goes on from the last state before it. A state costs some 50 kB: at most ``_STATES`` of a member are
kept, and only those of the last few members.
"""

from __future__ import annotations

import threading
import zlib
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from cmdgpu.errors import CheckpointError, printable
from cmdgpu.importing.contract import TensorInfo
from cmdgpu.importing.elements import numpy_type
from cmdgpu.importing.files import Source
from cmdgpu.importing.zip_records import Record
from cmdgpu.notation import AnyArray
from cmdgpu.store.durable import bytes_of

if TYPE_CHECKING:
    from zlib import _Decompress  # pyright: ignore[reportPrivateUsage]  # the type has no other name

_BLOCK: Final = 1 << 18
_STATES: Final = 32
_INTERVAL: Final = 4 << 20
_MEMBERS: Final = 4
READ_BYTES: Final = _MEMBERS * _STATES * 50_000 + 4 * _BLOCK
"""Memory that reads of one archive take beside their ``out``."""


class Member:
    """A record of a zip, and its first bytes."""

    def __init__(self, source: Source, record: Record) -> None:
        self.source, self.record = source, record

    def first(self, size: int) -> bytes:
        """As many bytes from its beginning, fewer where it has no more."""
        wanted = min(size, self.record.size)
        if not self.record.deflated:
            return self.source.read(self.record.start, wanted)
        inflater, found = Inflater(self), bytearray()
        while len(found) < wanted:
            found += inflater.next(wanted - len(found))
        return bytes(found)

    def refuse(self, found: str) -> CheckpointError:
        return CheckpointError(f"{printable(self.record.name)!r} {found}", file=self.source.path)


class Inflater:
    """One pass over a member, somewhere on its way."""

    def __init__(self, member: Member, start: Inflater | None = None) -> None:
        self._member = member
        self._inflate: _Decompress = zlib.decompressobj(-15) if start is None else start._inflate.copy()
        self._fed = 0 if start is None else start._fed
        self._tail = b"" if start is None else start._tail
        self._crc = 0 if start is None else start._crc
        self.at = 0 if start is None else start.at
        """Inflated bytes behind it."""

    def next(self, limit: int) -> bytes:
        """The next bytes, one at least. Raises CheckpointError where they end, or their CRC is wrong."""
        record = self._member.record
        limit = min(limit, _BLOCK)
        try:
            while not (found := self._inflate.decompress(self._tail or self._feed(), limit)):
                if self._inflate.eof:
                    raise self._member.refuse(f"ends after {self.at} bytes of {record.size}")
                self._tail = self._inflate.unconsumed_tail
        except zlib.error as error:
            raise self._member.refuse("is damaged: it cannot be inflated") from error
        self._tail = self._inflate.unconsumed_tail
        self.at += len(found)
        self._crc = zlib.crc32(found, self._crc)
        if self.at > record.size:
            raise self._member.refuse(f"holds more than the {record.size} bytes it says")
        if self.at == record.size and self._crc != record.crc32:
            raise self._member.refuse("is damaged: it does not match its checksum")
        return found

    def _feed(self) -> bytes:
        record = self._member.record
        size = min(_BLOCK, record.stored_size - self._fed)
        if size == 0:
            raise self._member.refuse(f"ends after {self.at} bytes of {record.size}")
        start, self._fed = record.start + self._fed, self._fed + size
        return self._member.source.read(start, size)


class Shelf:
    """The states that are kept of the members of one archive; one thread at a time inflates."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._members: OrderedDict[Member, list[Inflater]] = OrderedDict()

    def before(self, member: Member, position: int) -> Inflater:
        """A pass of its own that is not beyond that position, as far on its way as there is one."""
        kept = self._members.setdefault(member, [Inflater(member)])
        self._members.move_to_end(member)
        if len(self._members) > _MEMBERS:
            self._members.popitem(last=False)
        return Inflater(member, [state for state in kept if state.at <= position][-1])

    def keep(self, member: Member, inflater: Inflater) -> None:
        kept = self._members[member]
        interval = max(_INTERVAL, member.record.size // (_STATES - 1))
        if inflater.at >= kept[-1].at + interval:
            kept.append(Inflater(member, inflater))


class Inflated:
    """The elements of an array in a compressed member."""

    def __init__(self, shelf: Shelf, member: Member, info: TensorInfo, begin: int, *, swapped: bool) -> None:
        self.info = info
        self._shelf, self._member, self._begin, self._swapped = shelf, member, begin, swapped

    def read(self, start: int, stop: int, out: AnyArray) -> None:
        """See ``Elements``."""
        if start >= stop:
            return
        size = numpy_type(self.info.dtype).itemsize
        first, left = self._begin + start * size, bytes_of(out)
        with self._shelf.lock:
            inflater = self._shelf.before(self._member, first)
            while inflater.at < first:
                inflater.next(first - inflater.at)
                self._shelf.keep(self._member, inflater)
            while left:
                found = inflater.next(len(left))
                left[: len(found)] = found
                left = left[len(found) :]
                self._shelf.keep(self._member, inflater)
        if self._swapped:
            out.byteswap(inplace=True)
