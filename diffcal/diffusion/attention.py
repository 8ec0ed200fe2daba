"""Self-attention through one door: torch's fused kernels, an exact form, or xformers."""

import importlib.util
import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diffcal.errors import ConfigError, MissingExtraError

__all__ = [
    "AttentionBackend",
    "attention",
    "attention_weights",
    "set_attention_backend",
]

AttentionBackend = Literal["sdpa", "exact", "xformers"]

_backend: AttentionBackend = "sdpa"


def set_attention_backend(name: str) -> None:
    """Choose how :func:`attention` computes, for the whole process.

    Args:
        name: ``sdpa`` (torch's fused kernels, the default), ``exact`` (weights formed in float32
            and written out; differentiable any number of times and under ``vmap`` without
            fallbacks) or ``xformers`` (its memory-efficient kernel, CUDA only).

    Raises:
        ConfigError: unknown name.
        MissingExtraError: xformers is not installed.
    """
    global _backend
    if name not in get_args(AttentionBackend):
        raise ConfigError(
            f"unknown attention backend '{name}': use {', '.join(get_args(AttentionBackend))}"
        )
    if name == "xformers" and importlib.util.find_spec("xformers") is None:
        raise MissingExtraError(
            "attention backend 'xformers' needs the package xformers: pip install 'diffcal[xformers]'"
        )
    _backend = name  # type: ignore[assignment]


def attention_weights(
    q: Float[Tensor, "*n s d"], k: Float[Tensor, "*n t d"]
) -> Float[Tensor, "*n s t"]:
    """Softmax over keys of ``q . k / sqrt(d)``, in the dtype of ``q``.

    Product and softmax are formed in at least float32, whatever the input; ``k`` is divided by
    ``sqrt(d)`` in its own dtype first.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        scores = q.to(wide) @ (k / math.sqrt(k.shape[-1])).to(wide).mT
        return scores.softmax(dim=-1).to(q.dtype)


def _is_transformed(tensor: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # type: ignore[attr-defined]


def attention(
    q: Float[Tensor, "b a s d"], k: Float[Tensor, "b a t d"], v: Float[Tensor, "b a t d"]
) -> Float[Tensor, "b a s d"]:
    """Values averaged with :func:`attention_weights`, each of the ``a`` heads by itself.

    Inside ``torch.func`` transforms the exact form is used whatever the backend: the fused kernels
    have no batching rule and would fall back to a loop over examples.
    """
    if _backend == "exact" or _is_transformed(q):
        return attention_weights(q, k) @ v
    if _backend == "xformers":
        from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found]

        mixed = memory_efficient_attention(
            q.transpose(1, 2).contiguous(),
            k.transpose(1, 2).contiguous(),
            v.transpose(1, 2).contiguous(),
        )
        return mixed.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v)
