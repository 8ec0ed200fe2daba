"""Attribution from retrained subsets: golden numbers, scikit-learn, and a world that is linear."""

import json
from pathlib import Path

import pytest
import torch

from diffcal.attribution.datamodels import datamodel_scores, empirical_influence
from diffcal.attribution.lds import linear_datamodeling_score, predictions_of
from diffcal.attribution.subsets import subset_masks
from diffcal.errors import ConfigError, DataError, NumericalError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "das.json").read_text("utf-8"))


def linear_world(n=20, subsets=60, queries=3, noise=0.05):
    generator = torch.Generator().manual_seed(0)
    masks = subset_masks(n, subsets, seed=1)
    effect = torch.randn(queries, n, generator=generator, dtype=torch.float64)
    error = noise * torch.randn(subsets, queries, generator=generator, dtype=torch.float64)
    return masks, effect, 5 - masks.double() @ effect.mT + error


def test_golden_empirical_influence():
    masks = torch.tensor(GOLDEN["F_lds"]["masks"]).bool()
    losses = torch.tensor(GOLDEN["F_lds"]["losses"], dtype=torch.float64)
    expected = torch.tensor(GOLDEN["G_empirical_influence"]["emp"], dtype=torch.float64)
    # The golden numbers are "with minus without"; ours are larger for helpful examples.
    torch.testing.assert_close(-empirical_influence(masks, losses), expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("noise", [0.05, 3.0])
def test_datamodel_equals_ridge_cv(noise):
    from sklearn.linear_model import RidgeCV

    masks, _, losses = linear_world(subsets=33, noise=noise)
    ours = datamodel_scores(masks, losses, alphas=(0.1, 1.0, 10.0))
    for q in range(3):
        model = RidgeCV(alphas=(0.1, 1.0, 10.0), cv=5).fit(masks.numpy(), losses[:, q].numpy())
        torch.testing.assert_close(-ours[q], torch.tensor(model.coef_), rtol=1e-8, atol=1e-10)


def test_both_find_the_effects_of_a_linear_world():
    masks, effect, losses = linear_world(subsets=200)
    fresh = subset_masks(20, 40, seed=9)
    truth = 5 - fresh.double() @ effect.mT
    for scores, floor in (
        (datamodel_scores(masks, losses), 0.99),
        (empirical_influence(masks, losses), 0.85),
    ):
        found = linear_datamodeling_score(predictions_of(scores, fresh), truth, n_resamples=2)
        assert found.mean > floor


def test_bad_input_is_one_clear_line():
    masks, _, losses = linear_world(subsets=12)
    masks[:, 4] = True
    with pytest.raises(DataError, match="example 4 is in every subset or in none"):
        empirical_influence(masks, losses)
    with pytest.raises(DataError, match="11 rows of losses for 12 subsets"):
        datamodel_scores(masks, losses[:11])
    with pytest.raises(DataError, match="12 subsets cannot be split into 13 folds"):
        datamodel_scores(masks, losses, folds=13)
    with pytest.raises(ConfigError, match="strengths must be positive"):
        datamodel_scores(masks, losses, alphas=(0.0,))
    losses[2, 1] = float("nan")
    with pytest.raises(NumericalError, match="losses: 1 of 36"):
        datamodel_scores(masks, losses)
