"""Focal losses: cross-entropy weighted by a power of how far the true class is from certain.

For a hard label ``L = -u(p_y) ln p_y``, whose gradient in the logits is ``g(p_y) (p - e_y)``:

    focal           u = (1 - p_y)^gamma        g = (1-p)^gamma - gamma p (1-p)^(gamma-1) ln p
    FLSD            the same, gamma a step function of p_y that is not differentiated
    inverse focal   u = (1 + p_y)^gamma

Soft targets: the expectation over classes, weight and gamma of class k from ``p_k``
(:data:`diffcal.calibration.losses.expectation.Soft`).
"""

from collections.abc import Sequence
from typing import Unpack

from jaxtyping import Float
from torch import Tensor

from diffcal.calibration.losses.class_weights import StepPower, safe_power
from diffcal.calibration.losses.contract import Contract, RowLoss, Rows, loss_rows, reduced
from diffcal.calibration.losses.expectation import (
    Soft,
    beyond_rounding,
    check_gamma,
    check_soft_form,
    expected_weighted_loss,
)
from diffcal.calibration.losses.row_statistics import row_statistics
from diffcal.errors import ConfigError

__all__ = [
    "FLSD_52",
    "FLSD_53",
    "Flsd",
    "Focal",
    "GammaTable",
    "InverseFocal",
    "flsd",
    "flsd_gamma",
    "focal",
    "focal_gradient_ratio",
    "inverse_focal",
    "of_each_class",
]

GammaTable = Sequence[Sequence[float]]
"""Pairs (bound, gamma): gamma applies to probabilities below the bound; the last bound exceeds 1."""

FLSD_53: GammaTable = ((0.2, 5.0), (float("inf"), 3.0))
FLSD_52: GammaTable = ((0.2, 5.0), (0.5, 3.0), (float("inf"), 2.0))


def focal(
    logits: Float[Tensor, "n k *d"],
    targets: Tensor,
    *,
    gamma: float = 3.0,
    soft: Soft = "expectation",
    **contract: Unpack[Contract],
) -> Float[Tensor, "*r"]:
    """Focal loss ``-(1 - p_y)^gamma ln p_y``, in nats.

    Args:
        logits: ``[n, k]`` or dense ``[n, k, d1, ...]``; computed in float32 or better.
        targets: int64 labels, or float distributions of the logits' shape.
        gamma: At least 0, which is cross-entropy; 3 is FL-3 of the calibration tables.
        soft: Form for soft targets; ``distance`` is ``(|p - q|_1 / 2)^gamma CE(q, p)``.
        contract: See :class:`diffcal.calibration.losses.contract.Contract`.

    Raises:
        DataError: targets do not fit the logits.
        ConfigError: negative gamma, unknown soft form.

    Source: Lin et al. 2017 (arXiv:1708.02002), equation 4; for calibration Mukhoti et al. 2020
    (arXiv:2002.09437). Unlike the released code, gamma below 1 has no NaN gradient at ``p_y = 1``.
    """
    check_gamma(gamma)
    check_soft_form(soft)
    rows = loss_rows(logits, targets, contract)
    if rows.soft is not None and soft == "distance":
        statistics = row_statistics(rows, power=1.0)
        assert statistics.distance is not None
        values = (
            safe_power(0.5 * beyond_rounding(statistics.distance, 1.0), gamma)
            * statistics.cross_entropy
        )
    else:
        values = of_each_class(rows, StepPower((gamma,)))
    return reduced(values, rows, contract)


def flsd(
    logits: Float[Tensor, "n k *d"],
    targets: Tensor,
    *,
    table: GammaTable = FLSD_53,
    **contract: Unpack[Contract],
) -> Float[Tensor, "*r"]:
    """Sample-dependent focal loss: gamma 5 where ``p_y < 0.2``, else 3 (FLSD-53).

    Arguments as in :func:`focal`. Soft targets: expectation.

    Args:
        table: Gamma by probability; :data:`FLSD_52` is 5, 3, 2.

    Raises:
        ConfigError: the table is not ascending, has negative gammas or stops below 1.

    Source: Mukhoti et al. 2020 (arXiv:2002.09437), section 5; the bounds round
    :func:`flsd_gamma` at 0.2 and 0.25.
    """
    table = _checked(table)
    rows = loss_rows(logits, targets, contract)
    bounds, gammas = zip(*table, strict=True)
    weight = StepPower(gammas, bounds[:-1], edge_above=True)
    return reduced(of_each_class(rows, weight), rows, contract)


def inverse_focal(
    logits: Float[Tensor, "n k *d"],
    targets: Tensor,
    *,
    gamma: float = 2.0,
    **contract: Unpack[Contract],
) -> Float[Tensor, "*r"]:
    """Inverse focal loss ``-(1 + p_y)^gamma ln p_y``: larger weights on confident examples.

    Arguments as in :func:`focal`. Soft targets: expectation.

    Source: Wang et al. 2021, "Rethinking calibration of deep neural networks"; the form is that of
    the negative side of AdaFocal (arXiv:2211.11838).
    """
    check_gamma(gamma)
    rows = loss_rows(logits, targets, contract)
    return reduced(of_each_class(rows, StepPower((-gamma,))), rows, contract)


def focal_gradient_ratio(p: Float[Tensor, "*n"], gamma: float) -> Float[Tensor, "*n"]:
    """Focal gradient over cross-entropy gradient at true-class probability ``p`` in (0, 1)."""
    return (1 - p) ** gamma - gamma * p * (1 - p) ** (gamma - 1) * p.log()


def flsd_gamma(p0: float) -> float:
    """The gamma of FLSD for examples around ``p0``: where the focal gradient equals that of CE.

    The larger solution of ``g(p0, gamma) = 1``, by the lower branch of Lambert's W; none is
    positive for ``p0 >= 0.5``.

    Raises:
        ConfigError: ``p0`` is not in (0, 0.5).

    Source: Mukhoti et al. 2020 (arXiv:2002.09437), proposition 1.
    """
    from math import log

    from scipy.special import lambertw

    if not 0 < p0 < 0.5:
        raise ConfigError(f"FLSD has a positive gamma only for p0 in (0, 0.5), got {p0}")
    a = (1 - p0) / (p0 * log(p0))
    b = (1 - p0) ** (1 - a) / (p0 * log(p0)) * log(1 - p0)
    return float(a + lambertw(-b, -1).real / log(1 - p0))


class Focal(RowLoss):
    """Module form of :func:`focal`."""

    def __init__(
        self, gamma: float = 3.0, soft: Soft = "expectation", **contract: Unpack[Contract]
    ) -> None:
        super().__init__(**contract)
        check_soft_form(soft)
        self.gamma = check_gamma(gamma)
        self.soft: Soft = soft

    def forward(self, logits: Float[Tensor, "n k *d"], targets: Tensor) -> Float[Tensor, "*r"]:
        """The loss of ``targets``, hard or soft."""
        return focal(logits, targets, gamma=self.gamma, soft=self.soft, **self.contract())

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, soft={self.soft!r}, {super().extra_repr()}"


class Flsd(RowLoss):
    """Module form of :func:`flsd`."""

    def __init__(self, table: GammaTable = FLSD_53, **contract: Unpack[Contract]) -> None:
        super().__init__(**contract)
        self.table = _checked(table)

    def forward(self, logits: Float[Tensor, "n k *d"], targets: Tensor) -> Float[Tensor, "*r"]:
        """The loss of ``targets``, hard or soft."""
        return flsd(logits, targets, table=self.table, **self.contract())


class InverseFocal(RowLoss):
    """Module form of :func:`inverse_focal`."""

    def __init__(self, gamma: float = 2.0, **contract: Unpack[Contract]) -> None:
        super().__init__(**contract)
        self.gamma = check_gamma(gamma)

    def forward(self, logits: Float[Tensor, "n k *d"], targets: Tensor) -> Float[Tensor, "*r"]:
        """The loss of ``targets``, hard or soft."""
        return inverse_focal(logits, targets, gamma=self.gamma, **self.contract())


def of_each_class(rows: Rows, weight: StepPower) -> Float[Tensor, " n"]:
    """``-u ln p_y`` with a weight by the true class's probability; for soft targets its expectation."""
    if rows.soft is None:
        log_p = -row_statistics(rows).cross_entropy
        return -weight.of(log_p) * log_p
    return expected_weighted_loss(rows, weight)


def _checked(table: GammaTable) -> GammaTable:
    # lists come from TOML
    if not table or any(len(row) != 2 for row in table):
        raise ConfigError("the table of gammas needs rows (bound, gamma)")
    table = tuple((float(bound), check_gamma(float(gamma))) for bound, gamma in table)
    bounds = [bound for bound, _ in table]
    if bounds != sorted(set(bounds)) or not bounds[-1] > 1:
        raise ConfigError(
            f"the table of gammas needs ascending bounds, the last above 1; got {bounds}"
        )
    return table
