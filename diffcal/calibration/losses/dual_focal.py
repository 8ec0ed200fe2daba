"""Dual focal loss: focal loss that also looks at the best class below the true one."""

from collections.abc import Callable
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.calibration.losses.class_weights import StepPower, safe_power
from diffcal.calibration.losses.contract import Contract, RowLoss, Rows, loss_rows, reduced
from diffcal.calibration.losses.expectation import check_gamma
from diffcal.calibration.losses.expected_gap import expected_gap_loss
from diffcal.calibration.losses.row_blocks import in_blocks, row_blocks
from diffcal.calibration.losses.row_statistics import row_statistics

__all__ = ["DualFocal", "DualFocalGra", "dual_focal", "dual_focal_gra", "of_true_and_below"]

FEW = 4
"""Classes with mass up to which each is taken as a hard label."""


def dual_focal(
    logits: Float[Tensor, "n k *d"],
    targets: Tensor,
    *,
    gamma: float = 5.0,
    **contract: Unpack[Contract],
) -> Float[Tensor, "*r"]:
    """Dual focal loss ``-(1 - p_y + p_j)^gamma ln p_y``, ``p_j = max {p_i : p_i < p_y}``, in nats.

    ``j`` is the best class strictly below the true one, not the best wrong class; without any,
    ``p_j = 0``. Logits are compared, so that ties do not depend on rounding; of several classes
    tied for ``j`` the first gets the gradient. ``p_j`` is differentiated, the choice of ``j`` is
    not. With two classes the weight is ``2 (1 - p_y)`` where right and ``1 - p_y`` where wrong.

    Args:
        logits: ``[n, k]`` or dense ``[n, k, d1, ...]``; computed in float32 or better.
        targets: int64 labels, or float distributions of the logits' shape; for these the
            expectation over classes, each with its own ``j`` (``O(k log k)`` per row).
        gamma: At least 0, which is cross-entropy. 5 is the authors' choice for ResNet-50 on CIFAR
            (4.5 and 6.1 for ResNet-110 on CIFAR-10 and 100, 2.6 and 3.9 for Wide-ResNet-26-10,
            5 and 3.4 for DenseNet-121, 2.3 for ResNet-50 on Tiny-ImageNet). Their code's own
            default of 0 is cross-entropy.
        contract: See :class:`diffcal.calibration.losses.contract.Contract`.

    Raises:
        DataError: targets do not fit the logits.
        ConfigError: negative gamma.

    Source: Tao et al. 2023 (arXiv:2305.13665), the loss of section 3 and Theorem 1.
    """
    check_gamma(gamma)
    rows = loss_rows(logits, targets, contract)

    def loss(log_p: Tensor, below: Tensor) -> Tensor:
        return -safe_power(below.exp() - log_p.expm1(), gamma) * log_p

    return reduced(of_true_and_below(rows, loss, StepPower((gamma,))), rows, contract)


def dual_focal_gra(
    logits: Float[Tensor, "n k *d"],
    targets: Tensor,
    *,
    gamma: float = 5.0,
    released: bool = False,
    **contract: Unpack[Contract],
) -> Float[Tensor, "*r"]:
    """Dual focal loss with a constant weight ``u``: the gradient is ``u (p - e_y)``.

    Arguments as in :func:`dual_focal`. Soft targets: expectation, the weight of each class held
    constant, so that the gradient is ``(sum_k q_k u_k) p - q u``.

    Args:
        released: Reproduce the published code, which holds only ``p_j`` constant and still
            differentiates ``p_y`` in the weight, so that it is no gradient-weighted loss. Published
            figures of the method may be of that loss.

    Source: Lin et al. 2025 (arXiv:2503.22725), the gradient-weighted family.
    """
    check_gamma(gamma)
    rows = loss_rows(logits, targets, contract)

    def loss(log_p: Tensor, below: Tensor) -> Tensor:
        weight_log_p = log_p if released else log_p.detach()
        return -safe_power(below.detach().exp() - weight_log_p.expm1(), gamma) * log_p

    weight = StepPower((gamma,), constant=not released)
    return reduced(of_true_and_below(rows, loss, weight, below_held=True), rows, contract)


class DualFocal(RowLoss):
    """Module form of :func:`dual_focal`."""

    def __init__(self, gamma: float = 5.0, **contract: Unpack[Contract]) -> None:
        super().__init__(**contract)
        self.gamma = check_gamma(gamma)

    def forward(self, logits: Float[Tensor, "n k *d"], targets: Tensor) -> Float[Tensor, "*r"]:
        """The loss of ``targets``, hard or soft."""
        return dual_focal(logits, targets, gamma=self.gamma, **self.contract())

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, {super().extra_repr()}"


class DualFocalGra(RowLoss):
    """Module form of :func:`dual_focal_gra`."""

    def __init__(
        self, gamma: float = 5.0, released: bool = False, **contract: Unpack[Contract]
    ) -> None:
        super().__init__(**contract)
        self.gamma, self.released = check_gamma(gamma), released

    def forward(self, logits: Float[Tensor, "n k *d"], targets: Tensor) -> Float[Tensor, "*r"]:
        """The loss of ``targets``, hard or soft."""
        return dual_focal_gra(
            logits, targets, gamma=self.gamma, released=self.released, **self.contract()
        )


def of_true_and_below(
    rows: Rows,
    loss: Callable[[Tensor, Tensor], Tensor],
    weight: StepPower,
    *,
    below_held: bool = False,
) -> Float[Tensor, " n"]:
    """``loss(l_y, l_j)`` of each row; the expectation over y for soft targets.

    Args:
        weight: ``loss`` is ``-weight(p_y - p_j) l_y``.
        below_held: It holds ``p_j`` constant in gradients.
    """
    if rows.soft is None:
        statistics = row_statistics(rows, below=True)
        assert statistics.below is not None
        return loss(-statistics.cross_entropy, statistics.below)
    few = _few_classes(rows)
    if few is None:
        return expected_gap_loss(rows, loss, weight, below_held=below_held)
    total = rows.logits.new_zeros(len(rows.logits))
    for mass, labels in zip(*(part.unbind(1) for part in few), strict=True):
        values = of_true_and_below(Rows(rows.logits, labels, None, None, rows.shape), loss, weight)
        total = total + torch.where(mass > 0, mass * values, 0)
    return total


def _few_classes(rows: Rows) -> tuple[Tensor, Tensor] | None:
    """Masses and classes of the targets, ``[n, m]``, where large targets have at most FEW of them.

    Mixed images have two: looking below each takes far less than sorting all classes.
    """
    assert rows.soft is not None
    if not in_blocks(rows.logits, rows.soft):
        return None
    if rows.soft.shape[1] <= FEW:
        return None
    most = 0
    for part, _ in row_blocks(rows.soft):
        most = max(most, int(rows.soft[part].sign().sum(dim=1).max()))
        if most > FEW:
            return None
    if most == 0:
        return None
    masses, classes = rows.soft.topk(most, dim=1)
    return masses, classes
