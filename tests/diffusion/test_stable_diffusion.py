import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import DDIMScheduler, StableDiffusionPipeline
from tiny_diffusers import (
    SEQUENCE,
    noisy,
    tiny_text_models,
    tiny_text_unet,
    tiny_vae,
)

from diffcal.diffusion.denoisers import Denoiser
from diffcal.diffusion.stable_diffusion import StableDiffusionDenoiser, embed_prompts
from diffcal.errors import CheckpointError, ConfigError

PROMPTS = ("a cat", "a big dog", "car")


@pytest.fixture(scope="module")
def text_models(tmp_path_factory):
    return tiny_text_models(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def build(text_models):
    def make(unet=None, vae=None, prompts=PROMPTS, **options):
        return StableDiffusionDenoiser(
            unet or tiny_text_unet(),
            vae or tiny_vae(),
            DDIMScheduler(steps_offset=1, clip_sample=False),
            *text_models,
            prompts,
            **options,
        )

    return make


def test_prompts_are_its_classes(build):
    denoiser = build()
    assert isinstance(denoiser, Denoiser)
    assert denoiser.sample_shape == (4, 4, 4)
    assert (denoiser.condition_kind, denoiser.num_classes) == ("prompt", 3)
    assert denoiser.class_names == PROMPTS
    assert denoiser.prompt_embeddings.shape == (3, SEQUENCE, 16)
    assert build(class_names=("cat", "dog", "car")).class_names == ("cat", "dog", "car")


def test_embeddings_are_the_pipelines_own(build, text_models):
    tokenizer, encoder = text_models
    pipeline = StableDiffusionPipeline(
        tiny_vae(),
        encoder,
        tokenizer,
        tiny_text_unet(),
        DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    denoiser = build(negative_prompt="bad art")
    for index, prompt in enumerate(PROMPTS):
        own, negative = pipeline.encode_prompt(prompt, "cpu", 1, True, negative_prompt="bad art")
        torch.testing.assert_close(
            denoiser.prompt_embeddings[index], own[0].detach(), atol=1e-6, rtol=0
        )
    torch.testing.assert_close(
        denoiser.unconditional(2), negative.detach().expand(2, -1, -1), atol=1e-6, rtol=0
    )


def test_conditions_are_weighted_sums_of_embeddings(build):
    denoiser = build()
    assert torch.equal(denoiser.condition(torch.eye(3)), denoiser.prompt_embeddings)
    mixed = denoiser.condition(torch.tensor([[0.2, 0.3, 0.5]]))
    e = denoiser.prompt_embeddings
    torch.testing.assert_close(mixed[0], 0.2 * e[0] + 0.3 * e[1] + 0.5 * e[2], atol=1e-6, rtol=0)


@torch.no_grad()
def test_agrees_with_the_schedulers_own_clean_sample(build):
    denoiser, network = build(), tiny_text_unet()
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    scheduler.set_timesteps(1000)
    timesteps = torch.tensor([1, 400, 999])
    sigma = denoiser.noise.sigma(timesteps).float()
    x, _ = noisy((4, 4, 4), sigma)
    condition = denoiser.condition(torch.eye(3))
    result = denoiser(x, sigma, condition)
    x_t = x / (1 + sigma[:, None, None, None] ** 2).sqrt()
    for i, t in enumerate(timesteps):
        one = slice(i, i + 1)
        output = network(x_t[one], t, encoder_hidden_states=condition[one]).sample
        expected = scheduler.step(output, int(t), x_t[one]).pred_original_sample
        scale = float(expected.abs().max())
        torch.testing.assert_close(result[one], expected, atol=2e-4 * scale, rtol=0)


def test_gradients_and_half_precision(build):
    full, half = build(), build(dtype="bfloat16")
    x, sigma = noisy((4, 4, 4), [0.5, 2.0])
    condition = full.condition(torch.eye(3)[:2])
    a, b = full(x, sigma, condition), half(x, sigma, condition)
    assert b.dtype == torch.float32
    torch.testing.assert_close(a, b, atol=0.1, rtol=0)
    for result, denoiser in ((a, full), (b, half)):
        result.square().sum().backward()
        assert all(p.grad is not None for p in denoiser.module.parameters())


def test_images_go_through_the_autoencoder(build):
    denoiser = build()
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    latents = denoiser.encode(images)
    assert latents.shape == (2, 4, 4, 4)
    assert denoiser.decode(latents).shape == images.shape


def test_moving_keeps_results(build):
    denoiser = build()
    x, sigma = noisy((4, 4, 4), [1.0])
    before = denoiser(x, sigma, denoiser.condition(torch.eye(3)[:1]))
    assert denoiser.to("cpu") is denoiser
    assert torch.equal(denoiser(x, sigma, denoiser.condition(torch.eye(3)[:1])), before)


def test_fingerprint_covers_prompts(build):
    assert build().fingerprint == build().fingerprint
    assert build(prompts=("a cat", "a dog", "car")).fingerprint != build().fingerprint
    assert build(negative_prompt="bad").fingerprint != build().fingerprint


def test_long_prompts_are_refused_rather_than_cut(text_models):
    with pytest.raises(ConfigError, match=f"tokens; the text encoder reads {SEQUENCE}"):
        embed_prompts(*text_models, ["cat", "a b c d e f g h i j k l m n o"])


@pytest.mark.parametrize("prompts", [(), "a cat"])
def test_prompts_must_be_a_list(build, prompts):
    with pytest.raises(ConfigError, match="list of prompts"):
        build(prompts=prompts)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 4,
                "projection_class_embeddings_input_dim": 40,
            },
            "addition_embed_type 'text_time'",
        ),
        ({"time_cond_proj_dim": 8}, "time_cond_proj_dim"),
        ({"num_class_embeds": 7}, "num_class_embeds"),
        ({"in_channels": 9}, "inpainting"),
        ({"cross_attention_dim": 24}, "width 16.*width 24"),
    ],
)
def test_unsupported_networks_are_refused(build, changes, words):
    with pytest.raises(CheckpointError, match=words):
        build(unet=tiny_text_unet(**changes))
