"""Conditions between those of several classes or prompts."""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.core.tensors import append_dims
from diffcal.errors import ConfigError, DataError

__all__ = ["Interpolation", "interpolate_conditions", "slerp"]

Interpolation = Literal["linear", "renorm", "slerp"]

_PARALLEL = 1e-7  # below this sine of the angle, slerp is linear interpolation


def interpolate_conditions(
    conditions: Float[Tensor, "k *shape"],
    weights: Float[Tensor, "b k"],
    interpolation: Interpolation = "linear",
) -> Float[Tensor, "b *shape"]:
    """Conditions between those of ``k`` classes; weight 1 gives a class's own.

    - ``linear``: the weighted sum.
    - ``renorm``: the weighted sum, every vector along the last axis (a class, or a token of a
      prompt) rescaled to the weighted mean of the norms.
    - ``slerp``: along the great circle between two classes (:func:`slerp`).

    Raises:
        DataError: slerp between more than two classes.
        ConfigError: an unknown interpolation.
    """
    weights = weights.to(conditions.device, conditions.dtype)
    if interpolation == "slerp":
        if int((weights > 0).sum(dim=1).max()) > 2:
            raise DataError("slerp runs between two classes; use linear or renorm for more")
        share, order = weights.sort(dim=1, descending=True, stable=True)
        if weights.shape[1] == 1:
            return conditions[order[:, 0]]
        t = share[:, 1] / (share[:, 0] + share[:, 1])
        return slerp(conditions[order[:, 0]], conditions[order[:, 1]], t)
    if interpolation not in get_args(Interpolation):
        names = ", ".join(get_args(Interpolation))
        raise ConfigError(f"unknown interpolation '{interpolation}': use {names}")
    mixed = torch.einsum("bk,k...->b...", weights, conditions)
    if interpolation == "linear":
        return mixed
    norms = conditions.norm(dim=-1, keepdim=True)
    wanted = torch.einsum("bk,k...->b...", weights, norms)
    found = mixed.norm(dim=-1, keepdim=True)
    return torch.where(found > 0, mixed * (wanted / found.clamp_min(1e-30)), mixed)


def slerp(
    a: Float[Tensor, "b *shape"], b: Float[Tensor, "b *shape"], t: Float[Tensor, " b"]
) -> Float[Tensor, "b *shape"]:
    """Spherical interpolation of vectors along the last axis, from ``a`` (t = 0) to ``b`` (t = 1).

    ``(sin((1 - t) theta) a + sin(t theta) b) / sin(theta)`` with ``theta`` the angle between them;
    lengths are not normalised. Linear where the vectors are (anti)parallel or zero.
    """
    dtype = a.dtype
    a, b, t = a.double(), b.double(), append_dims(t.double(), a)
    scale = a.norm(dim=-1, keepdim=True) * b.norm(dim=-1, keepdim=True)
    cosine = (a * b).sum(dim=-1, keepdim=True) / scale.clamp_min(torch.finfo(scale.dtype).tiny)
    theta = cosine.clamp(-1, 1).acos()
    sine = theta.sin()
    linear = (sine < _PARALLEL) | (scale == 0)
    safe = torch.where(linear, 1.0, sine)
    left = torch.where(linear, 1 - t, ((1 - t) * theta).sin() / safe)
    right = torch.where(linear, t, (t * theta).sin() / safe)
    return (left * a + right * b).to(dtype)
