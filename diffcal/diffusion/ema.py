"""Moving averages of weights."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from diffcal.errors import ConfigError

__all__ = ["EmaKind", "ExponentialMovingAverage", "ema_decay"]

EmaKind = Literal["half_life", "power"]


def ema_decay(
    kind: EmaKind, value: float, images_seen: int, batch_size: int, ramp: float | None = 0.05
) -> float:
    """Weight of the old average at the step that brings the images seen to ``images_seen``.

    Args:
        kind: ``half_life``: ``value`` images halve a weight's share; early on the half-life is at
            most ``ramp * images_seen`` (Karras et al. 2022, appendix F.2). ``power``: the
            power-function profile ``(1 - batch/images)^(value + 1)`` (Karras et al. 2024,
            arXiv:2312.02696, equation 1 in discrete form), which needs no ramp.
        value: Half-life in images, or the exponent gamma.
        images_seen: Training images up to and including this step.
        batch_size: Images of this step, over all processes.
        ramp: See ``half_life``; None switches the ramp off.
    """
    if kind == "power":
        if value <= -1:
            raise ConfigError(f"ema exponent must be above -1, got {value}")
        return max(0.0, 1.0 - batch_size / images_seen) ** (value + 1)
    half_life = value if ramp is None else min(value, max(ramp * images_seen, 1e-8))
    return 0.5 ** (batch_size / half_life)


class ExponentialMovingAverage:
    """Float32 average of a module's parameters and a copy of its buffers.

    Args:
        module: The module to follow; averages start at its present weights.
    """

    def __init__(self, module: nn.Module) -> None:
        self.averages = {
            name: tensor.detach().clone() for name, tensor in module.state_dict().items()
        }

    @torch.no_grad()
    def update(self, module: nn.Module, decay: float) -> None:
        """Move the average towards the module: ``average = decay * average + (1 - decay) * new``."""
        averages: list[Tensor] = []
        news: list[Tensor] = []
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                averages.append(self.averages[name])
                news.append(tensor.detach().to(self.averages[name]))
            else:
                self.averages[name].copy_(tensor)
        torch._foreach_lerp_(averages, news, 1.0 - decay)  # type: ignore[attr-defined]

    def copy_to(self, module: nn.Module) -> None:
        """Load the averages into ``module``."""
        module.load_state_dict(self.averages)

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Replace the averages by named tensors (resuming)."""
        for name, tensor in tensors:
            self.averages[name].copy_(tensor)
