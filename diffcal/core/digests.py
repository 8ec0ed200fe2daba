"""What of named tensors goes into a hash that identifies a model or a file."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["hash_tensors"]


def hash_tensors(digest: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Add names, types, shapes and bytes to a ``hashlib`` object, in the order given."""
    for name, tensor in tensors:
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(plain.numpy().data)
