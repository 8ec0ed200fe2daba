"""What a classifier is trained on: real and mixed images in memory, checked once."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from diffcal.calibration.losses.contract import as_rows
from diffcal.errors import DataError

__all__ = ["LabelledImages", "MixedImages", "TrainingData", "hold_out"]


@dataclass(frozen=True)
class LabelledImages:
    """Images with hard labels (int64 ``[n]``) or soft ones (float32 ``[n, k]``)."""

    images: UInt8[Tensor, "n h w c"]
    targets: Int[Tensor, " n"] | Float[Tensor, "n k"]

    def __post_init__(self) -> None:
        if len(self.images) != len(self.targets):
            raise DataError(f"{len(self.images)} images came with {len(self.targets)} labels")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labels(self) -> Int[Tensor, " n"]:
        """Hard labels; the likeliest class of soft ones."""
        return self.targets.argmax(dim=1) if self.targets.ndim == 2 else self.targets

    def rows(self, rows: Int[Tensor, " m"]) -> "LabelledImages":
        """Some of the images."""
        return LabelledImages(self.images[rows], self.targets[rows])


@dataclass(frozen=True)
class MixedImages:
    """Semantically mixed images with soft labels and their group structure."""

    images: UInt8[Tensor, "n h w c"]
    targets: Float[Tensor, "n k"]
    groups: Int[Tensor, " n"]
    """Group of each image; members of a group share their noise."""
    support: Bool[Tensor, "n k"] | None = None
    """Classes that each image was mixed from, if known."""

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class TrainingData:
    """Everything a training run reads.

    Raises:
        DataError: sizes, channels or numbers of classes differ, labels out of range.
    """

    train: LabelledImages
    class_names: tuple[str, ...]
    mixed: MixedImages | None = None
    validation: LabelledImages | None = None
    test: LabelledImages | None = None

    def __post_init__(self) -> None:
        shape, classes = self.image_shape, len(self.class_names)
        parts: dict[str, LabelledImages | MixedImages | None] = {
            "training": self.train,
            "mixed": self.mixed,
            "validation": self.validation,
            "test": self.test,
        }
        for name, part in parts.items():
            if part is None:
                continue
            if len(part) == 0:
                raise DataError(f"the {name} set is empty")
            if tuple(part.images.shape[1:]) != shape:
                raise DataError(
                    f"{name} images are {_size(part.images.shape[1:])}, training images "
                    f"{_size(shape)}; convert one of them"
                )
            if part.targets.ndim == 2 and part.targets.shape[1] != classes:
                raise DataError(
                    f"{name} labels have {part.targets.shape[1]} classes, expected {classes}"
                )
            try:
                as_rows(torch.zeros(1).expand(len(part), classes), part.targets)
            except DataError as error:
                raise DataError(f"{name} set: {error}") from error
        if self.mixed is not None and not (
            len(self.mixed.targets) == len(self.mixed.groups) == len(self.mixed)
        ):
            raise DataError("mixed images, soft labels and groups must have one length")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of every image."""
        height, width, channels = self.train.images.shape[1:]
        return height, width, channels


def hold_out(
    data: LabelledImages, share: float, generator: torch.Generator
) -> tuple[LabelledImages, LabelledImages]:
    """Two parts of ``data``: the larger to train on, a random ``share`` (rounded) to validate on.

    Raises:
        DataError: one of the parts would be empty.
    """
    count = round(len(data) * share)
    if not 0 < count < len(data):
        raise DataError(
            f"a validation share of {share} leaves {len(data) - count} of {len(data)} images to "
            f"train on and {count} to validate on"
        )
    order = torch.randperm(len(data), generator=generator)
    return data.rows(order[count:].sort().values), data.rows(order[:count].sort().values)


def _size(shape: tuple[int, ...] | torch.Size) -> str:
    return "x".join(map(str, shape))
