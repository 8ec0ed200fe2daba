"""Which mixed images join a real one: the training item of semantic mixing, and its generality."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffcal.data.batch_policy import MixedGroups, epoch_order, uniform_rows
from diffcal.errors import DataError

# Re-estimated ratios of the eight members of one group of the pair (2, 5), in generation order;
# targets are sigmoid(4 (ratio - 1/2)) for class 2. Ranks differ from generation order on purpose.
RATIOS = [-0.1, 0.05, 0.42, 0.31, 0.66, 0.6, 0.93, 1.2]


def one_group():
    top = torch.sigmoid(4 * (torch.tensor(RATIOS) - 0.5))
    targets = torch.zeros(8, 10)
    targets[:, 2], targets[:, 5] = top, 1 - top
    return targets


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_anchor_is_the_member_most_like_the_real_image():
    targets = one_group()
    groups = MixedGroups.build(targets, torch.zeros(8, dtype=torch.int64), targets > 0)
    labels = torch.tensor([2, 5] * 200)
    rows = groups.draw(labels, 2, 0.5, generator())
    assert (rows[::2, 0] == 7).all()
    torch.testing.assert_close(
        targets[7, [2, 5]], torch.tensor([0.9426758241, 0.0573241759]), rtol=1e-6, atol=0
    )
    assert (rows[1::2, 0] == 0).all()
    torch.testing.assert_close(
        targets[0, [2, 5]], torch.tensor([0.0831726650, 0.9168273350]), rtol=1e-5, atol=0
    )
    # ranks 1 to 6 of either end, each about equally often: 400 draws over 6, sd 7.5
    counts = torch.bincount(rows[:, 1], minlength=8)
    assert counts[0] == counts[7] == 0
    assert counts[1:7].min() > 35


def test_intermediates_are_distinct_until_the_group_runs_out():
    targets = one_group()
    groups = MixedGroups.build(targets, torch.zeros(8, dtype=torch.int64))
    rows = groups.draw(torch.tensor([2, 5, 2]), 7, 1 / 7, generator())
    for row in rows:
        assert sorted(row[1:].tolist()) == [1, 2, 3, 4, 5, 6]
    rows = groups.draw(torch.tensor([2]), 9, 0.0, generator())
    assert set(rows[0].tolist()) == {1, 2, 3, 4, 5, 6}


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 10_000),
    st.integers(2, 6),
    st.integers(1, 7),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.25, 0.5, 1.0]),
)
def test_draws_come_from_groups_with_the_class(seed, classes, sizes, per_real, fraction):
    g = generator(seed)
    pairs = [(a, b) for a in range(classes) for b in range(a + 1, classes)] * 2
    targets, ids = [], []
    for index, (a, b) in enumerate(pairs):
        for _ in range(int(torch.randint(1, sizes + 1, (1,), generator=g))):
            row = torch.full((classes,), 0.02)
            row[[a, b]] += torch.rand(2, generator=g) + 0.1
            targets.append(row / row.sum())
            ids.append(index * 3)
    order = torch.randperm(len(ids), generator=g)
    targets, ids = torch.stack(targets)[order], torch.tensor(ids)[order]
    support = torch.zeros_like(targets, dtype=torch.bool)
    for row, index in enumerate(ids.tolist()):
        support[row, list(pairs[index // 3])] = True
    groups = MixedGroups.build(targets, ids, support)
    labels = torch.randint(classes, (40,), generator=g)
    rows = groups.draw(labels, per_real, fraction, g)
    assert rows.shape == (40, per_real)
    for label, drawn in zip(labels.tolist(), rows.tolist(), strict=True):
        assert all(label in pairs[int(ids[row]) // 3] for row in drawn)
    if fraction == 1.0:
        for label, drawn in zip(labels.tolist(), rows.tolist(), strict=True):
            for row in drawn:
                members = (ids == ids[row]).nonzero()[:, 0]
                assert targets[row, label] == targets[members, label].max()


def test_fractional_anchor_share_is_met_on_average():
    targets = one_group()
    groups = MixedGroups.build(targets, torch.zeros(8, dtype=torch.int64))
    labels = torch.full((4000,), 2)
    anchors = (groups.draw(labels, 2, 0.3, generator()) == 7).sum(dim=1)
    assert set(anchors.tolist()) == {0, 1}
    # 4,000 draws of chance 0.6: standard error 0.008
    assert float(anchors.float().mean()) == pytest.approx(0.6, abs=0.04)


def test_three_class_groups_and_classes_without_a_group(caplog):
    targets = torch.tensor(
        [[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0.4, 0.3, 0.3, 0], [0.2, 0.5, 0.3, 0]]
    )
    with caplog.at_level(logging.WARNING):
        groups = MixedGroups.build(targets, torch.zeros(5, dtype=torch.int64))
    assert "no mixed group contains class 3" in caplog.text
    rows = groups.draw(torch.tensor([0, 1, 2, 3] * 20), 2, 0.5, generator())
    assert rows[0::4, 0].unique().tolist() == [0]
    assert rows[1::4, 0].unique().tolist() == [1]
    assert rows[2::4, 0].unique().tolist() == [2]
    assert rows[:, 1].unique().tolist() == [3, 4]
    assert len(rows[3::4, 0].unique()) > 1
    with pytest.raises(DataError, match="no mixed images"):
        MixedGroups.build(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))


def test_orders_visit_everything_once_and_depend_on_the_seed():
    assert sorted(epoch_order(0, 50, 3).tolist()) == list(range(50))
    assert epoch_order(0, 50, 3).tolist() == epoch_order(0, 50, 3).tolist()
    assert epoch_order(0, 50, 3).tolist() != epoch_order(1, 50, 3).tolist()
    assert epoch_order(0, 50, 3).tolist() != epoch_order(0, 50, 4).tolist()
    rows = torch.cat([uniform_rows(0, 10, 7, step) for step in range(10)])
    assert torch.bincount(rows).tolist() == [7] * 10
    assert uniform_rows(0, 3, 10, 0).shape == (10,)
