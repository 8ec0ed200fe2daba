"""Cross-entropy with a bonus for uncertain predictions."""

from typing import Unpack

from jaxtyping import Float
from torch import Tensor

from diffcal.calibration.losses.contract import Contract, RowLoss, loss_rows, reduced
from diffcal.calibration.losses.regularised import LossParts, check_coefficient
from diffcal.calibration.losses.row_statistics import row_statistics

__all__ = ["EntropyPenalty", "entropy_penalty"]


def entropy_penalty(
    logits: Float[Tensor, "n k *d"],
    targets: Tensor,
    *,
    alpha: float = 0.1,
    released: bool = False,
    **contract: Unpack[Contract],
) -> Float[Tensor, "*r"]:
    """Confidence penalty ``CE(q, p) - alpha H(p)``, in nats.

    Args:
        logits: ``[n, k]`` or dense ``[n, k, d1, ...]``; computed in float32 or better.
        targets: int64 labels, or float distributions of the logits' shape.
        alpha: At least 0.
        released: Reproduce the copy in the MbLS repository, which averages the entropy's terms over
            classes too, that is, uses ``alpha / k``.
        contract: See :class:`diffcal.calibration.losses.contract.Contract`.

    Source: Pereyra et al. 2017 (arXiv:1701.06548), section 3.
    """
    check_coefficient(alpha)
    rows = loss_rows(logits, targets, contract)
    statistics = row_statistics(rows, entropy=True)
    assert statistics.entropy is not None
    weight = alpha / rows.logits.shape[1] if released else alpha
    return reduced(statistics.cross_entropy - weight * statistics.entropy, rows, contract)


class EntropyPenalty(RowLoss):
    """Module form of :func:`entropy_penalty`."""

    def __init__(
        self, alpha: float = 0.1, released: bool = False, **contract: Unpack[Contract]
    ) -> None:
        super().__init__(**contract)
        self.alpha, self.released = check_coefficient(alpha), released

    def forward(self, logits: Float[Tensor, "n k *d"], targets: Tensor) -> Float[Tensor, "*r"]:
        """The loss of ``targets``, hard or soft."""
        return entropy_penalty(
            logits, targets, alpha=self.alpha, released=self.released, **self.contract()
        )

    def parts(self, logits: Float[Tensor, "n k *d"], targets: Tensor) -> LossParts:
        """The loss, the cross-entropy and the negative entropy, reduced alike."""
        rows = loss_rows(logits, targets, self.contract())
        statistics = row_statistics(rows, entropy=True)
        assert statistics.entropy is not None
        weight = self.alpha / rows.logits.shape[1] if self.released else self.alpha
        base = reduced(statistics.cross_entropy, rows, self.contract())
        term = reduced(-statistics.entropy, rows, self.contract())
        return LossParts(base + weight * term, base, term)
