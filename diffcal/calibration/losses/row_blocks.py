"""Pointwise losses over large inputs, a block of rows at a time.

Rows do not depend on each other, so a loss may be computed and differentiated in blocks that stay in
the processor's cache: a softmax over a whole large tensor spends its time on main memory. Blocks are
used on the CPU only, and only by plain eager code; elsewhere the same formula runs on all rows.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx

from diffcal.calibration.losses.contract import Rows
from diffcal.core.tensors import lay_out

__all__ = [
    "BLOCK_ELEMENTS",
    "CLASSES_FIRST",
    "Formula",
    "block_of",
    "by_blocks",
    "in_blocks",
    "row_blocks",
]

BLOCK_ELEMENTS = 1 << 16
"""Logits per block and thread (256 KB in float32), and the size from which blocks are used."""

CLASSES_FIRST = 16
"""Below this number of classes a block is transposed: softmax over short rows does not vectorise."""

Formula = Callable[[Tensor, Tensor | None, Tensor | None, int], Tensor]
"""(logits, labels, soft targets, axis of the classes) to one value per row, differentiable."""


def by_blocks(rows: Rows, formula: Formula, *, per_logit: int = 1) -> Float[Tensor, " n"]:
    """Values of ``formula`` for each row, differentiated by autograd inside each block.

    Args:
        rows: Logits and targets.
        formula: May depend on nothing else that needs a gradient.
        per_logit: Intermediate numbers per logit, where a formula compares classes in pairs.
    """
    z, labels, soft = rows.logits, rows.labels, rows.soft
    if in_blocks(z, soft, per_logit):
        return _BlockedFormula.apply(z, labels, soft, formula, per_logit)  # type: ignore[no-any-return]
    return formula(z, labels, soft, 1)


def in_blocks(z: Tensor, soft: Tensor | None, per_logit: int = 1) -> bool:
    """Whether to go by blocks: large, on the CPU, and not inside a transform of torch."""
    if torch.compiler.is_compiling() or z.device.type != "cpu":
        return False
    if z.numel() * per_logit < BLOCK_ELEMENTS or z.shape[0] < 2:
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(z):  # pyright: ignore[reportAttributeAccessIssue]
        return False
    return soft is None or not soft.requires_grad


def row_blocks(
    z: Tensor, per_logit: int = 1, classes_first: int = CLASSES_FIRST
) -> list[tuple[slice, int]]:
    """Rows of each block and the axis on which it holds the classes."""
    count, classes = z.shape
    size = max(1, BLOCK_ELEMENTS * torch.get_num_threads() // (classes * per_logit))
    dim = 0 if classes < classes_first else 1
    return [(slice(start, start + size), dim) for start in range(0, count, size)]


def block_of(
    z: Tensor, labels: Tensor | None, soft: Tensor | None, rows: slice, dim: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Logits and targets of some rows, with the classes on axis ``dim``."""

    def turned(x: Tensor) -> Tensor:
        part = x[rows]
        return lay_out(part.t(), part.new_empty(part.shape[::-1])) if dim == 0 else part

    return (
        turned(z),
        None if labels is None else labels[rows],
        None if soft is None else turned(soft),
    )


class _BlockedFormula(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        z: Tensor,
        labels: Tensor | None,
        soft: Tensor | None,
        formula: Formula,
        per_logit: int,
    ) -> Tensor:
        ctx.save_for_backward(z, labels, soft)  # type: ignore[arg-type]
        ctx.formula, ctx.per_logit = formula, per_logit  # type: ignore[attr-defined]
        blocks = row_blocks(z, per_logit)
        return torch.cat(
            [formula(*block_of(z, labels, soft, rows, dim), dim) for rows, dim in blocks]
        )

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        z, labels, soft = ctx.saved_tensors  # type: ignore[attr-defined]
        formula: Formula = ctx.formula  # type: ignore[attr-defined]
        (slope,) = grads
        if torch.is_grad_enabled():  # a gradient of this gradient will be asked for
            values = formula(z, labels, soft, 1)
            (grad,) = torch.autograd.grad(values, z, slope, create_graph=True)
            return grad, None, None, None, None
        out = torch.empty_like(z, memory_format=torch.contiguous_format)
        for rows, dim in row_blocks(z, ctx.per_logit):  # type: ignore[attr-defined]
            block, *targets = block_of(z, labels, soft, rows, dim)
            block = block.detach().requires_grad_()
            with torch.enable_grad():
                values = formula(block, targets[0], targets[1], dim)
            (grad,) = torch.autograd.grad(values, block, slope[rows])
            lay_out(grad if dim == 1 else grad.t(), out[rows])
        return out, None, None, None, None
