"""Losses of a single class, taken to soft targets as the expected loss of a label drawn from them."""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.calibration.losses.contract import Rows
from diffcal.calibration.losses.row_blocks import by_blocks
from diffcal.errors import ConfigError

__all__ = [
    "Soft",
    "beyond_rounding",
    "check_gamma",
    "check_soft_form",
    "expected_loss",
    "safe_power",
]

Soft = Literal["expectation", "distance"]
"""What a loss does with a soft target ``q``.

expectation: ``sum_k q_k L(k, p)``, the expected loss of a label drawn from q. Linear in q. If L is
not proper (focal) it is not minimised at p = q.
distance: the one-hot label in the loss's own distance is replaced by q, times the cross-entropy
``CE(q, p)``; the weight vanishes at p = q, where both parts of the loss are minimal.
"""


def expected_loss(
    rows: Rows, per_class: Callable[[Tensor, Tensor, int], Tensor]
) -> Float[Tensor, " n"]:
    """``sum_k q_k L(k, p)`` of each row, over the classes with target mass.

    Args:
        rows: With soft targets.
        per_class: (logits, log-probabilities, axis of the classes) to the loss of every class.
    """

    def formula(z: Tensor, labels: Tensor | None, soft: Tensor | None, dim: int) -> Tensor:
        assert soft is not None
        values = per_class(z, torch.log_softmax(z, dim), dim)
        return torch.where(soft > 0, soft * values, 0).sum(dim)

    return by_blocks(rows, formula)


def safe_power(base: Tensor, exponent: Tensor | float) -> Tensor:
    """``base ** exponent`` for ``base >= 0``, with a finite gradient everywhere.

    1 where the exponent is 0; else 0 with gradient 0 where the base is at most the dtype's smallest
    normal number, since exponents below 1 have an infinite slope there.
    """
    if not isinstance(exponent, Tensor):
        if exponent == 0:
            return torch.ones_like(base)
        positive = base > torch.finfo(base.dtype).tiny
        return torch.where(positive, torch.where(positive, base, 1) ** exponent, 0)
    positive = base > torch.finfo(base.dtype).tiny
    power = torch.where(positive, base, 1) ** exponent
    return torch.where(positive | (exponent == 0), power, 0)


def beyond_rounding(distance: Tensor, power: float) -> Tensor:
    """A distance ``sum_k |p_k - q_k|^power``, taken as 0 where rounding cannot tell p from q.

    The gradient of a norm is a direction, there that of the rounding errors.
    """
    return torch.where(distance > (2 * torch.finfo(distance.dtype).eps) ** power, distance, 0)


def check_gamma(gamma: float) -> float:
    """``gamma`` if it is a finite number of at least 0.

    Raises:
        ConfigError: it is not.
    """
    if not 0 <= gamma < float("inf"):
        raise ConfigError(f"gamma must be a finite number of at least 0, got {gamma}")
    return gamma


def check_soft_form(soft: str) -> None:
    """Raise :class:`ConfigError` unless ``soft`` is a :data:`Soft`."""
    if soft not in ("expectation", "distance"):
        raise ConfigError(f"unknown soft form '{soft}': use expectation or distance")
