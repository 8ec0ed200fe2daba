import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

diffusers = pytest.importorskip("diffusers")

from diffcal.diffusion.discrete_noise import discrete_noise  # noqa: E402
from diffcal.errors import CheckpointError  # noqa: E402

LINEAR = discrete_noise(diffusers.DDPMScheduler())
LEARNED = discrete_noise(diffusers.DDPMScheduler(), "integer")


def test_table_is_the_schedulers():
    alphas = diffusers.DDPMScheduler().alphas_cumprod.double()
    timesteps = torch.arange(1000)
    expected = ((1 - alphas) / alphas).sqrt()
    torch.testing.assert_close(LINEAR.sigma(timesteps), expected, rtol=1e-12, atol=0)
    assert LINEAR.sigma_min == pytest.approx(0.01, rel=1e-3)
    assert LINEAR.sigma_max == pytest.approx(157.407, rel=1e-4)


def test_every_integer_timestep_returns():
    timesteps = torch.arange(1000)
    sigma = LINEAR.sigma(timesteps).float()
    torch.testing.assert_close(LINEAR.timestep(sigma), timesteps.float(), atol=1e-3, rtol=0)
    assert torch.equal(LEARNED.timestep(sigma), timesteps)


@settings(deadline=None, max_examples=50)
@given(st.floats(0, 999))
def test_fractional_timesteps_return_and_lie_between_their_neighbours(position):
    t = torch.tensor([position], dtype=torch.float64)
    sigma = LINEAR.sigma(t)
    torch.testing.assert_close(LINEAR.timestep(sigma).double(), t, atol=1e-3, rtol=0)
    below, above = LINEAR.sigma(t.floor()), LINEAR.sigma(t.ceil())
    assert below * (1 - 1e-9) <= sigma <= above * (1 + 1e-9)


def test_interpolation_is_linear_in_log_sigma():
    low, high = LINEAR.sigma(torch.tensor([400, 401]))
    middle = (low * high).sqrt()
    torch.testing.assert_close(
        LINEAR.timestep(middle[None]), torch.tensor([400.5]), atol=1e-4, rtol=0
    )


def test_levels_outside_the_table_take_its_ends():
    t = LINEAR.timestep(torch.tensor([0.0, 1e-6, 1e6]))
    torch.testing.assert_close(t, torch.tensor([0.0, 0.0, 999.0]), atol=0, rtol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@settings(deadline=None, max_examples=20)
@given(level=st.floats(0.02, 100))
def test_exact_outputs_give_the_clean_sample(prediction, level):
    """Salimans and Ho 2022: v = sqrt(abar) eps - sqrt(1 - abar) x_0."""
    noise = discrete_noise(diffusers.DDPMScheduler(prediction_type=prediction))
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 1, 3, 2, 2, generator=generator, dtype=torch.float64)
    sigma = torch.full((1, 1, 1, 1), level, dtype=torch.float64)
    abar = 1 / (1 + sigma**2)
    x_t = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
    x = x0 + sigma * eps
    torch.testing.assert_close(noise.network_input(x, sigma), x_t, rtol=1e-9, atol=1e-9)
    output = {
        "epsilon": eps,
        "sample": x0,
        "v_prediction": abar.sqrt() * eps - (1 - abar).sqrt() * x0,
    }[prediction]
    torch.testing.assert_close(noise.clean(x, sigma, output), x0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "name",
    ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"],
)
def test_schedulers_of_one_training_process_agree(name):
    other = discrete_noise(getattr(diffusers, name)(beta_start=1e-4, beta_end=0.02))
    torch.testing.assert_close(other.log_sigmas, LINEAR.log_sigmas, rtol=0, atol=1e-9)


def test_terminal_timestep_without_signal_is_left_out():
    noise = discrete_noise(diffusers.DDIMScheduler(rescale_betas_zero_snr=True))
    assert len(noise.log_sigmas) == 999
    assert noise.sigma_max < float("inf")


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (lambda: diffusers.FlowMatchEulerDiscreteScheduler(), "FlowMatchEulerDiscreteScheduler"),
        (lambda: diffusers.LCMScheduler(), "LCMScheduler"),
        (lambda: diffusers.EDMEulerScheduler(), "EDMEulerScheduler"),
        (
            lambda: diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction"),
            "flow_prediction",
        ),
        (
            lambda: diffusers.EulerDiscreteScheduler(
                timestep_type="continuous", prediction_type="v_prediction"
            ),
            "continuous",
        ),
        (lambda: diffusers.DDPMScheduler(trained_betas=[0.1, 0.0, 0.2]), "trained_betas"),
    ],
)
def test_other_processes_are_refused_by_name(scheduler, words):
    with pytest.raises(CheckpointError, match=words):
        discrete_noise(scheduler())
