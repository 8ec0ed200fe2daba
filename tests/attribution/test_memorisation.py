"""Copies, dominated images and harmless ones, told apart by attribution times likeness."""

import pytest
import torch

from diffcal.attribution.memorisation import (
    exceedance,
    flag_beyond,
    flag_memorised,
    memorisation_report,
    memorisation_thresholds,
)
from diffcal.attribution.scores import ScoreBlock
from diffcal.errors import ConfigError, DataError, NumericalError


def blocks(values, size=4):
    for start in range(0, values.shape[1], size):
        yield ScoreBlock(start, values[:, start : start + size])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_numbers_of_a_small_case():
    scores = torch.tensor([[6.0, 2.0, -5.0, 0.0, 2.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    likeness = torch.tensor([[0.5, 0.9, 0.95, 0.1, -0.9], [0.0, 0.2, 0.8, 0.6, 0.4]])
    report = memorisation_report(blocks(scores, 2), blocks(likeness, 2), top=2, neighbours=3)
    assert report.top_index.tolist() == [[0, 1], [0, 1]]
    torch.testing.assert_close(
        report.top_share, torch.tensor([[0.6, 0.2], [0.2, 0.2]], dtype=torch.float64)
    )
    torch.testing.assert_close(
        report.contributors, torch.tensor([100 / 44, 5.0], dtype=torch.float64)
    )
    assert report.nearest_index.tolist() == [2, 2]
    assert report.nearest.tolist() == pytest.approx([0.95, 0.8])
    assert report.isolation.tolist() == pytest.approx([1 - 0.05 / 0.3, 1 - 0.2 / 0.5])
    # Products: the negative score and the negative likeness count as none.
    assert report.copy_score.tolist() == pytest.approx([6 * 0.5 / 10, 0.8 / 5])
    assert report.copy_index.tolist() == [0, 2]
    assert report.dominance.tolist() == pytest.approx([0.6, 0.2])


@pytest.mark.parametrize("size", [1, 3, 50])
def test_blocks_change_nothing(size):
    scores, likeness = normal(4, 23).square(), normal(4, 23, seed=1).tanh()
    whole = memorisation_report(blocks(scores, 100), blocks(likeness, 100))
    parts = memorisation_report(blocks(scores, size), blocks(likeness, size))
    for name in vars(whole):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-12, atol=0)


def test_planted_copies_are_flagged_and_harmless_images_are_not():
    n, q = 200, 30

    def world(seed, copies=()):
        scores, likeness = (
            normal(q, n, seed=seed).square(),
            0.3 * normal(q, n, seed=seed + 50).tanh(),
        )
        for query in copies:
            scores[query, 7] = 3 * scores[query].sum()
            likeness[query, 7] = 0.98
        return memorisation_report(blocks(scores), blocks(likeness))

    reference = memorisation_report(
        blocks(normal(300, n, seed=9).square()), blocks(0.3 * normal(300, n, seed=10).tanh())
    )
    flags = flag_memorised(world(1, copies=(3, 12)), reference, quantile=0.99)
    for name in ("near_copy", "dominated", "memorised"):
        flagged = flags[name].nonzero()[:, 0].tolist()
        assert {3, 12} <= set(flagged)
        assert len(flagged) <= 4
    assert int(flag_memorised(world(2), reference)["memorised"].sum()) <= 2
    # Dominated by an image that does not resemble, or alike without attribution: not a copy.
    scores, likeness = normal(1, n, seed=4).square(), 0.3 * normal(1, n, seed=5).tanh()
    scores[0, 7], likeness[0, 7] = 3 * scores.sum(), 0.0
    lone = flag_memorised(memorisation_report(blocks(scores), blocks(likeness)), reference)
    assert lone["dominated"].tolist() == [True]
    assert lone["memorised"].tolist() == [False]


def test_thresholds_are_quantiles_and_flags_are_what_lies_beyond():
    reference = memorisation_report(
        blocks(normal(101, 30).square()), blocks(normal(101, 30, seed=1).tanh())
    )
    limits = memorisation_thresholds(reference, 0.9)
    for name, limit in limits.items():
        values = getattr(reference, name)
        # Of 101 values ten lie above the 0.9 quantile, which is the eleventh largest itself.
        assert int((values > limit).sum()) == 10
        assert limit == float(values.sort(descending=True).values[10])
    flags = flag_beyond(reference, limits)
    assert int(flags["memorised"].sum()) == int(flags["dominated"].sum()) == 10
    assert int(flags["near_copy"].sum()) <= 10
    # A quantile that a hundred images can just tell.
    exactly = memorisation_report(
        blocks(normal(100, 8).square()), blocks(normal(100, 8, seed=1).tanh())
    )
    assert set(memorisation_thresholds(exactly, 0.99)) == set(limits)


def test_exceedance_counts_reference_values_at_least_as_large():
    reference = torch.tensor([0.1, 0.5, 0.5, 0.9], dtype=torch.float64)
    values = torch.tensor([0.0, 0.5, 0.6, 1.0], dtype=torch.float64)
    assert exceedance(values, reference).tolist() == pytest.approx([1.0, 4 / 5, 2 / 5, 1 / 5])


def test_bad_input_is_one_clear_line():
    scores, likeness = normal(2, 6).square(), normal(2, 6).tanh()
    with pytest.raises(DataError, match="cover different queries or training rows"):
        memorisation_report(blocks(scores, 2), blocks(likeness, 3))
    with pytest.raises(DataError, match="cover different queries or training rows"):
        memorisation_report(blocks(scores), blocks(likeness[:, :4]))
    with pytest.raises(DataError, match="there are no scores"):
        memorisation_report([], [])
    with pytest.raises(DataError, match="query 1 has no positive score"):
        memorisation_report(blocks(torch.stack([scores[0], -scores[1]])), blocks(likeness))
    with pytest.raises(ConfigError, match="neighbours at least 2"):
        memorisation_report(blocks(scores), blocks(likeness), neighbours=1)
    bad = likeness.clone()
    bad[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="likeness: 1 of 8"):
        memorisation_report(blocks(scores), blocks(bad))
    report = memorisation_report(blocks(scores), blocks(likeness))
    with pytest.raises(
        ConfigError, match=r"2 reference images cannot tell the 0\.99 quantile: give at least 100"
    ):
        flag_memorised(report, report)
    with pytest.raises(ConfigError, match="strictly between"):
        flag_memorised(report, report, 1.0)


def test_isolation_is_1_for_a_copy_among_crowded_images_and_0_among_copies():
    likeness = torch.tensor([[1.0, 0.99, 0.98, 0.97], [1.0, 1.0, 1.0, 1.0], [0.9, 0.9, 0.9, 0.9]])
    report = memorisation_report(blocks(torch.ones(3, 4)), blocks(likeness))
    assert report.isolation.tolist() == pytest.approx([1.0, 0.0, 0.0], abs=1e-7)


def test_likeness_beyond_that_of_copies_is_refused():
    with pytest.raises(DataError, match=r"likeness reaches 3.5, beyond 1"):
        memorisation_report(blocks(torch.ones(1, 2)), blocks(torch.tensor([[3.5, 0.2]])))


def test_copies_of_real_digits_are_found_and_other_writers_are_not():
    """Digits are crowded: a copy stands out by the ratio of distances, not by their difference."""
    from sklearn.datasets import load_digits

    x = torch.from_numpy(load_digits().data) / 8 - 1
    train = torch.nn.functional.normalize(x[:1437] - x[:1437].mean(0), dim=1)
    centred = torch.nn.functional.normalize(x - x[:1437].mean(0), dim=1)
    noise = 0.1 * normal(100, 64)
    copies = torch.nn.functional.normalize(x[:1400:14] + noise - x[:1437].mean(0), dim=1)

    def report(queries):
        return memorisation_report(
            blocks(torch.ones(len(queries), 1437), 500), blocks(queries @ train.T, 500)
        )

    others, held_out = report(centred[1437::2]), report(centred[1438::2])
    thresholds = memorisation_thresholds(held_out)
    assert float(flag_beyond(report(copies), thresholds)["near_copy"].double().mean()) >= 0.95
    assert float(flag_beyond(others, thresholds)["near_copy"].double().mean()) <= 0.03
