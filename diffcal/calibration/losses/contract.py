"""The contract every loss keeps: hard or soft targets, dense inputs, ignored rows, reductions.

A loss is mathematics on rows: logits ``[n, k]`` in float32 or better and one target per row. This
file turns what a caller passes into rows (:func:`as_rows`) and per-row values into what the caller
asked for (:func:`reduce_rows`), so that a loss file holds only its formula.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, TypedDict, Unpack

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from diffcal.errors import ConfigError, DataError

__all__ = [
    "TARGET_TOLERANCE",
    "Contract",
    "Reduction",
    "RowLoss",
    "Rows",
    "as_rows",
    "loss_rows",
    "reduce_rows",
    "reduced",
]

Reduction = Literal["none", "mean", "sum"]

TARGET_TOLERANCE = 1e-4
"""How far the sum of a soft target may be from 1, besides what half precision rounds away."""


class Contract(TypedDict, total=False):
    """Keyword arguments that every loss function and every loss module takes."""

    reduction: Reduction
    """``none`` gives one value per example (per pixel of dense input); by default ``mean``."""
    ignore_index: int | None
    """Integer targets of this value count neither in values nor in gradients nor in the mean."""
    class_weight: Float[Tensor, " k"] | None
    """Weight of each class, see :func:`reduce_rows`."""
    validate: bool
    """Check the values of logits and targets (the default); see :func:`as_rows`."""


@dataclass(frozen=True)
class Rows:
    """Logits and targets as rows, whatever shape they came in."""

    logits: Float[Tensor, "n k"]
    """In float32, or float64 if they came so; never half precision."""
    labels: Int[Tensor, " n"] | None
    """Hard targets (ignored rows hold class 0), or None when targets are soft."""
    soft: Float[Tensor, "n k"] | None
    """Soft targets in the dtype of ``logits``, or None when targets are hard."""
    kept: Bool[Tensor, " n"] | None
    """False where a hard target is ``ignore_index``; None when all rows count."""
    shape: tuple[int, ...]
    """Shape of the per-example values that the caller expects."""

    def distribution(self) -> Float[Tensor, "n k"]:
        """Targets as distributions over classes; one-hot rows for hard ones."""
        if self.soft is not None:
            return self.soft
        assert self.labels is not None
        return F.one_hot(self.labels, self.logits.shape[1]).to(self.logits.dtype)

    def weights(self) -> Float[Tensor, " n"]:
        """1 for rows that count and 0 for ignored ones, in the dtype of ``logits``."""
        z = self.logits
        return z.new_ones(len(z)) if self.kept is None else self.kept.to(z.dtype)

    def correctness(self) -> Float[Tensor, " n"]:
        """1 where the likeliest class is the label, else 0; for soft targets its share of ``q``."""
        with torch.no_grad():
            best = self.logits.argmax(dim=1)
            if self.soft is not None:
                return self.soft.gather(1, best[:, None])[:, 0]
            return (best == self.labels).to(self.logits.dtype)


def as_rows(
    logits: Float[Tensor, "n k *d"],
    targets: Tensor,
    *,
    ignore_index: int | None = None,
    validate: bool = True,
) -> Rows:
    """Rows of logits ``[n, k]`` or dense logits ``[n, k, d1, ...]`` (class axis 1) and their targets.

    Args:
        logits: Half precision is raised to float32 before anything is computed.
        targets: int64 of the logits' shape without the class axis, or floating of the logits' shape.
        ignore_index: Hard targets of this value do not count.
        validate: Check logits, labels and soft rows (reads the values, which waits for a GPU).
            Under torch.compile values cannot be read and are not checked.

    Raises:
        DataError: shapes do not fit, fewer than two classes, logits NaN or infinite, labels out of
            range, soft rows negative or not summing to 1.
    """
    for name, given in (("logits", logits), ("targets", targets)):
        if not isinstance(given, Tensor):
            raise DataError(f"{name} must be a torch tensor, got {type(given).__name__}")
    if logits.ndim < 2:
        raise DataError(f"logits must be [n, k] or [n, k, ...], got shape {list(logits.shape)}")
    classes = logits.shape[1]
    if classes < 2:
        raise DataError(
            f"a loss needs logits of at least 2 classes, got shape {list(logits.shape)}"
        )
    validate = validate and not torch.compiler.is_compiling()
    shape = (logits.shape[0], *logits.shape[2:])
    z = logits.movedim(1, -1).reshape(-1, classes)
    if z.dtype in (torch.float16, torch.bfloat16):
        z = z.float()
    if targets.is_floating_point():
        if ignore_index is not None:
            raise DataError("ignore_index goes with integer targets; these targets are soft")
        if targets.shape != logits.shape:
            raise DataError(
                f"soft targets must have the logits' shape {list(logits.shape)}, "
                f"got {list(targets.shape)}"
            )
        soft = targets.movedim(1, -1).reshape(-1, classes)
        if validate:
            _check_soft(soft)
            _check_finite(z, None)
        return Rows(z, None, soft.to(z.dtype), None, shape)
    if tuple(targets.shape) != shape:
        raise DataError(
            f"integer targets must have shape {list(shape)} for logits {list(logits.shape)}, "
            f"got {list(targets.shape)}"
        )
    labels, kept = targets.reshape(-1).long(), None
    if ignore_index is not None:
        kept = labels != ignore_index
        labels = torch.where(kept, labels, 0)
    if validate and labels.numel():
        low, high = (int(end) for end in labels.aminmax())
        if not 0 <= low <= high < classes:
            raise DataError(
                f"labels run from {low} to {high}, but the logits have {classes} classes"
            )
        _check_finite(z, kept)
    return Rows(z, labels, None, kept, shape)


def reduce_rows(
    values: Float[Tensor, " n"],
    rows: Rows,
    reduction: Reduction,
    class_weight: Float[Tensor, " k"] | None = None,
) -> Float[Tensor, "*d"]:
    """Per-row values in the caller's shape, or their mean or sum over the rows that count.

    With ``class_weight`` a row weighs ``sum_k q_k w_k`` (its class's weight for a hard target), and
    the mean divides by the sum of these weights. (Torch's cross-entropy does the same for hard
    targets; it weights the terms ``q_k log p_k`` of soft ones, and divides by the number of rows.)
    ``mean`` is 0 where every row is ignored.

    Raises:
        ConfigError: ``reduction`` is not one of none, mean, sum.
        DataError: the mean of an empty batch, or not one weight for each class.
    """
    weight = None
    if class_weight is not None:
        if class_weight.shape != rows.logits.shape[1:]:
            raise DataError(
                f"class_weight must have shape {list(rows.logits.shape[1:])}, "
                f"got {list(class_weight.shape)}"
            )
        w = class_weight.to(rows.logits)
        weight = rows.soft @ w if rows.soft is not None else w[rows.labels]
    if rows.kept is not None:
        kept = rows.kept.to(values.dtype)
        weight = kept if weight is None else weight * kept
        values = torch.where(rows.kept, values, 0)  # an ignored row may hold infinity
    if weight is not None:
        values = values * weight
    if reduction == "none":
        return values.reshape(rows.shape)
    if reduction == "sum":
        return values.sum()
    if reduction == "mean":
        if values.numel() == 0:
            raise DataError("an empty batch has no mean loss; reduction='sum' gives 0")
        if weight is None:
            return values.mean()
        total = weight.sum()
        return values.sum() / torch.where(total > 0, total, 1)
    raise ConfigError(f"unknown reduction '{reduction}': use none, mean or sum")


def loss_rows(logits: Float[Tensor, "n k *d"], targets: Tensor, contract: Contract) -> Rows:
    """:func:`as_rows` with the settings of ``contract``."""
    return as_rows(
        logits,
        targets,
        ignore_index=contract.get("ignore_index"),
        validate=contract.get("validate", True),
    )


def reduced(values: Float[Tensor, " n"], rows: Rows, contract: Contract) -> Float[Tensor, "*d"]:
    """:func:`reduce_rows` with the settings of ``contract``."""
    return reduce_rows(
        values, rows, contract.get("reduction", "mean"), contract.get("class_weight")
    )


class RowLoss(nn.Module):
    """Base of loss modules: keeps the settings of :class:`Contract`.

    A subclass names its own parameters in ``__init__`` and calls its function with
    ``**self.contract()``.
    """

    needs_copies: ClassVar[bool] = False
    """Also reads outputs for mixed copies of the batch: see ``rank_mixup``."""
    class_weight: Tensor | None

    def __init__(self, **contract: Unpack[Contract]) -> None:
        super().__init__()
        reduction = contract.get("reduction", "mean")
        if reduction not in ("none", "mean", "sum"):
            raise ConfigError(f"unknown reduction '{reduction}': use none, mean or sum")
        self.reduction: Reduction = reduction
        self.ignore_index = contract.get("ignore_index")
        self.validate = contract.get("validate", True)
        # not persistent: a classifier's checkpoint should not depend on its loss
        self.register_buffer("class_weight", contract.get("class_weight"), persistent=False)

    def contract(self) -> Contract:
        """Keyword arguments that every loss function takes."""
        return {
            "reduction": self.reduction,
            "ignore_index": self.ignore_index,
            "class_weight": self.class_weight,
            "validate": self.validate,
        }

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"


def _check_finite(z: Float[Tensor, "n k"], kept: Bool[Tensor, " n"] | None) -> None:
    z = z.detach()
    if bool(z.sum().isfinite()):  # one quick pass; NaN and infinity both survive a sum
        return
    bad = ~z.isfinite().all(dim=1)
    if kept is not None:
        bad &= kept
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise DataError(f"logits must be finite; row {row} holds NaN or infinity")


def _check_soft(soft: Float[Tensor, "n k"]) -> None:
    if soft.numel() == 0:
        return
    sums = soft.detach().sum(dim=1, dtype=torch.promote_types(soft.dtype, torch.float32))
    worst = int((sums - 1).abs().nan_to_num(nan=float("inf")).argmax())
    tolerance = TARGET_TOLERANCE
    if soft.dtype in (torch.float16, torch.bfloat16):
        # every entry is off by half a unit of its last place; what float16 flushes to 0 is less
        tolerance += torch.finfo(soft.dtype).eps / 2
    if not abs(float(sums[worst]) - 1) <= tolerance:
        raise DataError(
            f"soft targets must sum to 1 within {tolerance:g}; "
            f"row {worst} sums to {float(sums[worst]):.6g}"
        )
    if float(soft.min()) < 0:
        raise DataError(f"soft targets must not be negative, found {float(soft.min()):.6g}")
