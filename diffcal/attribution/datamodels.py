"""Attribution from retrained subsets alone: empirical influence and linear datamodels."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from diffcal.attribution.lds import require_table
from diffcal.errors import ConfigError, DataError

__all__ = ["datamodel_scores", "empirical_influence"]


def empirical_influence(
    masks: Bool[Tensor, "s n"], losses: Float[Tensor, "_ q"]
) -> Float[Tensor, "q n"]:
    """Mean loss without training example i minus mean loss with it, float64.

    Larger means that the example lowers the query's loss, as for every other score here; D-TRAK
    tabulates the negative and leaves out the minus of the LDS in turn.

    Raises:
        DataError: an example is in every subset or in none; tables do not match.

    Source: Feldman and Zhang 2020 (arXiv:2008.03703), estimator of section 2.
    """
    losses = require_table(masks, losses)
    inside = masks.to(losses)
    count = inside.sum(dim=0)
    constant = (count == 0) | (count == len(masks))
    if bool(constant.any()):
        raise DataError(
            f"training example {int(constant.nonzero()[0, 0])} is in every subset or in none, so its "
            "influence cannot be measured: train more subsets"
        )
    with_it = losses.mT @ inside / count
    without = losses.mT @ (1 - inside) / (len(masks) - count)
    return without - with_it


def datamodel_scores(
    masks: Bool[Tensor, "s n"],
    losses: Float[Tensor, "_ q"],
    *,
    alphas: Sequence[float] = (0.1, 1.0, 10.0),
    folds: int = 5,
) -> Float[Tensor, "q n"]:
    """Minus the coefficients of a ridge regression from subset masks to each query's loss, float64.

    The strength is chosen for each query by cross-validated R² over ``folds`` runs of consecutive
    subsets, as scikit-learn's ``RidgeCV(cv=folds)`` does; all queries share the factorisations.

    Raises:
        ConfigError: no strength, or a strength that is not positive.
        DataError: fewer than two subsets in a fold's rest, or tables that do not match.

    Source: Ilyas et al. 2022 (arXiv:2202.00622), with the ridge of D-TRAK in place of the lasso.
    """
    losses = require_table(masks, losses)
    count = len(masks)
    if not alphas or min(alphas) <= 0:
        raise ConfigError(f"ridge strengths must be positive, got {list(alphas)}")
    if not 2 <= folds <= count:
        raise DataError(f"{count} subsets cannot be split into {folds} folds")
    design = masks.to(losses)
    quality = losses.new_zeros(len(alphas), losses.shape[1])
    for held in torch.arange(count).tensor_split(folds):
        used = torch.ones(count, dtype=torch.bool)
        used[held] = False
        predictions = _ridge(design[used], losses[used], alphas, design[held])
        target = losses[held]
        total = (target - target.mean(dim=0)).square().sum(dim=0)
        left = (predictions - target).square().sum(dim=1)
        # R² as scikit-learn has it: a constant target counts 1 if met exactly, else 0.
        quality += torch.where(total > 0, 1 - left / total, (left == 0).to(left))
    best = quality.argmax(dim=0)
    unit = torch.eye(design.shape[1], dtype=design.dtype)
    zero = torch.zeros(1, design.shape[1], dtype=design.dtype)
    coefficients = losses.new_empty(losses.shape[1], design.shape[1])
    for index, alpha in enumerate(alphas):
        chosen = best == index
        if bool(chosen.any()):
            fitted = _ridge(design, losses[:, chosen], [alpha], torch.cat([zero, unit]))[0]
            coefficients[chosen] = (fitted[1:] - fitted[:1]).mT
    return -coefficients


def _ridge(x: Tensor, y: Tensor, alphas: Sequence[float], at: Tensor) -> Float[Tensor, "a m q"]:
    """Predictions at ``at`` of ridge regressions with intercept, in dual form (few rows)."""
    centre, level = x.mean(dim=0), y.mean(dim=0)
    rows = x - centre
    values, vectors = torch.linalg.eigh(rows @ rows.mT)
    cross = (at - centre) @ rows.mT @ vectors
    rotated = vectors.mT @ (y - level)
    shrink = torch.stack([1 / (values.clamp(min=0) + alpha) for alpha in alphas])
    return cross @ (shrink[:, :, None] * rotated) + level
