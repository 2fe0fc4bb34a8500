"""Pickles as data: the program in a pickle is followed, and nothing that it asks for is ever called.

A pickle is a program for a stack machine. What it builds of numbers, texts, lists and dicts is built; where
it names a global it gets a ``Global``, and where it calls one it gets a ``Call`` that says what would have
been called with what. There is no import, no attribute and no call in here that the pickle has a say in.
That is stricter than ``torch.load(weights_only=True)``, which does call what is on its list, and asks for
memory on the word of the file (``bytearray(1 << 40)``).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn, TypeAlias, cast

from cmdgpu.errors import CheckpointError, printable

MAX_BYTES: Final = 64 << 20
_MAX_OBJECTS: Final = 1 << 22
"""Lists, dicts, tuples, calls, marks, memories: a byte or two of a pickle each, a hundred of memory."""
_MAX_STEPS: Final = 1 << 24
"""A step leaves at most one reference on the stack."""
_MAX_LONG_BYTES: Final = 64

WAY_OUT: Final = "re-save its state_dict as safetensors where it was made"


@dataclass(frozen=True, slots=True)
class Global:
    """``module.name``, never looked up."""

    name: str


@dataclass(eq=False, slots=True)
class Call:
    """What a pickle wanted done, not done."""

    what: str
    arguments: tuple[Any, ...]
    state: object = None


@dataclass(eq=False, frozen=True, slots=True)
class Persistent:
    """Something that lies outside the pickle."""

    id: object


Data: TypeAlias = Any
"""None, bool, int, float, str, bytes, list (of a set, too), tuple, dict, Global, Call, Persistent."""

_EMPTY_DICTS: Final = frozenset(["collections.OrderedDict", "collections.Counter", "collections.defaultdict"])


def read(raw: bytes, path: Path, admitted: Container[str]) -> Data:
    """What a pickle of protocol 2 to 5 describes. Subclasses of dict come as dicts, without attributes.

    Raises CheckpointError for a global that is not ``admitted``, by its name, and for whatever is no whole
    pickle, or one beyond all reason.
    """
    if len(raw) > MAX_BYTES:
        raise CheckpointError(f"holds a pickle of {len(raw)} bytes, more than {MAX_BYTES}", file=path)
    return _Machine(raw, path, admitted).run()


class _Machine:
    def __init__(self, raw: bytes, path: Path, admitted: Container[str]) -> None:
        self._raw, self._path, self._admitted = raw, path, admitted
        self._at = 0
        self._objects = 0
        self._stack: list[Data] = []
        self._below: list[list[Data]] = []
        """The stacks under the marks."""
        self._memory: dict[int, Data] = {}

    def _refuse(self, found: str) -> NoReturn:
        raise CheckpointError(f"holds no pickle of data: {found}", file=self._path, hint=WAY_OUT)

    def run(self) -> Data:
        raw = self._raw
        try:
            for _ in range(_MAX_STEPS):
                code, self._at = raw[self._at], self._at + 1
                if code == _STOP:
                    break
                if (step := _STEPS[code]) is None:
                    self._refuse(f"opcode {code:#04x} at byte {self._at - 1}")
                step(self)
            else:
                self._refuse(f"it has more than {_MAX_STEPS} steps")
            result = self._stack.pop()
        except (IndexError, KeyError, struct.error) as error:  # past the end, off the stack, never remembered
            self._at = min(self._at, len(raw))
            raise CheckpointError(
                f"holds a pickle that breaks at byte {self._at}", file=self._path
            ) from error
        except (UnicodeDecodeError, OverflowError, TypeError) as error:
            raise CheckpointError(
                f"holds a pickle that breaks at byte {self._at}", file=self._path
            ) from error
        if self._stack or self._below:
            self._refuse("it leaves more than one value")
        return result

    # ---- the tape ---------------------------------------------------------------------------------------

    def take(self, size: int) -> bytes:
        begin, self._at = self._at, self._at + size
        if self._at > len(self._raw):
            raise IndexError
        return self._raw[begin : self._at]

    def number(self, form: struct.Struct) -> Any:
        return form.unpack(self.take(form.size))[0]

    def line(self) -> str:
        if (end := self._raw.find(b"\n", self._at, self._at + 1024)) < 0:
            raise IndexError
        line, self._at = self._raw[self._at : end].decode("utf-8"), end + 1
        return line

    # ---- the stack --------------------------------------------------------------------------------------

    def push(self, value: Data) -> None:
        self._stack.append(value)

    def made(self, value: Data) -> None:
        self.count()
        self._stack.append(value)

    def count(self) -> None:
        self._objects += 1
        if self._objects > _MAX_OBJECTS:
            self._refuse(f"it builds more than {_MAX_OBJECTS} objects")

    def pop(self) -> Data:
        return self._stack.pop()

    def top(self) -> Data:
        return self._stack[-1]

    def mark(self) -> None:
        self.count()
        self._below.append(self._stack)
        self._stack = []

    def since_mark(self) -> list[Data]:
        values, self._stack = self._stack, self._below.pop()
        return values

    def last(self, count: int) -> tuple[Data, ...]:
        if len(self._stack) < count:
            raise IndexError
        values = tuple(self._stack[-count:])
        del self._stack[-count:]
        return values

    def drop(self) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self.since_mark()

    def remember(self, place: int) -> None:
        if place not in self._memory:
            self.count()
        self._memory[place] = self._stack[-1]

    def memorize(self) -> None:
        self.remember(len(self._memory))

    def recall(self, place: int) -> None:
        self._stack.append(self._memory[place])

    # ---- values -----------------------------------------------------------------------------------------

    def long(self, size: int) -> None:
        if size > _MAX_LONG_BYTES:
            self._refuse(f"a whole number of {size} bytes")
        self.push(int.from_bytes(self.take(size), "little", signed=True))

    def text(self, size: int) -> None:
        self.push(self.take(size).decode("utf-8", "surrogatepass"))

    def add_items(self, pairs: list[Data]) -> None:
        target = self._stack[-1]
        if type(target) is not dict or len(pairs) % 2:
            self._refuse("items for what is no dict")
        for i in range(0, len(pairs), 2):
            self._check_key(pairs[i])
            cast(dict[Data, Data], target)[pairs[i]] = pairs[i + 1]

    def _check_key(self, key: Data) -> None:
        """Tuples inside tuples are hashed again and again: a hundred bytes could keep us busy for ever."""
        parts: tuple[Data, ...] = cast(Any, key) if type(key) is tuple else (key,)
        if not all(type(part) in _KEYS for part in parts):
            self._refuse("a key that is no number and no text")

    def add_elements(self, elements: list[Data]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            self._refuse("elements for what is no list")
        cast(list[Data], target).extend(elements)

    def as_dict(self, values: list[Data]) -> None:
        self.made({})
        self.add_items(values)

    # ---- what would be code -----------------------------------------------------------------------------

    def named(self, module: Data, name: Data) -> None:
        if type(module) is not str or type(name) is not str:
            self._refuse("a global whose name is no text")
        # protocol 2 calls it by the name that it had in Python 2
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if full not in self._admitted:
            raise _blocked(self._path, full, is_whole=not self._stack and not self._below)
        self.made(Global(full))

    def called(self, arguments: Data, what: Data) -> None:
        if type(what) is not Global or type(arguments) is not tuple:
            self._refuse("a call of what is no global")
        name, given = what.name, cast(tuple[Data, ...], arguments)
        if name in _EMPTY_DICTS:
            self._as_subclass_of_dict(given)
        elif name in ("builtins.set", "builtins.frozenset"):
            self.made(list(cast(list[Data], given[0])) if given and type(given[0]) is list else [])
        elif name == "builtins.bytes" and not given:  # how protocol 2 spells b""
            self.push(b"")
        elif name == "_codecs.encode" and len(given) == 2 and type(given[0]) is str and given[1] == "latin1":
            try:
                self.push(given[0].encode("latin1"))
            except UnicodeEncodeError:
                self._refuse("bytes that are none")
        else:
            self.made(Call(name, given))

    def _as_subclass_of_dict(self, given: tuple[Data, ...]) -> None:
        self.made({})
        if given and type(given[0]) is dict:
            for key, value in cast(dict[Data, Data], given[0]).items():
                self.count()
                self.add_items([key, value])
        elif given and type(given[0]) is list:
            for pair in cast(list[Data], given[0]):
                self.count()
                if type(pair) not in (list, tuple) or len(pair) != 2:
                    self._refuse("items that are no pairs")
                self.add_items(list(pair))

    def build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if type(target) is Call:
            target.state = state
        elif type(target) is not dict:  # whose attributes nobody asks for
            self._refuse("a state for what has none")


_KEYS: Final = frozenset([str, int, float, bool, bytes, type(None), Global, Call])


def _blocked(path: Path, name: str, *, is_whole: bool) -> CheckpointError:
    shown = printable(name)
    if is_whole:
        return CheckpointError(
            f"is one pickled object of {shown}, a whole model perhaps; no object is ever built from a file",
            file=path,
            hint=WAY_OUT,
        )
    return CheckpointError(
        f"its pickle wants {shown}, which is no part of weights; nothing of a file is ever called",
        file=path,
        hint=WAY_OUT,
    )


_U8, _U16, _U32, _U64 = (struct.Struct(f"<{letter}") for letter in "BHIQ")
_I32, _DOUBLE = struct.Struct("<i"), struct.Struct(">d")
_STOP: Final = ord(".")


def _append(m: _Machine) -> None:
    m.add_elements([m.pop()])


def _tuple(count: int) -> Callable[[_Machine], None]:
    return lambda m: m.made(m.last(count) if count else ())


_OPCODES: Final[dict[bytes, Callable[[_Machine], object]]] = {
    b"\x80": lambda m: m.take(1),  # PROTO
    b"\x95": lambda m: m.take(8),  # FRAME
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"J": lambda m: m.push(m.number(_I32)),
    b"K": lambda m: m.push(m.number(_U8)),
    b"M": lambda m: m.push(m.number(_U16)),
    b"\x8a": lambda m: m.long(m.number(_U8)),
    b"\x8b": lambda m: m.long(m.number(_U32)),
    b"G": lambda m: m.push(m.number(_DOUBLE)),
    b"X": lambda m: m.text(m.number(_U32)),
    b"\x8c": lambda m: m.text(m.number(_U8)),
    b"\x8d": lambda m: m.text(m.number(_U64)),
    b"U": lambda m: m.text(m.number(_U8)),  # SHORT_BINSTRING
    b"B": lambda m: m.push(m.take(m.number(_U32))),
    b"C": lambda m: m.push(m.take(m.number(_U8))),
    b"\x8e": lambda m: m.push(m.take(m.number(_U64))),
    b"\x96": lambda m: m.push(m.take(m.number(_U64))),  # BYTEARRAY8
    b"(": lambda m: m.mark(),
    b")": _tuple(0),
    b"\x85": _tuple(1),
    b"\x86": _tuple(2),
    b"\x87": _tuple(3),
    b"t": lambda m: m.made(tuple(m.since_mark())),
    b"]": lambda m: m.made([]),
    b"\x8f": lambda m: m.made([]),  # EMPTY_SET
    b"l": lambda m: m.made(m.since_mark()),
    b"\x91": lambda m: m.made(m.since_mark()),  # FROZENSET
    b"}": lambda m: m.made({}),
    b"d": lambda m: m.as_dict(m.since_mark()),
    b"a": _append,
    b"e": lambda m: m.add_elements(m.since_mark()),
    b"\x90": lambda m: m.add_elements(m.since_mark()),  # ADDITEMS
    b"s": lambda m: m.add_items(list(m.last(2))),
    b"u": lambda m: m.add_items(m.since_mark()),
    b"0": lambda m: m.drop(),
    b"1": lambda m: m.since_mark(),
    b"2": lambda m: m.push(m.top()),
    b"q": lambda m: m.remember(m.number(_U8)),
    b"r": lambda m: m.remember(m.number(_U32)),
    b"\x94": lambda m: m.memorize(),
    b"h": lambda m: m.recall(m.number(_U8)),
    b"j": lambda m: m.recall(m.number(_U32)),
    b"c": lambda m: m.named(m.line(), m.line()),
    b"\x93": lambda m: m.named(*m.last(2)),
    b"R": lambda m: m.called(m.pop(), m.pop()),
    b"\x81": lambda m: m.called(m.pop(), m.pop()),  # NEWOBJ
    b"b": lambda m: m.build(),
    b"Q": lambda m: m.made(Persistent(m.pop())),
}
_STEPS: Final = [_OPCODES.get(bytes([code])) for code in range(256)]
