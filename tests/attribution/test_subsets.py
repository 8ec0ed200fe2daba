"""Subset masks: exact sizes, stratified, stable, and even over examples."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffcal.attribution.subsets import leave_out_masks, subset_masks
from diffcal.errors import ConfigError, DataError


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(2, 40),
    count=st.integers(1, 6),
    fraction=st.floats(0.05, 0.95),
    classes=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_sizes_classes_and_prefixes(n, count, fraction, classes, seed):
    size = math.floor(fraction * n + 0.5)
    if not 0 < size < n:
        with pytest.raises(ConfigError, match="test nothing"):
            subset_masks(n, count, fraction=fraction)
        return
    labels = torch.arange(n) % classes
    masks = subset_masks(n, count, fraction=fraction, seed=seed, labels=labels)
    assert masks.sum(dim=1).tolist() == [size] * count
    for c in range(classes):
        exact = float((labels == c).sum()) * size / n
        inside = masks[:, labels == c].sum(dim=1).double()
        assert bool(((inside - exact).abs() < 1).all())
    longer = subset_masks(n, count + 3, fraction=fraction, seed=seed, labels=labels)
    assert torch.equal(longer[:count], masks)


def test_every_example_and_pair_is_equally_likely():
    masks = subset_masks(10, 1000, seed=4).double()
    # Share 1/2, standard error 0.016; pairs 2/9, standard error 0.013.
    assert (masks.mean(0) - 0.5).abs().max() < 0.07
    together = masks.mT @ masks / 1000
    pairs = together[~torch.eye(10, dtype=torch.bool)]
    assert (pairs - 2 / 9).abs().max() < 0.06
    odd = subset_masks(10, 1000, seed=4, labels=torch.tensor([0] * 5 + [1] * 5)).double()
    # 2.5 of each class: the rounding goes to either class alike.
    assert abs(odd[:, :5].sum(1).mean() - 2.5) < 0.08


def test_seeds_differ_and_leave_out_masks():
    assert not torch.equal(subset_masks(30, 2, seed=0), subset_masks(30, 2, seed=1))
    masks = subset_masks(30, 2, seed=0)
    assert not torch.equal(masks[0], masks[1])
    assert leave_out_masks(3).tolist() == [
        [False, True, True],
        [True, False, True],
        [True, True, False],
    ]
    with pytest.raises(DataError, match="labels must not be negative"):
        subset_masks(3, 1, labels=torch.tensor([0, -1, 0]))
