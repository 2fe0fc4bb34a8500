"""Names, types, attributes and versions of the Zarr trees, and the one way their metadata is read.

Zarr itself writes the metadata of a new array (``array_document``); what we add lies under the single
attribute ``cmdgpu``: the kind of node, the format version and a digest of the document by itself, since
``zarr.json`` carries no checksum of its own. Documents of a store are checked here, against a closed
schema, before anything believes them.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, cast

import numpy as np

from cmdgpu.errors import NotAStore, StoreCorrupt, UsageError, printable
from cmdgpu.notation import U8, UNWRITTEN, AnyArray, BoolArray
from cmdgpu.store import zstd
from cmdgpu.store.places import Place, RemotePath
from cmdgpu.store.remote import Absent
from cmdgpu.store.uncollected import uncollected

Json: TypeAlias = dict[str, Any]

FORMAT: Final = 1
"""Version of both trees; a store of another version is refused by name."""

DOCUMENT: Final = "zarr.json"
WEIGHTS: Final = "weights"
STEP: Final = "step"
SKETCH: Final = "sketch"
SKETCH_ROW: Final = "sketch_row"
RESERVED: Final = frozenset({WEIGHTS, STEP, SKETCH, SKETCH_ROW, "snapshot", "parameter"})
"""Names a recorded scalar cannot take."""
SCALAR_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")

ROW_QUANTUM: Final = 256
"""Chunks hold a multiple of this many rows."""
SMALL_CHUNK: Final = 1024
"""Snapshots per chunk of the small arrays beside ``weights``."""
CRC_BYTES: Final = 4
MAX_CHUNK_BYTES: Final = 1 << 30
_MAX_DOCUMENT_BYTES: Final = 32 << 20
_MAX_VALUES: Final = 1 << 20
"""Commas and colons of a document: what it costs in memory goes by their number."""
_MAX_DEPTH: Final = 32


@dataclass(frozen=True)
class Storage:
    """One element type as it lies on disk."""

    name: str
    """What a person calls it, and torch too."""
    numpy: np.dtype[Any]
    zarr: str
    fill: float | int
    """"Never written" must not look like 0."""


STORAGES: Final = {
    "float32": Storage("float32", np.dtype("<f4"), "float32", float("nan")),
    "float16": Storage("float16", np.dtype("<f2"), "float16", float("nan")),
    # zarr has no bfloat16; 0x7FC0 is its quiet NaN
    "bfloat16": Storage("bfloat16", np.dtype("<u2"), "uint16", 0x7FC0),
}


def storage(dtype: str) -> Storage:
    if dtype not in STORAGES:
        raise UsageError(f"a trajectory cannot be stored as {dtype!r}", hint=f"have: {', '.join(STORAGES)}")
    return STORAGES[dtype]


def default_rows_per_chunk(n_rows: int) -> int:
    """2^18 rows, 2^20 from a billion up; never more than N rounded up to the quantum."""
    wanted = 1 << 20 if n_rows >= 1_000_000_000 else 1 << 18
    return min(wanted, max(round_up(n_rows, ROW_QUANTUM), ROW_QUANTUM))


def check_rows_per_chunk(rows: int | None, *, compressed: bool = False) -> None:
    """Raises UsageError for a number of rows that no chunk can have; None leaves it to us."""
    most = _most_chunk_bytes(compressed) // 4
    if rows is not None and (rows < 1 or rows % ROW_QUANTUM or rows > most):
        up_to = f"2^{most.bit_length() - 1}{' with zstd' if compressed else ''}"
        raise UsageError(
            f"rows_per_chunk={rows}", hint=f"give a positive multiple of {ROW_QUANTUM}, to {up_to}"
        )


def _most_chunk_bytes(compressed: bool) -> int:
    return zstd.MAX_CHUNK_BYTES if compressed else MAX_CHUNK_BYTES


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


CHUNK: Final = re.compile(r"c\.(\d+)\.(\d+)")
"""Name of a chunk of a two-dimensional array."""


def chunk_name(*index: int) -> str:
    return ".".join(["c", *map(str, index)])


# ---- documents ----------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)
def _template(
    chunks: tuple[int, ...], zarr_type: str, dims: tuple[str, ...], fill: str, zstd_level: int | None
) -> str:
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec
    from zarr.storage import MemoryStore

    files: dict[str, Any] = {}
    zstd_codec = [] if zstd_level is None else [ZstdCodec(level=zstd_level, checksum=False)]
    cast(Any, zarr).create_array(
        MemoryStore(files),
        shape=(0,) * len(chunks),
        chunks=chunks,
        dtype=zarr_type,
        fill_value=float(fill) if zarr_type.startswith("float") else int(fill),
        filters=None,
        serializer=BytesCodec(endian="little"),
        compressors=[*zstd_codec, Crc32cCodec()],
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=dims,
        config={"write_empty_chunks": True},
    )
    return files[DOCUMENT].to_bytes().decode()


def array_document(
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    zarr_type: str,
    dims: tuple[str, ...],
    fill: float | int,
    attributes: Mapping[str, Any],
    zstd_level: int | None = None,
) -> Json:
    """Metadata of a new array, as zarr writes it, with our attributes and sealed."""
    document = cast(Json, json.loads(_template(chunks, zarr_type, dims, str(fill), zstd_level)))
    document["shape"] = list(shape)
    document["attributes"] = copy.deepcopy(dict(attributes))
    return seal(document)


def group_document(attributes: Mapping[str, Any]) -> Json:
    """Metadata of a group, sealed. Its parts, which may be a long layout, stay those of the caller."""
    own_part = dict(attributes["cmdgpu"])
    return seal({"zarr_format": 3, "node_type": "group", "attributes": {**attributes, "cmdgpu": own_part}})


def own(kind: str, **fields: Any) -> Json:
    """The ``cmdgpu`` attribute of a node."""
    return {"kind": kind, "format": FORMAT, **fields}


def canonical(value: Any) -> bytes:
    """The one spelling of a JSON value that digests are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def sha256(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def seal(document: Json) -> Json:
    """Put into the document the digest of everything else in it."""
    mine = document["attributes"]["cmdgpu"]
    mine.pop("self", None)
    mine["self"] = "sha256:" + sha256(canonical(document))
    return document


def is_sealed(document: Json) -> bool:
    attributes = document["attributes"]
    mine = dict(attributes["cmdgpu"])
    said = mine.pop("self", None)
    return said == "sha256:" + sha256(canonical({**document, "attributes": {**attributes, "cmdgpu": mine}}))


def spell(document: Json) -> bytes:
    """The document as it lies on disk."""
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode("ascii")


def encode(document: Json) -> bytes:
    """A document that is to be written. Raises UsageError for one that would not be read back."""
    raw = spell(document)
    values = raw.count(b",") + raw.count(b":")
    if len(raw) > _MAX_DOCUMENT_BYTES or values > _MAX_VALUES:
        raise UsageError(
            f"metadata of {len(raw)} bytes, {values} values: {_MAX_DOCUMENT_BYTES}, {_MAX_VALUES} at most",
            hint="spread the snapshots, or the tensors, over several stores",
        )
    return raw


# ---- reading documents back -----------------------------------------------------------------------------


def read_bytes(path: Place, limit: int = _MAX_DOCUMENT_BYTES) -> bytes:
    """A small regular file, whole. FIFOs, devices, symbolic links and absurd sizes are StoreCorrupt."""
    if isinstance(path, RemotePath):
        return _read_object(path, limit)
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(path, flags)
    except OSError as error:
        raise StoreCorrupt(f"cannot be opened: {error.strerror}", file=path) from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise StoreCorrupt("is no regular file", file=path)
        if status.st_size > limit:
            raise StoreCorrupt(f"holds {status.st_size} bytes, more than {limit}", file=path)
        with os.fdopen(os.dup(fd), "rb") as file:
            return file.read(limit)
    finally:
        os.close(fd)


def _read_object(path: RemotePath, limit: int) -> bytes:
    try:
        size, pieces = path.client.get(path.key, limit)
    except Absent as error:
        raise StoreCorrupt("is missing", file=path) from error
    if size > limit:
        raise StoreCorrupt(f"holds {size} bytes, more than {limit}", file=path)
    raw = bytearray()
    for piece in pieces:
        raw += piece
        if len(raw) > size:
            break
    if len(raw) != size:
        raise StoreCorrupt(f"arrived as {len(raw)} bytes, the server told of {size}", file=path)
    return bytes(raw)


_PIECE_BYTES: Final = 1 << 16
"""Of a document that is looked at in one go: its numbers stay in the cache."""
_QUOTE, _BACKSLASH = 0x22, 0x5C
_STEP = np.zeros(256, dtype=np.int8)
_STEP[list(b"[{")], _STEP[list(b"]}")] = 1, -1
_IS_SEPARATOR = np.zeros(256, dtype=np.bool_)
_IS_SEPARATOR[list(b",:")] = True


def shapes(raw: bytes) -> Iterator[tuple[int, int, int]]:
    """(deepest nesting, brackets opened, commas and colons) of a JSON document, up to the end of each piece.

    What a document costs in memory goes by their number; whoever asks stops at a bound of its own. Nothing
    inside a string counts, be it one without an end.
    """
    depth = deepest = opened = separators = 0
    in_string = is_escaped = False
    for start in range(0, len(raw), _PIECE_BYTES):
        piece = np.frombuffer(raw, np.uint8, min(_PIECE_BYTES, len(raw) - start), start)
        quotes = piece == _QUOTE
        if is_escaped or _BACKSLASH in piece:
            is_escaped = _drop_escaped(piece, quotes, is_escaped)
        outside = (np.cumsum(quotes, dtype=np.uint8) & 1) == in_string
        in_string ^= bool(np.count_nonzero(quotes) & 1)
        steps = _STEP[piece[outside]]
        levels = depth + np.cumsum(steps, dtype=np.int64)
        deepest = max(deepest, int(levels.max(initial=depth)))
        depth = int(levels[-1]) if len(levels) else depth
        opened += int(np.count_nonzero(steps > 0))
        separators += int(np.count_nonzero(_IS_SEPARATOR[piece[outside]]))
        yield deepest, opened, separators


def _drop_escaped(piece: U8, quotes: BoolArray, is_escaped: bool) -> bool:
    """Take quotes behind an odd number of backslashes out; whether what follows the piece is behind one.

    A backslash outside of a string is no JSON: what follows it does not matter.
    """
    at = np.arange(1, len(piece) + 1)
    others = np.where(piece == _BACKSLASH, -1 if is_escaped else 0, at)
    run = at - np.maximum.accumulate(others)  # backslashes that end here
    quotes[1:] &= run[:-1] % 2 == 0
    quotes[0] &= not is_escaped
    return bool(run[-1] % 2)


def parse(raw: bytes, path: Place) -> Json:
    """JSON in ASCII with no duplicate keys, no absurd nesting, no absurd number of values.

    Anything else is StoreCorrupt, before it costs more memory than a few times its size.
    """
    try:
        text = raw.decode("ascii")  # json would guess other encodings, in which brackets hide from the count
    except UnicodeDecodeError as error:
        raise StoreCorrupt("is no ASCII", file=path) from error
    for depth, _, values in shapes(raw):
        if depth > _MAX_DEPTH:
            raise StoreCorrupt(f"is nested more than {_MAX_DEPTH} levels deep", file=path)
        if values > _MAX_VALUES:
            raise StoreCorrupt(f"holds more than {_MAX_VALUES} values", file=path)
    try:
        with uncollected():
            document = json.loads(
                text, object_pairs_hook=no_duplicates, parse_constant=_finite, parse_float=_finite
            )
    except ValueError as error:
        raise StoreCorrupt(f"is no JSON: {error}", file=path) from error
    if not isinstance(document, dict):
        raise StoreCorrupt("is no JSON object", file=path)
    return cast(Json, document)


def as_dict(value: object) -> Json | None:
    """The value if it is a JSON object."""
    return cast(Json, value) if isinstance(value, dict) else None


def as_list(value: object) -> list[Any] | None:
    """The value if it is a JSON list."""
    return cast(list[Any], value) if isinstance(value, list) else None


def no_duplicates(pairs: list[tuple[str, Any]]) -> Json:
    """For ``json``: an object, or ValueError where a key is there twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no number")
    return number


def read_document(path: Place, node_type: str, kind: str) -> tuple[Json, bytes]:
    """A metadata document of ours, believed only after its version, its seal and its kind are right."""
    raw = read_bytes(path)
    document = parse(raw, path)
    mine = as_dict((as_dict(document.get("attributes")) or {}).get("cmdgpu"))
    if mine is None:
        raise NotAStore("is no store of cmdgpu", file=path.parent)
    version = mine.get("format")
    if type(version) is int and version != FORMAT and 0 <= version < 1 << 31 and is_sealed(document):
        raise NotAStore(
            f"has format version {version}, this cmdgpu reads version {FORMAT}",
            file=path.parent,
            hint="install a cmdgpu that reads it" if version > FORMAT else None,
        )
    if not is_sealed(document):
        raise StoreCorrupt("does not match its own digest: damaged, or edited by other hands", file=path)
    if type(version) is not int or version != FORMAT:
        raise StoreCorrupt("has no format version", file=path)
    if spell(document) != raw:  # the same numbers in other letters: 1e-05 as 1E-05 is one flipped bit
        raise StoreCorrupt("is not spelled as it was written: damaged, or edited by other hands", file=path)
    if mine.get("kind") != kind:
        raise NotAStore(f"holds a {printable(repr(mine.get('kind')))}, not a {kind!r}", file=path.parent)
    if document.get("zarr_format") != 3 or document.get("node_type") != node_type:
        raise StoreCorrupt(f"is no Zarr v3 {node_type}", file=path)
    return document, raw


_ARRAY_KEYS = frozenset(
    [
        "zarr_format",
        "node_type",
        "shape",
        "data_type",
        "chunk_grid",
        "chunk_key_encoding",
        "fill_value",
        "codecs",
        "attributes",
        "dimension_names",
        "storage_transformers",
    ]
)
_CODECS: Final[list[tuple[str, Json]]] = [("bytes", {"endian": "little"}), ("crc32c", {})]
"""Of every array; in ``weights`` and ``sketch`` zstd may stand between the two."""
_DTYPES = frozenset(["float32", "float16", "uint16", "float64", "int64", "int16", "uint8"])


@dataclass(frozen=True)
class ArrayShape:
    """What of an array's metadata matters to us, once it has been checked."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    zarr_type: str
    zstd_level: int | None = None
    """Of its chunks; None where they are not compressed."""


def check_array(
    document: Json,
    path: Place,
    dims: Sequence[str],
    fill: float | int | None = None,
    *,
    may_be_compressed: bool = False,
) -> ArrayShape:
    """Refuse every array this package would not have written: closed keys, codecs, encoding, sizes.

    ``fill`` is the value it must have where nothing was written; None takes any.
    """

    def refuse(what: str) -> StoreCorrupt:
        return StoreCorrupt(f"unexpected array metadata: {printable(what, 240)}", file=path)

    if unknown := set(document) - _ARRAY_KEYS:
        raise refuse(f"unknown keys {sorted(unknown)}")
    if document.get("storage_transformers") not in (None, []):
        raise refuse("storage transformers")
    if document.get("dimension_names") != list(dims):
        raise refuse(f"dimensions {document.get('dimension_names')}, expected {list(dims)}")
    if document.get("chunk_key_encoding") != {"name": "default", "configuration": {"separator": "."}}:
        raise refuse("chunk names")
    codecs = [as_dict(codec) or {} for codec in as_list(document.get("codecs")) or []]
    chain = [(codec.get("name"), codec.get("configuration", {})) for codec in codecs]
    zarr_type = document.get("data_type")
    if not isinstance(zarr_type, str) or zarr_type not in _DTYPES:
        raise refuse(f"data type {zarr_type!r}")
    itemsize = np.dtype(zarr_type).itemsize
    if itemsize == 1 and chain[:1] == [("bytes", {})]:
        chain[0] = _CODECS[0]  # single bytes have no order, and zarr writes none
    level = _zstd_level(*chain[1]) if may_be_compressed and len(chain) == 3 else None
    if (chain if level is None else [chain[0], chain[2]]) != _CODECS:
        raise refuse(f"codecs {chain}, expected {_CODECS}")
    if fill is not None and document.get("fill_value") != ("NaN" if math.isnan(fill) else fill):
        raise refuse(f"fill value {document.get('fill_value')!r}")
    grid = as_dict(document.get("chunk_grid")) or {}
    if grid.get("name") != "regular":
        raise refuse(f"chunk grid {grid.get('name')!r}")
    chunks = as_list((as_dict(grid.get("configuration")) or {}).get("chunk_shape"))
    shape = as_list(document.get("shape"))
    for what, sizes, least in (("shape", shape, 0), ("chunk shape", chunks, 1)):
        if (
            sizes is None
            or len(sizes) != len(dims)
            or not all(type(size) is int and least <= size < 1 << 62 for size in sizes)
        ):
            raise refuse(f"{what} {sizes}")
    assert shape is not None and chunks is not None
    if itemsize * math.prod(chunks) > (most := _most_chunk_bytes(level is not None)):
        raise refuse(f"chunks {chunks} of more than {most} bytes")
    return ArrayShape(tuple(shape), tuple(chunks), zarr_type, level)


def _zstd_level(name: object, configuration: object) -> int | None:
    """The level of a codec that is zstd as we write it, or None. Its own checksum is off: crc32c follows."""
    found = as_dict(configuration) or {}
    level = found.get("level")
    if name != "zstd" or set(found) != {"level", "checksum"} or found["checksum"] is not False:
        return None
    return level if type(level) is int and level in zstd.LEVELS else None


# ---- arrays of the two trees ----------------------------------------------------------------------------


def widen(values: AnyArray, dtype: str) -> AnyArray:
    """Stored elements as numbers: bfloat16 patterns become float32, the others are numbers already."""
    if dtype != "bfloat16":
        return values
    return (values.astype(np.uint32) << 16).view(np.float32)


def narrow(values: AnyArray, dtype: str) -> AnyArray:
    """Numbers as stored elements, rounded to nearest even; NaN stays NaN, with its bits where they fit."""
    if dtype != "bfloat16":
        return values.astype(storage(dtype).numpy)
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    nan = np.where(bits & 0xFFFF, 0x7FC0, bits >> 16)
    return np.where(np.isnan(values), nan, rounded).astype("<u2")


RESULT_ROWS: Final[dict[str, tuple[str, float | int]]] = {
    "mode": ("int16", UNWRITTEN),
    "a": ("float32", float("nan")),
    "b": ("float32", float("nan")),
    "correlation": ("float32", float("nan")),
}
"""The arrays of a decomposition that have an entry for every row."""
