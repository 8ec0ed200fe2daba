"""Shares of groups: sums, weights, intervals, and what signed scores count with."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffcal.attribution.groups import group_rows, group_shares
from diffcal.attribution.scores import ScoreBlock
from diffcal.errors import ConfigError, DataError, NumericalError

SCORES = torch.tensor([[4.0, 1.0, 0.0, 5.0], [0.0, 2.0, 2.0, 0.0]])
LABELS = ["van Gogh", "Hokusai", "van Gogh", "Munch"]


def blocks(values, size=3):
    for start in range(0, values.shape[1], size):
        yield ScoreBlock(start, values[:, start : start + size])


def test_shares_lift_and_royalties_of_a_small_case():
    shares = group_shares(blocks(SCORES), LABELS, n_resamples=50)
    assert shares.names == ("van Gogh", "Hokusai", "Munch")
    expected = torch.tensor([[0.4, 0.1, 0.5], [0.5, 0.5, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(shares.per_query, expected)
    assert shares.mean.tolist() == pytest.approx([0.45, 0.3, 0.25])
    assert shares.data_share.tolist() == pytest.approx([0.5, 0.25, 0.25])
    assert shares.lift.tolist() == pytest.approx([0.9, 1.2, 1.0])
    paid = shares.royalties(200.0)
    assert paid == pytest.approx({"van Gogh": 90, "Hokusai": 60, "Munch": 50})
    weighted = group_shares(blocks(SCORES), LABELS, weights=torch.tensor([3.0, 1.0]))
    assert weighted.mean.tolist() == pytest.approx([0.425, 0.2, 0.375])
    for group, spread in enumerate(shares.spread):
        assert expected[:, group].min() - 1e-12 <= spread.low <= spread.high
        assert spread.high <= expected[:, group].max() + 1e-12


def test_signed_scores_count_with_their_positive_part_or_their_size():
    signed = torch.tensor([[3.0, -1.0, -4.0, 1.0]])
    positive = group_shares(blocks(signed), LABELS)
    assert positive.per_query[0].tolist() == pytest.approx([0.75, 0.0, 0.25])
    absolute = group_shares(blocks(signed), LABELS, part="absolute")
    assert absolute.per_query[0].tolist() == pytest.approx([7 / 9, 1 / 9, 1 / 9])


@settings(deadline=None, max_examples=20)
@given(size=st.integers(1, 20), groups=st.integers(1, 5), seed=st.integers(0, 99))
def test_shares_sum_to_one_and_blocks_change_nothing(size, groups, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(3, 17, generator=generator, dtype=torch.float64)
    labels = [i % groups for i in range(17)]
    shares = group_shares(blocks(scores, size), labels, n_resamples=10)
    torch.testing.assert_close(shares.per_query.sum(1), torch.ones(3, dtype=torch.float64))
    assert float(shares.mean.sum()) == pytest.approx(1)
    for group in range(groups):
        mine = scores[:, [i for i in range(17) if i % groups == group]].sum(1) / scores.sum(1)
        torch.testing.assert_close(shares.per_query[:, group], mine)


def test_interval_is_that_of_a_mean_over_queries():
    scores = torch.rand(400, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares = group_shares(blocks(scores), ["a", "b"])
    error = float(shares.per_query[:, 0].std()) / 20
    assert shares.spread[0].sd == pytest.approx(error, rel=0.15)
    assert shares.spread[0].high - shares.spread[0].low == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_bad_input_is_one_clear_line():
    assert group_rows([])[0] == ()
    with pytest.raises(DataError, match="scores cover 3 training rows, there are 4 labels"):
        group_shares(blocks(SCORES[:, :3]), LABELS)
    with pytest.raises(DataError, match="do not continue at 3 of 3 labels"):
        group_shares(blocks(SCORES), LABELS[:3])
    with pytest.raises(DataError, match="query 0 has no positive score"):
        group_shares(blocks(-SCORES), LABELS)
    with pytest.raises(ConfigError, match="unknown part 'negative'"):
        group_shares(blocks(SCORES), LABELS, part="negative")
    with pytest.raises(ConfigError, match="weights must be 2 non-negative numbers"):
        group_shares(blocks(SCORES), LABELS, weights=torch.tensor([0.0, 0.0]))
    bad = SCORES.clone()
    bad[1, 2] = float("nan")
    with pytest.raises(NumericalError, match="scores: 1 of 6"):
        group_shares(blocks(bad), LABELS)
