"""Per-sample gradients the obvious way: one backward pass for each row."""

from typing import final

import torch
from torch import Tensor

from diffcal.attribution.gradients import (
    GradientBatch,
    PerSampleGradients,
    RowSums,
    requiring_grad,
)

__all__ = ["LoopGradients"]


@final
class LoopGradients(PerSampleGradients):
    """The oracle: each row by itself through ``torch.autograd.grad``. Slow, and hard to get wrong."""

    def _compute(self, inputs: tuple[Tensor, ...], entries: int) -> GradientBatch:
        names, leaves = list(self.parameters), list(self.parameters.values())
        gradients, values, extras = [], [], []
        with requiring_grad(self.module, self.parameters):
            for start in range(0, len(inputs[0]), entries):
                value, extra = self.objective(*(t[start : start + entries] for t in inputs))
                gradients.append(
                    torch.autograd.grad(value.sum(), leaves, materialize_grads=True)
                    if value.requires_grad
                    else [torch.zeros_like(leaf) for leaf in leaves]
                )
                values.append(value.detach())
                extras.append(extra.detach())
        sums = RowSums(len(gradients), self)
        for index, name in enumerate(names):
            sums.add(name, torch.stack([gradient[index] for gradient in gradients]))
        return sums.finish(torch.cat(values), torch.cat(extras))
