"""Out-of-distribution detection by a score that is higher inside the distribution."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.core.tensors import as_tensor
from diffcal.errors import ConfigError, DataError

__all__ = [
    "OodReport",
    "OodScore",
    "average_precision",
    "detection_error",
    "false_positive_rate",
    "ood_auroc",
    "ood_report",
    "ood_scores",
]

OodScore = Literal["confidence", "entropy", "energy", "max_logit"]


def ood_scores(
    *,
    logits: Tensor | np.ndarray | None = None,
    probs: Tensor | np.ndarray | None = None,
    score: OodScore = "confidence",
    temperature: float = 1.0,
) -> Float[Tensor, " n"]:
    """Score of each example, higher = more in-distribution, float64.

    ``confidence`` is the largest probability, ``entropy`` the negative entropy of the prediction,
    ``energy`` is ``T log Σ_k exp(z_k / T)`` and ``max_logit`` the largest logit.

    Raises:
        DataError: NaN or infinite input, or not exactly one of logits and probs.
        ConfigError: unknown score, one that needs logits, or a temperature that is not positive.

    Source: Hendrycks and Gimpel 2017 (arXiv:1610.02136); Liu et al. 2020 (arXiv:2010.03759).
    """
    if (logits is None) == (probs is None):
        raise DataError("give exactly one of logits and probs")
    if not temperature > 0:
        raise ConfigError(f"temperature must be positive, got {temperature:g}")
    given = as_tensor(logits if logits is not None else probs, "scores").double()
    if given.ndim != 2 or given.numel() == 0:
        raise DataError(f"expected non-empty [n, k], got {list(given.shape)}")
    if not bool(given.isfinite().all()):
        raise DataError("out-of-distribution scores need finite inputs, found NaN or infinity")
    if score in ("energy", "max_logit"):
        if logits is None:
            raise ConfigError(f"the score '{score}' needs logits")
        if score == "max_logit":
            return given.max(dim=1).values
        return temperature * torch.logsumexp(given / temperature, dim=1)
    if logits is not None:
        p = (given / temperature).softmax(dim=1)
    else:
        p = given
        if float(p.min()) < 0 or float((p.sum(dim=1) - 1).abs().max()) > 1e-3:
            raise DataError("probs must be non-negative rows that sum to 1; logits go to logits=")
    if score == "confidence":
        return p.max(dim=1).values
    if score == "entropy":
        return -torch.special.entr(p).sum(dim=1)
    raise ConfigError(f"unknown score '{score}': use confidence, entropy, energy or max_logit")


@dataclass(frozen=True)
class OodReport:
    """Figures of a detector; in-distribution examples are the positives unless said otherwise."""

    auroc: float
    aupr_in: float
    aupr_out: float
    """Average precision with out-of-distribution examples as positives."""
    fpr95: float
    fpr80: float
    detection_error: float


def ood_report(scores_in: Tensor | np.ndarray, scores_out: Tensor | np.ndarray) -> OodReport:
    """All figures below from the scores of in- and out-of-distribution examples."""
    inside, outside = _checked(scores_in), _checked(scores_out)
    return OodReport(
        auroc=ood_auroc(inside, outside),
        aupr_in=average_precision(inside, outside),
        aupr_out=average_precision(-outside, -inside),
        fpr95=false_positive_rate(inside, outside, 0.95)[0],
        fpr80=false_positive_rate(inside, outside, 0.80)[0],
        detection_error=detection_error(inside, outside),
    )


def ood_auroc(scores_in: Tensor | np.ndarray, scores_out: Tensor | np.ndarray) -> float:
    """Probability that an in-distribution score exceeds an out-of-distribution one, ties half."""
    inside, outside = _checked(scores_in), _checked(scores_out)
    ordered = outside.sort().values
    below = torch.searchsorted(ordered, inside)
    up_to = torch.searchsorted(ordered, inside, right=True)
    return float((below + up_to).double().mean()) / 2 / len(outside)


def false_positive_rate(
    scores_in: Tensor | np.ndarray, scores_out: Tensor | np.ndarray, recall: float = 0.95
) -> tuple[float, float]:
    """Share of out-of-distribution scores accepted, and the threshold, at a recall of the inside.

    The threshold is the largest that accepts at least ``recall`` of the in-distribution scores
    (``score >= threshold`` is accepted). FPR95 has recall 0.95.

    Raises:
        ConfigError: ``recall`` outside (0, 1].
    """
    if not 0 < recall <= 1:
        raise ConfigError(f"recall must lie in (0, 1], got {recall}")
    inside, outside = _checked(scores_in), _checked(scores_out)
    falling = inside.sort(descending=True).values
    needed = math.ceil(recall * len(falling) - 1e-9)
    threshold = falling[needed - 1]
    return float((outside >= threshold).double().mean()), float(threshold)


def average_precision(positive: Tensor | np.ndarray, negative: Tensor | np.ndarray) -> float:
    """Step-wise average precision (area under precision against recall), tied scores grouped."""
    up, down = _checked(positive), _checked(negative)
    true, false = _accepted(up, down)
    gained = torch.diff(true, prepend=true.new_zeros(1))
    return float((gained * true / (true + false)).sum() / len(up))


def detection_error(scores_in: Tensor | np.ndarray, scores_out: Tensor | np.ndarray) -> float:
    """Least mean of miss rate and false-alarm rate over all thresholds, in [0, 0.5]."""
    inside, outside = _checked(scores_in), _checked(scores_out)
    true, false = _accepted(inside, outside)
    error = (1 - true / len(inside) + false / len(outside)) / 2
    return min(0.5, float(error.min()))


def _accepted(inside: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    """Accepted of both kinds at every distinct threshold, falling."""
    values = torch.unique(torch.cat([inside, outside])).flip(0)
    below_in = torch.searchsorted(inside.sort().values, values)
    below_out = torch.searchsorted(outside.sort().values, values)
    return (len(inside) - below_in).double(), (len(outside) - below_out).double()


def _checked(scores: Tensor | np.ndarray) -> Float[Tensor, " n"]:
    values = as_tensor(scores, "scores").double()
    if values.ndim != 1 or len(values) == 0:
        raise DataError(f"scores must be a non-empty vector, got shape {list(values.shape)}")
    if not bool(values.isfinite().all()):
        raise DataError("scores hold NaN or infinite values")
    return values
