"""The LDS of something that was fitted on some subsets and is judged on the others."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from diffcal.attribution.lds import (
    LDS,
    lds_of_draws,
    require_table,
    resample_counts,
    resampled_spearman,
    spearman,
)
from diffcal.core.tensors import require_finite
from diffcal.errors import ConfigError, DataError

__all__ = ["cross_fitted_lds", "rest_of", "subset_folds"]

FEWEST = 3  # of two subsets every rank correlation is 1 or -1


def subset_folds(subsets: int, folds: int = 2, seed: int = 0) -> list[Int64[Tensor, " f"]]:
    """Subset numbers dealt at random to ``folds`` folds of nearly equal size.

    Raises:
        ConfigError: fewer than two folds.
        DataError: a fold would have fewer than three subsets.
    """
    if folds < 2:
        raise ConfigError(f"judging on other subsets needs at least 2 folds, got {folds}")
    if subsets < FEWEST * folds:
        raise DataError(f"{subsets} subsets are too few for {folds} folds of three or more")
    order = torch.randperm(subsets, generator=torch.Generator().manual_seed(seed))
    return list(order.tensor_split(folds))


def rest_of(held: Int64[Tensor, " f"], subsets: int) -> Int64[Tensor, " r"]:
    """The subsets outside a fold, in order: what to fit on."""
    kept = torch.ones(subsets, dtype=torch.bool)
    kept[held] = False
    return kept.nonzero()[:, 0]


def cross_fitted_lds(
    predictions: Sequence[Float[Tensor, "s q"]],
    losses: Float[Tensor, "_ _"],
    folds: Sequence[Int64[Tensor, " f"]],
    *,
    n_resamples: int = 500,
    level: float = 0.95,
    seed: int = 0,
) -> LDS:
    """Mean over folds of the LDS on the fold's own subsets.

    Args:
        predictions: For each fold, of all subsets, from what was fitted without that fold
            (:func:`rest_of`): a damping, a datamodel. Predictions of different folds are never ranked
            together, as their scales may differ.
        folds: From :func:`subset_folds`.
        n_resamples: Bootstrap resamples of the subsets within each fold and of the queries; what was
            fitted stays as it is.

    Returns:
        ``per_query`` holds each query's mean over the folds.

    Raises:
        DataError: shapes do not match, or not one table for each fold.
        NumericalError: NaN or infinite values.
    """
    if len(predictions) != len(folds) or not folds:
        raise DataError(f"{len(predictions)} tables of predictions for {len(folds)} folds")
    for table in predictions:
        if table.shape != losses.shape:
            raise DataError(
                f"predictions {list(table.shape)} and losses {list(losses.shape)} must both be "
                "[subsets, queries]"
            )
    if not 0 < level < 1 or n_resamples < 2:
        raise ConfigError(f"need 0 < level < 1 and at least 2 resamples: {level}, {n_resamples}")
    losses = require_table(losses, losses)
    subsets, queries = losses.shape
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randint(queries, (n_resamples, queries), generator=generator)
    per_query = losses.new_zeros(queries)
    draws = losses.new_zeros(n_resamples, queries)
    for held, table in zip(folds, predictions, strict=True):
        predicted = require_finite(table, "predictions").double().cpu()[held].mT.contiguous()
        actual = losses[held].mT.contiguous()
        counts = resample_counts(len(held), n_resamples, generator)
        per_query += spearman(predicted, actual) / len(folds)
        draws += resampled_spearman(predicted, actual, counts) / len(folds)
    return lds_of_draws(per_query, draws, columns, level, subsets)
