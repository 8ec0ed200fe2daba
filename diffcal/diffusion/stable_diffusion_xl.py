"""Stable Diffusion XL with prompts in the place of classes."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from diffcal.diffusion.diffusers_base import config_of, square
from diffcal.diffusion.diffusers_latents import LatentCodec
from diffcal.diffusion.discrete_noise import TimestepRule, discrete_noise
from diffcal.diffusion.stable_diffusion_prompts import (
    PromptDenoiser,
    checked_prompts,
    refuse_extra_inputs,
    tokenize,
)
from diffcal.errors import CheckpointError

__all__ = ["StableDiffusionXLDenoiser", "embed_prompts_xl"]


class StableDiffusionXLDenoiser(PromptDenoiser):
    """``D(x; sigma, condition)`` of an SDXL base model: two text encoders, pooled text and image size.

    A condition is one tensor [b, s + 1, d]: the tokens' embeddings and, in the last row, the pooled
    embedding of the second text encoder, filled with zeros up to d. So a mix of prompts mixes both.
    The network is told the full image size and no crop.

    Source: Podell et al. 2023 (arXiv:2307.01952).

    Args:
        module: ``UNet2DConditionModel`` with ``addition_embed_type`` ``text_time``.
        vae: ``AutoencoderKL``.
        scheduler: A diffusers scheduler with ``alphas_cumprod``.
        tokenizers: The two ``CLIPTokenizer``.
        text_encoders: ``CLIPTextModel`` and ``CLIPTextModelWithProjection``.
        prompts: One prompt for each class.
        negative_prompt: Prompt of the unconditional branch; None: embeddings of zeros, as SDXL was
            trained with.
        dtype: ``float32``, or ``bfloat16``/``float16`` for autocast around the U-Net.
        timesteps: Give the network interpolated timesteps or the nearest integer ones.
        class_names: Short names of the prompts; the prompts themselves if None.
        sigma_data: Standard deviation of scaled latents.
        decode_chunk: Images that pass through the autoencoder at once.

    Raises:
        CheckpointError: a U-Net of another kind, or parts that do not fit each other.
        ConfigError: no prompts, or one that is longer than the text encoders can read.
    """

    def __init__(
        self,
        module: nn.Module,
        vae: nn.Module,
        scheduler: Any,
        tokenizers: tuple[Any, Any],
        text_encoders: tuple[nn.Module, nn.Module],
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
        refuse_extra_inputs(module, addition_embed_type="text_time")
        config = config_of(module)
        everything = [*names, negative_prompt or ""]
        tokens, pooled = embed_prompts_xl(tokenizers, text_encoders, everything)
        if negative_prompt is None:
            tokens[-1], pooled[-1] = 0, 0
        width = config.cross_attention_dim
        if tokens.shape[2] != width or pooled.shape[1] > width:
            raise CheckpointError(
                f"the text encoders give embeddings of width {tokens.shape[2]} and {pooled.shape[1]} "
                f"(pooled), but the U-Net attends to width {width}"
            )
        wanted = config.projection_class_embeddings_input_dim
        given = pooled.shape[1] + 6 * config.addition_time_embed_dim
        if wanted != given:
            raise CheckpointError(
                f"the U-Net takes {wanted} numbers of pooled text and sizes, but there are {given} "
                "(networks with an aesthetic score, as SDXL's refiner, are not supported)"
            )
        last = torch.nn.functional.pad(pooled, (0, width - pooled.shape[1]))
        codec = LatentCodec(vae, chunk=decode_chunk)
        super().__init__(
            module,
            codec,
            discrete_noise(scheduler, timesteps),
            names,
            torch.cat([tokens, last[:, None]], dim=1),
            dtype=dtype,
            class_names=class_names,
            sigma_data=sigma_data,
        )
        self._pooled_width = pooled.shape[1]
        height, width = (side * codec.downsampling for side in square(config.sample_size))
        self._sizes = (height, width, 0, 0, height, width)  # original, crop corner, target

    def _network(
        self, x_t: Float[Tensor, "b c h w"], timestep: Tensor, condition: Tensor | None
    ) -> Float[Tensor, "b d h w"]:
        assert condition is not None  # __call__ has seen to it
        sizes = torch.tensor(self._sizes, dtype=torch.float32, device=x_t.device)
        added = {
            "text_embeds": condition[:, -1, : self._pooled_width],
            "time_ids": sizes.expand(len(x_t), -1),
        }
        return self.module(
            x_t,
            timestep,
            encoder_hidden_states=condition[:, :-1],
            added_cond_kwargs=added,
            return_dict=False,
        )[0]


@torch.no_grad()
def embed_prompts_xl(
    tokenizers: tuple[Any, Any],
    text_encoders: tuple[nn.Module, nn.Module],
    prompts: Sequence[str],
) -> tuple[Float[Tensor, "k s d"], Float[Tensor, "k p"]]:
    """Penultimate hidden states of both encoders side by side, and the second one's pooled embedding.

    Raises:
        ConfigError: a prompt is longer than the text encoders can read.
    """
    states, pooled = [], None
    for tokenizer, encoder in zip(tokenizers, text_encoders, strict=True):
        tokens, _ = tokenize(tokenizer, prompts)
        device = next(encoder.parameters()).device
        output = encoder.float().eval()(tokens.to(device), output_hidden_states=True)
        states.append(output.hidden_states[-2])
        pooled = output[0]
    if pooled is None or pooled.ndim != 2:
        raise CheckpointError(
            "the second text encoder has no projected output; expected CLIPTextModelWithProjection"
        )
    return torch.cat(states, dim=2), pooled
