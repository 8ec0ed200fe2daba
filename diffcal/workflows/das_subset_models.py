"""Models trained on subsets of the training set, one folder for each, spread over processes."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from numpy import ndarray
from torch import Tensor

from diffcal.attribution.subsets import subset_masks
from diffcal.core.progress import progress_bar
from diffcal.core.runs import fingerprint, write_json
from diffcal.data.sources import ImageSource, open_images
from diffcal.errors import ConfigError
from diffcal.workflows.das_checkpoints import kept_checkpoints
from diffcal.workflows.das_lds_config import LdsConfig
from diffcal.workflows.das_subset_groups import Member, train_group
from diffcal.workflows.train_diffusion import train_diffusion

__all__ = ["LoneAccelerator", "SubsetSource", "masks_of", "model_names", "train_models"]

BASE = "base"
"""The attributed model, trained on all images."""


class SubsetSource(ImageSource):
    """Some rows of a source, held in memory, in place of all of them."""

    def __init__(self, source: ImageSource, rows: Sequence[int]) -> None:
        self.name, self.class_names = source.name, source.class_names
        self.chosen = list(rows)
        parts = list(source.batches(1024, self.chosen))
        self.pixels = np.concatenate([images for _, images, _ in parts])
        self.labels = np.concatenate([labels for _, _, labels in parts])
        self._fingerprint = fingerprint([source.fingerprint, self.chosen])

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the whole source and of which rows these are."""
        return self._fingerprint

    def _rows(self, rows: Sequence[int]) -> Iterator[tuple[ndarray, int]]:
        return ((self.pixels[row], int(self.labels[row])) for row in rows)


class LoneAccelerator(Accelerator):
    """This process alone, whatever launch it is part of: each process trains models of its own."""

    @property
    def distributed_type(self) -> DistributedType:
        return DistributedType.NO

    @property
    def num_processes(self) -> int:
        return 1

    @property
    def process_index(self) -> int:
        return 0

    @property
    def is_main_process(self) -> bool:
        return True

    def wait_for_everyone(self) -> None:
        """Nobody to wait for."""

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """The value of the only process."""
        return tensor * scale


def masks_of(config: LdsConfig, labels: Tensor) -> Tensor:
    """Which training images each subset holds, bool ``[s, n]``."""
    subsets = config.subsets
    return subset_masks(
        len(labels),
        subsets.count,
        fraction=subsets.fraction,
        seed=subsets.seed,
        labels=labels if subsets.stratified else None,
    )


def model_names(config: LdsConfig) -> list[tuple[str, int, int]]:
    """(folder name, subset, training seed) of every subset model."""
    return [
        (f"subset-{subset:05d}-seed-{seed}", subset, seed)
        for subset in range(config.subsets.count)
        for seed in config.subsets.training_seeds
    ]


def train_models(config: LdsConfig, out: Path, state: Any, device: str) -> Tensor:
    """Train ``out/NAME/checkpoint`` for the attributed model and all subsets; resumes what is there.

    Of ``W`` processes, process ``w`` trains the groups ``g`` with ``g % W == w``, one after another: the
    attributed model alone, subset models ``subsets.together`` at a time. A finished group is not touched
    again, an interrupted one continues from its last saved state.

    Returns:
        The masks, bool ``[s, n]``.

    Raises:
        ConfigError: rows beyond the source.
        ArtifactError: a folder holds a model of other settings or images.
        CheckpointError: the attributed model was finished without checkpoints that a method wants.
        NumericalError: a training diverged; the others stay.
    """
    if config.kept_checkpoints and (out / BASE / "finished.json").exists():
        kept_checkpoints(out / BASE, config.kept_checkpoints)  # before the others are trained
    source = open_images(
        config.data.name,
        image_column=config.data.image_column,
        label_column=config.data.label_column,
    )
    rows = training_rows(config, source)
    labels = torch.cat([torch.as_tensor(part) for _, _, part in source.batches(1024, rows)])
    masks = masks_of(config, labels.long())
    jobs = [(BASE, list(rows), config.seed)]
    for name, subset, seed in model_names(config):
        inside = masks[subset].nonzero()[:, 0].tolist()
        jobs.append((name, [rows[position] for position in inside], seed))
    size = config.subsets.together
    groups = [jobs[:1], *(jobs[i : i + size] for i in range(1, len(jobs), size))]
    own = groups[state.process_index :: state.num_processes]
    with progress_bar(sum(map(len, own)), "subset models", unit="model") as bar:
        for group in own:
            if not all((out / name / "finished.json").exists() for name, _, _ in group):
                # Images are copied only now: those of all subsets together may not fit into memory.
                members = [
                    Member(name, SubsetSource(source, chosen), seed) for name, chosen, seed in group
                ]
                if len(members) == 1:
                    _train(config, out / members[0].name, members[0], device)
                else:
                    settings = [config.training_config(member.seed) for member in members]
                    train_group(settings, out, members, device=device)
            bar.update(len(group))
    state.wait_for_everyone()
    return masks


def training_rows(config: LdsConfig, source: ImageSource) -> range:
    """Rows of the source that make up the training set."""
    first, count = config.data.first_row, config.data.rows
    end = len(source) if count is None else first + count
    if not 0 <= first < end <= len(source):
        raise ConfigError(f"rows {first} to {end} asked for, but '{source.name}' has {len(source)}")
    return range(first, end)


def _train(config: LdsConfig, out: Path, member: Member, device: str) -> None:
    accelerator = LoneAccelerator(cpu=device == "cpu", mixed_precision=config.optimizer.precision)
    training = config.training_config(member.seed)
    if member.name == BASE:
        # Methods that follow a training follow that of the attributed model.
        training = replace(training, keep=config.kept_checkpoints)
    summary = train_diffusion(
        training,
        out,
        source=member.images,
        accelerator=accelerator,
        device=device,
    )
    write_json(
        out / "finished.json",
        {
            "images": len(member.images),
            "data": member.images.fingerprint,
            "loss": summary["loss"],
        },
    )
