"""Attribution features of conditioned images, written shard by shard by any number of processes."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from diffcal.attribution.ekfac import Ekfac
from diffcal.attribution.feature_shards import ShardRange, shard_ranges
from diffcal.attribution.feature_store import FeatureStore
from diffcal.attribution.featurise import Featuriser
from diffcal.attribution.functionals import NamedFunctional
from diffcal.core.progress import progress_bar
from diffcal.core.tensors import require_finite
from diffcal.diffusion.denoisers import Denoiser
from diffcal.errors import ConfigError
from diffcal.mixing.encoding import EncoderConfig, build_encoder
from diffcal.models.encoders import FeatureEncoder
from diffcal.workflows.das_config import DasConfig, StoreConfig
from diffcal.workflows.das_images import ConditionedImages

__all__ = [
    "EmbeddingRows",
    "GradientRows",
    "ImageRows",
    "feature_spec",
    "make_featuriser",
    "make_rows",
    "with_functional",
    "write_features",
]

EMBEDDED_AT_ONCE = 128

Columns = dict[str, Float[Tensor, "n ..."]]


@runtime_checkable
class ImageRows(Protocol):
    """What makes feature rows of conditioned images."""

    at_once: int
    """Images of one call: results may depend on it by rounding, so that it is fixed."""

    @property
    def dim(self) -> int:
        """Entries of a row."""
        ...

    @property
    def spec(self) -> dict[str, Any]:
        """Everything that decides a row besides the image, as plain values."""
        ...

    def rows(
        self, images: ConditionedImages, positions: range, role: str
    ) -> tuple[Float[Tensor, "n k"], Columns]:
        """Rows of the images at ``positions`` and further columns, on the CPU."""
        ...


class GradientRows:
    """Gradients of the model at the images; the error of each timestep is column ``error``."""

    def __init__(self, featuriser: Featuriser) -> None:
        self.featuriser = featuriser
        # Whole images to each call, about as many rows as the network takes at once: that bounds what
        # is held beside the shard, and batches do not depend on where an earlier run was killed.
        self.at_once = max(1, featuriser.batch_rows // len(featuriser.levels.timesteps))

    @property
    def dim(self) -> int:
        """Entries of a projected gradient."""
        return self.featuriser.dim

    @property
    def spec(self) -> dict[str, Any]:
        """See :attr:`diffcal.attribution.featurise.Featuriser.spec`."""
        return self.featuriser.spec

    def rows(
        self, images: ConditionedImages, positions: range, role: str
    ) -> tuple[Float[Tensor, "n k"], Columns]:
        """See :class:`ImageRows`."""
        denoiser = self.featuriser.denoiser
        clean = denoiser.encode(images.images(positions))
        condition = images.condition(denoiser, positions)
        features = self.featuriser(clean, positions, condition, role=role)
        return features.vectors.cpu(), {"error": features.errors.cpu()}


class EmbeddingRows:
    """Pixels or embeddings of an encoder: what the likeness baselines compare."""

    def __init__(self, encoder: FeatureEncoder) -> None:
        self.encoder, self.at_once = encoder, EMBEDDED_AT_ONCE

    @property
    def dim(self) -> int:
        """Entries of an embedding."""
        return self.encoder.dim

    @property
    def spec(self) -> dict[str, Any]:
        """Name and version of the encoder."""
        return {"encoder": {"name": self.encoder.name, "version": self.encoder.version}}

    def rows(
        self, images: ConditionedImages, positions: range, role: str
    ) -> tuple[Float[Tensor, "n k"], Columns]:
        """See :class:`ImageRows`."""
        found = self.encoder.encode(images.images(positions)).float().cpu()
        return require_finite(found, f"'{self.encoder.name}' embeddings"), {}


def make_featuriser(
    config: DasConfig,
    denoiser: Any,
    functional: NamedFunctional | None = None,
    curvature: Ekfac | None = None,
) -> Featuriser:
    """The featuriser of a configuration.

    Raises:
        ConfigError: a functional of the user's own is asked for and not given.
    """
    if config.features.is_custom and functional is None:
        raise ConfigError(
            f"the functional '{config.features.functional}' is a callable: give it in Python, as "
            "das.index(config, out, functional=NamedFunctional(name, function)), and to das.score"
        )
    return Featuriser(
        denoiser,
        config.features,
        functional=functional,
        method=config.gradients,
        batch_rows=config.batch_rows,
        channels_last=config.channels_last,
        unknown=config.unknown,
        curvature=curvature,
    )


def with_functional(config: DasConfig, functional: NamedFunctional | None) -> DasConfig:
    """The configuration with a functional of the user's own in place of what it has.

    Raises:
        ConfigError: a method without gradients.
    """
    if functional is None:
        return config
    if config.inputs != "gradients":
        raise ConfigError(f"'{config.method}' takes no gradients, so it has no functional")
    return replace(config, features=replace(config.features, functional=functional.setting))


def make_rows(
    config: DasConfig,
    denoiser: Denoiser,
    training: ConditionedImages,
    device: str = "auto",
    functional: NamedFunctional | None = None,
    curvature: Ekfac | None = None,
) -> ImageRows:
    """What ``config.method`` makes rows of: gradients, pixels, embeddings or losses.

    Args:
        curvature: Of ``config.features.curvature``; without it such rows tell their ``spec`` only.

    Raises:
        ConfigError: settings that the model or the images do not have.
        DataError: subset models of other training images.
    """
    if config.inputs == "gradients":
        return GradientRows(make_featuriser(config, denoiser, functional, curvature))
    if config.inputs == "subset-losses":
        from diffcal.workflows.das_subset_losses import SubsetLossRows, SubsetRun

        run = SubsetRun.open(config.subset_run)
        return SubsetLossRows(config.method, run, training, device)
    encoder = EncoderConfig(kind="pixels") if config.inputs == "pixels" else config.encoder
    shape = training.source.image_shape
    return EmbeddingRows(
        build_encoder(encoder, denoiser=denoiser, image_shape=shape, device=device)
    )


def feature_spec(rows: ImageRows | Featuriser, images: ConditionedImages) -> dict[str, Any]:
    """What decides the bytes of a store: model, gradients, projection, images and conditions."""
    return {
        **rows.spec,
        "images": {
            "fingerprint": images.fingerprint,
            "first_row": images.rows.start,
            "count": len(images),
        },
    }


def write_features(
    rows: ImageRows | Featuriser,
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
    other.

    Args:
        rows: What makes them; a featuriser stands for its :class:`GradientRows`.
        state: The ``PartialState`` of accelerate.
        role: ``train`` or ``query``; see :class:`~diffcal.attribution.featurise.Featuriser`.
        title: Of the progress bar.

    Raises:
        ArtifactError: the folder holds features of something else (what differs is named), or a
            damaged shard.
        NumericalError: a gradient with NaN or infinity; shards written before stay.
    """
    if isinstance(rows, Featuriser):
        rows = GradientRows(rows)
    target = FeatureStore.create(
        folder, spec=feature_spec(rows, images), dim=rows.dim, dtype=store.dtype
    )
    own = shard_ranges(
        len(images), store.shard_rows, process=state.process_index, processes=state.num_processes
    )
    missing = [part for part in own if part.index not in target.finished]
    total = sum(part.stop - part.start for part in own)
    made = sum(part.stop - part.start for part in missing)
    with progress_bar(total, title, unit="image", initial=total - made) as bar:
        for part in missing:
            _write_shard(rows, images, target, part, role, bar)
    state.wait_for_everyone()
    return FeatureStore.open(folder), made


def _write_shard(
    rows: ImageRows,
    images: ConditionedImages,
    target: FeatureStore,
    part: ShardRange,
    role: str,
    bar: Any,
) -> None:
    vectors: list[Tensor] = []
    columns: dict[str, list[Tensor]] = {}
    for start in range(part.start, part.stop, rows.at_once):
        positions = range(start, min(start + rows.at_once, part.stop))
        found, further = rows.rows(images, positions, role)
        vectors.append(found)
        for name, column in further.items():
            columns.setdefault(name, []).append(column)
        bar.update(len(positions))
    ids = images.ids[part.start : part.stop]
    joined = {name: torch.cat(parts) for name, parts in columns.items()}
    target.write(part.index, ids, torch.cat(vectors), joined)
