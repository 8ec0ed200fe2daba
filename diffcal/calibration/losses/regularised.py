"""A base loss plus a coefficient times a term, reported together or in parts."""

from abc import abstractmethod
from typing import NamedTuple, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.calibration.losses.contract import Contract, RowLoss, Rows, loss_rows, reduced
from diffcal.calibration.losses.expectation import check_gamma
from diffcal.calibration.losses.focal import focal
from diffcal.calibration.losses.soft_target import cross_entropy
from diffcal.errors import ConfigError

__all__ = ["BatchRegularisedLoss", "LossParts", "RegularisedLoss", "check_coefficient", "mean_rows"]


class LossParts(NamedTuple):
    """A loss and what it is made of."""

    total: Tensor
    base: Tensor
    term: Tensor
    """Before its coefficient."""


class RegularisedLoss(RowLoss):
    """Cross-entropy, smoothed or focal if asked, plus ``coefficient`` times a term.

    Args:
        coefficient: At least 0.
        gamma: Above 0 the base is focal loss.
        smoothing: Above 0 the base is cross-entropy with label smoothing.
        contract: See :class:`diffcal.calibration.losses.contract.Contract`.

    Raises:
        ConfigError: negative coefficient, gamma and smoothing together.
    """

    def __init__(
        self,
        coefficient: float,
        gamma: float = 0.0,
        smoothing: float = 0.0,
        **contract: Unpack[Contract],
    ) -> None:
        super().__init__(**contract)
        if gamma and smoothing:
            raise ConfigError("the base loss is focal (gamma) or smoothed (smoothing), not both")
        if not 0 <= smoothing <= 1:
            raise ConfigError(f"smoothing must be in [0, 1], got {smoothing}")
        self.coefficient = check_coefficient(coefficient)
        self.gamma, self.smoothing = check_gamma(gamma), smoothing

    @abstractmethod
    def term(self, logits: Float[Tensor, "n k *d"], targets: Tensor) -> Float[Tensor, "*r"]:
        """The bare regulariser."""

    def base(self, logits: Float[Tensor, "n k *d"], targets: Tensor) -> Float[Tensor, "*r"]:
        """The loss that is regularised."""
        if self.gamma:
            return focal(logits, targets, gamma=self.gamma, **self.contract())
        return cross_entropy(logits, targets, smoothing=self.smoothing, **self.contract())

    def parts(self, logits: Float[Tensor, "n k *d"], targets: Tensor) -> LossParts:
        """The loss and its two parts, all reduced alike."""
        base, term = self.base(logits, targets), self.term(logits, targets)
        return LossParts(base + self.coefficient * term, base, term)

    def combined(
        self, base: Float[Tensor, " n"], term: Float[Tensor, " n"], rows: Rows
    ) -> LossParts:
        """Base and term of each row, reduced alike, and the loss they make."""
        parts = reduced(base, rows, self.contract()), reduced(term, rows, self.contract())
        return LossParts(parts[0] + self.coefficient * parts[1], *parts)

    def forward(self, logits: Float[Tensor, "n k *d"], targets: Tensor) -> Float[Tensor, "*r"]:
        """The loss of ``targets``, hard or soft."""
        return self.parts(logits, targets).total

    def extra_repr(self) -> str:
        return f"coefficient={self.coefficient}, {super().extra_repr()}"


class BatchRegularisedLoss(RegularisedLoss):
    """A regularised loss whose term is one number for the batch, as a mean is.

    ``mean`` adds it to the mean of the base loss; ``sum`` adds it times the number of examples, so
    that both have the same gradient but for scale; ``none`` does not exist. Class weights act on
    the base loss.
    """

    def __init__(
        self,
        coefficient: float,
        gamma: float = 0.0,
        smoothing: float = 0.0,
        **contract: Unpack[Contract],
    ) -> None:
        super().__init__(coefficient, gamma, smoothing, **contract)
        if self.reduction == "none":
            raise ConfigError("this loss has a term of the whole batch: reduction is mean or sum")

    def parts(self, logits: Float[Tensor, "n k *d"], targets: Tensor) -> LossParts:
        """The loss, its base as reduced, and its term as a mean whatever the reduction."""
        base, term = self.base(logits, targets), self.term(logits, targets)
        scale = self.coefficient
        if self.reduction == "sum":
            rows = loss_rows(logits, targets, {**self.contract(), "validate": False})
            return LossParts(base + scale * rows.weights().sum() * term, base, term)
        return LossParts(base + scale * term, base, term)


def mean_rows(values: Float[Tensor, "n *k"], rows: Rows) -> Float[Tensor, "*k"]:
    """Mean of ``values`` over the rows that count; 0 if none does."""
    if rows.kept is None:
        return values.sum(dim=0) / max(len(values), 1)
    kept = rows.kept.reshape(-1, *(1,) * (values.ndim - 1))
    total = torch.where(kept, values, 0).sum(dim=0)
    return total / rows.kept.sum().clamp(min=1)


def check_coefficient(coefficient: float) -> float:
    """``coefficient`` if it is finite and at least 0, else :class:`ConfigError`."""
    if not 0 <= coefficient < float("inf"):
        raise ConfigError(f"the term's coefficient must be at least 0, got {coefficient}")
    return coefficient
