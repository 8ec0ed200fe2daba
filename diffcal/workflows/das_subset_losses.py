"""Attribution from the losses of models trained on subsets: the rows of such an index.

The models are those of a run of ``diffcal das lds``. Training rows say in which subsets an image was;
query rows are the losses of the subsets' models on the query, from the run's own tables for its own
queries, measured for any others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from safetensors.torch import load_file
from torch import Tensor

from diffcal.attribution.datamodels import SubsetMethod, query_rows
from diffcal.attribution.datamodels import training_rows as mask_rows
from diffcal.attribution.lds import average_losses
from diffcal.config import config_from_dict
from diffcal.core.progress import progress_bar
from diffcal.core.runs import fingerprint, read_json
from diffcal.data.sources import open_images
from diffcal.diffusion.checkpoints import load_denoiser
from diffcal.errors import ArtifactError, ConfigError, DataError
from diffcal.workflows.das_config import DasConfig, TrainingImages
from diffcal.workflows.das_images import ConditionedImages
from diffcal.workflows.das_lds_config import LdsConfig
from diffcal.workflows.das_losses import query_losses
from diffcal.workflows.das_subset_models import BASE, masks_of, model_names, training_rows
from diffcal.workflows.generate import ModelConfig

__all__ = ["SubsetLossRows", "SubsetRun", "with_subset_run"]

QUERIES_AT_ONCE = 256


@dataclass(frozen=True)
class SubsetRun:
    """A finished run of ``diffcal das lds``."""

    folder: Path
    config: LdsConfig

    @classmethod
    def open(cls, folder: Path | str) -> "SubsetRun":
        """Raises:
        ConfigError: no folder was named.
        ArtifactError: it holds no finished run.
        """
        if not str(folder):
            raise ConfigError(
                "this method asks models trained on subsets: name a run of diffcal das lds, as "
                "--set subset_run=runs/lds"
            )
        path = Path(folder) / "lds.json"
        found = read_json(path) if path.is_file() else None
        if not isinstance(found, dict) or "config" not in found:
            raise ArtifactError(f"'{folder}' is not a finished run of diffcal das lds")
        return cls(Path(folder), config_from_dict(LdsConfig, found["config"]))

    @cached_property
    def claim(self) -> dict[str, Any]:
        """What the run was begun with: settings and images that decide its models and losses."""
        claim = read_json(self.folder / "config.json")
        return {key: value for key, value in claim.items() if key != "queries"}

    def masks(self, training: ConditionedImages) -> Bool[Tensor, "s n"]:
        """Which of the training images each subset held.

        Raises:
            DataError: the run was trained on other images.
        """
        source = training.source
        same = source.fingerprint == self.claim["data_fingerprint"]
        if not same or training.rows != training_rows(self.config, source):
            raise DataError(
                f"the models of '{self.folder}' were not trained on subsets of rows "
                f"{training.rows.start} to {training.rows.stop} of '{source.name}'"
            )
        parts = [torch.as_tensor(part) for _, _, part in source.batches(1024, training.rows)]
        return masks_of(self.config, torch.cat(parts).long())

    def stored(self, queries: ConditionedImages) -> Float[Tensor, "s q"] | None:
        """The run's own losses, if these are its own queries."""
        kinds = [k for k in ("generated", "validation") if getattr(self.config.queries, k)]
        if (queries.weights is None) == self.config.conditional:
            return None
        start = 0
        for kind in kinds:
            path = self.folder / "queries" / f"{kind}.parquet"
            if path.is_file() and open_images(str(path)).fingerprint == queries.source.fingerprint:
                return self._tables()[:, [start + row for row in queries.rows]]
            start += getattr(self.config.queries, kind)
        return None

    def _tables(self) -> Float[Tensor, "s q"]:
        names = [name for name, _, _ in model_names(self.config)]
        files = [self.folder / "losses" / f"{name}.safetensors" for name in names]
        return self._by_subset([load_file(path)["losses"] for path in files])

    def measured(
        self, queries: ConditionedImages, positions: Sequence[int], device: str
    ) -> Float[Tensor, "s q"]:
        """Losses of every subset's models on queries of any kind, as the run measures them."""
        tables = []
        names = [name for name, _, _ in model_names(self.config)]
        with progress_bar(len(names), "losses", unit="model") as bar:
            for name in names:
                denoiser = load_denoiser(
                    self.folder / "models" / name / "checkpoint", device=device
                )
                tables.append(query_losses(denoiser, queries, self.config.losses, positions))
                bar.update(1)
        return self._by_subset(tables)

    def _by_subset(self, tables: list[Tensor]) -> Float[Tensor, "s q"]:
        seeds = len(self.config.subsets.training_seeds)
        return average_losses(torch.stack(tables).unflatten(0, (-1, seeds)))


class SubsetLossRows:
    """Rows of ``empirical-influence`` and ``datamodel``; see :mod:`diffcal.attribution.datamodels`.

    Args:
        training: The training images, which say what the subsets were.

    Raises:
        DataError: the run was trained on other images, or an image is in every subset or in none.
    """

    def __init__(
        self, method: str, run: SubsetRun, training: ConditionedImages, device: str
    ) -> None:
        self.method: SubsetMethod = cast(SubsetMethod, method)
        self.run, self.device = run, device
        self.at_once = QUERIES_AT_ONCE
        self._masks = run.masks(training)
        self._training = mask_rows(self.method, self._masks)

    @property
    def dim(self) -> int:
        """Number of subsets."""
        return len(self._masks)

    @property
    def spec(self) -> dict[str, Any]:
        """Method and run."""
        return {"subset_losses": {"method": self.method, "run": fingerprint(self.run.claim)}}

    def rows(
        self, images: ConditionedImages, positions: range, role: str
    ) -> tuple[Float[Tensor, "n k"], dict[str, Tensor]]:
        """See :class:`~.das_features.ImageRows`."""
        if role == "train":
            return self._training[list(positions)].float(), {}
        losses = self.run.stored(images)
        if losses is None:
            losses = self.run.measured(images, positions, self.device)
        else:
            losses = losses[:, list(positions)]
        return query_rows(self.method, self._masks, losses).float(), {}


def with_subset_run(config: DasConfig) -> DasConfig:
    """The configuration with model and training images of its run, unless others were named."""
    if config.inputs != "subset-losses":
        return config
    run = SubsetRun.open(config.subset_run)
    if config.model == ModelConfig():
        config = replace(
            config, model=ModelConfig(source=str(run.folder / "models" / BASE / "checkpoint"))
        )
    if config.data == TrainingImages():
        config = replace(config, data=run.config.data)
    return config
