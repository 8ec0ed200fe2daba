"""Consistency by drawing noise: counts of winners or mean probabilities over perturbed logits."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from diffcal.core.rng import item_generator
from diffcal.core.runs import sha256_bytes
from diffcal.errors import ConfigError

__all__ = [
    "Aggregation",
    "consistency_counts",
    "draw_noise",
    "mean_probabilities",
    "row_generator",
    "sampled_consistency",
    "smoothed",
]

Aggregation = Literal["consistency", "mean"]

STREAM = "consistency"
DRAW_ELEMENTS = 1 << 18


def consistency_counts(
    logits: Float[Tensor, "b k"], noise: Float[Tensor, "m b k"], epsilon: float
) -> Int[Tensor, "b k"]:
    """How often each class wins among the perturbed logits ``z + epsilon noise``."""
    winners = (logits + epsilon * noise).argmax(dim=2)
    counts = torch.zeros(logits.shape, dtype=torch.int64, device=logits.device)
    return counts.scatter_add_(1, winners.T, torch.ones_like(winners.T))


def mean_probabilities(
    logits: Float[Tensor, "b k"], noise: Float[Tensor, "m b k"], epsilon: float
) -> Float[Tensor, "b k"]:
    """Mean softmax of the perturbed logits ``z + epsilon noise``."""
    return (logits + epsilon * noise).softmax(dim=2).mean(dim=0)


def smoothed(counts: Int[Tensor, "b k"], smoothing: float | None = None) -> Float[Tensor, "b k"]:
    """``(n_k + a)/(M + a k)``, so that a class that never won has no infinite score; a = 1/k.

    With a = 0 these are plain shares.
    """
    k = counts.shape[1]
    a = 1 / k if smoothing is None else smoothing
    return (counts + a).double() / (counts.sum(dim=1, keepdim=True) + a * k)


def row_generator(row: Float[Tensor, " k"], seed: int, stream: str = STREAM) -> torch.Generator:
    """Generator that depends on a row's values alone, so that neither batch nor order matters."""
    digest = sha256_bytes(row.double().cpu().numpy().tobytes())
    return item_generator(seed, stream, int(digest[:15], 16))


def draw_noise(
    kind: str, shape: tuple[int, int], generator: torch.Generator
) -> Float[Tensor, "m k"]:
    """Independent standard normal, uniform [0, 1) or standard Gumbel numbers, float32 on the CPU."""
    if kind == "gaussian":
        return torch.randn(shape, generator=generator)
    noise = torch.rand(shape, generator=generator)
    if kind == "uniform":
        return noise
    if kind == "gumbel":
        return -(-noise.clamp(1e-20, 1 - 1e-7).log()).log()
    raise ConfigError(f"unknown noise '{kind}': use gaussian, uniform or gumbel")


def sampled_consistency(
    logits: Float[Tensor, "b k"],
    epsilon: float,
    *,
    noise: str = "gaussian",
    num_samples: int = 1000,
    aggregation: Aggregation = "consistency",
    smoothing: float | None = None,
    seed: int = 0,
    factor: Float[Tensor, "r k"] | None = None,
) -> Float[Tensor, "b k"]:
    """Consistency of each row from ``num_samples`` draws of noise, float64.

    A row's noise depends on (seed, its values): equal rows give equal results in any batch, and
    torch's random state is not touched. Agrees with
    :func:`~diffcal.calibration.posthoc.consistency_exact.exact_consistency` within sampling error.

    Args:
        factor: ``[r, k]`` to mix r independent numbers into correlated logit noise.

    Source: Tao et al. 2024 (arXiv:2410.12295), logit level, as released (which draws one noise for
    a batch at a time); smoothing is ours.
    """
    out = torch.empty(logits.shape, dtype=torch.float64)
    width = logits.shape[1] if factor is None else len(factor)
    shape = (num_samples, width)
    z = logits.detach().double().cpu()
    size = max(1, DRAW_ELEMENTS // (num_samples * max(width, z.shape[1])))
    for start in range(0, len(z), size):
        part = z[start : start + size]
        drawn = torch.stack([draw_noise(noise, shape, row_generator(row, seed)) for row in part], 1)
        changes = drawn.double() if factor is None else drawn.double() @ factor
        if aggregation == "mean":
            out[start : start + size] = mean_probabilities(part, changes, epsilon)
        else:
            counts = consistency_counts(part, changes, epsilon)
            out[start : start + size] = smoothed(counts, smoothing)
    return out.to(logits.device)
