"""Generated images that any model can draw again from the noise that they started from."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from diffcal.attribution.feature_shards import RowId
from diffcal.config import config_from_dict, config_to_dict
from diffcal.core.devices import module_device
from diffcal.core.rng import item_normal
from diffcal.core.runs import fingerprint
from diffcal.data.shards import read_manifest, verified_shard
from diffcal.data.soft_labels import flat_lists
from diffcal.diffusion.denoisers import Denoiser
from diffcal.diffusion.samplers import SamplerConfig, sample, sampling_sigmas
from diffcal.errors import ConfigError, DataError
from diffcal.mixing.generation import fixed_rows, generate_images
from diffcal.mixing.plan import MixPlan
from diffcal.workflows.das_images import GENERATED
from diffcal.workflows.generate import GenerateConfig, shard_items

__all__ = ["ClassImages", "DrawnBatch", "MixImages", "Redrawable", "denoised_levels"]


@dataclass(frozen=True)
class DrawnBatch:
    """Some images as they were just drawn."""

    positions: tuple[int, ...]
    """Which of the images."""
    images: UInt8[Tensor, "b h w c"]
    denoised: Float[Tensor, "steps b c h w"] | None
    """The predicted clean samples of every sampling step, if asked for; float32, on the CPU."""


class Redrawable(ABC):
    """Images that are decided by (noise, condition, sampler) and the model that draws them."""

    ids: tuple[RowId, ...]
    captions: tuple[str, ...]
    sampler: SamplerConfig

    def __len__(self) -> int:
        return len(self.ids)

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of noise, conditions and sampler."""

    @abstractmethod
    def batches(
        self, denoiser: Denoiser, positions: Sequence[int] | None = None, *, path: bool = False
    ) -> Iterator[DrawnBatch]:
        """The images as ``denoiser`` draws them, in batches whose composition never changes.

        Args:
            positions: Which images are wanted; all if None. Batches without any are left out.
            path: Keep the predicted clean samples of all steps.
        """

    def draw(self, denoiser: Denoiser) -> UInt8[Tensor, "q h w c"]:
        """All images, on the CPU."""
        parts = list(self.batches(denoiser))
        order = torch.tensor([position for part in parts for position in part.positions])
        return torch.cat([part.images for part in parts])[order.argsort()]


class ClassImages(Redrawable):
    """Images of one class after another, image i from noise (seed, stream, i).

    Args:
        count: How many.
        class_names: Of the model; empty if it is unconditional.
        stream: Name of the noise.
        batch: Images that pass through the network at once.
    """

    def __init__(
        self,
        count: int,
        class_names: tuple[str, ...],
        sampler: SamplerConfig,
        *,
        seed: int = 0,
        stream: str = "drawn-query",
        batch: int = 256,
    ) -> None:
        self.sampler, self.seed, self.stream, self.batch = sampler, seed, stream, batch
        self.labels = torch.arange(count) % max(len(class_names), 1)
        self.class_names = class_names
        self.ids = tuple(range(count))
        self.captions = tuple(
            class_names[label] if class_names else "" for label in self.labels.tolist()
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of seed, stream, number and sampler."""
        return fingerprint(
            ["class-images/1", self.seed, self.stream, len(self), config_to_dict(self.sampler)]
        )

    def batches(
        self, denoiser: Denoiser, positions: Sequence[int] | None = None, *, path: bool = False
    ) -> Iterator[DrawnBatch]:
        """See :meth:`Redrawable.batches`."""
        device = module_device(denoiser.module)
        for start in range(0, len(self), self.batch):
            rows = range(start, min(start + self.batch, len(self)))
            wanted = [i for i in rows if positions is None or i in positions]
            if not wanted:
                continue
            noise = torch.stack(
                [item_normal(self.seed, self.stream, i, denoiser.sample_shape) for i in rows]
            )
            condition = None
            if denoiser.condition_kind != "none":
                weights = torch.eye(denoiser.num_classes)[self.labels[rows.start : rows.stop]]
                condition = denoiser.condition(weights)
            steps = _Steps(len(rows)) if path else None
            drawn = sample(denoiser, noise.to(device), condition, self.sampler, on_step=steps)
            with torch.no_grad():
                images = denoiser.decode(drawn.float()).cpu()
            places = [i - start for i in wanted]
            yield DrawnBatch(
                tuple(wanted),
                images[places],
                None if steps is None else steps.stack()[:, places],
            )


class MixImages(Redrawable):
    """Images of a finished ``diffcal csm`` generation, with its own noise, weights and sampler.

    Every batch is the one in which an image was drawn, so that on a CPU the model that drew it draws
    the same bytes again. Of a plan that bisects the ratios that were found are drawn, by every model;
    its batches were others, so that a pixel may round to the next value.

    Args:
        folder: The run, or its ``generated`` folder.
        positions: Which of its images, by place.
        captions: Words for each.

    Raises:
        ArtifactError, DataError: not such a folder.
    """

    def __init__(self, folder: Path, positions: range, captions: tuple[str, ...]) -> None:
        if (folder / "generated" / "manifest.json").is_file():
            folder = folder / "generated"
        if not (folder / "manifest.json").is_file():
            raise DataError(
                f"the images of '{folder}' cannot be drawn again: their noise is not known; give a run "
                "of diffcal csm generate, or its generated folder"
            )
        self.manifest = read_manifest(folder, GENERATED, ("class_names", "config", "denoiser"))
        self.folder, manifest = folder, self.manifest
        self.config = config_from_dict(GenerateConfig, manifest["config"])
        self.class_names = tuple(manifest["class_names"])
        self.sampler = self.config.generation.sampler
        self.denoiser: str = manifest["denoiser"]
        """Fingerprint of the model that drew the images."""
        self.items = tuple(positions)
        self.ids, self.captions = self.items, captions

    @property
    def fingerprint(self) -> str:
        """SHA-256 of plan, sampler and places."""
        values: dict[str, Any] = config_to_dict(self.config)
        del values["model"]
        return fingerprint(["mix-images/1", values, list(self.items)])

    def batches(
        self, denoiser: Denoiser, positions: Sequence[int] | None = None, *, path: bool = False
    ) -> Iterator[DrawnBatch]:
        """See :meth:`Redrawable.batches`."""
        plan = self._plan
        on_cpu = module_device(denoiser.module).type == "cpu"
        generation = self.config.generation
        size = fixed_rows(denoiser.sample_shape) if on_cpu else generation.batch_size
        per_shard = self.config.groups_per_shard * self.config.plan.members
        wanted: dict[range, list[int]] = {}
        for position in range(len(self)) if positions is None else positions:
            item = self.items[position]
            shard = shard_items(self.config, item // per_shard)
            start = shard.start + (item - shard.start) // size * size
            wanted.setdefault(range(start, min(start + size, shard.stop)), []).append(position)
        for items, chosen in wanted.items():
            steps = _Steps(len(items)) if path else None
            (batch,) = generate_images(denoiser, plan, items, generation, on_step=steps)
            places = [self.items[position] - items.start for position in chosen]
            yield DrawnBatch(
                tuple(chosen),
                torch.from_numpy(batch.images)[places],
                None if steps is None else steps.stack()[:, places],
            )

    @cached_property
    def _plan(self) -> MixPlan:
        plan = MixPlan(self.config.plan, self.class_names, self.config.seed)
        return MixPlan(plan.config, plan.class_names, plan.seed, found=self._found(plan))

    def _found(self, plan: MixPlan) -> dict[int, Tensor] | None:
        """Weights of every group that shares a batch with one of the images."""
        if not plan.bisects:
            return None
        members = plan.config.members
        found: dict[int, Tensor] = {}
        per_shard = self.config.groups_per_shard * members
        for shard in sorted({item // per_shard for item in self.items}):
            path = verified_shard(self.folder, self.manifest["shards"][shard])
            rows, _ = flat_lists(pq.read_table(path, columns=["weights"])["weights"], np.float32)
            first = shard * self.config.groups_per_shard
            ladders = torch.from_numpy(rows).view(-1, members, plan.config.classes_per_mix)
            found |= {first + place: weights for place, weights in enumerate(ladders)}
        return found


def denoised_levels(denoiser: Denoiser, sampler: SamplerConfig) -> tuple[float, ...]:
    """Noise level at which each step's last predicted clean sample was predicted.

    That is where the step starts, except for Heun's, whose last evaluation lies where it ends.

    Raises:
        ConfigError: a sampler that adds noise on its way, whose levels are other ones.
    """
    if sampler.s_churn:
        raise ConfigError("the sampling path is followed for samplers without churn (s_churn 0)")
    sigmas = sampling_sigmas(denoiser, sampler).tolist()
    if sampler.solver == "heun":
        return (*sigmas[1:-1], sigmas[-2])
    return tuple(sigmas[:-1])


class _Steps:
    """Keeps what each step predicted, without the rows of padding."""

    def __init__(self, rows: int) -> None:
        self.rows, self.kept = rows, list[Tensor]()

    def __call__(self, step: int, sigma: float, x: Tensor, denoised: Tensor) -> None:
        self.kept.append(denoised[: self.rows].detach().float().cpu())

    def stack(self) -> Float[Tensor, "steps b c h w"]:
        return torch.stack(self.kept)
