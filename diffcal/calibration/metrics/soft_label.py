"""Distances between two sets of class distributions, example by example (people against a model)."""

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.errors import DataError

__all__ = [
    "DIVERGENCES",
    "compare_soft_labels",
    "entropies",
    "entropy_spearman",
    "hellinger",
    "jensen_shannon",
    "kullback_leibler",
    "soft_cross_entropy",
    "squared_distance",
    "total_variation",
]

SUM_TOLERANCE = 1e-3
"""Rows may be off 1 by the rounding of half-precision sums."""


def total_variation(
    human: Float[Tensor, "b k"], model: Float[Tensor, "b k"]
) -> Float[Tensor, " b"]:
    """``½ Σ_k |h_k - p_k|`` of each example, float64 in [0, 1]."""
    return (human.double() - model.double()).abs().sum(dim=1) / 2


def kullback_leibler(
    human: Float[Tensor, "b k"], model: Float[Tensor, "b k"]
) -> Float[Tensor, " b"]:
    """``Σ_k h_k log(h_k / p_k)`` of each example in nats, float64; infinite where p misses h."""
    h, p = human.double(), model.double()
    return soft_cross_entropy(h, p) - entropies(h)


def soft_cross_entropy(
    human: Float[Tensor, "b k"], model: Float[Tensor, "b k"]
) -> Float[Tensor, " b"]:
    """``-Σ_k h_k log p_k`` of each example in nats, float64."""
    return -torch.special.xlogy(human.double(), model.double()).sum(dim=1)


def jensen_shannon(human: Float[Tensor, "b k"], model: Float[Tensor, "b k"]) -> Float[Tensor, " b"]:
    """Jensen-Shannon divergence of each example in nats, float64 in [0, log 2]."""
    middle = (human.double() + model.double()) / 2
    return entropies(middle) - (entropies(human) + entropies(model)) / 2


def squared_distance(
    human: Float[Tensor, "b k"], model: Float[Tensor, "b k"]
) -> Float[Tensor, " b"]:
    """``Σ_k (h_k - p_k)²`` of each example, float64 in [0, 2]."""
    return (human.double() - model.double()).square().sum(dim=1)


def hellinger(human: Float[Tensor, "b k"], model: Float[Tensor, "b k"]) -> Float[Tensor, " b"]:
    """``sqrt(½ Σ_k (√h_k - √p_k)²)`` of each example, float64 in [0, 1]."""
    roots = human.double().sqrt() - model.double().sqrt()
    return (roots.square().sum(dim=1) / 2).sqrt()


def entropies(probs: Float[Tensor, "b k"]) -> Float[Tensor, " b"]:
    """Entropy of each row in nats, float64."""
    return torch.special.entr(probs.double()).sum(dim=1)


def entropy_spearman(human: Float[Tensor, "b k"], model: Float[Tensor, "b k"]) -> float:
    """Rank correlation of the entropies (ties share ranks); NaN if one side has only one value.

    Says whether the model is unsure about the same images as people, whatever the scale.
    """
    ranks = [_ranks(entropies(probs)) for probs in (human, model)]
    centred = [rank - rank.mean() for rank in ranks]
    scale = centred[0].norm() * centred[1].norm()
    return float((centred[0] @ centred[1]) / scale) if float(scale) > 0 else float("nan")


DIVERGENCES = {
    "kl": kullback_leibler,
    "tv": total_variation,
    "js": jensen_shannon,
    "l2": squared_distance,
    "soft_ce": soft_cross_entropy,
}


def compare_soft_labels(
    human: Float[Tensor, "b k"], model: Float[Tensor, "b k"]
) -> dict[str, float]:
    """Means of :data:`DIVERGENCES`, both mean entropies, Spearman of entropies and agreement of argmax.

    Raises:
        DataError: no rows, different shapes, or rows that are not distributions.
    """
    if human.shape != model.shape or len(human) == 0:
        raise DataError(
            f"two sets of distributions of the same shape are needed, got {list(human.shape)} and "
            f"{list(model.shape)}"
        )
    for name, probs in (("human", human), ("model", model)):
        total = probs.double().sum(dim=1)
        bad = ~((total - 1).abs() <= SUM_TOLERANCE) | (probs < 0).any(dim=1)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise DataError(f"{name} row {row} is not a distribution (sum {float(total[row]):.4g})")
    result = {name: float(measure(human, model).mean()) for name, measure in DIVERGENCES.items()}
    result["entropy_human"] = float(entropies(human).mean())
    result["entropy_model"] = float(entropies(model).mean())
    result["spearman"] = entropy_spearman(human, model)
    result["top_agreement"] = float((human.argmax(1) == model.argmax(1)).double().mean())
    return result


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0, ties sharing the mean of theirs."""
    # Entropies of equal distributions differ in the last bits with the order of classes.
    rounded = (values * 1e9).round()
    _, inverse, counts = rounded.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() + 1) / 2)[inverse]
