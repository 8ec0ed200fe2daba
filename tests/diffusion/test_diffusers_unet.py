import copy

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import DDIMScheduler, DDPMScheduler
from tiny_diffusers import noisy, tiny_unet

from diffcal.diffusion.denoisers import Denoiser, model_to_images
from diffcal.diffusion.diffusers_unet import UNet2DDenoiser
from diffcal.errors import CheckpointError, ConfigError, DataError, MissingExtraError

PREDICTIONS = ("epsilon", "sample", "v_prediction")


@pytest.fixture(scope="module")
def denoiser():
    return UNet2DDenoiser(tiny_unet(), DDPMScheduler())


def test_it_is_a_denoiser(denoiser):
    assert isinstance(denoiser, Denoiser)
    assert denoiser.sample_shape == (3, 8, 8)
    assert (denoiser.condition_kind, denoiser.num_classes) == ("class", 5)
    assert denoiser.class_names == ("0", "1", "2", "3", "4")
    assert denoiser.sigma_data == 0.5
    assert 0.009 < denoiser.sigma_min < 0.011


@torch.no_grad()
def test_wrapped_network_takes_integers_and_one_hot_rows_alike():
    plain, labels = tiny_unet(), torch.tensor([4, 0, 2])
    x, _ = noisy((3, 8, 8), [1.0, 1.0, 1.0])
    expected = plain(x, torch.tensor([7, 500, 999]), class_labels=labels).sample
    wrapped = UNet2DDenoiser(copy.deepcopy(plain), DDPMScheduler()).module
    for condition in (labels, torch.eye(5)[labels]):
        result = wrapped(x, torch.tensor([7, 500, 999]), class_labels=condition).sample
        assert torch.equal(result, expected)
    assert list(wrapped.state_dict()) == list(plain.state_dict())


@torch.no_grad()
def test_soft_conditions_are_mixed_embeddings(denoiser):
    weights = torch.tensor([[0.25, 0.0, 0.75, 0.0, 0.0]])
    x, sigma = noisy((3, 8, 8), [0.7])
    soft = denoiser(x, sigma, denoiser.condition(weights))
    # The same network with the mixed row written into its table as a hard class.
    other = copy.deepcopy(denoiser.module)
    other.class_embedding.weight[1] = weights[0] @ denoiser.module.class_embedding.weight
    hard = UNet2DDenoiser(other, DDPMScheduler())(x, sigma, torch.tensor([1]))
    torch.testing.assert_close(soft, hard, atol=1e-5, rtol=0)
    assert not torch.allclose(soft, denoiser(x, sigma, torch.tensor([0])), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler])
def test_agrees_with_the_schedulers_own_clean_sample(prediction, kind):
    network = tiny_unet()
    scheduler = kind(prediction_type=prediction, clip_sample=False)
    scheduler.set_timesteps(1000)
    denoiser = UNet2DDenoiser(copy.deepcopy(network), scheduler)
    timesteps = torch.tensor([0, 1, 250, 600, 999])
    sigma = denoiser.noise.sigma(timesteps).float()
    x, _ = noisy((3, 8, 8), sigma)
    labels = torch.tensor([0, 1, 2, 3, 4])
    result = denoiser(x, sigma, denoiser.condition(torch.eye(5)[labels]))
    x_t = x / (1 + sigma[:, None, None, None] ** 2).sqrt()
    for i, t in enumerate(timesteps):
        output = network(x_t[i : i + 1], t, class_labels=labels[i : i + 1]).sample
        expected = scheduler.step(output, int(t), x_t[i : i + 1]).pred_original_sample
        scale = float(expected.abs().max())
        torch.testing.assert_close(result[i : i + 1], expected, atol=2e-4 * scale, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_network_that_knows_the_answer_gives_the_clean_sample(prediction):
    network = tiny_unet(None)
    denoiser = UNet2DDenoiser(network, DDPMScheduler(prediction_type=prediction))
    generator = torch.Generator().manual_seed(3)
    clean, eps = torch.randn(2, 4, 3, 8, 8, generator=generator)
    sigma = torch.tensor([0.02, 0.5, 5.0, 100.0])
    level = sigma[:, None, None, None]
    abar = 1 / (1 + level**2)
    answer = {
        "epsilon": eps,
        "sample": clean,
        "v_prediction": abar.sqrt() * eps - (1 - abar).sqrt() * clean,
    }[prediction]
    seen = {}

    def exact(x_t, timestep, class_labels=None, return_dict=True):
        seen["x_t"] = x_t
        return (answer,)

    network.forward = exact
    result = denoiser(clean + level * eps, sigma)
    torch.testing.assert_close(result, clean, atol=5e-5, rtol=0)
    torch.testing.assert_close(
        seen["x_t"], abar.sqrt() * clean + (1 - abar).sqrt() * eps, atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_each_example_has_its_own_noise_level(denoiser):
    x, sigma = noisy((3, 8, 8), [0.05, 1.0, 40.0])
    condition = denoiser.condition(torch.eye(5)[:3])
    together = denoiser(x, sigma, condition)
    for i in range(3):
        alone = denoiser(x[i : i + 1], sigma[i : i + 1], condition[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_low_noise_returns_the_input(denoiser):
    x, sigma = noisy((3, 8, 8), [1e-7])
    result = denoiser(x, sigma, denoiser.condition(torch.eye(5)[:1]))
    torch.testing.assert_close(result, x, atol=1e-5, rtol=0)


def test_gradients_reach_parameters_and_input(denoiser):
    x, sigma = noisy((3, 8, 8), [0.5, 2.0])
    x.requires_grad_()
    weights = torch.tensor([[0.5, 0.5, 0, 0, 0], [0, 0, 0, 0, 1.0]])
    denoiser(x, sigma, denoiser.condition(weights)).square().sum().backward()
    assert x.grad.abs().sum() > 0
    table = denoiser.module.class_embedding.weight.grad
    assert (table.abs().sum(dim=1) > 0).tolist() == [True, True, False, False, True]
    denoiser.module.zero_grad()


# torch says that vmap over CPU attention is slow; here it only has to be right.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_per_example_gradients_by_vmap_equal_one_backward_each(denoiser):
    from torch.func import functional_call, grad, vmap

    network = denoiser.module
    parameters = {name: p.detach() for name, p in network.named_parameters()}
    x, sigma = noisy((3, 8, 8), [0.5, 2.0])
    condition = denoiser.condition(torch.eye(5)[:2])

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, *args):
            return denoiser(*args)

    wrapped = Wrapped()

    def loss(values, x, sigma, condition):
        named = {f"network.{name}": value for name, value in values.items()}
        return functional_call(wrapped, named, (x[None], sigma[None], condition[None])).sum()

    fast = vmap(grad(loss), in_dims=(None, 0, 0, 0))(parameters, x, sigma, condition)
    for i in range(2):
        denoiser(x[i : i + 1], sigma[i : i + 1], condition[i : i + 1]).sum().backward()
        for name in ("conv_in.weight", "class_embedding.weight"):
            expected = network.get_parameter(name).grad
            scale = float(expected.abs().max())
            torch.testing.assert_close(fast[name][i], expected, atol=1e-4 * scale, rtol=0)
        network.zero_grad()


@torch.no_grad()
def test_half_precision_network_has_float32_ends():
    full = UNet2DDenoiser(tiny_unet(), DDPMScheduler())
    half = UNet2DDenoiser(tiny_unet(), DDPMScheduler(), dtype="bfloat16")
    x, sigma = noisy((3, 8, 8), [0.5, 2.0])
    condition = full.condition(torch.eye(5)[:2])
    a, b = full(x, sigma, condition), half(x.double(), sigma, condition)
    assert b.dtype == torch.float32
    assert next(half.module.parameters()).dtype == torch.float32
    assert not torch.equal(a, b)
    torch.testing.assert_close(a, b, atol=0.1, rtol=0)


@torch.no_grad()
def test_integer_timesteps_are_whole():
    denoiser = UNet2DDenoiser(tiny_unet(), DDPMScheduler(), timesteps="integer")
    sigma = denoiser.noise.sigma(torch.tensor([300.3])).float()
    assert denoiser.noise.timestep(sigma).tolist() == [300]
    learned = tiny_unet(time_embedding_type="learned", num_train_timesteps=1000)
    forced = UNet2DDenoiser(learned, DDPMScheduler())
    x, sigma = noisy((3, 8, 8), [0.7])
    assert forced(x, sigma, torch.tensor([1])).isfinite().all()


@torch.no_grad()
def test_learned_variance_is_dropped():
    network = tiny_unet(out_channels=6)
    denoiser = UNet2DDenoiser(network, DDPMScheduler(prediction_type="sample"))
    x, sigma = noisy((3, 8, 8), [1.0])
    result = denoiser(x, sigma, torch.tensor([1]))
    x_t = x / 2**0.5
    expected = network(x_t, denoiser.noise.timestep(sigma), torch.tensor([1])).sample[:, :3]
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("null_class", [0, 2, 4])
def test_null_class_is_the_unconditional_branch(null_class):
    denoiser = UNet2DDenoiser(tiny_unet(), DDPMScheduler(), null_class=null_class)
    assert denoiser.num_classes == 4
    rows = denoiser.condition(torch.eye(4))
    kept = [i for i in range(5) if i != null_class]
    assert torch.equal(rows, torch.eye(5)[kept])
    assert torch.equal(denoiser.unconditional(2), torch.eye(5)[[null_class] * 2])


def test_unconditional_network():
    denoiser = UNet2DDenoiser(tiny_unet(None), DDPMScheduler())
    assert (denoiser.condition_kind, denoiser.num_classes) == ("none", 0)
    assert denoiser.condition(None) is None
    x, sigma = noisy((3, 8, 8), [1.0])
    assert denoiser(x, sigma).shape == x.shape
    with pytest.raises(ConfigError, match="unconditional"):
        denoiser(x, sigma, torch.tensor([1]))
    with pytest.raises(ConfigError, match="unconditional"):
        denoiser.unconditional(1)


def test_images_pass_unchanged(denoiser):
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    x = denoiser.encode(images)
    assert x.abs().max() <= 1
    assert torch.equal(denoiser.decode(x), images)
    assert torch.equal(denoiser.decode(x), model_to_images(x))
    with pytest.raises(DataError, match="1 channels"):
        denoiser.encode(images[..., :1])


def test_features_are_tensors_of_existing_modules(denoiser):
    shapes = []
    hooks = [
        denoiser.module.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output: shapes.append(output.shape[0])
        )
        for name in denoiser.feature_modules
    ]
    x, sigma = noisy((3, 8, 8), [1.0, 1.0])
    denoiser(x, sigma, torch.tensor([1, 2]))
    for hook in hooks:
        hook.remove()
    assert shapes == [2] * len(denoiser.feature_modules)


def test_fingerprint_follows_weights_and_schedule():
    first = UNet2DDenoiser(tiny_unet(), DDPMScheduler()).fingerprint
    assert first == UNet2DDenoiser(tiny_unet(), DDIMScheduler(), dtype="bfloat16").fingerprint
    changed = tiny_unet()
    with torch.no_grad():
        changed.conv_in.bias[0] += 1e-6
    others = {
        UNet2DDenoiser(changed, DDPMScheduler()).fingerprint,
        UNet2DDenoiser(tiny_unet(), DDPMScheduler(prediction_type="sample")).fingerprint,
        UNet2DDenoiser(tiny_unet(), DDPMScheduler(beta_end=0.03)).fingerprint,
        UNet2DDenoiser(tiny_unet(norm_eps=1e-4), DDPMScheduler()).fingerprint,
    }
    assert len({first, *others}) == 5


def test_wrong_weights_and_missing_conditions_are_named(denoiser):
    x, sigma = noisy((3, 8, 8), [1.0])
    with pytest.raises(ConfigError, match="needs a class condition"):
        denoiser(x, sigma)
    with pytest.raises(ConfigError, match=r"4 columns.*5 classes"):
        denoiser.condition(torch.eye(4))
    with pytest.raises(ConfigError, match="give weights"):
        denoiser.condition(None)
    with pytest.raises(ConfigError, match="null_class"):
        denoiser.unconditional(1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_class_embeds": None, "class_embed_type": "timestep"}, "'timestep'"),
        ({"num_class_embeds": None, "class_embed_type": "identity"}, "'identity'"),
        ({"time_embedding_type": "fourier"}, "fourier"),
        ({"in_channels": 4}, "4 channels"),
        ({"in_channels": 1}, "maps 1 to 3"),
        ({"sample_size": None}, "sample_size"),
    ],
)
def test_unsupported_networks_are_refused(changes, words):
    with pytest.raises(CheckpointError, match=words):
        UNet2DDenoiser(tiny_unet(**changes), DDPMScheduler())


def test_unfitting_settings_are_refused():
    with pytest.raises(ConfigError, match="null_class 5"):
        UNet2DDenoiser(tiny_unet(), DDPMScheduler(), null_class=5)
    with pytest.raises(ConfigError, match="class_names has 2"):
        UNet2DDenoiser(tiny_unet(), DDPMScheduler(), class_names=("a", "b"))


def test_attention_backends():
    denoiser = UNet2DDenoiser(tiny_unet(), DDPMScheduler())
    denoiser.set_attention_backend("sdpa")
    x, sigma = noisy((3, 8, 8), [1.0])
    assert denoiser(x, sigma, torch.tensor([1])).isfinite().all()
    if not torch.cuda.is_available():
        # Without the package: the extra is named; with it, xformers still wants a GPU.
        with pytest.raises((MissingExtraError, ConfigError), match="xformers"):
            denoiser.set_attention_backend("xformers")
