"""Correctness ranking loss: confidence ordered as examples' records of being classified right."""

from typing import Literal, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffcal.calibration.losses.contract import Contract, loss_rows
from diffcal.calibration.losses.epoch_loss import EpochEnd, EpochLoss
from diffcal.calibration.losses.regularised import LossParts, check_coefficient, mean_rows
from diffcal.calibration.losses.soft_target import cross_entropy
from diffcal.errors import ConfigError, DataError

__all__ = ["Crl", "RankTarget", "crl_term"]

RankTarget = Literal["softmax", "margin", "entropy"]
"""Confidence to rank: top probability, gap of the top two, or minus the entropy over ``ln k``."""


def crl_term(
    logits: Float[Tensor, "n k *d"],
    targets: Tensor,
    history: Float[Tensor, " m"],
    *,
    rank_target: RankTarget = "softmax",
    ignore_index: int | None = None,
    validate: bool = True,
) -> Float[Tensor, ""]:
    """Hinges on pairs of examples whose confidences do not differ as their records do.

    Each example i is paired with the next one j of the batch (the last with the first):
    ``mean_i max(0, -sign(h_i - h_j) (kappa_i - kappa_j) + |h_i - h_j|)``, 0 where the records are
    equal.

    Args:
        logits: ``[n, k]``; computed in float32 or better.
        targets: Read by ``ignore_index`` only; a pair counts if both of its examples do.
        history: Share of past epochs in which each example was classified right, in [0, 1].
        rank_target: The confidence kappa.
        ignore_index: Integer targets of this value do not count.
        validate: Check the values of logits and targets.

    Raises:
        DataError: targets or history do not fit the logits.
        ConfigError: unknown ``rank_target``.

    Source: Moon et al. 2020 (arXiv:2007.01687), equations 2 to 4.
    """
    _check_rank_target(rank_target)
    rows = loss_rows(logits, targets, {"ignore_index": ignore_index, "validate": validate})
    if history.shape != rows.logits.shape[:1]:
        raise DataError(f"history must be [{len(rows.logits)}], got {list(history.shape)}")
    log_p = torch.log_softmax(rows.logits, dim=1)
    p = log_p.exp()
    if rank_target == "softmax":
        kappa = p.max(dim=1).values
    elif rank_target == "margin":
        best = p.topk(2, dim=1).values
        kappa = best[:, 0] - best[:, 1]
    else:
        k = rows.logits.new_tensor(float(p.shape[1]))
        kappa = torch.where(p > 0, p * log_p, 0).sum(dim=1) / k.log()
    difference = (history - history.roll(-1)).to(kappa.dtype)
    hinge = (difference.abs() - difference.sign() * (kappa - kappa.roll(-1))).relu()
    hinge = torch.where(difference == 0, 0, hinge)
    if rows.kept is not None:
        hinge = torch.where(rows.kept & rows.kept.roll(-1), hinge, 0)
    return mean_rows(hinge, rows)


class Crl(EpochLoss):
    """Cross-entropy plus ``coefficient`` times :func:`crl_term` on the run's own records.

    In training mode ``forward`` notes for each example whether it was right (for soft targets: the
    target mass of the top class), after the loss has used its earlier record. Several processes
    join their notes at the end of an epoch.

    Args:
        coefficient: At least 0; 1 in the paper.
        rank_target: See :data:`RankTarget`.
        released: Records as in the released code: with ``c`` the count of right epochs,
            ``(c - min c) / (epochs - min c)`` over the training set, instead of the share of right
            epochs among those in which the example was seen.
        contract: See :class:`diffcal.calibration.losses.contract.Contract`; reduction mean or sum
            (``sum`` multiplies the term by the number of examples).

    Source: Moon et al. 2020 (arXiv:2007.01687).
    """

    needs_examples = True
    seen: Tensor
    right: Tensor
    newly_seen: Tensor
    newly_right: Tensor
    epochs: Tensor

    def __init__(
        self,
        coefficient: float = 1.0,
        rank_target: RankTarget = "softmax",
        released: bool = False,
        **contract: Unpack[Contract],
    ) -> None:
        super().__init__(**contract)
        if self.reduction == "none":
            raise ConfigError("this loss has a term of the whole batch: reduction is mean or sum")
        _check_rank_target(rank_target)
        self.coefficient = check_coefficient(coefficient)
        self.rank_target: RankTarget = rank_target
        self.released = released
        for name in ("seen", "right", "newly_seen", "newly_right"):
            self.register_buffer(name, torch.zeros(0))
        self.register_buffer("epochs", torch.zeros(()))

    def begin(self, num_examples: int) -> None:
        """Empty records for a training set of ``num_examples``."""
        for name in ("seen", "right", "newly_seen", "newly_right"):
            setattr(self, name, torch.zeros(num_examples, device=self.seen.device))
        self.epochs.zero_()

    def history(self, examples: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The records of some examples, in [0, 1]; 0 for one never seen."""
        right, seen = self.right + self.newly_right, self.seen + self.newly_seen
        if self.released:
            least = right.min()
            return ((right[examples] - least) / (self.epochs - least).clamp(min=1)).clamp(0, 1)
        return right[examples] / seen[examples].clamp(min=1)

    def parts(
        self, logits: Float[Tensor, "n k"], targets: Tensor, examples: Int[Tensor, " m"]
    ) -> LossParts:
        """The loss, its cross-entropy as reduced, and its ranking term as a mean."""
        base = cross_entropy(logits, targets, **self.contract())
        term = crl_term(
            logits,
            targets,
            self.history(examples),
            rank_target=self.rank_target,
            ignore_index=self.ignore_index,
            validate=False,
        )
        scale = self.coefficient * (len(logits) if self.reduction == "sum" else 1)
        return LossParts(base + scale * term, base, term)

    def forward(
        self, logits: Float[Tensor, "n k"], targets: Tensor, examples: Int[Tensor, " m"]
    ) -> Float[Tensor, ""]:
        """The loss of ``targets``, hard or soft; ``examples`` are rows of the training set.

        Raises:
            ConfigError: ``begin`` was not called.
            DataError: examples do not fit the logits or the training set.
        """
        if len(self.seen) == 0:
            raise ConfigError("call begin(num_examples) before the first batch")
        if examples.shape != logits.shape[:1]:
            raise DataError(
                f"examples must be [{len(logits)}] rows, got shape {list(examples.shape)}"
            )
        if self.validate and len(examples) and not torch.compiler.is_compiling():
            low, high = (int(end) for end in examples.aminmax())
            if not 0 <= low <= high < len(self.seen):
                raise DataError(
                    f"examples run from {low} to {high}, but the loss was begun for "
                    f"{len(self.seen)}"
                )
        total = self.parts(logits, targets, examples).total
        if self.training:
            with torch.no_grad():
                keep: Contract = {"ignore_index": self.ignore_index, "validate": False}
                rows = loss_rows(logits.detach(), targets, keep)
                counted = rows.weights()
                self.newly_seen.index_add_(0, examples, counted.to(self.seen.dtype))
                noted = (rows.correctness() * counted).to(self.seen.dtype)
                self.newly_right.index_add_(0, examples, noted)
        return total

    @torch.no_grad()
    def end_epoch(self, end: EpochEnd) -> None:
        self.seen += end.total(self.newly_seen)
        self.right += end.total(self.newly_right)
        self.newly_seen.zero_()
        self.newly_right.zero_()
        self.epochs += 1


def _check_rank_target(rank_target: str) -> None:
    if rank_target not in ("softmax", "margin", "entropy"):
        raise ConfigError(f"unknown rank_target '{rank_target}': use softmax, margin or entropy")
