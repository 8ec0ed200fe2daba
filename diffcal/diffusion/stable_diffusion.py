"""Stable Diffusion 1 and 2 with prompts in the place of classes."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffcal.diffusion.diffusers_base import config_of
from diffcal.diffusion.diffusers_latents import LatentCodec
from diffcal.diffusion.discrete_noise import TimestepRule, discrete_noise
from diffcal.diffusion.stable_diffusion_prompts import (
    PromptDenoiser,
    checked_prompts,
    refuse_extra_inputs,
    tokenize,
)
from diffcal.errors import CheckpointError

__all__ = ["StableDiffusionDenoiser", "embed_prompts"]


class StableDiffusionDenoiser(PromptDenoiser):
    """``D(x; sigma, condition)`` of a ``UNet2DConditionModel`` with autoencoder and text encoder.

    It is built for a list of prompts; weights range over them. A condition is a sequence of
    embeddings [b, s, d]: the weighted sum of the prompts' ones (other interpolations can be made
    from ``prompt_embeddings``). ``x`` are scaled latents. The text encoder is not kept.

    Source: Rombach et al. 2022 (arXiv:2112.10752).

    Args:
        module: ``UNet2DConditionModel``.
        vae: ``AutoencoderKL``.
        scheduler: A diffusers scheduler with ``alphas_cumprod``.
        tokenizer: ``CLIPTokenizer``.
        text_encoder: ``CLIPTextModel``.
        prompts: One prompt for each class.
        negative_prompt: Prompt of the unconditional branch; None: the empty one, as in training.
        dtype: ``float32``, or ``bfloat16``/``float16`` for autocast around the U-Net. The text
            encoder and the autoencoder compute in float32.
        timesteps: Give the network interpolated timesteps or the nearest integer ones.
        class_names: Short names of the prompts; the prompts themselves if None.
        sigma_data: Standard deviation of scaled latents.
        decode_chunk: Images that pass through the autoencoder at once.

    Raises:
        CheckpointError: a U-Net that wants more than prompt embeddings, or parts that do not fit.
        ConfigError: no prompts, or one that is longer than the text encoder can read.
    """

    def __init__(
        self,
        module: nn.Module,
        vae: nn.Module,
        scheduler: Any,
        tokenizer: Any,
        text_encoder: nn.Module,
        prompts: Sequence[str],
        *,
        negative_prompt: str | None = None,
        dtype: str = "float32",
        timesteps: TimestepRule = "continuous",
        class_names: tuple[str, ...] | None = None,
        sigma_data: float = 1.0,
        decode_chunk: int = 1,
    ) -> None:
        names = checked_prompts(prompts)
        refuse_extra_inputs(module)
        embeddings = embed_prompts(tokenizer, text_encoder, [*names, negative_prompt or ""])
        width = config_of(module).cross_attention_dim  # one for all blocks, or one for each
        if {embeddings.shape[2]} != set(width if isinstance(width, list | tuple) else [width]):
            raise CheckpointError(
                f"the text encoder gives embeddings of width {embeddings.shape[2]}, but the U-Net "
                f"attends to width {width}"
            )
        super().__init__(
            module,
            LatentCodec(vae, chunk=decode_chunk),
            discrete_noise(scheduler, timesteps),
            names,
            embeddings,
            dtype=dtype,
            class_names=class_names,
            sigma_data=sigma_data,
        )

    def _network(
        self, x_t: Float[Tensor, "b c h w"], timestep: Tensor, condition: Tensor | None
    ) -> Float[Tensor, "b d h w"]:
        return self.module(x_t, timestep, encoder_hidden_states=condition, return_dict=False)[0]


@torch.no_grad()
def embed_prompts(
    tokenizer: Any, text_encoder: nn.Module, prompts: Sequence[str]
) -> Float[Tensor, "k s d"]:
    """Last hidden states of the text encoder, padded to its full length, in float32.

    Raises:
        ConfigError: a prompt is longer than the text encoder can read.
    """
    tokens, mask = tokenize(tokenizer, prompts)
    device = next(text_encoder.parameters()).device
    masked = getattr(text_encoder.config, "use_attention_mask", False)
    output = text_encoder.float().eval()(
        tokens.to(device), attention_mask=mask.to(device) if masked else None
    )
    return output[0]
