"""A denoiser's output at (sample, timestep) rows, as the objective of per-sample gradients."""

from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.attribution.functionals import (
    WITH_SIGNS,
    Functional,
    Outputs,
    resolve_functional,
)
from diffcal.core.tensors import append_dims
from diffcal.diffusion.denoisers import Denoiser
from diffcal.errors import ConfigError

__all__ = ["DenoiserObjective", "PredictionKind", "Predictor"]

PredictionKind = Literal["network", "epsilon", "sample", "v"]


@runtime_checkable
class Predictor(Protocol):
    """A denoiser that tells the raw output of its network and what that was trained to equal."""

    def predict(self, x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
        """Raw output of the network."""
        ...

    def target(self, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Its target for ``clean + sigma * noise``."""
        ...


class DenoiserObjective:
    """Functional of a denoiser's output for each row, and the row's mean squared error.

    Calls take what :meth:`inputs` returns and give (functional [b], error [b]), both float32.

    Args:
        denoiser: Its ``module`` is what gradients are taken of.
        functional: A name of ``FUNCTIONALS``, or a callable on :class:`Outputs`.
        prediction: In which form the output is seen. ``network``: the raw output, whatever the
            network was trained to predict (the method as published). ``epsilon``, ``sample`` and
            ``v`` convert the denoised sample; they differ from one another by factors of the noise
            level and parts that do not depend on the parameters.

    Raises:
        ConfigError: unknown names, or ``network`` for a denoiser that is no :class:`Predictor`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        functional: str | Functional = "mean",
        prediction: PredictionKind = "network",
    ) -> None:
        if prediction not in ("network", "epsilon", "sample", "v"):
            raise ConfigError(
                f"unknown prediction '{prediction}': use network, epsilon, sample or v"
            )
        if prediction == "network" and not isinstance(denoiser, Predictor):
            raise ConfigError(
                f"{type(denoiser).__name__} does not tell its network's raw output (it has no "
                "predict and target): choose prediction epsilon, sample or v"
            )
        self.denoiser, self.prediction = denoiser, prediction
        self.functional = resolve_functional(functional)
        self.needs_signs = self.functional in WITH_SIGNS
        """Whether :meth:`inputs` must be given signs."""

    @property
    def is_half(self) -> bool:
        """Whether the network computes in half precision."""
        return getattr(self.denoiser, "dtype", torch.float32) != torch.float32

    def inputs(
        self,
        clean: Float[Tensor, "b c h w"],
        noise: Float[Tensor, "b c h w"],
        sigma: Float[Tensor, " b"],
        weight: Float[Tensor, " b"],
        condition: Tensor | None = None,
        signs: Float[Tensor, "b c h w"] | None = None,
    ) -> tuple[Tensor, ...]:
        """(x, sigma, target, weight[, signs][, condition]) of rows, made without gradients.

        Args:
            clean: Clean samples ``x_0``.
            noise: Standard normal draws.
            sigma: Noise levels in the units of ``clean``.
            weight: Weight of each row in ``weighted-mse``.
            condition: Rows of the denoiser's own conditions; None if unconditional.
            signs: Signs of each row, where the functional needs them.

        Raises:
            ConfigError: signs that the functional does not need, or none where it does.
        """
        if (signs is not None) != self.needs_signs:
            raise ConfigError("signs go with the functionals random-signs and all-outputs only")
        with torch.no_grad():
            level = append_dims(sigma, clean).to(clean.dtype)
            rows = (
                clean + level * noise,
                sigma,
                self._target(clean, noise, sigma, level),
                weight.to(clean.dtype),
            )
        further = (None if signs is None else signs.to(clean.dtype), condition)
        return (*rows, *(part for part in further if part is not None))

    def _target(self, clean: Tensor, noise: Tensor, sigma: Tensor, level: Tensor) -> Tensor:
        if self.prediction == "network":
            assert isinstance(self.denoiser, Predictor)
            return self.denoiser.target(clean, noise, sigma)
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "v":
            return (noise - level * clean) / (1 + level.square()).sqrt()
        return clean

    def __call__(self, *rows: Tensor) -> tuple[Tensor, Tensor]:
        """(functional [b], mean squared error [b]) of the rows."""
        x, sigma, target, weight, *further = rows
        signs = further.pop(0) if self.needs_signs else None
        prediction = self._predict(x, sigma, further[0] if further else None)
        values = self.functional(Outputs(prediction, target, weight, signs))
        if values.shape != x.shape[:1]:
            raise ConfigError(
                f"the functional must give one number for each of the {len(x)} rows, got shape "
                f"{tuple(values.shape)}"
            )
        error = (prediction - target).square().flatten(1).mean(dim=1)
        return values, error.detach()

    def _predict(self, x: Tensor, sigma: Tensor, condition: Tensor | None) -> Tensor:
        if self.prediction == "network":
            assert isinstance(self.denoiser, Predictor)
            return self.denoiser.predict(x, sigma, condition)
        denoised = self.denoiser(x, sigma, condition)
        if self.prediction == "sample":
            return denoised
        level = append_dims(sigma, x).to(x.dtype)
        epsilon = (x - denoised) / level
        if self.prediction == "epsilon":
            return epsilon
        return (epsilon - level * denoised) / (1 + level.square()).sqrt()
