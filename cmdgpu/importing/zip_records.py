"""The records of a zip archive, from its directory alone. One reader for every format that is a zip inside.

Stricter than zip readers are among themselves, so that no two of them could see different files in the same
bytes: the directory ends the archive, every record has one name and its own bytes, and the header before the
bytes says what the directory says.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final, NoReturn

from cmdgpu.errors import CheckpointError, printable
from cmdgpu.importing.files import Source

MAX_RECORDS: Final = 1 << 19
_MAX_DIRECTORY_BYTES: Final = 64 << 20

_LOCAL: Final = struct.Struct("<4s5H3I2H")
_ENTRY: Final = struct.Struct("<4s6H3I5H2I")
_END: Final = struct.Struct("<4s4H2IH")
_END_64_PLACE: Final = struct.Struct("<4sIQI")
_END_64: Final = struct.Struct("<4sQ2H2I4Q")
_STORED, _DEFLATED = 0, 8
_ENCRYPTED: Final = 1
_UTF_8: Final = 1 << 11
_FULL: Final = 0xFFFFFFFF
"""A field of 32 bits whose value stands in the extra field."""

MAGIC: Final = b"PK\x03\x04"


@dataclass(frozen=True, slots=True)
class Record:
    name: str
    start: int
    """Of its bytes, counted from the beginning of the file."""
    stored_size: int
    size: int
    """Once inflated; the same where it is not compressed."""
    crc32: int
    """Of the inflated bytes."""
    deflated: bool

    @property
    def stop(self) -> int:
        return self.start + self.stored_size


def read_records(source: Source, start: int = 0, stop: int | None = None) -> dict[str, Record]:
    """Every record of the archive that lies in bytes [start, stop) of a file, in the order of their bytes.

    Raises CheckpointError for whatever is not whole, not plain (encrypted, spread over volumes, another
    method than stored and deflated), ambiguous (two records of a name, bytes that two share) or absurdly
    large.
    """
    archive = _Archive(source, start, source.size if stop is None else stop)
    with source.reading() as read:
        return archive.records(read)


def first_name(head: bytes) -> str | None:
    """The name of the record that a file begins with: all that is left of an archive that was cut."""
    if len(head) < _LOCAL.size or not head.startswith(MAGIC):
        return None
    length = _LOCAL.unpack_from(head)[9]
    return head[_LOCAL.size : _LOCAL.size + length].decode("utf-8", "replace")


class _Archive:
    def __init__(self, source: Source, start: int, stop: int) -> None:
        self._source, self._start, self._stop = source, start, stop

    def _refuse(self, found: str) -> NoReturn:
        raise CheckpointError(
            f"is no whole zip archive: {found}",
            file=self._source.path,
            hint="copy it again from where it was written",
        )

    def records(self, read: Callable[[int, int], bytes]) -> dict[str, Record]:
        count, size, offset, end = self._directory(read)
        if count > MAX_RECORDS or size > _MAX_DIRECTORY_BYTES:
            self._refuse(f"{count} records in {size} bytes of directory, beyond all reason")
        if offset + size != end:
            self._refuse(f"its directory ends at byte {offset + size}, not where it should, at {end}")
        found: dict[str, Record] = {}
        headers: list[tuple[int, Record]] = []
        for header, record, flags in self._entries(read(self._start + offset, size), count):
            placed = self._place(read, header, record, flags)
            if found.setdefault(placed.name, placed) is not placed:
                self._refuse(f"two records are named {printable(placed.name)!r}")
            headers.append((self._start + header, placed))
        headers.sort(key=lambda pair: pair[0])
        ends = [*headers, (self._start + offset, None)]
        for (_, record), (following, _) in pairwise(ends):
            if record is not None and record.stop > following:
                self._refuse(f"the bytes of {printable(record.name)!r} run into what follows")
        return {record.name: record for _, record in headers}

    def _directory(self, read: Callable[[int, int], bytes]) -> tuple[int, int, int, int]:
        """(records, bytes, offset) of the directory, and the offset at which it has to end."""
        place = self._stop - _END.size
        if place < self._start:
            self._refuse(f"it has {self._stop - self._start} bytes")
        magic, disk, first_disk, here, count, size, offset, comment = _END.unpack(read(place, _END.size))
        if magic != b"PK\x05\x06" or comment:
            self._refuse("it does not end in a directory; cut short?")
        end = place - self._start
        before = place - _END_64_PLACE.size
        if before >= self._start:
            magic, number, at, disks = _END_64_PLACE.unpack(read(before, _END_64_PLACE.size))
            if magic == b"PK\x06\x07":
                if number or disks > 1 or at + _END_64.size > before - self._start:
                    self._refuse("its directory lies somewhere else")
                fields = _END_64.unpack(read(self._start + at, _END_64.size))
                magic, _, _, _, disk, first_disk, here, count, size, offset = fields
                if magic != b"PK\x06\x06":
                    self._refuse("its directory has no end")
                end = at
        if disk or first_disk or here != count:
            self._refuse("it is spread over several volumes")
        return count, size, offset, end

    def _entries(self, directory: bytes, count: int) -> list[tuple[int, Record, int]]:
        """(offset of the header, the record as the directory tells it, flags)"""
        found: list[tuple[int, Record, int]] = []
        at = 0
        for _ in range(count):
            if at + _ENTRY.size > len(directory):
                self._refuse(f"its directory holds fewer than {count} records")
            fields = _ENTRY.unpack_from(directory, at)
            magic, _, _, flags, method, _, _, crc, stored, size, n_name, n_extra, n_comment = fields[:13]
            disk, header = fields[13], fields[16]
            at += _ENTRY.size
            name = directory[at : at + n_name]
            extra = directory[at + n_name : at + n_name + n_extra]
            at += n_name + n_extra + n_comment
            if magic != b"PK\x01\x02" or at > len(directory):
                self._refuse("its directory is damaged")
            size, stored, header = self._wide(extra, [size, stored, header])
            shown = self._decode(name, flags)
            if flags & _ENCRYPTED or disk or method not in (_STORED, _DEFLATED):
                self._refuse(f"{printable(shown)!r} is encrypted, or compressed by method {method}")
            if method == _STORED and size != stored:
                self._refuse(f"{printable(shown)!r} is not compressed and has two sizes, {stored} and {size}")
            found.append((header, Record(shown, 0, stored, size, crc, method == _DEFLATED), flags))
        if at != len(directory):
            self._refuse(f"its directory holds more than {count} records")
        return found

    def _wide(self, extra: bytes, values: list[int]) -> list[int]:
        """Sizes and offsets beyond 32 bits stand in the extra field, in this order, where needed."""
        if _FULL not in values:
            return values
        at = 0
        while at + 4 <= len(extra):
            kind, length = struct.unpack_from("<2H", extra, at)
            if kind == 1:
                fields = (extra[i : i + 8] for i in range(at + 4, at + 4 + length, 8))
                wide = (int.from_bytes(field, "little") for field in fields)
                return [next(wide, _FULL) if value == _FULL else value for value in values]
            at += 4 + length
        return values

    def _decode(self, name: bytes, flags: int) -> str:
        try:
            return name.decode("utf-8" if flags & _UTF_8 else "cp437")
        except UnicodeDecodeError:
            self._refuse("a record has a name that is no text")

    def _place(self, read: Callable[[int, int], bytes], header: int, record: Record, flags: int) -> Record:
        """The record, where its bytes begin."""
        if self._start + header + _LOCAL.size > self._stop:
            self._refuse(f"{printable(record.name)!r} begins beyond its end")
        fields = _LOCAL.unpack(read(self._start + header, _LOCAL.size))
        magic, _, told, method, n_name, n_extra = (
            fields[0],
            fields[1],
            fields[2],
            fields[3],
            fields[9],
            fields[10],
        )
        start = self._start + header + _LOCAL.size
        if start + n_name > self._stop:
            self._refuse(f"{printable(record.name)!r} begins beyond its end")
        name = self._decode(read(start, n_name), flags)
        if (
            magic != MAGIC
            or name != record.name
            or told & _ENCRYPTED
            or (method == _DEFLATED) != record.deflated
        ):
            self._refuse(f"{printable(record.name)!r} is not where the directory says")
        start += n_name + n_extra
        if start + record.stored_size > self._stop:
            self._refuse(f"{printable(record.name)!r} ends beyond its end")
        return replace(record, start=start)
