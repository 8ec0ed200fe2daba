"""Maximum mean calibration error of a batch: a kernel measure that can be differentiated.

With ``r`` the top probability, ``c`` whether it is right and ``k(r, r') = exp(-|r - r'| / width)``.
Soft targets: ``c`` is the target mass of the top class. The cost is a matrix over pairs of examples.
"""

from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.calibration.losses.class_weights import safe_power
from diffcal.calibration.losses.contract import Contract, Rows, loss_rows
from diffcal.calibration.losses.regularised import BatchRegularisedLoss
from diffcal.errors import ConfigError

__all__ = ["Mmce", "WeightedMmce", "mmce_term", "weighted_mmce_term"]

RELEASED_EPSILON = 1e-5, 1e-10
"""Added in the released weighted code to its denominators and under its root."""


def mmce_term(
    logits: Float[Tensor, "n k *d"],
    targets: Tensor,
    *,
    width: float = 0.4,
    sqrt: bool = True,
    ignore_index: int | None = None,
    validate: bool = True,
) -> Float[Tensor, ""]:
    """MMCE: the root of ``(1/n^2) sum_ij (c_i - r_i) (c_j - r_j) k(r_i, r_j)``, 0 if it vanishes.

    Args:
        logits: ``[n, k]`` or dense ``[n, k, d1, ...]``; computed in float32 or better.
        targets: int64 labels, or float distributions of the logits' shape.
        width: Of the Laplace kernel.
        sqrt: False gives the square, which the released losses add to cross-entropy.
        ignore_index: Integer targets of this value do not count.
        validate: Check the values of logits and targets.

    Source: Kumar et al. 2018, "Trainable calibration measures for neural networks from kernel mean
    embeddings" (ICML).
    """
    rows, c, r, kernel = _pieces(logits, targets, width, ignore_index, validate)
    w = rows.weights()
    gap = w * (c - r) / w.sum().clamp(min=1)
    square = gap @ kernel @ gap
    return safe_power(square.clamp(min=0), 0.5) if sqrt else square


def weighted_mmce_term(
    logits: Float[Tensor, "n k *d"],
    targets: Tensor,
    *,
    width: float = 0.4,
    released: bool = False,
    ignore_index: int | None = None,
    validate: bool = True,
) -> Float[Tensor, ""]:
    """Weighted MMCE: right and wrong examples are averaged by themselves before they are compared.

    With m right and n wrong examples the root of ``v' K v``, ``v_i = (1 - r_i) / m`` for right and
    ``-r_i / n`` for wrong ones; 0 if there are only right or only wrong ones. Soft targets: an
    example counts as right with mass c and as wrong with mass 1 - c.

    Arguments as in :func:`mmce_term`.

    Args:
        released: Reproduce the released code (every copy of it), which divides the averages over
            pairs by the numbers of pairs a second time, so that the term is far too small. Hard
            targets only.

    Raises:
        DataError: targets do not fit the logits.
        ConfigError: ``released`` with soft targets.

    Source: Kumar et al. 2018 (ICML), section 5.
    """
    rows, c, r, kernel = _pieces(logits, targets, width, ignore_index, validate)
    w = rows.weights()
    right, wrong = w * c, w * (1 - c)
    m, n = right.sum(), wrong.sum()
    both = (m > 0) & (n > 0)
    m, n = torch.where(both, m, 1), torch.where(both, n, 1)
    if released:
        if rows.soft is not None:
            raise ConfigError("the released weighted MMCE is defined for hard targets only")
        small, under_root = RELEASED_EPSILON
        up, down = right * (1 - r) / m, wrong * r / n
        square = (up @ kernel @ up) / (m * m + small) + (down @ kernel @ down) / (n * n + small)
        square = square - 2 * (up @ kernel @ down) / (m * n + small)
        return torch.where(both, (square + under_root).clamp(min=under_root).sqrt(), 0)
    v = right * (1 - r) / m - wrong * r / n
    return torch.where(both, safe_power((v @ kernel @ v).clamp(min=0), 0.5), 0)


class Mmce(BatchRegularisedLoss):
    """Cross-entropy (or its variants) plus ``coefficient`` times :func:`mmce_term`."""

    def __init__(
        self,
        coefficient: float = 2.0,
        width: float = 0.4,
        sqrt: bool = True,
        gamma: float = 0.0,
        smoothing: float = 0.0,
        **contract: Unpack[Contract],
    ) -> None:
        super().__init__(coefficient, gamma, smoothing, **contract)
        self.width, self.sqrt = _check_width(width), sqrt

    def term(self, logits: Float[Tensor, "n k *d"], targets: Tensor) -> Float[Tensor, ""]:
        return mmce_term(
            logits,
            targets,
            width=self.width,
            sqrt=self.sqrt,
            ignore_index=self.ignore_index,
            validate=self.validate,
        )


class WeightedMmce(BatchRegularisedLoss):
    """Cross-entropy (or its variants) plus ``coefficient`` times :func:`weighted_mmce_term`.

    Scripts of the focal-calibration family use 2, MDCA's comparison 4.
    """

    def __init__(
        self,
        coefficient: float = 2.0,
        width: float = 0.4,
        released: bool = False,
        gamma: float = 0.0,
        smoothing: float = 0.0,
        **contract: Unpack[Contract],
    ) -> None:
        super().__init__(coefficient, gamma, smoothing, **contract)
        self.width, self.released = _check_width(width), released

    def term(self, logits: Float[Tensor, "n k *d"], targets: Tensor) -> Float[Tensor, ""]:
        return weighted_mmce_term(
            logits,
            targets,
            width=self.width,
            released=self.released,
            ignore_index=self.ignore_index,
            validate=self.validate,
        )


def _pieces(
    logits: Tensor, targets: Tensor, width: float, ignore_index: int | None, validate: bool
) -> tuple[Rows, Tensor, Tensor, Tensor]:
    """Rows, correctness, top probability and the kernel of all pairs."""
    _check_width(width)
    rows = loss_rows(logits, targets, {"ignore_index": ignore_index, "validate": validate})
    r = rows.logits.softmax(dim=1).max(dim=1).values
    if rows.kept is not None:
        r = torch.where(rows.kept, r, 0)  # an ignored row may hold NaN
    kernel = torch.exp(-(r[:, None] - r[None, :]).abs() / width)
    return rows, rows.correctness(), r, kernel


def _check_width(width: float) -> float:
    if not 0 < width < float("inf"):
        raise ConfigError(f"the kernel's width must be positive, got {width}")
    return width
