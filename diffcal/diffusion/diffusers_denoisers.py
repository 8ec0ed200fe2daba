"""Denoisers from diffusers models: local folders and hub names, for the supported families.

- ``UNet2DModel`` (the folder itself, with its scheduler), ``DDPMPipeline``, ``DDIMPipeline`` and
  ``PNDMPipeline``: :class:`UNet2DDenoiser`.
- ``DiTPipeline``: :class:`DiTDenoiser`.
- ``StableDiffusionPipeline``: :class:`StableDiffusionDenoiser`.
- ``StableDiffusionXLPipeline``: :class:`StableDiffusionXLDenoiser`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffcal.config import check_choices, config_from_dict
from diffcal.core.devices import resolve_device
from diffcal.diffusion.diffusers_base import DiffusersAttention, DiffusersDenoiser
from diffcal.diffusion.diffusers_dit import DiTDenoiser
from diffcal.diffusion.diffusers_sources import ModelFolder, is_hub_name, open_model_folder
from diffcal.diffusion.diffusers_unet import UNet2DDenoiser
from diffcal.diffusion.discrete_noise import TimestepRule
from diffcal.diffusion.stable_diffusion import StableDiffusionDenoiser
from diffcal.diffusion.stable_diffusion_prompts import checked_prompts, load_text_models
from diffcal.diffusion.stable_diffusion_xl import StableDiffusionXLDenoiser
from diffcal.errors import CheckpointError, ConfigError

__all__ = [
    "DiTDenoiser",
    "DiffusersOptions",
    "StableDiffusionDenoiser",
    "StableDiffusionXLDenoiser",
    "UNet2DDenoiser",
    "is_diffusers_source",
    "load_diffusers_denoiser",
]

_UNET_CLASSES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "UNet2DModel")


@dataclass(frozen=True, kw_only=True)
class DiffusersOptions:
    """What may be said about a diffusers model besides its source."""

    timesteps: TimestepRule = "continuous"
    """Give the network interpolated timesteps or the nearest integer ones."""
    class_names: tuple[str, ...] | None = None
    sigma_data: float | None = None
    """Standard deviation of clean samples; None: 0.5 for pixels, 1 for latents."""
    null_class: int | None = None
    """U-Nets on pixels: row of the class embedding that training used for dropped labels."""
    negative_prompt: str | None = None
    """Text-conditional models: prompt of the unconditional branch; None: what training used."""
    decode_chunk: int | None = None
    """Latent models: images that pass through the autoencoder at once; None: one."""
    attention: DiffusersAttention = "sdpa"
    revision: str | None = None
    """Branch, tag or commit of a hub repository."""
    variant: str | None = None
    """Which weight files to take where there are several, for example ``fp16``."""
    cache_dir: Path | None = None
    local_files_only: bool = False
    """Use only what the hub cache already holds."""

    def __post_init__(self) -> None:
        check_choices(self)
        if self.decode_chunk is not None and self.decode_chunk < 1:
            raise ConfigError(f"decode_chunk must be at least 1, got {self.decode_chunk}")


def is_diffusers_source(source: str | Path) -> bool:
    """Whether ``source`` is a folder that diffusers wrote, or has the form of a hub name."""
    path = Path(source)
    if not path.is_dir():
        return not path.exists() and is_hub_name(str(source))
    if (path / "model_index.json").is_file():
        return True
    config = path / "config.json"
    return config.is_file() and '"_diffusers_version"' in config.read_text("utf-8", "replace")


def load_diffusers_denoiser(
    source: str | Path,
    device: str = "cpu",
    dtype: str = "float32",
    prompts: Sequence[str] | None = None,
    **options: Any,
) -> DiffusersDenoiser:
    """Denoiser of a diffusers model.

    Weights are read from safetensors only, into float32.

    Args:
        source: Pipeline folder (``model_index.json``), ``UNet2DModel`` folder (``config.json`` with
            ``scheduler_config.json`` beside it or in ``scheduler/``), or hub name ``owner/name``.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        dtype: ``float32``, or ``bfloat16``/``float16`` for autocast around the network.
        prompts: One prompt for each class; text-conditional models only.
        options: Fields of :class:`DiffusersOptions`.

    Raises:
        CheckpointError: no such source, an unsupported pipeline (named), or damaged files.
        UnsafeCheckpointError: weights are there only as pickles.
        ConfigError: unknown or unfitting options.
        MissingExtraError: a text-conditional model without transformers.
    """
    asked: DiffusersOptions = config_from_dict(DiffusersOptions, options)
    target = resolve_device(device)
    folder = open_model_folder(
        source,
        revision=asked.revision,
        variant=asked.variant,
        cache_dir=asked.cache_dir,
        local_files_only=asked.local_files_only,
    )
    shared = {"dtype": dtype, "timesteps": asked.timesteps, "class_names": asked.class_names}
    if asked.sigma_data is not None:
        shared["sigma_data"] = asked.sigma_data
    name = folder.class_name
    if name in _UNET_CLASSES:
        _refuse(name, prompts=prompts, **_set(asked, "negative_prompt", "decode_chunk"))
        denoiser = UNet2DDenoiser(
            folder.network("unet", "UNet2DModel"),
            folder.scheduler(),
            null_class=asked.null_class,
            **shared,
        )
    elif name == "DiTPipeline":
        _refuse(name, prompts=prompts, **_set(asked, "negative_prompt", "null_class"))
        denoiser = _load_dit(folder, asked, shared)
    elif name in ("StableDiffusionPipeline", "StableDiffusionXLPipeline"):
        _refuse(name, **_set(asked, "null_class"))
        denoiser = _load_stable_diffusion(folder, asked, shared, checked_prompts(prompts or ()))
    else:
        raise CheckpointError(
            f"'{source}' is a {name}, which is not supported; supported: "
            f"{', '.join(_UNET_CLASSES)}, DiTPipeline, StableDiffusionPipeline, "
            "StableDiffusionXLPipeline"
        )
    if asked.attention != "sdpa":
        denoiser.set_attention_backend(asked.attention)
    return denoiser.to(target)


def _load_dit(
    folder: ModelFolder, asked: DiffusersOptions, shared: dict[str, Any]
) -> DiffusersDenoiser:
    transformer = folder.network(
        "transformer", "DiTTransformer2DModel", aliases=("Transformer2DModel",)
    )
    labels = folder.index.get("id2label")
    if shared["class_names"] is None and isinstance(labels, dict) and labels:
        ordered = sorted(labels.items(), key=lambda item: int(item[0]))
        shared = {**shared, "class_names": tuple(str(label) for _, label in ordered)}
    return DiTDenoiser(
        transformer,
        folder.network("vae", "AutoencoderKL"),
        folder.scheduler(),
        decode_chunk=asked.decode_chunk or 1,
        **shared,
    )


def _load_stable_diffusion(
    folder: ModelFolder,
    asked: DiffusersOptions,
    shared: dict[str, Any],
    prompts: tuple[str, ...],
) -> DiffusersDenoiser:
    def text(suffix: str, kind: Literal["CLIPTextModel", "CLIPTextModelWithProjection"]) -> Any:
        tokenizer = folder.part(f"tokenizer{suffix}", "tokenizer_config.json")
        return load_text_models(tokenizer, folder.weights_part(f"text_encoder{suffix}"), kind)

    settings = {
        **shared,
        "negative_prompt": asked.negative_prompt,
        "decode_chunk": asked.decode_chunk or 1,
    }
    tokenizer, encoder = text("", "CLIPTextModel")
    parts = (
        folder.network("unet", "UNet2DConditionModel"),
        folder.network("vae", "AutoencoderKL"),
        folder.scheduler(),
    )
    if folder.class_name == "StableDiffusionPipeline":
        return StableDiffusionDenoiser(*parts, tokenizer, encoder, prompts, **settings)
    tokenizer_2, encoder_2 = text("_2", "CLIPTextModelWithProjection")
    if settings["negative_prompt"] is None and not folder.index.get(
        "force_zeros_for_empty_prompt", True
    ):
        settings["negative_prompt"] = ""
    return StableDiffusionXLDenoiser(
        *parts, (tokenizer, tokenizer_2), (encoder, encoder_2), prompts, **settings
    )


def _set(asked: DiffusersOptions, *names: str) -> dict[str, Any]:
    return {name: getattr(asked, name) for name in names}


def _refuse(class_name: str, **unfitting: Any) -> None:
    for name, value in unfitting.items():
        if value is not None:
            raise ConfigError(f"'{name}' has no meaning for a {class_name}; leave it out")
