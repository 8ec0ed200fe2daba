"""Margin-based regularisers: MbLS keeps logits within a margin of the largest, ACLS bounds both ends.

Both are label-free: with soft targets only the base loss changes.
"""

from typing import Unpack

from jaxtyping import Float
from torch import Tensor

from diffcal.calibration.losses.contract import Contract, Rows, loss_rows, reduced
from diffcal.calibration.losses.regularised import LossParts, RegularisedLoss, check_coefficient
from diffcal.calibration.losses.row_statistics import row_statistics
from diffcal.calibration.losses.statistics_blocks import Excess
from diffcal.errors import ConfigError

__all__ = ["Acls", "Mbls", "acls_term", "mbls_term"]


def mbls_term(
    logits: Float[Tensor, "n k *d"],
    targets: Tensor,
    *,
    margin: float = 10.0,
    **contract: Unpack[Contract],
) -> Float[Tensor, "*r"]:
    """How far logits fall more than ``margin`` below the largest: ``mean_k relu(max z - z_k - m)``.

    The gradient flows through the maximum (shared among tied classes).

    Args:
        logits: ``[n, k]`` or dense ``[n, k, d1, ...]``.
        targets: Their values matter only where ``ignore_index`` or ``class_weight`` read them.
        margin: At least 0; 10 in the released configurations.
        contract: See :class:`diffcal.calibration.losses.contract.Contract`.

    Source: Liu et al. 2022 (arXiv:2111.15430), equation 8.
    """
    _check_margin(margin)
    rows = loss_rows(logits, targets, contract)

    return reduced(_mbls_rows(rows, margin)[1], rows, contract)


def acls_term(
    logits: Float[Tensor, "n k *d"],
    targets: Tensor,
    *,
    margin: float = 10.0,
    pos_lambda: float = 1.0,
    neg_lambda: float = 0.1,
    **contract: Unpack[Contract],
) -> Float[Tensor, "*r"]:
    """Squared hinges on the largest logit and on those far below it.

    ``pos_lambda relu(max z - m)^2 + neg_lambda mean_{k != argmax} relu(sg(max z) - z_k - m)^2``
    with ``sg`` holding its argument constant. The first part bounds the logit itself, so that the
    term is not invariant to a shift of all logits. As in the released code: the paper's formula was
    not available for comparison.

    Arguments as in :func:`mbls_term`.

    Source: released code of Park et al. 2023 (arXiv:2308.11911).
    """
    _check_margin(margin)
    check_coefficient(pos_lambda)
    check_coefficient(neg_lambda)
    rows = loss_rows(logits, targets, contract)

    return reduced(_acls_rows(rows, margin, pos_lambda, neg_lambda)[1], rows, contract)


class Mbls(RegularisedLoss):
    """Margin-based label smoothing: cross-entropy plus ``coefficient`` (0.1) :func:`mbls_term`."""

    def __init__(
        self, coefficient: float = 0.1, margin: float = 10.0, **contract: Unpack[Contract]
    ) -> None:
        super().__init__(coefficient, **contract)
        self.margin = _check_margin(margin)

    def term(self, logits: Float[Tensor, "n k *d"], targets: Tensor) -> Float[Tensor, "*r"]:
        return mbls_term(logits, targets, margin=self.margin, **self.contract())

    def parts(self, logits: Float[Tensor, "n k *d"], targets: Tensor) -> LossParts:
        """The loss, the cross-entropy and the term, reduced alike; both from one reading."""
        rows = loss_rows(logits, targets, self.contract())
        return self.combined(*_mbls_rows(rows, self.margin), rows)


class Acls(RegularisedLoss):
    """Adaptive and conditional label smoothing: cross-entropy plus 0.1 times :func:`acls_term`."""

    def __init__(
        self,
        coefficient: float = 0.1,
        margin: float = 10.0,
        pos_lambda: float = 1.0,
        neg_lambda: float = 0.1,
        **contract: Unpack[Contract],
    ) -> None:
        super().__init__(coefficient, **contract)
        self.margin = _check_margin(margin)
        self.pos_lambda = check_coefficient(pos_lambda)
        self.neg_lambda = check_coefficient(neg_lambda)

    def term(self, logits: Float[Tensor, "n k *d"], targets: Tensor) -> Float[Tensor, "*r"]:
        return acls_term(
            logits,
            targets,
            margin=self.margin,
            pos_lambda=self.pos_lambda,
            neg_lambda=self.neg_lambda,
            **self.contract(),
        )

    def parts(self, logits: Float[Tensor, "n k *d"], targets: Tensor) -> LossParts:
        """The loss, the cross-entropy and the term, reduced alike; both from one reading."""
        rows = loss_rows(logits, targets, self.contract())
        values = _acls_rows(rows, self.margin, self.pos_lambda, self.neg_lambda)
        return self.combined(*values, rows)


def _mbls_rows(rows: Rows, margin: float) -> tuple[Tensor, Tensor]:
    """Cross-entropy and term of each row."""
    statistics = row_statistics(rows, excess=Excess(margin))
    assert statistics.excess is not None
    return statistics.cross_entropy, statistics.excess / rows.logits.shape[1]


def _acls_rows(
    rows: Rows, margin: float, pos_lambda: float, neg_lambda: float
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and term of each row."""
    statistics = row_statistics(rows, top=True, excess=Excess(margin, power=2, held=True))
    assert statistics.top is not None
    assert statistics.excess is not None
    over = (statistics.top - margin).relu().square()
    # the largest class itself adds nothing as the margin is not negative
    far = statistics.excess / (rows.logits.shape[1] - 1)
    return statistics.cross_entropy, pos_lambda * over + neg_lambda * far


def _check_margin(margin: float) -> float:
    if not 0 <= margin < float("inf"):
        raise ConfigError(f"margin must be a finite number of at least 0, got {margin}")
    return margin
