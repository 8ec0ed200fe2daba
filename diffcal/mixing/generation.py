"""Mixed images of a plan: all groups and ratios in one batch, one noise for each group."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float, UInt8
from numpy import ndarray
from torch import Tensor

from diffcal.core.rng import item_generator
from diffcal.diffusion.denoisers import Denoiser
from diffcal.diffusion.samplers import OnStep, SamplerConfig, sample
from diffcal.errors import ConfigError, NumericalError
from diffcal.mixing.bisection import bisected
from diffcal.mixing.conditions import ConditionConfig, mixed_denoiser
from diffcal.mixing.plan import MixGroup, MixPlan

__all__ = ["GenerationConfig", "MixBatch", "fixed_rows", "generate_images", "initial_noise"]


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How the images of a plan are drawn."""

    condition: ConditionConfig = field(default_factory=ConditionConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    batch_size: int = 256
    """Images per network call on a GPU. On a CPU the calls have a size of their own, see
    :func:`fixed_rows`, because results must not depend on this number."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {self.batch_size}")


def fixed_rows(sample_shape: tuple[int, ...]) -> int:
    """Images per network call on a CPU: a power of two between 8 and 256, set by the image size.

    Matrix products of different height may round differently, so a call has this number of rows there
    whatever the batch size, and an image always the same place in it; what is left of a shard is
    padded to a power of two. The size keeps activations of a U-Net in the cache.
    """
    channels, height, width = sample_shape
    return 1 << max(3, min(8, ((1 << 16) // (channels * height * width)).bit_length() - 1))


@dataclass(frozen=True)
class MixBatch:
    """Images of consecutive items."""

    items: range
    images: UInt8[ndarray, "b h w c"]
    weights: Float[Tensor, "b k"]
    """Of each image, over the classes of its group; float32."""


def generate_images(
    denoiser: Denoiser,
    plan: MixPlan,
    items: range,
    config: GenerationConfig,
    *,
    on_step: OnStep | None = None,
) -> Iterator[MixBatch]:
    """Images of consecutive items, a batch at a time; item ``group * members + member``.

    On a CPU every image has the same bytes whenever ``items`` starts at the same place (a shard
    does), whatever the batch size. Elsewhere batches of another size can change an image by
    rounding, and with it the lambda that a bisection finds.

    Args:
        denoiser: Class- or prompt-conditional.
        plan: Made for the denoiser's class names.
        items: Which items; whole groups if the plan bisects.
        config: Conditions, sampler, batch size.
        on_step: See :func:`~diffcal.diffusion.samplers.sample`; padded rows come last. Not for a plan
            that bisects, whose steps do not follow the items.

    Yields:
        A batch of images.

    Raises:
        ConfigError: the model cannot be mixed in this way; parts of a group that is bisected.
        NumericalError: NaN or infinity from the network; names the groups.
    """
    if denoiser.condition_kind == "none":
        raise ConfigError("the model is unconditional: it has no classes to mix")
    device = next(denoiser.module.parameters()).device
    pad = device.type == "cpu"
    painter = _Painter(denoiser, plan, config, device, pad)
    if plan.bisects:
        if on_step is not None:
            raise ConfigError("a plan that bisects has no steps to follow; give it its weights")
        yield from painter.whole_groups(items)
        return
    for start in range(items.start, items.stop, painter.size):
        batch = range(start, min(start + painter.size, items.stop))
        picked = [divmod(item, plan.config.members) for item in batch]
        groups = {group: plan[group] for group, _ in picked}
        weights = torch.stack([groups[group].weights[member] for group, member in picked])
        samples = painter.samples([groups[group] for group, _ in picked], weights, on_step)
        yield MixBatch(batch, painter.pixels(samples)[: len(batch)], weights)


class _Painter:
    """Draws rows of (group, weights) in calls of the right size."""

    def __init__(
        self,
        denoiser: Denoiser,
        plan: MixPlan,
        config: GenerationConfig,
        device: torch.device,
        pad: bool,
    ) -> None:
        self.denoiser, self.plan, self.config = denoiser, plan, config
        self.device, self.pad = device, pad
        self.size = fixed_rows(denoiser.sample_shape) if pad else config.batch_size

    def whole_groups(self, items: range) -> Iterator[MixBatch]:
        """Groups by bisection, as many at a time as fill a call with one image of each."""
        members = self.plan.config.members
        if items.start % members or len(items) % members:
            raise ConfigError(
                f"items {items.start} to {items.stop - 1} are not whole groups of {members}, as a "
                "bisection draws them"
            )
        for first in range(items.start // members, items.stop // members, self.size):
            numbers = range(first, min(first + self.size, items.stop // members))
            groups = [self.plan[number] for number in numbers]
            lambdas, samples = bisected(
                partial(self._of_ladders, groups), len(groups), members, self.plan.config.spare
            )
            for group, along, ladder in zip(groups, lambdas, samples, strict=True):
                batch = range(group.index * members, (group.index + 1) * members)
                weights = torch.stack([along, 1 - along], dim=1)
                yield MixBatch(batch, self.pixels(ladder.to(self.device)), weights)

    def _of_ladders(
        self, groups: Sequence[MixGroup], ladders: Sequence[int], lambdas: Float[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        weights = torch.stack([lambdas, 1 - lambdas], dim=1)
        drawn: list[Tensor] = []
        for row in range(0, len(weights), self.size):
            part = weights[row : row + self.size]
            own = [groups[ladder] for ladder in ladders[row : row + self.size]]
            drawn.append(self.samples(own, part)[: len(own)].cpu())
        return torch.cat(drawn)

    def samples(
        self,
        groups: Sequence[MixGroup],
        weights: Float[Tensor, "b k"],
        on_step: OnStep | None = None,
    ) -> Float[Tensor, "n c h w"]:
        """One sample for each row and then those of padding, float32, from one call of the sampler."""
        count = len(groups)
        height = max(8, 1 << (count - 1).bit_length()) if self.pad else count
        padded = [*groups, *([groups[-1]] * (height - count))]
        shares = torch.cat([weights, weights[-1:].expand(height - count, -1)])
        try:
            return self._draw(padded, shares, on_step)
        except NumericalError as error:
            numbers = [group.index for group in groups]
            raise NumericalError(f"groups {min(numbers)} to {max(numbers)}: {error}") from error

    def _draw(
        self, groups: Sequence[MixGroup], shares: Float[Tensor, "b k"], on_step: OnStep | None
    ) -> Float[Tensor, "b c h w"]:
        shape = self.denoiser.sample_shape
        distinct = {group.index: group for group in groups}
        order = {index: place for place, index in enumerate(distinct)}
        place = torch.tensor([order[group.index] for group in groups])
        classes = torch.tensor([group.classes for group in groups])
        weights = torch.zeros(len(groups), self.denoiser.num_classes)
        weights.scatter_(1, classes, shares)
        noise = torch.stack([initial_noise(group.seed, shape) for group in distinct.values()])
        call, condition = mixed_denoiser(self.denoiser, weights, self.config.condition)
        return sample(
            call,
            noise.to(self.device)[place.to(self.device)],
            condition,
            self.config.sampler,
            churn_noise=_ChurnNoise(self.plan.seed, list(distinct), shape, place),
            on_step=on_step,
        ).float()

    def pixels(self, samples: Float[Tensor, "b c h w"]) -> UInt8[ndarray, "b y x p"]:
        with torch.no_grad():
            return self.denoiser.decode(samples).cpu().numpy()


def initial_noise(seed: int, shape: tuple[int, ...]) -> Float[Tensor, "c h w"]:
    """Unit normal noise of a seed, float32, the first draw of a CPU generator: the same everywhere.

    EDM's commands do the same with ``seed mod 2**32``, the part of a seed that the generator reads
    (github.com/NVlabs/edm, ``generate.py``).
    """
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))


class _ChurnNoise:
    """Fresh noise of a step, drawn by each group's own generator and shared by its members."""

    def __init__(self, seed: int, groups: list[int], shape: tuple[int, ...], place: Tensor) -> None:
        self.generators = [item_generator(seed, "churn", group) for group in groups]
        self.shape, self.place = shape, place

    def __call__(self, step: int) -> Float[Tensor, "b c h w"]:
        drawn = [torch.randn(self.shape, generator=generator) for generator in self.generators]
        return torch.stack(drawn)[self.place]
