"""Small tensor helpers that several subpackages want."""

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffcal.errors import DataError, NumericalError

__all__ = ["append_dims", "as_tensor", "lay_out", "require_finite"]


def append_dims(vector: Tensor, like: Tensor) -> Tensor:
    """``vector`` [b] (or a scalar) with trailing axes of size 1 until it broadcasts over ``like``."""
    return vector.reshape(vector.shape + (1,) * (like.ndim - vector.ndim))


def as_tensor(values: Any, what: str) -> Tensor:
    """``values`` as a tensor that carries no gradient, of the same memory where torch can hold it.

    Tensors, arrays of any byte order and stride, data frames and lists. Python's numbers keep their
    64 bits, unsigned integers become int64, wider floats than torch has become float64.

    Raises:
        DataError: no numbers, or rows of different lengths; ``what`` names them in the message.
    """
    if isinstance(values, Tensor):
        tensor = values.detach()
        return tensor.long() if tensor.dtype in _POOR else tensor
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise DataError(f"{what} must be an array of numbers: {error}") from error
    if array.dtype.kind not in "biuf":
        raise DataError(f"{what} must be numbers, got an array of {array.dtype}")
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.int64)
    elif array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    elif not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if any(stride < 0 for stride in array.strides):
        array = array.copy()
    if array.flags.writeable:
        return torch.from_numpy(array)
    with warnings.catch_warnings():  # nothing here writes to what a caller gave
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


_POOR = (torch.uint16, torch.uint32, torch.uint64)
"""Integers that torch stores and hardly computes with."""


def lay_out(values: Tensor, out: Tensor) -> Tensor:
    """Copy ``values`` into ``out``, whose strides may be others, and return it; no gradient passes.

    On the CPU NumPy does it, which turns a matrix in less than half of torch's time.
    """
    plain = values.device.type == out.device.type == "cpu" and not torch.compiler.is_compiling()
    if plain and values.dtype == out.dtype and values.dtype in (torch.float32, torch.float64):
        np.copyto(out.detach().numpy(), values.detach().numpy())
    else:
        out.copy_(values.detach())
    return out


def require_finite(tensor: Tensor, what: str) -> Tensor:
    """``tensor`` itself, or :class:`NumericalError` naming ``what`` and how many values are bad."""
    finite = tensor.isfinite()
    if not bool(finite.all()):
        bad = int((~finite).sum())
        raise NumericalError(f"{what}: {bad} of {tensor.numel()} values are NaN or infinite")
    return tensor
