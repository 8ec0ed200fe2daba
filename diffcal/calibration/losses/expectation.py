"""Losses of a single class, taken to soft targets as the expected loss of a label drawn from them."""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx

from diffcal.calibration.losses.class_weights import ClassWeight
from diffcal.calibration.losses.contract import Rows
from diffcal.calibration.losses.row_blocks import (
    CLASSES_FIRST,
    block_of,
    by_blocks,
    in_blocks,
    row_blocks,
)
from diffcal.calibration.losses.statistics_blocks import UNDERFLOWN
from diffcal.core.tensors import lay_out
from diffcal.errors import ConfigError

__all__ = [
    "Soft",
    "beyond_rounding",
    "check_gamma",
    "check_soft_form",
    "expected_in_closed_form",
    "expected_loss",
    "expected_weighted_loss",
    "probabilities",
]

Soft = Literal["expectation", "distance"]
"""What a loss does with a soft target ``q``.

expectation: ``sum_k q_k L(k, p)``, the expected loss of a label drawn from q. Linear in q. If L is
not proper (focal) it is not minimised at p = q.
distance: the one-hot label in the loss's own distance is replaced by q, times the cross-entropy
``CE(q, p)``; the weight vanishes at p = q, where both parts of the loss are minimal.
"""


def expected_loss(
    rows: Rows, per_class: Callable[[Tensor, Tensor, int], Tensor]
) -> Float[Tensor, " n"]:
    """``sum_k q_k L(k, p)`` of each row, over the classes with target mass.

    Args:
        rows: With soft targets.
        per_class: (logits, log-probabilities, axis of the classes) to the loss of every class.
    """

    def formula(z: Tensor, labels: Tensor | None, soft: Tensor | None, dim: int) -> Tensor:
        assert soft is not None
        values = per_class(z, torch.log_softmax(z, dim), dim)
        return torch.where(soft > 0, soft * values, 0).sum(dim)

    return by_blocks(rows, formula)


def expected_weighted_loss(rows: Rows, weight: ClassWeight) -> Float[Tensor, " n"]:
    """``-sum_k q_k u_k ln p_k`` of each row of soft targets, by blocks in closed form where it pays.

    With ``h_k = q_k (u_k + p_k u_k' ln p_k)``, minus the derivative in ``ln p_k``, the gradient in the
    logits is ``p sum_k h_k - h``.
    """

    def plain(z: Tensor, soft: Tensor, dim: int) -> Tensor:
        log_p = torch.log_softmax(z, dim)
        return -torch.where(soft > 0, soft * weight.of(log_p, dim) * log_p, 0).sum(dim)

    def block(z: Tensor, q: Tensor, dim: int, out: Tensor | None) -> Tensor:
        log_p, p, rest = probabilities(z, dim)
        h, du = weight.in_block(p, rest, dim, out is not None)
        h.mul_(q)
        values = torch.mul(h, log_p, out=rest).sum(dim).neg_()
        if out is not None:
            if du is not None:
                h.addcmul_(du.mul_(p).mul_(q), log_p.clamp_(min=UNDERFLOWN))
            torch.mul(p, h.sum(dim, keepdim=True), out=out).sub_(h)
        return values

    return expected_in_closed_form(rows, plain, block, CLASSES_FIRST)


Plain = Callable[[Tensor, Tensor, int], Tensor]
"""(logits, soft targets, axis of the classes) to one value per row, differentiable."""

Block = Callable[[Tensor, Tensor, int, Tensor | None], Tensor]
"""The same without autograd, which writes the gradient of each value into the last argument, if any.

Where a value is NaN, 0 ln 0 among its terms, the plain one counts; its gradient must be right."""


def expected_in_closed_form(
    rows: Rows, plain: Plain, block: Block, classes_first: int
) -> Float[Tensor, " n"]:
    """Losses of rows of soft targets, by blocks in closed form where it pays.

    Args:
        classes_first: Number of classes below which blocks hold them on the first axis.
    """
    z, soft = rows.logits, rows.soft
    assert soft is not None
    if in_blocks(z, soft):
        return _BlockedExpectation.apply(z, soft, plain, block, classes_first)  # type: ignore[no-any-return]
    return plain(z, soft, 1)


class _BlockedExpectation(torch.autograd.Function):
    """Values with their gradients made in one go: both come from the same softmax and weights.

    The gradient of each row is kept until the backward pass scales it, in as much memory as torch's
    cross-entropy keeps; a second backward pass of a retained graph makes it anew.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, z: Tensor, soft: Tensor, plain: Plain, block: Block, classes_first: int
    ) -> Tensor:
        ctx.save_for_backward(z, soft)
        ctx.functions = plain, block, classes_first  # type: ignore[attr-defined]
        values, ctx.gradient = _values(  # type: ignore[attr-defined]
            z,
            soft,
            plain,
            block,
            classes_first,
            ctx.needs_input_grad[0],  # type: ignore[attr-defined]
        )
        return values

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        z, soft = ctx.saved_tensors  # type: ignore[attr-defined]
        plain, block, classes_first = ctx.functions  # type: ignore[attr-defined]
        (slope,) = grads
        if torch.is_grad_enabled():  # a gradient of this gradient will be asked for
            (grad,) = torch.autograd.grad(plain(z, soft, 1), z, slope, create_graph=True)
            return grad, None, None, None, None
        kept, ctx.gradient = ctx.gradient, None  # type: ignore[attr-defined]
        if kept is None:
            _, kept = _values(z, soft, plain, block, classes_first, True)
        assert kept is not None
        return kept.mul_(slope.unsqueeze(1)), None, None, None, None


def _values(
    z: Tensor, soft: Tensor, plain: Plain, block: Block, classes_first: int, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss of each row and, if asked, its gradient in the row's logits, by blocks."""
    out = None
    if with_gradient:
        out = torch.empty_like(z, memory_format=torch.contiguous_format)
    parts = []
    for rows, dim in row_blocks(z, classes_first=classes_first):
        part, _, q = block_of(z, None, soft, rows, dim)
        assert q is not None
        grad = None if out is None else out[rows] if dim == 1 else torch.empty_like(part)
        values = block(part, q, dim, grad)
        if not bool(values.isfinite().all()):  # 0 * infinity is NaN, and must be 0
            values = plain(part, q, dim)
        parts.append(values)
        if out is not None and grad is not None and dim == 0:
            lay_out(grad.t(), out[rows])
    return torch.cat(parts), out


def probabilities(z: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """``ln p``, ``p`` and ``1 - p`` of a block."""
    log_p, p = torch.log_softmax(z, dim), torch.softmax(z, dim)
    rest = 1 - p
    # only the largest probability can be close to 1; ties are not, for them this changes nothing
    top = p.amax(dim, keepdim=True)
    exact = -torch.expm1(log_p.amax(dim, keepdim=True))
    rest.addcmul_(torch.eq(p, top, out=torch.empty_like(p)), exact - (1 - top))
    return log_p, p, rest.clamp_(min=torch.finfo(p.dtype).tiny)


def beyond_rounding(distance: Tensor, power: float) -> Tensor:
    """A distance ``sum_k |p_k - q_k|^power``, taken as 0 where rounding cannot tell p from q.

    The gradient of a norm is a direction, there that of the rounding errors.
    """
    return torch.where(distance > (2 * torch.finfo(distance.dtype).eps) ** power, distance, 0)


def check_gamma(gamma: float) -> float:
    """``gamma`` if it is a finite number of at least 0.

    Raises:
        ConfigError: it is not.
    """
    if not 0 <= gamma < float("inf"):
        raise ConfigError(f"gamma must be a finite number of at least 0, got {gamma}")
    return gamma


def check_soft_form(soft: str) -> None:
    """Raise :class:`ConfigError` unless ``soft`` is a :data:`Soft`."""
    if soft not in ("expectation", "distance"):
        raise ConfigError(f"unknown soft form '{soft}': use expectation or distance")
