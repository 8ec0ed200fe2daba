"""Attribution features of conditioned images, written shard by shard by any number of processes."""

from pathlib import Path
from typing import Any

import torch

from diffcal.attribution.feature_shards import ShardRange, shard_ranges
from diffcal.attribution.feature_store import FeatureStore
from diffcal.attribution.featurise import Featuriser
from diffcal.core.progress import progress_bar
from diffcal.workflows.das_config import DasConfig, StoreConfig
from diffcal.workflows.das_images import ConditionedImages

__all__ = ["feature_spec", "make_featuriser", "write_features"]


def make_featuriser(config: DasConfig, denoiser: Any) -> Featuriser:
    """The featuriser of a configuration."""
    return Featuriser(
        denoiser, config.features, method=config.gradients, batch_rows=config.batch_rows
    )


def feature_spec(featuriser: Featuriser, images: ConditionedImages) -> dict[str, Any]:
    """What decides the bytes of a store: model, gradients, projection, images and conditions."""
    return {
        **featuriser.spec,
        "images": {
            "fingerprint": images.fingerprint,
            "first_row": images.rows.start,
            "count": len(images),
        },
    }


def write_features(
    featuriser: Featuriser,
    images: ConditionedImages,
    folder: Path,
    store: StoreConfig,
    state: Any,
    *,
    role: str,
    title: str,
) -> tuple[FeatureStore, int]:
    """Write what the store in ``folder`` lacks; the finished store, and images made by this process.

    Of ``W`` processes, process ``w`` makes shards ``s`` with ``s % W == w``, and all wait for each
    other. The error of each timestep is kept as column ``error`` ``[n, t]``.

    Args:
        state: The ``PartialState`` of accelerate.
        role: ``train`` or ``query``; see :class:`~diffcal.attribution.featurise.Featuriser`.
        title: Of the progress bar.

    Raises:
        ArtifactError: the folder holds features of something else (what differs is named), or a
            damaged shard.
        NumericalError: a gradient with NaN or infinity; shards written before stay.
    """
    target = FeatureStore.create(
        folder, spec=feature_spec(featuriser, images), dim=featuriser.dim, dtype=store.dtype
    )
    own = shard_ranges(
        len(images), store.shard_rows, process=state.process_index, processes=state.num_processes
    )
    missing = [part for part in own if part.index not in target.finished]
    total = sum(part.stop - part.start for part in own)
    made = sum(part.stop - part.start for part in missing)
    with progress_bar(total, title, unit="image", initial=total - made) as bar:
        for part in missing:
            _write_shard(featuriser, images, target, part, role, bar)
    state.wait_for_everyone()
    return FeatureStore.open(folder), made


def _write_shard(
    featuriser: Featuriser,
    images: ConditionedImages,
    target: FeatureStore,
    part: ShardRange,
    role: str,
    bar: Any,
) -> None:
    # Whole images to each call, about as many rows as the network takes at once: that bounds what is
    # held beside the shard, and batches do not depend on where an earlier run was killed.
    step = max(1, featuriser.batch_rows // len(featuriser.levels.timesteps))
    vectors, errors = [], []
    for start in range(part.start, part.stop, step):
        positions = range(start, min(start + step, part.stop))
        clean = featuriser.denoiser.encode(images.images(positions))
        condition = images.condition(featuriser.denoiser, positions)
        features = featuriser(clean, positions, condition, role=role)
        vectors.append(features.vectors.cpu())
        errors.append(features.errors.cpu())
        bar.update(len(positions))
    ids = images.ids[part.start : part.stop]
    target.write(part.index, ids, torch.cat(vectors), {"error": torch.cat(errors)})
