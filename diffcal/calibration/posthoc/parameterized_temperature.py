"""Parameterised temperature scaling: a small network chooses each row's temperature."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.calibration.metrics.temperature import fit_temperature
from diffcal.calibration.posthoc.calibrator import Calibrator, FitData
from diffcal.core.rng import item_generator
from diffcal.errors import ConfigError

__all__ = [
    "ParameterizedTemperatureScaling",
    "initial_parameters",
    "network_output",
    "row_temperatures",
    "train_parameters",
    "unpack_layers",
]

CLIP = 100.0
"""Logits beyond this are clipped before they enter the network (as released)."""
TEMPERATURES = (1e-12, 1e12)


@dataclass(kw_only=True, eq=False)
class ParameterizedTemperatureScaling(Calibrator):
    """``softmax(z / T(z))`` where T is a small network of the sorted largest logits.

    ``T = |network(top-k logits, descending)|``, clipped to [1e-12, 1e12]. Trained by Adam on the
    squared error between probabilities and labels (or their cross-entropy, ``criterion="nll"``).
    Fewer classes than ``top_k`` take all of them.

    Defaults differ from the published 100,000 steps at learning rate 5e-5: the last bias starts at
    the best single temperature and the other last weights small, so that training starts from
    temperature scaling; 1,000 steps at 2e-3 with a cosine decay then suffice.

    Source: Tomani, Cremers and Buettner 2022 (arXiv:2102.12182), section 3.
    """

    top_k: int = 10
    hidden: tuple[int, ...] = (5, 5)
    criterion: Literal["mse", "nll"] = "mse"
    steps: int = 1000
    batch_size: int = 1000
    learning_rate: float = 2e-3
    seed: int = 0

    STATE: ClassVar = ("parameters_",)
    gives_logits: ClassVar = True

    def _check_settings(self) -> None:
        for name in ("top_k", "steps", "batch_size", "learning_rate"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if any(width < 1 for width in self.hidden):
            raise ConfigError(f"hidden widths must be at least 1, got {self.hidden}")

    @property
    def preserves_argmax(self) -> bool:
        """True: a row is divided by one positive number."""
        return True

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Weights ``[out, in]`` and biases of the fitted network."""
        self._require_fitted()
        return unpack_layers(self.parameters_, self._sizes(self._classes))

    def _sizes(self, classes: int) -> list[int]:
        return [min(self.top_k, classes), *self.hidden, 1]

    def _fit(self, data: FitData) -> None:
        z, q = data.logits.cpu(), data.targets.cpu()
        sizes = self._sizes(data.classes)
        start = fit_temperature(data.predictions, bounds=(0.05, 20.0)).temperature
        generator = item_generator(self.seed, "parameterized-temperature", 0)
        initial = initial_parameters(sizes, start, generator)

        def loss(parameters: Tensor, rows: Tensor) -> Tensor:
            t = row_temperatures(z[rows], unpack_layers(parameters, sizes))
            log_p = (z[rows] / t[:, None]).log_softmax(dim=1)
            if self.criterion == "mse":
                return (log_p.exp() - q[rows]).square().sum(dim=1).mean()
            return -(q[rows] * log_p).sum(dim=1).mean()

        self.parameters_ = train_parameters(
            initial,
            loss,
            len(z),
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            generator=generator,
        )

    def _logits(
        self, z: Float[Tensor, "b k"], features: Float[Tensor, "b d"] | None
    ) -> Float[Tensor, "b k"]:
        layers = unpack_layers(self.parameters_.to(z), self._sizes(z.shape[1]))
        return z / row_temperatures(z, layers)[:, None]


def row_temperatures(
    logits: Float[Tensor, "b k"], layers: list[tuple[Tensor, Tensor]]
) -> Float[Tensor, " b"]:
    """Temperature of each row from the network; ReLU after all layers but the last."""
    width = layers[0][0].shape[1]
    x = logits.clamp(-CLIP, CLIP).topk(width, dim=1).values
    return network_output(x, layers).abs().clamp(*TEMPERATURES)


def network_output(
    x: Float[Tensor, "b d"], layers: list[tuple[Tensor, Tensor]]
) -> Float[Tensor, " b"]:
    """The one output of a network with ReLU after all layers but the last."""
    for weight, bias in layers[:-1]:
        x = (x @ weight.T + bias).relu()
    weight, bias = layers[-1]
    return (x @ weight.T + bias)[:, 0]


def train_parameters(
    initial: Float[Tensor, " p"],
    loss: Callable[[Tensor, Tensor], Tensor],
    count: int,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
) -> Float[Tensor, " p"]:
    """Parameters after Adam with a cosine decay on random batches; all rows if they fit into one.

    Args:
        initial: Where to start.
        loss: Of parameters on some rows.
        count: Number of rows.
        steps: Of Adam.
        batch_size: Rows of a step.
        learning_rate: At the start.
        generator: Draws the batches.
    """
    parameters = initial.clone().requires_grad_()
    optimiser = torch.optim.Adam([parameters], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < min(batch_size, count):
            order = torch.randperm(count, generator=generator)
        rows, order = order[:batch_size], order[batch_size:]
        value = loss(parameters, rows)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
        schedule.step()
    return parameters.detach()


def unpack_layers(flat: Float[Tensor, " p"], sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Weights ``[out, in]`` and biases of layers of these widths from one vector."""
    layers = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        weight, bias, flat = flat.split(
            [fan_in * fan_out, fan_out, len(flat) - fan_in * fan_out - fan_out]
        )
        layers.append((weight.reshape(fan_out, fan_in), bias))
    return layers


def initial_parameters(
    sizes: list[int], output: float, generator: torch.Generator
) -> Float[Tensor, " p"]:
    """Random layers whose last weights are small and whose last bias is ``output``, float64."""
    pieces = []
    for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        last = i == len(sizes) - 2
        bound = (0.01 if last else 1.0) / fan_in**0.5
        weight = (torch.rand(fan_out * fan_in, generator=generator) * 2 - 1) * bound
        bias = torch.full((fan_out,), output if last else 0.1)
        pieces += [weight.double(), bias.double()]
    return torch.cat(pieces)
