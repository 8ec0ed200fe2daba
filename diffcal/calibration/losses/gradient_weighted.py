"""Cross-entropy with any uncertainty weight, differentiated or held constant ("GRA").

With a constant weight ``u`` the gradient in the logits is ``u (p - q)``: the direction of
cross-entropy with its length scaled by the example's uncertainty. A differentiated weight changes the
direction of that scaling: focal loss's gradient is largest near ``p_y = 0.1``, not at 0.
"""

from collections.abc import Callable
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.calibration.losses.bsce import relative_weight
from diffcal.calibration.losses.class_weights import StepPower, TopLabelBrier, safe_power
from diffcal.calibration.losses.contract import Contract, RowLoss, loss_rows, reduced
from diffcal.calibration.losses.expectation import check_gamma, expected_weighted_loss
from diffcal.calibration.losses.focal import of_each_class
from diffcal.calibration.losses.row_statistics import row_statistics
from diffcal.errors import DataError

__all__ = [
    "FocalGra",
    "TlbsGra",
    "UncertaintyWeighted",
    "WeightFunction",
    "focal_gra",
    "tlbs_gra",
    "uncertainty_weighted",
]

WeightFunction = Callable[[Tensor, Tensor], Tensor]
"""(log-probabilities ``[n, k]``, target distributions ``[n, k]``) to weights ``[n]``."""


def focal_gra(
    logits: Float[Tensor, "n k *d"],
    targets: Tensor,
    *,
    gamma: float = 3.0,
    **contract: Unpack[Contract],
) -> Float[Tensor, "*r"]:
    """Focal loss with a constant weight ``u = (1 - p_y)^gamma``: the gradient is ``u (p - e_y)``.

    Arguments as in :func:`diffcal.calibration.losses.focal.focal`. Soft targets: expectation, the
    weight of each class held constant: the gradient is ``(sum_k q_k u_k) p - q u``.

    Source: Lin et al. 2025 (arXiv:2503.22725), the gradient-weighted family.
    """
    check_gamma(gamma)
    rows = loss_rows(logits, targets, contract)
    return reduced(of_each_class(rows, StepPower((gamma,), constant=True)), rows, contract)


def tlbs_gra(
    logits: Float[Tensor, "n k *d"],
    targets: Tensor,
    *,
    gamma: float = 2.0,
    **contract: Unpack[Contract],
) -> Float[Tensor, "*r"]:
    """Cross-entropy weighted by the top label's Brier score, ``|correct - max p|^gamma`` constant.

    Soft targets: expectation, with ``correct`` of class k saying whether it is the likeliest.

    Source: released code of Lin et al. 2025 (arXiv:2503.22725), ``tlbs``.
    """
    check_gamma(gamma)
    rows = loss_rows(logits, targets, contract)
    if rows.soft is None:
        cross_entropy = row_statistics(rows).cross_entropy
        with torch.no_grad():
            z = rows.logits
            top, best = z.max(dim=1)
            assert rows.labels is not None
            right = best == rows.labels
            # the top class's log-probability without a second softmax; exact where right
            log_top = top - z.gather(1, rows.labels[:, None])[:, 0] - cross_entropy
            weight = safe_power(torch.where(right, -log_top.expm1(), log_top.exp()), gamma)
        return reduced(weight * cross_entropy, rows, contract)
    return reduced(expected_weighted_loss(rows, TopLabelBrier(gamma)), rows, contract)


def uncertainty_weighted(
    logits: Float[Tensor, "n k *d"],
    targets: Tensor,
    weight: WeightFunction,
    *,
    detach: bool = True,
    normalize_weight: bool = False,
    **contract: Unpack[Contract],
) -> Float[Tensor, "*r"]:
    """``u(p, q) CE(q, p)`` with a weight of one's own.

    Args:
        logits: ``[n, k]`` or dense ``[n, k, d1, ...]``; computed in float32 or better.
        targets: int64 labels, or float distributions of the logits' shape.
        weight: Gets ``log_softmax(z)`` and the targets as distributions, ``[n, k]`` each; returns
            ``[n]``. It sees the whole batch, so that it may rank or bin its examples.
        detach: Hold the weight constant.
        normalize_weight: Divide the weight by its mean over the batch (held constant).
        contract: See :class:`diffcal.calibration.losses.contract.Contract`.

    Raises:
        DataError: the weight has the wrong shape; targets do not fit the logits.

    Source: the common frame of focal losses in Lin et al. 2025 (arXiv:2503.22725).
    """
    rows = loss_rows(logits, targets, contract)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not detach):
        u = weight(torch.log_softmax(rows.logits, dim=1), rows.distribution())
    if u.shape != rows.logits.shape[:1]:
        raise DataError(
            f"the weight function must return [{len(rows.logits)}] values, got {list(u.shape)}"
        )
    if normalize_weight:
        u = relative_weight(u, rows)
    return reduced(u * row_statistics(rows).cross_entropy, rows, contract)


class FocalGra(RowLoss):
    """Module form of :func:`focal_gra`."""

    def __init__(self, gamma: float = 3.0, **contract: Unpack[Contract]) -> None:
        super().__init__(**contract)
        self.gamma = check_gamma(gamma)

    def forward(self, logits: Float[Tensor, "n k *d"], targets: Tensor) -> Float[Tensor, "*r"]:
        """The loss of ``targets``, hard or soft."""
        return focal_gra(logits, targets, gamma=self.gamma, **self.contract())


class TlbsGra(RowLoss):
    """Module form of :func:`tlbs_gra`."""

    def __init__(self, gamma: float = 2.0, **contract: Unpack[Contract]) -> None:
        super().__init__(**contract)
        self.gamma = check_gamma(gamma)

    def forward(self, logits: Float[Tensor, "n k *d"], targets: Tensor) -> Float[Tensor, "*r"]:
        """The loss of ``targets``, hard or soft."""
        return tlbs_gra(logits, targets, gamma=self.gamma, **self.contract())


class UncertaintyWeighted(RowLoss):
    """Module form of :func:`uncertainty_weighted`."""

    def __init__(
        self,
        weight: WeightFunction,
        detach: bool = True,
        normalize_weight: bool = False,
        **contract: Unpack[Contract],
    ) -> None:
        super().__init__(**contract)
        self.weight, self.detach, self.normalize_weight = weight, detach, normalize_weight

    def forward(self, logits: Float[Tensor, "n k *d"], targets: Tensor) -> Float[Tensor, "*r"]:
        """The loss of ``targets``, hard or soft."""
        return uncertainty_weighted(
            logits,
            targets,
            self.weight,
            detach=self.detach,
            normalize_weight=self.normalize_weight,
            **self.contract(),
        )
