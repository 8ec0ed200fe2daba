"""Exact leave-one-out of models that are linear in their parameters: what DAS approximates."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffcal.errors import ConfigError, DataError

__all__ = ["RidgeLeaveOneOut", "exact_das", "ridge_leave_one_out"]


@dataclass(frozen=True)
class RidgeLeaveOneOut:
    """A ridge fit and what leaving out each example does to it."""

    parameters: Float64[Tensor, " p"]
    """Minimiser on all examples."""
    residual: Float64[Tensor, "n r"]
    """Prediction minus target of every output row of every example."""
    leverage: Float64[Tensor, "n r r"]
    """``H_i = J_i (K + λI)⁻¹ J_iᵀ``."""
    change: Float64[Tensor, "n p"]
    """Parameters on all examples minus parameters without example i."""


def ridge_leave_one_out(
    jacobian: Float[Tensor, "n r p"], target: Float[Tensor, "_ _"], damping: float
) -> RidgeLeaveOneOut:
    """Exact leave-one-out of ``min Σ ‖J_i θ - y_i‖² + λ‖θ‖²`` without refitting, float64.

    One example may have several output rows (outputs, timesteps, noises), which leave together.
    ``θ* - θ₋ᵢ = -(K + λI)⁻¹ J_iᵀ (I - H_i)⁻¹ r_i`` by the Sherman–Morrison–Woodbury identity.

    Raises:
        ConfigError: damping not positive.
        DataError: shapes do not match.
    """
    if not damping > 0:
        raise ConfigError(f"damping must be positive, got {damping}")
    if jacobian.shape[:2] != target.shape:
        raise DataError(f"Jacobian {list(jacobian.shape)} for targets {list(target.shape)}")
    rows, y = jacobian.double(), target.double()
    flat = rows.flatten(0, 1)
    eye = torch.eye(flat.shape[1], dtype=flat.dtype, device=flat.device)
    inverse = torch.linalg.inv(flat.mT @ flat + damping * eye)
    parameters = inverse @ (flat.mT @ y.flatten())
    residual = rows @ parameters - y
    spread = rows @ inverse
    leverage = spread @ rows.mT
    small = torch.eye(leverage.shape[1], dtype=flat.dtype, device=flat.device)
    corrected = torch.linalg.solve(small - leverage, residual)
    change = -(spread * corrected[:, :, None]).sum(dim=1)
    return RidgeLeaveOneOut(parameters, residual, leverage, change)


def exact_das(
    change: Float[Tensor, "n p"], query_jacobian: Float[Tensor, "q t d p"]
) -> Float64[Tensor, "q n"]:
    """Mean over timesteps of the squared distance between the predictions with and without i.

    Source: DAS (arXiv:2410.18639), the definition of the score; exact for linear predictors.
    """
    delta = torch.einsum("qtdp,np->qntd", query_jacobian.double(), change.double())
    return delta.square().sum(dim=3).mean(dim=2)
