"""Noise of (sample, timestep) rows: shared by all samples, by place in a batch, or independent."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.core.rng import item_normal
from diffcal.errors import ConfigError

__all__ = ["NoisePolicy", "attribution_noise"]

NoisePolicy = Literal["shared", "slot", "independent"]

_SLOTS_PER_SEED = 1000  # the published code seeds timestep t of repetition e with 1000 e + t


def attribution_noise(
    policy: NoisePolicy,
    seed: int,
    timestep: int,
    indices: Sequence[int],
    shape: tuple[int, ...],
    *,
    role: str = "train",
    slot_batch: int = 16,
) -> Float[Tensor, "b *d"]:
    """Standard normal noise of samples ``indices`` at one timestep, float32 on the CPU.

    - ``shared``: one draw for each (seed, timestep), the same for every training sample and query,
      so that kernel entries compare gradients at equal noise. [1, *shape] broadcast to the batch.
    - ``slot``: as the DAS release: the generator is seeded with ``1000 seed + timestep`` and a batch of
      ``slot_batch`` is drawn, so that a sample's noise is that of its place ``index % slot_batch``.
      The release draws the last batch only as long as it is; for samples whose size is a multiple of
      16 that gives the same numbers.
    - ``independent``: one draw for each (seed, timestep, role, index).

    Nothing depends on how rows are batched here, on their order, or on the device.

    Args:
        timestep: Name of the noise level; levels without a timestep are numbered in order.
        indices: Position of each sample in its (ordered) data set.
        shape: Shape of one sample.
        role: ``train`` or ``query``: keeps the ``independent`` draws of the two apart.

    Raises:
        ConfigError: unknown policy or an empty slot batch.
    """
    if policy == "shared":
        return _shared(seed, timestep, tuple(shape)).expand(len(indices), *shape)
    if policy == "slot":
        if slot_batch < 1:
            raise ConfigError(f"slot_batch must be at least 1, got {slot_batch}")
        batch = _slots(seed * _SLOTS_PER_SEED + timestep, (slot_batch, *shape))
        return batch[torch.tensor([index % slot_batch for index in indices], dtype=torch.long)]
    if policy == "independent":
        stream = f"attribution-noise|{role}|{timestep}"
        return torch.stack([item_normal(seed, stream, index, tuple(shape)) for index in indices])
    raise ConfigError(f"unknown noise policy '{policy}': use shared, slot or independent")


@lru_cache(maxsize=256)
def _shared(seed: int, timestep: int, shape: tuple[int, ...]) -> Tensor:
    return item_normal(seed, "attribution-noise|shared", timestep, shape)


@lru_cache(maxsize=64)
def _slots(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))
