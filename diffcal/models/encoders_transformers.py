"""CLIP, SigLIP and DINO image towers of the transformers library as feature encoders."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from diffcal.core.devices import resolve_device, resolve_dtype
from diffcal.core.runs import fingerprint
from diffcal.core.tensors import require_finite
from diffcal.errors import CheckpointError, ConfigError, MissingExtraError
from diffcal.models.encoders import weights_fingerprint

__all__ = ["ImagePreparation", "TransformersEncoder", "load_transformers_encoder"]


class ImagePreparation:
    """Resize, centre crop, scale and normalise, as a ``preprocessor_config.json`` says, with PIL.

    Does what the library's own Pillow processors do, without torchvision and alike in all versions.

    Args:
        settings: The content of the file.

    Raises:
        ConfigError: a step that images of classes do not need (padding, tiling) is asked for, or a
            size, mean or deviation is missing.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        for key in ("do_pad", "do_image_splitting", "do_thumbnail"):
            if settings.get(key):
                raise ConfigError(f"image preparation with '{key}' is not supported")
        crops = settings.get("do_center_crop") or False
        resizes = settings.get("do_resize", True)
        # One number means the shortest edge where a crop follows, else a square.
        self.size = _size(settings.get("size", 224), square=not crops) if resizes else None
        self.crop = _size(settings.get("crop_size", 224), square=True) if crops else None
        if self.crop is not None and "height" not in self.crop:
            raise ConfigError(f"image preparation: the crop {self.crop} needs height and width")
        self.resample = Image.Resampling(settings.get("resample", 3))
        rescale = settings.get("do_rescale", True)
        self.scale = float(settings.get("rescale_factor", 1 / 255)) if rescale else 1.0
        standard = settings.get("do_normalize", True)
        self.mean = torch.tensor(_colours(settings, "image_mean") if standard else [0.0] * 3)
        self.std = torch.tensor(_colours(settings, "image_std") if standard else [1.0] * 3)

    def __call__(self, images: UInt8[Tensor, "b h w c"]) -> Float[Tensor, "b 3 h2 w2"]:
        """Network input; grayscale images are repeated over three channels.

        Raises:
            ConfigError: images with neither 1 nor 3 channels.
        """
        if images.shape[3] not in (1, 3):
            raise ConfigError(f"images have {images.shape[3]} channels; 1 or 3 are understood")
        pixels = torch.stack([self._one(image) for image in images.cpu().expand(-1, -1, -1, 3)])
        return ((pixels.float() * self.scale - self.mean) / self.std).permute(0, 3, 1, 2)

    def _one(self, image: Tensor) -> Tensor:
        picture = Image.fromarray(image.contiguous().numpy())
        if self.size is not None:
            picture = picture.resize(_target(picture.size, self.size), self.resample)
        if self.crop is not None:
            height, width = self.crop["height"], self.crop["width"]
            left, top = (picture.width - width) // 2, (picture.height - height) // 2
            picture = picture.crop((left, top, left + width, top + height))
        return torch.from_numpy(np.array(picture))


class TransformersEncoder:
    """Image features of a transformers model.

    CLIP and SigLIP give their projected image embedding, other vision transformers their pooled
    output, or the first token where a model does not pool.

    Args:
        model: In evaluation mode, on the device to use.
        prepare: Pixels to network input.
        name: Where the model came from.
        pooled: False ignores the pooled output of models without a projection.
    """

    def __init__(
        self, model: Any, prepare: ImagePreparation, name: str, *, pooled: bool = True
    ) -> None:
        self.model, self.prepare, self.name = model.eval(), prepare, name
        self.pooled = pooled
        self._version: str | None = None
        self._dim: int | None = None

    @property
    def version(self) -> str:
        """SHA-256 of weights and preparation."""
        if self._version is None:
            shown = {key: str(value) for key, value in sorted(vars(self.prepare).items())}
            self._version = fingerprint([weights_fingerprint(self.model), shown, self.pooled])
        return self._version

    @property
    def dim(self) -> int:
        """Length of a feature vector; found by running the network once."""
        if self._dim is None:
            self._dim = self.encode(torch.zeros(1, 32, 32, 3, dtype=torch.uint8)).shape[1]
        return self._dim

    @torch.no_grad()
    def encode(self, images: UInt8[Tensor, "b h w c"]) -> Float[Tensor, "b d"]:
        """Float32 features on the CPU, not divided by their length.

        Raises:
            CheckpointError: the model gives no image embedding.
            NumericalError: NaN or infinity.
        """
        first = next(self.model.parameters())
        pixels = self.prepare(images).to(first.device, first.dtype)
        tower = getattr(self.model, "get_image_features", None)
        output = tower(pixel_values=pixels) if tower else self.model(pixel_values=pixels)
        features = _embedding(output, self.pooled or tower is not None)
        if features is None:
            raise CheckpointError(
                f"model '{self.name}' ({type(self.model).__name__}) gives no image embedding"
            )
        self._dim = features.shape[1]
        return require_finite(features.float().cpu(), "image features")


def load_transformers_encoder(
    source: str | Path, *, device: str = "cpu", dtype: str = "float32"
) -> TransformersEncoder:
    """Encoder from a local folder or a hub name, such as ``openai/clip-vit-base-patch32``.

    Raises:
        MissingExtraError: transformers is not installed.
        CheckpointError: no model there, not one that sees images, or weights are missing in it.
        ConfigError: unknown device or number format, an image preparation that is not understood.
    """
    try:
        from transformers import AutoModel
        from transformers.image_processing_utils import BaseImageProcessor
    except ImportError as error:
        raise MissingExtraError(
            "this encoder needs the transformers library: pip install 'diffcal[clip]'"
        ) from error
    target, number_format = resolve_device(device), resolve_dtype(dtype)
    if isinstance(source, Path) and not source.is_dir():
        raise CheckpointError(f"encoder '{source}' is missing")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            settings, _ = BaseImageProcessor.get_image_processor_dict(str(source))
            loaded: Any = AutoModel.from_pretrained(
                str(source), use_safetensors=True, output_loading_info=True
            )
            model, missing = loaded[0], sorted(loaded[1]["missing_keys"])
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"encoder '{source}' cannot be loaded ({first}); give a local folder or a hub name of "
            "a CLIP, SigLIP, DINO or other vision transformer with safetensors weights"
        ) from error
    # Checkpoints of DINO and of masked autoencoders come without the pooling layer that the class
    # has; the library then draws it at random, and its output would be another one in every run.
    pooler = [key for key in missing if "pooler" in key]
    if len(missing) > len(pooler):
        raise CheckpointError(
            f"encoder '{source}' lacks weights that its network needs, such as "
            f"'{next(key for key in missing if key not in pooler)}'"
        )
    return TransformersEncoder(
        model.to(target, number_format),
        ImagePreparation(settings),
        str(source),
        pooled=not pooler,
    )


def _embedding(output: Any, pooled: bool) -> Tensor | None:
    """The projected embedding: a tensor in transformers 4, the pooled output of an object in 5."""
    if isinstance(output, Tensor):
        return output
    for key in ("image_embeds", "pooler_output") if pooled else ():
        value = getattr(output, key, None)
        if isinstance(value, Tensor):
            return value.flatten(1)
    hidden = getattr(output, "last_hidden_state", None)
    return hidden[:, 0] if isinstance(hidden, Tensor) and hidden.ndim == 3 else None


def _size(size: Any, *, square: bool) -> dict[str, int]:
    if isinstance(size, int):
        return {"height": size, "width": size} if square else {"shortest_edge": size}
    if set(size) >= {"height", "width"} or set(size) == {"shortest_edge"}:
        return dict(size)
    raise ConfigError(f"image preparation: the size {size} is not understood")


def _colours(settings: dict[str, Any], key: str) -> list[float]:
    values = settings.get(key)
    if not isinstance(values, list | tuple) or len(values) != 3:
        raise ConfigError(f"image preparation: '{key}' must be three numbers, got {values!r}")
    return [float(value) for value in values]


def _target(size: tuple[int, int], wanted: dict[str, int]) -> tuple[int, int]:
    """New (width, height); the shortest edge, where given, keeps the proportions."""
    width, height = size
    if "shortest_edge" not in wanted:
        return wanted["width"], wanted["height"]
    short = wanted["shortest_edge"]
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short
