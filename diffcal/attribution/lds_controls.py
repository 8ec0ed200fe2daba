"""What an LDS must be compared with before it means anything."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from diffcal.attribution.lds import LDS, linear_datamodeling_score
from diffcal.errors import DataError

__all__ = ["centred_losses", "lds_controls", "shuffled_predictions"]


def lds_controls(
    predictions: Float[Tensor, "s q"],
    losses: Float[Tensor, "s q"],
    *,
    likeness: Mapping[str, Float[Tensor, "s q"]] | None = None,
    seed: int = 0,
    n_resamples: int = 500,
) -> dict[str, LDS]:
    """LDS of the scores and of what they have to beat.

    - ``score``: the attribution itself;
    - ``shuffled``: every query judged by another query's scores. What is left does not depend on the
      query;
    - ``query_average``: every query judged by the mean scores, the same part without its noise;
    - ``centred``: scores against losses minus their mean over queries, the part of the loss that a
      query does not share with the others;
    - ``likeness:NAME``: predictions from likeness alone (pixels, embeddings). An attribution that
      does not beat it says no more than a search for similar images.

    Args:
        likeness: Predictions of such scores (:func:`~.lds.predictions_of`).

    Raises:
        DataError: a single query, for which there is nothing to shuffle.
    """
    variants: dict[str, tuple[Tensor, Tensor]] = {
        "score": (predictions, losses),
        "shuffled": (shuffled_predictions(predictions, seed), losses),
        "query_average": (predictions.mean(dim=1, keepdim=True).expand_as(predictions), losses),
        "centred": (predictions, centred_losses(losses)),
    }
    for name, other in (likeness or {}).items():
        variants[f"likeness:{name}"] = (other, losses)
    return {
        name: linear_datamodeling_score(guess, truth, n_resamples=n_resamples, seed=seed)
        for name, (guess, truth) in variants.items()
    }


def shuffled_predictions(predictions: Float[Tensor, "s q"], seed: int = 0) -> Float[Tensor, "s q"]:
    """Columns along a random cycle through all queries: no query keeps its own."""
    queries = predictions.shape[1]
    if queries < 2:
        raise DataError("controls need at least two queries")
    cycle = torch.randperm(queries, generator=torch.Generator().manual_seed(seed))
    source = torch.empty_like(cycle)
    source[cycle] = cycle.roll(1)
    return predictions[:, source.to(predictions.device)]


def centred_losses(losses: Float[Tensor, "s q"]) -> Float64[Tensor, "s q"]:
    """Losses minus each subset's mean over queries."""
    return losses.double() - losses.double().mean(dim=1, keepdim=True)
