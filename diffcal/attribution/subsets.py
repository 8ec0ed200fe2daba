"""Random subsets of the training set, on which models are trained to test an attribution."""

import math

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from diffcal.core.rng import item_generator
from diffcal.errors import ConfigError, DataError

__all__ = ["leave_out_masks", "subset_masks"]


def subset_masks(
    n: int,
    count: int,
    *,
    fraction: float = 0.5,
    seed: int = 0,
    labels: Int[Tensor, " {n}"] | None = None,
) -> Bool[Tensor, "{count} {n}"]:
    """Which of ``n`` training examples each of ``count`` subsets contains, without replacement.

    Subset s depends on (seed, s) alone: drawing more later leaves the first ones as they are. Every
    subset has ``round(fraction · n)`` examples; with ``labels`` each class keeps its share, rounded so
    that the total stays the same.

    Raises:
        ConfigError: a fraction that leaves a subset empty or full, or no subset.
        DataError: negative labels.
    """
    size = math.floor(fraction * n + 0.5)
    if count < 1 or not 0 < size < n:
        raise ConfigError(f"{count} subsets of {size} of {n} examples test nothing")
    if labels is not None and bool((labels < 0).any()):
        raise DataError("class labels must not be negative")
    classes = torch.zeros(n, dtype=torch.long) if labels is None else labels.long().cpu()
    members = [(classes == c).nonzero()[:, 0] for c in classes.unique().tolist()]
    masks = torch.zeros(count, n, dtype=torch.bool)
    for s in range(count):
        generator = item_generator(seed, "attribution-subset", s)
        for rows, take in zip(members, _quotas(members, size, generator), strict=True):
            chosen = torch.randperm(len(rows), generator=generator)[:take]
            masks[s, rows[chosen]] = True
    return masks


def leave_out_masks(n: int) -> Bool[Tensor, "{n} {n}"]:
    """Subset i lacks training example i only."""
    return ~torch.eye(n, dtype=torch.bool)


def _quotas(members: list[Tensor], size: int, generator: torch.Generator) -> list[int]:
    """Examples of each class: shares rounded down, what is missing to the largest remainders."""
    total = sum(len(rows) for rows in members)
    exact = [len(rows) * size / total for rows in members]
    quotas = [math.floor(share) for share in exact]
    remainder = torch.tensor([share - math.floor(share) for share in exact], dtype=torch.float64)
    # Equal remainders are decided at random, so that no class gains in every subset.
    tie = torch.randperm(len(members), generator=generator)
    order = tie[remainder[tie].argsort(descending=True, stable=True)]
    for index in order[: size - sum(quotas)].tolist():
        quotas[index] += 1
    return quotas
