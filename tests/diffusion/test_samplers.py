"""Samplers against goldens, closed forms and each other."""

import dataclasses
import json
import math
from pathlib import Path
from typing import get_args

import pytest
import torch

from diffcal.config import config_from_dict, config_to_dict
from diffcal.diffusion.closed_forms import GaussianDenoiser, MixtureDenoiser
from diffcal.diffusion.multistep import multistep_plan
from diffcal.diffusion.samplers import (
    PRESETS,
    SamplerConfig,
    Solver,
    churned_sigmas,
    evaluations,
    sample,
    sampling_sigmas,
)
from diffcal.errors import ConfigError, DataError, NumericalError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/csm.json").read_text("utf-8"))["cases"]
SOLVERS = get_args(Solver)
DOUBLE = torch.float64


def golden_toy():
    inputs = GOLDEN["toy_gaussian_sampler"]["inputs"]
    means = torch.tensor(inputs["class_means"], dtype=DOUBLE)
    return GaussianDenoiser(means[:, :, None, None], inputs["s"])


def golden_batch(key):
    cases = GOLDEN["toy_gaussian_sampler"]["cases"]
    return torch.tensor([case[key] for case in cases], dtype=DOUBLE)


def mixture(seed=0):
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(6, 1, 2, 2, generator=generator, dtype=DOUBLE) * 0.6
    return MixtureDenoiser(means, torch.tensor([0, 0, 0, 1, 1, 1]), scale=0.25)


def standard_noise(count, shape=(1, 2, 2), seed=1):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


class Counting:
    def __init__(self, denoise):
        self.denoise, self.calls = denoise, []

    def __call__(self, x, sigma, condition=None):
        assert sigma.shape == (len(x),)
        self.calls.append(float(sigma[0]))
        return self.denoise(x, sigma, condition)


@pytest.mark.parametrize("steps", [18, 20, 25])
def test_heun_of_the_golden_file(steps):
    noise, weights = golden_batch("noise")[:, :, None, None], golden_batch("weights")
    result = sample(golden_toy(), noise, weights, SamplerConfig(steps=steps))
    assert result.dtype == DOUBLE
    expected = golden_batch(f"heun_{steps}")[:, :, None, None]
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_tends_to_the_exact_solution(solver):
    noise, weights = golden_batch("noise")[:, :, None, None], golden_batch("weights")
    config = SamplerConfig(solver=solver, steps=640, sigma_min=1e-6)
    result = sample(golden_toy(), noise, weights, config)
    expected = golden_batch("ode_exact")[:, :, None, None]
    tolerance = 5e-3 if solver == "euler" else 1e-4
    torch.testing.assert_close(result, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("solver", "order"),
    [
        ("euler", 1),
        ("heun", 2),
        ("dpmpp_2m", 2),
        ("dpmpp_3m", 3),
        ("unipc_2", 3),  # the corrector raises the order of its predictor by one
        ("unipc_3", 3),  # its first steps, of lower order, hide the fourth at these step numbers
    ],
)
def test_order_of_convergence_on_a_mixture(solver, order):
    # The last step, to noise level 0, costs about sigma_min: it is made negligible.
    denoiser, noise = mixture(), standard_noise(32)
    weights = torch.tensor([[0.5, 0.5]]).double().expand(32, 2)

    def solve(steps, solver):
        config = SamplerConfig(solver=solver, steps=steps, schedule="log_snr", sigma_min=1e-7)
        return sample(denoiser, noise, weights, config)

    reference = solve(4000, "unipc_3")
    errors = [float((solve(n, solver) - reference).square().mean().sqrt()) for n in (240, 480)]
    measured = math.log2(errors[0] / errors[1])
    assert measured > order - 0.3, (measured, errors)


@pytest.mark.parametrize("solver", SOLVERS)
def test_evaluations_are_what_is_promised(solver):
    config = SamplerConfig(solver=solver, steps=9)
    counting = Counting(lambda x, sigma, condition: 0.5 * x)
    sample(counting, standard_noise(2), None, config)
    assert len(counting.calls) == evaluations(config) == (17 if solver == "heun" else 9)
    assert counting.calls[0] == 80.0
    assert min(counting.calls) == pytest.approx(0.002)


@pytest.mark.parametrize("solver", SOLVERS)
def test_samples_do_not_depend_on_the_batch(solver):
    denoiser, noise = mixture(), standard_noise(7)
    weights = torch.eye(2).double()[torch.tensor([0, 1, 0, 1, 1, 0, 0])]
    config = SamplerConfig(solver=solver, steps=8)
    together = sample(denoiser, noise, weights, config)
    alone = [sample(denoiser, noise[i : i + 1], weights[i : i + 1], config) for i in range(7)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-9, atol=1e-12)
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    permuted = sample(denoiser, noise[order], weights[order], config)
    torch.testing.assert_close(permuted, together[order], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_single_point_is_reached_exactly(solver):
    target = standard_noise(3, seed=5)
    result = sample(
        lambda x, sigma, condition: target, standard_noise(3), None, SamplerConfig(solver=solver)
    )
    torch.testing.assert_close(result, target, rtol=0, atol=1e-10)


def test_multistep_weights_in_closed_form():
    # One e-fold in each step: h = 1, and the points lie at 0, -1, -2 (and 1 for correctors).
    sigmas = [math.exp(-i) for i in range(5)] + [0.0]
    decay = math.exp(-1)
    m0, m1, m2 = 1 - decay, decay, 1 - 2 * decay  # integrals of e^(u-1) u^k over [0, 1]
    plan = multistep_plan("dpmpp_3m", sigmas)
    second = (m0 + (m1 * 3 + m2) / 2, -(2 * m1 + m2), (m1 + m2) / 2)
    assert plan[3].predict.weights == pytest.approx(second, rel=1e-12)
    assert plan[3].predict.decay == pytest.approx(decay, rel=1e-12)
    assert plan[0].predict.weights == pytest.approx((m0,), rel=1e-12)
    assert plan[1].predict.weights == pytest.approx((1.5 * m0, -0.5 * m0), rel=1e-12)
    assert plan[4].predict == multistep_plan("euler", sigmas)[4].predict
    assert plan[4].predict.weights == (1.0,)
    correct = multistep_plan("unipc_2", sigmas)[3].correct
    assert correct is not None
    expected = ((m1 + m2) / 2, m0 - m2, (m2 - m1) / 2)  # parabola through 1, 0, -1
    assert correct.weights == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert plan[3].correct is None


@pytest.mark.parametrize("solver", ["dpmpp_2m", "dpmpp_3m", "unipc_2", "unipc_3"])
def test_weights_of_a_step_sum_to_one_minus_decay(solver):
    for step in multistep_plan(solver, sampling_sigmas(None, SamplerConfig(steps=12)).tolist()):
        for update in (step.predict, step.correct):
            if update is not None:
                assert sum(update.weights) == pytest.approx(1 - update.decay, rel=1e-9)


def test_dpmpp_2m_is_that_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(
        solver_order=2, final_sigmas_type="zero", lower_order_final=False, euler_at_final=False
    )
    scheduler.set_timesteps(10)
    denoiser, noise = mixture(), standard_noise(4)
    weights = torch.tensor([[0.25, 0.75]]).double().expand(4, 2)
    # theirs predicts through its own preconditioning: hand it the network output that gives D
    x = noise * 80.0
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        denoised = denoiser(x, sigma.double().expand(4), weights)
        level = float(sigma)
        skip = 0.25 / (level**2 + 0.25)
        out = level * 0.5 / math.sqrt(level**2 + 0.25)
        x = scheduler.step((denoised - skip * x) / out, t, x).prev_sample
    config = SamplerConfig(solver="dpmpp_2m", steps=10)
    result = sample(denoiser, noise, weights, config)
    torch.testing.assert_close(result, x, rtol=0, atol=2e-4)  # their levels are float32


def test_churn_of_the_golden_file():
    case = GOLDEN["churn"]
    values = {key.lower(): case["inputs"][key] for key in ("S_churn", "S_min", "S_max", "S_noise")}
    config = SamplerConfig(steps=18, **{key: float(value) for key, value in values.items()})
    sigmas = sampling_sigmas(None, config).tolist()
    hats = churned_sigmas(sigmas, config)
    step = case["inputs"]["step_index"]
    assert hats[step] == pytest.approx(case["t_hat_N18_step5"], rel=1e-12)
    assert hats[step] / sigmas[step] - 1 == pytest.approx(case["gamma_N18_capped"], rel=1e-12)
    added = math.sqrt(hats[step] ** 2 - sigmas[step] ** 2) * config.s_noise
    assert added == pytest.approx(case["added_noise_std_N18_step5"], rel=1e-12)
    assert hats[0] == 80.0  # above s_max
    fine = dataclasses.replace(config, steps=256)
    levels = sampling_sigmas(None, fine).tolist()
    ratios = {
        round(h / s - 1, 12) for h, s in zip(churned_sigmas(levels, fine), levels, strict=False)
    }
    assert ratios == {0.0, case["gamma_N256"]}


def test_heun_with_churn_step_by_step():
    """The algorithm written out, with its own noise bookkeeping, against the sampler."""
    denoiser, noise = mixture(), standard_noise(5)
    weights = torch.tensor([[1.0, 0.0]]).double().expand(5, 2)
    config = SamplerConfig(steps=12, s_churn=8.0, s_min=0.05, s_max=30.0, s_noise=1.003)
    fresh = [standard_noise(1, seed=100 + i) for i in range(12)]  # one for the whole group
    asked = []

    def churn_noise(step):
        asked.append(step)
        return fresh[step]

    result = sample(denoiser, noise, weights, config, churn_noise=churn_noise)
    t = sampling_sigmas(denoiser, config)
    x, noisy = noise * t[0], []
    for i in range(12):
        gamma = min(8 / 12, math.sqrt(2) - 1) if 0.05 <= t[i] <= 30 else 0.0
        hat = t[i] + gamma * t[i]
        if gamma:
            noisy.append(i)
            x = x + (hat**2 - t[i] ** 2).sqrt() * 1.003 * fresh[i]
        d = (x - denoiser(x, hat.expand(5), weights)) / hat
        euler = x + (t[i + 1] - hat) * d
        if t[i + 1] > 0:
            d2 = (euler - denoiser(euler, t[i + 1].expand(5), weights)) / t[i + 1]
            euler = x + (t[i + 1] - hat) * (d + d2) / 2
        x = euler
    torch.testing.assert_close(result, x, rtol=1e-10, atol=1e-12)
    assert asked == noisy


def test_churn_keeps_the_distribution():
    """Noise added and removed again: the standard deviation of the samples stays that of the data."""
    denoiser = GaussianDenoiser(torch.zeros(1, 1, 1, 1), 0.5)
    noise = standard_noise(20_000, (1, 1, 1))
    config = SamplerConfig(steps=150, s_churn=30.0)
    result = sample(
        denoiser,
        noise,
        torch.ones(20_000, 1).double(),
        config,
        churn_noise=lambda step: standard_noise(20_000, (1, 1, 1), seed=50 + step),
    )
    assert float(result.std()) == pytest.approx(0.5, rel=0.02)  # four standard errors
    plain = sample(denoiser, noise, torch.ones(20_000, 1).double(), SamplerConfig(steps=150))
    correlation = float(torch.corrcoef(torch.stack([result.flatten(), plain.flatten()]))[0, 1])
    assert abs(correlation) < 0.3  # the noise really was replaced


def test_grid_is_clipped_and_rounded_to_what_the_denoiser_knows():
    class Limited(Counting):
        sigma_min, sigma_max = 0.05, 10.0

        def round_sigma(self, sigma):
            return (sigma * 100).round() / 100

    limited = Limited(lambda x, sigma, condition: 0.5 * x)
    sample(limited, standard_noise(1), None, SamplerConfig(steps=6))
    assert max(limited.calls) == 10.0
    assert min(limited.calls) == pytest.approx(0.05)
    assert all(abs(s * 100 - round(s * 100)) < 1e-9 for s in limited.calls)
    with pytest.raises(ConfigError, match="equal noise levels"):
        sample(limited, standard_noise(1), None, SamplerConfig(steps=100))


def test_on_step_sees_every_step():
    seen = []
    denoiser, weights = mixture(), torch.tensor([[1.0, 0.0]]).double()
    result = sample(
        denoiser,
        standard_noise(1),
        weights,
        SamplerConfig(solver="dpmpp_2m", steps=5),
        on_step=lambda i, sigma, x, denoised: seen.append((i, sigma, x.clone(), denoised.clone())),
    )
    assert [i for i, *_ in seen] == list(range(5))
    assert seen[0][1] == 80.0
    torch.testing.assert_close(seen[-1][2], result, rtol=0, atol=0)
    torch.testing.assert_close(seen[-1][3], result, rtol=0, atol=0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_nan_from_the_network_names_step_and_level(solver):
    def broken(x, sigma, condition):
        return x / 2 if sigma[0] > 1 else x * math.nan

    config = SamplerConfig(solver=solver, steps=10, schedule="log_snr")
    first = next(s for s in sampling_sigmas(None, config).tolist() if s <= 1)
    with pytest.raises(NumericalError, match=rf"step \d at sigma {first:.6g}"):
        sample(broken, standard_noise(1), None, config)
    with pytest.raises(NumericalError, match="step 0 at sigma 80"):
        sample(lambda x, s, c: x.new_full(x.shape, math.inf), standard_noise(1), None, config)


def test_another_shape_from_the_network_is_refused():
    with pytest.raises(DataError, match="shape"):
        sample(lambda x, s, c: x[:1], standard_noise(2), None, SamplerConfig())


def test_input_is_left_alone_and_nothing_is_recorded_for_gradients():
    noise = standard_noise(2)
    before = noise.clone()
    scale = torch.ones((), dtype=DOUBLE, requires_grad=True)
    result = sample(lambda x, s, c: x * scale / 2, noise, None, SamplerConfig(steps=3))
    torch.testing.assert_close(noise, before, rtol=0, atol=0)
    assert not result.requires_grad


def test_defaults_and_presets():
    config = SamplerConfig()
    assert (config.solver, config.steps, config.rho, config.preset) == ("heun", 18, 7.0, None)
    assert evaluations(config) == 35
    assert evaluations(SamplerConfig(preset="edm-20")) == 39
    assert SamplerConfig(preset="edm-20").preset == "edm-20"
    changed = SamplerConfig(preset="edm-20", steps=30)
    assert (changed.steps, changed.preset) == (30, None)
    for name in PRESETS:
        config = SamplerConfig(preset=name)
        assert config_from_dict(SamplerConfig, config_to_dict(config)) == config
        assert dataclasses.replace(config, guidance_scale=2.0).preset == name
    assert config_from_dict(SamplerConfig, config_to_dict(changed)) == changed


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 1}, "steps must be at least 2"),
        ({"sigma_min": 0.0}, "sigma_min"),
        ({"sigma_max": math.inf}, "sigma_max"),
        ({"solver": "rk9"}, "'solver' must be one of .*'rk9'"),
        ({"schedule": "linear"}, "'schedule' must be one of"),
        ({"preset": "fastest"}, "unknown preset"),
        ({"rho": -1.0}, "rho"),
        ({"s_churn": -1.0}, "s_churn"),
        ({"s_churn": 1.0, "solver": "unipc_2"}, "needs solver heun or euler"),
        ({"s_min": 2.0, "s_max": 1.0}, "no range"),
        ({"guidance_scale": math.nan}, "guidance_scale"),
        ({"guidance_interval": (2.0, 1.0)}, "guidance_interval"),
    ],
)
def test_bad_settings_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        config_from_dict(SamplerConfig, values)


def test_contradictions_are_refused():
    unchecked: dict = {"solver": "rk9"}
    with pytest.raises((ConfigError, TypeError)):
        SamplerConfig(**unchecked)
    config = SamplerConfig()
    with pytest.raises(ConfigError, match="every field is given"):
        dataclasses.replace(config, preset="edm-20")
    with pytest.raises(ConfigError, match="churn_noise"):
        sample(lambda x, s, c: x / 2, standard_noise(1), None, SamplerConfig(s_churn=5.0))


def test_fast_preset_is_as_exact_as_three_times_its_evaluations():
    """On a mixture with a known score: the trajectory's end as Heun's 39 evaluations, within 20 %."""
    fast, full = SamplerConfig(preset="fast"), SamplerConfig(preset="edm-20")
    assert 3 * evaluations(fast) <= evaluations(full)
    denoiser, noise = mixture(), standard_noise(64)
    weights = torch.tensor([[0.5, 0.5]]).double().expand(64, 2)
    exact = sample(denoiser, noise, weights, SamplerConfig(solver="unipc_3", steps=800))

    def rms(config):
        return float((sample(denoiser, noise, weights, config) - exact).square().mean().sqrt())

    assert rms(fast) < 1.2 * rms(full)
    assert rms(fast) < 0.2 * rms(SamplerConfig(solver="heun", steps=7))  # the same 13 evaluations
