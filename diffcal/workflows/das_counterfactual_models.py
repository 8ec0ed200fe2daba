"""Models trained without some images, and the queries as each of them draws them."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxtyping import UInt8
from safetensors.torch import load_file, save
from torch import Tensor

from diffcal.core.progress import progress_bar
from diffcal.core.runs import read_json, write_atomic, write_json
from diffcal.data.sources import ImageSource
from diffcal.diffusion.checkpoints import load_denoiser
from diffcal.diffusion.denoisers import Denoiser
from diffcal.errors import ArtifactError
from diffcal.workflows.das_redraw import Redrawable
from diffcal.workflows.das_subset_groups import Member, train_group
from diffcal.workflows.das_subset_models import LoneAccelerator, SubsetSource
from diffcal.workflows.train_diffusion import TrainDiffusionConfig, train_diffusion

__all__ = ["TrainedModel", "drawn_images", "save_images", "train_and_draw"]


@dataclass(frozen=True)
class TrainedModel:
    """One model of the experiment."""

    name: str
    """Of its folder in ``models/``, and of its images in ``images/``."""
    removed: tuple[int, ...]
    """Positions of the training images that it never sees."""
    seed: int
    keep: tuple[float, ...] = ()


def train_and_draw(
    models: Sequence[TrainedModel],
    out: Path,
    training: TrainDiffusionConfig,
    source: ImageSource,
    rows: range,
    queries: Redrawable | None,
    state: Any,
    device: str,
    *,
    together: int = 1,
    title: str,
) -> None:
    """Train ``out/models/NAME/checkpoint`` and write ``out/images/NAME.safetensors``; resumes.

    Models are trained ``together`` at a time, the attributed one alone. Of ``W`` processes,
    process ``w`` owns the groups ``g`` with ``g % W == w``, and all wait for each other at the end. A
    finished group is not trained again, an interrupted one continues from its last saved state; states
    of finished models are removed.

    Args:
        training: The recipe.
        rows: All training rows of ``source``.
        queries: What each model draws; nothing yet if None.

    Raises:
        ArtifactError: a folder holds a model of other settings or images.
        ConfigError: settings that networks trained together cannot have.
        NumericalError: a training diverged, or a model draws NaN; the others stay.
    """
    where = str(state.device) if device == "auto" else device
    attributed = [model for model in models if not model.removed and model.seed == training.seed]
    rest = [model for model in models if model not in attributed]
    groups = [
        *([model] for model in attributed),
        *(rest[i : i + together] for i in range(0, len(rest), together)),
    ]
    own = groups[state.process_index :: state.num_processes]
    with progress_bar(sum(map(len, own)), title, unit="model") as bar:
        for group in own:
            _train(group, out / "models", training, source, rows, device)
            for model in group:
                images = out / "images" / f"{model.name}.safetensors"
                if queries is not None and not _drawn(images, queries):
                    checkpoint = out / "models" / model.name / "checkpoint"
                    save_images(images, queries, load_denoiser(checkpoint, device=where))
            bar.update(len(group))
    state.wait_for_everyone()


def save_images(path: Path, queries: Redrawable, denoiser: Denoiser) -> None:
    """Write the queries as ``denoiser`` draws them."""
    data = save({"images": queries.draw(denoiser)}, metadata={"queries": queries.fingerprint})
    write_atomic(path, lambda file: file.write(data))


def drawn_images(out: Path, name: str) -> UInt8[Tensor, "q h w c"]:
    """The queries as model ``name`` drew them."""
    return load_file(out / "images" / f"{name}.safetensors")["images"]


def _drawn(path: Path, queries: Redrawable) -> bool:
    """Whether the images are there.

    Raises:
        ArtifactError: they are, but of other queries.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return False
    try:
        with safe_open(path, framework="pt") as file:
            found = (file.metadata() or {}).get("queries")
    except SafetensorError as error:
        raise ArtifactError(f"'{path}' is damaged ({error}): delete it, run again") from error
    if found != queries.fingerprint:
        raise ArtifactError(f"'{path}' holds other queries: delete it and run again")
    return True


def _train(
    group: Sequence[TrainedModel],
    out: Path,
    training: TrainDiffusionConfig,
    source: ImageSource,
    rows: range,
    device: str,
) -> None:
    members = []
    for model in group:
        gone = set(model.removed)
        images = SubsetSource(source, [row for at, row in enumerate(rows) if at not in gone])
        members.append(Member(model.name, images, model.seed))
        note = out / model.name / "finished.json"
        if note.exists() and read_json(note)["data"] != images.fingerprint:
            raise ArtifactError(
                f"'{out / model.name}' holds a model of other images: delete it and run again"
            )
    if not all((out / model.name / "finished.json").exists() for model in group):
        settings = [
            replace(
                training,
                # The images are handed over, and nobody looks at samples on the way.
                first_row=0,
                rows=None,
                seed=model.seed,
                sample_every=training.optimizer.steps,
                sample_steps=2,
                keep=model.keep,
            )
            for model in group
        ]
        if len(group) == 1:
            _train_alone(settings[0], out, members[0], device)
        else:
            train_group(settings, out, members, device=device)
    # Optimiser states would be most of the experiment's size.
    shutil.rmtree(out / "groups" / group[0].name, ignore_errors=True)
    for model in group:
        shutil.rmtree(out / model.name / "state", ignore_errors=True)


def _train_alone(config: TrainDiffusionConfig, out: Path, member: Member, device: str) -> None:
    precision = config.optimizer.precision
    accelerator = LoneAccelerator(cpu=device == "cpu", mixed_precision=precision)
    folder = out / member.name
    summary = train_diffusion(
        config, folder, source=member.images, accelerator=accelerator, device=device
    )
    note = {
        "images": len(member.images),
        "data": member.images.fingerprint,
        "loss": summary["loss"],
    }
    write_json(folder / "finished.json", note)
