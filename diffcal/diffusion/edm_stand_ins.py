"""Stand-ins for the names in an EDM snapshot: what each means, with every argument checked.

None of them calls or imports anything that comes from the file.
"""

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffcal.diffusion.edm_storages import StoredTensor, parse_storage, rebuild_tensor
from diffcal.diffusion.pickle_machine import Buildable, StandIn, is_cheap_key
from diffcal.errors import CheckpointError

__all__ = ["SNAPSHOT_NAMES", "Record", "is_key"]

_PERSISTENCE_VERSION = 6
_KEY = re.compile(r"[A-Za-z0-9_]{1,100}")


def is_key(name: Any) -> bool:
    """Whether ``name`` is text that can be part of a state-dict key."""
    return isinstance(name, str) and _KEY.fullmatch(name) is not None


@dataclass
class Record(Buildable):
    """An object of the file: the name of its class and the dictionary of its attributes."""

    class_name: str
    state: dict[Any, Any] | None = None

    def build(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise CheckpointError(f"an object '{self.class_name}' has a state that is no dict")
        self.state = state


@dataclass
class _NumpyType(Buildable):
    code: str
    ready: bool = False

    def build(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or not _is_text(state[1], "<"):
            raise CheckpointError("a number has a byte order other than little endian")
        self.ready = True


_NUMBER_FORMATS = {"f8": "<d", "f4": "<f", "i8": "<q", "i4": "<i"}


def _is_text(value: Any, text: str) -> bool:
    return isinstance(value, str) and value == text


def _arguments(arguments: tuple[Any, ...], low: int, high: int, name: str) -> tuple[Any, ...]:
    if not low <= len(arguments) <= high:
        raise CheckpointError(f"'{name}' is called with {len(arguments)} arguments")
    return arguments


def _persistent_object(arguments: tuple[Any, ...]) -> Record:
    (meta,) = _arguments(arguments, 1, 1, "_reconstruct_persistent_obj")
    if not isinstance(meta, dict) or not _is_text(meta.get("type"), "class"):
        raise CheckpointError("a persistent object is not described as a class")
    version = meta.get("version")
    if not isinstance(version, int) or version != _PERSISTENCE_VERSION:
        raise CheckpointError(
            f"persistent objects have version {str(version)[:20] if isinstance(version, int) else '?'}"
            f"; version {_PERSISTENCE_VERSION} can be read"
        )
    name, state = meta.get("class_name"), meta.get("state")
    if not isinstance(name, str) or not is_key(name):
        raise CheckpointError("a persistent object has no proper class name")
    if not isinstance(state, dict):
        raise CheckpointError(f"persistent object '{name}' has no state")
    return Record(name, state)


def _parameter(arguments: tuple[Any, ...]) -> StoredTensor:
    tensor, _, _ = _arguments(arguments, 3, 3, "_rebuild_parameter")
    if not isinstance(tensor, StoredTensor):
        raise CheckpointError("a parameter is made of something else than a tensor")
    return tensor


def _tensor(arguments: tuple[Any, ...]) -> StoredTensor:
    return rebuild_tensor(*_arguments(arguments, 6, 7, "_rebuild_tensor_v2")[:4])


def _tensor_v1(arguments: tuple[Any, ...]) -> StoredTensor:
    return rebuild_tensor(*_arguments(arguments, 4, 4, "_rebuild_tensor"))


def _storage(arguments: tuple[Any, ...]) -> Any:
    (data,) = _arguments(arguments, 1, 1, "_load_from_bytes")
    if not isinstance(data, memoryview):
        raise CheckpointError("a storage is made of something else than bytes")
    return parse_storage(data)


def _dictionary(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    _arguments(arguments, 0, 0, "OrderedDict")
    return {}


def _set(arguments: tuple[Any, ...]) -> set[Any]:
    items = _arguments(arguments, 0, 1, "set")
    if items and (not isinstance(items[0], list) or not all(map(is_cheap_key, items[0]))):
        raise CheckpointError("a set is made of something else than a list of names or numbers")
    return set(items[0]) if items else set()


def _encoded(arguments: tuple[Any, ...]) -> memoryview:
    # Protocol 2 has no bytes: they come as text with one character for each byte.
    text, encoding = _arguments(arguments, 2, 2, "_codecs.encode")
    if not isinstance(text, str) or not _is_text(encoding, "latin1"):
        raise CheckpointError("bytes are encoded in another way than latin1")
    try:
        return memoryview(text.encode("latin-1"))
    except UnicodeEncodeError as error:
        raise CheckpointError("bytes hold characters that are no bytes") from error


def _size(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    (sizes,) = _arguments(arguments, 1, 1, "torch.Size")
    if not isinstance(sizes, tuple):
        raise CheckpointError("a torch.Size is made of something else than a tuple")
    return sizes


def _device(arguments: tuple[Any, ...]) -> str:
    kind = _arguments(arguments, 1, 2, "torch.device")[0]
    if not isinstance(kind, str):
        raise CheckpointError("a torch.device is named by something else than text")
    return kind


def _numpy_type(arguments: tuple[Any, ...]) -> _NumpyType:
    code, _, _ = _arguments(arguments, 3, 3, "numpy.dtype")
    if not isinstance(code, str) or code not in _NUMBER_FORMATS:
        raise CheckpointError("a number has a numpy type other than f8, f4, i8 or i4")
    return _NumpyType(code)


def _number(arguments: tuple[Any, ...]) -> int | float:
    kind, data = _arguments(arguments, 2, 2, "numpy scalar")
    if not isinstance(kind, _NumpyType) or not kind.ready or not isinstance(data, memoryview):
        raise CheckpointError("a numpy number is not made of a type and bytes")
    layout = _NUMBER_FORMATS[kind.code]
    if len(data) != struct.calcsize(layout):
        raise CheckpointError(f"a numpy number of type {kind.code} has {len(data)} bytes")
    return struct.unpack(layout, data)[0]


def _module_dict() -> Record:
    return Record("ModuleDict")


def _table() -> dict[str, StandIn]:
    calls: dict[str, Callable[[tuple[Any, ...]], Any]] = {
        "torch_utils.persistence._reconstruct_persistent_obj": _persistent_object,
        "torch._utils._rebuild_parameter": _parameter,
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._utils._rebuild_tensor": _tensor_v1,
        "torch.storage._load_from_bytes": _storage,
        "torch.Size": _size,
        "torch.device": _device,
        "numpy.core.multiarray.scalar": _number,
        "numpy._core.multiarray.scalar": _number,
        "numpy.dtype": _numpy_type,
        "builtins.set": _set,
        "__builtin__.set": _set,
        "_codecs.encode": _encoded,
    }
    table = {name: StandIn(name, call=call) for name, call in calls.items()}
    for name in ("collections.OrderedDict", "dnnlib.EasyDict", "dnnlib.util.EasyDict"):
        table[name] = StandIn(name, call=_dictionary, new=dict)
    name = "torch.nn.modules.container.ModuleDict"
    table[name] = StandIn(name, new=_module_dict)
    return table


SNAPSHOT_NAMES: dict[str, StandIn] = _table()
"""Every name that a snapshot may contain, by its full dotted form."""
