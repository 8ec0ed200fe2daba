"""Scalar functionals of a network's output whose gradients are the attribution features."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from diffcal.core.tensors import append_dims
from diffcal.errors import ConfigError

__all__ = [
    "ALL_OUTPUTS",
    "CUSTOM",
    "FUNCTIONALS",
    "WITH_SIGNS",
    "Functional",
    "NamedFunctional",
    "Outputs",
    "resolve_functional",
]


@dataclass(frozen=True)
class Outputs:
    """What a functional sees of a batch of (sample, timestep) rows."""

    prediction: Float[Tensor, "b *d"]
    """Output ``o`` of the network."""
    target: Float[Tensor, "b *d"]
    """What ``o`` was trained to equal (the noise ``e`` for an epsilon prediction)."""
    weight: Float[Tensor, " b"]
    """``beta_t / (2 alpha_t (1 - abar_t))`` of each row; NaN where there is no table of timesteps."""
    signs: Float[Tensor, "b *d"] | None = None
    """Random signs of each row's timestep, for functionals of ``WITH_SIGNS``; None for all others."""


Functional = Callable[[Outputs], Float[Tensor, " b"]]
"""One number for each row, independent of the other rows and differentiable in ``prediction``."""

ALL_OUTPUTS = "all-outputs"
"""The functional that is none: all outputs at once."""

CUSTOM = "custom"
"""``features.functional`` of a callable, followed by ``:`` and its name where it has one."""


@dataclass(frozen=True)
class NamedFunctional:
    """A functional or loss of one's own, under a name that stands for it wherever features are kept.

        huber = NamedFunctional("huber/1", lambda outputs: ...)

    Nothing but the name tells two callables apart: change it (a version will do) whenever the callable
    changes.

    Raises:
        ConfigError: an empty name.
    """

    name: str
    function: Functional

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ConfigError("a functional of your own needs a name, as 'huber/1'")

    def __call__(self, outputs: Outputs) -> Float[Tensor, " b"]:
        """One number for each row."""
        return self.function(outputs)

    @property
    def setting(self) -> str:
        """``features.functional`` for it."""
        return f"{CUSTOM}:{self.name}"


def _rows(values: Tensor) -> Tensor:
    return values.flatten(1)


def loss(outputs: Outputs) -> Float[Tensor, " b"]:
    """Mean of ``(o - e)^2`` (TRAK)."""
    return _rows((outputs.prediction - outputs.target).square()).mean(dim=1)


def mean_squared(outputs: Outputs) -> Float[Tensor, " b"]:
    """Mean of ``o^2`` (D-TRAK)."""
    return _rows(outputs.prediction.square()).mean(dim=1)


def mean(outputs: Outputs) -> Float[Tensor, " b"]:
    """Mean of ``o`` (DAS)."""
    return _rows(outputs.prediction).mean(dim=1)


def random_signs(outputs: Outputs) -> Float[Tensor, " b"]:
    """Mean of ``s o``, signs ``s`` drawn once for each timestep and the same for all samples.

    ``mean`` looks at one direction of the output, its average, and does not see what leaves that as it
    is; in random signs no direction is preferred. Its kernel is an unbiased estimate of the trace of
    the kernel of all outputs.
    """
    if outputs.signs is None:
        raise ConfigError("the functional random-signs needs the signs of each row")
    return _rows(outputs.signs * outputs.prediction).mean(dim=1)


def all_outputs(outputs: Outputs) -> Float[Tensor, " b"]:
    """Sum of ``s o`` with random signs ``s``: stands for every output at once.

    Nobody differentiates it by parameters. The rows are those whose kernel is the sum of the kernels of
    all outputs, with respect to the output layer, which
    :class:`~diffcal.attribution.gradient_outputs.OutputLayerRows` takes from a forward pass; the signs
    tell it whether the outputs are that layer's own.
    """
    if outputs.signs is None:
        raise ConfigError(f"the functional {ALL_OUTPUTS} needs the signs of each row")
    return _rows(outputs.signs * outputs.prediction).sum(dim=1)


def l1_norm(outputs: Outputs) -> Float[Tensor, " b"]:
    """Sum of ``|o|``, not divided by its size."""
    return _rows(outputs.prediction.abs()).sum(dim=1)


def l2_norm(outputs: Outputs) -> Float[Tensor, " b"]:
    """``sqrt(sum o^2)``, not divided by its size."""
    return _rows(outputs.prediction).norm(dim=1)


def linf_norm(outputs: Outputs) -> Float[Tensor, " b"]:
    """Largest ``|o|``."""
    return _rows(outputs.prediction.abs()).amax(dim=1)


def weighted_mse(outputs: Outputs) -> Float[Tensor, " b"]:
    """``w_t`` times the mean of ``(o - e)^2``: the weight of the evidence bound."""
    error = append_dims(outputs.weight, outputs.prediction)
    return _rows(error * (outputs.prediction - outputs.target).square()).mean(dim=1)


FUNCTIONALS: dict[str, Functional] = {
    "loss": loss,
    "mean-squared-l2-norm": mean_squared,
    "mean": mean,
    "random-signs": random_signs,
    ALL_OUTPUTS: all_outputs,
    "l1-norm": l1_norm,
    "l2-norm": l2_norm,
    "linf-norm": linf_norm,
    "weighted-mse": weighted_mse,
}
"""By the names of the D-TRAK and DAS releases (arXiv:2311.00500, arXiv:2410.18639), and our own."""

WITH_SIGNS = frozenset({random_signs, all_outputs})
"""Those that need signs."""


def resolve_functional(functional: str | Functional) -> Functional:
    """The functional of a name, or a callable as it is.

    Raises:
        ConfigError: unknown name.
    """
    if callable(functional):
        return functional
    if functional not in FUNCTIONALS:
        raise ConfigError(f"unknown functional '{functional}': use {', '.join(FUNCTIONALS)}")
    return FUNCTIONALS[functional]
