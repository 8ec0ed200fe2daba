"""Is a generated image a copy of a training image, or made by one alone?"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from diffcal.attribution.scores import ScoreBlock
from diffcal.attribution.topk import TopScores
from diffcal.core.tensors import require_finite
from diffcal.errors import ConfigError, DataError

__all__ = [
    "MemorisationReport",
    "exceedance",
    "flag_beyond",
    "flag_memorised",
    "memorisation_report",
    "memorisation_thresholds",
]

MEASURES = ("nearest", "isolation", "dominance", "copy_score")

ROUNDING = 1e-9
ROUNDED = 1e-4
"""By how much a cosine of rounded vectors may exceed 1."""
_END = ScoreBlock(-1, torch.zeros(0, 0))


@dataclass(frozen=True)
class MemorisationReport:
    """What attribution and likeness say about each query; rows are queries."""

    top_index: Int64[Tensor, "q k"]
    """Training rows with the largest scores."""
    top_share: Float64[Tensor, "q k"]
    """Their shares of all positive attribution to the query, in [0, 1]."""
    contributors: Float64[Tensor, " q"]
    """Effective number ``(Σs)² / Σs²``: 1 if a single image has it all, n if all share alike."""
    nearest_index: Int64[Tensor, " q"]
    """Training row of the highest likeness."""
    nearest: Float64[Tensor, " q"]
    """That likeness."""
    isolation: Float64[Tensor, " q"]
    """``1 - d₁ / mean(d₂, d₃, ...)`` with distances ``d = 1 - likeness`` of the nearest training images:
    1 for a copy, 0 where the nearest is as far as the next ones, as for a plain image, which is like
    many."""
    copy_score: Float64[Tensor, " q"]
    """Largest product of attribution share and (positive) likeness over training rows, in [0, 1]
    for cosines: high only if the same image dominates and resembles."""
    copy_index: Int64[Tensor, " q"]
    """The training row of that product."""

    @property
    def dominance(self) -> Float64[Tensor, " q"]:
        """Share of the largest contributor."""
        return self.top_share[:, 0]


def memorisation_report(
    scores: Iterable[ScoreBlock],
    likeness: Iterable[ScoreBlock],
    *,
    top: int = 10,
    neighbours: int = 50,
) -> MemorisationReport:
    """Attribution and likeness of the same queries and training rows, joined in one pass.

    Args:
        scores: Attribution; negative scores count as none.
        likeness: At most 1, which stands for a copy; for example
            :func:`~.baselines.cosine_blocks` of encoder embeddings.
        top: Contributors to list.
        neighbours: Likeness ranks 2 to this many make the background of ``isolation``.

    Raises:
        DataError: the two do not cover the same rows, a query has no positive score, or likeness
            exceeds 1.
        NumericalError: NaN or infinite values.

    Source: the ratio to the background of neighbours follows Carlini et al. 2023 (arXiv:2301.13188),
    section 4.2, with ``1 - likeness`` (for cosines half the squared distance of unit vectors) in place
    of pixel distances; shares and their product with likeness are ours.
    """
    if top < 1 or neighbours < 2:
        raise ConfigError(f"top must be at least 1 and neighbours at least 2: {top}, {neighbours}")
    best, near = TopScores(top), TopScores(neighbours)
    total = squares = product = where = None
    first, second = iter(scores), iter(likeness)
    while True:
        left, right = next(first, _END), next(second, _END)
        if left is _END and right is _END:
            break
        if left.start != right.start or left.values.shape != right.values.shape:
            raise DataError("attribution and likeness cover different queries or training rows")
        s = require_finite(left.values, "scores").double().cpu().clamp(min=0)
        like = require_finite(right.values, "likeness").double().cpu()
        best.update(ScoreBlock(left.start, s))
        near.update(ScoreBlock(left.start, like))
        value, index = (s * like.clamp(min=0)).max(dim=1)
        index = index + left.start
        if total is None or squares is None or product is None or where is None:
            total, squares, product, where = s.sum(1), s.square().sum(1), value, index
        else:
            total, squares = total + s.sum(1), squares + s.square().sum(1)
            where = torch.where(value > product, index, where)
            product = torch.maximum(product, value)
    if total is None or squares is None or product is None or where is None:
        raise DataError("there are no scores")
    if bool((total <= 0).any()):
        query = int((total <= 0).nonzero()[0, 0])
        raise DataError(f"query {query} has no positive score, so nothing can be shared out")
    likest = near.values
    if float(likest.max()) > 1 + ROUNDED:
        raise DataError(
            f"likeness reaches {float(likest.max()):.6g}, beyond 1: give cosines or another measure "
            "that is 1 for equal images"
        )
    return MemorisationReport(
        top_index=best.index,
        top_share=best.values / total[:, None],
        contributors=total.square() / squares,
        nearest_index=near.index[:, 0],
        nearest=likest[:, 0],
        isolation=_isolation(likest),
        copy_score=product / total,
        copy_index=where,
    )


def _isolation(likest: Float64[Tensor, "q m"]) -> Float64[Tensor, " q"]:
    distances = (1 - likest).clamp(min=0)
    if distances.shape[1] == 1:
        return torch.zeros_like(distances[:, 0])
    background = distances[:, 1:].mean(dim=1)
    # Nothing stands out from neighbours that are copies too.
    ratio = torch.where(background > 0, distances[:, 0] / background, 1.0)
    return 1 - ratio


def memorisation_thresholds(
    reference: MemorisationReport, quantile: float = 0.99
) -> dict[str, float]:
    """How far images that cannot be copies go: this quantile of each measure.

    Args:
        reference: Report of real images that the model was not trained on.

    Returns:
        ``nearest``, ``isolation``, ``dominance``, ``copy_score``.

    Raises:
        ConfigError: the quantile is not between 0 and 1, or finer than the reference can tell.
    """
    count = len(reference.nearest)
    if not 0 < quantile < 1:
        raise ConfigError(f"quantile must lie strictly between 0 and 1, got {quantile}")
    if count * (1 - quantile) < 1 - ROUNDING:
        raise ConfigError(
            f"{count} reference images cannot tell the {quantile} quantile: give at least "
            f"{-int(-(1 - ROUNDING) // (1 - quantile))} or lower it"
        )
    return {name: float(getattr(reference, name).quantile(quantile)) for name in MEASURES}


def flag_beyond(
    report: MemorisationReport, thresholds: dict[str, float]
) -> dict[str, Bool[Tensor, " q"]]:
    """Queries beyond :func:`memorisation_thresholds`; keys as of :func:`flag_memorised`."""
    beyond = {name: getattr(report, name) > limit for name, limit in thresholds.items()}
    return {
        "near_copy": beyond["nearest"] & beyond["isolation"],
        "dominated": beyond["dominance"],
        "memorised": beyond["copy_score"],
    }


def flag_memorised(
    report: MemorisationReport, reference: MemorisationReport, quantile: float = 0.99
) -> dict[str, Bool[Tensor, " q"]]:
    """Queries that stand out from images which cannot be copies.

    Args:
        reference: Report of real images that the model was not trained on.
        quantile: A query is flagged beyond this quantile of the reference, so that about
            ``1 - quantile`` of harmless queries are flagged as well.

    Returns:
        ``near_copy`` (likeness and isolation), ``dominated`` (share of one image) and ``memorised``
        (the product of share and likeness).

    Raises:
        ConfigError: the quantile is not between 0 and 1, or finer than the reference can tell.
    """
    return flag_beyond(report, memorisation_thresholds(reference, quantile))


def exceedance(
    values: Float64[Tensor, " q"], reference: Float64[Tensor, " r"]
) -> Float64[Tensor, " q"]:
    """Chance that a harmless image reaches each value: ``(1 + #{reference >= value}) / (1 + r)``.

    A valid p-value where queries that are no copies and reference images come from one distribution.
    """
    ordered = reference.sort().values
    at_least = len(ordered) - torch.searchsorted(ordered, values.contiguous(), side="left")
    return (1 + at_least).double() / (1 + len(ordered))
