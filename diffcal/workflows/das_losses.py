"""Losses of every subset model on every query: what an attribution has to predict."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save
from torch import Tensor

from diffcal.attribution.lds import average_losses
from diffcal.attribution.outputs import DenoiserObjective
from diffcal.attribution.timesteps import noise_levels
from diffcal.core.progress import progress_bar
from diffcal.core.rng import item_normal
from diffcal.core.runs import write_atomic
from diffcal.data.images import encode_png
from diffcal.data.sources import open_images
from diffcal.diffusion.checkpoints import load_denoiser
from diffcal.diffusion.denoisers import Denoiser
from diffcal.errors import ArtifactError, ConfigError
from diffcal.workflows.das_images import ConditionedImages, open_queries
from diffcal.workflows.das_lds_config import LdsConfig, LossConfig
from diffcal.workflows.das_redraw import ClassImages
from diffcal.workflows.das_subset_models import BASE, model_names, training_rows

__all__ = ["generated_images", "loss_tables", "query_losses", "write_images", "write_queries"]


def write_queries(config: LdsConfig, out: Path, models: Path, device: str) -> None:
    """Write ``out/validation.parquet`` and ``out/generated.parquet`` unless they are there.

    Raises:
        ConfigError: held-out rows that are not there, or that are training images.
    """
    asked, source = (
        config.queries,
        open_images(
            config.data.name,
            image_column=config.data.image_column,
            label_column=config.data.label_column,
        ),
    )
    path = out / "validation.parquet"
    if asked.validation and not path.exists():
        rows = range(asked.first_row, asked.first_row + asked.validation)
        inside = training_rows(config, source)
        if max(rows.start, inside.start) < min(rows.stop, inside.stop):
            raise ConfigError(
                f"queries.first_row {rows.start}: rows {rows.start} to {rows.stop} are training "
                f"images ({inside.start} to {inside.stop}); held-out images must be others"
            )
        parts = list(source.batches(1024, rows))
        images = np.concatenate([part for _, part, _ in parts])
        write_images(path, images, np.concatenate([labels for _, _, labels in parts]))
    path = out / "generated.parquet"
    if asked.generated and not path.exists():
        denoiser = load_denoiser(models / BASE / "checkpoint", device=device)
        drawn = generated_images(config, denoiser)
        write_images(path, drawn.draw(denoiser).numpy(), drawn.labels.numpy())


def generated_images(config: LdsConfig, denoiser: Denoiser) -> ClassImages:
    """The generated queries, which the attributed model can draw again."""
    asked = config.queries
    return ClassImages(
        asked.generated,
        denoiser.class_names,
        asked.sampler,
        seed=asked.seed,
        stream="lds-query",
        batch=config.losses.batch,
    )


def loss_tables(
    config: LdsConfig, out: Path, models: Path, sets: Mapping[str, Path], state: Any, device: str
) -> dict[str, Float[Tensor, "s q"]]:
    """Mean loss of each subset's models on each query, by set of queries; resumes model by model.

    Every model writes ``out/NAME.safetensors`` with one table ``[noises, q]`` for each set; the
    processes share the models.

    Raises:
        ArtifactError: a table is of other queries.
    """
    names = model_names(config)
    own = names[state.process_index :: state.num_processes]
    with progress_bar(len(own), "losses", unit="model") as bar:
        for name, _, _ in own:
            path = out / f"{name}.safetensors"
            if not path.exists():
                denoiser = load_denoiser(models / name / "checkpoint", device=device)
                tables = {
                    key: query_losses(denoiser, open_queries(str(file), denoiser), config.losses)
                    for key, file in sorted(sets.items())
                }
                # One set at a time in a fixed order, so that the bytes repeat.
                stacked = torch.cat([tables[key] for key in sorted(tables)], dim=1)
                data = save({"losses": stacked})
                write_atomic(path, lambda file, data=data: file.write(data))
            bar.update(1)
    state.wait_for_everyone()
    seeds = len(config.subsets.training_seeds)
    whole = torch.stack([load_file(out / f"{name}.safetensors")["losses"] for name, _, _ in names])
    sizes = {key: getattr(config.queries, key) for key in sorted(sets)}
    if whole.shape[2] != sum(sizes.values()):
        raise ArtifactError(f"the tables in '{out}' are of other queries; delete them")
    by_subset = average_losses(whole.unflatten(0, (config.subsets.count, seeds)))
    return dict(zip(sizes, by_subset.split(list(sizes.values()), dim=1), strict=True))


@torch.no_grad()
def query_losses(
    denoiser: Denoiser,
    queries: ConditionedImages,
    config: LossConfig,
    positions: Sequence[int] | None = None,
) -> Float[Tensor, "e q"]:
    """Mean over timesteps of the squared error of the network's raw output, for each noise draw.

    The noise of a query depends on (draw, timestep, query) alone: all models meet the same.

    Args:
        positions: Of the queries to measure; all of them if None.
    """
    chosen = range(len(queries)) if positions is None else positions
    objective = DenoiserObjective(denoiser, "loss", "network")
    levels = noise_levels(denoiser, config.timesteps)
    where = next(denoiser.module.parameters()).device
    wide = torch.float32 if where.type == "mps" else torch.float64
    total = torch.zeros(config.noises, len(chosen), dtype=torch.float64)
    clean = denoiser.encode(queries.images(chosen))
    for draw in range(config.noises):
        for at, timestep in enumerate(levels.timesteps):
            for start in range(0, len(chosen), config.batch):
                stop = min(start + config.batch, len(chosen))
                rows = chosen[start:stop]
                noise = torch.stack(
                    [
                        item_normal(draw, f"lds-noise|{timestep}", i, denoiser.sample_shape)
                        for i in rows
                    ]
                )
                condition = queries.condition(denoiser, rows)
                inputs = objective.inputs(
                    clean[start:stop].to(where),
                    noise.to(where),
                    levels.sigmas[at].to(where, wide).expand(len(rows)),
                    levels.weights[at].to(where, wide).expand(len(rows)),
                    condition,
                )
                _, error = objective(*inputs)
                total[draw, start:stop] += error.double().cpu()
    return total / len(levels.timesteps)


def write_images(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Labelled images as one Parquet file, columns ``image`` (PNG) and ``label``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = [
        {"bytes": encode_png(image), "path": f"{row:06d}.png"} for row, image in enumerate(images)
    ]
    table = pa.table({"image": cells, "label": labels.astype(np.int64)})
    write_atomic(path, lambda file: pq.write_table(table, file))
