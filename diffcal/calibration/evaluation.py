"""Logits of a classifier on a set of images, kept on disk, and the figures drawn from them."""

from pathlib import Path

from jaxtyping import Float, Int
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional as F

from diffcal.calibration.posthoc.temperature import TemperatureScaling
from diffcal.core.runs import write_atomic
from diffcal.errors import DataError

__all__ = ["fit_temperature", "load_logits", "save_logits", "summarise"]


def save_logits(path: Path, logits: Float[Tensor, "n k"], labels: Int[Tensor, " n"]) -> None:
    """Write ``logits`` (float32) and ``labels`` (int64) as safetensors, atomically."""
    tensors = {"logits": logits.float().contiguous(), "labels": labels.long().contiguous()}
    data = save(tensors, metadata={"format": "diffcal-logits/1"})
    write_atomic(path, lambda file: file.write(data))


def load_logits(path: Path) -> tuple[Float[Tensor, "n k"], Int[Tensor, " n"]]:
    """Logits and labels of :func:`save_logits`.

    Raises:
        DataError: the file is missing, damaged or holds something else.
    """
    try:
        tensors = load_file(path)
        return tensors["logits"], tensors["labels"]
    except KeyError as error:
        raise DataError(f"'{path}' must hold 'logits' and 'labels', {error} is missing") from error
    except Exception as error:
        raise DataError(f"'{path}' cannot be read as safetensors: {error}") from error


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
