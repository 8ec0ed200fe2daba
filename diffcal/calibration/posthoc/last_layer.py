"""Hooks on a model's last linear layer: read its input, or clip it, without changing the model."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diffcal.errors import ConfigError, DataError

__all__ = ["attach_clipping", "captured_features", "linear_head", "named_linear"]


def named_linear(model: nn.Module, name: str) -> nn.Linear:
    """The linear layer of ``model`` at a dotted ``name``.

    Raises:
        ConfigError: no such module, or it is not linear; the linear layers are listed.
    """
    layers = {key: m for key, m in model.named_modules() if isinstance(m, nn.Linear)}
    if name not in layers:
        known = ", ".join(repr(key) for key in list(layers)[-8:]) or "none"
        raise ConfigError(f"'{name}' is not a linear layer of the model; it has {known}")
    return layers[name]


def linear_head(model: nn.Module, name: str) -> tuple[Float[Tensor, "k d"], Float[Tensor, " k"]]:
    """Weight and bias (zeros if it has none) of the layer, float64, detached, on the CPU."""
    layer = named_linear(model, name)
    weight = layer.weight.detach().double().cpu()
    bias = layer.bias
    return weight, weight.new_zeros(len(weight)) if bias is None else bias.detach().double().cpu()


@contextmanager
def captured_features(model: nn.Module, name: str) -> Iterator[list[Tensor]]:
    """A list that receives the layer's input ``[b, d]`` (detached) at every forward pass inside.

    .. code-block:: python

        with captured_features(model, "fc") as features:
            logits = torch.cat([model(x) for x in batches])
        features = torch.cat(features)
    """
    seen: list[Tensor] = []
    handle = named_linear(model, name).register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].detach())
    )
    try:
        yield seen
    finally:
        handle.remove()


def attach_clipping(model: nn.Module, name: str, threshold: float) -> RemovableHandle:
    """Clip the layer's input to ±``threshold`` at every forward pass, until ``handle.remove()``.

    The handle is also a context manager. Gradients pass where nothing is clipped.

    Raises:
        ConfigError: unknown layer, or a threshold that is not positive.

    Source: Tao, Dong and Xu 2025 (arXiv:2410.19796), section 3.
    """
    if not threshold > 0:
        raise ConfigError(f"threshold must be positive, got {threshold}")

    def clip(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not isinstance(inputs[0], torch.Tensor):
            raise DataError(f"layer '{name}' got no tensor to clip")
        return (inputs[0].clamp(-threshold, threshold), *inputs[1:])

    return named_linear(model, name).register_forward_pre_hook(clip)
