"""The LDS of methods that are fitted on subset losses: judged on other subsets than they have seen."""

from typing import Any, cast

from jaxtyping import Bool, Float
from torch import Tensor

from diffcal.attribution.datamodels import SubsetMethod, subset_scores
from diffcal.attribution.lds import LDS, linear_datamodeling_score, predictions_of
from diffcal.attribution.lds_controls import centred_losses, shuffled_predictions
from diffcal.attribution.lds_folds import cross_fitted_lds, rest_of, subset_folds
from diffcal.workflows.das_lds_config import LdsConfig

__all__ = ["plain_lds", "subset_record"]


def subset_record(
    method: str,
    kind: str,
    losses: Float[Tensor, "s q"],
    masks: Bool[Tensor, "s n"],
    alike: Float[Tensor, "s q"],
    config: LdsConfig,
) -> dict[str, Any]:
    """One result of ``lds.json``: fitted without each of ``config.folds`` folds, judged on that fold.

    Args:
        kind: Name of the set of queries.
        alike: Predictions from the likeness of pixels.

    Raises:
        DataError: too few subsets, or a training image that the rest of a fold holds always or never.
    """
    folds = subset_folds(len(masks), config.folds)
    rests = [rest_of(held, len(masks)) for held in folds]
    guesses = [
        predictions_of(subset_scores(cast(SubsetMethod, method), masks[rest], losses[rest]), masks)
        for rest in rests
    ]

    def judged(tables: list[Tensor], truth: Tensor) -> LDS:
        return cross_fitted_lds(tables, truth, folds, n_resamples=config.resamples)

    controls = {
        "shuffled": judged([shuffled_predictions(guess) for guess in guesses], losses),
        "query_average": judged(
            [guess.mean(dim=1, keepdim=True).expand_as(guess) for guess in guesses], losses
        ),
        "centred": judged(guesses, centred_losses(losses)),
        "likeness:pixels": linear_datamodeling_score(alike, losses, n_resamples=config.resamples),
    }
    return {
        "method": method,
        "readout": "signed",
        "queries": kind,
        "lds": plain_lds(judged(guesses, losses)),
        "controls": {name: plain_lds(value) for name, value in controls.items()},
        "damping_choice": None,
    }


def plain_lds(lds: LDS) -> dict[str, Any]:
    """An LDS as JSON values."""
    return {
        "mean": lds.mean,
        "low": lds.over_both.low,
        "high": lds.over_both.high,
        "sd_over_subsets": lds.over_subsets.sd,
        "subsets": lds.subsets,
        "queries": lds.queries,
    }
