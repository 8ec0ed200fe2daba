"""One pass over the training images: the largest scores, likeness, copies and shares of groups."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from diffcal.attribution.ensemble import ScoredModel, ensemble_scores
from diffcal.attribution.groups import GroupShares, group_shares
from diffcal.attribution.memorisation import MemorisationReport, memorisation_report
from diffcal.attribution.score_config import ScoreConfig
from diffcal.attribution.scores import ScoreBlock
from diffcal.attribution.topk import TopScores
from diffcal.core.devices import one_thread
from diffcal.workflows.das_likeness import Likeness

__all__ = ["Found", "Ranked", "search", "shares_of_groups"]


@dataclass(frozen=True)
class Ranked:
    """Training positions and values of each query, best first."""

    index: Int64[Tensor, "q k"]
    values: Float[Tensor, "q k"]

    @classmethod
    def of(cls, top: TopScores, queries: int) -> "Ranked":
        """The first ``queries`` rows of what was collected."""
        return cls(top.index[:queries], top.values[:queries])


@dataclass(frozen=True)
class Found:
    """Everything that the pass gives about the queries, and what held-out images show."""

    top: Ranked
    lowest: Ranked
    nearest: Ranked
    top_likeness: Tensor
    total: Tensor
    """Sum of absolute scores of each query."""
    memorisation: MemorisationReport
    held_out: MemorisationReport | None
    groups: dict[str, GroupShares]
    """By column; ``class`` is always there."""


def search(
    config: ScoreConfig,
    models: Sequence[ScoredModel],
    likeness: Likeness,
    labels: Mapping[str, Sequence[str]],
    queries: int,
    *,
    top: int,
    nearest: int,
    background: int,
) -> Found:
    """Scores of all query rows against all training rows, streamed.

    Args:
        models: Features of the queries, followed by those of held-out images if there are any.
        likeness: Of the same rows.
        labels: Group of every training image, by column.
        queries: How many of the rows are queries.
        top, nearest: Training images to keep for each.
        background: Likeness ranks against which a near copy stands out.
    """
    n = len(models[0].rows)
    best, lowest = TopScores(top), TopScores(nearest, largest=False)
    near = TopScores(nearest)
    totals: list[Tensor] = []

    def ranked() -> Iterator[ScoreBlock]:
        for start, values in ensemble_scores(config, models):
            block = ScoreBlock(start, values.cpu())
            best.update(block)
            lowest.update(block)
            # Negative scores matter as well: what is shared out is their size.
            totals.append(block.values.double().abs().sum(dim=1))
            yield ScoreBlock(block.start, block.values.abs())

    def alike(blocks: Iterator[ScoreBlock]) -> Iterator[ScoreBlock]:
        for start, values in blocks:
            block = ScoreBlock(start, likeness.block(range(start, start + values.shape[1])))
            near.update(block)
            yield block

    with one_thread():
        # Both sides advance together, so that one block is held; groups take a second pass, which
        # costs little beside gradients.
        sizes, twins = itertools.tee(ranked())
        report = memorisation_report(
            sizes, alike(twins), top=1, neighbours=max(2, min(background, n))
        )
        chosen = best.index[:queries].unique()
        column = torch.searchsorted(chosen, best.index[:queries])
        top_likeness = likeness.block(chosen.tolist())[:queries].gather(1, column)
        groups = shares_of_groups(config, models, labels, queries)
    return Found(
        Ranked.of(best, queries),
        Ranked.of(lowest, queries),
        Ranked.of(near, queries),
        top_likeness,
        torch.stack(totals).sum(dim=0)[:queries],
        _rows(report, slice(0, queries)),
        _rows(report, slice(queries, None)) if len(report.nearest) > queries else None,
        groups,
    )


def shares_of_groups(
    config: ScoreConfig,
    models: Sequence[ScoredModel],
    labels: Mapping[str, Sequence[str]],
    queries: int,
) -> dict[str, GroupShares]:
    """Shares of attribution of each group of training images, by column."""

    def scored() -> Iterator[ScoreBlock]:
        for start, values in ensemble_scores(config, models):
            yield ScoreBlock(start, values[:queries].cpu())

    return {
        column: group_shares(scored(), values, part="absolute") for column, values in labels.items()
    }


def _rows(report: MemorisationReport, rows: slice) -> MemorisationReport:
    return MemorisationReport(
        **{field.name: getattr(report, field.name)[rows] for field in fields(report)}
    )
