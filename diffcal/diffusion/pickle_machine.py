"""A pickle reader that cannot run anything: plain values and stand-ins for listed names only.

Python's own unpickler imports and calls what a file names. This machine knows the opcodes that build
plain values; a name is looked up in a table of stand-ins given by the caller, and everything else is
refused the moment it is read, whether or not the file would go on to use it. Nothing is imported,
no object of a foreign class is made, and no Python code of the file is looked at.

Source: opcodes as documented in the standard library's ``pickletools``.
"""

import pickletools
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diffcal.errors import CheckpointError, UnsafeCheckpointError

__all__ = ["Buildable", "PickleMachine", "StandIn", "is_cheap_key"]

_MAX_DEPTH = 100  # open marks; real snapshots nest about 25 deep
_MAX_OPCODES = 5_000_000  # bounds memory; the largest published snapshot has about 60 000
_MAX_INT_BYTES = 16
_MAX_KEY = 2**31  # larger whole numbers can be chosen to collide in Python's hash tables
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,200}")
_OPCODE_NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}


@dataclass(frozen=True)
class StandIn:
    """What a listed global means: our functions of checked arguments, None where not allowed.

    Args:
        name: Full dotted name in the file.
        call: Value of ``name(*arguments)``.
        new: Value of ``name.__new__(name)``, without arguments.
    """

    name: str
    call: Callable[[tuple[Any, ...]], Any] | None = None
    new: Callable[[], Any] | None = None


class Buildable:
    """Base of stand-in objects that accept a state."""

    def build(self, state: Any) -> None:
        """Store ``state``; nothing else may happen here."""
        raise NotImplementedError


class PickleMachine:
    """Reads one pickle out of ``data``.

    Bytes come back as slices of ``data``, not copies.

    Args:
        data: The file or a part of it.
        allowed: Stand-ins by dotted name.
        persistent: Meaning of a persistent id; None: such ids are refused.
        what: How messages call the stream.
    """

    def __init__(
        self,
        data: memoryview,
        allowed: Mapping[str, StandIn],
        *,
        persistent: Callable[[Any], Any] | None = None,
        what: str = "the pickle",
    ) -> None:
        self._data, self._allowed, self._persistent = data, allowed, persistent
        self._what = what
        self._at = 0
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._unfolded = 0

    def load(self, start: int = 0) -> tuple[Any, int]:
        """Value of the pickle that begins at ``start``, and the position after its end.

        Raises:
            UnsafeCheckpointError: an unlisted name, a forbidden opcode or call.
            CheckpointError: truncated or damaged.
        """
        self._at, self._stack, self._outer, self._memo = start, [], [], {}
        self._unfolded = 0
        try:
            if self._byte() != 0x80:
                raise CheckpointError(f"{self._what} does not begin with a pickle protocol number")
            self._protocol()
            for _ in range(_MAX_OPCODES):
                code = self._byte()
                if code == 0x2E:  # STOP
                    if self._outer or len(self._stack) != 1:
                        raise CheckpointError(f"{self._what} is damaged: it stops inside a value")
                    return self._stack.pop(), self._at
                action = _ACTIONS.get(code)
                if action is None:
                    raise UnsafeCheckpointError(
                        f"{self._what} uses the pickle opcode "
                        f"{_OPCODE_NAMES.get(code, hex(code))} at byte {self._at - 1}, which is "
                        "not accepted"
                    )
                action(self)
            raise CheckpointError(f"{self._what} has more than {_MAX_OPCODES} opcodes")
        except (IndexError, KeyError, UnicodeDecodeError, struct.error) as error:
            raise CheckpointError(
                f"{self._what} is damaged near byte {self._at}: {type(error).__name__}"
            ) from error

    # Reading

    def _take(self, count: int) -> memoryview:
        if count < 0 or count > len(self._data) - self._at:
            raise CheckpointError(
                f"{self._what} is truncated: {count} bytes wanted at byte {self._at}, "
                f"{len(self._data) - self._at} left"
            )
        self._at += count
        return self._data[self._at - count : self._at]

    def _byte(self) -> int:
        return self._take(1)[0]

    def _unsigned(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little")

    def _signed(self, size: int) -> int:
        return int.from_bytes(self._take(size), "little", signed=True)

    def _text(self, size: int) -> str:
        return str(self._take(self._unsigned(size)), "utf-8")

    def _line(self) -> str:
        # Names of old protocols end with a line feed; 256 bytes are more than any listed one has.
        head = bytes(self._data[self._at : self._at + 256])
        end = head.find(b"\n")
        if end < 0:
            raise CheckpointError(f"{self._what} is damaged: a name without end at byte {self._at}")
        self._at += end + 1
        return head[:end].decode("utf-8")

    def _protocol(self) -> None:
        version = self._byte()
        if not 2 <= version <= 5:
            raise CheckpointError(f"{self._what} has pickle protocol {version}; 2 to 5 can be read")

    def _frame(self) -> None:
        size = self._unsigned(8)
        if size > len(self._data) - self._at:
            raise CheckpointError(
                f"{self._what} is truncated: a frame of {size} bytes is not there"
            )

    # Stack and memo

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _mark(self) -> None:
        if len(self._outer) >= _MAX_DEPTH:
            raise CheckpointError(f"{self._what} nests deeper than {_MAX_DEPTH} levels")
        self._outer.append(self._stack)
        self._stack = []

    def _pop_mark(self) -> list[Any]:
        items = self._stack
        self._stack = self._outer.pop()
        return items

    def _memoize(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def _tuple(self, count: int) -> None:
        items = [self._stack.pop() for _ in range(count)]
        self._push(tuple(reversed(items)))

    # Containers

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise CheckpointError(
                f"{self._what} is damaged: items set on something else than a dict"
            )
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not is_cheap_key(key):
                raise CheckpointError(f"{self._what} has a dict key that is no name or number")
            target[key] = value

    def _append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, list):
            raise CheckpointError(f"{self._what} is damaged: append to something else than a list")
        target.extend(items)

    def _add_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, set) or not all(map(is_cheap_key, items)):
            raise CheckpointError(f"{self._what} has a set of something else than names or numbers")
        target.update(items)

    # Names and calls

    def _global(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise UnsafeCheckpointError(f"{self._what} looks up a name that is not text")
        full = f"{module}.{name}"
        stand_in = self._allowed.get(full)
        if stand_in is None:
            shown = full if _NAME.fullmatch(full) else repr(full[:80])
            raise UnsafeCheckpointError(
                f"{self._what} names '{shown}', which is not on the list of accepted names; "
                "nothing was run"
            )
        self._push(stand_in)

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._global(module, name)

    def _reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, StandIn) or function.call is None:
            shown = function.name if isinstance(function, StandIn) else type(function).__name__
            raise UnsafeCheckpointError(f"{self._what} calls '{shown}', which is not accepted")
        if not isinstance(arguments, tuple):
            raise CheckpointError(f"{self._what} is damaged: call without a tuple of arguments")
        # Written once, every argument costs its own bytes. References to one long value in many
        # calls would let a small file ask for work and memory without end.
        self._unfolded += sum(len(a) for a in arguments if isinstance(a, str | memoryview | list))
        if self._unfolded > 2 * len(self._data):
            raise CheckpointError(
                f"{self._what} repeats its values in calls until they are more than twice its size"
            )
        self._push(function.call(arguments))

    def _new(self) -> None:
        arguments, cls = self._stack.pop(), self._stack.pop()
        if not isinstance(cls, StandIn) or cls.new is None or arguments != ():
            shown = cls.name if isinstance(cls, StandIn) else type(cls).__name__
            raise UnsafeCheckpointError(
                f"{self._what} makes an object of '{shown}' in a way that is not accepted"
            )
        self._push(cls.new())

    def _build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if not isinstance(target, Buildable):
            raise UnsafeCheckpointError(
                f"{self._what} sets the state of a {type(target).__name__}, which is not accepted"
            )
        target.build(state)

    def _persistent_id(self) -> None:
        if self._persistent is None:
            raise UnsafeCheckpointError(f"{self._what} uses a persistent id, which is not accepted")
        self._push(self._persistent(self._stack.pop()))


_ACTIONS: dict[int, Callable[[PickleMachine], None]] = {
    0x95: PickleMachine._frame,
    ord("("): PickleMachine._mark,
    0x94: lambda m: m._memoize(len(m._memo)),
    ord("q"): lambda m: m._memoize(m._unsigned(1)),
    ord("r"): lambda m: m._memoize(m._unsigned(4)),
    ord("h"): lambda m: m._push(m._memo[m._unsigned(1)]),
    ord("j"): lambda m: m._push(m._memo[m._unsigned(4)]),
    # Numbers and constants
    ord("N"): lambda m: m._push(None),
    0x88: lambda m: m._push(True),
    0x89: lambda m: m._push(False),
    ord("J"): lambda m: m._push(m._signed(4)),
    ord("K"): lambda m: m._push(m._unsigned(1)),
    ord("M"): lambda m: m._push(m._unsigned(2)),
    0x8A: lambda m: m._push(m._signed(_bounded_size(m._unsigned(1)))),
    ord("G"): lambda m: m._push(struct.unpack(">d", m._take(8))[0]),
    # Text and bytes
    0x8C: lambda m: m._push(m._text(1)),
    ord("X"): lambda m: m._push(m._text(4)),
    0x8D: lambda m: m._push(m._text(8)),
    ord("C"): lambda m: m._push(m._take(m._unsigned(1))),
    ord("B"): lambda m: m._push(m._take(m._unsigned(4))),
    0x8E: lambda m: m._push(m._take(m._unsigned(8))),
    # Containers
    ord("}"): lambda m: m._push({}),
    ord("]"): lambda m: m._push([]),
    ord(")"): lambda m: m._push(()),
    0x8F: lambda m: m._push(set()),
    ord("t"): lambda m: m._push(tuple(m._pop_mark())),
    0x85: lambda m: m._tuple(1),
    0x86: lambda m: m._tuple(2),
    0x87: lambda m: m._tuple(3),
    ord("a"): lambda m: m._append([m._stack.pop()]),
    ord("e"): lambda m: m._append(m._pop_mark()),
    ord("s"): lambda m: m._set_items([m._stack.pop(), m._stack.pop()][::-1]),
    ord("u"): lambda m: m._set_items(m._pop_mark()),
    0x90: lambda m: m._add_items(m._pop_mark()),
    # Names and calls
    ord("c"): lambda m: m._global(m._line(), m._line()),
    0x93: PickleMachine._stack_global,
    ord("R"): PickleMachine._reduce,
    0x81: PickleMachine._new,
    ord("b"): PickleMachine._build,
    ord("Q"): PickleMachine._persistent_id,
}


def is_cheap_key(key: Any) -> bool:
    """Names and moderate numbers; hashes of others, such as nested tuples, cost without bound."""
    return isinstance(key, str) or (isinstance(key, int) and abs(key) < _MAX_KEY)


def _bounded_size(size: int) -> int:
    if size > _MAX_INT_BYTES:
        raise CheckpointError(f"a number of {size} bytes is longer than any that belongs here")
    return size
