"""Bisection: where it looks, how steps shrink, and that it wastes nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffcal.errors import ConfigError
from diffcal.mixing.bisection import FINEST, bisected


def ladder(height, members, calls=None, spare=0):
    """One ladder of one-pixel images of the given heights."""

    def draw(ladders, lambdas):
        if calls is not None:
            calls.append(lambdas.tolist())
        return torch.tensor([height(float(value)) for value in lambdas]).view(-1, 1, 1, 1)

    lambdas, samples = bisected(draw, 1, members, spare)
    return lambdas[0], samples[0].flatten()


def test_a_straight_passage_is_halved_evenly():
    lambdas, samples = ladder(lambda value: 3 * value, 9)
    torch.testing.assert_close(lambdas, torch.linspace(0, 1, 9))
    torch.testing.assert_close(samples, 3 * torch.linspace(0, 1, 9))


def test_a_steep_passage_is_found_where_it_lies():
    def steep(value):
        return min(max((value - 0.3) / 0.02, 0.0), 1.0)

    calls = []
    _lambdas, samples = ladder(steep, 12, calls)
    even = torch.tensor([steep(v / 11) for v in range(12)])
    assert float(even.diff().max()) == 1.0
    assert float(samples.diff().abs().max()) == 0.375
    assert calls[:4] == [[0.0, 0.5, 1.0], [0.25], [0.375], [0.3125]]
    assert sum(map(len, calls)) == 12


def test_spare_images_find_the_passage_and_leave():
    def steep(value):
        return min(max((value - 0.3) / 0.02, 0.0), 1.0)

    lambdas, samples = ladder(steep, 6, spare=8)
    assert lambdas[[0, -1]].tolist() == [0, 1]
    # Five steps over a height of 1 are 0.2 at best.
    assert float(samples.diff().max()) <= 0.3
    assert float(ladder(steep, 6)[1].diff().max()) == 0.625


def test_a_jump_is_not_halved_beyond_the_finest_interval():
    lambdas, _ = ladder(lambda value: float(value > 1 / 3), 40)
    assert bool((lambdas.diff() > 0).all())
    assert float(lambdas.diff().min()) == FINEST


def test_equal_steps_take_the_first():
    lambdas, _ = ladder(lambda value: value, 4)
    assert lambdas.tolist() == [0.0, 0.25, 0.5, 1.0]


@settings(max_examples=50, deadline=None)
@given(
    places=st.lists(st.floats(0.01, 0.99), min_size=2, max_size=5),
    members=st.integers(3, 20),
)
def test_ladders_are_found_each_for_itself(places, members):
    def heights(ladders, lambdas):
        values = [
            torch.sigmoid((value - places[one]) * 50)
            for one, value in zip(ladders, lambdas, strict=True)
        ]
        return torch.stack(values).view(-1, 1, 1, 1)

    together, samples = bisected(heights, len(places), members)
    assert samples.shape == (len(places), members, 1, 1, 1)
    for one, place in enumerate(places):
        alone, _ = bisected(
            lambda _, x, p=place: torch.sigmoid((x - p) * 50).view(-1, 1, 1, 1), 1, members
        )
        torch.testing.assert_close(together[one], alone[0], rtol=0, atol=0)
        assert bool((together[one].diff() > 0).all())
        assert together[one, [0, -1]].tolist() == [0, 1]


@pytest.mark.parametrize(("members", "spare"), [(2, 0), (3, -1)])
def test_too_few_images_are_refused(members, spare):
    with pytest.raises(ConfigError, match=f"got {members} and {spare}"):
        bisected(lambda *_: torch.zeros(3, 1, 1, 1), 1, members, spare)
