"""Calibration by pairwise constraints (CPC): each pair of classes as a binary problem."""

from typing import Unpack

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from diffcal.calibration.losses.contract import Contract, loss_rows, reduced
from diffcal.calibration.losses.regularised import RegularisedLoss, check_coefficient
from diffcal.calibration.losses.row_blocks import by_blocks

__all__ = ["Cpc", "cpc_term"]


def cpc_term(
    logits: Float[Tensor, "n k *d"],
    targets: Tensor,
    *,
    discrimination: float = 1.0,
    exclusion: float = 1.0,
    **contract: Unpack[Contract],
) -> Float[Tensor, "*r"]:
    """Pairwise constraints: the true class beats each other one, and the others are undecided.

    ``discrimination mean_{k != y} -ln s(z_y - z_k)`` plus ``exclusion`` times the mean over ordered
    pairs ``k != l`` of wrong classes of ``-0.5 ln s(z_k - z_l)``, s the logistic function. With two
    classes the second part is 0. Soft targets: expectation over y. ``O(k^2)`` per row. The released
    code adds the k - 1 diagonal pairs to the second part, a constant that we leave out.

    Args:
        logits: ``[n, k]`` or dense ``[n, k, d1, ...]``; computed in float32 or better.
        targets: int64 labels, or float distributions of the logits' shape.
        discrimination: Weight of the binary discrimination constraints.
        exclusion: Weight of the binary exclusion constraints.
        contract: See :class:`diffcal.calibration.losses.contract.Contract`.

    Source: Cheng and Vasconcelos 2022, "Calibrating deep neural networks by pairwise constraints"
    (CVPR), with the default weights of the CALS repository.
    """
    check_coefficient(discrimination)
    check_coefficient(exclusion)
    rows = loss_rows(logits, targets, contract)

    def formula(z: Tensor, labels: Tensor | None, soft: Tensor | None, dim: int) -> Tensor:
        z = z.movedim(dim, -1)
        k = z.shape[-1]
        lost = F.softplus(z[:, None, :] - z[:, :, None])  # [n, y, k]: -ln s(z_y - z_k)
        by_class = lost.sum(dim=2) - lost.diagonal(dim1=1, dim2=2)
        values = discrimination * by_class / (k - 1)
        if k > 2:
            # all ordered pairs, less those in which class y takes part
            against = lost.sum(dim=1) - lost.diagonal(dim1=1, dim2=2)
            pairs = by_class.sum(dim=1, keepdim=True) - by_class - against
            values = values + exclusion * 0.5 * pairs / ((k - 1) * (k - 2))
        if labels is not None:
            return values.gather(1, labels[:, None])[:, 0]
        assert soft is not None
        return (soft.movedim(dim, -1) * values).sum(dim=1)

    per_logit = rows.logits.shape[1]
    return reduced(by_blocks(rows, formula, per_logit=per_logit), rows, contract)


class Cpc(RegularisedLoss):
    """Cross-entropy plus :func:`cpc_term`."""

    def __init__(
        self,
        discrimination: float = 1.0,
        exclusion: float = 1.0,
        **contract: Unpack[Contract],
    ) -> None:
        super().__init__(1.0, **contract)
        self.discrimination = check_coefficient(discrimination)
        self.exclusion = check_coefficient(exclusion)

    def term(self, logits: Float[Tensor, "n k *d"], targets: Tensor) -> Float[Tensor, "*r"]:
        return cpc_term(
            logits,
            targets,
            discrimination=self.discrimination,
            exclusion=self.exclusion,
            **self.contract(),
        )
