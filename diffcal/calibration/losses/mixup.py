"""Mixup: batches of blended images with blended targets, for any loss that takes soft ones."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from diffcal.errors import ConfigError, DataError

__all__ = ["MixupBatch", "MixupDraws", "blend", "draw_mixup", "mixup"]


@dataclass(frozen=True)
class MixupBatch:
    """A blended batch and how it was made."""

    images: Float[Tensor, "b *i"]
    targets: Float[Tensor, "b k"]
    share: Float[Tensor, " b"]
    """Weight of each image itself; the rest is its partner's."""
    partner: Int[Tensor, " b"]
    same_class: Bool[Tensor, " b"]
    """Whether an image and its partner have the same likeliest class."""


@dataclass(frozen=True)
class MixupDraws:
    """With whom each example of a batch is blended, and how much of itself it keeps."""

    share: Float[Tensor, " b"]
    """In float64, on the CPU."""
    partner: Int[Tensor, " b"]

    def part(self, rows: slice) -> "MixupDraws":
        """The draws of some of the examples; partners still count from the start of the batch."""
        return MixupDraws(self.share[rows], self.partner[rows])


def draw_mixup(
    count: int, *, alpha: float, per_example: bool = False, generator: torch.Generator
) -> MixupDraws:
    """Shares ``~ Beta(alpha, alpha)``, one for the batch or one per example, and partners.

    Partners are a random permutation, so that every example is somebody's partner once.

    Raises:
        ConfigError: alpha not positive.
    """
    if not 0 < alpha < float("inf"):
        raise ConfigError(f"mixup's alpha must be positive, got {alpha}")
    # a Beta variate from two Gamma ones: torch.distributions takes no generator
    shape = torch.full((2, count if per_example else 1), alpha, dtype=torch.float64)
    gammas = torch._standard_gamma(shape, generator=generator)  # pyright: ignore[reportPrivateImportUsage]
    share = (gammas[0] / gammas.sum(dim=0)).expand(count)
    return MixupDraws(share, torch.randperm(count, generator=generator))


def blend(
    values: Float[Tensor, "b *i"], partners: Float[Tensor, "b *i"], share: Float[Tensor, " b"]
) -> Float[Tensor, "b *i"]:
    """``share values + (1 - share) partners``, in the dtype and on the device of ``values``."""
    weight = share.to(values).reshape(-1, *(1,) * (values.ndim - 1))
    return weight * values + (1 - weight) * partners


def mixup(
    images: Float[Tensor, "b *i"],
    targets: Int[Tensor, " b"] | Float[Tensor, "b k"],
    *,
    alpha: float = 0.2,
    num_classes: int | None = None,
    per_example: bool = False,
    generator: torch.Generator,
) -> MixupBatch:
    """``share x + (1 - share) x[partner]`` for images and targets, ``share ~ Beta(alpha, alpha)``.

    Args:
        images: Normalised network input.
        targets: Labels (then ``num_classes`` is needed) or distributions over classes.
        alpha: Positive. Calibration studies of plain mixup use small values (0.1 to 0.4);
            RankMixup 2 on CIFAR and 1 on Tiny-ImageNet.
        num_classes: Of integer targets.
        per_example: One share for each example instead of one for the batch, which is the paper's.
        generator: On the CPU; owns every draw.

    Returns:
        Blended images in their dtype and targets in float32 (float64 if they came so).

    Raises:
        ConfigError: alpha not positive, ``num_classes`` missing.
        DataError: lengths differ, labels out of range.

    Source: Zhang et al. 2018 (arXiv:1710.09412), equation 1; calibration in Thulasidasan et al.
    2019 (arXiv:1905.11001).
    """
    count = len(images)
    if len(targets) != count:
        raise DataError(f"{count} images came with {len(targets)} targets")
    if targets.is_floating_point():
        q = targets if targets.dtype == torch.float64 else targets.float()
    else:
        if num_classes is None:
            raise ConfigError("integer targets need num_classes")
        if count and not 0 <= int(targets.min()) <= int(targets.max()) < num_classes:
            raise DataError(
                f"labels run from {int(targets.min())} to {int(targets.max())}, "
                f"but there are {num_classes} classes"
            )
        q = F.one_hot(targets.long(), num_classes).float()
    draws = draw_mixup(count, alpha=alpha, per_example=per_example, generator=generator)
    partner, best = draws.partner.to(images.device), q.argmax(dim=1)
    return MixupBatch(
        blend(images, images[partner], draws.share),
        blend(q, q[partner], draws.share),
        draws.share.to(q),
        partner,
        best == best[partner],
    )
