"""Mixed images of a plan: all groups and ratios in one batch, one noise for each group."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, UInt8
from numpy import ndarray
from torch import Tensor

from diffcal.core.rng import item_generator
from diffcal.diffusion.denoisers import Denoiser
from diffcal.diffusion.samplers import OnStep, SamplerConfig, sample
from diffcal.errors import ConfigError, NumericalError
from diffcal.mixing.conditions import ConditionConfig, mixed_denoiser
from diffcal.mixing.plan import MixPlan

__all__ = ["GenerationConfig", "fixed_rows", "generate_images", "initial_noise"]


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


def generate_images(
    denoiser: Denoiser,
    plan: MixPlan,
    items: range,
    config: GenerationConfig,
    *,
    on_step: OnStep | None = None,
) -> Iterator[tuple[range, UInt8[ndarray, "b h w c"]]]:
    """Images of consecutive items, a batch at a time; item ``group * members + member``.

    On a CPU every image has the same bytes whenever ``items`` starts at the same place (a shard
    does), whatever the batch size. Elsewhere batches of another size can change an image by
    rounding.

    Args:
        denoiser: Class- or prompt-conditional.
        plan: Made for the denoiser's class names.
        items: Which items.
        config: Conditions, sampler, batch size.
        on_step: See :func:`~diffcal.diffusion.samplers.sample`; padded rows come last.

    Yields:
        (items of the batch, images). Pixels are uint8.

    Raises:
        ConfigError: the model cannot be mixed in this way.
        NumericalError: NaN or infinity from the network; names the groups.
    """
    if denoiser.condition_kind == "none":
        raise ConfigError("the model is unconditional: it has no classes to mix")
    device = next(denoiser.module.parameters()).device
    pad = device.type == "cpu"
    size = fixed_rows(denoiser.sample_shape) if pad else config.batch_size
    for start in range(items.start, items.stop, size):
        batch = range(start, min(start + size, items.stop))
        height = max(8, 1 << (len(batch) - 1).bit_length()) if pad else len(batch)
        rows = [*batch, *([batch[-1]] * (height - len(batch)))]
        try:
            images = _draw(denoiser, plan, rows, config, device, on_step)
        except NumericalError as error:
            first, last = (item // plan.config.members for item in (batch[0], batch[-1]))
            raise NumericalError(f"groups {first} to {last}: {error}") from error
        yield batch, images[: len(batch)].cpu().numpy()


def _draw(
    denoiser: Denoiser,
    plan: MixPlan,
    rows: Sequence[int],
    config: GenerationConfig,
    device: torch.device,
    on_step: OnStep | None,
) -> UInt8[Tensor, "b h w c"]:
    members = plan.config.members
    groups = {item // members: plan[item // members] for item in rows}
    order = {group: place for place, group in enumerate(groups)}
    place = torch.tensor([order[item // members] for item in rows])
    weights = torch.zeros(len(rows), denoiser.num_classes)
    for row, item in enumerate(rows):
        group = groups[item // members]
        weights[row, list(group.classes)] = group.weights[item % members]
    noise = torch.stack(
        [initial_noise(group.seed, denoiser.sample_shape) for group in groups.values()]
    )
    call, condition = mixed_denoiser(denoiser, weights, config.condition)
    x = sample(
        call,
        noise.to(device)[place.to(device)],
        condition,
        config.sampler,
        churn_noise=_ChurnNoise(plan.seed, list(groups), denoiser.sample_shape, place),
        on_step=on_step,
    )
    with torch.no_grad():
        return denoiser.decode(x.float())


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
