"""PyTorch data sets of soft-labelled images, alone or each real image with its mixed ones.

    mixed = SoftLabelDataset("runs/csm/dataset")
    image, soft_label = mixed[0]                        # [c, h, w] in [0, 1], [k]

    pairs = PairedSoftLabelDataset(open_images("digits"), "runs/csm/dataset")
    for epoch in range(epochs):
        pairs.set_epoch(epoch)
        for image, label, mixed, soft_label in DataLoader(pairs, batch_size=128, num_workers=4):
            ...                                         # mixed [b, r, c, h, w], soft_label [b, r, k]

Plain map-style data sets: any sampler, any number of workers, and the training loops of Lightning,
transformers and timm. What an item holds depends on (seed, epoch, index) alone.
"""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from diffcal.core.rng import item_generator
from diffcal.data.batch_policy import MixedGroups
from diffcal.data.soft_labels import QUALITY_COLUMNS, SoftLabelSet
from diffcal.data.sources import ImageSource
from diffcal.errors import ConfigError, DataError

__all__ = ["PairedItem", "PairedSoftLabelDataset", "SoftLabelDataset", "image_tensor"]

Transform = Callable[..., Any]
Keep = Callable[[Mapping[str, Any]], ndarray]


class SoftLabelDataset(Dataset[tuple[Tensor, Tensor]]):
    """Mixed images of a published data set with their soft labels.

    Item ``i`` is ``(image, soft_label)``: float32 ``[c, h, w]`` and float32 ``[k]``. Images stay on
    disk, memory-mapped, and are decoded when asked for.

    Args:
        folder: The ``dataset`` folder of a run.
        transform: Applied to each image; it gets pixels as ``decode`` says and returns an array
            ``[h, w, c]``, a Pillow image or a tensor ``[c, h, w]`` (see :func:`image_tensor`). If it has
            a parameter ``generator``, it is handed the item's own ``torch.Generator``, which makes
            augmentation repeatable; other random transforms draw from where they please.
        decode: ``numpy`` for uint8 arrays ``[h, w, c]``, ``pil`` for Pillow images.
        keep: Which rows to use, from their quality columns, as ``FilterConfig(...).keep`` does.
        seed: Decides, with epoch and index, what ``transform`` draws.

    Raises:
        DataError: no published data set there, or no image is kept.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        transform: Transform | None = None,
        decode: Literal["numpy", "pil"] = "numpy",
        keep: Keep | None = None,
        seed: int = 0,
    ) -> None:
        self.source = SoftLabelSet(folder)
        self.class_names = self.source.class_names
        self._images = _Transformed(transform, decode, seed)
        self._rows = _kept_rows(self.source, keep)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = int(self._rows[_checked(index, len(self))])
        convert = self._images.item(_checked(index, len(self)))
        return convert(self.source.image(row)), self.source.soft_label(row)

    def set_epoch(self, epoch: int) -> None:
        """Change what random transforms draw; workers that already run see it, too."""
        self._images.epoch.fill_(epoch)


class PairedItem(NamedTuple):
    """A real image with its mixed companions."""

    image: Tensor
    """Real image, float32 ``[c, h, w]``."""
    label: int | Tensor
    """Its class, or its soft label ``[k]`` where the real images have some."""
    mixed: Tensor
    """Mixed images, float32 ``[r, c, h, w]``; anchors first."""
    soft_label: Tensor
    """Their soft labels, float32 ``[r, k]``."""


class PairedSoftLabelDataset(Dataset[PairedItem]):
    """Real images, each with mixed images of a group that contains its class.

    Item ``i`` is the real image ``i`` as a :class:`PairedItem`. For a real image of class y a group
    that contains y is drawn uniformly (by index, without rejection); its *anchor* is the member most
    like y, the others are drawn from the members between the ends. With the defaults this is the
    training item of Luo et al. 2025 (arXiv:2504.13548): one anchor, one intermediate.

    Args:
        real: Real images: an :class:`~diffcal.data.sources.ImageSource`, or anything with ``len`` and
            items ``(image, label)`` or ``{"image": ..., "label": ...}`` whose images are Pillow
            images or uint8 (arrays ``[h, w, c]``, tensors ``[c, h, w]``), as yet untransformed.
        folder, transform, decode, keep: As in :class:`SoftLabelDataset`; real and mixed images pass
            through the same transform, each with draws of its own.
        per_real: Mixed images r per real image.
        anchor_fraction: Share of them that are anchors.
        seed: Decides, with epoch and index, which mixed images come.

    Raises:
        DataError: no published data set there, other classes than the real images, no image is kept.
        ConfigError: ``per_real`` below 1, ``anchor_fraction`` outside [0, 1].
    """

    def __init__(
        self,
        real: Any,
        folder: Path | str,
        *,
        per_real: int = 2,
        anchor_fraction: float = 0.5,
        transform: Transform | None = None,
        decode: Literal["numpy", "pil"] = "numpy",
        keep: Keep | None = None,
        seed: int = 0,
    ) -> None:
        if per_real < 1:
            raise ConfigError(f"per_real must be at least 1, got {per_real}")
        if not 0 <= anchor_fraction <= 1:
            raise ConfigError(f"anchor_fraction must be in [0, 1], got {anchor_fraction}")
        self.real, self.per_real, self.anchor_fraction = real, per_real, anchor_fraction
        self.source = SoftLabelSet(folder, getattr(real, "class_names", None))
        self.class_names = self.source.class_names
        self._images = _Transformed(transform, decode, seed)
        self._rows = _kept_rows(self.source, keep)
        self._groups: MixedGroups | None = self._build_groups()

    def __len__(self) -> int:
        return len(self.real)

    def __getstate__(self) -> dict[str, Any]:
        # the index of groups is read again where it arrives: small pickles for spawned workers
        return self.__dict__ | {"_groups": None}

    def __getitem__(self, index: int) -> PairedItem:
        index = _checked(index, len(self))
        image, label = _real_item(self.real, index)
        hard = int(label.argmax()) if isinstance(label, Tensor) else label
        if not 0 <= hard < len(self.class_names):
            raise DataError(
                f"real image {index} has label {hard}, but there are {len(self.class_names)} classes"
            )
        if self._groups is None:
            self._groups = self._build_groups()
        generator = self._images.generator("soft-label-item", index)
        drawn = self._groups.draw(
            torch.tensor([hard]), self.per_real, self.anchor_fraction, generator
        )
        rows = [int(self._rows[row]) for row in drawn[0].tolist()]
        convert = self._images.item(index)
        return PairedItem(
            image=convert(image),
            label=label,
            mixed=torch.stack([convert(self.source.image(row)) for row in rows]),
            soft_label=torch.stack([self.source.soft_label(row) for row in rows]),
        )

    def set_epoch(self, epoch: int) -> None:
        """Draw other companions; workers that already run see it, too."""
        self._images.epoch.fill_(epoch)

    def _build_groups(self) -> MixedGroups:
        rows = torch.from_numpy(self._rows)
        _, support = self.source.mixing_weights()
        targets, groups = self.source.soft_labels()[rows], self.source.groups()[rows]
        return MixedGroups.build(targets, groups, support[rows])


def image_tensor(image: Any) -> Float[Tensor, "c h w"]:
    """Float32 image ``[c, h, w]``: uint8 pixels divided by 255, floating ones as they are.

    Args:
        image: Array ``[h, w]`` or ``[h, w, c]``, Pillow image, or tensor ``[c, h, w]``.

    Raises:
        DataError: anything else.
    """
    if isinstance(image, Image.Image):
        image = np.array(image)
    if isinstance(image, ndarray) and image.ndim in (2, 3):
        pixels = image[:, :, None] if image.ndim == 2 else image
        image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
    if not isinstance(image, Tensor) or image.ndim != 3:
        shape = f" of shape {list(image.shape)}" if hasattr(image, "shape") else ""
        raise DataError(f"{type(image).__name__}{shape} is no image; see image_tensor")
    if image.is_floating_point():
        return image.float()
    if image.dtype != torch.uint8:
        raise DataError(f"image tensors must be uint8 or floating, got {image.dtype}")
    return image.float() / 255


class _Transformed:
    """Pixels to tensors through the user's transform, with randomness of (seed, epoch, index)."""

    def __init__(self, transform: Transform | None, decode: str, seed: int) -> None:
        if decode not in ("numpy", "pil"):
            raise ConfigError(f"decode must be 'numpy' or 'pil', got {decode!r}")
        self.transform, self.decode, self.seed = transform, decode, seed
        self.takes_generator = transform is not None and _has_parameter(transform, "generator")
        # in shared memory, because persistent workers hold a copy of the data set
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def generator(self, stream: str, index: int) -> torch.Generator:
        return item_generator(self.seed, f"{stream}-{int(self.epoch)}", index)

    def item(self, index: int) -> Callable[[Any], Tensor]:
        """Converter of the images of one item, in order."""
        generator = self.generator("soft-label-transform", index) if self.takes_generator else None

        def convert(image: Any) -> Tensor:
            is_pillow = isinstance(image, Image.Image)
            if self.decode == "pil" and not is_pillow:
                image = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
            elif self.decode == "numpy" and is_pillow:
                image = _pixels(image)
            if self.transform is None:
                return image_tensor(image)
            if generator is not None:
                return image_tensor(self.transform(image, generator=generator))
            return image_tensor(self.transform(image))

        return convert


def _kept_rows(source: SoftLabelSet, keep: Keep | None) -> ndarray:
    if keep is None:
        rows = np.arange(len(source))
    else:
        table = source.columns(QUALITY_COLUMNS)
        rows = np.flatnonzero(keep(table.to_pydict()))
    if not len(rows):
        raise DataError(f"no image of '{source.folder}' is kept ({len(source)} are there)")
    return rows


def _real_item(real: Any, index: int) -> tuple[Any, int | Tensor]:
    if isinstance(real, ImageSource):
        _, images, labels = next(real.batches(1, [index]))
        return images[0], int(labels[0])
    item = real[index]
    image, label = (item["image"], item["label"]) if isinstance(item, Mapping) else item
    soft = getattr(label, "ndim", 0) == 1
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.ndim != 3:
            raise DataError(
                "real images must come before transformation: Pillow images or uint8, got a tensor of "
                f"{image.dtype}"
            )
        image = image.permute(1, 2, 0).numpy()
    elif isinstance(image, Image.Image):
        image = _pixels(image)
    elif not isinstance(image, ndarray) or image.dtype != np.uint8:
        raise DataError(
            f"real images must be Pillow images or uint8 arrays, got {type(image).__name__}"
        )
    image = image[:, :, None] if image.ndim == 2 else image
    return image, torch.as_tensor(label, dtype=torch.float32) if soft else int(label)


def _pixels(image: Image.Image) -> ndarray:
    pixels = np.array(image if image.mode in ("L", "RGB") else image.convert("RGB"))
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _has_parameter(function: Callable[..., Any], name: str) -> bool:
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):  # builtins without a signature
        return False


def _checked(index: int, length: int) -> int:
    if not -length <= index < length:
        raise IndexError(f"item {index} of {length}")
    return int(index) % length
