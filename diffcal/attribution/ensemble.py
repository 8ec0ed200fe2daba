"""Scores of several models on the same queries and training rows, as one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.attribution.kernel import Kernel
from diffcal.attribution.kernel_updates import update_kernel
from diffcal.attribution.readouts import read_out
from diffcal.attribution.rows import ChosenRows, Rows, as_rows
from diffcal.attribution.score_config import ScoreConfig, score_features
from diffcal.attribution.scores import ScoreBlock, average_blocks
from diffcal.errors import DataError

__all__ = ["ScoredModel", "ensemble_scores"]


@dataclass(frozen=True)
class ScoredModel:
    """What one model (or checkpoint) contributes."""

    queries: Float[Tensor, "q k"]
    rows: Rows | Tensor
    kernel: Kernel | None = None
    errors: Float[Tensor, "n t"] | None = None

    def keeping(self, positions: Sequence[int]) -> "ScoredModel":
        """The same as if there were no other training rows than those at ``positions``, in their order.

        The kernel is changed by :func:`~.kernel_updates.update_kernel`, not fitted again.

        Raises:
            DataError: no row is left.
        """
        rows = as_rows(self.rows)
        kept = set(positions)
        gone = [position for position in range(len(rows)) if position not in kept]
        if not gone:
            return self
        kernel = self.kernel
        if kernel is not None:
            removed = torch.cat(list(ChosenRows(rows, gone).blocks()))
            kernel = update_kernel(kernel, removed=removed)
        errors = None if self.errors is None else self.errors[sorted(kept)]
        return ScoredModel(self.queries, ChosenRows(rows, positions), kernel, errors)


def ensemble_scores(config: ScoreConfig, models: Sequence[ScoredModel]) -> Iterator[ScoreBlock]:
    """Scores averaged over models, block by block of training rows.

    With ``config.average`` ``scores`` every model's scores are read out and then averaged (the mean of
    squares for DAS), with ``signed`` the signed scores are averaged and then read out (TRAK's
    ensembles; the same thing for signed scores). Each model has its own kernel and its own absolute
    damping. TracInCP is the mean of gradient dot products over checkpoints, GAS that of cosines
    (Pruthi et al. 2020, arXiv:2002.08484; Hammoudeh and Lowd 2022, arXiv:2201.10055).

    Raises:
        DataError: no models, or of different queries or training rows.
    """
    if not models:
        raise DataError("give the features of at least one model")
    signed = config.average == "signed"
    inner = replace(config, readout="signed") if signed else config
    blocks = average_blocks(
        [
            score_features(
                inner, model.queries, model.rows, kernel=model.kernel, errors=model.errors
            )
            for model in models
        ]
    )
    for block in blocks:
        values = read_out(block.values, config.readout) if signed else block.values
        yield ScoreBlock(block.start, values)
