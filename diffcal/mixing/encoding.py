"""Encoders by name: what turns images into the features that annotators look at."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from diffcal.config import check_choices
from diffcal.core.devices import resolve_device
from diffcal.diffusion.checkpoints import load_denoiser
from diffcal.diffusion.denoisers import Denoiser
from diffcal.errors import ConfigError
from diffcal.mixing.denoiser_features import DenoiserFeatures
from diffcal.mixing.diffusion_posterior import DenoisingErrors
from diffcal.models.encoders import (
    FeatureEncoder,
    NormalisedEncoder,
    PixelEncoder,
    classifier_encoder,
)

__all__ = ["EncoderConfig", "build_encoder"]

T = TypeVar("T")

Kind = Literal["denoiser", "denoising_errors", "classifier", "transformers", "pixels"]


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Which encoder; the default needs no weights but those that drew the images."""

    kind: Kind = "denoiser"
    """``denoiser``: the denoiser's own layers. ``denoising_errors``: its error under each class,
    for the annotator ``diffusion_posterior``. ``classifier``: penultimate features of a trained
    classifier. ``transformers``: CLIP, SigLIP, DINO and other vision transformers. ``pixels``: the
    control that an encoder should beat."""
    source: str | None = None
    """Folder (or hub name) of the network. The denoiser kinds take the run's own if None."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keywords of the encoder: ``sigmas``, ``modules``, ``pool`` ... of
    :class:`~diffcal.mixing.denoiser_features.DenoiserFeatures`, ``sigmas``, ``draws`` ... of
    :class:`~diffcal.mixing.diffusion_posterior.DenoisingErrors`, ``layer_name`` of a classifier,
    ``dtype`` of a transformers model."""
    unit_length: bool = False
    """Divide features by their length (the CSM release does not)."""

    def __post_init__(self) -> None:
        check_choices(self)


def build_encoder(
    config: EncoderConfig,
    *,
    denoiser: Denoiser | None = None,
    image_shape: tuple[int, int, int] | None = None,
    device: str = "auto",
) -> FeatureEncoder:
    """The encoder that ``config`` describes.

    Args:
        config: Kind, source, options.
        denoiser: For the denoiser kinds where ``config.source`` is None; used where it is.
        image_shape: (h, w, c), for ``pixels``.
        device: Where a network that is loaded here goes.

    Raises:
        ConfigError: unknown kind or option, or a missing source.
        CheckpointError: no network at the source, or a damaged one.
    """
    builders: dict[str, Callable[[], FeatureEncoder]] = {
        "denoiser": lambda: DenoiserFeatures(_denoiser(config, denoiser, device), **config.options),
        "denoising_errors": lambda: DenoisingErrors(
            _denoiser(config, denoiser, device), **config.options
        ),
        "classifier": lambda: _classifier(config, device),
        "transformers": lambda: _transformers(config, device),
        "pixels": lambda: PixelEncoder(_given(image_shape, "image_shape"), **config.options),
    }
    if config.kind not in builders:
        raise ConfigError(f"unknown encoder '{config.kind}'; known: {', '.join(builders)}")
    try:
        encoder = builders[config.kind]()
    except TypeError as error:  # an option that the encoder does not have
        raise ConfigError(f"encoder '{config.kind}': {error}") from error
    return NormalisedEncoder(encoder) if config.unit_length else encoder


def _denoiser(config: EncoderConfig, denoiser: Denoiser | None, device: str) -> Denoiser:
    if config.source is not None:
        return load_denoiser(config.source, device=device)
    return _given(denoiser, "denoiser")


def _classifier(config: EncoderConfig, device: str) -> FeatureEncoder:
    from diffcal.models.classifier import load_classifier

    source = _given(config.source, "source")
    classifier = load_classifier(source, device=resolve_device(device))
    return classifier_encoder(classifier, **config.options)


def _transformers(config: EncoderConfig, device: str) -> FeatureEncoder:
    from diffcal.models.encoders_transformers import load_transformers_encoder

    source = _given(config.source, "source")
    return load_transformers_encoder(source, device=device, **config.options)


def _given(value: T | None, what: str) -> T:
    if value is None:
        raise ConfigError(f"this kind of encoder needs a {what}: set encoder.source")
    return value
