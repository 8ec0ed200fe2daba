"""How trustworthy each mixed image is: columns to store, and thresholds to apply later."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from diffcal.errors import ConfigError, DataError
from diffcal.mixing.annotator_base import support_mask
from diffcal.mixing.projection import affine_weights
from diffcal.mixing.prototypes import FeatureBatches

__all__ = [
    "FilterConfig",
    "endpoint_agreement",
    "group_spearman",
    "nearest_cosine",
    "off_axis_residual",
    "real_residual_quantile",
    "third_class_mass",
]

PURE = 1 - 1e-6
"""Smallest weight of a class that makes an image a pure one."""
BLOCK = 4096
HISTOGRAM = 65536


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Which mixed images to use, by thresholds on their quality columns; None switches one off.

    Applied at publication or training, never at generation: no image is deleted.
    """

    max_residual: float | None = None
    """Off-axis distance, in units of the 99th percentile of real images."""
    max_third_mass: float | None = None
    """Probability of classes that were not mixed. 0.3 is a sensible limit for labels that name only
    the mixed classes; labels over all classes need none."""
    min_group_spearman: float | None = None
    """Rank correlation of requested and re-estimated ratio within the group; 0.8 is usual."""
    max_nearest_cosine: float | None = None
    """Cosine to the nearest real training image; refuses near copies."""
    require_endpoints: bool = False
    """Drop images of a single class that the probe takes for another."""

    def __post_init__(self) -> None:
        ranges = {
            "max_residual": (0, float("inf")),
            "max_third_mass": (0, 1),
            "min_group_spearman": (-1, 1),
            "max_nearest_cosine": (-1, 1),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ConfigError(f"filter.{name} must be in [{low}, {high}], got {value}")

    @property
    def active(self) -> bool:
        """True if any threshold is set."""
        values = (getattr(self, field.name) for field in fields(self))
        return any(value is not None and value is not False for value in values)

    def keep(self, columns: Mapping[str, Any]) -> np.ndarray:
        """Bool ``[n]``: rows that pass every threshold; a null (None or NaN) passes.

        Args:
            columns: Arrays or lists ``residual``, ``third_mass``, ``group_spearman``,
                ``nearest_cosine`` and ``endpoint_ok``, as far as thresholds name them.

        Raises:
            DataError: a column that a threshold needs is missing.
        """
        kept: np.ndarray | None = None
        for column, limit, sign in (
            ("residual", self.max_residual, 1),
            ("third_mass", self.max_third_mass, 1),
            ("group_spearman", self.min_group_spearman, -1),
            ("nearest_cosine", self.max_nearest_cosine, 1),
            ("endpoint_ok", 1.0 if self.require_endpoints else None, -1),
        ):
            if limit is None:
                continue
            if column not in columns:
                raise DataError(f"the filter needs column '{column}', which the annotation lacks")
            values = np.array(
                [np.nan if value is None else float(value) for value in columns[column]]
            )
            passing = np.isnan(values) | (sign * values <= sign * limit)
            kept = passing if kept is None else kept & passing
        if kept is None:
            sizes = [len(values) for values in columns.values()]
            return np.ones(sizes[0] if sizes else 0, dtype=bool)
        return kept


def off_axis_residual(
    features: Float[Tensor, "b d"],
    prototypes: Float[Tensor, "k d"],
    classes: Int64[Tensor, "b m"],
) -> tuple[Float[Tensor, " b"], Float[Tensor, "b m"]]:
    """Distance to the flat through the mixed classes' prototypes, and the weights of the nearest point.

    For a pair the flat is the line, the distance ``‖v - μ2 - λ̂ δ‖`` and the weights (λ̂, 1 - λ̂); they
    sum to 1 and may be negative. Float64; weights are 0 at the padding (class -1).
    """
    distance = torch.zeros(len(features), dtype=torch.float64)
    weights = torch.zeros(classes.shape, dtype=torch.float64)
    features, prototypes = features.double(), prototypes.double()
    supports, inverse = classes.unique(dim=0, return_inverse=True)
    for index, support in enumerate(supports):
        rows = (inverse == index).nonzero()[:, 0]
        present = (support >= 0).nonzero()[:, 0]
        own = prototypes[support[present]]
        solution = affine_weights(features[rows], own)
        weights[rows[:, None], present] = solution
        distance[rows] = (features[rows] - solution @ own).norm(dim=1)
    return distance, weights


def real_residual_quantile(
    batches: FeatureBatches, prototypes: Float[Tensor, "k d"], quantile: float = 0.99
) -> float:
    """Quantile over real images of the distance to the lines from their class to every other class.

    Found in two passes with a histogram, so in memory that does not grow with the images; it may be
    too large by 1/65536 of the largest distance.

    Raises:
        DataError: no images.
    """
    prototypes = prototypes.double()
    norm = torch.cdist(prototypes, prototypes, compute_mode="donot_use_mm_for_euclid_dist").square()
    largest = max(
        (float(v.max()) for v in _line_distances(batches, prototypes, norm)), default=-1.0
    )
    if largest < 0:
        raise DataError("no real images to compare residuals with")
    if largest == 0:
        return 0.0
    counts = torch.zeros(HISTOGRAM, dtype=torch.int64)
    for values in _line_distances(batches, prototypes, norm):
        cells = (values * (HISTOGRAM / largest)).long().clamp(max=HISTOGRAM - 1)
        counts += torch.bincount(cells, minlength=HISTOGRAM)
    total = counts.cumsum(0)
    cell = int(torch.searchsorted(total, max(quantile * int(total[-1]), 1)))
    return (cell + 1) * largest / HISTOGRAM


def _line_distances(
    batches: FeatureBatches, prototypes: Tensor, norm: Tensor
) -> Iterator[Float[Tensor, " j"]]:
    other = ~torch.eye(len(prototypes), dtype=torch.bool)
    for features, labels in batches:
        for start in range(0, len(labels), BLOCK):
            block, own = features[start : start + BLOCK].double(), labels[start : start + BLOCK]
            away = block - prototypes[own]
            # <v - μ_own, μ_own - μ_j> for all j, by linearity.
            along = (away * prototypes[own]).sum(dim=1, keepdim=True) - away @ prototypes.T
            along = along.square() / norm[own].clamp(min=1e-300)
            squared = away.square().sum(dim=1, keepdim=True) - along
            yield squared[other[own]].clamp(min=0).sqrt()


def third_class_mass(
    posterior: Float[Tensor, "b k"], classes: Int64[Tensor, "b m"]
) -> Float[Tensor, " b"]:
    """Probability of classes that were not mixed, float64 in [0, 1]."""
    support = support_mask(classes, posterior.shape[1])
    return torch.where(support, 0.0, posterior.double()).sum(dim=1).clamp(0, 1)


def group_spearman(
    groups: Int64[Tensor, " b"], ratio: Float[Tensor, " b"], estimate: Float[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """Rank correlation of requested and re-estimated ratio of each row's group, float64.

    Ties share ranks. NaN for groups of one, and where one side is constant or not finite.
    """
    _, member = groups.unique(return_inverse=True)
    count = torch.bincount(member).double()
    ranks = [_centred_ranks(member, values.double(), count) for values in (ratio, estimate)]

    def total(values: Tensor) -> Tensor:
        return torch.zeros(len(count), dtype=torch.float64).index_add_(0, member, values)

    scale = (total(ranks[0].square()) * total(ranks[1].square())).sqrt()
    result = total(ranks[0] * ranks[1]) / scale  # 0/0 where a side is constant
    return result[member]


def _centred_ranks(member: Tensor, values: Tensor, count: Tensor) -> Tensor:
    """Rank of each value within its group less the group's mean rank; ties share the mean of theirs."""
    by_value = torch.argsort(values, stable=True)
    order = by_value[torch.argsort(member[by_value], stable=True)]
    group, value = member[order], values[order]
    position = torch.arange(len(order), dtype=torch.float64)
    fresh = torch.ones(len(order), dtype=torch.bool)
    fresh[1:] = (group[1:] != group[:-1]) | (value[1:] != value[:-1])
    run = fresh.cumsum(0) - 1
    length = torch.bincount(run).double()
    shared = torch.zeros_like(length).index_add_(0, run, position) / length
    first = count.cumsum(0) - count
    ranks = shared[run] - first[group] - (count[group] - 1) / 2
    ranks = torch.where(value.isfinite(), ranks, float("nan"))
    return torch.empty_like(ranks).index_copy_(0, order, ranks)


def endpoint_agreement(
    posterior: Float[Tensor, "b k"], classes: Int64[Tensor, "b m"], weights: Float[Tensor, "b m"]
) -> tuple[Bool[Tensor, " b"], Bool[Tensor, " b"]]:
    """Which rows are of a single class (weight 1), and whether the probe sees that class in them."""
    largest, position = weights.max(dim=1)
    wanted = classes.gather(1, position[:, None])[:, 0]
    return largest >= PURE, posterior.argmax(dim=1) == wanted


def nearest_cosine(
    features: Float[Tensor, "b d"],
    real: FeatureBatches,
    centre: Float[Tensor, " d"],
    device: torch.device | str = "cpu",
) -> Float[Tensor, " b"]:
    """Largest cosine of each image's features to those of any real image, by exact search.

    Features are taken relative to ``centre`` (the mean of the real ones): without that, features that
    share a large common part have cosines near 1 whatever they show.

    Args:
        features: Of generated images.
        real: Features of real ones; one block of them is in memory at a time.
        centre: See above.
        device: Where the products are computed; the result is on the CPU, float32.
    """

    def directions(values: Tensor) -> Tensor:
        return F.normalize((values.double() - centre).float(), dim=1).to(device)

    best = torch.full((len(features),), -1.0, device=device)
    queries = directions(features)
    for block, _ in real:
        for start in range(0, len(block), BLOCK):
            keys = directions(block[start : start + BLOCK])
            for first in range(0, len(queries), BLOCK):
                rows = slice(first, first + BLOCK)
                found = (queries[rows] @ keys.T).max(dim=1).values
                best[rows] = torch.maximum(best[rows], found)
    return best.clamp(-1, 1).cpu()
