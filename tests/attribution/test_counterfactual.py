"""Distances between images, paired differences and their intervals, random removals."""

import pytest
import torch

from diffcal.attribution.counterfactual import (
    embedding_cosine,
    paired_effect,
    pixel_distance,
    random_removals,
    removal_effect,
)
from diffcal.errors import ConfigError, DataError, NumericalError


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_pixel_distance_is_in_model_units():
    black = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    other = black.clone()
    other[0] = 255
    other[1, 0, 0, 0] = 255
    # All 48 pixels differ by 2; then a single one does.
    assert pixel_distance(black, other).tolist() == pytest.approx([2 * 48**0.5, 2.0])
    with pytest.raises(DataError, match="cannot compare images"):
        pixel_distance(black, other[:1])


def test_cosine_with_and_without_the_common_part():
    common = torch.full((3,), 100.0)
    a, b = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    assert float(embedding_cosine(common + a, common + b)) > 0.999
    assert float(embedding_cosine(common + a, common + b, common)) == pytest.approx(0, abs=1e-6)
    assert float(embedding_cosine(a, 3 * a)) == pytest.approx(1)
    assert float(embedding_cosine(a, 0 * a)) == 0
    with pytest.raises(NumericalError):
        embedding_cosine(a, a * float("nan"))


def test_intervals_of_one_model_are_those_of_a_mean_over_queries():
    values = 3 + normal(400, 1)
    effect = removal_effect(values)
    assert effect.mean == pytest.approx(float(values.mean()))
    standard = float(values.std()) / 20
    assert effect.spread.sd == pytest.approx(standard, rel=0.1)
    assert effect.spread.low < effect.mean < effect.spread.high
    assert effect.spread.high - effect.spread.low == pytest.approx(2 * 1.96 * standard, rel=0.15)


def test_models_in_common_widen_the_interval():
    # Nine models, each with its own luck in all queries: more queries do not help.
    luck = normal(1, 9, seed=1)
    values = luck.expand(500, 9) + 0.01 * normal(500, 9, seed=2)
    assert removal_effect(values).spread.sd == pytest.approx(
        float(luck.std(correction=0)) / 3, rel=0.1
    )


def test_pairing_takes_the_queries_own_scale_away():
    base = 10 * normal(60, 1).abs()
    effect = paired_effect(base + 1, base)
    assert effect.mean == pytest.approx(1)
    assert effect.spread.sd < 1e-9
    assert effect.larger == 1
    assert paired_effect(base, base).larger == 0.5
    several = paired_effect(base + 1, torch.cat([base - 1, base + 1], dim=1))
    assert several.mean == pytest.approx(1)
    assert several.spread.low < 0.1
    assert several.spread.high > 1.9
    with pytest.raises(DataError, match="60 queries cannot be paired with 59"):
        paired_effect(base, base[1:])
    with pytest.raises(DataError, match="expected distances"):
        removal_effect(torch.zeros(0, 3))


def test_random_removals_are_decided_one_by_one():
    two, three = random_removals(50, 7, 2, seed=3), random_removals(50, 7, 3, seed=3)
    assert three[:2] == two
    for rows in three:
        assert len(set(rows)) == 7
        assert 0 <= min(rows) <= max(rows) < 50
    assert random_removals(50, 7, 1, seed=4) != two[:1]
    for count in (0, 50):
        with pytest.raises(ConfigError, match=f"cannot remove {count} of 50"):
            random_removals(50, count, 1)
