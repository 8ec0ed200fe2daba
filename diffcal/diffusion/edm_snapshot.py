"""What an EDM ``network-snapshot-*.pkl`` says: classes, constructor arguments and tensors.

A snapshot is a pickle of live modules that carry their own Python source; the usual way to read it
executes that source. Here the file is read by :class:`PickleMachine`, which knows the few names
of :mod:`diffcal.diffusion.edm_stand_ins`; the source text is an ordinary string that nobody looks at.
"""

import math
import mmap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffcal.diffusion.edm_stand_ins import SNAPSHOT_NAMES, Record, is_key
from diffcal.diffusion.edm_storages import StoredTensor
from diffcal.diffusion.pickle_machine import PickleMachine
from diffcal.errors import CheckpointError

__all__ = ["Snapshot", "read_snapshot"]

_MAX_BYTES = 4 << 30
_MAX_DEPTH = 100
_MAX_MODULES = 20_000
_MAX_ENTRIES = 500_000  # parts of all modules, absent ones included; the largest net has 1 500
_ZIP_MAGIC = b"PK\x03\x04"
_LEGACY_TORCH_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")


@dataclass(frozen=True)
class Snapshot:
    """Content of the ``ema`` entry of a snapshot."""

    preconditioner: str
    arguments: tuple[Any, ...]
    """Positional constructor arguments (normally none), as plain values."""
    kwargs: dict[str, Any]
    """Keyword constructor arguments, as plain values."""
    classes: dict[str, str]
    """Class name of every module, by dotted name; the preconditioner's own is ``""``."""
    tensors: dict[str, StoredTensor]
    """Parameters and buffers by state-dict key."""
    dataset: dict[str, Any]
    """What the snapshot says about its training data, as plain values; often empty."""


def read_snapshot(path: Path) -> Snapshot:
    """Parse a snapshot file without running or importing anything that it names.

    Tensors stay in the file, which is mapped, until :meth:`StoredTensor.tensor` copies them.

    Raises:
        UnsafeCheckpointError: the file names, calls or does something that is not on the list.
        CheckpointError: not a snapshot, damaged, or of another version.
    """
    data = _mapped(path)
    what = f"'{path.name}'"
    if bytes(data[:4]) == _ZIP_MAGIC or bytes(data[:14]) == _LEGACY_TORCH_MAGIC:
        raise CheckpointError(
            f"{what} is a torch.save archive, such as EDM's training-state-*.pt with the raw, "
            "unaveraged weights; give the network-snapshot-*.pkl of the same run"
        )
    content, end = PickleMachine(data, SNAPSHOT_NAMES, what=what).load()
    if end != len(data):
        raise CheckpointError(f"{what} goes on for {len(data) - end} bytes after its end")
    if not isinstance(content, dict) or "ema" not in content:
        raise CheckpointError(f"{what} has no entry 'ema', so it is not an EDM network snapshot")
    root = content["ema"]
    if not isinstance(root, Record) or not isinstance(root.state, dict):
        raise CheckpointError(f"{what}: entry 'ema' is not a network")
    collected = _Collection()
    collected.add(root, "", 0)
    arguments = root.state.get("_init_args")
    kwargs = root.state.get("_init_kwargs")
    if not isinstance(arguments, tuple | None) or not isinstance(kwargs, dict | None):
        raise CheckpointError(f"{what}: the constructor arguments are not a tuple and a dict")
    dataset = content.get("dataset_kwargs")
    return Snapshot(
        preconditioner=root.class_name,
        arguments=tuple(_plain(value, "positional") for value in arguments or ()),
        kwargs=_plain_arguments(kwargs or {}),
        classes=collected.classes,
        tensors=collected.tensors,
        dataset=_plain_or_nothing(dataset),
    )


def _mapped(path: Path) -> memoryview:
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size > _MAX_BYTES:
                raise CheckpointError(f"'{path}' has {size} bytes; snapshots stay below 4 GiB")
            if size == 0:
                raise CheckpointError(f"'{path}' is empty")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise CheckpointError(f"'{path}' cannot be read: {error.strerror or error}") from error


@dataclass
class _Collection:
    """Walks records down to tensors; only the three module dictionaries are looked at."""

    classes: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    entries: int = 0

    def add(self, record: Any, name: str, depth: int) -> None:
        if not isinstance(record, Record) or not isinstance(record.state, dict):
            raise CheckpointError(f"module '{name}' is not a module")
        if depth > _MAX_DEPTH or len(self.classes) >= _MAX_MODULES:
            raise CheckpointError(f"the network is too deep or has over {_MAX_MODULES} modules")
        self.classes[name] = record.class_name
        for group in ("_parameters", "_buffers"):
            for key, value in self._entries(record.state, group, name):
                full = _join(name, key)
                if full in self.tensors:
                    raise CheckpointError(f"tensor '{full}' is there twice")
                if not isinstance(value, StoredTensor):
                    raise CheckpointError(f"'{full}' is not a tensor")
                self.tensors[full] = value
        for key, value in self._entries(record.state, "_modules", name):
            self.add(value, _join(name, key), depth + 1)

    def _entries(self, state: dict[Any, Any], group: str, name: str) -> list[tuple[str, Any]]:
        entries = state.get(group, {})
        if not isinstance(entries, dict):
            raise CheckpointError(f"module '{name}': {group} is not a dict")
        # One dict referred to by many modules would otherwise unfold without end.
        self.entries += len(entries)
        if self.entries > _MAX_ENTRIES:
            raise CheckpointError(f"the network's modules have over {_MAX_ENTRIES} parts")
        for key in entries:
            if not is_key(key):
                raise CheckpointError(f"module '{name}' has a part with the name {str(key)[:60]!r}")
        # None stands for an absent bias, filter or layer.
        return [(key, value) for key, value in entries.items() if value is not None]


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _plain_arguments(kwargs: dict[Any, Any]) -> dict[str, Any]:
    for key in kwargs:
        if not is_key(key):
            raise CheckpointError(f"the constructor has an argument called {str(key)[:60]!r}")
    return {key: _plain(value, key) for key, value in kwargs.items()}


def _plain(value: Any, name: str) -> Any:
    """Numbers, short texts and short lists of them; anything else is refused by name."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str) and len(value) <= 1000:
        return value
    numbers = isinstance(value, list | tuple) and len(value) <= 64
    if numbers and all(isinstance(item, bool | int | float) for item in value):
        return list(value)
    raise CheckpointError(
        f"argument '{name[:100]}' is a {type(value).__name__}, not a number, text or list of numbers"
    )


def _plain_or_nothing(values: Any) -> dict[str, Any]:
    """The plain entries of a dictionary that only informs."""
    kept: dict[str, Any] = {}
    for key, value in values.items() if isinstance(values, dict) else ():
        endless = isinstance(value, float) and not math.isfinite(value)
        if not is_key(key) or endless or isinstance(value, list | tuple):
            continue
        try:
            kept[key] = _plain(value, key)
        except CheckpointError:
            continue
    return kept
