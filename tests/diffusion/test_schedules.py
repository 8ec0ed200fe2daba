"""Noise grids against goldens and inverses, tables against diffusers."""

import json
import math
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffcal.diffusion.schedules import (
    AlphasKind,
    ScheduleKind,
    alphas_cumprod,
    clip_range,
    ddpm_sigmas,
    karras_sigmas,
    sigma_grid,
    sigma_of_alphas_cumprod,
    sigma_of_timestep,
    timestep_of_sigma,
    ve_sigmas,
    vp_sigma,
    vp_sigmas,
    vp_time,
)
from diffcal.errors import ConfigError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/csm.json").read_text("utf-8"))["cases"]


@pytest.mark.parametrize("steps", [2, 18, 20, 25])
def test_karras_grid_of_the_golden_file(steps):
    case = GOLDEN["edm_sigma_schedule"]
    expected = torch.tensor(case["expected"][str(steps)], dtype=torch.float64)
    torch.testing.assert_close(karras_sigmas(steps), expected, rtol=1e-12, atol=0)


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(get_args(ScheduleKind)),
    steps=st.integers(2, 200),
    low=st.floats(0.015, 0.1),
    high=st.floats(2.0, 120.0),
)
def test_grids_fall_from_the_largest_level_to_the_smallest_and_end_with_zero(
    kind, steps, low, high
):
    sigmas = sigma_grid(kind, steps, low, high)
    assert sigmas.shape == (steps + 1,)
    assert sigmas.dtype == torch.float64
    assert bool((sigmas.diff() < 0).all())
    table = (0.0, math.inf)
    if kind in get_args(AlphasKind):
        levels = sigma_of_alphas_cumprod(alphas_cumprod(kind))
        table = (float(levels[0]), float(levels[-1]))
    assert float(sigmas[0]) == min(high, table[1])
    assert float(sigmas[-2]) == max(low, table[0])
    assert float(sigmas[-1]) == 0.0


def test_grids_are_even_in_their_own_time():
    sigmas = vp_sigmas(10)[:-1]
    gaps = vp_time(sigmas).diff()
    torch.testing.assert_close(gaps, gaps.mean().expand(9), rtol=1e-9, atol=0)
    assert float(vp_time(sigmas)[0]) == pytest.approx(1.0, rel=1e-12)
    ratios = ve_sigmas(7)[1:-1] / ve_sigmas(7)[:-2]
    torch.testing.assert_close(ratios, ratios[:1].expand(6), rtol=1e-12, atol=0)
    alphas = alphas_cumprod("ddpm_linear")
    steps = timestep_of_sigma(ddpm_sigmas(37, alphas)[:-1], alphas)
    expected = torch.linspace(999, 0, 37, dtype=torch.float64)
    torch.testing.assert_close(steps, expected, rtol=0, atol=1e-8)


def test_a_large_rho_approaches_even_steps_in_ln_sigma():
    torch.testing.assert_close(
        karras_sigmas(12, 0.01, 50.0, 1e6), sigma_grid("log_snr", 12, 0.01, 50.0), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize(
    ("kind", "settings_"),
    [
        ("ddpm_linear", {"beta_schedule": "linear"}),
        ("ddpm_cosine", {"beta_schedule": "squaredcos_cap_v2"}),
        (
            "scaled_linear",
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        ),
    ],
)
def test_tables_are_those_of_diffusers(kind, settings_):
    diffusers = pytest.importorskip("diffusers")
    expected = diffusers.DDPMScheduler(**settings_).alphas_cumprod
    # theirs is a product of 1000 float32 numbers
    torch.testing.assert_close(alphas_cumprod(kind).float(), expected, rtol=3e-5, atol=1e-9)


@settings(deadline=None, max_examples=60)
@given(kind=st.sampled_from(get_args(AlphasKind)), t=st.floats(0, 999))
def test_timestep_inverts_sigma(kind, t):
    alphas = alphas_cumprod(kind)
    timestep = torch.tensor([t], dtype=torch.float64)
    back = timestep_of_sigma(sigma_of_timestep(timestep, alphas), alphas)
    torch.testing.assert_close(back, timestep, rtol=0, atol=1e-6)


def test_timesteps_outside_the_table_are_its_ends():
    alphas = alphas_cumprod("scaled_linear")
    found = timestep_of_sigma(torch.tensor([0.0, 1e-9, 1e9]), alphas)
    assert found.tolist() == [0.0, 0.0, 999.0]


def test_whole_timesteps_have_the_levels_of_the_table():
    alphas = alphas_cumprod("ddpm_linear")
    t = torch.tensor([0.0, 1.0, 500.0, 999.0])
    expected = sigma_of_alphas_cumprod(alphas)[t.long()]
    torch.testing.assert_close(sigma_of_timestep(t, alphas), expected, rtol=1e-12, atol=0)


def test_variance_preserving_time_at_known_points():
    # Karras et al. 2022, table 1: the process ends near sigma 152
    ends = vp_sigma(torch.tensor([1e-5, 1.0], dtype=torch.float64))
    torch.testing.assert_close(
        ends, torch.tensor([0.0010005, 152.16697], dtype=torch.float64), rtol=1e-5, atol=0
    )


def test_bad_input_is_refused():
    with pytest.raises(ConfigError, match="at least 2 steps, got 1"):
        karras_sigmas(1)
    with pytest.raises(ConfigError, match="sigma_min < sigma_max"):
        sigma_grid("log_snr", 5, 1.0, 0.5)
    with pytest.raises(ConfigError, match="rho"):
        karras_sigmas(5, rho=0.0)
    with pytest.raises(ConfigError, match="do not meet"):
        clip_range(0.1, 1.0, 2.0, 80.0)
    with pytest.raises(ConfigError, match="terminal"):
        sigma_of_alphas_cumprod(torch.tensor([0.9, 0.5, 0.0]))
    with pytest.raises(ConfigError, match="betas"):
        alphas_cumprod("ddpm_linear", beta_start=0.5, beta_end=0.1)
