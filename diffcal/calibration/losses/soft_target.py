"""Proper losses for soft targets, and the two-part objective of semantic mixing.

With ``p = softmax(z)`` and a target distribution ``q`` (a one-hot row for a hard label):

    cross-entropy     -sum_k q_k log p_k           gradient in z: p - q
    KL(q || p)        sum_k q_k log(q_k / p_k)     the same gradient, lower by the entropy of q
    squared error     sum_k (p_k - q_k)^2          gradient 2 p_k [(p_k - q_k) - sum_j p_j (p_j - q_j)]

All three are minimised exactly at ``p = q``. They price unavoidable errors differently: near the
optimum cross-entropy costs half of ``sum_k (p_k - q_k)^2 / q_k``, so an error on a near-certain
example weighs more, while the squared error (multi-class Brier score) costs the same everywhere.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffcal.calibration.losses.contract import Contract, RowLoss, loss_rows, reduced
from diffcal.calibration.losses.row_blocks import by_blocks
from diffcal.calibration.losses.row_statistics import row_statistics
from diffcal.errors import ConfigError, DataError

__all__ = [
    "CrossEntropy",
    "KlDivergence",
    "Objective",
    "Spread",
    "SquaredError",
    "cross_entropy",
    "csm_objective",
    "kl_divergence",
    "smoothing_for_confidence",
    "squared_error",
]

Spread = Literal["all", "others"]


def cross_entropy(
    logits: Float[Tensor, "n k *d"],
    targets: Tensor,
    *,
    smoothing: float = 0.0,
    spread: Spread = "all",
    **contract: Unpack[Contract],
) -> Float[Tensor, "*r"]:
    """Cross-entropy ``-sum_k q_k log p_k`` in nats, for hard or soft targets.

    Args:
        logits: ``[n, k]``, or dense ``[n, k, d1, ...]``; computed in float32 or better.
        targets: int64 labels, or float distributions of the logits' shape.
        smoothing: Label smoothing (0.05 in the calibration tables): the target becomes
            ``(1 - smoothing) q + smoothing / k`` (Szegedy et al. 2016, arXiv:1512.00567, section 7).
        spread: ``others`` gives the smoothed mass to the other classes only, as the MDCA repository
            does: ``(1 - smoothing) q + smoothing (1 - q) / (k - 1)``.
        contract: See :class:`diffcal.calibration.losses.contract.Contract`.

    Raises:
        DataError: targets do not fit the logits.
        ConfigError: smoothing outside [0, 1], unknown spread or reduction.
    """
    _check_smoothing(smoothing, spread)
    rows = loss_rows(logits, targets, contract)
    statistics = row_statistics(rows, uniform=smoothing > 0)
    values = statistics.cross_entropy
    if statistics.uniform is not None:
        k = rows.logits.shape[1]
        share = smoothing if spread == "all" else smoothing * k / (k - 1)
        values = (1 - share) * values + share * statistics.uniform
    return reduced(values, rows, contract)


def smoothing_for_confidence(
    confidence: float,
    num_classes: int,
    *,
    spread: Spread = "all",
    target_confidence: float = 1.0,
) -> float:
    """Label smoothing whose targets have a given mean confidence, so that methods can be compared at it.

    Cross-entropy is least where the prediction equals its target, so this is also the mean confidence
    on the training set of a network that fits them. With ``m`` the mean largest entry of the targets
    before smoothing, ``(1 - a) m + a / k = confidence`` is solved for ``a``; with ``spread="others"``,
    ``(1 - a) m + a (1 - m) / (k - 1) = confidence``. A smoothing so strong that the likeliest class of
    a target would change is not among the answers.

    Args:
        confidence: Wanted, for instance the mean largest entry of soft labels to compare with.
        num_classes: ``k``.
        spread: As in :func:`cross_entropy`.
        target_confidence: ``m``; 1 for hard labels.

    Returns:
        ``smoothing`` of :func:`cross_entropy`, in [0, 1).

    Raises:
        ConfigError: confidence not in (1 / k, target_confidence].
    """
    _check_smoothing(0.0, spread)
    if num_classes < 2:
        raise ConfigError(f"num_classes must be at least 2, got {num_classes}")
    if not 1 / num_classes < confidence <= target_confidence <= 1:
        raise ConfigError(
            f"a mean confidence of {confidence} cannot be reached by smoothing: it must be above "
            f"1/{num_classes} and at most that of the targets ({target_confidence})"
        )
    end = 1 / num_classes if spread == "all" else (1 - target_confidence) / (num_classes - 1)
    return (target_confidence - confidence) / (target_confidence - end)


def kl_divergence(
    logits: Float[Tensor, "n k *d"], targets: Tensor, **contract: Unpack[Contract]
) -> Float[Tensor, "*r"]:
    """Kullback-Leibler divergence ``KL(q || p)`` in nats: cross-entropy less the target's entropy.

    Arguments as in :func:`cross_entropy`. The value is 0 exactly where the model gives the target,
    which makes it the readable one for logs; hard targets give cross-entropy.
    """
    rows = loss_rows(logits, targets, contract)
    if rows.soft is None:
        return reduced(row_statistics(rows).cross_entropy, rows, contract)

    def formula(z: Tensor, labels: Tensor | None, soft: Tensor | None, dim: int) -> Tensor:
        assert soft is not None
        # log q - log p term by term: no cancellation of two large sums where p is close to q
        gap = torch.where(soft > 0, soft, 1).log() - torch.log_softmax(z, dim)
        return torch.where(soft > 0, soft * gap, 0).sum(dim)

    return reduced(by_blocks(rows, formula), rows, contract)


def squared_error(
    logits: Float[Tensor, "n k *d"], targets: Tensor, **contract: Unpack[Contract]
) -> Float[Tensor, "*r"]:
    """Multi-class Brier score ``sum_k (softmax(z)_k - q_k)^2``, in [0, 2]: summed over classes.

    Arguments as in :func:`cross_entropy`. For soft targets it is the distance to ``q``; the
    expected score under labels drawn from ``q`` is larger by ``1 - sum_k q_k^2``, same gradient.

    Source: Brier 1950; the loss of mixed images in Luo et al. 2025 (arXiv:2504.13548).
    """
    rows = loss_rows(logits, targets, contract)
    values = row_statistics(rows, power=2.0).distance
    assert values is not None
    return reduced(values, rows, contract)


class CrossEntropy(RowLoss):
    """Module form of :func:`cross_entropy`."""

    def __init__(
        self, smoothing: float = 0.0, spread: Spread = "all", **contract: Unpack[Contract]
    ) -> None:
        super().__init__(**contract)
        _check_smoothing(smoothing, spread)
        self.smoothing = smoothing
        self.spread: Spread = spread

    def forward(self, logits: Float[Tensor, "n k *d"], targets: Tensor) -> Float[Tensor, "*r"]:
        """The loss of ``targets``, hard or soft."""
        return cross_entropy(
            logits, targets, smoothing=self.smoothing, spread=self.spread, **self.contract()
        )


class KlDivergence(RowLoss):
    """Module form of :func:`kl_divergence`."""

    def forward(self, logits: Float[Tensor, "n k *d"], targets: Tensor) -> Float[Tensor, "*r"]:
        """The loss of ``targets``, hard or soft."""
        return kl_divergence(logits, targets, **self.contract())


class SquaredError(RowLoss):
    """Module form of :func:`squared_error`."""

    def forward(self, logits: Float[Tensor, "n k *d"], targets: Tensor) -> Float[Tensor, "*r"]:
        """The loss of ``targets``, hard or soft."""
        return squared_error(logits, targets, **self.contract())


class Objective(NamedTuple):
    """The two-part training objective and its parts, each a scalar."""

    total: Tensor
    real: Tensor
    mixed: Tensor
    """Before its weight."""


LossFunction = Callable[[Tensor, Tensor], Tensor]

_BY_NAME: Mapping[str, LossFunction] = MappingProxyType(
    {
        "squared_error": squared_error,
        "cross_entropy": cross_entropy,
        "kl_divergence": kl_divergence,
    }
)


def csm_objective(
    real_logits: Float[Tensor, "b k"],
    real_labels: Int[Tensor, " b"] | Float[Tensor, "b k"],
    mixed_logits: Float[Tensor, "*m k"] | None,
    mixed_targets: Float[Tensor, "*n k"] | None,
    mixed_loss: str | LossFunction = "squared_error",
    weight: float = 1.0,
    *,
    real_loss: LossFunction = cross_entropy,
) -> Objective:
    """Mean loss of real images plus ``weight`` times the mean loss of semantically mixed images.

    Args:
        real_logits: Outputs for the real images.
        real_labels: Their labels, hard or soft.
        mixed_logits: Outputs for the mixed images, ``[m, k]`` or grouped ``[b, members, k]``; the
            mean runs over all of them. None, or no rows: the objective is the real part.
        mixed_targets: Their soft labels.
        mixed_loss: ``squared_error`` (the paper's L2), ``cross_entropy``, ``kl_divergence``, or any
            callable with a mean over rows.
        weight: Weight of the mixed part (1 in the paper).
        real_loss: Any callable with a mean over rows.

    Raises:
        ConfigError: unknown ``mixed_loss`` or negative weight.
        DataError: shapes or targets do not fit.

    Source: Luo et al. 2025 (arXiv:2504.13548), with the losses' weights 1:1 as in its release.
    """
    if weight < 0:
        raise ConfigError(f"the weight of the mixed loss must not be negative, got {weight}")
    if isinstance(mixed_loss, str):
        if mixed_loss not in _BY_NAME:
            raise ConfigError(f"unknown mixed loss '{mixed_loss}': use {', '.join(_BY_NAME)}")
        mixed_loss = _BY_NAME[mixed_loss]
    real = real_loss(real_logits, real_labels)
    if mixed_logits is None or mixed_targets is None or mixed_logits.numel() == 0:
        return Objective(real, real, torch.zeros_like(real))
    if mixed_logits.shape != mixed_targets.shape:
        raise DataError(
            f"mixed logits {list(mixed_logits.shape)} and targets {list(mixed_targets.shape)} "
            "must have one shape"
        )
    mixed = mixed_loss(mixed_logits.flatten(0, -2), mixed_targets.flatten(0, -2))
    return Objective(real + weight * mixed, real, mixed)


def _check_smoothing(smoothing: float, spread: str) -> None:
    if not 0 <= smoothing <= 1:
        raise ConfigError(f"smoothing must be in [0, 1], got {smoothing}")
    if spread not in ("all", "others"):
        raise ConfigError(f"unknown spread '{spread}': use all or others")
