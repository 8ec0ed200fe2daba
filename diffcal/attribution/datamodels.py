"""Attribution from retrained subsets alone: empirical influence and linear datamodels.

Both are linear in the losses and so are products of features: a training example is what its presence
in the subsets says of it, a query what the subsets' models say of it, each one number for each subset.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from diffcal.attribution.lds import require_table
from diffcal.errors import ConfigError, DataError

__all__ = [
    "SubsetMethod",
    "datamodel_scores",
    "empirical_influence",
    "query_rows",
    "subset_scores",
    "training_rows",
]

SubsetMethod = Literal["empirical-influence", "datamodel"]

ALPHAS = (0.1, 1.0, 10.0)
FOLDS = 5


def empirical_influence(
    masks: Bool[Tensor, "s n"], losses: Float[Tensor, "_ q"]
) -> Float64[Tensor, "q n"]:
    """Mean loss without training example i minus mean loss with it, float64.

    Larger means that the example lowers the query's loss, as for every other score here; D-TRAK
    tabulates the negative and leaves out the minus of the LDS in turn.

    Raises:
        DataError: an example is in every subset or in none; tables do not match.

    Source: Feldman and Zhang 2020 (arXiv:2008.03703), estimator of section 2.
    """
    return subset_scores("empirical-influence", masks, losses)


def datamodel_scores(
    masks: Bool[Tensor, "s n"],
    losses: Float[Tensor, "_ q"],
    *,
    alphas: Sequence[float] = ALPHAS,
    folds: int = FOLDS,
) -> Float64[Tensor, "q n"]:
    """Minus the coefficients of a ridge regression from subset masks to each query's loss, float64.

    The strength is chosen for each query by cross-validated R² over ``folds`` runs of consecutive
    subsets, as scikit-learn's ``RidgeCV(cv=folds)`` does; all queries share the factorisations.

    Raises:
        ConfigError: no strength, or a strength that is not positive.
        DataError: fewer than two subsets in a fold's rest, or tables that do not match.

    Source: Ilyas et al. 2022 (arXiv:2202.00622), with the ridge of D-TRAK in place of the lasso.
    """
    return subset_scores("datamodel", masks, losses, alphas=alphas, folds=folds)


def subset_scores(
    method: SubsetMethod,
    masks: Bool[Tensor, "s n"],
    losses: Float[Tensor, "_ q"],
    *,
    alphas: Sequence[float] = ALPHAS,
    folds: int = FOLDS,
) -> Float64[Tensor, "q n"]:
    """Scores of either method: :func:`query_rows` times :func:`training_rows`."""
    asked = query_rows(method, masks, losses, alphas=alphas, folds=folds)
    return asked @ training_rows(method, masks).mT


def training_rows(method: SubsetMethod, masks: Bool[Tensor, "s n"]) -> Float64[Tensor, "n s"]:
    """Features of the training examples.

    Raises:
        DataError: empirical influence of an example that is in every subset or in none.
    """
    inside = masks.double()
    if method == "datamodel":
        return (inside - inside.mean(dim=0)).mT.contiguous()
    count = inside.sum(dim=0)
    constant = (count == 0) | (count == len(masks))
    if bool(constant.any()):
        raise DataError(
            f"training example {int(constant.nonzero()[0, 0])} is in every subset or in none, so its "
            "influence cannot be measured: train more subsets"
        )
    return ((1 - inside) / (len(masks) - count) - inside / count).mT.contiguous()


def query_rows(
    method: SubsetMethod,
    masks: Bool[Tensor, "s n"],
    losses: Float[Tensor, "_ q"],
    *,
    alphas: Sequence[float] = ALPHAS,
    folds: int = FOLDS,
) -> Float64[Tensor, "q s"]:
    """Features of the queries; each depends on its own losses alone."""
    losses = require_table(masks, losses)
    # A constant changes no score; without it little is lost where features are rounded.
    centred = losses - losses.mean(dim=0)
    if method == "empirical-influence":
        return centred.mT.contiguous()
    design = masks.double()
    best = _strengths(design, losses, alphas, folds)
    values, vectors = _spectrum(design - design.mean(dim=0))
    strength = torch.tensor(alphas, dtype=torch.float64)[best]
    solved = (vectors.mT @ centred) / (values[:, None] + strength)
    return -(vectors @ solved).mT


def _strengths(
    design: Tensor, losses: Tensor, alphas: Sequence[float], folds: int
) -> Int64[Tensor, " q"]:
    """Which strength predicts each query's losses best where they were left out."""
    count = len(design)
    if not alphas or min(alphas) <= 0:
        raise ConfigError(f"ridge strengths must be positive, got {list(alphas)}")
    if not 2 <= folds <= count:
        raise DataError(f"{count} subsets cannot be split into {folds} folds")
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
    return quality.argmax(dim=0)


def _ridge(x: Tensor, y: Tensor, alphas: Sequence[float], at: Tensor) -> Float[Tensor, "a m q"]:
    """Predictions at ``at`` of ridge regressions with intercept, in dual form (few rows)."""
    centre, level = x.mean(dim=0), y.mean(dim=0)
    rows = x - centre
    values, vectors = _spectrum(rows)
    cross = (at - centre) @ rows.mT @ vectors
    rotated = vectors.mT @ (y - level)
    shrink = torch.stack([1 / (values + alpha) for alpha in alphas])
    return cross @ (shrink[:, :, None] * rotated) + level


def _spectrum(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of the products of all rows."""
    values, vectors = torch.linalg.eigh(rows @ rows.mT)
    return values.clamp(min=0), vectors
