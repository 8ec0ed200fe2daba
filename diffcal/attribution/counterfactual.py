"""What retraining without some images changed: distances between images, and their differences."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, UInt8
from torch import Tensor

from diffcal.attribution.lds import Spread, spread_of
from diffcal.core.rng import item_generator
from diffcal.core.tensors import require_finite
from diffcal.errors import ConfigError, DataError

__all__ = [
    "Effect",
    "PairedEffect",
    "embedding_cosine",
    "paired_effect",
    "pixel_distance",
    "random_removals",
    "removal_effect",
]


@dataclass(frozen=True)
class Effect:
    """A distance, or a likeness, between the images of two models, over queries."""

    per_query: Float64[Tensor, " q"]
    """Mean over the models of a kind (draws, seeds)."""
    mean: float
    spread: Spread
    """If other queries had been asked and, where there are several, other models trained."""


@dataclass(frozen=True)
class PairedEffect:
    """Difference between two kinds of removal on the same queries."""

    per_query: Float64[Tensor, " q"]
    mean: float
    spread: Spread
    larger: float
    """Share of queries where the first kind has the larger value; ties count half."""


def pixel_distance(
    images: UInt8[Tensor, "q h w c"], others: UInt8[Tensor, "_ _ _ _"]
) -> Float64[Tensor, " q"]:
    """L2 distance of pixels in [-1, 1], not divided by their number.

    Raises:
        DataError: images of different sizes or numbers.

    Source: the counterfactual evaluation of D-TRAK (arXiv:2311.00500), section 4.3.
    """
    if images.shape != others.shape:
        raise DataError(f"cannot compare images {list(images.shape)} with {list(others.shape)}")
    return (images.double() - others.double()).flatten(1).norm(dim=1) / 127.5


def embedding_cosine(
    embeddings: Float[Tensor, "q d"],
    others: Float[Tensor, "q d"],
    centre: Float[Tensor, " d"] | None = None,
) -> Float64[Tensor, " q"]:
    """Cosine of each pair of rows; 0 where a row is zero.

    Args:
        centre: Taken away from both first. Embeddings that share a large constant part are all alike
            without it. The published figures (CLIP) are without.

    Raises:
        NumericalError: NaN or infinite embeddings.
    """
    rows = [require_finite(part, "embeddings").double() for part in (embeddings, others)]
    if centre is not None:
        rows = [part - centre.double() for part in rows]
    unit = []
    for part in rows:
        length = part.norm(dim=1, keepdim=True)
        unit.append(part / torch.where(length > 0, length, 1.0))
    return (unit[0] * unit[1]).sum(dim=1)


def removal_effect(
    values: Float[Tensor, "q m"], *, n_resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> Effect:
    """Mean of a distance over queries, and over models where one kind of removal has several.

    The bootstrap draws queries and models independently: a model that sees a random removal serves all
    queries, so that its luck is common to them.

    Raises:
        DataError: no queries or no models.
        NumericalError: NaN or infinite values.
    """
    table = _table(values)
    draws = _resampled(table, _Resamples(len(table), n_resamples, seed), seed)
    return Effect(table.mean(dim=1), float(table.mean()), spread_of(draws, level))


def paired_effect(
    values: Float[Tensor, "q m"],
    baseline: Float[Tensor, "_ _"],
    *,
    n_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> PairedEffect:
    """``values`` minus ``baseline`` query by query; resamples draw the same queries of both.

    Raises:
        DataError: different numbers of queries.
        NumericalError: NaN or infinite values.
    """
    first, second = _table(values), _table(baseline)
    if len(first) != len(second):
        raise DataError(f"{len(first)} queries cannot be paired with {len(second)}")
    queries = _Resamples(len(first), n_resamples, seed)
    # Streams of their own: the models of the two sides are different ones.
    draws = _resampled(first, queries, seed) - _resampled(second, queries, seed + 1)
    difference = first.mean(dim=1) - second.mean(dim=1)
    larger = (difference > 0).double() + (difference == 0).double() / 2
    return PairedEffect(
        difference, float(difference.mean()), spread_of(draws, level), float(larger.mean())
    )


def random_removals(n: int, count: int, draws: int, seed: int = 0) -> list[list[int]]:
    """Positions that each of ``draws`` random removals takes out, ascending; (seed, d) decides draw d.

    Raises:
        ConfigError: nothing to remove, or nothing left.
    """
    if not 0 < count < n:
        raise ConfigError(f"cannot remove {count} of {n} training images")
    return [
        sorted(
            torch.randperm(n, generator=item_generator(seed, "random-removal", draw))[
                :count
            ].tolist()
        )
        for draw in range(draws)
    ]


class _Resamples:
    """Bootstrap draws of queries."""

    def __init__(self, queries: int, count: int, seed: int) -> None:
        if count < 2:
            raise ConfigError(f"a bootstrap needs at least 2 resamples, got {count}")
        generator = torch.Generator().manual_seed(seed)
        self.rows = torch.randint(queries, (count, queries), generator=generator)


def _resampled(table: Tensor, queries: _Resamples, seed: int) -> Float64[Tensor, " r"]:
    count, models = len(queries.rows), table.shape[1]
    generator = item_generator(seed, "bootstrap-models", models)
    columns = torch.randint(models, (count, models), generator=generator)
    # Mean over drawn queries and drawn models = mean of the outer selection.
    weights = torch.zeros(count, models, dtype=torch.float64)
    weights.scatter_add_(1, columns, torch.ones(count, models, dtype=torch.float64))
    by_model = table[queries.rows].mean(dim=1)
    return (by_model * weights).sum(dim=1) / models


def _table(values: Tensor) -> Float64[Tensor, "q m"]:
    if values.ndim != 2 or 0 in values.shape:
        raise DataError(f"expected distances of [queries, models], got {list(values.shape)}")
    return require_finite(values, "distances").double().cpu()
