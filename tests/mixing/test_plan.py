"""Plans: golden enumerations, distributions of random choices, what is refused."""

import json
import math
from itertools import combinations
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffcal.core.rng import item_seed
from diffcal.errors import ConfigError
from diffcal.mixing.plan import MixPlan, PlanConfig, combination, pair_probabilities
from diffcal.mixing.weights import lambda_grid

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/csm.json").read_text("utf-8"))["cases"]
NAMES = tuple("abcde")


@pytest.mark.parametrize("classes", [10, 100, 200])
def test_golden_pair_enumeration(classes):
    case = GOLDEN["pair_enumeration"]
    plan = MixPlan(PlanConfig(groups=40_000), tuple(map(str, range(classes))))
    assert plan.combinations == case["n_pairs"][str(classes)]
    for group, pair in case[f"C{classes}"].items():
        assert list(plan[int(group)].classes) == pair


def test_golden_data_set_sizes_have_equal_numbers_of_every_pair():
    for sizes in GOLDEN["pair_enumeration"]["dataset_sizes"].values():
        assert sizes["groups"] * sizes["per_group"] == sizes["images"]
    size = GOLDEN["pair_enumeration"]["dataset_sizes"]["cifar10"]
    plan = MixPlan(PlanConfig(groups=size["groups"]), tuple(map(str, range(10))))
    counts: dict[tuple[int, ...], int] = {}
    for group in range(len(plan)):
        pair = combination(group % plan.combinations, 10, 2)
        counts[pair] = counts.get(pair, 0) + 1
    assert set(counts.values()) == {size["groups_per_pair"]}


def test_golden_seeds():
    for case in GOLDEN["proposed_seed_derivation"]["cases"]:
        assert item_seed(case["run_seed"], case["stream"], case["group_index"]) == case["seed"]
    assert MixPlan(PlanConfig(), NAMES, seed=0)[1].seed == 986017015684767664


def test_golden_pair_probabilities():
    case = GOLDEN["proposed_pair_weights"]
    matrix = torch.tensor(case["symmetric_confusion"], dtype=torch.float64)
    found = pair_probabilities(matrix, case["alpha"])
    expected = torch.tensor(list(case["expected"].values()), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)


@given(n=st.integers(2, 9), k=st.integers(1, 9))
def test_combinations_are_those_of_itertools(n, k):
    k = min(k, n)
    assert [combination(r, n, k) for r in range(math.comb(n, k))] == [*combinations(range(n), k)]


def test_grid_runs_from_the_second_class_to_the_first():
    group = MixPlan(PlanConfig(members=3), NAMES)[0]
    assert group.classes == (0, 1)
    assert group.weights.tolist() == [[0, 1], [0.5, 0.5], [1, 0]]


def test_of_two_members_nothing_is_bisected():
    plan = MixPlan(PlanConfig(members=2, weights="bisect"), NAMES)
    assert not plan.bisects
    assert plan[0].weights.tolist() == [[0, 1], [1, 0]]
    assert (plan.config.drawn_per_image, PlanConfig(weights="bisect").drawn_per_image) == (1, 1.5)


@given(members=st.integers(2, 20), power=st.floats(0.2, 4))
def test_a_warped_grid_keeps_ends_order_and_symmetry(members, power):
    grid = lambda_grid(members, power)
    assert (float(grid[0]), float(grid[-1])) == (0, 1)
    assert bool((grid.diff() > 0).all())
    torch.testing.assert_close(grid, 1 - grid.flip(0))


@given(group=st.integers(0, 200), k=st.integers(2, 4), concentration=st.floats(0.05, 20))
def test_dirichlet_rows_are_weights_with_every_corner(group, k, concentration):
    config = PlanConfig(
        groups=201, classes_per_mix=k, weights="dirichlet", concentration=concentration
    )
    mix = MixPlan(config, NAMES, seed=3)[group]
    assert mix.weights.shape == (8, k)
    assert bool((mix.weights >= 0).all())
    torch.testing.assert_close(mix.weights.sum(1), torch.ones(8))
    assert len({tuple(row) for row in mix.weights.tolist()} & _corners(k)) == k


def _corners(k):
    return {tuple(float(i == j) for j in range(k)) for i in range(k)}


def test_a_group_does_not_depend_on_how_many_there_are():
    for choice in ("cycle", "uniform"):
        few, many = (
            MixPlan(PlanConfig(groups=n, choice=choice), NAMES, seed=5) for n in (10, 1000)
        )
        assert [few[g].classes for g in range(10)] == [many[g].classes for g in range(10)]
        assert [few[g].seed for g in range(10)] == [many[g].seed for g in range(10)]


def test_confusable_pairs_come_up_as_often_as_their_probability():
    matrix = [[0.0] * 5 for _ in range(5)]
    matrix[1][3], matrix[3][1], matrix[0][4] = 6.0, 2.0, 4.0
    config = PlanConfig(
        groups=4000, choice="confusable", confusion=tuple(map(tuple, matrix)), uniform_share=0.2
    )
    plan = MixPlan(config, NAMES, seed=1)
    counts = torch.zeros(10, dtype=torch.float64)
    pairs = [*combinations(range(5), 2)]
    for group in range(4000):
        counts[pairs.index(plan[group].classes)] += 1
    expected = pair_probabilities(torch.tensor(matrix), 0.2)
    # Largest standard error of a share: sqrt(0.55 * 0.45 / 4000) = 0.8 points; four of them.
    torch.testing.assert_close(counts / 4000, expected, rtol=0, atol=0.032)
    assert math.isclose(float(expected[pairs.index((1, 3))]), 0.02 + 0.8 * 4 / 6)


def test_listed_combinations_are_mixed_in_turn():
    plan = MixPlan(PlanConfig(only=(("d", "a"), ("b", "c"))), NAMES)
    assert [plan[group].classes for group in range(3)] == [(0, 3), (1, 2), (0, 3)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": 0}, "groups"),
        ({"members": 1}, "pure"),
        ({"classes_per_mix": 3}, "dirichlet"),
        ({"weights": "dirichlet", "concentration": 0.0}, "concentration"),
        ({"weights": "bisect", "classes_per_mix": 3}, "dirichlet"),
        ({"weights": "bisect", "spare": -1}, "spare"),
        ({"choice": "confusable"}, "confusion"),
        ({"only": (("a", "z"),)}, "unknown class 'z'"),
        ({"only": (("a", "a"),)}, "different"),
        ({"choice": "confusable", "confusion": ((0.0, 1.0), (1.0, 0.0))}, "2x2 for 5"),
        ({"weights": "dirichlet", "classes_per_mix": 6, "members": 9}, "cannot mix 6"),
    ],
)
def test_settings_that_make_no_plan_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        MixPlan(PlanConfig(**settings), NAMES)


@pytest.mark.parametrize("bad", [[[0, -1], [0, 0]], [[1, 0], [0, 1]], [[0, math.nan], [0, 0]]])
def test_confusion_without_pairs_is_refused(bad):
    with pytest.raises(ConfigError, match="confusion"):
        pair_probabilities(torch.tensor(bad, dtype=torch.float64), 0.5)
