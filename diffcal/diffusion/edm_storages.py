"""Tensors inside EDM snapshots: storages in torch's legacy stream format, and views of them."""

import struct
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffcal.diffusion.pickle_machine import PickleMachine, StandIn
from diffcal.errors import CheckpointError

__all__ = ["StoredTensor", "parse_storage", "rebuild_tensor"]

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_SYSTEM = {
    "protocol_version": _PROTOCOL,
    "little_endian": True,
    "type_sizes": {"short": 2, "int": 4, "long": 4},
}
_MAX_DIMENSIONS = 8
_ELEMENTS = {
    "torch.FloatStorage": (torch.float32, 4),
    "torch.DoubleStorage": (torch.float64, 8),
    "torch.HalfStorage": (torch.float16, 2),
    "torch.BFloat16Storage": (torch.bfloat16, 2),
    "torch.LongStorage": (torch.int64, 8),
    "torch.IntStorage": (torch.int32, 4),
}
_STORAGE_TYPES = {name: StandIn(name) for name in _ELEMENTS}
_WHAT = "a tensor's storage"


@dataclass(frozen=True)
class Storage:
    """Flat array of ``count`` elements, still as bytes of the file."""

    dtype: torch.dtype
    count: int
    data: memoryview


@dataclass(frozen=True)
class StoredTensor:
    """Bounds-checked view of a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def end(self) -> int:
        """Position after the last element of the storage that the view touches."""
        if 0 in self.shape:
            return self.offset
        steps = zip(self.shape, self.stride, strict=True)
        return self.offset + sum((size - 1) * step for size, step in steps) + 1

    def tensor(self) -> Tensor:
        """A contiguous copy in memory of its own, of no more than the elements it needs."""
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.storage.dtype)
        width = self.storage.dtype.itemsize
        data = self.storage.data[self.offset * width : self.end * width]
        # As bytes, since numpy has no bfloat16.
        flat = torch.from_numpy(np.frombuffer(data, dtype=np.uint8).copy()).view(self.storage.dtype)
        view = flat.as_strided(self.shape, self.stride)
        return (
            view
            if view.numel() == flat.numel() and view.is_contiguous()
            else view.clone(memory_format=torch.contiguous_format)
        )


def parse_storage(data: memoryview) -> Storage:
    """Storage of a complete legacy ``torch.save`` stream: five small pickles, a count, raw numbers.

    Raises:
        UnsafeCheckpointError: one of the pickles names something else than a storage type.
        CheckpointError: damaged, or counts do not agree with the bytes that are there.
    """
    references: list[Any] = []
    plain = PickleMachine(data, {}, what=_WHAT)
    typed = PickleMachine(
        data, _STORAGE_TYPES, persistent=partial(_reference, references), what=_WHAT
    )
    magic, at = plain.load(0)
    if magic != _MAGIC:
        raise CheckpointError(f"{_WHAT} does not have torch's magic number")
    version, at = plain.load(at)
    system, at = plain.load(at)
    if version != _PROTOCOL or system != _SYSTEM:
        raise CheckpointError(f"{_WHAT} was written for another version of the format or machine")
    reference, at = typed.load(at)
    if len(references) != 1 or reference is not references[0]:
        raise CheckpointError(f"{_WHAT} does not consist of one storage")
    dtype, width, key, count = reference
    keys, at = plain.load(at)
    if not isinstance(keys, list) or len(keys) != 1 or keys[0] != key:
        raise CheckpointError(f"{_WHAT} lists other keys than its own")
    if len(data) - at < 8:
        raise CheckpointError(f"{_WHAT} is truncated before its element count")
    (written,) = struct.unpack("<q", data[at : at + 8])
    at += 8
    if written != count or len(data) - at != count * width:
        raise CheckpointError(
            f"{_WHAT} promises {count} elements and counts {written}, but {len(data) - at} bytes "
            f"of {width}-byte elements follow"
        )
    return Storage(dtype, count, data[at:])


def rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any) -> StoredTensor:
    """View of a parsed storage after checking that it stays inside.

    Raises:
        CheckpointError: wrong types, negative numbers, or elements beyond the storage.
    """
    if not isinstance(storage, Storage):
        raise CheckpointError("a tensor is made of something else than a storage")
    if not _is_count(offset) or not _are_counts(shape) or not _are_counts(stride):
        raise CheckpointError("a tensor has an offset, size or stride that is no whole number >= 0")
    if len(shape) != len(stride):
        raise CheckpointError(f"a tensor has {len(shape)} sizes but {len(stride)} strides")
    elements = 1
    for size in shape:
        elements *= size
    view = StoredTensor(storage, offset, tuple(shape), tuple(stride))
    # Zero strides could otherwise ask for far more memory than the file has bytes.
    if elements > storage.count or view.end > storage.count:
        raise CheckpointError(
            f"a tensor of shape {list(shape)} reaches beyond its storage of {storage.count} elements"
        )
    return view


def _reference(references: list[Any], value: Any) -> tuple[torch.dtype, int, str, int]:
    """Element type, width, key and count of a persistent id, also appended to ``references``."""
    # ("storage", type, key, location, count, view); location and key mean nothing here.
    if (
        not isinstance(value, tuple)
        or len(value) != 6
        or not isinstance(value[0], str)
        or value[0] != "storage"
        or not isinstance(value[1], StandIn)
        or value[1].name not in _ELEMENTS
        or not isinstance(value[2], str)
        or not isinstance(value[3], str)
        or not _is_count(value[4])
        or value[5] is not None
    ):
        raise CheckpointError(f"{_WHAT} has a reference of unknown form")
    result = (*_ELEMENTS[value[1].name], value[2], value[4])
    references.append(result)
    return result


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40


def _are_counts(values: Any) -> bool:
    return (
        isinstance(values, tuple)
        and len(values) <= _MAX_DIMENSIONS
        and all(_is_count(value) for value in values)
    )
