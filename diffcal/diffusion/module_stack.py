"""Several networks of one architecture run as one: the same operations over a leading member axis."""

import copy
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffcal.errors import ConfigError

__all__ = ["ModuleStack"]

CLIP_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_'s, so that clipping gives the same numbers


class ModuleStack(nn.Module):
    """``m`` networks whose parameters lie stacked, ``[m, ...]``, and go through one forward pass.

    Every member computes what it would alone, up to rounding. A stack is an ordinary module: any
    elementwise optimiser (SGD, Adam, AdamW) and any moving average of its parameters does to each
    member what it would do to that member alone. Only gradient clipping looks at whole networks; use
    :meth:`clip_gradient_norms_`.

    What it saves is the overhead of small operations. On a CPU it halves the time of small fully
    connected networks and does not help convolutions, which become grouped ones
    (``benchmarks/train_together.py``).

    Args:
        modules: Networks of one architecture; their weights are copied, they are not kept.

    Raises:
        ConfigError: no networks, different architectures, or batch statistics.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        if not modules:
            raise ConfigError("a stack needs at least one network")
        layouts = [
            {name: (tuple(t.shape), t.dtype) for name, t in module.state_dict().items()}
            for module in modules
        ]
        if any(layout != layouts[0] for layout in layouts):
            raise ConfigError("networks of a stack must have the same parameters and buffers")
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in modules[0].modules()):
            raise ConfigError(
                "batch normalisation updates its statistics in place and cannot be stacked"
            )
        self.members = len(modules)
        parameters, buffers = torch.func.stack_module_state(list(modules))
        self._parameter_names, self._buffer_names = tuple(parameters), tuple(buffers)
        for index, name in enumerate(parameters):
            stacked = nn.Parameter(parameters[name].detach())
            self.register_parameter(f"p{index}", stacked)
        for index, name in enumerate(buffers):
            self.register_buffer(f"b{index}", buffers[name].detach())
        # Kept out of the modules: it holds no weights and only says what is computed.
        self._skeleton = [copy.deepcopy(modules[0]).to("meta")]

    def train(self, mode: bool = True) -> "ModuleStack":
        """Training or evaluation mode of all members."""
        self._skeleton[0].train(mode)
        return super().train(mode)

    def stacked(self) -> dict[str, Tensor]:
        """Parameters and buffers by the names of a member, with the leading member axis."""
        tensors = {name: getattr(self, f"p{i}") for i, name in enumerate(self._parameter_names)}
        return tensors | {name: getattr(self, f"b{i}") for i, name in enumerate(self._buffer_names)}

    def forward(
        self, *inputs: Float[Tensor, "m ..."], **named: Float[Tensor, "m ..."] | None
    ) -> Float[Tensor, "m ..."]:
        """Outputs of every member on its own inputs; named ones may be None for all members.

        Raises:
            ConfigError: inputs for another number of members.
        """
        given = {name: tensor for name, tensor in named.items() if tensor is not None}
        for tensor in (*inputs, *given.values()):
            if len(tensor) != self.members:
                raise ConfigError(f"inputs for {len(tensor)} members in a stack of {self.members}")

        def one(
            tensors: dict[str, Tensor], row: tuple[Tensor, ...], words: dict[str, Tensor]
        ) -> Tensor:
            return torch.func.functional_call(self._skeleton[0], tensors, row, words)

        # The fused attention kernels have no batching rule: torch would loop over members.
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.vmap(one, randomness="error")(self.stacked(), inputs, given)

    @torch.no_grad()
    def clip_gradient_norms_(self, max_norm: float) -> Float[Tensor, " m"]:
        """Scale each member's gradient down to L2 norm ``max_norm``; the norms before."""
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        parts = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients])
        norms = torch.linalg.vector_norm(parts, dim=0)
        factor = (max_norm / (norms + CLIP_EPSILON)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor.view(-1, *(1 for _ in gradient.shape[1:])))
        return norms

    def member_states(self) -> Iterator[dict[str, Tensor]]:
        """The ``state_dict`` of each member, copied."""
        tensors = self.stacked()
        for index in range(self.members):
            yield {name: tensor[index].detach().clone() for name, tensor in tensors.items()}
