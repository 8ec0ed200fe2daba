"""Calibration of every class probability, one class against the rest."""

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.calibration.metrics.binning import (
    Scheme,
    assign_bins,
    assign_width,
    bin_sums,
    mass_edges_of_values,
)
from diffcal.calibration.metrics.inputs import Confidences, Predictions
from diffcal.core.tensors import as_tensor
from diffcal.errors import ConfigError, DataError

__all__ = [
    "adaptive_calibration_error",
    "classwise_calibration_error",
    "classwise_calibration_errors",
    "group_calibration_errors",
    "top_label_calibration_error",
]


def classwise_calibration_errors(
    predictions: Predictions, n_bins: int = 15, scheme: Scheme = "width", norm: float = 1.0
) -> Float[Tensor, " k"]:
    """Binned calibration error of each class probability, float64.

    For class k: ``(Σ_b n_kb/N |mean of 1[y = k] - mean of p_k|^p)^(1/p)`` over bins of ``p_k``; a
    soft label's entry takes the place of the indicator. Classes absent from the labels count.

    Raises:
        ConfigError: unusable binning, or ``norm`` below 1.
    """
    if norm < 1:
        raise ConfigError(f"norm must be at least 1, got {norm}")
    key = ("classwise", n_bins, scheme, norm)
    if scheme == "width":
        return predictions.cached(key, lambda: _width_errors(predictions, n_bins, norm))
    return predictions.cached(key, lambda: _sorted_errors(predictions, n_bins, scheme, norm))


def classwise_calibration_error(
    predictions: Predictions, n_bins: int = 15, scheme: Scheme = "width", norm: float = 1.0
) -> float:
    """Mean over classes of :func:`classwise_calibration_errors`: ``(mean_k CE_k^p)^(1/p)``.

    Also called SCE or classwise-ECE. With the scheme ``mass`` nearly all bins hold probabilities
    close to 0 and the upper range falls into one or two bins: a poor ranking of models.

    Source: Kull et al. 2019 (arXiv:1910.12656); Nixon et al. 2019 (arXiv:1904.01685).
    """
    errors = classwise_calibration_errors(predictions, n_bins, scheme, norm)
    return float(errors.pow(norm).mean() ** (1 / norm))


def adaptive_calibration_error(
    predictions: Predictions, n_bins: int = 15, threshold: float = 0.0
) -> float:
    """ACE of Nixon et al.: per class, groups of equal count, summed gaps weighted by count over N.

    Only probabilities above ``threshold`` count (an exact 0 never does). Above 0 this is TACE; the
    paper uses 1e-3 and 1e-2. The mean runs over all classes, one without any such probability
    contributing 0, as its weight.

    Source: Nixon et al. 2019 (arXiv:1904.01685), section 3.
    """
    values = []
    for index in range(predictions.classes):
        p, t = predictions.class_probs(index), predictions.class_targets(index)
        kept = p > threshold
        p, t = p[kept], t[kept]
        if len(p):
            sums = bin_sums(Confidences(p.clamp(max=1), t), n_bins, "rank").filled
            values.append(float((sums.count * sums.gap.abs()).sum()) / len(predictions))
    return sum(values) / predictions.classes


def top_label_calibration_error(
    predictions: Predictions,
    n_bins: int = 15,
    scheme: Scheme = "width",
    norm: float = 1.0,
    min_count: int = 1,
) -> float:
    """Gap within bins inside each predicted class, weighted by counts (class-conditional ECE).

    Bins with fewer than ``min_count`` examples are left out, together with their weight; NaN if none
    is large enough.

    Source: Gupta and Ramdas 2022 (arXiv:2107.08353).
    """
    gaps, counts = [], []
    for index in torch.unique(predictions.predicted).tolist():
        rows = predictions.predicted == index
        part = Confidences(predictions.confidence[rows].clamp(max=1), predictions.outcome[rows])
        sums = bin_sums(part, n_bins, scheme).filled
        large = sums.count >= min_count
        gaps.append(sums.gap[large].abs())
        counts.append(sums.count[large])
    gap, count = torch.cat(gaps), torch.cat(counts)
    if not len(gap):
        return float("nan")
    return float(((count * gap**norm).sum() / count.sum()) ** (1 / norm))


def group_calibration_errors(
    predictions: Predictions,
    groups: Tensor | np.ndarray | Literal["predicted", "label"] = "predicted",
    n_bins: int = 15,
    scheme: Scheme = "width",
) -> dict[int, dict[str, float]]:
    """Count, accuracy, mean confidence and top-label ECE of each group of examples.

    Args:
        groups: ``[n]`` integers, or ``"predicted"`` or ``"label"`` for the classes (the largest
            entry of a soft label).

    Raises:
        DataError: not one integer for each example.
    """
    if isinstance(groups, str):
        if groups == "predicted":
            ids = predictions.predicted
        elif groups == "label":
            hard = predictions.labels
            ids = hard if hard is not None else predictions.targets().argmax(dim=1)
        else:
            raise ConfigError(f"groups must be a tensor, 'predicted' or 'label', got '{groups}'")
    else:
        given = as_tensor(groups, "groups")
        if given.is_floating_point() or given.shape != (len(predictions),):
            raise DataError(
                f"groups must be integers [{len(predictions)}], got {given.dtype} {list(given.shape)}"
            )
        ids = given.to(predictions.predicted)
    table = {}
    for index in torch.unique(ids).tolist():
        rows = ids == index
        part = Confidences(predictions.confidence[rows].clamp(max=1), predictions.outcome[rows])
        sums = bin_sums(part, n_bins, scheme)
        table[int(index)] = {
            "count": float(len(part)),
            "accuracy": part.mean_outcome,
            "confidence": float(part.confidence.mean()),
            "ece": float((sums.confidence - sums.outcome).abs().sum() / len(part)),
        }
    return table


def class_width_sums(
    predictions: Predictions, n_bins: int
) -> tuple[Float[Tensor, "k m"], Float[Tensor, "k m"], Float[Tensor, "k m"]]:
    """Counts, sums of probabilities and sums of outcomes per class and equal-width bin, one pass."""

    def make() -> tuple[Tensor, Tensor, Tensor]:
        k, cells = predictions.classes, predictions.classes * n_bins
        device = predictions.confidence.device
        offset = torch.arange(k, device=device) * n_bins
        count = torch.zeros(cells, dtype=torch.float64, device=device)
        mass, hits = torch.zeros_like(count), torch.zeros_like(count)
        for rows in predictions.row_blocks():
            p = predictions.probs(rows)
            cell = assign_width(p, n_bins).add_(offset)
            flat = cell.flatten()
            count += torch.bincount(flat, minlength=cells)
            mass += torch.bincount(flat, weights=p.flatten(), minlength=cells)
            if predictions.labels is not None:
                label_cell = cell.gather(1, predictions.labels[rows][:, None])[:, 0]
                hits += torch.bincount(label_cell, minlength=cells)
            else:
                q = predictions.targets(rows).flatten()
                hits += torch.bincount(flat, weights=q, minlength=cells)
        return count.view(k, -1), mass.view(k, -1), hits.view(k, -1)

    return predictions.cached(("class width sums", n_bins), make)


def _width_errors(predictions: Predictions, n_bins: int, norm: float) -> Float[Tensor, " k"]:
    count, mass, hits = class_width_sums(predictions, n_bins)
    n = len(predictions)
    if norm == 1:
        return (mass - hits).abs().sum(dim=1) / n
    gap = torch.where(count > 0, (mass - hits).abs() / count.clamp(min=1), 0)
    if np.isinf(norm):
        return gap.max(dim=1).values
    return (count / n * gap**norm).sum(dim=1) ** (1 / norm)


def _sorted_errors(
    predictions: Predictions, n_bins: int, scheme: Scheme, norm: float
) -> Float[Tensor, " k"]:
    errors = torch.empty(predictions.classes, dtype=torch.float64, device=predictions.scores.device)
    for index in range(predictions.classes):
        p = predictions.class_probs(index).clamp(max=1)
        t = predictions.class_targets(index)
        if scheme == "mass":
            edges = mass_edges_of_values(p, n_bins)
            bins = assign_bins(p, edges)
            count = torch.bincount(bins, minlength=len(edges) - 1).double()
            gap = torch.bincount(bins, weights=p - t, minlength=len(edges) - 1).abs()
        else:
            sums = bin_sums(Confidences(p, t), n_bins, scheme)
            count, gap = sums.count, (sums.confidence - sums.outcome).abs()
        gap = gap / count.clamp(min=1)
        if np.isinf(norm):
            errors[index] = gap.max()
        else:
            errors[index] = (count / len(p) * gap**norm).sum() ** (1 / norm)
    return errors
