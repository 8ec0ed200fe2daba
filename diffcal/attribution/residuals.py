"""One weight per training example from its table of denoising errors."""

from collections.abc import Callable
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from diffcal.core.tensors import require_finite
from diffcal.errors import ConfigError, DataError

__all__ = ["RESIDUALS", "ResidualKind", "residual_weights"]

ResidualKind = Literal["none", "rms", "rms_total", "released", "sqrt_last"]
EPSILON = 1e-8
"""Added to the norm of a row, as in the released code."""


def _unit(rows: Tensor) -> Tensor:
    return rows / (rows.norm(dim=1, keepdim=True) + EPSILON)


RESIDUALS: dict[str, Callable[[Tensor], Tensor]] = {
    "rms": lambda mse: mse.sqrt().mean(dim=1),
    "rms_total": lambda mse: mse.mean(dim=1).sqrt(),
    "released": lambda mse: _unit(mse.sqrt()).mean(dim=1),
    "sqrt_last": lambda mse: _unit(mse).mean(dim=1).sqrt(),
}


def residual_weights(mse: Float[Tensor, "n t"], kind: str = "none") -> Float[Tensor, " n"] | None:
    """Factor of each training example's score, or None for ``none``.

    ``rms`` is the mean over timesteps of the root mean squared error, ``rms_total`` the root of the
    mean. ``released`` repeats the published code, which divides each row by its norm first: what is
    left is how flat the error is over timesteps, and its size is lost. ``sqrt_last`` takes the root
    after that.

    Args:
        mse: Mean squared error of the noise prediction, examples by timesteps.

    Raises:
        ConfigError: unknown kind.
        DataError: negative errors or no timestep.
        NumericalError: NaN or infinite errors.
    """
    if kind == "none":
        return None
    if kind not in RESIDUALS:
        raise ConfigError(f"unknown residual '{kind}': use none, {', '.join(RESIDUALS)}")
    if mse.shape[1] == 0 or bool((mse < 0).any()):
        raise DataError("the error table must hold a non-negative value for at least one timestep")
    return RESIDUALS[kind](require_finite(mse, "error table"))
