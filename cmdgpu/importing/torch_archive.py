"""What ``torch.save`` writes: a zip of one pickle and one record for each storage, uncompressed.

The pickle is read as data (``pickles``): a tensor is then a ``Call`` of one of torch's rebuild functions on a
``Persistent`` storage, from which its place in the file follows. torch itself is not asked. It would map the
file, and a trainer that cuts a mapped file kills every process that looks at it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Final, cast

from cmdgpu.errors import CheckpointError, printable
from cmdgpu.importing import pickles
from cmdgpu.importing.checksums import Check
from cmdgpu.importing.contract import Checksum, TensorInfo
from cmdgpu.importing.elements import NUMPY
from cmdgpu.importing.files import Source
from cmdgpu.importing.pickles import WAY_OUT, Call, Data, Global, Persistent
from cmdgpu.importing.strided import Strided, is_c_order
from cmdgpu.importing.zip_records import Record, read_records

_STORAGES: Final = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}
_QUANTISED: Final = ("QInt8Storage", "QInt32Storage", "QUInt8Storage", "QUInt4x2Storage", "QUInt2x4Storage")

_WHOLE: Final = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
_TYPED: Final = "torch._utils._rebuild_tensor_v3"
_PARAMETERS: Final = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_SUBCLASS: Final = "torch._tensor._rebuild_from_type_v2"
_OTHER_TENSORS: Final = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_sparse_csr_tensor": "a sparse tensor",
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without data (device meta)",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_wrapper_subclass": "a tensor subclass",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of another device, held as a NumPy array",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of another device",
}
_MAX_AXES: Final = 64

ADMITTED: Final = frozenset(
    [
        *(f"{module}.{name}" for module in ("torch", "torch.cuda") for name in (*_STORAGES, *_QUANTISED)),
        "torch.storage.UntypedStorage",
        "torch.storage.TypedStorage",
        *_WHOLE,
        _TYPED,
        *_PARAMETERS,
        _SUBCLASS,
        *_OTHER_TENSORS,
        *(f"torch.{dtype}" for dtype in (*NUMPY, "qint8", "quint8", "qint32", "quint4x2", "quint2x4")),
        *(f"torch.per_{what}" for what in ("tensor_affine", "tensor_symmetric", "channel_affine")),
        *(f"torch.per_channel_{what}" for what in ("symmetric", "affine_float_qparams")),
        "torch.Size",
        "torch.Tensor",
        "torch.device",
        "torch.nn.parameter.Parameter",
        "torch.nn.parameter.Buffer",
        "torch.serialization._get_layout",
        "collections.OrderedDict",
        "collections.Counter",
        "collections.defaultdict",
        "builtins.set",
        "builtins.frozenset",
        "builtins.bytes",
        "builtins.complex",
        "builtins.dict",
        "builtins.list",
        "builtins.int",
        "builtins.float",
        "_codecs.encode",
        # Settings and scores that lie beside the weights. torch refuses them because it would have to make
        # them.
        "argparse.Namespace",
        "numpy.dtype",
        "numpy.ndarray",
        *(f"{core}.{name}" for core in ("numpy.core", "numpy._core") for name in (
            "multiarray.scalar", "multiarray._reconstruct", "numeric._frombuffer"
        )),
        *(f"pathlib.{name}" for name in ("Path", "PosixPath", "PurePath", "PurePosixPath", "WindowsPath")),
        *(f"pathlib._local.{name}" for name in ("Path", "PosixPath", "PurePosixPath", "WindowsPath")),
    ]
)  # fmt: skip
"""What may be *named* in a pickle; nothing of it is ever called."""


@dataclass(frozen=True, slots=True)
class View:
    """A tensor of the archive; two that are equal are the same tensor."""

    record: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    """In elements."""


@dataclass(frozen=True)
class Archive:
    source: Source
    root: Data
    records: dict[str, Record]
    prefix: str
    """Of every record's name, with its slash."""
    _elements: dict[View, Strided] = field(default_factory=dict[View, Strided])

    def view(self, value: Data) -> View | str | None:
        """The tensor that a value of the pickle is, why it is none that could be read, None for other things.

        Raises CheckpointError for one that would not lie in its record.
        """
        return _view(value, self)

    def elements(self, view: View) -> Strided:
        if view not in self._elements:
            size = NUMPY[view.dtype].itemsize
            start = self.records[view.record].start + view.offset * size
            info = TensorInfo(view.dtype, view.shape)
            self._elements[view] = Strided(self.source, info, start, view.strides)
        return self._elements[view]

    @property
    def checksums(self) -> tuple[Checksum, ...]:
        """Of every record; none at all where torch was told not to compute them."""
        return checksums_of(self.records)

    def refuse(self, found: str, tensor: str | None = None) -> CheckpointError:
        return CheckpointError(found, file=self.source.path, tensor=tensor, hint=WAY_OUT)


def checksums_of(records: dict[str, Record]) -> tuple[Checksum, ...]:
    """Of stored records, in the order of their bytes. None where all are 0: ``set_crc32_options(False)``."""
    if not any(record.crc32 for record in records.values()):
        return ()
    return tuple(Checksum(r.name, r.start, r.stop, r.crc32) for r in records.values() if not r.deflated)


def open_archive(source: Source, start: int = 0, stop: int | None = None) -> Archive:
    """The archive in bytes [start, stop) of a file. Raises CheckpointError for whatever is not just that."""
    records = read_records(source, start, stop)
    pickled = [name for name in records if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickled) != 1:
        raise CheckpointError(
            "is a zip archive, and none of torch.save: it has no data.pkl", file=source.path
        )
    prefix = pickled[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in records or any(name.startswith(f"{prefix}code/") for name in records):
        raise CheckpointError(
            "is a TorchScript archive: a program, not weights",
            file=source.path,
            hint="save the state_dict of the model instead: torch.save(model.state_dict(), path)",
        )
    for name, record in records.items():
        if record.deflated or not name.startswith(prefix):
            raise CheckpointError(
                f"{printable(name)!r} in it is compressed, or not of torch.save",
                file=source.path,
                hint=WAY_OUT,
            )
    _require_little_endian(source, records, prefix)
    raw = _checked(source, records[pickled[0]], records)
    return Archive(source, pickles.read(raw, source.path, ADMITTED), records, prefix)


def _require_little_endian(source: Source, records: dict[str, Record], prefix: str) -> None:
    record = records.get(f"{prefix}byteorder")
    if record is not None and (record.size > 16 or source.read(record.start, record.size) != b"little"):
        raise CheckpointError("was not saved on a little-endian machine", file=source.path, hint=WAY_OUT)


def _checked(source: Source, record: Record, records: dict[str, Record]) -> bytes:
    """The bytes of a small record that is believed from here on."""
    if record.size > pickles.MAX_BYTES:
        found = f"holds a pickle of {record.size} bytes, more than {pickles.MAX_BYTES}"
        raise CheckpointError(found, file=source.path)
    raw = source.read(record.start, record.size)
    if checksums_of(records):
        check = Check(source.path, [Checksum(record.name, 0, record.size, record.crc32)])
        check.update(raw)
        check.finish()
    return raw


# ---- tensors --------------------------------------------------------------------------------------------


def _view(value: Data, archive: Archive) -> View | str | None:
    for _ in range(4):  # a parameter of a subclass of a tensor, at most
        if type(value) is not Call:
            return None
        if value.what in _PARAMETERS and value.arguments:
            value = value.arguments[0]
        elif value.what == _SUBCLASS and len(value.arguments) >= 3:
            function, kind, arguments = cast(tuple[Any, ...], value.arguments[:3])
            plain = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
            if type(function) is not Global or type(kind) is not Global or type(arguments) is not tuple:
                raise archive.refuse("holds a tensor that is rebuilt in an unknown way")
            if kind.name not in plain:
                return f"a tensor subclass, {printable(kind.name)}"
            value = Call(function.name, cast(tuple[Any, ...], arguments))
        elif value.what in _OTHER_TENSORS:
            return _OTHER_TENSORS[value.what]
        elif value.what in _WHOLE or value.what == _TYPED:
            return _plain_view(value, archive)
        else:
            return None
    raise archive.refuse("holds a tensor inside a tensor inside a tensor")


def _plain_view(call: Call, archive: Archive) -> View | str:
    given = call.arguments
    storage = given[0] if given else None
    if type(storage) is not Persistent:
        raise archive.refuse("holds a tensor without a storage")
    match storage.id:
        case ("storage", Global(kind), str(key), str(), int(numel)) if type(numel) is int and numel >= 0:
            storage_type = kind.rpartition(".")[2]
        case _:
            raise archive.refuse("holds a storage that is not described as torch does")
    if storage_type in _QUANTISED:
        return "a quantised tensor"
    if storage_type not in _STORAGES:
        raise archive.refuse(f"holds a storage of an unknown type, {printable(storage_type)!r}")
    name = f"{archive.prefix}data/{key}"
    record = archive.records.get(name)
    held = numel * NUMPY[_STORAGES[storage_type]].itemsize
    if record is None or record.size != held:
        has = "is absent" if record is None else f"holds {record.size} bytes"
        raise archive.refuse(
            f"its pickle speaks of a record {printable(name)!r} of {held} bytes, which {has}"
        )
    dtype = _STORAGES[storage_type]
    metadata_at = 6
    if call.what == _TYPED:
        kind = given[6] if len(given) > 6 else None
        dtype = kind.name.removeprefix("torch.") if type(kind) is Global else ""
        if dtype not in NUMPY:
            return f"a tensor of {printable(dtype)}"
        metadata_at = 7
    if len(given) > metadata_at and given[metadata_at]:
        return "a view whose numbers are conjugated or negated when it is read"
    offset, shape, strides = _geometry(given[1:4], archive)
    view = View(name, dtype, shape, strides, offset)
    _require_inside(view, held // NUMPY[dtype].itemsize, archive)
    return view


def _geometry(given: tuple[Any, ...], archive: Archive) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    if len(given) == 3:
        offset, shape, strides = given[0], sizes_of(given[1]), sizes_of(given[2])
        are_sizes = shape is not None and strides is not None and len(shape) == len(strides) <= _MAX_AXES
        if type(offset) is int and offset >= 0 and are_sizes:
            return offset, cast(tuple[int, ...], shape), cast(tuple[int, ...], strides)
    raise archive.refuse("holds a tensor whose shape is no shape")


def sizes_of(value: object) -> tuple[int, ...] | None:
    """A tuple of numbers, or a torch.Size of one."""
    if type(value) is Call and value.what == "torch.Size" and len(value.arguments) == 1:
        value = value.arguments[0]
    if type(value) is not tuple:
        return None
    sizes = cast(tuple[object, ...], value)
    return cast(tuple[int, ...], sizes) if all(type(n) is int and n >= 0 for n in sizes) else None


def _require_inside(view: View, held: int, archive: Archive) -> None:
    if math.prod(view.shape) == 0:
        if math.prod(max(n, 1) for n in view.shape) >= 1 << 62:
            raise archive.refuse("holds a tensor whose shape is beyond all reason")
        return
    reach = view.offset + sum((n - 1) * s for n, s in zip(view.shape, view.strides, strict=True)) + 1
    if reach > held:
        raise archive.refuse(
            f"holds a tensor {list(view.shape)} that reaches to element {reach} of {held} in {view.record!r}"
        )
    itemsize = NUMPY[view.dtype].itemsize
    if not is_c_order(view.shape, view.strides) and math.prod(view.shape) * itemsize > archive.source.size:
        raise archive.refuse(f"holds an expanded tensor {list(view.shape)}, larger than the file")
