"""Weights over classes: rows that are non-negative and sum to 1."""

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.diffusion.class_weights import check_distributions
from diffcal.errors import ConfigError, DataError

__all__ = ["check_weights", "lambda_grid", "pair_weights"]


def lambda_grid(members: int, power: float = 1.0) -> Float[Tensor, " m"]:
    """Weights of the first class of a pair: ``members`` rising steps from 0 to 1, float32.

    Args:
        members: How many.
        power: ``(1 + sign(u) |u|^power) / 2`` for u in equal steps from -1 to 1; 1 gives equal
            steps, more crowds the middle.

    Raises:
        ConfigError: fewer than 2 members.
    """
    if members < 2:
        raise ConfigError(f"a grid from 0 to 1 needs at least 2 members, got {members}")
    if power == 1:
        return torch.linspace(0, 1, members, dtype=torch.float64).float()
    # From integers, so that the middle is exactly 0 and the grid exactly symmetric.
    u = (2 * torch.arange(members, dtype=torch.float64) - (members - 1)) / (members - 1)
    return ((1 + u.sign() * u.abs() ** power) / 2).float()


def pair_weights(
    lambdas: Float[Tensor, " m"], first: int, second: int, num_classes: int
) -> Float[Tensor, "m k"]:
    """Weights over all classes: ``lambda`` on ``first``, ``1 - lambda`` on ``second``; float32.

    Raises:
        ConfigError: equal or unknown classes, or a lambda outside [0, 1].
    """
    if first == second or not (0 <= first < num_classes and 0 <= second < num_classes):
        raise ConfigError(f"({first}, {second}) is no pair of {num_classes} classes")
    if bool(((lambdas < 0) | (lambdas > 1) | lambdas.isnan()).any()):
        raise ConfigError("every lambda must be within [0, 1]")
    weights = torch.zeros(len(lambdas), num_classes)
    weights[:, first], weights[:, second] = lambdas.float(), 1 - lambdas.float()
    return weights


def check_weights(weights: Float[Tensor, "b k"], num_classes: int) -> None:
    """Refuse rows that are no weights over ``num_classes`` classes.

    Raises:
        DataError: another number of columns, or a row with negative or non-finite entries or a sum
            that is not 1; names the row.
    """
    if weights.shape[1] != num_classes:
        raise DataError(f"weights have {weights.shape[1]} columns for {num_classes} classes")
    check_distributions(weights)
