"""Per-sample gradients through ``torch.func``: one vectorised backward pass with all gradients."""

from collections.abc import Mapping
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffcal.attribution.gradients import GradientBatch, Objective, PerSampleGradients, RowSums
from diffcal.errors import ConfigError

__all__ = ["VmapGradients", "vmap_gradients"]

_NAMED = 6  # parameters that a message lists


@final
class VmapGradients(PerSampleGradients):
    """``vmap(grad)`` over rows, as TRAK and D-TRAK do; holds the whole gradients of a batch."""

    def _compute(self, inputs: tuple[Tensor, ...], entries: int) -> GradientBatch:
        gradients, values, extras = vmap_gradients(
            self.module, self.objective, self.parameters, inputs, entries
        )
        sums = RowSums(len(inputs[0]) // entries, self)
        for name in self.parameters:
            sums.add(name, gradients.pop(name))
        return sums.finish(values, extras)


def vmap_gradients(
    module: nn.Module,
    objective: Objective,
    parameters: Mapping[str, nn.Parameter],
    inputs: tuple[Tensor, ...],
    entries: int = 1,
) -> tuple[dict[str, Float[Tensor, "b *shape"]], Tensor, Tensor]:
    """(gradients by name of every row, values, extras of every entry); the other parameters are
    constants.

    Raises:
        ConfigError: the network does something that ``torch.func`` cannot vectorise.
    """
    runner = _Runner(module, objective)
    leaves = {name: parameter.detach() for name, parameter in parameters.items()}

    def one_row(chosen: dict[str, Tensor], *row: Tensor) -> tuple[Tensor, Any]:
        named = {f"module.{name}": tensor for name, tensor in chosen.items()}
        values, extras = torch.func.functional_call(runner, named, row)
        return values.sum(), (values, extras)

    before = [(p, p.requires_grad) for p in module.parameters()]
    try:
        for p, _ in before:
            p.requires_grad_(False)
        # The fused attention kernels have no batching rule: torch would loop over rows.
        with sdpa_kernel(SDPBackend.MATH):
            gradients, (values, extras) = torch.func.vmap(
                torch.func.grad(one_row, has_aux=True), in_dims=(None, *(0 for _ in inputs))
            )(leaves, *(tensor.unflatten(0, (-1, entries)) for tensor in inputs))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # what torch raises for operations without a batching rule
        named = ", ".join(list(parameters)[:_NAMED]) + (", ..." if len(parameters) > _NAMED else "")
        raise ConfigError(
            f"torch.func gives no per-sample gradients of {named} ({str(error).splitlines()[0]}): leave "
            "them out (features.params) or take samples one by one (gradients=loop)"
        ) from error
    finally:
        for p, required in before:
            p.requires_grad_(required)
    return gradients, values.detach().flatten(0, 1), extras.detach().flatten(0, 1)


class _Runner(nn.Module):
    """Lets ``functional_call`` replace the module's parameters while the objective runs it."""

    def __init__(self, module: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.training = module.training  # not train(): the module's own modes stay
        self.module = module
        self.objective = objective

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return self.objective(*inputs)
