"""Text-conditional latent diffusion (Stable Diffusion 1 and 2): prompts take the place of classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from diffcal.diffusion.diffusers_base import DiffusersDenoiser, config_of, square, up_block_features
from diffcal.diffusion.diffusers_latents import LatentCodec
from diffcal.diffusion.diffusers_noise import TimestepRule, discrete_noise
from diffcal.errors import CheckpointError, ConfigError, MissingExtraError

__all__ = ["StableDiffusionDenoiser", "embed_prompts", "load_text_models"]

# Config entries of UNet2DConditionModel that ask for inputs besides one sequence of embeddings.
_EXTRA_INPUTS = (
    "addition_embed_type",
    "class_embed_type",
    "encoder_hid_dim_type",
    "num_class_embeds",
    "time_cond_proj_dim",
)


class StableDiffusionDenoiser(DiffusersDenoiser):
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
        negative_prompt: Prompt of the unconditional branch; empty in training.
        dtype: ``float32``, or ``bfloat16``/``float16`` for autocast around the U-Net. The text
            encoder and the autoencoder compute in float32.
        timesteps: Give the network interpolated timesteps or the nearest integer ones.
        class_names: Short names of the prompts; the prompts themselves if None.
        sigma_data: Standard deviation of scaled latents.
        decode_chunk: Images that pass through the autoencoder at once.

    Raises:
        CheckpointError: a U-Net that wants more than prompt embeddings (SDXL and others), or parts
            that do not fit each other.
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
        negative_prompt: str = "",
        dtype: str = "float32",
        timesteps: TimestepRule = "continuous",
        class_names: tuple[str, ...] | None = None,
        sigma_data: float = 1.0,
        decode_chunk: int = 1,
    ) -> None:
        prompts = _checked_prompts(prompts)
        _refuse_extra_inputs(module)
        config = config_of(module)
        codec = LatentCodec(vae, chunk=decode_chunk)
        if codec.latent_channels != config.in_channels:
            raise CheckpointError(
                f"the U-Net takes {config.in_channels} channels, but the autoencoder gives "
                f"{codec.latent_channels} (inpainting and image-to-image networks are not supported)"
            )
        super().__init__(
            module,
            discrete_noise(scheduler, timesteps),
            sample_shape=(codec.latent_channels, *square(config.sample_size)),
            sigma_data=sigma_data,
            condition_kind="prompt",
            num_classes=len(prompts),
            class_names=class_names or prompts,
            feature_modules=up_block_features(module),
            dtype=dtype,
        )
        self.codec = codec
        self.prompts = prompts
        self.negative_prompt = negative_prompt
        embeddings = embed_prompts(tokenizer, text_encoder, [*prompts, negative_prompt])
        width = config.cross_attention_dim  # one for all blocks, or one for each
        if {embeddings.shape[2]} != set(width if isinstance(width, list | tuple) else [width]):
            raise CheckpointError(
                f"the text encoder gives embeddings of width {embeddings.shape[2]}, but the U-Net "
                f"attends to width {width}"
            )
        embeddings = embeddings.to(self.device)
        self.prompt_embeddings: Float[Tensor, "k s d"] = embeddings[:-1]
        self.negative_embedding: Float[Tensor, "1 s d"] = embeddings[-1:]

    def _network(
        self, x_t: Float[Tensor, "b c h w"], timestep: Tensor, condition: Tensor | None
    ) -> Float[Tensor, "b d h w"]:
        return self.module(x_t, timestep, encoder_hidden_states=condition, return_dict=False)[0]

    def condition(self, weights: Float[Tensor, "b k"] | None) -> Float[Tensor, "b s d"]:
        """Weighted sum of the prompt embeddings.

        Raises:
            ConfigError: weights do not range over the prompts.
        """
        return torch.einsum("bk,ksd->bsd", self._check_weights(weights), self.prompt_embeddings)

    def unconditional(self, batch_size: int) -> Float[Tensor, "b s d"]:
        """Embedding of the negative (empty) prompt."""
        return self.negative_embedding.expand(batch_size, -1, -1)

    def encode(self, images: UInt8[Tensor, "b h w c"]) -> Float[Tensor, "b z y x"]:
        """Scaled latents of images: the mode of the encoder's distribution."""
        return self.codec.encode(images.to(self.device))

    def decode(self, x: Float[Tensor, "b z y x"]) -> UInt8[Tensor, "b h w c"]:
        """Images of scaled latents, decoded in float32."""
        return self.codec.decode(x)

    def to(self, device: torch.device | str) -> "StableDiffusionDenoiser":
        """The same denoiser, U-Net, autoencoder and embeddings moved to ``device`` in place."""
        self.codec.to(device)
        self.prompt_embeddings = self.prompt_embeddings.to(device)
        self.negative_embedding = self.negative_embedding.to(device)
        super().to(device)
        return self

    def _identity(self) -> list[Any]:
        vae = self.codec.vae
        text = {"prompts": self.prompt_embeddings, "negative": self.negative_embedding}
        return [
            *super()._identity(),
            ("autoencoder", vae.config, vae.state_dict()),
            ("text", {"prompts": self.prompts, "negative": self.negative_prompt}, text),
        ]


@torch.no_grad()
def embed_prompts(
    tokenizer: Any, text_encoder: nn.Module, prompts: Sequence[str]
) -> Float[Tensor, "k s d"]:
    """Last hidden states of the text encoder, padded to its full length, in float32.

    Raises:
        ConfigError: a prompt is longer than the text encoder can read (nothing is cut off silently).
    """
    limit = tokenizer.model_max_length
    for prompt in prompts:
        length = len(tokenizer(prompt).input_ids)
        if length > limit:
            raise ConfigError(
                f"prompt '{prompt[:60]}...' has {length} tokens; the text encoder reads {limit}: "
                "shorten it"
            )
    tokens = tokenizer(
        list(prompts), padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
    )
    device = next(text_encoder.parameters()).device
    masked = getattr(text_encoder.config, "use_attention_mask", False)
    text_encoder = text_encoder.float().eval()
    output = text_encoder(
        tokens.input_ids.to(device),
        attention_mask=tokens.attention_mask.to(device) if masked else None,
    )
    return output[0]


def load_text_models(tokenizer_folder: Path, encoder_folder: Path) -> tuple[Any, nn.Module]:
    """CLIP tokenizer and text encoder of two folders, weights from safetensors only.

    Raises:
        MissingExtraError: transformers is not installed.
        CheckpointError: the folders do not hold them, or weights are missing.
    """
    try:
        from transformers import CLIPTextModel, CLIPTokenizer
    except ImportError as error:
        raise MissingExtraError(
            "text-conditional models need the package transformers: pip install 'diffcal[clip]'"
        ) from error
    try:
        tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
        loaded: Any = CLIPTextModel.from_pretrained(
            encoder_folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # damaged files raise errors of many kinds
        raise CheckpointError(
            f"text encoder of '{encoder_folder.parent}' cannot be read: {_first_line(error)}"
        ) from error
    encoder, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"text encoder '{encoder_folder}' lacks {len(missing)} weights, first '{missing[0]}'"
        )
    return tokenizer, encoder


def _checked_prompts(prompts: Sequence[str]) -> tuple[str, ...]:
    if isinstance(prompts, str) or not prompts:
        raise ConfigError(
            "a text-conditional model needs a list of prompts, one for each class, for example "
            "prompts=['a photo of a cat', 'a photo of a dog']"
        )
    return tuple(prompts)


def _refuse_extra_inputs(module: nn.Module) -> None:
    for key in _EXTRA_INPUTS:
        value = config_of(module).get(key)
        if value is not None:
            raise CheckpointError(
                f"UNet2DConditionModel with {key} '{value}' wants more than prompt embeddings (as "
                "SDXL, Kandinsky and distilled models do), which is not supported; Stable Diffusion "
                "1 and 2 are"
            )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
