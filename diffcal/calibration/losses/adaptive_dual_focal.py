"""Dual focal losses whose gamma depends on the gap between the true class and the best one below it."""

from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.calibration.losses.adafocal import after_epoch
from diffcal.calibration.losses.class_weights import StepPower, safe_power
from diffcal.calibration.losses.contract import Contract, RowLoss, loss_rows, reduced
from diffcal.calibration.losses.dual_focal import of_true_and_below
from diffcal.calibration.losses.epoch_loss import EpochEnd, EpochLoss
from diffcal.calibration.losses.expectation import check_gamma
from diffcal.errors import ConfigError, DataError

__all__ = ["AdaDualFocal", "DualFlsd", "dual_flsd", "dual_focal_by_gap"]


def dual_focal_by_gap(
    logits: Float[Tensor, "n k *d"],
    targets: Tensor,
    *,
    gammas: Float[Tensor, " m"],
    edges: Float[Tensor, " m1"],
    edge_above: bool = False,
    **contract: Unpack[Contract],
) -> Float[Tensor, "*r"]:
    """Dual focal loss ``-(1 - g)^gamma(g) ln p_y`` of the gap ``g = p_y - p_j``, gamma a step function.

    ``p_j`` as in :func:`diffcal.calibration.losses.dual_focal.dual_focal`. The gap is differentiated,
    the step function is not. Soft targets: expectation, each class with its own gap.

    Args:
        logits: ``[n, k]`` or dense ``[n, k, d1, ...]``; computed in float32 or better.
        targets: int64 labels, or float distributions of the logits' shape.
        gammas: At least 0, in the order of rising gaps.
        edges: Rising gaps where gamma changes, one less than ``gammas``.
        edge_above: Whether a gap at an edge takes the gamma above it.
        contract: See :class:`diffcal.calibration.losses.contract.Contract`.

    Raises:
        DataError: targets do not fit the logits, edges do not fit the gammas.

    Source: variants in the first commit of the code of Tao et al. 2023 (arXiv:2305.13665).
    """
    if len(edges) != len(gammas) - 1:
        raise DataError(f"{len(gammas)} gammas need {len(gammas) - 1} edges, got {len(edges)}")
    rows = loss_rows(logits, targets, contract)

    def loss(log_p: Tensor, below: Tensor) -> Tensor:
        rest = below.exp() - log_p.expm1()
        table, steps = gammas.to(rest), edges.to(rest).contiguous()
        gap = (1 - rest).detach().contiguous()
        gamma = table[torch.bucketize(gap, steps, right=edge_above)]
        return -safe_power(rest, gamma) * log_p

    weight = StepPower(gammas, edges, edge_above)
    return reduced(of_true_and_below(rows, loss, weight), rows, contract)


def dual_flsd(
    logits: Float[Tensor, "n k *d"],
    targets: Tensor,
    *,
    gamma: float = 3.0,
    **contract: Unpack[Contract],
) -> Float[Tensor, "*r"]:
    """Dual focal loss with gamma 5 for gaps below 0.2, 3 below 0.5 and ``gamma`` from there.

    Arguments as in :func:`dual_focal_by_gap`. The default of 3 gives the two steps of FLSD-53; the
    released default of 0 is cross-entropy for confident right examples.

    Raises:
        DataError: targets do not fit the logits.
        ConfigError: negative gamma.

    Source: the sample-dependent variant in the first commit of the code of Tao et al. 2023
    (arXiv:2305.13665), after Mukhoti et al. 2020 (arXiv:2002.09437).
    """
    table = torch.tensor([5.0, 3.0, check_gamma(gamma)], dtype=torch.float64)
    edges = torch.tensor([0.2, 0.5], dtype=torch.float64)
    return dual_focal_by_gap(
        logits, targets, gammas=table, edges=edges, edge_above=True, **contract
    )


class DualFlsd(RowLoss):
    """Module form of :func:`dual_flsd`."""

    def __init__(self, gamma: float = 3.0, **contract: Unpack[Contract]) -> None:
        super().__init__(**contract)
        self.gamma = check_gamma(gamma)

    def forward(self, logits: Float[Tensor, "n k *d"], targets: Tensor) -> Float[Tensor, "*r"]:
        """The loss of ``targets``, hard or soft."""
        return dual_flsd(logits, targets, gamma=self.gamma, **self.contract())

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, {super().extra_repr()}"


class AdaDualFocal(EpochLoss):
    """:func:`dual_focal_by_gap` with gammas that follow the validation set's calibration.

    The rule of :class:`diffcal.calibration.losses.adafocal.AdaFocal` on its focal side alone: after
    each epoch the bin of a validation confidence has its gamma multiplied by ``exp(rate * gap)``,
    the gap being mean confidence less accuracy, and gammas stay positive, at most ``highest``. An
    example takes the gamma of the bin that holds ``p_y - p_j``.

    Args:
        bins: Number of bins.
        rate: Of the exponential update.
        initial: Gamma of every bin at the start.
        highest: Bound on gamma (the released code has none that would bind; AdaFocal's is taken).
        contract: See :class:`diffcal.calibration.losses.contract.Contract`.

    Raises:
        ConfigError: no bin, rate not positive, initial not in (0, highest].

    Source: a variant in the first commit of the code of Tao et al. 2023 (arXiv:2305.13665), after
    Ghosh et al. 2022 (arXiv:2211.11838).
    """

    needs_validation = True
    gammas: Tensor
    edges: Tensor

    def __init__(
        self,
        bins: int = 15,
        rate: float = 1.0,
        initial: float = 1.0,
        highest: float = 20.0,
        **contract: Unpack[Contract],
    ) -> None:
        super().__init__(**contract)
        if bins < 1:
            raise ConfigError(f"bins must be at least 1, got {bins}")
        if not rate > 0 or not 0 < initial <= highest:
            raise ConfigError(
                "ada_dual_focal needs rate > 0 and 0 < initial <= highest, got "
                f"rate {rate}, initial {initial}, highest {highest}"
            )
        self.rate, self.highest = rate, highest
        self.register_buffer("gammas", torch.full((bins,), initial))
        self.register_buffer("edges", torch.linspace(0, 1, bins + 1))

    def forward(self, logits: Float[Tensor, "n k *d"], targets: Tensor) -> Float[Tensor, "*r"]:
        """The loss of ``targets``, hard or soft, with the present gammas."""
        return dual_focal_by_gap(
            logits, targets, gammas=self.gammas, edges=self.edges[1:-1], **self.contract()
        )

    @torch.no_grad()
    def end_epoch(self, end: EpochEnd) -> None:
        """Move the gammas by the validation set's gaps, then the edges to its confidences.

        Raises:
            ConfigError: no validation examples.
        """
        gammas, edges = after_epoch(
            self.gammas,
            self.edges,
            end,
            lambda gammas, gaps: (gammas * torch.exp(self.rate * gaps)).clamp(max=self.highest),
        )
        self.gammas.copy_(gammas)
        self.edges.copy_(edges)
