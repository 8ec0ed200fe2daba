import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from tiny_diffusers import SEQUENCE, noisy, tiny_text_models, tiny_text_unet, tiny_vae
from transformers import CLIPTextModelWithProjection

from diffcal.diffusion.denoisers import Denoiser
from diffcal.diffusion.diffusers_denoisers import load_diffusers_denoiser
from diffcal.diffusion.stable_diffusion_xl import StableDiffusionXLDenoiser
from diffcal.errors import CheckpointError

PROMPTS = ("a cat", "a big dog", "car")
POOLED = 12


def tiny_xl_unet(**changes):
    config = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": POOLED + 6 * 4,
        "cross_attention_dim": 32,
    }
    return tiny_text_unet(**{**config, **changes})


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    tokenizer, encoder = tiny_text_models(folder)
    torch.manual_seed(5)
    config = type(encoder.config)(**{**encoder.config.to_dict(), "projection_dim": POOLED})
    return StableDiffusionXLPipeline(
        tiny_vae(),
        encoder,
        CLIPTextModelWithProjection(config).eval(),
        tokenizer,
        tokenizer,
        tiny_xl_unet(),
        DDIMScheduler(clip_sample=False, steps_offset=1),
        add_watermarker=False,
    )


def build(pipeline, unet=None, **options):
    return StableDiffusionXLDenoiser(
        unet or tiny_xl_unet(),
        pipeline.vae,
        pipeline.scheduler,
        (pipeline.tokenizer, pipeline.tokenizer_2),
        (pipeline.text_encoder, pipeline.text_encoder_2),
        PROMPTS,
        **options,
    )


@torch.no_grad()
@pytest.mark.parametrize("negative", [None, "bad art"])
def test_embeddings_are_the_pipelines_own(pipeline, negative):
    denoiser = build(pipeline, negative_prompt=negative)
    assert isinstance(denoiser, Denoiser)
    assert denoiser.prompt_embeddings.shape == (3, SEQUENCE + 1, 32)
    for index, prompt in enumerate(PROMPTS):
        tokens, none, pooled, none_pooled = pipeline.encode_prompt(
            prompt, device="cpu", negative_prompt=negative
        )
        for found, own, own_pooled in (
            (denoiser.prompt_embeddings[index], tokens, pooled),
            (denoiser.unconditional(2)[1], none, none_pooled),
        ):
            torch.testing.assert_close(found[:-1], own[0], atol=1e-6, rtol=0)
            torch.testing.assert_close(found[-1, :POOLED], own_pooled[0], atol=1e-6, rtol=0)
            assert not found[-1, POOLED:].any()


@torch.no_grad()
def test_network_is_called_as_the_pipeline_calls_it(pipeline):
    calls = []
    handle = pipeline.unet.register_forward_hook(
        lambda _module, args, kwargs, output: calls.append((args, kwargs, output)),
        with_kwargs=True,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline("a cat", height=8, width=8, num_inference_steps=2, guidance_scale=1.0)
    handle.remove()
    (x_t, t), kwargs, output = calls[0]
    denoiser = build(pipeline)
    sigma = denoiser.noise.sigma(t[None]).float()
    x = x_t * (1 + sigma**2).sqrt()
    clean = denoiser(x, sigma, denoiser.condition(torch.eye(3)[:1]))
    expected = x - sigma * output[0]
    torch.testing.assert_close(clean, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)
    assert kwargs["added_cond_kwargs"]["time_ids"].tolist() == [list(map(float, denoiser._sizes))]


def test_mixtures_mix_tokens_and_pooled_text(pipeline):
    denoiser = build(pipeline)
    mixed = denoiser.condition(torch.tensor([[0.25, 0.75, 0.0]]))
    e = denoiser.prompt_embeddings
    torch.testing.assert_close(mixed[0], 0.25 * e[0] + 0.75 * e[1], atol=1e-6, rtol=0)
    x, sigma = noisy((4, 4, 4), [1.0])
    denoiser(x, sigma, mixed).sum().backward()
    assert denoiser.module.add_embedding.linear_1.weight.grad.abs().sum() > 0


def test_folder_is_loaded(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    denoiser = load_diffusers_denoiser(tmp_path, prompts=list(PROMPTS))
    assert isinstance(denoiser, StableDiffusionXLDenoiser)
    assert denoiser.fingerprint == build(pipeline).fingerprint
    worded = load_diffusers_denoiser(tmp_path, prompts=list(PROMPTS), negative_prompt="bad art")
    assert worded.negative_embedding.any()
    assert not denoiser.negative_embedding.any()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"addition_embed_type": None}, "addition_embed_type 'None'"),
        ({"cross_attention_dim": 16}, "width 32 and 12"),
        ({"projection_class_embeddings_input_dim": 32}, "takes 32 numbers.*36"),
    ],
)
def test_unsupported_networks_are_refused(pipeline, changes, words):
    with pytest.raises(CheckpointError, match=words):
        build(pipeline, tiny_xl_unet(**changes))
