"""Subset models trained several at once; each ends as training it alone would end it."""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from diffcal.config import config_to_dict
from diffcal.core.devices import resolve_device
from diffcal.core.runs import claim_folder, write_atomic, write_json
from diffcal.data.sources import ImageSource
from diffcal.diffusion.checkpoints import save_denoiser
from diffcal.diffusion.denoisers import images_to_model
from diffcal.diffusion.edm_networks import build_network
from diffcal.diffusion.ensemble_training import EnsembleTrainer
from diffcal.diffusion.training import batch_indices
from diffcal.errors import ArtifactError
from diffcal.workflows.train_diffusion import TrainDiffusionConfig, network_specification

__all__ = ["Member", "train_group"]

logger = logging.getLogger(__name__)

FORMAT = "diffcal-ensemble-state/1"


@dataclass(frozen=True)
class Member:
    """One model of a group."""

    name: str
    """Of its folder."""
    images: ImageSource
    seed: int


def train_group(
    settings: Sequence[TrainDiffusionConfig],
    out: Path,
    members: Sequence[Member],
    *,
    device: str = "auto",
) -> None:
    """Leave ``out/NAME/checkpoint`` and ``out/NAME/finished.json`` for every member.

    The state of all is kept in ``out/groups/FIRST-NAME``, from which an interrupted group goes on; on a
    CPU it ends with the same bytes. Initial weights, batches and noise are those of each member's seed.

    Args:
        settings: Of each member; they differ in the seed alone.

    Raises:
        ArtifactError: the group's folder belongs to other models, or its state is damaged.
        ConfigError: settings that networks trained together cannot have.
        NumericalError: a training diverged; the saved state stays.
    """
    opt = settings[0].optimizer
    parts = [_load(member.images) for member in members]
    class_names = members[0].images.class_names if settings[0].conditional else ()
    specification = network_specification(settings[0], parts[0][0].shape[1:], len(class_names))
    networks = []
    for member in members:
        torch.manual_seed(member.seed)
        networks.append(build_network(specification))
    trainer = EnsembleTrainer(
        networks,
        opt,
        [member.seed for member in members],
        networks[0].sigma_data,
        device=resolve_device(device),
    )
    folder = out / "groups" / members[0].name
    claim = {
        "training": config_to_dict(settings[0]) | {"seed": None},
        "members": [[m.name, m.images.fingerprint, m.seed] for m in members],
    }
    claim_folder(folder, claim)
    losses = _restore(folder, trainer)
    one_hot = torch.eye(len(class_names)) if class_names else None
    while trainer.step < opt.steps:
        batches, labels = [], []
        for member, (images, classes) in zip(members, parts, strict=True):
            rows = batch_indices(member.seed, len(images), opt.batch_size, trainer.step)
            batches.append(images_to_model(images[rows]))
            labels.append(None if one_hot is None else one_hot[classes[rows]])
        losses = trainer.train_step(batches, labels if one_hot is not None else None).tolist()
        if trainer.step % settings[0].save_every == 0 or trainer.step == opt.steps:
            _save(folder, trainer, losses)
    for member, setting, averages, loss in zip(
        members, settings, trainer.averages(), losses, strict=True
    ):
        network = build_network(specification)
        network.load_state_dict(averages)
        training: dict[str, Any] = {
            "steps": opt.steps,
            "images": opt.steps * opt.batch_size,
            "loss": round(loss, 6),
            "config": config_to_dict(setting),
        }
        save_denoiser(
            out / member.name / "checkpoint",
            network,
            class_names=class_names,
            training_info=training,
            dtype=setting.weights,
        )
        write_json(
            out / member.name / "finished.json",
            {"images": len(member.images), "data": member.images.fingerprint, "loss": loss},
        )


def _load(source: ImageSource) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [
        (torch.as_tensor(images), torch.as_tensor(labels))
        for _, images, labels in source.batches(1024)
    ]
    return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])


def _save(folder: Path, trainer: EnsembleTrainer, losses: list[float]) -> None:
    path = folder / "state" / f"step-{trainer.step:08d}.safetensors"
    # One entry: safetensors writes several in an order that changes from call to call.
    progress = {"format": FORMAT, "step": trainer.step, "losses": losses}
    data = save(trainer.tensors(), metadata={"progress": json.dumps(progress)})
    write_atomic(path, lambda file: file.write(data))
    for other in path.parent.iterdir():
        if other != path:
            other.unlink()


def _restore(folder: Path, trainer: EnsembleTrainer) -> list[float]:
    states = sorted((folder / "state").glob("step-*.safetensors"))
    if not states:
        return []
    try:
        with safe_open(states[-1], framework="pt") as file:
            progress = json.loads(file.metadata()["progress"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        trainer.restore(tensors, progress["step"])
    except Exception as error:
        raise ArtifactError(
            f"training state '{states[-1]}' cannot be read ({error}); delete it to start again"
        ) from error
    logger.info("group of %s resumed at step %d", folder.name, trainer.step)
    return list(progress["losses"])
