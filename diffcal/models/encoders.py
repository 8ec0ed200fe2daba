"""Image encoders: pixels in, feature vectors out, with a name and a version that identify them."""

import hashlib
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from diffcal.core.devices import module_device
from diffcal.core.digests import hash_tensors
from diffcal.core.runs import fingerprint
from diffcal.core.tensors import require_finite
from diffcal.errors import ConfigError, DataError
from diffcal.models.classifier import TrainedClassifier, normalise

__all__ = [
    "ClassifierEncoder",
    "ConcatenatedEncoder",
    "FeatureEncoder",
    "NormalisedEncoder",
    "PixelEncoder",
    "classifier_encoder",
    "weights_fingerprint",
]

Preprocess = Callable[[UInt8[Tensor, "b h w c"]], Float[Tensor, "b c h w"]]


@runtime_checkable
class FeatureEncoder(Protocol):
    """Features of images, each row a function of its image alone."""

    name: str

    @property
    def version(self) -> str:
        """SHA-256 that identifies weights and settings."""
        ...

    @property
    def dim(self) -> int:
        """Length d of a feature vector."""
        ...

    def encode(self, images: UInt8[Tensor, "b h w c"]) -> Float[Tensor, "b d"]:
        """Float32 features on the CPU."""
        ...


class PixelEncoder:
    """Pixels in [-1, 1] as they are: the control that an encoder should beat.

    Args:
        image_shape: (h, w, c).
    """

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        self.image_shape = image_shape
        self.name = "pixels"
        self.version = fingerprint(["pixels/1", list(image_shape)])
        self.dim = image_shape[0] * image_shape[1] * image_shape[2]

    def encode(self, images: UInt8[Tensor, "b h w c"]) -> Float[Tensor, "b d"]:
        """Flattened pixels.

        Raises:
            DataError: images of another shape.
        """
        if tuple(images.shape[1:]) != self.image_shape:
            raise DataError(
                f"images are {list(images.shape[1:])}, the encoder takes {list(self.image_shape)}"
            )
        return images.cpu().flatten(1).float() / 127.5 - 1


class ClassifierEncoder:
    """What enters a layer of a network, by default its last linear one (the penultimate features).

    Args:
        module: Any torch network; used in evaluation mode, on the device where it is.
        preprocess: Pixels ``[b, h, w, c]`` to the network's input.
        layer_name: The layer whose *input* is taken; the last ``nn.Linear`` if None.
        name: Name of the encoder.
        preparation: JSON that tells what ``preprocess`` does, so that the version shows it.

    Raises:
        ConfigError: no such layer, or no linear layer.
    """

    def __init__(
        self,
        module: nn.Module,
        preprocess: Preprocess,
        layer_name: str | None = None,
        name: str = "classifier",
        preparation: Any = None,
    ) -> None:
        linear = [key for key, part in module.named_modules() if isinstance(part, nn.Linear)]
        if layer_name is None and not linear:
            raise ConfigError("the network has no linear layer: name the layer to read from")
        self.layer_name = layer_name or linear[-1]
        try:
            self.layer = module.get_submodule(self.layer_name)
        except AttributeError as error:
            known = ", ".join(key for key, _ in list(module.named_modules())[-8:])
            raise ConfigError(
                f"the network has no layer '{self.layer_name}'; its last ones are {known}"
            ) from error
        self.module, self.preprocess, self.name = module.eval(), preprocess, name
        self.preparation = preparation
        self._version: str | None = None
        self._dim = getattr(self.layer, "in_features", None)

    @property
    def version(self) -> str:
        """SHA-256 of weights, layer and ``preparation``."""
        if self._version is None:
            self._version = fingerprint(
                [weights_fingerprint(self.module), self.layer_name, self.preparation]
            )
        return self._version

    @property
    def dim(self) -> int:
        """Length of a feature vector.

        Raises:
            ConfigError: not known before the first image, for layers that are not linear.
        """
        if self._dim is None:
            raise ConfigError(f"the width of layer '{self.layer_name}' shows when it first runs")
        return self._dim

    @torch.no_grad()
    def encode(self, images: UInt8[Tensor, "b h w c"]) -> Float[Tensor, "b d"]:
        """Float32 features on the CPU; spatial inputs are averaged over space.

        Raises:
            ConfigError: the layer did not run.
            NumericalError: NaN or infinity.
        """
        caught: list[Tensor] = []

        def keep(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            caught.append(inputs[0].float())

        self.module.eval()
        device = module_device(self.module)
        handle = self.layer.register_forward_pre_hook(keep)
        try:
            self.module(self.preprocess(images.to(device)))
        finally:
            handle.remove()
        if not caught:
            raise ConfigError(f"layer '{self.layer_name}' did not run, so it gives no features")
        features = caught[-1]
        if features.ndim == 4:
            features = features.mean(dim=(2, 3))
        features = features.flatten(1)
        self._dim = features.shape[1]
        return require_finite(features.cpu(), "classifier features")


def classifier_encoder(
    classifier: TrainedClassifier, layer_name: str | None = None
) -> ClassifierEncoder:
    """Penultimate features of a trained classifier, with its own normalisation.

    Args:
        classifier: See :func:`diffcal.models.classifier.load_classifier`.
        layer_name: Another layer whose input to take.
    """
    device = module_device(classifier.module)
    mean, std = classifier.mean.to(device), classifier.std.to(device)
    return ClassifierEncoder(
        classifier.module,
        lambda images: normalise(images, mean, std),
        layer_name,
        name=f"classifier-{classifier.architecture or 'own'}",
        preparation=[classifier.mean.tolist(), classifier.std.tolist()],
    )


class NormalisedEncoder:
    """Another encoder's features divided by their length."""

    def __init__(self, encoder: FeatureEncoder) -> None:
        self.encoder = encoder
        self.name = f"{encoder.name}-unit"

    @property
    def version(self) -> str:
        """SHA-256 that identifies weights and settings."""
        return fingerprint(["unit", self.encoder.version])

    @property
    def dim(self) -> int:
        """Length d of a feature vector."""
        return self.encoder.dim

    def encode(self, images: UInt8[Tensor, "b h w c"]) -> Float[Tensor, "b d"]:
        """Unit vectors (zero stays zero)."""
        return nn.functional.normalize(self.encoder.encode(images), dim=1)


class ConcatenatedEncoder:
    """Several encoders' features side by side, for annotators that weigh features themselves."""

    def __init__(self, *encoders: FeatureEncoder) -> None:
        if not encoders:
            raise ConfigError("at least one encoder is needed")
        self.encoders = encoders
        self.name = "+".join(encoder.name for encoder in encoders)

    @property
    def version(self) -> str:
        """SHA-256 that identifies weights and settings."""
        return fingerprint([encoder.version for encoder in self.encoders])

    @property
    def dim(self) -> int:
        """Length d of a feature vector."""
        return sum(encoder.dim for encoder in self.encoders)

    def encode(self, images: UInt8[Tensor, "b h w c"]) -> Float[Tensor, "b d"]:
        """Features in the order of the encoders."""
        return torch.cat([encoder.encode(images) for encoder in self.encoders], dim=1)


def weights_fingerprint(module: nn.Module) -> str:
    """SHA-256 of names, shapes and values of a network's state."""
    digest = hashlib.sha256()
    hash_tensors(digest, sorted(module.state_dict().items()))
    return digest.hexdigest()
