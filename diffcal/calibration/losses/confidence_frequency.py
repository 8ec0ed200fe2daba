"""MDCA and DCA: mean confidence against frequency, over a batch."""

from typing import Unpack

from jaxtyping import Float
from torch import Tensor

from diffcal.calibration.losses.contract import Contract, loss_rows
from diffcal.calibration.losses.regularised import BatchRegularisedLoss, mean_rows

__all__ = ["Dca", "Mdca", "dca_term", "mdca_term"]


def mdca_term(
    logits: Float[Tensor, "n k *d"],
    targets: Tensor,
    *,
    ignore_index: int | None = None,
    validate: bool = True,
) -> Float[Tensor, ""]:
    """``mean_k |mean_i p_ik - mean_i q_ik|``: each class's mean probability against its frequency.

    Soft targets: the expected frequency.

    Source: Hebbalaguppe et al. 2022 (arXiv:2203.13834), equation 4.
    """
    rows = loss_rows(logits, targets, {"ignore_index": ignore_index, "validate": validate})
    predicted = mean_rows(rows.logits.softmax(dim=1), rows)
    return (predicted - mean_rows(rows.distribution(), rows)).abs().mean()


def dca_term(
    logits: Float[Tensor, "n k *d"],
    targets: Tensor,
    *,
    ignore_index: int | None = None,
    validate: bool = True,
) -> Float[Tensor, ""]:
    """``|mean_i max p_i - accuracy|``; for soft targets the mean target mass of the top class.

    Source: Liang et al. 2020 (arXiv:2009.04057).
    """
    rows = loss_rows(logits, targets, {"ignore_index": ignore_index, "validate": validate})
    confidence = rows.logits.softmax(dim=1).max(dim=1).values
    return (mean_rows(confidence, rows) - mean_rows(rows.correctness(), rows)).abs()


class Mdca(BatchRegularisedLoss):
    """Cross-entropy, focal or smoothed loss plus ``coefficient`` times :func:`mdca_term`.

    The authors' scripts use coefficient 1 with focal gamma 1 or smoothing 0.1; their parser's
    defaults (10 and 5) are not used anywhere.
    """

    def __init__(
        self,
        coefficient: float = 1.0,
        gamma: float = 0.0,
        smoothing: float = 0.0,
        **contract: Unpack[Contract],
    ) -> None:
        super().__init__(coefficient, gamma, smoothing, **contract)

    def term(self, logits: Float[Tensor, "n k *d"], targets: Tensor) -> Float[Tensor, ""]:
        return mdca_term(logits, targets, ignore_index=self.ignore_index, validate=self.validate)


class Dca(BatchRegularisedLoss):
    """Cross-entropy, focal or smoothed loss plus ``coefficient`` times :func:`dca_term`."""

    def __init__(
        self,
        coefficient: float = 1.0,
        gamma: float = 0.0,
        smoothing: float = 0.0,
        **contract: Unpack[Contract],
    ) -> None:
        super().__init__(coefficient, gamma, smoothing, **contract)

    def term(self, logits: Float[Tensor, "n k *d"], targets: Tensor) -> Float[Tensor, ""]:
        return dca_term(logits, targets, ignore_index=self.ignore_index, validate=self.validate)
