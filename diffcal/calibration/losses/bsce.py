"""Cross-entropy weighted by a generalised Brier score of the prediction (BSCE and BSCE-GRA).

The weight of a row is ``u = (norm_beta(p - q))^gamma``, the released form: at beta = gamma = 2 the
Brier score ``sum_k (p_k - q_k)^2``. BSCE differentiates the weight; BSCE-GRA holds it constant, so
that the gradient in the logits is ``u (p - q)``: the direction of cross-entropy, longer for more
uncertain examples. Both have the same values.
"""

from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.calibration.losses.class_weights import safe_power
from diffcal.calibration.losses.contract import Contract, RowLoss, Rows, loss_rows, reduced
from diffcal.calibration.losses.expectation import (
    Soft,
    beyond_rounding,
    check_gamma,
    check_soft_form,
    expected_loss,
)
from diffcal.calibration.losses.row_statistics import row_statistics
from diffcal.errors import ConfigError

__all__ = ["Bsce", "BsceGra", "bsce", "bsce_gra", "relative_weight"]


def bsce(
    logits: Float[Tensor, "n k *d"],
    targets: Tensor,
    *,
    norm: float = 2.0,
    gamma: float = 2.0,
    soft: Soft = "distance",
    normalize_weight: bool = False,
    **contract: Unpack[Contract],
) -> Float[Tensor, "*r"]:
    """Brier-score-weighted cross-entropy ``(norm_beta(p - q))^gamma CE(q, p)``.

    Args:
        logits: ``[n, k]`` or dense ``[n, k, d1, ...]``; computed in float32 or better.
        targets: int64 labels, or float distributions of the logits' shape.
        norm: beta, at least 1. **Norm 1 is focal loss in disguise**: for a hard label
            ``|p - e_y|_1 = 2 (1 - p_y)``, so that the loss is ``2^gamma`` times the focal loss; it
            is the released command line's default.
        gamma: At least 0, which is cross-entropy. The released command for Tiny-ImageNet and the
            authors' run logs use 4 with norm 2.
        soft: Form for soft targets. ``distance`` is the definition above, whose weight vanishes at
            p = q; ``expectation`` weighs each class by its own distance to ``e_k``.
        normalize_weight: Divide ``u`` by its mean over the batch (held constant). ``u`` shrinks
            during training, which the authors' summed and clipped gradients hide; the value of an
            example then depends on its batch.
        contract: See :class:`diffcal.calibration.losses.contract.Contract`.

    Raises:
        DataError: targets do not fit the logits.
        ConfigError: norm below 1, negative gamma, unknown soft form.

    Source: Lin et al. 2025 (arXiv:2503.22725); the defaults are the paper's Brier score.
    """
    return _bsce(logits, targets, norm, gamma, soft, normalize_weight, False, contract)


def bsce_gra(
    logits: Float[Tensor, "n k *d"],
    targets: Tensor,
    *,
    norm: float = 2.0,
    gamma: float = 2.0,
    soft: Soft = "distance",
    normalize_weight: bool = False,
    **contract: Unpack[Contract],
) -> Float[Tensor, "*r"]:
    """The values of :func:`bsce` with a constant weight ``u``: the gradient is ``u (p - q)``.

    Arguments as in :func:`bsce`. With ``soft="expectation"`` each class's weight is constant and
    the gradient is ``(sum_k q_k u_k) p - q u``.

    Source: Lin et al. 2025 (arXiv:2503.22725), the uncertainty-weighted gradient.
    """
    return _bsce(logits, targets, norm, gamma, soft, normalize_weight, True, contract)


class Bsce(RowLoss):
    """Module form of :func:`bsce`."""

    _constant_weight = False

    def __init__(
        self,
        norm: float = 2.0,
        gamma: float = 2.0,
        soft: Soft = "distance",
        normalize_weight: bool = False,
        **contract: Unpack[Contract],
    ) -> None:
        super().__init__(**contract)
        _check(norm, gamma, soft)
        self.norm, self.gamma = norm, gamma
        self.soft: Soft = soft
        self.normalize_weight = normalize_weight

    def forward(self, logits: Float[Tensor, "n k *d"], targets: Tensor) -> Float[Tensor, "*r"]:
        """The loss of ``targets``, hard or soft."""
        own = (self.norm, self.gamma, self.soft, self.normalize_weight)
        return _bsce(logits, targets, *own, self._constant_weight, self.contract())

    def extra_repr(self) -> str:
        return f"norm={self.norm}, gamma={self.gamma}, soft={self.soft!r}, {super().extra_repr()}"


class BsceGra(Bsce):
    """Module form of :func:`bsce_gra`."""

    _constant_weight = True


def relative_weight(weight: Float[Tensor, " n"], rows: Rows) -> Float[Tensor, " n"]:
    """``weight`` over its mean among the rows that count, the mean held constant."""
    counted = rows.weights()
    mean = (weight.detach() * counted).sum() / counted.sum().clamp(min=1)
    return weight / torch.where(mean > 0, mean, 1)


def _bsce(
    logits: Tensor,
    targets: Tensor,
    norm: float,
    gamma: float,
    soft: Soft,
    normalize_weight: bool,
    constant: bool,
    contract: Contract,
) -> Tensor:
    _check(norm, gamma, soft)
    rows = loss_rows(logits, targets, contract)
    if rows.soft is not None and soft == "expectation":
        if normalize_weight:
            raise ConfigError("normalize_weight goes with one weight per example: soft='distance'")

        def per_class(z: Tensor, log_p: Tensor, dim: int) -> Tensor:
            p = log_p.exp()
            others = (p**norm).sum(dim, keepdim=True) - p**norm
            distance = others.clamp(min=0) + safe_power(-log_p.expm1(), norm)
            weight = safe_power(distance, gamma / norm)
            return -(weight.detach() if constant else weight) * log_p

        return reduced(expected_loss(rows, per_class), rows, contract)
    statistics = row_statistics(rows, power=float(norm))
    assert statistics.distance is not None
    distance = statistics.distance.detach() if constant else statistics.distance
    if rows.soft is not None:
        distance = beyond_rounding(distance, norm)
    weight = safe_power(distance, gamma / norm)
    if normalize_weight:
        weight = relative_weight(weight, rows)
    return reduced(weight * statistics.cross_entropy, rows, contract)


def _check(norm: float, gamma: float, soft: str) -> None:
    if not 1 <= norm < float("inf"):
        raise ConfigError(f"norm must be a finite number of at least 1, got {norm}")
    check_gamma(gamma)
    check_soft_form(soft)
