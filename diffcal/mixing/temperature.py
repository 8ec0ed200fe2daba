"""Temperature of logits, chosen on held-out targets, hard or soft."""

from jaxtyping import Float
from torch import Tensor

from diffcal.errors import NumericalError

__all__ = ["fit_temperature", "mean_log_loss", "smoothed_targets"]

LOWEST, HIGHEST = 0.02, 50.0
"""Temperatures outside are not believed: they come from held-out images that are all easy."""
HALVINGS = 60


def mean_log_loss(logits: Float[Tensor, "b k"], targets: Float[Tensor, "b k"]) -> float:
    """Mean ``-Σ_k q_k log softmax(z)_k`` in nats."""
    return float(-(targets.double() * logits.double().log_softmax(dim=1)).sum(dim=1).mean())


def smoothed_targets(targets: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """Targets that admit one error more than was seen: mass 1 / (n + 2) goes to the other classes.

    Held-out images that are all classified rightly would otherwise ask for a temperature of zero, and
    every label between classes would be a certain one. n images without an error only tell that the
    rate of errors is about 1 / (n + 2) (rule of succession).

    Source: Platt 1999, Probabilistic outputs for support vector machines, section 2.2, which does this
    for two classes.
    """
    count, classes = targets.shape
    share = 1 / (count + 2)
    q = targets.double()
    return (1 - share) * q + share * (1 - q) / max(classes - 1, 1)


def fit_temperature(
    logits: Float[Tensor, "b k"],
    targets: Float[Tensor, "b k"],
    offset: Float[Tensor, " k"] | None = None,
) -> float:
    """The temperature T at which ``softmax(logits / T + offset)`` has the least mean log loss.

    The loss is convex in 1/T, so the root of its slope is bracketed and halved.

    Args:
        logits: Of held-out images.
        targets: Class distributions, one-hot for hard labels.
        offset: What no temperature should touch, such as log class frequencies; 0 if None.

    Raises:
        NumericalError: logits that are not finite.

    Source: Guo et al. 2017 (arXiv:1706.04599), section 4.2.
    """
    logits, targets = logits.double(), targets.double()
    if not bool(logits.isfinite().all()):
        raise NumericalError("logits of held-out images hold NaN or infinite values")
    low, high = 1 / HIGHEST, 1 / LOWEST
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        scaled = logits * middle if offset is None else logits * middle + offset
        slope = (scaled.softmax(dim=1) - targets).mul(logits).sum(dim=1).mean()
        low, high = (middle, high) if float(slope) < 0 else (low, middle)
    return (low * high) ** -0.5
