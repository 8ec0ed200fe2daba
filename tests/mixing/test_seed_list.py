"""Seed lists of published commands: golden readings, the noise they name, what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffcal.errors import ConfigError
from diffcal.mixing.generation import initial_noise
from diffcal.mixing.plan import MixPlan, PlanConfig
from diffcal.mixing.seed_list import parse_seed_list

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = tuple("abcde")


def test_golden_seed_expressions():
    cases = json.loads((GOLDEN / "csm.json").read_text("utf-8"))["cases"]
    for case in cases["seed_expression_official_cli"]["cases"]:
        assert parse_seed_list(case["in"]) == case["out"]


def test_golden_noise_of_seeds():
    case = json.loads((GOLDEN / "edm_nets.json").read_text("utf-8"))["rng"]
    tensors = load_file(GOLDEN / "edm_nets.safetensors")
    drawn = zip(case["seeds"], tensors[case["latents"]], tensors[case["class_index"]], strict=True)
    for seed, latent, index in drawn:
        assert torch.equal(initial_noise(seed, tuple(latent.shape)), latent)
        # EDM's commands go on with the same generator to draw a class: it is the whole seed's.
        generator = torch.Generator().manual_seed(seed)
        torch.randn(latent.shape, generator=generator)
        assert int(torch.randint(10, (), generator=generator)) == int(index)


@pytest.mark.parametrize(
    "text", ["", "a", "3-1", "-1", "4x", "d", "d8", "5 6", "4x0", "0-99999999"]
)
def test_what_is_no_seed_list_is_refused(text):
    with pytest.raises(ConfigError, match="seed list"):
        parse_seed_list(text)


def test_a_plan_takes_one_seed_for_a_group_or_one_for_every_member():
    for text in ("7-9", "d4,7-9", "7x4,8x4,9x4"):
        plan = MixPlan(PlanConfig(groups=3, members=4, seeds=text), NAMES, seed=5)
        assert [plan[group].seed for group in range(3)] == [7, 8, 9]


@pytest.mark.parametrize("text", ["0-3", "d2,0-5", "0-11", "0x3,1x5,2x4"])
def test_seeds_that_fit_no_plan_are_refused(text):
    with pytest.raises(ConfigError, match="one for each group"):
        PlanConfig(groups=3, members=4, seeds=text)
