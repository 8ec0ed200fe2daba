"""A trained classifier as an artefact: weights, architecture, normalisation and class names."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from diffcal.core.runs import read_json, sha256_file, write_atomic, write_json
from diffcal.errors import CheckpointError
from diffcal.models.registry import build_classifier

__all__ = ["TrainedClassifier", "load_classifier", "normalise", "save_classifier"]

FORMAT = "diffcal-classifier/1"


def normalise(
    images: UInt8[Tensor, "b h w c"], mean: Float[Tensor, " c"], std: Float[Tensor, " c"]
) -> Float[Tensor, "b c h w"]:
    """Float32 network input: pixels / 255, less ``mean``, over ``std``; channels-last in memory."""
    scaled = torch.addcmul(-mean / std, images.float(), 1 / (255 * std))
    return scaled.permute(0, 3, 1, 2)


@dataclass(frozen=True)
class TrainedClassifier:
    """A network with all that is needed to use it on images."""

    module: nn.Module
    """Maps normalised images to logits; in evaluation mode."""
    mean: Float[Tensor, " c"]
    """Channel means of the training images, pixels in [0, 1]."""
    std: Float[Tensor, " c"]
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    """(h, w, c) of the training images."""
    architecture: str | None = None
    """Name for :func:`diffcal.models.registry.build_classifier`; None for a network of one's own."""

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return len(self.class_names)

    @torch.no_grad()
    def logits(
        self, images: UInt8[Tensor, "n h w c"], batch_size: int = 512
    ) -> Float[Tensor, "n k"]:
        """Float32 logits on the CPU, computed on the module's device."""
        return self._over(images, self.module, batch_size)

    @torch.no_grad()
    def features(
        self, images: UInt8[Tensor, "n h w c"], batch_size: int = 512
    ) -> Float[Tensor, "n d"]:
        """Float32 penultimate features on the CPU.

        Raises:
            CheckpointError: the network has no ``forward_features``.
        """
        forward_features = getattr(self.module, "forward_features", None)
        if forward_features is None:
            raise CheckpointError(
                f"{type(self.module).__name__} has no forward_features(x); give the network one "
                "that returns [b, d]"
            )
        return self._over(images, forward_features, batch_size)

    def _over(self, images: Tensor, function: Any, batch_size: int) -> Tensor:
        device = next(self.module.parameters()).device
        mean, std = self.mean.to(device), self.std.to(device)
        self.module.eval()
        parts = [
            function(normalise(part.to(device), mean, std)).float().cpu()
            for part in images.split(batch_size)
        ]
        return torch.cat(parts)


def save_classifier(
    folder: Path, classifier: TrainedClassifier, *, training: Mapping[str, Any] | None = None
) -> None:
    """Write ``classifier.safetensors`` and, after it, ``config.json`` with its SHA-256.

    Args:
        folder: Made if needed.
        classifier: What to save.
        training: Anything in JSON that tells how it was trained.
    """
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in classifier.module.state_dict().items()
    }
    data = save(tensors, metadata={"format": FORMAT})
    weights = folder / "classifier.safetensors"
    write_atomic(weights, lambda file: file.write(data))
    config = {
        "format": FORMAT,
        "architecture": classifier.architecture,
        "class_names": list(classifier.class_names),
        "image_shape": list(classifier.image_shape),
        "mean": classifier.mean.tolist(),
        "std": classifier.std.tolist(),
        "sha256": sha256_file(weights),
        "training": dict(training or {}),
    }
    write_json(folder / "config.json", config)


def load_classifier(
    folder: Path | str, *, module: nn.Module | None = None, device: str | torch.device = "cpu"
) -> TrainedClassifier:
    """The classifier saved in ``folder``, or in ``folder/classifier`` (a training run), ready to use.

    Args:
        folder: See above.
        module: The network to load the weights into; needed if it is not one of ours.
        device: Where the network goes.

    Raises:
        CheckpointError: no classifier there, damaged file, weights that do not fit the network.
    """
    folder = Path(folder)
    if not (folder / "classifier.safetensors").exists():
        if not (folder / "classifier" / "classifier.safetensors").exists():
            raise CheckpointError(f"'{folder}' holds no classifier.safetensors")
        folder = folder / "classifier"
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(f"'{folder / 'config.json'}' does not describe a {FORMAT}")
    weights = folder / "classifier.safetensors"
    if sha256_file(weights) != config["sha256"]:
        raise CheckpointError(f"'{weights}' is damaged: its SHA-256 is not the one in config.json")
    height, width, channels = config["image_shape"]
    if module is None:
        if config["architecture"] is None:
            raise CheckpointError(
                f"'{folder}' holds a network that diffcal does not know; pass it as module="
            )
        module = build_classifier(
            config["architecture"], len(config["class_names"]), channels, min(height, width)
        )
    try:
        module.load_state_dict(load_file(weights))
    except (SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"'{weights}' does not fit the network: {error}") from error
    return TrainedClassifier(
        module=module.to(device).eval(),
        mean=torch.tensor(config["mean"]),
        std=torch.tensor(config["std"]),
        class_names=tuple(config["class_names"]),
        image_shape=(height, width, channels),
        architecture=config["architecture"],
    )
