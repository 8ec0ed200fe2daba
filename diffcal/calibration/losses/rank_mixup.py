"""RankMixup: a mixed image must be predicted less confidently than the raw one, and in order.

The raw batch trains with cross-entropy; mixed copies of it enter only through a ranking term.
"""

from dataclasses import dataclass
from typing import Unpack

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from diffcal.calibration.losses.contract import Contract, RowLoss, loss_rows, reduced
from diffcal.calibration.losses.mixup import mixup
from diffcal.calibration.losses.regularised import LossParts, check_coefficient
from diffcal.calibration.losses.soft_target import cross_entropy
from diffcal.errors import ConfigError, DataError

__all__ = [
    "MixedCopies",
    "RankMixupMndcg",
    "RankMixupMrl",
    "mixed_copies",
    "rank_mixup_mndcg_term",
    "rank_mixup_mrl_term",
]

PURE = 1e-6
"""A mixed target whose largest entry is this close to 1 came from two examples of one class."""


@dataclass(frozen=True)
class MixedCopies:
    """Several mixups of one batch."""

    images: Float[Tensor, "m b *i"]
    targets: Float[Tensor, "m b k"]
    same_class: Bool[Tensor, "m b"]


def mixed_copies(
    images: Float[Tensor, "b *i"],
    targets: Int[Tensor, " b"] | Float[Tensor, "b k"],
    *,
    copies: int = 3,
    alpha: float = 2.0,
    num_classes: int | None = None,
    generator: torch.Generator,
) -> MixedCopies:
    """``copies`` independent mixups of a batch, as :func:`diffcal.calibration.losses.mixup.mixup`.

    Three for M-NDCG and one for MRL; alpha is 2 on CIFAR and 1 on Tiny-ImageNet.

    Raises:
        ConfigError: no copies, alpha not positive, ``num_classes`` missing.
        DataError: lengths differ, labels out of range.

    Source: Noh et al. 2023 (arXiv:2308.11990) and its released settings.
    """
    if copies < 1:
        raise ConfigError(f"copies must be at least 1, got {copies}")
    made = [
        mixup(images, targets, alpha=alpha, num_classes=num_classes, generator=generator)
        for _ in range(copies)
    ]
    return MixedCopies(
        torch.stack([batch.images for batch in made]),
        torch.stack([batch.targets for batch in made]),
        torch.stack([batch.same_class for batch in made]),
    )


def rank_mixup_mndcg_term(
    logits: Float[Tensor, "b k"],
    mixed_logits: Float[Tensor, "m b k"],
    mixed_targets: Float[Tensor, "m b k"],
) -> Float[Tensor, " b"]:
    """1 less the normalised discounted cumulative gain of each image among its mixed copies.

    The raw image (relevance 1) and its copies (relevance the largest entry of their target) are
    sorted by relevance, ties in the given order; with the top probability of the t-th,
    ``dcg = sum_t confidence_t / log2(t + 1)``, ``idcg`` the same with relevances, and
    ``1 - dcg / idcg``, the ratio inverted where it exceeds 1.

    Returns:
        In [0, 1], unreduced.

    Raises:
        DataError: shapes do not fit.

    Source: Noh et al. 2023 (arXiv:2308.11990), the M-NDCG loss.
    """
    _check_copies(logits, mixed_logits, mixed_targets)
    confidence = torch.cat([logits[None], mixed_logits]).to(_dtype(logits)).softmax(2).amax(2)
    relevance = torch.cat([torch.ones_like(confidence[:1]), mixed_targets.amax(2)])
    relevance, order = relevance.sort(dim=0, descending=True, stable=True)
    places = torch.arange(2, len(relevance) + 2, device=logits.device, dtype=confidence.dtype)
    discount = places.log2()[:, None]
    dcg = (confidence.gather(0, order) / discount).sum(0)
    idcg = (relevance / discount).sum(0)
    ratio = dcg / idcg
    return 1 - torch.where(ratio > 1, 1 / ratio, ratio)


def rank_mixup_mrl_term(
    logits: Float[Tensor, "b k"],
    mixed_logits: Float[Tensor, "m b k"],
    mixed_targets: Float[Tensor, "m b k"],
    *,
    margin: float = 2.0,
    same_class: Bool[Tensor, "m b"] | None = None,
    released: bool = False,
) -> Float[Tensor, " b"]:
    """``relu(max z_mixed - max z_raw + margin)`` of each image, meaned over its copies.

    Copies mixed from two examples of one class count as 0.

    Args:
        logits: Of the raw images.
        mixed_logits: Of their copies (the paper uses one).
        mixed_targets: Of their copies.
        margin: 2 on CIFAR, 1 on Tiny-ImageNet.
        same_class: Which copies are of one class; by default those whose target is one-hot.
        released: Reproduce the released code, whose mask is broadcast over all pairs of examples:
            nothing is excluded, and everything is scaled by the share of copies of two classes.

    Raises:
        DataError: shapes do not fit.

    Source: Noh et al. 2023 (arXiv:2308.11990), the MRL loss.
    """
    _check_copies(logits, mixed_logits, mixed_targets)
    top, dtype = logits.to(_dtype(logits)).amax(1), _dtype(logits)
    hinge = (mixed_logits.to(dtype).amax(2) - top + margin).relu()
    if same_class is None:
        same_class = mixed_targets.amax(2) > 1 - PURE
    counted = (~same_class).to(dtype)
    if released:
        counted = counted.mean(dim=1, keepdim=True)
    return (hinge * counted).mean(dim=0)


class _RankMixup(RowLoss):
    """Cross-entropy of the raw batch plus ``coefficient`` (0.1) times a ranking term."""

    needs_copies = True

    def __init__(self, coefficient: float = 0.1, **contract: Unpack[Contract]) -> None:
        super().__init__(**contract)
        self.coefficient = check_coefficient(coefficient)

    def _rows_of_term(
        self, logits: Tensor, mixed: Tensor, mixed_targets: Tensor, same_class: Tensor | None
    ) -> Tensor:
        raise NotImplementedError

    def term(
        self,
        logits: Float[Tensor, "b k"],
        targets: Tensor,
        mixed_logits: Float[Tensor, "m b k"],
        mixed_targets: Float[Tensor, "m b k"],
        same_class: Bool[Tensor, "m b"] | None = None,
    ) -> Float[Tensor, "*r"]:
        """The bare ranking term, reduced; to be added to any loss of the raw batch.

        Args:
            logits: Of the raw images.
            targets: Of the raw images; they matter for ``ignore_index`` and ``class_weight`` alone.
            mixed_logits: Of their copies.
            mixed_targets: Of their copies.
            same_class: Which copies were mixed from one class; by default those whose target is
                one-hot. M-NDCG does not read it.
        """
        contract = self.contract()
        rows = loss_rows(logits, targets, {**contract, "validate": False})
        values = self._rows_of_term(logits, mixed_logits, mixed_targets, same_class)
        return reduced(values, rows, contract)

    def parts(
        self,
        logits: Float[Tensor, "b k"],
        targets: Tensor,
        mixed_logits: Float[Tensor, "m b k"],
        mixed_targets: Float[Tensor, "m b k"],
    ) -> LossParts:
        """The loss and its two parts, reduced alike."""
        base = cross_entropy(logits, targets, **self.contract())
        term = self.term(logits, targets, mixed_logits, mixed_targets)
        return LossParts(base + self.coefficient * term, base, term)

    def forward(
        self,
        logits: Float[Tensor, "b k"],
        targets: Tensor,
        mixed_logits: Float[Tensor, "m b k"],
        mixed_targets: Float[Tensor, "m b k"],
    ) -> Float[Tensor, "*r"]:
        """The loss of a batch and its mixed copies."""
        return self.parts(logits, targets, mixed_logits, mixed_targets).total


class RankMixupMndcg(_RankMixup):
    """Cross-entropy plus ``coefficient`` (0.1) times :func:`rank_mixup_mndcg_term`."""

    def _rows_of_term(
        self, logits: Tensor, mixed: Tensor, mixed_targets: Tensor, same_class: Tensor | None
    ) -> Tensor:
        return rank_mixup_mndcg_term(logits, mixed, mixed_targets)


class RankMixupMrl(_RankMixup):
    """Cross-entropy plus ``coefficient`` (0.1) times :func:`rank_mixup_mrl_term`."""

    def __init__(
        self,
        coefficient: float = 0.1,
        margin: float = 2.0,
        released: bool = False,
        **contract: Unpack[Contract],
    ) -> None:
        super().__init__(coefficient, **contract)
        self.margin, self.released = margin, released

    def _rows_of_term(
        self, logits: Tensor, mixed: Tensor, mixed_targets: Tensor, same_class: Tensor | None
    ) -> Tensor:
        return rank_mixup_mrl_term(
            logits,
            mixed,
            mixed_targets,
            margin=self.margin,
            same_class=same_class,
            released=self.released,
        )


def _dtype(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _check_copies(logits: Tensor, mixed_logits: Tensor, mixed_targets: Tensor) -> None:
    if mixed_logits.ndim != 3 or mixed_logits.shape[1:] != logits.shape or len(mixed_logits) == 0:
        raise DataError(
            f"mixed logits must be [copies, {', '.join(map(str, logits.shape))}], "
            f"got {list(mixed_logits.shape)}"
        )
    if mixed_targets.shape != mixed_logits.shape:
        raise DataError(
            f"mixed logits {list(mixed_logits.shape)} and targets {list(mixed_targets.shape)} "
            "must have one shape"
        )
