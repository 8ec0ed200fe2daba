"""What text-conditional latent diffusion models share: prompts take the place of classes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from diffcal.diffusion.diffusers_base import DiffusersDenoiser, config_of, square, up_block_features
from diffcal.diffusion.diffusers_latents import LatentCodec
from diffcal.diffusion.discrete_noise import DiscreteNoise
from diffcal.errors import CheckpointError, ConfigError, MissingExtraError

__all__ = [
    "PromptDenoiser",
    "checked_prompts",
    "load_text_models",
    "refuse_extra_inputs",
    "tokenize",
]

# Config entries of UNet2DConditionModel that ask for inputs besides one sequence of embeddings.
_EXTRA_INPUTS = (
    "addition_embed_type",
    "class_embed_type",
    "encoder_hid_dim_type",
    "num_class_embeds",
    "time_cond_proj_dim",
)


class PromptDenoiser(DiffusersDenoiser):
    """Denoiser of scaled latents whose conditions are mixed from the embeddings of given prompts.

    Args:
        module: ``UNet2DConditionModel``.
        codec: Images to latents and back.
        noise: Noise levels and prediction of the network.
        prompts: One prompt for each class.
        embeddings: Conditions [k + 1, s, d] of the prompts and, last, of the unconditional branch.
        dtype: ``float32``, or ``bfloat16``/``float16`` for autocast around the U-Net.
        class_names: Short names of the prompts; the prompts themselves if None.
        sigma_data: Standard deviation of scaled latents.
    """

    def __init__(
        self,
        module: nn.Module,
        codec: LatentCodec,
        noise: DiscreteNoise,
        prompts: tuple[str, ...],
        embeddings: Float[Tensor, "n s d"],
        *,
        dtype: str,
        class_names: tuple[str, ...] | None,
        sigma_data: float,
    ) -> None:
        config = config_of(module)
        if codec.latent_channels != config.in_channels:
            raise CheckpointError(
                f"the U-Net takes {config.in_channels} channels, but the autoencoder gives "
                f"{codec.latent_channels} (inpainting and image-to-image networks are not supported)"
            )
        super().__init__(
            module,
            noise,
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
        embeddings = embeddings.to(self.device)
        self.prompt_embeddings = embeddings[:-1]
        """Conditions [k, s, d] of the prompts, one each."""
        self.negative_embedding = embeddings[-1:]
        """Condition [1, s, d] of the unconditional branch."""

    def condition(self, weights: Float[Tensor, "b k"] | None) -> Float[Tensor, "b s d"]:
        """Weighted sum of the prompt embeddings.

        Raises:
            ConfigError: weights do not range over the prompts.
        """
        return torch.einsum("bk,ksd->bsd", self._check_weights(weights), self.prompt_embeddings)

    def unconditional(self, batch_size: int) -> Float[Tensor, "b s d"]:
        """Condition of the negative (empty) prompt."""
        return self.negative_embedding.expand(batch_size, -1, -1)

    def encode(self, images: UInt8[Tensor, "b h w c"]) -> Float[Tensor, "b z y x"]:
        """Scaled latents of images: the mode of the encoder's distribution."""
        return self.codec.encode(images.to(self.device))

    def decode(self, x: Float[Tensor, "b z y x"]) -> UInt8[Tensor, "b h w c"]:
        """Images of scaled latents, decoded in float32."""
        return self.codec.decode(x)

    def to(self, device: torch.device | str) -> "PromptDenoiser":
        """The same denoiser, U-Net, autoencoder and embeddings moved to ``device`` in place."""
        self.codec.to(device)
        self.prompt_embeddings = self.prompt_embeddings.to(device)
        self.negative_embedding = self.negative_embedding.to(device)
        super().to(device)
        return self

    def _identity(self) -> list[tuple[str, Mapping[str, Any], Mapping[str, Tensor]]]:
        vae = self.codec.vae
        text = {"prompts": self.prompt_embeddings, "negative": self.negative_embedding}
        return [
            *super()._identity(),
            ("autoencoder", vae.config, vae.state_dict()),
            ("text", {"prompts": self.prompts}, text),
        ]


def checked_prompts(prompts: Sequence[str]) -> tuple[str, ...]:
    """The prompts as a tuple.

    Raises:
        ConfigError: there are none, or a single string was given.
    """
    if isinstance(prompts, str) or not prompts:
        raise ConfigError(
            "a text-conditional model needs a list of prompts, one for each class, for example "
            "prompts=['a photo of a cat', 'a photo of a dog']"
        )
    return tuple(prompts)


def refuse_extra_inputs(module: nn.Module, **allowed: str) -> None:
    """Refuse a U-Net that wants other inputs than ``allowed``, which maps config entries to values.

    Raises:
        CheckpointError: another entry asks for an input.
    """
    for key in _EXTRA_INPUTS:
        value = config_of(module).get(key)
        if value != allowed.get(key):
            raise CheckpointError(
                f"UNet2DConditionModel with {key} '{value}' takes other inputs than this pipeline "
                f"gives ({key} '{allowed.get(key)}'); Stable Diffusion 1, 2 and XL are supported"
            )


def tokenize(
    tokenizer: Any, prompts: Sequence[str]
) -> tuple[Int[Tensor, "n s"], Int[Tensor, "n s"]]:
    """Token numbers and attention mask of prompts, padded to the tokenizer's full length.

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
    tokens = tokenizer(list(prompts), padding="max_length", max_length=limit, return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask


def load_text_models(
    tokenizer_folder: Path,
    encoder_folder: Path,
    kind: Literal["CLIPTextModel", "CLIPTextModelWithProjection"] = "CLIPTextModel",
) -> tuple[Any, nn.Module]:
    """CLIP tokenizer and text encoder of two folders, in float32, weights from safetensors only.

    Raises:
        MissingExtraError: transformers is not installed.
        CheckpointError: the folders do not hold them, or weights are missing.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            "text-conditional models need the package transformers: pip install 'diffcal[clip]'"
        ) from error
    try:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(
            tokenizer_folder, local_files_only=True
        )
        loaded: Any = getattr(transformers, kind).from_pretrained(
            encoder_folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # damaged files raise errors of many kinds
        raise CheckpointError(
            f"text encoder '{encoder_folder}' cannot be read: {' '.join(str(error).split())[:300]}"
        ) from error
    encoder, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"text encoder '{encoder_folder}' lacks {len(missing)} weights, first '{missing[0]}'"
        )
    return tokenizer, encoder.float().eval()
