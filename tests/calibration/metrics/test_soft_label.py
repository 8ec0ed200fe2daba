"""Distances between people's label shares and a model's."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from diffcal.calibration.metrics.soft_label import (
    DIVERGENCES,
    compare_soft_labels,
    entropies,
    entropy_spearman,
    jensen_shannon,
    kullback_leibler,
    total_variation,
)
from diffcal.errors import DataError

GOLDEN = json.loads((Path(__file__).parents[2] / "golden/csm.json").read_text("utf-8"))["cases"]
DOUBLE = torch.float64


def distributions(seed, rows=30, classes=5):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, rows, classes, generator=generator, dtype=DOUBLE)
    return logits.softmax(dim=2)


def test_golden_soft_label_metrics():
    case = GOLDEN["soft_label_metrics"]
    for row in case["cases"]:
        human, model = (torch.tensor([row[key]], dtype=DOUBLE) for key in ("human", "model"))
        names = {"tv": "tv", "kl": "kl_human_model", "js": "js", "l2": "l2", "soft_ce": "soft_ce"}
        found = compare_soft_labels(human, model)
        for name, key in names.items():
            assert float(DIVERGENCES[name](human, model)) == pytest.approx(
                row[key], rel=case["rtol"], abs=1e-15
            )
            assert found[name] == pytest.approx(row[key], rel=case["rtol"], abs=1e-15)
        for side in ("human", "model"):
            assert found[f"entropy_{side}"] == pytest.approx(
                row[f"entropy_{side}"], rel=case["rtol"], abs=1e-15
            )


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_bounds_and_inequalities(seed):
    human, model = distributions(seed)
    tv, kl, js = (f(human, model) for f in (total_variation, kullback_leibler, jensen_shannon))
    assert bool((kl >= 2 * tv.square() - 1e-12).all())  # Pinsker
    assert bool((js <= torch.tensor(2.0).log() + 1e-12).all())
    torch.testing.assert_close(js, jensen_shannon(model, human))
    for measure in (total_variation, kullback_leibler, jensen_shannon):
        assert float(measure(human, human).abs().max()) < 1e-12


def test_a_class_that_the_model_excludes_costs_infinitely():
    human, model = torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]])
    assert float(kullback_leibler(human, model)) == float("inf")
    assert float(kullback_leibler(model, human)) == pytest.approx(0.6931472, rel=1e-6)
    assert float(jensen_shannon(human, model)) < 0.3


@pytest.mark.parametrize("seed", range(3))
def test_spearman_of_entropies_equals_scipy(seed):
    human, model = distributions(seed)
    human[:10] = human[0]  # ties, also with classes in another order
    human[3] = human[0].flip(0)
    wanted = spearmanr(entropies(human).numpy().round(9), entropies(model).numpy()).statistic
    assert entropy_spearman(human, model) == pytest.approx(wanted, abs=1e-12)
    assert entropy_spearman(human, human) == pytest.approx(1)
    assert torch.tensor(entropy_spearman(human, torch.eye(5)[torch.zeros(30).long()])).isnan()


def test_bad_distributions_are_named():
    good = torch.full((3, 4), 0.25)
    bad = good.clone()
    bad[1, 0] = 0.5
    with pytest.raises(DataError, match=r"model row 1 .*sum 1\.25"):
        compare_soft_labels(good, bad)
    bad[1] = torch.tensor([1.5, -0.5, 0, 0])
    with pytest.raises(DataError, match="human row 1"):
        compare_soft_labels(bad, good)
    bad[1] = torch.nan
    with pytest.raises(DataError, match="model row 1"):
        compare_soft_labels(good, bad)
    with pytest.raises(DataError, match="same shape"):
        compare_soft_labels(good[:0], good[:0])
    assert compare_soft_labels(good, good)["top_agreement"] == 1
