"""The damping chosen on other subsets than those on which it is judged."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from diffcal.attribution.lds import LDS, spearman, stream_predictions
from diffcal.attribution.lds_folds import cross_fitted_lds, rest_of, subset_folds
from diffcal.attribution.scores import ScoreBlock
from diffcal.errors import DataError

__all__ = [
    "OFFICIAL_DAMPINGS",
    "RELATIVE_DAMPINGS",
    "REST_DAMPINGS",
    "DIMENSION_DAMPINGS",
    "DampingChoice",
    "choose_damping",
    "path_predictions",
]

OFFICIAL_DAMPINGS = tuple(m * 10.0**e for e in range(-2, 7) for m in (1, 2, 5))
"""The 27 absolute values of the published search."""
RELATIVE_DAMPINGS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Values of rho: absolute optima of published cells range from 1 to 5,000, relative ones hardly move."""
REST_DAMPINGS = (0.3, 1.0, 3.0, 10.0, 20.0, 30.0, 50.0, 100.0, 300.0)
"""In units of the mean of all eigenvalues but the largest: 3 to 10 was best on digits, 100 on
photographs."""
DIMENSION_DAMPINGS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3)
"""Shares of the kernel's rank."""


@dataclass(frozen=True)
class DampingChoice:
    """LDS over dampings, honest and optimistic."""

    dampings: tuple[float, ...]
    curve: Float64[Tensor, " l"]
    """LDS of each damping on all subsets."""
    chosen: float
    """Best damping on all subsets: the one to use from now on."""
    optimistic: float
    """Its LDS on the very subsets that chose it, as published tables report."""
    held_out: LDS
    """Mean over folds of the LDS, on the fold's subsets, of the damping chosen on the others."""
    per_fold: tuple[float, ...]
    """Damping that each fold was judged with."""


def choose_damping(
    predictions: Float[Tensor, "l s q"],
    losses: Float[Tensor, "_ _"],
    dampings: Sequence[float],
    *,
    folds: int = 2,
    seed: int = 0,
    n_resamples: int = 500,
    level: float = 0.95,
) -> DampingChoice:
    """Choose a damping by LDS and say what the choice is worth on subsets that did not make it.

    Subsets are dealt to ``folds`` folds at random. Ties go to the larger damping.

    Args:
        predictions: From :func:`path_predictions`.

    Raises:
        DataError: shapes do not match, or a fold would have fewer than three subsets.
        ConfigError: fewer than two folds.
    """
    subsets = len(losses)
    if predictions.shape[0] != len(dampings) or predictions.shape[1:] != losses.shape:
        raise DataError(
            f"predictions {list(predictions.shape)} must be [{len(dampings)} dampings, "
            f"{subsets} subsets, {losses.shape[1]} queries]"
        )
    dealt = subset_folds(subsets, folds, seed)
    rests = [rest_of(held, subsets) for held in dealt]
    best_of_fold = [_best(_curve(predictions[:, rest], losses[rest]), dampings) for rest in rests]
    judged = [predictions[best] for best in best_of_fold]
    curve = _curve(predictions, losses)
    best = _best(curve, dampings)
    return DampingChoice(
        dampings=tuple(float(value) for value in dampings),
        curve=curve,
        chosen=float(dampings[best]),
        optimistic=float(curve[best]),
        held_out=cross_fitted_lds(
            judged, losses, dealt, n_resamples=n_resamples, level=level, seed=seed
        ),
        per_fold=tuple(float(dampings[best]) for best in best_of_fold),
    )


def path_predictions(
    path: Iterable[tuple[int, Float[Tensor, "l q b"]]], masks: Bool[Tensor, "s n"]
) -> Float64[Tensor, "l s q"]:
    """Predicted subset losses at every damping from :func:`~.scores.score_path`, streamed."""
    pieces: list[Tensor] = []
    covered = 0
    for start, values in path:
        stop = start + values.shape[2]
        if start != covered or stop > masks.shape[1]:
            raise DataError(f"scores start at row {start}, expected {covered} of {masks.shape[1]}")
        part = masks[:, start:stop]
        block = [stream_predictions([ScoreBlock(0, one)], part) for one in values]
        pieces = [old + new for old, new in zip(pieces, block, strict=True)] if pieces else block
        covered = stop
    if covered != masks.shape[1]:
        raise DataError(f"scores cover {covered} of the masks' {masks.shape[1]} training examples")
    return torch.stack(pieces)


def _curve(predictions: Tensor, losses: Tensor) -> Float64[Tensor, " l"]:
    actual = losses.double().cpu().mT
    return torch.stack([spearman(one.double().cpu().mT, actual).mean() for one in predictions])


def _best(curve: Tensor, dampings: Sequence[float]) -> int:
    top = float(curve.max())
    return max((d, i) for i, d in enumerate(dampings) if float(curve[i]) >= top)[1]
