import copy

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import AutoencoderTiny, DDIMScheduler
from tiny_diffusers import noisy, tiny_transformer, tiny_vae

from diffcal.diffusion.denoisers import Denoiser, images_to_model, model_to_images
from diffcal.diffusion.diffusers_dit import DiTDenoiser
from diffcal.diffusion.diffusers_latents import LatentCodec
from diffcal.errors import CheckpointError, ConfigError, DataError


@pytest.fixture(scope="module")
def denoiser():
    return DiTDenoiser(tiny_transformer(), tiny_vae(), DDIMScheduler())


def test_it_is_a_denoiser_of_latents(denoiser):
    assert isinstance(denoiser, Denoiser)
    assert denoiser.sample_shape == (4, 4, 4)
    assert (denoiser.condition_kind, denoiser.num_classes) == ("class", 6)
    assert denoiser.sigma_data == 1.0
    assert denoiser.feature_modules[0] == "transformer_blocks.1"
    assert not any(p.requires_grad for p in denoiser.codec.vae.parameters())


@torch.no_grad()
def test_every_block_takes_integers_and_one_hot_rows_alike():
    plain, labels = tiny_transformer(), torch.tensor([5, 0, 6])
    x, _ = noisy((4, 4, 4), [1.0, 1.0, 1.0])
    t = torch.tensor([7, 500, 999])
    expected = plain(x, timestep=t, class_labels=labels).sample
    wrapped = DiTDenoiser(copy.deepcopy(plain), tiny_vae(), DDIMScheduler()).module
    for condition in (labels, torch.eye(7)[labels]):
        assert torch.equal(wrapped(x, timestep=t, class_labels=condition).sample, expected)
    assert list(wrapped.state_dict()) == list(plain.state_dict())


@torch.no_grad()
def test_soft_conditions_are_mixed_embeddings_in_every_block(denoiser):
    weights = torch.tensor([[0.25, 0.0, 0.75, 0.0, 0.0, 0.0]])
    x, sigma = noisy((4, 4, 4), [0.7])
    soft = denoiser(x, sigma, denoiser.condition(weights))
    other = copy.deepcopy(denoiser)
    for block in other.module.transformer_blocks:
        table = block.norm1.emb.class_embedder.embedding_table.weight
        table[1] = 0.25 * table[0] + 0.75 * table[2]
    hard = other(x, sigma, torch.tensor([1]))
    torch.testing.assert_close(soft, hard, atol=1e-5, rtol=0)
    assert not torch.allclose(soft, denoiser(x, sigma, torch.tensor([0])), atol=1e-4)


@torch.no_grad()
def test_agrees_with_the_schedulers_own_clean_sample():
    network, scheduler = tiny_transformer(), DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(1000)
    denoiser = DiTDenoiser(copy.deepcopy(network), tiny_vae(), scheduler)
    timesteps = torch.tensor([0, 400, 999])
    sigma = denoiser.noise.sigma(timesteps).float()
    x, _ = noisy((4, 4, 4), sigma)
    result = denoiser(x, sigma, denoiser.condition(torch.eye(6)[:3]))
    x_t = x / (1 + sigma[:, None, None, None] ** 2).sqrt()
    for i, t in enumerate(timesteps):
        output = network(x_t[i : i + 1], t[None], torch.tensor([i])).sample[:, :4]
        expected = scheduler.step(output, int(t), x_t[i : i + 1]).pred_original_sample
        scale = float(expected.abs().max())
        torch.testing.assert_close(result[i : i + 1], expected, atol=2e-4 * scale, rtol=0)


def test_null_class_is_the_extra_row(denoiser):
    assert torch.equal(denoiser.unconditional(2), torch.eye(7)[[6, 6]])
    assert torch.equal(denoiser.condition(torch.eye(6)), torch.eye(7)[:6])
    x, sigma = noisy((4, 4, 4), [1.0])
    null = denoiser(x, sigma, denoiser.unconditional(1))
    assert torch.equal(null, denoiser(x, sigma, torch.tensor([6])))


def test_gradients_reach_every_table(denoiser):
    x, sigma = noisy((4, 4, 4), [0.5])
    condition = denoiser.condition(torch.tensor([[0.5, 0.5, 0, 0, 0, 0]]))
    denoiser(x, sigma, condition).square().sum().backward()
    for block in denoiser.module.transformer_blocks:
        gradient = block.norm1.emb.class_embedder.embedding_table.weight.grad
        assert (gradient.abs().sum(dim=1) > 0).tolist() == [True, True] + [False] * 5
    denoiser.module.zero_grad()


@torch.no_grad()
def test_images_are_decoded_in_float32_whatever_the_network_computes_in():
    full = DiTDenoiser(tiny_transformer(), tiny_vae(), DDIMScheduler())
    half = DiTDenoiser(tiny_transformer(), tiny_vae(), DDIMScheduler(), dtype="bfloat16")
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = model_to_images(full.codec.vae.decode(x / 0.18215).sample)
    assert torch.equal(full.decode(x), expected)
    assert torch.equal(half.decode(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(half.decode(x), expected)
    sigma = torch.tensor([1.0, 2.0])
    assert half(x, sigma, half.condition(torch.eye(6)[:2])).dtype == torch.float32


def test_decoding_does_not_depend_on_the_batch(denoiser):
    x = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    together = denoiser.decode(x)
    assert together.shape == (5, 8, 8, 3)
    for i in range(5):
        assert torch.equal(together[i : i + 1], denoiser.decode(x[i : i + 1]))


@torch.no_grad()
@pytest.mark.parametrize(
    ("changes", "shift", "scale"),
    [
        ({}, 0.0, 0.18215),
        ({"shift_factor": 0.1, "scaling_factor": 0.3}, 0.1, 0.3),
        (
            {"latents_mean": [1.0, 2, 3, 4], "latents_std": [2.0, 2, 2, 4], "scaling_factor": 0.5},
            torch.tensor([1.0, 2, 3, 4]).reshape(4, 1, 1),
            torch.tensor([0.25, 0.25, 0.25, 0.125]).reshape(4, 1, 1),
        ),
    ],
)
def test_latents_are_scaled_as_the_config_says(changes, shift, scale):
    codec = LatentCodec(tiny_vae(**changes), chunk=2)
    images = torch.randint(0, 256, (3, 8, 8, 3), dtype=torch.uint8)
    mode = codec.vae.encode(images_to_model(images)).latent_dist.mode()
    latents = codec.encode(images)
    torch.testing.assert_close(latents, (mode - shift) * scale, atol=1e-5, rtol=1e-5)
    expected = model_to_images(codec.vae.decode(mode).sample)
    assert (codec.decode(latents).int() - expected.int()).abs().max() <= 1


def test_images_that_do_not_fit_are_refused(denoiser):
    with pytest.raises(DataError, match="1 channels"):
        denoiser.encode(torch.zeros(1, 8, 8, 1, dtype=torch.uint8))
    with pytest.raises(DataError, match="9 x 8 pixels"):
        denoiser.encode(torch.zeros(1, 9, 8, 3, dtype=torch.uint8))


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(CheckpointError, match="AutoencoderTiny"):
        DiTDenoiser(tiny_transformer(), AutoencoderTiny(), DDIMScheduler())
    with pytest.raises(CheckpointError, match=r"takes 4 latent channels.*gives 2"):
        DiTDenoiser(tiny_transformer(), tiny_vae(latent_channels=2), DDIMScheduler())
    with pytest.raises(ConfigError, match="class_names has 1"):
        DiTDenoiser(tiny_transformer(), tiny_vae(), DDIMScheduler(), class_names=("a",))


def test_fingerprint_covers_the_autoencoder():
    first = DiTDenoiser(tiny_transformer(), tiny_vae(), DDIMScheduler()).fingerprint
    assert first == DiTDenoiser(tiny_transformer(), tiny_vae(), DDIMScheduler()).fingerprint
    other = DiTDenoiser(tiny_transformer(), tiny_vae(scaling_factor=0.2), DDIMScheduler())
    assert other.fingerprint != first
