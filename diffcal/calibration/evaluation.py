"""Figures drawn from the logits of a classifier on a set of images."""

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from diffcal.calibration.posthoc.temperature import TemperatureScaling
from diffcal.errors import DataError

__all__ = ["fit_temperature", "summarise"]


def fit_temperature(logits: Float[Tensor, "n k"], labels: Int[Tensor, " n"]) -> float:
    """Temperature T in [0.01, 100] that minimises the negative log-likelihood of ``logits / T``.

    See :class:`~diffcal.calibration.posthoc.temperature.TemperatureScaling`; float64.

    Raises:
        DataError: every example is classified correctly, so that no finite T is best.

    Source: Guo et al. 2017 (arXiv:1706.04599), section 4.2.
    """
    if bool((logits.argmax(dim=1) == labels).all()):
        raise DataError(
            f"all {len(labels)} examples are classified correctly, so the likelihood only grows as "
            "the temperature falls; fit it on a larger set"
        )
    return TemperatureScaling().fit(logits, labels).temperature


def summarise(
    logits: Float[Tensor, "n k"], labels: Int[Tensor, " n"], temperature: float = 1.0
) -> dict[str, float]:
    """Accuracy, NLL (nats) and Brier score of ``logits / temperature``, in float64."""
    z = logits.double() / temperature
    p = z.softmax(dim=1)
    one_hot = F.one_hot(labels, z.shape[1])
    return {
        "accuracy": float((z.argmax(dim=1) == labels).double().mean()),
        "nll": float(F.cross_entropy(z, labels)),
        "brier": float((p - one_hot).square().sum(dim=1).mean()),
    }
