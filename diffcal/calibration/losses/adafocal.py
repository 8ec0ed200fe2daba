"""AdaFocal: a gamma for each range of confidence, corrected by the calibration error it leaves."""

from collections.abc import Callable
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.calibration.losses.class_weights import StepPower
from diffcal.calibration.losses.contract import Contract, loss_rows, reduced
from diffcal.calibration.losses.epoch_loss import EpochEnd, EpochLoss
from diffcal.calibration.losses.focal import of_each_class
from diffcal.errors import ConfigError, DataError

__all__ = ["AdaFocal", "adafocal", "after_epoch", "next_gammas"]


def adafocal(
    logits: Float[Tensor, "n k *d"],
    targets: Tensor,
    *,
    gammas: Float[Tensor, " m"],
    edges: Float[Tensor, " m1"],
    **contract: Unpack[Contract],
) -> Float[Tensor, "*r"]:
    """Focal loss with the gamma of the bin of ``p_y``, inverse focal where that gamma is negative.

    ``-(1 - p_y)^gamma ln p_y`` for gamma >= 0, else ``-(1 + p_y)^|gamma| ln p_y``; the bin is not
    differentiated. Soft targets: expectation, class k takes the bin of ``p_k``.

    Args:
        logits: ``[n, k]`` or dense ``[n, k, d1, ...]``; computed in float32 or better.
        targets: int64 labels, or float distributions of the logits' shape.
        gammas: Of each bin.
        edges: Ascending; bins are (lower, upper], and probabilities outside take the end bins.
        contract: See :class:`diffcal.calibration.losses.contract.Contract`.

    Raises:
        DataError: targets do not fit the logits, edges do not fit the gammas.

    Source: Ghosh et al. 2022 (arXiv:2211.11838), equation 7.
    """
    if len(edges) != len(gammas) + 1:
        raise DataError(f"{len(gammas)} gammas need {len(gammas) + 1} edges, got {len(edges)}")
    rows = loss_rows(logits, targets, contract)
    weight = StepPower(gammas, edges[1:-1])
    return reduced(of_each_class(rows, weight), rows, contract)


def next_gammas(
    gammas: Float[Tensor, " m"],
    gaps: Float[Tensor, " m"],
    *,
    rate: float = 1.0,
    switch: float = 0.2,
    lowest: float = -2.0,
    highest: float = 20.0,
) -> Float[Tensor, " m"]:
    """Gammas after an epoch that left the gap (mean confidence less accuracy) in each bin.

    ``gamma exp(rate gap)`` if positive, else ``gamma exp(-rate gap)``; what falls below ``switch``
    in size changes sides at ``switch``; then the bounds.

    Source: Ghosh et al. 2022 (arXiv:2211.11838), algorithm 1, and its code.
    """
    moved = gammas * torch.exp(torch.where(gammas > 0, gaps, -gaps) * rate)
    flipped = torch.copysign(torch.full_like(moved, switch), -moved)
    return torch.where(moved.abs() < switch, flipped, moved).clamp(lowest, highest)


class AdaFocal(EpochLoss):
    """:func:`adafocal` with gammas that follow the validation set's calibration.

    After each epoch the validation examples' top confidences give each bin's gap, from which
    :func:`next_gammas` makes the next gammas, and then new edges with equal numbers of examples
    (equal widths before the first epoch). Bins without validation examples keep their gamma.

    Args:
        bins: Number of bins.
        rate: Of the exponential update.
        initial: Gamma of every bin at the start.
        switch: Size of gamma at which a bin changes between focal and inverse focal.
        lowest: Bound on gamma.
        highest: Bound on gamma.
        contract: See :class:`diffcal.calibration.losses.contract.Contract`.

    Raises:
        ConfigError: no bin, bounds that do not enclose both sides, rate not positive.

    Source: Ghosh et al. 2022 (arXiv:2211.11838), with the settings of its code.
    """

    needs_validation = True
    gammas: Tensor
    edges: Tensor

    def __init__(
        self,
        bins: int = 15,
        rate: float = 1.0,
        initial: float = 1.0,
        switch: float = 0.2,
        lowest: float = -2.0,
        highest: float = 20.0,
        **contract: Unpack[Contract],
    ) -> None:
        super().__init__(**contract)
        if bins < 1:
            raise ConfigError(f"bins must be at least 1, got {bins}")
        if not rate > 0 or not switch > 0 or not lowest <= -switch < switch <= highest:
            raise ConfigError(
                "adafocal needs rate > 0 and lowest <= -switch < 0 < switch <= highest, got "
                f"rate {rate}, lowest {lowest}, switch {switch}, highest {highest}"
            )
        if not lowest <= initial <= highest:
            raise ConfigError(f"initial must be in [{lowest}, {highest}], got {initial}")
        self.rate, self.switch, self.lowest, self.highest = rate, switch, lowest, highest
        self.register_buffer("gammas", torch.full((bins,), initial))
        self.register_buffer("edges", torch.linspace(0, 1, bins + 1))

    def forward(self, logits: Float[Tensor, "n k *d"], targets: Tensor) -> Float[Tensor, "*r"]:
        """The loss of ``targets``, hard or soft, with the present gammas."""
        return adafocal(logits, targets, gammas=self.gammas, edges=self.edges, **self.contract())

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
            lambda gammas, gaps: next_gammas(
                gammas,
                gaps,
                rate=self.rate,
                switch=self.switch,
                lowest=self.lowest,
                highest=self.highest,
            ),
        )
        self.gammas.copy_(gammas)
        self.edges.copy_(edges)


def after_epoch(
    gammas: Float[Tensor, " m"],
    edges: Float[Tensor, " m1"],
    end: EpochEnd,
    rule: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Float[Tensor, " m"], Float[Tensor, " m1"]]:
    """Gammas moved by the gaps of validation confidences in their bins, and new edges of equal mass.

    Args:
        gammas: Of each bin.
        edges: Of the bins.
        end: With validation examples.
        rule: Gammas and gaps (mean confidence less accuracy), float64 on the CPU, to next gammas;
            bins without examples keep theirs.

    Raises:
        ConfigError: no validation examples.
    """
    if end.logits is None or end.labels is None or len(end.labels) == 0:
        raise ConfigError("the loss adapts to validation examples and got none")
    p, best = end.logits.double().cpu().softmax(dim=1).max(dim=1)
    right = (best == end.labels.cpu()).double()
    before, bins = gammas.double().cpu(), len(gammas)
    place = torch.bucketize(p, edges[1:-1].double().cpu().contiguous())
    count = torch.bincount(place, minlength=bins)
    gaps = torch.bincount(place, weights=p - right, minlength=bins) / count.clamp(min=1)
    moved = torch.where(count > 0, rule(before, gaps), before)
    # edges between order statistics: quantile() refuses more than 16 million values
    at = torch.linspace(0, len(p) - 1, bins + 1, dtype=torch.float64)
    ascending, low = p.sort().values, at.floor().long()
    high = (low + 1).clamp(max=len(p) - 1)
    return moved, torch.lerp(ascending[low], ascending[high], at - low)
